"""Raising the opset: what every model computes stays the same, or the model does, with a reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import builders
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from builders import Net
from calibrated import feeds, outputs

from ccompile import graph, onnx_io, opsets

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ccompile.core import Array


def raised(model: ir.Model, version: int = 21) -> ir.Model:
    twin = graph.copy(model)
    assert opsets.raise_to(twin, version) == ""
    assert twin.opset_imports[""] == twin.graph.opset_imports[""] == version
    return twin


def same(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


@pytest.mark.parametrize("net", [name for name in builders.ZOO if name not in ("transformer",)])
def test_a_raised_net_computes_the_same(net: str) -> None:
    model = builders.ZOO[net](0)
    for batch in feeds(model, (2,)):
        batch = {name: array if array.dtype != bool else np.ones_like(array) for name, array in batch.items()}
        found = raised(model)
        assert onnx_io.check(found) == ""
        same(outputs(found, batch), outputs(model, batch))


# Ops that only took more types, or an attribute: how each is called at opset 18 on x[2, 3, 4, 6].
CALLS: dict[str, dict[str, Any]] = {
    "AveragePool": {"kernel_shape": [2, 2], "ceil_mode": 1},
    "Cast": {"to": 6},
    "CastLike": {},
    "ConstantOfShape": {},
    "Equal": {},
    "Flatten": {},
    "Identity": {},
    "IsInf": {},
    "IsNaN": {},
    "Pad": {"mode": "reflect"},
    "ReduceMax": {"keepdims": 0},
    "ReduceMin": {},
    "Reshape": {},
    "Resize": {"mode": "linear"},
    "Shape": {"start": 1},
    "Size": {},
    "Squeeze": {},
    "Transpose": {"perm": [3, 1, 0, 2]},
    "Unsqueeze": {},
}
INPUTS: dict[str, list[tuple[str, Array]]] = {
    "CastLike": [("", np.zeros(1, np.float64))],
    "Equal": [("", np.zeros(1, np.float32))],
    "Pad": [("", np.array([0, 0, 1, 2, 0, 0, 0, 1]))],
    "ReduceMax": [("", np.array([1, 3]))],
    "ReduceMin": [("", np.array([2]))],
    "Reshape": [("", np.array([0, -1, 6]))],
    "Resize": [("roi", np.zeros(0, np.float32)), ("", np.array([1, 1, 2, 1.5], np.float32))],
    "Unsqueeze": [("", np.array([0, 3]))],
}


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("version", [19, 21])
def test_an_op_that_only_grew_computes_the_same(op: str, version: int) -> None:
    net = Net(0)
    x = net.input("x", [2, 3, 4, 6])
    first = net.node("Shape", x) if op == "ConstantOfShape" else x
    operands = [net.constant(array) for _, array in INPUTS.get(op, [])]
    y = net.node(op, first, *operands, name="node", **CALLS[op])
    model = net.model(y)
    batch = {"x": np.random.default_rng(0).standard_normal((2, 3, 4, 6)).astype(np.float32).round()}
    same(outputs(raised(model, version), batch), outputs(model, batch))


# How ops of opset 13 are called on x[2, 3, 4, 6].
ONES = np.ones((2, 3, 4, 6), np.float32)
OLD_CALLS: dict[str, tuple[list[Array], dict[str, Any]]] = {
    **{op: ([], {"axes": [1, 3], "keepdims": 0}) for op in sorted(opsets.REDUCTIONS)},
    "Split": ([], {"axis": 1}),
    **{op: ([2 * ONES], {}) for op in ("Add", "Div", "Mul", "Sub", "PRelu", "Pow", "GreaterOrEqual", "LessOrEqual")},
    "CumSum": ([np.array(2)], {"reverse": 1}),
    "LeakyRelu": ([], {"alpha": 0.2}),
    "Relu": ([], {}),
    "LpPool": ([], {"kernel_shape": [2, 2]}),
    "ScatterElements": ([np.zeros((1, 1, 1, 1), np.int64), ONES[:1, :1, :1, :1]], {"axis": 2}),
    "ScatterND": ([np.array([[1]]), ONES[:1]], {}),
    "Reshape": ([np.array([0, -1])], {}),
    "Shape": ([], {}),
    "Identity": ([], {}),
    "Pad": ([np.array([0, 0, 1, 1, 0, 0, 1, 1])], {}),
    "Resize": ([np.zeros(0, np.float32), np.array([1, 1, 2, 2], np.float32)], {"mode": "linear"}),
    "BatchNormalization": ([ONES[0, :, 0, 0]] * 4, {"epsilon": 0.1}),
}


def old_net(op: str, opset: int = 13) -> ir.Model:
    net = Net(0)
    operands, attributes = OLD_CALLS[op]
    y = net.node(op, net.input("x", [2, 3, 4, 6]), *map(net.constant, operands), name="node", **attributes)
    node = y.producer()
    assert node is not None
    if op == "Split":
        node.resize_outputs(3)
        for index, output in enumerate(node.outputs):
            output.name = f"part{index}"
    return net.model(*node.outputs, opsets={"": opset})


@pytest.mark.parametrize("op", OLD_CALLS)
@pytest.mark.parametrize("version", [17, 18, 20])
def test_an_op_of_opset_13_computes_the_same_in_a_newer_one(op: str, version: int) -> None:
    model = old_net(op)
    batch = {"x": np.random.default_rng(0).random((2, 3, 4, 6), np.float32)}
    twin = raised(model, version)
    assert onnx_io.check(twin) == ""
    same(outputs(twin, batch), outputs(model, batch))


def test_a_batch_normalisation_that_trains_keeps_the_model_as_it_is() -> None:
    model = old_net("BatchNormalization")
    model.graph[0].resize_outputs(2)
    model.graph[0].outputs[1].name = "mean"
    assert opsets.raise_to(model, 20) == "BatchNormalization with 2 outputs is not the same in opset 20"


def reducing_branches(op: str, opset: int, **attributes: Any) -> ir.Model:
    net = Net(0)
    x, branches = net.input("x", [2, 4, 6]), dict[str, Any]()
    for name in ("then_branch", "else_branch"):
        node = ir.node(op, [x], attributes, name=name)
        node.outputs[0].name, node.outputs[0].type = f"{name}_out", builders.FLOAT
        branches[name] = ir.Graph([], [node.outputs[0]], nodes=[node], opset_imports={"": opset}, name=name)
    return net.model(net.node("If", net.input("flag", [], ir.DataType.BOOL), **branches), opsets={"": opset})


def test_a_reduction_in_a_subgraph_that_only_took_more_types_is_raised() -> None:
    assert opsets.raise_to(reducing_branches("ReduceMax", 18), 21) == ""


def test_a_reduction_in_a_subgraph_keeps_the_model_as_it_is() -> None:
    model = reducing_branches("ReduceMean", 13, axes=[1])
    assert opsets.raise_to(model, 17) == ""
    assert opsets.raise_to(model, 18) == "ReduceMean is in a subgraph, and written otherwise in opset 18"


def test_quantised_ops_compute_the_same() -> None:
    model = builders.quantised_net(0)
    (batch,) = feeds(model, (4,))
    same(outputs(raised(model), batch), outputs(model, batch))


def test_every_op_said_to_have_grown_did_change_and_has_no_new_inputs() -> None:
    """Between the floor and the newest, none of them lost an attribute, or got one that must be given."""
    for op in opsets.WIDENED:
        first = next(version for version in range(opsets.FLOOR, opsets.NEWEST) if onnx.defs.has(op, version, ""))
        old, new = (onnx.defs.get_schema(op, version, "") for version in (first, opsets.NEWEST))
        assert old.since_version != new.since_version, f"{op} is the same: it need not be listed"
        assert old.attributes.keys() <= new.attributes.keys(), op
        added = [new.attributes[name] for name in new.attributes.keys() - old.attributes.keys()]
        assert not any(attribute.required for attribute in added), op
        assert [value.name for value in new.inputs][: len(old.inputs)] == [value.name for value in old.inputs], op
        assert all(
            value.option != onnx.defs.OpSchema.FormalParameterOption.Single for value in new.inputs[len(old.inputs) :]
        )


def test_what_is_new_enough_stays() -> None:
    model = builders.mlp(0)
    model.graph.opset_imports[""] = 21
    before = model.ir_version
    assert opsets.raise_to(model, 21) == ""
    assert opsets.raise_to(model, 19) == ""
    assert (model.graph.opset_imports[""], model.ir_version) == (21, before)


def test_the_ir_version_goes_with_it() -> None:
    model = builders.mlp(0)
    model.ir_version = 8
    assert raised(model).ir_version == 10


@pytest.mark.parametrize("opset", [11, 12])
def test_an_old_model_stays_and_says_why(opset: int) -> None:
    model = builders.mlp(0)
    model.graph.opset_imports[""] = opset
    assert opsets.raise_to(model, 21) == f"opset {opset} is older than 13"
    assert model.graph.opset_imports[""] == opset


@pytest.mark.parametrize("inside", [False, True])
def test_an_op_that_means_something_else_keeps_the_model_as_it_is(inside: bool) -> None:
    net = Net(0)
    x = net.input("x", [2, 4, 6])
    weights = [net.constant(np.ones(size, np.float32)) for size in (2, 2)]

    def normal(name: str) -> ir.Node:
        return ir.node("GroupNormalization", [x, *weights], {"num_groups": 2}, name=name)

    if not inside:
        node = normal("norm")
        net.nodes.append(node)
        node.outputs[0].name = "norm_out"
        model = net.model(node.outputs[0])
    else:
        branches: dict[str, Any] = {}
        for name in ("then_branch", "else_branch"):
            node = normal(name)
            node.outputs[0].name, node.outputs[0].type = f"{name}_out", builders.FLOAT
            branches[name] = ir.Graph([], [node.outputs[0]], nodes=[node], opset_imports={"": 18}, name=name)
        model = net.model(net.node("If", net.input("flag", [], ir.DataType.BOOL), **branches))
    assert opsets.raise_to(model, 21) == "GroupNormalization is not the same in opset 21"
    assert model.graph.opset_imports[""] == 18


def test_ops_of_other_domains_are_not_asked() -> None:
    net = Net(0)
    x = net.input("x", [2, 4])
    model = net.model(net.node("Gelu", x, domain="com.microsoft"), opsets={"com.microsoft": 1})
    twin = raised(model)
    assert twin.graph.opset_imports["com.microsoft"] == 1


def test_an_op_of_a_later_opset_is_told() -> None:
    net = Net(0)
    model = net.model(net.node("Gelu", net.input("x", [2, 4])))
    assert opsets.raise_to(model, 21) == "Gelu is no operator of opset 18"


def test_functions_are_raised_with_the_model() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 18, "mine" : 1]>
    g (float[2, 3] x) => (float[3, 2] y) { y = mine.turn (x) }
    <domain: "mine", opset_import: ["" : 18]>
    turn (a) => (b) { b = Transpose <perm = [1, 0]> (a) }
    """
    model, _ = onnx_io.from_proto(onnx.parser.parse_model(text))
    twin = raised(model)
    (function,) = twin.functions.values()
    assert function.opset_imports[""] == 21
    batch = np.arange(6, dtype=np.float32).reshape(2, 3)
    session = ort.InferenceSession(ir.to_proto(twin).SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {"x": batch})[0], batch.T)
