"""What split-spatial makes of a kernel: its orders, its closed form without data, and what strides make of its cost."""

from __future__ import annotations

import driver
import numpy as np
import onnx_ir as ir
import pytest
from calibrated import calibration, error, feeds, layers, skips, weight
from convolutions import conv, split
from pydantic import ValidationError

from ccompile.analysis import linear
from ccompile.fitting import Metric
from ccompile.numerics import spatial
from ccompile.passes.split_spatial import SplitSpatial
from ccompile.split_prices import LayerPrice, rank_of

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
