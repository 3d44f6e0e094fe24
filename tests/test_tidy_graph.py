"""tidy-graph where texts do not reach: texts among the weights, and which names it reports."""

from __future__ import annotations

import driver
import numpy as np
import onnx_ir as ir
import pytest
from builders import Net

from ccompile import registry


def test_equal_texts_are_not_shared() -> None:
    net = Net(0)
    held = [net.stored(ir.StringTensor([b"k", b"l"], shape=ir.Shape([2]), name=name), name) for name in "ab"]
    outputs = [net.node("Identity", value) for value in held]
    model = net.model(net.node("Neg", net.input("x", ["N", 2])), *outputs)
    run = driver.run_step(registry.find("tidy-graph").model_validate({}), model)
    assert run.record.verdict == "kept"
    assert {"a", "b"} <= run.model.graph.initializers.keys()


def twins() -> ir.Model:
    """Two layers in a row whose weights are equal."""
    net = Net(0)
    W = np.arange(16, dtype=np.float32).reshape(4, 4)
    x = net.node("MatMul", net.input("x", ["N", 4]), net.constant(W, "w1"), name="fc1")
    return net.model(net.node("MatMul", x, net.constant(W.copy(), "w2"), name="fc2"))


def test_a_shared_initializer_names_its_readers() -> None:
    run = driver.run_step(registry.find("tidy-graph").model_validate({}), twins())
    assert [(site.nodes, site.note) for site in run.record.applied] == [(("fc2",), "initializer `w2` equals `w1`")]


@pytest.mark.parametrize("name", ["fc1", "fc2"])
@pytest.mark.parametrize("given", ["skip", "only"])
def test_an_initializer_that_an_excluded_node_reads_is_not_shared(name: str, given: str) -> None:
    run = driver.run_step(registry.find("tidy-graph").model_validate({given: [name]}), twins())
    assert run.record.applied == ()
    assert {"w1", "w2"} == set(run.model.graph.initializers)
    assert len(run.record.skipped) == 1


def grown(count: int, size: int, growth: int) -> driver.Bench:
    """Run on `count` sums with a constant of `size` floats that 8 stored bytes make."""
    net = Net(0)
    x = net.input("x", ["N", size])
    for index in range(count):
        shape, value = net.constant(np.array([size], np.int64)), ir.tensor(np.array([1.0 + index], np.float32))
        x = net.node("Add", x, net.node("ConstantOfShape", shape, value=value, name=f"fill{index}"))
    return driver.run_step(registry.find("tidy-graph").model_validate({"growth": growth}), net.model(x))


def test_growth_bounds_each_folded_constant() -> None:
    assert len([site for site in grown(3, 12, growth=48).record.applied if "folded" in site.note]) == 3
    left = grown(3, 12, growth=47).record.skipped
    assert {skip.reason.rpartition(" in place of")[0] for skip in left} == {
        "constant, but folding would store 48 bytes"
    }


def test_what_folding_makes_and_uses_up_is_not_growth() -> None:
    net = Net(0)
    fill = net.node("ConstantOfShape", net.constant(np.array([64], np.int64)), name="fill")
    for index in range(4):
        fill = net.node("Neg", fill, name=f"neg{index}")
    total = net.node("ReduceSum", fill, keepdims=1, name="sum")
    model = net.model(net.node("Add", net.input("x", ["N", 2]), total))
    run = driver.run_step(registry.find("tidy-graph").model_validate({"growth": 256}), model)
    assert [node.op_type for node in run.model.graph] == ["Add"]
