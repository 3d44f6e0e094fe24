from __future__ import annotations

from typing import TYPE_CHECKING

import builders
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from ccompile import graph, onnx_io
from ccompile.diff import Change, as_data, compare_graphs

if TYPE_CHECKING:
    from collections.abc import Callable


def strings(*texts: bytes) -> ir.Model:
    net = builders.Net(0)
    keys = net.stored(ir.StringTensor(list(texts), shape=ir.Shape([2]), name="keys"), "keys")
    return net.model(net.node("Identity", keys))


def test_texts_are_compared_one_by_one() -> None:
    assert compare_graphs(strings(b"a", b"bc"), strings(b"a", b"bc")) == []
    assert kinds(compare_graphs(strings(b"a", b"bc"), strings(b"ab", b"c"))) == [("changed", "weight", "keys")]


def changed(edit: Callable[[ir.Model], None]) -> list[Change]:
    before = builders.mlp(0)
    after = graph.copy(before)
    edit(after)
    return compare_graphs(before, after)


def kinds(changes: list[Change]) -> list[tuple[str, str, str]]:
    return [(change.kind, change.what, change.name) for change in changes]


def set_weight(model: ir.Model, name: str, array: np.ndarray) -> None:
    model.graph.initializers[name].const_value = ir.Tensor(array, name=name)


def weight(model: ir.Model, name: str) -> np.ndarray:
    found = graph.constant(model.graph.initializers[name])
    assert found is not None
    return found


@pytest.mark.parametrize("model", [builders.mlp(0), builders.conv_bn_net(0), builders.residual_net(0)])
def test_equal_graphs_have_no_difference(model: ir.Model) -> None:
    assert compare_graphs(model, graph.copy(model)) == []


def test_an_added_node_is_named() -> None:
    def edit(model: ir.Model) -> None:
        last = graph.node_named(model.graph, "fc3")
        graph.add_node("Neg", [last.inputs[0]], before=last, base="extra")

    (change,) = changed(edit)
    assert change == Change("added", "node", "extra", "", "Neg(relu3_out) -> extra_out")


def test_a_removed_node_and_its_weights_are_named() -> None:
    def edit(model: ir.Model) -> None:
        fc2 = graph.node_named(model.graph, "fc2")
        (source, *_) = fc2.inputs
        assert source is not None
        fc2.outputs[0].replace_all_uses_with(source)
        graph.remove_dead(model.graph)

    found = kinds(changed(edit))
    assert ("removed", "node", "fc2") in found
    assert ("removed", "weight", "fc2.w") in found
    assert ("removed", "weight", "fc2.b") in found
    assert ("changed", "node", "relu3") in found
    assert len(found) == 4


def test_an_added_weight_is_named() -> None:
    found = changed(lambda model: void(graph.add_constant(model.graph, "extra", np.zeros(3, np.float32))))
    assert found == [Change("added", "weight", "extra", "", "FLOAT [3]")]


def void(value: object) -> None:
    pass


def test_a_resized_weight_shows_both_shapes() -> None:
    found = changed(lambda model: set_weight(model, "fc1.b", weight(model, "fc1.b")[:5].copy()))
    assert found == [Change("resized", "weight", "fc1.b", "FLOAT [24]", "FLOAT [5]")]


def test_a_retyped_weight_shows_both_types() -> None:
    found = changed(lambda model: set_weight(model, "fc1.b", weight(model, "fc1.b").astype(np.float16)))
    assert found == [Change("retyped", "weight", "fc1.b", "FLOAT [24]", "FLOAT16 [24]")]


def test_one_changed_entry_of_a_weight_is_a_change() -> None:
    def edit(model: ir.Model) -> None:
        array = weight(model, "fc1.w").copy()
        array[3, 4] = np.nextafter(array[3, 4], np.float32(9))
        set_weight(model, "fc1.w", array)

    assert kinds(changed(edit)) == [("changed", "weight", "fc1.w")]


