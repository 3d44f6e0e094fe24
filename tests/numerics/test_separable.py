"""Network decoupling: exact with all terms, planted sums come back, data never hurt."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SHAPES, F, Sampled, layer, layers

from ccompile.numerics import separable, weighted


def planted(seed: int, o: int, c: int, kh: int, kw: int, terms: int) -> F:
    rng = np.random.default_rng(seed)
    W: F = np.einsum("ocm,mcij->ocij", rng.standard_normal((o, c, terms)), rng.standard_normal((terms, c, kh, kw)))
    return W


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [None, 9])
def test_all_terms_are_exact(shape: tuple[int, int, int, int], n: int | None) -> None:
    sample = layer(1, *shape, n=n)
    terms = separable.terms_max(shape)
    assert separable.fit(sample.W, None, terms).error < 1e-12
    assert separable.fit(sample.W, sample.H, terms).error < 1e-7


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_planted_terms_are_recovered(terms: int) -> None:
    W, H = planted(2, 8, 5, 3, 3, terms), layer(2, 8, 5).H
    for metric in (None, H):
        np.testing.assert_allclose(separable.fit(W, metric, terms).compose(), W, atol=1e-6)


def test_without_data_the_error_is_what_every_channel_discards() -> None:
    W = layer(3, 8, 5).W
    spectra = np.linalg.svd(W.reshape(8, 5, 9).transpose(1, 0, 2), compute_uv=False)
    for terms in range(1, 9):
        assert separable.fit(W, None, terms).loss == pytest.approx(np.square(spectra[:, terms:]).sum(), abs=1e-12)


def test_the_kernels_in_sequence_are_the_composed_convolution() -> None:
    W, x = layer(4, 5, 3, 3, 5).W, np.random.default_rng(0).standard_normal((3, 9, 10))
    found = separable.fit(W, None, 2)
    depthwise, pointwise = found.kernels()
    patches = np.lib.stride_tricks.sliding_window_view(x, (3, 5), (1, 2))
    inner = np.einsum("chwij,cmij->cmhw", patches, depthwise.reshape(3, 2, 3, 5)).reshape(6, 7, 6)
    got = np.tensordot(pointwise[:, :, 0, 0], inner, 1)
    np.testing.assert_allclose(got, np.einsum("chwij,ocij->ohw", patches, found.compose()), atol=1e-10)
    assert (depthwise.size, pointwise.size) == separable.parameters(W.shape, 2)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layers(), st.data())
def test_data_never_hurt(sample: Sampled, data: st.DataObject) -> None:
    terms = data.draw(st.integers(1, separable.terms_max(sample.W.shape)))
    found, free = (separable.fit(sample.W, H, terms) for H in (sample.H, None))
    assert found.loss <= weighted.loss(sample.H, sample.W, free.compose()) + 1e-12 * sample.energy
    assert found.loss == pytest.approx(sample.measured(found.compose()), rel=1e-6, abs=1e-12 * sample.energy)
    kernels = found.D.reshape(terms, sample.W.shape[1], -1)
    grams = np.einsum("mct,nct->cmn", kernels, kernels)
    np.testing.assert_allclose(grams, np.broadcast_to(np.eye(terms), grams.shape), atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_sweeps_descend_and_data_help_a_lot(seed: int) -> None:
    sample = layer(seed, 10, 6)
    losses = [separable.fit(sample.W, sample.H, 2, sweeps).loss for sweeps in range(5)]
    assert losses == sorted(losses, reverse=True)
    free = separable.fit(sample.W, None, 2).compose()
    assert losses[-1] < 0.8 * weighted.loss(sample.H, sample.W, free)


@pytest.mark.parametrize("n", [None, 20])
def test_the_mixture_is_the_least_squares_fit(n: int | None) -> None:
    sample = layer(5, 4, 3, n=n)
    D = np.random.default_rng(6).standard_normal((2, 3, 9))
    Z = np.einsum("nct,mct->ncm", sample.X.reshape(-1, 3, 9), D).reshape(len(sample.X), -1)
    Y = sample.X @ sample.W.reshape(4, -1).T
    best = np.square(Y - Z @ np.linalg.lstsq(Z, Y, rcond=None)[0]).sum()
    W = sample.W.reshape(4, 3, 9)
    What = separable.mix(separable.mixture(W, sample.H, D), D)
    assert sample.measured(What.reshape(sample.W.shape)) == pytest.approx(float(best))
    free = np.square(separable.mix(separable.mixture(W, None, D), D) - W).sum()
    each = [np.linalg.lstsq(D[:, c].T, W[:, c].T, rcond=None)[1].sum() for c in range(3)]
    assert free == pytest.approx(sum(each))


def test_a_dead_channel_is_kept_finite() -> None:
    sample = layer(7, dead=tuple(range(9)))
    found = separable.fit(sample.W, sample.H, 2)
    assert np.isfinite(found.P).all()
    assert np.isfinite(found.D).all()


def test_equal_input_gives_equal_bytes() -> None:
    sample = layer(8)
    first, again = (separable.fit(sample.W.copy(), sample.H.copy(), 2) for _ in range(2))
    assert first.P.tobytes() == again.P.tobytes()
    assert first.D.tobytes() == again.D.tobytes()


def test_too_many_terms_and_wrong_shapes_are_refused() -> None:
    sample = layer(9, 4)
    for terms in (0, 5):
        with pytest.raises(ValueError, match=r"terms . must lie in 1 \.\. 4"):
            separable.fit(sample.W, sample.H, terms)
    with pytest.raises(ValueError, match="need"):
        separable.fit(sample.W, sample.H[:-1, :-1], 1)
