"""What the runtime takes and gives: types that numpy lacks, and refusals that name the node."""

from __future__ import annotations

import functools
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

from ccompile import graph, onnx_io, runtime
from ccompile.comparison import compare
from ccompile.core import Array, View
from ccompile.errors import ModelError
from ccompile.passes.tidy_graph import TidyGraph
from ccompile.target import load_target
from ccompile.tolerance import Tolerance

SETTINGS = runtime.Settings(threads=1)
FOREIGN = ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"]


def through(array: Array) -> onnx.ModelProto:
    """y = x of the array's type, f = g of float32."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    values = {name: onnx.helper.make_tensor_value_info(name, kind, ["N"]) for name in "xy"}
    values |= {name: onnx.helper.make_tensor_value_info(name, 1, ["M"]) for name in "gf"}
    nodes = [onnx.helper.make_node("Identity", [a], [b]) for a, b in ("xy", "gf")]
    main = onnx.helper.make_graph(nodes, "g", [values["x"], values["g"]], [values["y"], values["f"]])
    return onnx.helper.make_model(main, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("dtype", FOREIGN)
@pytest.mark.parametrize("size", [0, 1, 7])
def test_types_that_numpy_lacks_go_in_and_out(dtype: str, size: int, tmp_path: Path) -> None:
    x = np.linspace(0.5, 3, size).astype(getattr(ml_dtypes, dtype))
    feeds = {"x": x, "g": np.ones(3, np.float32)}
    proto = through(x)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    for found in (
        runtime.Session(onnx_io.from_proto(proto)[0], SETTINGS).run(feeds),
        runtime.run_file(tmp_path / "m.onnx", feeds, SETTINGS),
    ):
        assert found["y"].dtype == x.dtype
        np.testing.assert_array_equal(found["y"], x)
        np.testing.assert_array_equal(found["f"], np.ones(3))


def test_4_bit_weights_and_inputs_run() -> None:
    model = onnx_io.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 21]> g (int4[N] x) => (float[N] y) '
            "{ s = Constant<value_float = 0.5>() y = DequantizeLinear (x, s) }"
        )
    )[0]
    x = np.array([-8, 7, 1], ml_dtypes.int4)
    np.testing.assert_array_equal(runtime.Session(model, SETTINGS).run({"x": x})["y"], [-4, 3.5, 0.5])


@pytest.mark.parametrize("dtype", ["float32", *FOREIGN])
def test_floats_are_compared_as_floats_whatever_their_width(dtype: str) -> None:
    kind = getattr(ml_dtypes, dtype, dtype)
    a, b = np.array([1.0, 2.0, np.nan], kind), np.array([1.0, 2.5, np.nan], kind)
    (same,) = compare([{"y": a}], [{"y": a}], 1).outputs
    (other,) = compare([{"y": a}], [{"y": b}], 1).outputs
    assert (same.mismatches, same.max_abs) == (0, 0)
    assert (other.mismatches, other.max_abs) == (0, 0.5)
    assert not other.violations(Tolerance(atol=0.5))
    (lost,) = compare([{"y": a}], [{"y": np.ones(3, kind)}], 1).outputs
    assert lost.mismatches == 1


@pytest.mark.parametrize(
    "message",
    [
        "Could not find an implementation for Foo(1) node with name 'fc/1'",
        "Non-zero status code returned while running Conv node. Name:'fc/1' Status Message: x",
        "Load model failed: Node (fc/1) Op (Conv) [ShapeInferenceError] y",
        "Failed to find kernel for Swish(24) (node:'fc/1' ep:'CPUExecutionProvider')",
        "Type Error: Type parameter (T) of Optype (Add) bound to different types in node (fc/1).",
    ],
)
def test_a_refusal_names_the_node(message: str) -> None:
    with pytest.raises(ModelError) as caught, runtime._refusals("no"):
        raise RuntimeError(message)
    assert caught.value.problems[0].where == "node `fc/1`"


def test_a_refusal_without_a_node_names_none() -> None:
    with pytest.raises(ModelError) as caught, runtime._refusals("no"):
        raise RuntimeError("Could not find an implementation for Foo(1) node with name ''")
    assert caught.value.problems[0].where == ""


def test_lifting_a_constant_leaves_the_tensor_of_the_source_alone() -> None:
    model = onnx_io.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 21]> g (float[N] x) => (float[N] y) '
            "{ k = Constant<value = float[1] kept {2.0}>() y = Mul (x, k) }"
        )
    )[0]
    before = onnx_io.to_proto(model)[0]
    evaluate = functools.partial(runtime.evaluate, settings=SETTINGS)
    target = load_target("generic-cpu", Path())
    view = View(graph.copy(model), target, np.random.default_rng(0), TidyGraph(), graph.facts, evaluate)
    assert TidyGraph().run(view).applied
    assert list(view.graph.initializers) == ["k"]
    assert onnx_io.to_proto(model)[0] == before
