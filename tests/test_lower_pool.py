"""lower-pool: every form of a pooling computes the same, for all windows, pads and roundings."""

from __future__ import annotations

import itertools
from typing import Any

import driver
import numpy as np
import onnx_ir as ir
import pytest
from builders import Net
from formulations import rewritten, worst

from ccompile.passes.lower_pool import LowerPool

STEP = LowerPool(select="always")
WINDOWS = [
    {"kernel_shape": [k, 2], "strides": [s, 1], "pads": [p, 0, p, 1], "ceil_mode": up, "count_include_pad": counts}
    for k, s, p, up, counts in itertools.product((2, 3), (1, 2), (0, 1), (0, 1), (0, 1))
]


def pooled(op: str, size: int = 7, **attributes: Any) -> ir.Model:
    net = Net(0)
    return net.model(net.node(op, net.input("x", [2, 4, size, size]), name="pool", **attributes))


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: "-".join(str(v) for v in window.values()))
@pytest.mark.parametrize("size", [7, 8])
def test_an_average_pooling_as_a_convolution(window: dict[str, Any], size: int) -> None:
    model = pooled("AveragePool", size, **window)
    found = rewritten(STEP, model)
    one_size = bool(window["count_include_pad"]) and not window["ceil_mode"]
    assert one_size <= (("pool", "Conv") in found)
    for twin in found.values():
        assert worst(model, twin, driver.draw_feeds(model)[0]) < 1e-6


def test_a_window_as_large_as_the_map_is_a_pooling_over_everything() -> None:
    model = pooled("AveragePool", 5, kernel_shape=[5, 5])
    twin = rewritten(STEP, model)["pool", "GlobalAveragePool"]
    assert worst(model, twin, driver.draw_feeds(model)[0]) < 1e-6


@pytest.mark.parametrize("op", ["Relu", "Sigmoid", "Tanh", "Elu", "Softplus", "LeakyRelu", "Exp", "Erf", "Selu"])
@pytest.mark.parametrize("first", [True, False])
def test_an_activation_and_a_padded_maximum_change_places(op: str, first: bool) -> None:
    net = Net(0)
    y = net.input("x", [2, 4, 7, 7])
    for step in ("act", "pool") if first else ("pool", "act"):
        y = net.node(op, y, name="act") if step == "act" else net.pool(y, 3, 2, 1)
    model = net.model(y)
    twin = rewritten(STEP, model)["maxpool1" if first else "maxpool0", f"activation {'behind' if first else 'before'}"]
    assert [node.op_type for node in twin.graph] == [node.op_type for node in model.graph][::-1]
    assert worst(model, twin, driver.draw_feeds(model)[0]) < 1e-6


@pytest.mark.parametrize("op", ["HardSwish", "Gelu", "Abs", "Neg", "Softmax"])
def test_an_activation_that_falls_somewhere_does_not_move(op: str) -> None:
    net = Net(0)
    more: dict[str, Any] = {"axis": 1} if op == "Softmax" else {}
    y = net.pool(net.node(op, net.input("x", [2, 4, 7, 7]), **more), 2, 2)
    opsets = {"": 20}
    model = net.model(y, opsets=opsets)
    assert {label for _, label in rewritten(STEP, model)} <= {"axis by axis"}


def test_a_pooling_of_one_tap_as_strides() -> None:
    net = Net(0)
    y = net.node("Gelu", net.conv(net.input("x", [2, 4, 9, 9]), "conv", (6, 4, 3, 3), pad=1))
    model = net.model(net.pool(y, 1, 2), opsets={"": 20})
    (twin,) = rewritten(STEP, model).values()
    assert [node.op_type for node in twin.graph] == ["Conv", "Gelu"]
    assert worst(model, twin, driver.draw_feeds(model)[0]) < 1e-6


def test_a_mean_alone_is_no_convolution_by_the_estimate() -> None:
    model = pooled("AveragePool", kernel_shape=[2, 2])
    assert not rewritten(LowerPool(), model)
    assert rewritten(LowerPool(select="measured"), model)


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: "-".join(str(v) for v in window.values()))
def test_a_maximum_axis_by_axis(window: dict[str, Any]) -> None:
    model = pooled("MaxPool", 7, **{name: held for name, held in window.items() if name != "count_include_pad"})
    twin = rewritten(STEP, model)["pool", "axis by axis"]
    assert [node.op_type for node in twin.graph] == ["MaxPool", "MaxPool"]
    assert worst(model, twin, driver.draw_feeds(model)[0]) == 0


@pytest.mark.parametrize("pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_a_maximum_axis_by_axis_that_pads_by_itself(pad: str) -> None:
    model = pooled("MaxPool", 7, kernel_shape=[3, 2], strides=[2, 3], dilations=[1, 1], auto_pad=pad)
    twin = rewritten(STEP, model)["pool", "axis by axis"]
    assert worst(model, twin, driver.draw_feeds(model)[0]) == 0


def test_a_maximum_along_one_axis_stays() -> None:
    assert not rewritten(STEP, pooled("MaxPool", kernel_shape=[1, 3]))


def weighted(power: float, alpha: float, **windows: Any) -> ir.Model:
    """A detail-preserving pooling of x by z = |x|."""
    net = Net(0)
    x = net.input("x", ["N", 4, 6, 6])
    raised = net.node("Pow", net.node("Abs", x), net.constant(np.array(power, np.float32)))
    w = net.node("Add", net.constant(np.array([alpha], np.float32)), raised)
    means = (net.node("AveragePool", v, **windows) for v in (net.node("Mul", x, w), w))
    return net.model(net.node("Div", *means, name="mean"))


@pytest.mark.parametrize("counts", [0, 1])
def test_a_weighted_mean_with_equal_weights_is_plain(counts: int) -> None:
    windows = {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1], "count_include_pad": counts}
    model = weighted(0.0, 0.5, **windows)
    twin = rewritten(STEP, model)["mean", "AveragePool"]
    assert [node.op_type for node in twin.graph] == ["AveragePool"]
    assert worst(model, twin, driver.draw_feeds(model)[0]) < 1e-6


@pytest.mark.parametrize(("power", "alpha"), [(1.0, 0.5), (0.0, -1.0), (0.0, -2.0)])
def test_a_weighted_mean_with_other_weights_stays(power: float, alpha: float) -> None:
    assert ("mean", "AveragePool") not in rewritten(STEP, weighted(power, alpha, kernel_shape=[2, 2]))