def test_a_changed_attribute_is_a_changed_node() -> None:
    def edit(model: ir.Model) -> None:
        graph.node_named(model.graph, "fc1").attributes["alpha"] = ir.AttrFloat32("alpha", 2.0)

    (change,) = changed(edit)
    assert kinds([change]) == [("changed", "node", "fc1")]
    assert "alpha=2.0" in change.after
    assert "alpha" not in change.before


def test_another_op_of_the_same_name_is_a_changed_node() -> None:
    def edit(model: ir.Model) -> None:
        graph.node_named(model.graph, "relu1").op_type = "Tanh"

    assert kinds(changed(edit)) == [("changed", "node", "relu1")]


def test_a_rewired_input_is_a_changed_node() -> None:
    def edit(model: ir.Model) -> None:
        relu, fc3 = (graph.node_named(model.graph, name) for name in ("relu3", "fc3"))
        fc3.replace_input_with(0, relu.inputs[0])

    assert kinds(changed(edit)) == [("changed", "node", "fc3")]


def test_another_opset_is_a_change() -> None:
    def edit(model: ir.Model) -> None:
        model.graph.opset_imports[""] = 17
        model.graph.opset_imports["com.microsoft"] = 1

    assert changed(edit) == [
        Change("added", "opset", "com.microsoft", "", "1"),
        Change("changed", "opset", "ai.onnx", "18", "17"),
    ]


def test_another_interface_is_a_change() -> None:
    def edit(model: ir.Model) -> None:
        model.graph.inputs[0].shape = ir.Shape([1, 12])

    (change,) = changed(edit)
    assert kinds([change]) == [("changed", "interface", "x")]
    assert change.before != change.after


def test_a_renamed_output_is_one_removed_and_one_added() -> None:
    def edit(model: ir.Model) -> None:
        model.graph.outputs[0].name = "scores"

    found = kinds(changed(edit))
    assert ("removed", "interface", "fc3_out") in found
    assert ("added", "interface", "scores") in found


def test_swapped_outputs_are_a_change() -> None:
    def net(swap: bool) -> ir.Model:
        net = builders.Net(0)
        x = net.input("x", ["N", 4])
        outputs = [net.node("Relu", x, name="a"), net.node("Neg", x, name="b")]
        return net.model(*(outputs[::-1] if swap else outputs))

    found = compare_graphs(net(False), net(True))
    assert found == [Change("changed", "interface", "order", "x, a_out, b_out", "x, b_out, a_out")]
    assert compare_graphs(net(True), net(True)) == []


def with_constant(number: float, inside: bool) -> ir.Model:
    """A Constant node that holds `number`, in the main graph or in both branches of an If."""
    made = helper.make_node(
        "Constant", [], ["k"], name="k", value=numpy_helper.from_array(np.array([number], np.float32))
    )
    nodes = [made, helper.make_node("Add", ["x", "k"], ["y"], name="add")]
    if inside:
        branch = helper.make_graph(nodes, "b", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
        nodes = [helper.make_node("If", ["c"], ["z"], name="if", then_branch=branch, else_branch=branch)]
    ports = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
    ]
    result = helper.make_tensor_value_info("z" if inside else "y", TensorProto.FLOAT, None)
    body = helper.make_graph(nodes, "g", ports, [result])
    proto: onnx.ModelProto = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return onnx_io.from_proto(proto)[0]


@pytest.mark.parametrize(("inside", "name"), [(False, "k"), (True, "if")])
def test_a_constant_inside_a_node_or_a_branch_counts(inside: bool, name: str) -> None:
    assert compare_graphs(with_constant(1, inside), with_constant(1, inside)) == []
    found = compare_graphs(with_constant(1, inside), with_constant(2, inside))
    assert kinds(found) == [("changed", "node", name)]


def test_changes_become_plain_data() -> None:
    assert as_data([Change("added", "node", "a", "", "Relu")]) == [
        {"kind": "added", "what": "node", "name": "a", "before": "", "after": "Relu"}
    ]
