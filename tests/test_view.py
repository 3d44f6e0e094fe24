"""What a pass may ask its view: calibration data, moments that are observed once; and what budgets a step eases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import builders
import numpy as np
import pytest
from calibrated import calibration, feeds, layers

from ccompile import graph
from ccompile.core import Budget, Compression, View
from ccompile.errors import PassError
from ccompile.passes.allocate import Allocate
from ccompile.passes.prune_channels import PruneChannels
from ccompile.passes.split_svd import SplitSvd
from ccompile.stats import Calibration
from ccompile.target import load_target
from ccompile.tolerance import Tolerance

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

    from ccompile.moments import Layer, Moments


def view_of(model: ir.Model, stats: Calibration | None = None) -> View:
    target = load_target("generic-cpu", Path())
    return View(model, target, np.random.default_rng(0), SplitSvd(rank=1), graph.facts, lambda _: [], stats)


class Counting(Calibration):
    """A calibration set that remembers what it was asked to observe."""

    asked: tuple[tuple[str, ...], ...] = ()

    def moments(self, model: ir.Model, layers: Sequence[Layer]) -> Mapping[str, Moments]:
        self.asked += (tuple(layer.name for layer in layers),)
        return super().moments(model, layers)


def test_without_calibration_data_the_step_and_the_remedy_are_told() -> None:
    with pytest.raises(PassError, match=r"(?s)split-svd fits to calibration data, and the spec gives none.*Do that\."):
        view_of(builders.mlp(0)).calibration("Do that.")


def test_a_layer_is_observed_once() -> None:
    model = builders.mlp(0)
    first, second, third = layers(model).values()
    stats = Counting(model, lambda: iter(feeds(model)), calibration(model, feeds(model)).settings)
    view = view_of(model, stats)
    view.observe([first])
    again = view.observe([second, first, third, second])
    view.observe([third])
    assert stats.asked == ((first.name,), (second.name, third.name))
    alone = calibration(model, feeds(model)).moments(model, [third])[third.name]
    np.testing.assert_array_equal(again[third.name].xx, alone.xx)


def test_observing_without_calibration_data_is_refused() -> None:
    model = builders.mlp(0)
    with pytest.raises(PassError, match="the spec gives none"):
        view_of(model).observe(layers(model).values())


LOOSE = Tolerance(relative_l2=1.0)
STEPS: dict[str, Compression] = {
    "keep": SplitSvd(keep=Budget(macs=0.5), tolerance=LOOSE),
    "budget": Allocate(budget=Budget(macs=0.5), among=("split-svd",), tolerance=LOOSE),
}


@pytest.mark.parametrize("option", STEPS)
def test_every_budget_eases_whatever_its_option_is_called(option: str) -> None:
    assert getattr(STEPS[option].eased(0.5), option) == Budget(macs=0.75)


def test_a_step_without_a_budget_stays_what_it_is() -> None:
    for step in (SplitSvd(keep=0.5), PruneChannels(keep=4)):
        assert step.eased(0.5) is step
