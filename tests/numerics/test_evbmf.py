"""EVBMF: planted ranks are found at high signal, nothing in pure noise, either way round."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import F

from ccompile.numerics import evbmf


def noisy(seed: int, m: int, n: int, rank: int, noise: float) -> F:
    rng = np.random.default_rng(seed)
    W: F = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n)) + noise * rng.standard_normal((m, n))
    return W


@pytest.mark.parametrize("rank", [1, 4, 12])
@pytest.mark.parametrize("shape", [(40, 40), (40, 160), (160, 40), (64, 576)])
@pytest.mark.parametrize("noise", [1e-3, 0.1, 0.3])
def test_planted_ranks_are_found(rank: int, shape: tuple[int, int], noise: float) -> None:
    for seed in range(3):
        assert evbmf.rank(noisy(seed, *shape, rank, noise)) == rank


@pytest.mark.parametrize("shape", [(40, 40), (30, 200), (200, 30)])
def test_pure_noise_has_no_rank(shape: tuple[int, int]) -> None:
    for seed in range(5):
        assert evbmf.rank(np.random.default_rng(seed).standard_normal(shape)) == 0


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_without_noise_it_is_the_rank(rank: int) -> None:
    assert evbmf.rank(noisy(1, 20, 30, rank, 0.0)) == rank


def test_the_noise_is_estimated() -> None:
    s = np.linalg.svd(noisy(2, 60, 90, 4, 0.5), compute_uv=False)
    assert evbmf.noise_variance(s, 90) == pytest.approx(0.25, rel=0.1)
    assert evbmf.rank_of(s, 90) == evbmf.rank_of(s, 90, 0.25) == 4
    assert evbmf.rank_of(s, 90, 1e6) == 0


def test_no_variance_on_a_fine_grid_has_less_free_energy() -> None:
    for seed in range(5):
        squares = np.square(np.linalg.svd(noisy(seed, 30, 50, 3, 0.4), compute_uv=False))
        found = evbmf._energy(evbmf.noise_variance(np.sqrt(squares), 50), squares, 50)
        grid = np.geomspace(squares[-1] / 50 / 4, squares.mean() / 50, 5000)
        assert found <= min(evbmf._energy(sigma2, squares, 50) for sigma2 in grid) + 1e-6 * abs(found)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12), st.floats(1e-3, 1e3))
def test_scale_orientation_and_order_do_not_matter(seed: int, m: int, n: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    W = noisy(seed, m, n, 1, 0.2)
    found = evbmf.rank(W)
    assert 0 <= found <= min(m, n)
    assert evbmf.rank(W.T) == found
    assert evbmf.rank(scale * W) == found
    assert evbmf.rank(W[rng.permutation(m)]) == found


def test_what_is_no_matrix_is_refused() -> None:
    for bad in (np.ones(3), np.ones((0, 3)), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="finite matrix"):
            evbmf.rank(bad)
    assert evbmf.rank(np.zeros((3, 4))) == 0
