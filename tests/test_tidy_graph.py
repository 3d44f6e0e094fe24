"""tidy-graph where texts do not reach: texts among the weights, and which names it reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import builders
import calibrated
import driver
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Net

from ccompile import graph, onnx_io, registry

if TYPE_CHECKING:
    from pathlib import Path


def test_equal_texts_are_not_shared() -> None:
    net = Net(0)
    held = [net.stored(ir.StringTensor([b"k", b"l"], shape=ir.Shape([2]), name=name), name) for name in "ab"]
    outputs = [net.node("Identity", value) for value in held]
    model = net.model(net.node("Neg", net.input("x", ["N", 2])), *outputs)
    run = driver.run_step(registry.find("tidy-graph").model_validate({}), model)
    assert run.record.verdict == "kept"
    assert {"a", "b"} <= run.model.graph.initializers.keys()


def test_an_initializer_that_nothing_reads_goes() -> None:
    net = Net()
    net.weight("unread", (300, 300))
    run = driver.run_step(
        registry.find("tidy-graph").model_validate({}), net.model(net.node("Relu", net.input("x", [1, 4])))
    )
    assert not run.model.graph.initializers
    assert [(site.nodes, site.note) for site in run.record.applied] == [
        (("unread",), "an initializer that nothing reads")
    ]


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


def grown(count: int, size: int, **options: int) -> driver.Bench:
    """Run on `count` sums with a constant of `size` floats that 8 stored bytes make."""
    net = Net(0)
    x = net.input("x", ["N", size])
    for index in range(count):
        shape, value = net.constant(np.array([size], np.int64)), ir.tensor(np.array([1.0 + index], np.float32))
        x = net.node("Add", x, net.node("ConstantOfShape", shape, value=value, name=f"fill{index}"))
    return driver.run_step(registry.find("tidy-graph").model_validate(options), net.model(x))


@pytest.mark.parametrize(("size", "compact", "folds"), [(16, True, 3), (17, True, 0), (17, False, 3), (1024, False, 3)])
def test_compact_files_take_less_growth(size: int, compact: bool, folds: int) -> None:
    assert len([site for site in grown(3, size, compact=compact).record.applied if "folded" in site.note]) == folds


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


def padded(
    op: str, around: list[int], fill: float = 0.0, *, opset: int = 18, act: str = "", **windows: Any
) -> ir.Model:
    """A Pad of two spatial axes [h, w, h, w] before a node with a window of 3 x 2."""
    net = Net(0)
    x = net.input("x", [2, 4, 7, 6])
    x = net.node(act, x) if act else x
    whole = [0, 0, *around[:2], 0, 0, *around[2:]]
    if opset < 11:
        y = net.node("Pad", x, pads=whole, value=fill, name="pad")
    else:
        y = net.node("Pad", x, net.constant(np.array(whole)), net.constant(np.array(fill, np.float32)), name="pad")
    if op == "Conv":
        return net.model(net.node(op, y, net.weight("w", (3, 4, 3, 2)), **windows), opsets={"": opset})
    return net.model(net.node(op, y, kernel_shape=[3, 2], **windows), opsets={"": opset})


def ops_after(model: ir.Model) -> list[str]:
    run = driver.run_step(registry.find("tidy-graph").model_validate({}), model)  # which compares outputs
    assert run.record.verdict == "kept", run.record.reason
    return [node.op_type for node in run.model.graph]


@pytest.mark.parametrize("opset", [10, 18])
@pytest.mark.parametrize("strides", [[1, 1], [2, 3]])
@pytest.mark.parametrize("pads", [[1, 0, 2, 1], [0, 1, 0, 0], [2, 1, 2, 1]])
@pytest.mark.parametrize("op", ["Conv", "AveragePool", "MaxPool"])
def test_a_pad_is_done_by_the_window_behind(op: str, pads: list[int], strides: list[int], opset: int) -> None:
    model = padded(op, pads, opset=opset, act="Relu", strides=strides)
    assert ops_after(model) == ["Relu", op]


@pytest.mark.parametrize("own", [[1, 0, 0, 0], [0, 1, 0, 0]])
def test_pads_of_both_add_up_where_a_mean_counts_them(own: list[int]) -> None:
    assert ops_after(padded("AveragePool", [1, 0, 1, 1], pads=own, count_include_pad=1)) == ["AveragePool"]


def test_a_pad_by_less_than_anything_is_done_by_a_maximum() -> None:
    assert ops_after(padded("MaxPool", [1, 1, 1, 1], -np.inf)) == ["MaxPool"]


@pytest.mark.parametrize(
    ("op", "fill", "act", "windows"),
    [
        ("MaxPool", 0.0, "", {}),
        ("MaxPool", 0.0, "LeakyRelu", {}),
        ("MaxPool", -1.0, "Relu", {}),
        ("MaxPool", 0.0, "Relu", {"ceil_mode": 1, "strides": [2, 2]}),
        ("MaxPool", 0.0, "Relu", {"dilations": [2, 2]}),
        ("MaxPool", 0.0, "Relu", {"pads": [2, 0, 0, 0]}),
        ("AveragePool", 0.0, "", {"ceil_mode": 1, "strides": [2, 2]}),
        ("AveragePool", 0.5, "", {}),
        ("Conv", 0.5, "", {}),
        ("Conv", 0.0, "", {"auto_pad": "SAME_LOWER"}),
    ],
)
def test_other_pads_stay(op: str, fill: float, act: str, windows: dict[str, Any]) -> None:
    assert "Pad" in ops_after(padded(op, [1, 0, 0, 1], fill, act=act, **windows))


@pytest.mark.parametrize(("end", "left"), [(6, ["Neg"]), (5, ["Slice", "Neg"])])
def test_a_slice_by_attributes_of_everything_goes(end: int, left: list[str]) -> None:
    net = Net(0)
    y = net.node("Slice", net.input("x", [2, 6]), starts=[0], ends=[end], axes=[1])
    assert ops_after(net.model(net.node("Neg", y), opsets={"": 9})) == left


def test_a_repeat_with_several_outputs_goes() -> None:
    net = Net(0)
    x, parts = net.input("x", [2, 6]), []
    for name in "ab":
        first = net.node("Split", x, num_outputs=2, axis=1, name=name)
        node = net.nodes[-1]
        node.resize_outputs(2)
        node.outputs[1].name = f"{name}_second"
        parts.append((first, node.outputs[1]))
    y = net.node("Add", net.node("Sub", parts[0][0], parts[1][1]), parts[1][0])
    assert ops_after(net.model(y)) == ["Split", "Sub", "Add"]


def test_constants_that_two_nodes_make_stay_apart() -> None:
    net = Net(0)
    x = net.input("x", ["N", 64])
    for name in "ab":
        shape, held = net.constant(np.array([64, 64], np.int64)), ir.tensor(np.array([0.5], np.float32))
        x = net.node("MatMul", x, net.node("ConstantOfShape", shape, value=held, name=name))
    assert ops_after(net.model(x)).count("ConstantOfShape") == 2


def test_short_names_stay_inside_and_come_back_with_the_file(tmp_path: Path) -> None:
    model = builders.residual_net(2)
    source = graph.copy(model)
    run = driver.run_step(registry.find("tidy-graph").model_validate({"short_names": True}), model)
    assert run.record.verdict == "kept"
    assert graph.signature(run.model) == graph.signature(source)
    kept = {str(value.name) for value in (*source.graph.inputs, *source.graph.outputs)}
    inner = {str(output.name) for node in run.model.graph for output in node.outputs} | set(
        run.model.graph.initializers
    )
    assert max(len(name) for name in inner - kept) <= 2
    assert calibrated.error(run.model, source, calibrated.feeds(source)) == 0
    onnx_io.save(run.model, tmp_path / "short.onnx")
    assert not any(node.name for node in onnx.load(tmp_path / "short.onnx").graph.node)
    again = onnx_io.load(tmp_path / "short.onnx").model
    assert [node.name for node in again.graph] == [node.name for node in run.model.graph]


def test_short_names_reach_what_subgraphs_read() -> None:
    model = builders.capturing_net(1)
    source = graph.copy(model)
    run = driver.run_step(registry.find("tidy-graph").model_validate({"short_names": True}), model)
    assert any("until now" in site.note for site in run.record.applied)
    assert calibrated.error(run.model, source, calibrated.feeds(source)) == 0


def test_a_kernel_that_the_weight_shows_is_left_out() -> None:
    net = Net(0)
    model = net.model(net.conv(net.input("x", ["N", 2, 6, 6]), "conv", (3, 2, 3, 3)))
    model.graph[0].attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", [3, 3])
    source = graph.copy(model)
    run = driver.run_step(registry.find("tidy-graph").model_validate({"compact": True}), model)
    assert "kernel_shape" not in run.model.graph[0].attributes
    assert calibrated.error(run.model, source, calibrated.feeds(source)) == 0


def gelu(opset: int) -> ir.Model:
    """x (1 + tanh(...)) / 2 as exporters of an old opset write it, behind a mean."""
    net = Net(0)
    x = net.node("ReduceMean", net.input("x", [2, 4, 6]), axes=[1])
    third = net.node("Mul", x, net.node("Mul", x, net.node("Mul", net.constant(np.array(0.044715, np.float32)), x)))
    inner = net.node("Mul", net.constant(np.array(0.7978845608, np.float32)), net.node("Add", x, third))
    gate = net.node("Add", net.constant(np.array(1.0, np.float32)), net.node("Tanh", inner))
    y = net.node("Mul", x, net.node("Mul", net.constant(np.array(0.5, np.float32)), gate), name="last")
    return net.model(y, opsets={"": opset})


@pytest.mark.parametrize("opset", [11, 15])
def test_a_raised_opset_lets_an_activation_fuse(opset: int) -> None:
    run = driver.bench(gelu(opset))
    run.step(0, registry.find("tidy-graph").model_validate({"opset": 20}))
    assert graph.opset(run.model) == 20
    assert any(site.note == f"opset {opset} raised to 20" for site in run.record.applied)
    run.step(1, registry.find("fuse-activations").model_validate({"select": "always"}))
    assert [node.op_type for node in run.model.graph] == ["ReduceMean", "Gelu"]


def test_an_activation_that_needs_a_newer_opset_says_how_to_get_it() -> None:
    run = driver.run_step(registry.find("fuse-activations").model_validate({"select": "always"}), gelu(15))
    assert [skip.reason for skip in run.record.skipped] == [
        "Gelu, tanh: Gelu is newer than the model's opset; `tidy-graph: {opset: 20}` raises it"
    ]


def test_an_opset_that_stays_says_why() -> None:
    run = driver.run_step(registry.find("tidy-graph").model_validate({"opset": 20}), gelu(9))
    assert run.record.applied == ()
    assert ["opset 9 stays" in skip.reason for skip in run.record.skipped] == [True]
