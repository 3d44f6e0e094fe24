"""Which source nodes the nodes of the runtime's own graph stand for, and what their times are compared with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import builders
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from runs import Run

from ccompile import graph, onnx_io
from ccompile.profiling import Covering, LayerTime, Measured
from ccompile.runtime import Session, Settings


def covered(model: ir.Model, folder: Path) -> list[tuple[str, ...]]:
    """Return the source nodes of each node that the runtime makes of a model."""
    written = str(folder / "optimised.onnx")
    Session(model, Settings(1, optimise=True, optimised=written))
    return list(Covering(model, onnx.load(written).graph).nodes().values())


def residual() -> ir.Model:
    """Blocks of 16 channels, so that x86 runs them in its own layout."""
    net = builders.Net(0)
    x = net.relu(net.conv(net.input("x", [1, 3, 16, 16]), "stem", (16, 3, 3, 3), pad=1))
    inner = net.relu(net.conv(x, "a1", (16, 16, 3, 3), pad=1))
    y = net.node("Relu", net.node("Add", net.conv(inner, "a2", (16, 16, 3, 3), pad=1), x, name="sum"), name="after")
    pooled = net.node("GlobalAveragePool", y, name="pool")
    return net.model(net.node("Gemm", net.node("Flatten", pooled, name="flat"), net.weight("w", (16, 4)), name="fc"))


def integers() -> ir.Model:
    """Two convolutions on codes in a row, which x86 runs with channels last."""
    net = builders.Net(0)
    one, zero = net.constant(np.array(0.1, np.float32), "s"), net.constant(np.array(0, np.uint8), "z")
    x = net.node("QuantizeLinear", net.input("x", [1, 16, 16, 16]), one, zero, name="codes")
    for name in ("first", "second"):
        x = net.node("DequantizeLinear", x, one, zero, name=f"{name}_in")
        w = net.node(
            "DequantizeLinear", net.constant(np.ones((16, 16, 3, 3), np.int8), f"{name}_w"), one, name=f"{name}_dq"
        )
        x = net.node("Relu", net.node("Conv", x, w, name=name, pads=[1] * 4), name=f"{name}_relu")
        x = net.node("QuantizeLinear", x, one, zero, name=f"{name}_out")
    return net.model(net.node("DequantizeLinear", x, one, zero, name="values"))


def counts(model: ir.Model, folder: Path) -> Counter[str]:
    """Return in how many layers each source node is."""
    graph.name_nodes(model.graph)
    return Counter(name for names in {names for names in covered(model, folder) if names} for name in names)


@pytest.mark.parametrize("build", [residual, lambda: builders.lenet_300_100(0)])
def test_every_source_node_runs_within_exactly_one_layer(build: Callable[[], ir.Model], tmp_path: Path) -> None:
    model = build()
    assert counts(model, tmp_path) == Counter(str(node.name) for node in model.graph)


def test_no_source_node_runs_in_two_layers_where_the_runtime_moves_transposes(tmp_path: Path) -> None:
    model = builders.transformer_block(0)
    found = counts(model, tmp_path)
    assert set(found.values()) == {1}
    assert {str(node.name) for node in model.graph} - set(found) <= {
        str(node.name) for node in model.graph if node.op_type == "Transpose"
    }


def test_integer_convolutions_in_a_row_are_told_apart(tmp_path: Path) -> None:
    layers = covered(integers(), tmp_path)
    for name in ("first", "second"):
        (layer,) = {names for names in layers if name in names}
        assert {name, f"{name}_relu", f"{name}_out"} <= set(layer)
        assert not {"first", "second"} - {name} & set(layer)


def test_a_convolution_runs_with_its_activation(tmp_path: Path) -> None:
    model = residual()
    layers = covered(model, tmp_path)
    relu = graph.only_use(next(node for node in model.graph if node.name == "stem").outputs[0]) or next(
        node for node in model.graph if node.op_type == "Relu"
    )
    assert ("stem", str(relu.name)) in layers


def test_a_constant_that_folds_away_belongs_to_what_reads_it(tmp_path: Path) -> None:
    net = builders.Net(0)
    x = net.input("x", [2, 8])
    w = net.node("Transpose", net.weight("w", (5, 8)), name="turned", perm=[1, 0])
    (layer,) = covered(net.model(net.node("MatMul", x, w, name="product")), tmp_path)
    assert "product" in layer


def test_the_share_that_is_near_counts_time_not_layers() -> None:
    layers = (LayerTime(("a",), 1.2, 1.0), LayerTime(("b",), 1.0, 3.0), LayerTime(("c",), 0.79, 1.0))
    assert Measured(layers, 5.0, 1).near == pytest.approx(0.2)


@pytest.mark.parametrize("as_json", [True, False])
def test_inspect_measures_each_layer_beside_its_estimate(as_json: bool, tmp_path: Path, run: Run) -> None:
    onnx_io.save(residual(), tmp_path / "m.onnx")
    result = run("inspect", tmp_path / "m.onnx", "--measure", "--time", "0.2s", *(("--json",) if as_json else ()))
    assert result.code == 0
    if not as_json:
        assert "est. / meas." in result.out
        assert "of the time is in layers whose estimate is at most a fifth off" in result.out
        return
    found = json.loads(result.out)
    seconds = np.array([layer["seconds"] for layer in found["layers"]])
    assert found["threads"] == 1
    assert found["seconds"] > 0 < seconds.min()
    assert 0 <= found["near"] <= 1
    assert {"stem", "a1", "a2", "fc"} <= {name for layer in found["layers"] for name in layer["nodes"]}


def test_a_model_whose_inputs_have_open_shapes_that_do_not_fit_is_refused_with_the_remedy(
    tmp_path: Path, run: Run
) -> None:
    net = builders.Net(0)
    x = net.input("x", ["N", "k"])
    y = net.node("Reshape", net.node("Softmax", x), net.constant(np.array([-1, 8])))
    onnx_io.save(net.model(net.node("MatMul", y, net.weight("w", (8, 3)), name="fc")), tmp_path / "m.onnx")
    result = run("inspect", tmp_path / "m.onnx", "--measure", "--time", "0.2s")
    assert result.code == 2
    assert "--shape" in result.err
    assert run("inspect", tmp_path / "m.onnx", "--measure", "--time", "0.2s", "--shape", "x=1,8").code == 0
