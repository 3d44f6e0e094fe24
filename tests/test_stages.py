"""Stages compute what their composed weight does at any stride, pad, dilation and group, and all of W at full rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from builders import Net
from calibrated import layers, outputs, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from ccompile import graph, onnx_io, stages
from ccompile.analysis import linear
from ccompile.passes.split_basis import SplitBasis
from ccompile.passes.split_cp import SplitCp
from ccompile.passes.split_separable import SplitSeparable
from ccompile.passes.split_spatial import SplitSpatial
from ccompile.passes.split_svd import SplitSvd
from ccompile.passes.split_tucker import SplitTucker

if TYPE_CHECKING:
    from ccompile.core import Array
    from ccompile.splitting import Split

SCHEMES: dict[str, Split] = {
    "svd": SplitSvd(keep=0.5),
    "vertical": SplitSpatial(keep=0.5),
    "horizontal": SplitSpatial(keep=0.5, order="horizontal"),
    "tucker": SplitTucker(keep=0.5),
    "input": SplitTucker(keep=0.5, sides="input"),
    "cp4": SplitCp(keep=0.5),
    "cp3": SplitCp(keep=0.5, way=3),
    "separable": SplitSeparable(keep=0.5),
    "dct": SplitBasis(keep=0.5),
    "haar": SplitBasis(keep=0.5, basis="haar"),
    "learned": SplitBasis(keep=0.5, basis="learned"),
}


@dataclass(frozen=True)
class Case:
    """A convolution: its weight's shape [o, c / groups, *kernel], its input's spatial size, and attributes."""

    shape: tuple[int, ...]
    size: tuple[int, ...]
    groups: int = 1
    bias: bool = True
    attributes: dict[str, Any] = field(default_factory=dict)


def model_of(case: Case, seed: int = 0) -> ir.Model:
    net = Net(seed)
    x = net.input("x", ["N", case.shape[1] * case.groups, *case.size])
    operands = [x, net.weight("w", case.shape), *([net.weight("b", case.shape[:1])] if case.bias else [])]
    return net.model(net.node("Conv", *operands, name="conv", group=case.groups, **case.attributes))


def inputs(case: Case) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    return {"x": rng.standard_normal((2, case.shape[1] * case.groups, *case.size)).astype(np.float32)}


def split(scheme: Split, model: ir.Model, rank: int) -> tuple[ir.Model, ir.Model]:
    """Return the model with its convolution in stages, and with the stages' composed weight in one convolution."""
    form = layers(model)["conv"]
    one, many = graph.copy(model), graph.copy(model)
    node = graph.node_named(many.graph, "conv")
    factors = [scheme.fit(W, None, form, rank) for W in linear.matrix(node, form)]
    stages.put(node, form, stages.merged([group.stages for group in factors]), None)
    linear.store(graph.node_named(one.graph, "conv"), form, np.stack([group.composed for group in factors]), None)
    graph.remove_dead(many.graph)
    assert not onnx_io.check(many)
    return many, one


def assert_equal(found: ir.Model, wanted: ir.Model, batch: dict[str, Array]) -> None:
    (a,), (b,) = (outputs(model, batch).values() for model in (found, wanted))
    assert a.size
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(np.abs(b).max())))


