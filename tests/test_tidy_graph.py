"""tidy-graph where texts do not reach: texts among the weights, and which names it reports."""

from __future__ import annotations

import driver
import onnx_ir as ir
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
