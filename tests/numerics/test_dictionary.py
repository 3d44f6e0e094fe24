"""Smooth atoms: landmarks spread, predict the rest, and serve smooth kernels."""

from __future__ import annotations

import numpy as np
import pytest
from layers import layer

from ccompile.numerics import atoms, dictionary


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


def test_a_covariance_is_a_kernel_too() -> None:
    sample = layer(2, c=3, kh=1, kw=1)
    U = dictionary.basis(sample.H, dictionary.landmarks(sample.H, 2), 0.0)
    chosen = dictionary.landmarks(sample.H, 2)
    want = np.linalg.lstsq(sample.X[:, chosen], sample.X, rcond=None)[0].T
    np.testing.assert_allclose(U, want, atol=1e-9)


def test_smooth_atoms_serve_smooth_kernels() -> None:
    rng = np.random.default_rng(3)
    K = dictionary.squared_exponential(dictionary.grid(7, 7), 2.5)
    W = (rng.standard_normal((32, 49)) @ np.linalg.cholesky(K + 1e-9 * np.eye(49)).T).reshape(8, 4, 7, 7)
    assert atoms.fit(W, None, dictionary.smooth_atoms(7, 7, 12, 2.5)).error < 0.1
    assert atoms.fit(W, None, dictionary.smooth_atoms(7, 7, 49, 1.0)).error < 1e-6


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"count 4 must lie in 1 \.\. 3"):
        dictionary.landmarks(np.eye(3), 4)
