"""Smooth dictionaries: smooth rows come back from few landmarks, the fit is that of least squares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Sampled, layer, layers

from ccompile.numerics import atoms, dictionary, weighted


@pytest.mark.parametrize("with_data", [False, True])
def test_smooth_rows_are_recovered_from_a_twentieth_of_their_pixels(with_data: bool) -> None:
    rng = np.random.default_rng(0)
    positions = dictionary.grid(20, 20)
    K = dictionary.squared_exponential(positions, 8.0)
    W = rng.standard_normal((10, 400)) @ np.linalg.cholesky(K + 1e-9 * np.eye(400)).T
    H = np.cov(rng.standard_normal((400, 600))) if with_data else None
    found = dictionary.smooth(W, H, positions, 20)
    assert found.V.shape == (10, 20)
    assert found.error < 0.05
    rough = dictionary.smooth(rng.standard_normal((10, 400)), H, positions, 20)
    assert rough.error > 0.9


def test_the_values_at_the_landmarks_predict_the_rest() -> None:
    K = dictionary.squared_exponential(np.arange(30.0)[:, None], 4.0)
    chosen = dictionary.landmarks(K, 12)
    row = np.sin(np.arange(30) / 4)
    U = dictionary.basis(K, chosen, 1e-12)
    np.testing.assert_allclose(U[chosen], np.eye(12), atol=1e-6)
    np.testing.assert_allclose(U @ row[chosen], row, atol=1e-2)


def test_landmarks_spread_and_are_distinct() -> None:
    K = dictionary.squared_exponential(dictionary.grid(4, 4), 2.0)
    corners = {0, 3, 12, 15}
    assert set(dictionary.landmarks(K, 4).tolist()) & corners
    assert dictionary.landmarks(K, 16).tolist() == list(range(16))
    assert dictionary.landmarks(np.zeros((3, 3)), 2).tolist() == [0, 1]
    assert dictionary.landmarks(np.diag([1.0, 3.0, 2.0]), 2).tolist() == [1, 2]


def test_all_landmarks_are_exact() -> None:
    sample = layer(1)
    positions = np.arange(36.0)[:, None]
    for H in (None, sample.H):
        assert dictionary.smooth(sample.W, H, positions, 36).error < 1e-4


def test_a_covariance_is_a_kernel_too() -> None:
    sample = layer(2, c=3, kh=1, kw=1)
    U = dictionary.basis(sample.H, dictionary.landmarks(sample.H, 2), 0.0)
    chosen = dictionary.landmarks(sample.H, 2)
    want = np.linalg.lstsq(sample.X[:, chosen], sample.X, rcond=None)[0].T
    np.testing.assert_allclose(U, want, atol=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layers(), st.data())
def test_data_never_hurt_and_the_fit_is_least_squares(sample: Sampled, data: st.DataObject) -> None:
    d = sample.X.shape[1]
    U = np.random.default_rng(0).standard_normal((d, data.draw(st.integers(1, d))))
    found, free = (dictionary.fit(sample.W, H, U) for H in (sample.H, None))
    assert found.loss <= weighted.loss(sample.H, sample.W, free.compose()) * (1 + 1e-9) + 1e-12 * sample.energy
    Y = sample.X @ sample.W.reshape(len(sample.W), -1).T
    best = np.square(Y - sample.X @ U @ np.linalg.lstsq(sample.X @ U, Y, rcond=None)[0]).sum()
    assert found.loss == pytest.approx(float(best), rel=1e-6, abs=1e-9 * sample.energy)
    assert found.compose().shape == sample.W.shape


def test_smooth_atoms_serve_smooth_kernels() -> None:
    rng = np.random.default_rng(3)
    K = dictionary.squared_exponential(dictionary.grid(7, 7), 2.5)
    W = (rng.standard_normal((32, 49)) @ np.linalg.cholesky(K + 1e-9 * np.eye(49)).T).reshape(8, 4, 7, 7)
    assert atoms.fit(W, None, dictionary.smooth_atoms(7, 7, 12, 2.5)).error < 0.1
    assert atoms.fit(W, None, dictionary.smooth_atoms(7, 7, 49, 1.0)).error < 1e-6


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="need"):
        dictionary.fit(np.ones((2, 3)), None, np.ones((4, 1)))
    with pytest.raises(ValueError, match=r"count 4 must lie in 1 \.\. 3"):
        dictionary.landmarks(np.eye(3), 4)
