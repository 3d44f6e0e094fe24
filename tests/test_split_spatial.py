"""What split-spatial makes of a kernel: its orders, its closed form without data, and what strides make of its cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import driver
import numpy as np
import onnx_ir as ir
import pytest
from calibrated import calibration, error, feeds, layers, skips, weight
from convolutions import conv, split
from pydantic import ValidationError

from ccompile.analysis import linear
from ccompile.core import Choice, Site, Skip, View
from ccompile.fitting import Metric
from ccompile.numerics import spatial
from ccompile.passes.split_spatial import TURNED, SplitSpatial
from ccompile.split_prices import LayerPrice, rank_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ccompile.core import Array

ANY = {"tolerance": {"relative_l2": 1e9}}
PLAIN = (6, 4, 3, 5), (8, 9)
ORDERS: list[spatial.Order] = ["vertical", "horizontal"]


@pytest.mark.parametrize("order", ORDERS)
def test_without_data_the_loss_is_the_discarded_spectrum(order: spatial.Order) -> None:
    model = conv(*PLAIN)
    form = layers(model)["conv"]
    W = linear.matrix(model.graph.node(0), form)[0]
    step = SplitSpatial(keep=0.5, statistics="weights", order=order)
    squares = np.square(spatial.spectrum(W.reshape(6, 4, 3, 5), order))
    ranks = range(1, step.most(form) + 1)
    lost = step.shares_lost(([Metric(W, None, float(np.square(W).sum()))], form, ranks))
    np.testing.assert_allclose(lost, [squares[rank:].sum() / squares.sum() for rank in ranks], atol=1e-12)


@pytest.mark.parametrize(("order", "first", "last"), [("vertical", (3, 1), (1, 5)), ("horizontal", (1, 5), (3, 1))])
def test_the_order_says_which_axis_comes_first(order: str, first: tuple[int, int], last: tuple[int, int]) -> None:
    run = split(SplitSpatial, conv(*PLAIN), rank=3, order=order)
    assert weight(run.model, "conv/V").shape == (3, 4, *first)
    assert weight(run.model, "conv/U").shape == (6, 3, *last)


def test_an_order_of_another_name_is_refused() -> None:
    with pytest.raises(ValidationError, match="vertical"):
        SplitSpatial.model_validate({"rank": 1, "order": "diagonal"})


@pytest.mark.parametrize(("order", "first"), [("vertical", 4 * 3 * 4 * 9), ("horizontal", 4 * 5 * 8 * 3)])
def test_the_first_factor_runs_at_the_stride_of_its_axis_only(order: str, first: int) -> None:
    run = split(SplitSpatial, conv(*PLAIN, strides=[2, 3], pads=[1, 2, 1, 2]), rank=1, order=order)
    macs = {node.name: node.macs for node in run.price(run.model).nodes}
    last = 6 * (5 if order == "vertical" else 3) * 4 * 3
    assert macs == {"conv/V": first, "conv/U": last}


def test_a_separable_convolution_loses_nothing_at_rank_one() -> None:
    model = conv((8, 4, 3, 3), (8, 9))
    rng = np.random.default_rng(0)
    W = np.einsum("oj,ci->ocij", rng.standard_normal((8, 3)), rng.standard_normal((4, 3))).astype(np.float32)
    model.graph.initializers["w"].const_value = ir.Tensor(W, name="w")
    for statistics in ("calibration", "weights"):
        run = split(SplitSpatial, model, rank=1, statistics=statistics)
        assert run.record.applied
        assert error(run.model, model, feeds(model, seed=9)) < 1e-5


def test_correlated_inputs_are_made_use_of() -> None:
    model = conv((8, 6, 3, 3), (10, 10))
    batches = feeds(model)
    for batch in batches:
        batch["x"] = np.repeat(batch["x"][:, :2], 3, axis=1)  # six channels that carry two
    losses = []
    for statistics in ("calibration", "weights"):
        run = driver.bench(model, feeds(model, seed=6))
        run.statistics = calibration(model, batches)
        run.step(0, SplitSpatial.model_validate({"rank": 6, "statistics": statistics, "ridge": 1e-9}))
        losses.append(error(run.model, model, batches))
    assert losses[0] < 1e-3
    assert losses[1] > 0.1


def test_ranks_are_bisected_by_their_cost() -> None:
    form = layers(conv((6, 4, 3, 3), (8, 9)))["conv"]
    price = LayerPrice(216, 0.0, (1.0, 1.0))  # rank r costs r (4 * 3 + 6 * 3)
    step = SplitSpatial(keep=0.5)
    assert [rank_of(step, share, form, price) for share in (0.1, 30 / 216, 0.5, 1.0)] == [0, 1, 3, 7]


@pytest.mark.parametrize("shape", [(6, 4, 1, 7), (6, 4, 5, 1), (6, 4, 1, 1)])
def test_a_kernel_along_one_axis_is_left_alone(shape: tuple[int, ...]) -> None:
    run = split(SplitSpatial, conv(shape, (8, 9)), rank=1)
    assert skips(run) == {"conv": f"kernel {shape[2]}x{shape[3]}: it has not two axes to part"}


def planted(order: str, ranks: int = 2) -> Array:
    """A kernel W[8, 4, 3, 3] that is of this rank in one order, and of full rank in the other."""
    rng = np.random.default_rng(0)
    W: Array = np.einsum("orj,rci->ocij", rng.standard_normal((8, ranks, 3)), rng.standard_normal((ranks, 4, 3)))
    return W if order == "vertical" else W.transpose(0, 1, 3, 2)


@pytest.mark.parametrize("statistics", ["calibration", "weights"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("geometry", [{}, {"strides": [2, 1], "pads": [0, 1, 2, 3], "dilations": [1, 2]}])
def test_of_both_orders_the_one_that_loses_nothing_is_taken(
    order: spatial.Order, statistics: str, geometry: dict[str, list[int]]
) -> None:
    model = conv((8, 4, 3, 3), (8, 9), planted(order), **geometry)
    run = split(SplitSpatial, model, rank=2, statistics=statistics)
    assert weight(run.model, "conv/V").shape == ((2, 4, 3, 1) if order == "vertical" else (2, 4, 1, 3))
    assert ("1 x k first" in run.record.applied[0].note) == (order == "horizontal")
    assert error(run.model, model, feeds(model, seed=9)) < 1e-5


def test_both_orders_tell_no_more_loss_than_either_at_its_cost_and_what_they_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = conv((6, 4, 3, 5), (8, 9), strides=[2, 3], pads=[1, 2, 1, 2])
    curves = {order: choices(model, order, monkeypatch) for order in ("best", *ORDERS)}
    for alone in ORDERS:
        for choice in curves[alone][1:]:
            within = [other.error for other in curves["best"] if other.macs <= choice.macs]
            assert min(within) <= choice.error * (1 + 1e-9)
    assert {choice.strength > TURNED for choice in curves["best"][1:]} == {True, False}
    for choice in curves["best"][1:]:
        run = split(SplitSpatial, model, keep=choice.macs / curves["best"][0].macs, statistics="weights", **ANY)
        assert run.price(run.model).report.macs == choice.macs


def choices(model: ir.Model, order: str, monkeypatch: pytest.MonkeyPatch) -> Sequence[Choice]:
    """The curve of the node `conv` without data, as a run prices it."""
    seen: list[Sequence[Choice]] = []

    def plan(step: SplitSpatial, curves: Sequence[tuple[Site, Sequence[Choice]]], view: View) -> list[Choice | Skip]:
        seen.extend(choices for _, choices in curves)
        return real(step, curves, view)

    real = SplitSpatial.plan
    with monkeypatch.context() as patched:
        patched.setattr(SplitSpatial, "plan", plan)
        split(SplitSpatial, model, error=0.99, statistics="weights", order=order, **ANY)
    return seen[0]