GRID = [
    Case((6, 4, 3, 3), (7, 9)),
    Case((6, 4, 3, 3), (7, 9), bias=False, attributes={"pads": [1, 1, 1, 1]}),
    Case((6, 4, 3, 3), (8, 9), attributes={"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    Case((6, 4, 3, 5), (9, 11), attributes={"strides": [2, 3], "dilations": [2, 1], "pads": [0, 2, 1, 3]}),
    Case((6, 4, 1, 7), (5, 9), attributes={"strides": [2, 1], "pads": [1, 3, 2, 3]}),
    Case((6, 4, 7, 1), (9, 5), attributes={"strides": [1, 2], "pads": [3, 1, 3, 0]}),
    Case((5, 3, 2, 4), (7, 8), attributes={"dilations": [1, 2]}),
    Case((6, 2, 3, 3), (7, 7), 2, attributes={"strides": [2, 1], "pads": [1, 0, 1, 0]}),
    Case((5, 1, 3, 3), (7, 7), 5, attributes={"pads": [1, 1, 1, 1]}),
    Case((6, 4, 3, 3), (7, 8), attributes={"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    Case((6, 4, 3, 4), (7, 9), attributes={"auto_pad": "SAME_LOWER", "strides": [2, 3]}),
    Case((6, 4, 2, 4), (8, 9), attributes={"auto_pad": "SAME_LOWER"}),
    Case((6, 4, 3, 5), (7, 9), attributes={"auto_pad": "VALID", "strides": [1, 2], "dilations": [2, 1]}),
    Case((6, 4, 1, 1), (7, 9), attributes={"strides": [2, 3], "pads": [1, 0, 2, 1]}),
    Case((6, 4, 5), (11,), attributes={"strides": [2], "pads": [2, 1]}),
    Case((8, 4, 2, 3, 1), (4, 5, 6), attributes={"strides": [1, 2, 2], "pads": [0, 1, 0, 1, 1, 0]}),
    Case((8, 64, 3), (5,)),
]


@pytest.mark.parametrize("case", GRID, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_full_rank_is_exact_and_every_rank_computes_its_composed_weight(scheme: str, case: Case) -> None:
    model, step = model_of(case), SCHEMES[scheme]
    form = layers(model)["conv"]
    if step.unfit(form):
        return
    for rank in sorted({*range(1, min(8, step.most(form))), step.most(form)}):
        many, one = split(step, model, rank)
        assert_equal(many, one, inputs(case))
    assert_equal(many, model, inputs(case))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups = draw(st.integers(1, 3))
    shape = (groups * draw(st.integers(1, 4)), draw(st.integers(1, 4)), *draw(st.tuples(*[st.integers(1, 5)] * 2)))
    strides = draw(st.lists(st.integers(1, 3), min_size=2, max_size=2))
    attributes: dict[str, Any] = {"strides": strides}
    padding = draw(st.sampled_from(["", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    dilations = [1, 1]
    if padding in ("", "VALID"):
        dilations = draw(st.lists(st.integers(1, 2), min_size=2, max_size=2))
        attributes["dilations"] = dilations
    if padding:
        attributes["auto_pad"] = padding
    else:
        attributes["pads"] = draw(st.lists(st.integers(0, 3), min_size=4, max_size=4))
    reach = [(k - 1) * d + 1 for k, d in zip(shape[2:], dilations, strict=True)]
    size = (reach[0] + draw(st.integers(0, 4)), reach[1] + draw(st.integers(0, 4)))
    return Case(shape, size, groups, draw(st.booleans()), attributes)


@given(cases(), st.sampled_from(sorted(SCHEMES)), st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_any_convolution_computes_its_composed_weight(case: Case, scheme: str, rank: int) -> None:
    model, step = model_of(case), SCHEMES[scheme]
    form = layers(model)["conv"]
    if not step.unfit(form):
        many, one = split(step, model, min(rank, step.most(form)))
        assert_equal(many, one, inputs(case))


@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 5))
@settings(max_examples=200)
def test_every_tucker_rank_has_an_output_rank_that_can_use_it(o: int, c: int, taps: int) -> None:
    form = layers(model_of(Case((o, c, taps + 1), (taps + 1,))))["conv"]
    for rank in range(1, SCHEMES["tucker"].most(form) + 1):
        _, (outer, inner, kernel), _ = SCHEMES["tucker"].shapes(form, rank)
        assert inner == rank <= min(c, outer * kernel)
        assert outer <= min(o, rank * kernel)


def dense(op: str, weight_first: bool = False, dtype: type = np.float32) -> ir.Model:
    """y = x W, W[8, 6], or y = W x with W[6, 8]; a Gemm has a bias, alpha and beta."""
    net, rng = Net(0), np.random.default_rng(2)
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    x = net.input("x", [8, "N"] if weight_first else ["N", 8], kind)
    w = net.constant(rng.standard_normal((6, 8) if weight_first else (8, 6)).astype(dtype), "w")
    if op == "MatMul":
        return net.model(net.node("MatMul", *([w, x] if weight_first else [x, w]), name="fc"))
    b = net.constant(rng.standard_normal((1, 6)).astype(dtype), "b")
    return net.model(net.node("Gemm", x, w, b, name="fc", alpha=2.0, beta=0.5))


@pytest.mark.parametrize("weight_first", [False, True])
@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_a_dense_layer_of_full_rank_is_exact(op: str, weight_first: bool) -> None:
    if op == "Gemm" and weight_first:
        return
    model = dense(op, weight_first)
    many, form = graph.copy(model), layers(model)["fc"]
    node = graph.node_named(many.graph, "fc")
    factors = SCHEMES["svd"].fit(linear.matrix(node, form)[0], None, form, 6)
    made = stages.put(node, form, factors.stages, None)
    graph.remove_dead(many.graph)
    assert [node.name for node in made] == ["fc/V", "fc/U"]
    rng = np.random.default_rng(3)
    shape = (8, 5) if weight_first else (5, 8)
    assert_equal(many, model, {"x": rng.standard_normal(shape).astype(np.float32)})


@pytest.mark.parametrize(("opset", "ops"), [(9, ["MatMul", "Gemm"]), (11, ["Gemm", "Gemm"])])
def test_where_a_gemm_must_have_a_bias_a_stage_without_is_a_matmul(opset: int, ops: list[str]) -> None:
    net, rng = Net(0), np.random.default_rng(2)
    w, b = net.constant(rng.standard_normal((8, 6)).astype(np.float32), "w"), net.weight("b", (6,))
    model = net.model(net.node("Gemm", net.input("x", ["N", 8]), w, b, name="fc"), opsets={"": opset})
    many, form = graph.copy(model), layers(model)["fc"]
    node = graph.node_named(many.graph, "fc")
    made = stages.put(node, form, SCHEMES["svd"].fit(linear.matrix(node, form)[0], None, form, 6).stages, None)
    graph.remove_dead(many.graph)
    assert [node.op_type for node in made] == ops
    assert_equal(many, model, {"x": rng.standard_normal((5, 8)).astype(np.float32)})


def test_a_bias_that_is_given_replaces_the_old_one_and_its_beta() -> None:
    model = dense("Gemm")
    form, node = layers(model)["fc"], graph.node_named(model.graph, "fc")
    factors = SCHEMES["svd"].fit(linear.matrix(node, form)[0], None, form, 6)
    stages.put(node, form, factors.stages, np.arange(6.0))
    last = graph.node_named(model.graph, "fc/U")
    assert weight(model, "fc/U", 2).tolist() == list(range(6))
    assert "beta" not in last.attributes


def test_a_bias_of_nothing_but_zeros_is_not_added() -> None:
    model = model_of(Case((6, 4, 3, 3), (5, 5), bias=False))
    form, node = layers(model)["conv"], graph.node_named(model.graph, "conv")
    factors = SCHEMES["vertical"].fit(linear.matrix(node, form)[0], None, form, 2)
    made = stages.put(node, form, factors.stages, np.zeros(6))
    assert [len(node.inputs) for node in made] == [2, 2]


def test_a_weight_beyond_its_type_is_refused_and_nothing_changes() -> None:
    model = dense("Gemm", dtype=np.float16)
    form, node = layers(model)["fc"], graph.node_named(model.graph, "fc")
    factors = SCHEMES["svd"].fit(1e10 * linear.matrix(node, form)[0], None, form, 6)
    with pytest.raises(FloatingPointError, match="`fc` is not finite in float16"):
        stages.put(node, form, factors.stages, None)
    assert [node.name for node in model.graph] == ["fc"]


def test_stages_of_groups_stand_side_by_side() -> None:
    parts = [[stages.Stage("V", np.full((2, 3), value)), stages.Stage("U", np.full((4, 2), value))] for value in (1, 2)]
    first, last = stages.merged(parts)
    assert (first.groups, first.weight.shape, last.weight.shape) == (2, (4, 3), (8, 2))
    assert first.weight[:, 0].tolist() == [1, 1, 2, 2]
