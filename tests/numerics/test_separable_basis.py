"""Jaderberg's first scheme: exact with all products of taps, planted kernels come back, data never hurt."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SHAPES, F, Sampled, layer, layers

from ccompile.numerics import separable, separable_basis, weighted


def planted(seed: int, o: int, c: int, kh: int, kw: int, terms: int) -> F:
    rng = np.random.default_rng(seed)
    P, V, U = (rng.standard_normal(shape) for shape in ((o, c, terms), (terms, c, kh), (terms, c, kw)))
    W: F = np.einsum("ocm,mci,mcj->ocij", P, V, U)
    return W


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [None, 9])
def test_as_many_terms_as_taps_are_exact(shape: tuple[int, int, int, int], n: int | None) -> None:
    sample = layer(1, *shape, n=n)
    terms = shape[2] * shape[3]
    for H in (None, sample.H):
        np.testing.assert_allclose(separable_basis.fit(sample.W, H, terms).compose(), sample.W, atol=1e-6)


@pytest.mark.parametrize("terms", [1, 2])
def test_planted_terms_are_recovered(terms: int) -> None:
    W, H = planted(2, 8, 5, 3, 3, terms), layer(2, 8, 5).H
    for metric in (None, H):
        np.testing.assert_allclose(separable_basis.fit(W, metric, terms).compose(), W, atol=1e-3)


def test_one_output_channel_is_a_sum_of_rank_one_kernels() -> None:
    W = layer(3, 1, 4, 3, 5).W
    s = np.linalg.svd(W[0], compute_uv=False)
    for terms in (1, 2, 3):
        found = separable_basis.fit(W, None, terms)
        assert found.loss == pytest.approx(np.square(s[:, terms:]).sum(), rel=1e-3, abs=1e-9)


def test_the_kernels_in_sequence_are_the_composed_convolution() -> None:
    W, x = layer(4, 5, 3, 3, 5).W, np.random.default_rng(0).standard_normal((3, 9, 10))
    found = separable_basis.fit(W, None, 2)
    down, across, mixing = found.kernels()
    assert [kernel.shape for kernel in (down, across, mixing)] == [(6, 1, 3, 1), (6, 1, 1, 5), (5, 6, 1, 1)]
    columns = np.lib.stride_tricks.sliding_window_view(x, 3, 1)
    inner = np.einsum("chwi,cmi->cmhw", columns, down.reshape(3, 2, 3)).reshape(6, 7, 10)
    inner = np.einsum("ahwj,aj->ahw", np.lib.stride_tricks.sliding_window_view(inner, 5, 2), across.reshape(6, 5))
    patches = np.lib.stride_tricks.sliding_window_view(x, (3, 5), (1, 2))
    got = np.tensordot(mixing[:, :, 0, 0], inner, 1)
    np.testing.assert_allclose(got, np.einsum("chwij,ocij->ohw", patches, found.compose()), atol=1e-10)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(layers(), st.data())
def test_data_never_hurt(sample: Sampled, data: st.DataObject) -> None:
    terms = data.draw(st.integers(1, min(sample.W.shape[2] * sample.W.shape[3], 6)))
    found, free = (separable_basis.fit(sample.W, H, terms) for H in (sample.H, None))
    assert found.loss <= weighted.loss(sample.H, sample.W, free.compose()) + 1e-12 * sample.energy
    assert found.loss == pytest.approx(sample.measured(found.compose()), rel=1e-6, abs=1e-12 * sample.energy)
    np.testing.assert_allclose(np.linalg.norm(found.V, axis=2), 1, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(found.U, axis=2), 1, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_it_never_loses_less_than_kernels_that_need_not_be_separable(seed: int) -> None:
    sample = layer(seed, 10, 6)
    for terms in (1, 2, 3):
        assert separable_basis.fit(sample.W, None, terms).loss >= separable.fit(sample.W, None, terms).loss


def test_more_terms_lose_less_and_sweeps_descend() -> None:
    sample = layer(5, 10, 6)
    assert (
        list(np.diff([separable_basis.fit(sample.W, sample.H, terms).loss for terms in (1, 2, 4, 9)]) < 0) == [True] * 3
    )
    losses = [separable_basis.fit(sample.W, sample.H, 2, sweeps).loss for sweeps in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("terms", [0, 10])
def test_a_number_of_terms_that_is_none_is_refused(terms: int) -> None:
    with pytest.raises(ValueError, match=r"terms .* 1 \.\. 9"):
        separable_basis.fit(layer(0, 4, 3).W, None, terms)
