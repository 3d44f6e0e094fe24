"""fuse-activations: every form computes what stood there, far out too, and what the runtime takes apart stays."""

from __future__ import annotations

import driver
import numpy as np
import pytest
from builders import Net
from formulations import rewritten, worst

from ccompile.passes.fuse_activations import FuseActivations

STEP = FuseActivations(select="always")
POINTS = np.concatenate([np.linspace(-120, 120, 4001), np.linspace(-1, 1, 999)])
WIDE = {"x": POINTS.astype(np.float32).reshape(1250, 4)}
HEAD = '<ir_version: 10, opset_import: ["" : 20]>\ng (float[N,4] x) => (float[N,4] y)\n'
WRITTEN = {
    "HardSwish": """<float a = {3}, float b = {0}, float c = {6}>
        { p = Add (a, x) q = Clip (p, b, c) r = Div (q, c) y = Mul (r, x) }""",
    "HardSigmoid": """<float a = {0.5}, float b = {2}, float c = {1}, float d = {0.25}>
        { p = Mul (x, a) q = Add (p, b) r = Relu (q) y = Min (r, c) }""",
    "x HardSigmoid": """<float a = {3}, float b = {0}, float c = {6}>
        { p = Add (x, a) q = Clip (p, b, c) r = Mul (q, x) y = Div (r, c) }""",
    "Gelu": """<float a = {0.70710678}, float b = {1}, float c = {0.5}>
        { p = Mul (x, a) q = Erf (p) r = Add (b, q) s = Mul (r, c) y = Mul (x, s) }""",
    "Clip": "<float a = {-1}, float b = {4}> { p = Min (b, x) q = Max (a, p) y = Relu (q) }",
    "LeakyRelu": "<float a = {8}> { p = Div (x, a) y = Max (p, x) }",
    "Sigmoid": "<float a = {1}> { p = Neg (x) q = Exp (p) r = Add (a, q) y = Div (a, r) }",
    "x Tanh": "{ p = Softplus (x) q = Tanh (p) y = Mul (x, q) }",
}


@pytest.mark.parametrize("label", list(WRITTEN))
def test_a_form_computes_the_same_on_a_wide_range(label: str) -> None:
    model, _ = driver.model_of(HEAD + WRITTEN[label])
    (twin,) = (twin for (node, found), twin in rewritten(STEP, model).items() if found == label and node.endswith("y"))
    assert len(twin.graph) < len(model.graph) or label == "x Tanh"
    assert worst(model, twin, WIDE) < 1e-6


def test_the_op_mish_is_written_out() -> None:
    model, _ = driver.model_of(HEAD + "{ y = Mish (x) }")
    ((_, label), twin), *_ = rewritten(STEP, model).items()
    assert label == "x Tanh"
    assert worst(model, twin, WIDE) < 1e-6


@pytest.mark.parametrize("op", ["Sigmoid", "Tanh", "Softplus", "Erf", "Relu", "HardSwish", "Gelu"])
def test_an_op_alone_stays(op: str) -> None:
    model, _ = driver.model_of(HEAD + f"{{ y = {op} (x) }}")
    assert not rewritten(STEP, model)


def test_the_deepest_activation_is_found_when_one_is_part_of_another() -> None:
    run = driver.run_step(STEP, driver.model_of(HEAD + WRITTEN["HardSwish"])[0])
    assert [node.op_type for node in run.model.graph][-1:] in (["HardSwish"], ["Mul"])
    assert len(run.model.graph) <= 2


@pytest.mark.parametrize(("rank", "fuses"), [(3, True), (4, False)])
def test_a_constant_of_one_element_may_have_as_many_axes_as_the_value(rank: int, fuses: bool) -> None:
    net = Net(0)
    x = net.input("x", [2, 3, 4])
    one = net.constant(np.ones((1,) * rank, np.float32))
    y = net.node("Div", one, net.node("Add", one, net.node("Exp", net.node("Neg", x))))
    run = driver.run_step(STEP, net.model(y))
    assert bool(run.record.applied) == fuses
