"""What all fits of factors share: extreme scales, zeros, single precision, inputs left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pytest
from layers import F, layer

from ccompile.numerics import atoms, bicluster, colour, cp, separable, spatial, tucker, weighted


class Fit(Protocol):
    @property
    def loss(self) -> float: ...
    @property
    def error(self) -> float: ...
    def compose(self) -> F: ...


FITS: dict[str, Callable[[F, F | None], Fit]] = {
    "spatial": lambda W, H: spatial.fit(W, H, 3),
    "horizontal": lambda W, H: spatial.fit(W, H, 3, "horizontal"),
    "tucker-1": lambda W, H: tucker.fit(W, H, 2),
    "tucker-2": lambda W, H: tucker.fit(W, H, 2, 3),
    "separable": lambda W, H: separable.fit(W, H, 2),
    "fixed atoms": lambda W, H: atoms.fit(W, H, atoms.dct_atoms(3, 3)[:4]),
    "learned atoms": lambda W, H: atoms.learn(W, H, 3),
    "cp-3": lambda W, H: cp.fit(W, H, 4, 3),
    "cp-4": lambda W, H: cp.fit(W, H, 4),
    "colour": lambda W, H: colour.fit(W, H, 3),
    "bicluster": lambda W, H: bicluster.fit(W, H, (2, 2), 1),
}


@pytest.fixture(params=list(FITS))
def fit(request: pytest.FixtureRequest) -> Callable[[F, F | None], Fit]:
    return FITS[request.param]


@pytest.mark.parametrize("with_data", [False, True])
def test_the_loss_and_error_are_those_of_what_is_composed(fit: Callable[[F, F | None], Fit], with_data: bool) -> None:
    sample = layer(1)
    H = sample.H if with_data else None
    found = fit(sample.W, H)
    assert 0 < found.error < 1
    assert found.loss == pytest.approx(weighted.loss(H, sample.W, found.compose()))
    assert found.error == pytest.approx(weighted.relative_error(H, sample.W, found.compose()))


@pytest.mark.parametrize("inputs", [1e-14, 1e14])
@pytest.mark.parametrize("weights", [1e-8, 1e8])
def test_scales_do_not_matter(fit: Callable[[F, F | None], Fit], inputs: float, weights: float) -> None:
    sample = layer(2)
    plain, scaled = fit(sample.W, sample.H), fit(sample.W * weights, sample.H * inputs)
    assert scaled.error == pytest.approx(plain.error, rel=0.02)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_few_samples_are_enough_to_be_finite_and_not_to_hurt(fit: Callable[[F, F | None], Fit], n: int) -> None:
    sample = layer(3, n=n, dead=(1, 9))
    found, free = fit(sample.W, sample.H), fit(sample.W, None)
    assert np.isfinite(found.compose()).all()
    assert found.loss <= weighted.loss(sample.H, sample.W, free.compose()) * (1 + 1e-9) + 1e-11 * sample.energy


def test_zeros_stay_zeros(fit: Callable[[F, F | None], Fit]) -> None:
    sample = layer(4)
    for H in (None, sample.H, 0 * sample.H):
        found = fit(0 * sample.W, H)
        assert not found.compose().any()
        assert found.loss == found.error == 0


def test_inputs_that_never_vary_change_nothing(fit: Callable[[F, F | None], Fit]) -> None:
    sample = layer(5)
    found = fit(sample.W, 0 * sample.H)
    assert found.loss == found.error == 0
    assert np.isfinite(found.compose()).all()


def test_single_precision_is_fitted_in_double_and_inputs_are_left_alone(fit: Callable[[F, F | None], Fit]) -> None:
    sample = layer(6)
    W: npt.NDArray[Any] = sample.W.astype(np.float32)
    H: npt.NDArray[Any] = sample.H.astype(np.float32)
    W.flags.writeable = H.flags.writeable = False
    found = fit(W, H)
    assert found.compose().dtype == np.float64
    assert found.error == pytest.approx(fit(W.astype(np.float64), H.astype(np.float64)).error)


def test_a_weight_that_is_not_finite_is_refused(fit: Callable[[F, F | None], Fit]) -> None:
    sample = layer(7)
    bad = sample.W.copy()
    bad[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        fit(bad, sample.H)
