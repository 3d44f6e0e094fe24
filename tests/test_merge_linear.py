"""merge-linear over every pad, size and rounding: what it merges computes what it did, and what it leaves, it tells."""

from __future__ import annotations

import itertools
from typing import Any

import driver
import numpy as np
import onnx_ir as ir
import pytest
from builders import Net
from hypothesis import given, settings
from hypothesis import strategies as st

from ccompile import registry

STEP = registry.find("merge-linear").model_validate({})
POOLS = [
    {"kernel_shape": [k] * 2, "strides": [s] * 2, "pads": [p] * 4, "ceil_mode": up, "count_include_pad": counts}
    for k, s, p, up, counts in itertools.product((2, 3), (1, 2), (0, 1), (0, 1), (0, 1))
]


def pooled(kernel: int, pool: dict[str, Any], size: int, *, bias: bool = True) -> ir.Model:
    net = Net(1)
    x = net.input("x", [2, 4, size, size + 1])
    x = net.conv(x, "conv", (6, 4, kernel, kernel), pad=kernel // 2, bias=False)
    if bias:
        node = x.producer()
        assert node is not None
        node.resize_inputs(3)
        node.replace_input_with(2, net.constant(np.arange(1, 7, dtype=np.float32), "conv.b"))
    return net.model(net.node("AveragePool", x, name="pool", **pool))


@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: "-".join(str(v) for v in pool.values()))
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_every_pooling_behind_a_convolution(kernel: int, pool: dict[str, Any], bias: bool) -> None:
    for size in (8, 9):
        run = driver.run_step(STEP, pooled(kernel, pool, size, bias=bias))
        assert run.record.verdict == "kept", run.record.reason
        assert bool(run.record.applied) != bool(run.record.skipped)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_which_poolings_are_merged() -> None:
    plain = {"kernel_shape": [2, 2], "strides": [2, 2]}
    assert ops(driver.run_step(STEP, pooled(3, plain, 8)).model) == ["Conv"]
    assert ops(driver.run_step(STEP, pooled(1, plain, 8)).model) == ["AveragePool", "Conv"]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_two_convolutions(data: st.DataObject) -> None:
    net = Net(data.draw(st.integers(0, 99)))
    x = net.input("x", [2, 4, 13, 12])  # as high as two kernels of 3, dilated, with strides ask for
    channels = 4
    for index in range(2):
        outs, groups, k = (
            data.draw(st.sampled_from([2, 4, 12])),
            data.draw(st.sampled_from([1, 2])),
            data.draw(st.sampled_from([1, 2, 3])),
        )
        x = net.node(
            "Conv",
            x,
            net.weight(f"w{index}", (outs, channels // groups, k, 1)),
            *([net.weight(f"b{index}", (outs,))] if data.draw(st.booleans()) else []),
            group=groups,
            strides=[data.draw(st.integers(1, 2)), 1],
            dilations=[data.draw(st.integers(1, 2)), 1],
            pads=[data.draw(st.integers(0, 1)), 0, data.draw(st.integers(0, 1)), 0],
        )  # fmt: skip
        channels = outs
    run = driver.run_step(STEP, net.model(x))
    assert run.record.verdict == "kept", run.record.reason
    assert bool(run.record.applied) != bool(run.record.skipped)


def test_a_weight_that_would_overflow_is_not_merged() -> None:
    net = Net(0)
    x = net.input("x", ["N", 2, 4, 4])
    for index in range(2):
        x = net.node("Conv", x, net.constant(np.full((2, 2, 1, 1), 1e38, np.float32)), name=f"conv{index}")
    zero = net.node("Mul", x, net.constant(np.zeros((), np.float32)))
    run = driver.run_step(STEP, net.model(zero), feeds=[{"x": np.zeros((1, 2, 4, 4), np.float32)}])
    assert [(skip.node, skip.reason) for skip in run.record.skipped] == [
        ("conv1", "the merged weight would not be finite")
    ]


def test_a_site_names_its_nodes_and_what_it_saves() -> None:
    (site,) = driver.run_step(STEP, pooled(3, {"kernel_shape": [2, 2], "strides": [2, 2]}, 8)).record.applied
    assert site.nodes == ("conv", "pool")
    assert (
        site.note == "merged with `conv`: 384 multiply-adds per output position in place of 996"
    )  # 8 x 9 positions of 216 for 4 x 4, and 24
