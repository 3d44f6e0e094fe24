"""lower-conv1d: both forms compute what the convolution did, for every pad, stride, group and length."""

from __future__ import annotations

from typing import Any

import driver
import numpy as np
import onnx_ir as ir
import pytest
from builders import Net
from formulations import rewritten, worst
from hypothesis import given, settings
from hypothesis import strategies as st

from ccompile.core import Array
from ccompile.passes.lower_conv1d import LowerConv1d

STEP = LowerConv1d(select="always")


def conv(ins: int, outs: int, k: int, length: int, **attributes: Any) -> ir.Model:
    net = Net(k + length)
    x, w = net.input("x", [2, ins, length]), net.weight("w", (outs, ins // attributes.get("group", 1), k))
    return net.model(net.node("Conv", x, w, net.constant(np.ones(outs, np.float32), "b"), name="conv", **attributes))


def feeds_of(model: ir.Model) -> dict[str, Array]:
    return driver.draw_feeds(model)[0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_row_of_an_image(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 2, 4]))
    pads = [data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))]
    k, stride, dilation = (data.draw(st.integers(1, 3)) for _ in range(3))
    more: dict[str, Any] = {"group": groups, "pads": pads, "strides": [stride], "dilations": [dilation]}
    model = conv(4, 8, k, data.draw(st.integers(9, 20)), **more)
    assert worst(model, rewritten(STEP, model)["conv", "1 x k"], feeds_of(model)) < 1e-6


@pytest.mark.parametrize("length", [40, 100, 161, 320])
@pytest.mark.parametrize("k", [16, 17, 33])
@pytest.mark.parametrize("pads", [[0, 0], [5, 0], [0, 7], [16, 16]])
def test_a_toeplitz_product(k: int, length: int, pads: list[int]) -> None:
    model = conv(1, 1, k, length, pads=pads)
    assert worst(model, rewritten(STEP, model)["conv", "Toeplitz"], feeds_of(model)) < 1e-6


@pytest.mark.parametrize(
    "model",
    [
        conv(1, 2, 20, 64),
        conv(2, 1, 20, 64),
        conv(2, 2, 20, 64, group=2),
        conv(1, 1, 15, 64),
        conv(1, 1, 20, 64, strides=[2]),
        conv(1, 1, 20, 64, dilations=[2]),
    ],
)
def test_other_convolutions_are_no_toeplitz_product(model: ir.Model) -> None:
    assert {label for _, label in rewritten(STEP, model)} == {"1 x k"}


def test_the_matrix_is_small_where_the_signal_is_long() -> None:
    twin = rewritten(STEP, conv(1, 1, 33, 4096))["conv", "Toeplitz"]
    (T,) = (value for name, value in twin.graph.initializers.items() if "toeplitz" in name)
    assert T.const_value is not None
    assert tuple(T.const_value.shape) == (64, 32)


def test_a_whole_net_keeps_its_contract() -> None:
    net = Net(0)
    x = net.input("x", ["N", 1, 50])
    for index, (ins, outs) in enumerate(((1, 8), (8, 8), (8, 4))):
        x = net.node("Conv", x, net.weight(f"w{index}", (outs, ins, 3)), name=f"conv{index}", pads=[1, 1])
        x = net.node("Tanh", x)
    run = driver.run_step(STEP, net.model(net.node("GlobalAveragePool", x)))
    assert run.record.verdict == "kept", run.record.reason
    assert [node.op_type for node in run.model.graph].count("Reshape") == 2


def squeezed(*, bias: bool = True, groups: int = 1, size: int = 1, act: str = "Relu") -> ir.Model:
    """A squeeze-and-excitation block without what it scales."""
    net = Net(2)
    x = net.input("x", ["N", 8, size, size])
    y = net.node(act, net.conv(x, "squeeze", (4, 8 // groups, 1, 1), groups=groups, bias=bias))
    return net.model(net.node("Sigmoid", net.conv(y, "excite", (8, 4, 1, 1), bias=bias)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", ["Relu", "HardSwish", "Sigmoid"])
def test_a_point_on_maps_of_one_position_as_a_product(bias: bool, act: str) -> None:
    model = squeezed(bias=bias, act=act)
    found = rewritten(STEP, model)
    assert set(found) == {("squeeze", "Gemm"), ("excite", "Gemm")}
    for twin in found.values():
        assert worst(model, twin, feeds_of(model)) < 1e-6


def test_a_batchnorm_goes_along_behind_a_product() -> None:
    net = Net(2)
    y = net.batchnorm(net.conv(net.input("x", ["N", 8, 1, 1]), "conv", (4, 8, 1, 1)), "bn", 4)
    model = net.model(y)
    twin = rewritten(STEP, model)["conv", "Gemm"]
    assert [node.op_type for node in twin.graph] == ["Flatten", "Gemm", "BatchNormalization", "Reshape"]
    assert worst(model, twin, feeds_of(model)) < 1e-6


def test_a_point_with_groups_or_on_larger_maps_is_no_product() -> None:
    assert set(rewritten(STEP, squeezed(groups=2))) == {("excite", "Gemm")}
    assert not rewritten(STEP, squeezed(size=2))
