"""Detail-preserving pooling: the mean at one end, the maximum at the other, planted parameters found between."""

from __future__ import annotations

import numpy as np
import pytest

from ccompile.numerics.detail_pool import Parameters, fitted, pooled


def windows() -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.random.default_rng(0).standard_normal((500, 4))


def test_power_zero_is_the_mean() -> None:
    np.testing.assert_allclose(pooled(windows(), Parameters(0.3, 0.0, 1.0)), windows().mean(1))


def test_a_large_power_is_nearly_the_maximum() -> None:
    x = np.array([[0.0, 1.0, 2.0, 9.0]])
    assert pooled(x, Parameters(1e-3, 8.0, 1.0))[0] == pytest.approx(9.0, abs=1e-6)


@pytest.mark.parametrize("planted", [(0.2, 1.5), (0.05, 3.0), (1.0, 2.0)])
def test_planted_parameters_are_found(planted: tuple[float, float]) -> None:
    x = windows()
    scale = float(np.sqrt(np.square(np.maximum(x - x.mean(1, keepdims=True), 0)).mean()))
    found = fitted(x, pooled(x, Parameters(*planted, scale)))
    assert (found.alpha, found.power) == pytest.approx(planted, rel=1e-2)
    assert found.scale == pytest.approx(scale)


def test_means_are_fitted_by_the_mean() -> None:
    assert fitted(windows(), windows().mean(1)).power == 0


def test_windows_of_equal_elements_are_fitted_by_the_mean() -> None:
    x = np.full((5, 4), 2.0)
    assert fitted(x, x[:, 0]).power == 0
