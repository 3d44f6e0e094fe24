"""Activation-aware SVD: the loss is the discarded spectrum, and no other weight of that rank has less."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SHAPES, F, Sampled, layer, layers

from ccompile.numerics import svd, weighted


def unfolded(sample: Sampled) -> F:
    return sample.W.reshape(len(sample.W), -1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [None, 7])
def test_the_loss_is_the_discarded_spectrum_and_what_samples_lose(
    shape: tuple[int, int, int, int], n: int | None
) -> None:
    sample = layer(1, *shape, n=n)
    W, H = unfolded(sample), sample.H
    A, s, B = weighted.decompose(W, H)
    assert len(s) == min(W.shape)
    for rank in range(len(s) + 1):
        What = A[:, :rank] @ B[:rank]
        want = pytest.approx(np.square(s[rank:]).sum(), rel=1e-9, abs=1e-12 * sample.energy)
        assert weighted.loss(H, W, What) == want
        assert sample.measured(What.reshape(sample.W.shape)) == want


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_svd_of_the_whitened_weight(shape: tuple[int, int, int, int]) -> None:
    sample = layer(2, *shape)
    W, H = unfolded(sample), sample.H
    L, inverse = weighted.root(H)
    U, s, V = svd.decompose(W @ L)
    np.testing.assert_allclose(weighted.spectrum(W, H)[: len(s)], s, atol=1e-7 * s[0])
    for rank in range(1, len(s)):
        A, B = weighted.truncate(W, H, rank)
        np.testing.assert_allclose(A @ B, U[:, :rank] * s[:rank] @ V[:rank] @ inverse, atol=1e-6 * np.abs(W).max())


@pytest.mark.parametrize("n", [None, 5])
def test_the_root_and_its_inverse(n: int | None) -> None:
    H = layer(3, n=n, dead=(2,)).H
    L, inverse = weighted.root(H)
    assert L.shape == (36, 35 if n is None else 4), "centring takes one of the samples"
    np.testing.assert_allclose(L @ L.T, H, atol=1e-12 * np.abs(H).max())
    np.testing.assert_allclose(inverse @ L, np.eye(L.shape[1]), atol=1e-9)
    assert (np.diff(np.linalg.norm(L, axis=0)) <= 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_exact_even_where_the_inputs_see_little(shape: tuple[int, int, int, int]) -> None:
    for n in (None, 3):
        sample = layer(4, *shape, n=n, dead=(0,))
        W = unfolded(sample)
        A, B = weighted.truncate(W, sample.H, min(W.shape))
        np.testing.assert_allclose(A @ B, W, atol=1e-12 * np.abs(W).max() * len(W))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_planted_rank_is_recovered(rank: int) -> None:
    sample, rng = layer(5), np.random.default_rng(6)
    W = rng.standard_normal((6, rank)) @ rng.standard_normal((rank, 36))
    for H in (None, sample.H):
        A, B = weighted.truncate(W, H, rank)
        np.testing.assert_allclose(A @ B, W, atol=1e-10)


def test_no_other_weight_of_this_rank_loses_less() -> None:
    sample, rng = layer(7), np.random.default_rng(8)
    W, H = unfolded(sample), sample.H
    A, B = weighted.truncate(W, H, 3)
    best = weighted.loss(H, W, A @ B)
    for _ in range(100):
        guess = rng.standard_normal((6, 3)) if rng.integers(2) else A + 0.01 * rng.standard_normal(A.shape)
        fitted = np.linalg.lstsq(guess, W, rcond=None)[0]
        assert weighted.loss(H, W, guess @ fitted) >= best * (1 - 1e-12)


def test_without_data_it_is_the_plain_svd() -> None:
    W = unfolded(layer(9))
    np.testing.assert_allclose(weighted.spectrum(W, None), svd.decompose(W)[1])
    np.testing.assert_allclose(weighted.spectrum(W, np.eye(36)), svd.decompose(W)[1])
    free, identity = weighted.truncate(W, None, 2), weighted.truncate(W, np.eye(36), 2)
    for a, b in zip(free, identity, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layers(), st.data())
def test_data_never_hurts_and_ranks_never_hurt(sample: Sampled, data: st.DataObject) -> None:
    W, H = unfolded(sample), sample.H
    rank = data.draw(st.integers(1, min(W.shape)))
    A, s, B = weighted.decompose(W, H)
    U, _, V = weighted.decompose(W, None)
    with_data = weighted.loss(H, W, A[:, :rank] @ B[:rank])
    assert with_data <= weighted.loss(H, W, U[:, :rank] @ V[:rank]) * (1 + 1e-9) + 1e-12 * sample.energy
    assert with_data == pytest.approx(np.square(s[rank:]).sum(), rel=1e-9, abs=1e-12 * sample.energy)
    np.testing.assert_allclose(A.T @ A, np.eye(len(s)), atol=1e-10)
    assert (np.diff(s) <= 0).all()


def test_relative_errors() -> None:
    sample = layer(10)
    W, H = sample.W, sample.H
    assert weighted.relative_error(H, W, W) == 0
    assert weighted.relative_error(H, W, 0 * W) == 1
    assert weighted.relative_error(0 * H, W, 0 * W) == 0
    assert weighted.relative_error(H, 0 * W, W) == np.inf


def test_equal_input_gives_equal_bytes_and_is_left_alone() -> None:
    sample = layer(11)
    W, H = unfolded(sample), sample.H
    W.flags.writeable = H.flags.writeable = False
    first, again = weighted.decompose(W, H), weighted.decompose(W.copy(), H.copy())
    assert [a.tobytes() for a in first] == [b.tobytes() for b in again]
    assert {a.dtype for a in weighted.truncate(W.astype(np.float32), H.astype(np.float32), 2)} == {np.dtype(np.float64)}


def test_wrong_shapes_values_and_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="need"):
        weighted.decompose(np.ones((2, 3)), np.eye(2))
    with pytest.raises(ValueError, match="not finite"):
        weighted.decompose(np.ones((2, 3)), np.full((3, 3), np.nan))
    with pytest.raises(ValueError, match="not finite"):
        weighted.root(np.full((3, 3), np.inf))
    for rank in (0, 3):
        with pytest.raises(ValueError, match=r"rank . must lie in 1 \.\. 2"):
            weighted.truncate(np.ones((2, 3)), None, rank)
