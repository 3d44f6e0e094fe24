from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import builders
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from ccompile import graph, onnx_io, runtime
from ccompile.errors import ModelError
from ccompile.runtime import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ccompile.core import Array

ONE = Settings(threads=1)
FLOAT, BOOL, INT64 = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64
Dims = list[int | str | None] | None


def info(name: str, dims: Dims = None, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, dims)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: dict[str, Array] | None = None,
) -> ir.Model:
    proto = helper.make_model(
        helper.make_graph(
            nodes, "g", inputs, outputs, [numpy_helper.from_array(a, name) for name, a in (constants or {}).items()]
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    return onnx_io.from_proto(proto)[0]


def ones(*shape: int) -> Array:
    return np.ones(shape, np.float32)


def value(model: ir.Model, name: str) -> ir.Value:
    found = {v.name: v for node in model.graph for v in node.outputs} | dict(model.graph.initializers.items())
    return found[name]


# ---------------------------------------------------------------------------------------------- sessions


def test_outputs_equal_numpy() -> None:
    model = builders.mlp(0)
    x = np.random.default_rng(0).standard_normal((3, 12)).astype(np.float32)
    y: Array = x
    for name in ("fc1", "fc2", "fc3"):
        node = graph.node_named(model.graph, name)
        W, b = graph.constant(node.inputs[1]), graph.constant(node.inputs[2])
        assert W is not None
        y = (np.maximum(y, 0) if name != "fc1" else y) @ W.T + b
    np.testing.assert_allclose(runtime.Session(model, ONE).run({"x": x})["fc3_out"], y, rtol=1e-5, atol=1e-5)


def test_weights_stay_out_of_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = ort.InferenceSession

    def seen(content: bytes, *args: Any, **options: Any) -> Any:
        sizes.append(len(content))
        return real(content, *args, **options)

    monkeypatch.setattr(ort, "InferenceSession", seen)
    model = builders.lenet_300_100(0)
    runtime.Session(model, ONE)
    assert sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value) > 10**6
    assert sizes[0] < 10**4


def test_weights_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = builders.lenet_300_100(0)
    session = runtime.Session(model, ONE)
    held = {value.data_ptr() for value in session._held}
    tensor = model.graph.initializers["fc1.w"].const_value
    assert tensor is not None
    assert tensor.numpy().ctypes.data in held


def test_a_large_weight_that_nothing_reads_is_left_out() -> None:
    net = builders.Net()
    net.weight("unread", (300, 300))
    model = net.model(net.node("Relu", net.input("x", [1, 4])))
    x = np.ones((1, 4), np.float32)
    assert (runtime.Session(model, ONE).run({"x": x})[model.graph.outputs[0].name or ""] == x).all()


def test_a_session_leaves_the_model_as_it_was() -> None:
    model = builders.mlp(0)
    before = onnx_io.to_proto(model)[0].SerializeToString()
    runtime.Session(model, ONE, ["relu1_out"])
    assert onnx_io.to_proto(model)[0].SerializeToString() == before


def test_observed_values_come_beside_the_outputs() -> None:
    model = builders.mlp(0)
    found = runtime.Session(model, ONE, ["relu1_out", "fc3_out"]).run({"x": ones(2, 12)})
    assert {name: array.shape for name, array in found.items()} == {"fc3_out": (2, 5), "relu1_out": (2, 24)}


def test_a_written_file_gives_the_same_numbers(tmp_path: Path) -> None:
    model, feeds = builders.mlp(0), {"x": ones(2, 12)}
    onnx_io.save(model, tmp_path / "m.onnx")
    expected = runtime.Session(model, ONE).run(feeds)["fc3_out"]
    np.testing.assert_array_equal(runtime.run_file(tmp_path / "m.onnx", feeds, ONE)["fc3_out"], expected)


def test_outputs_of_yields_batch_by_batch() -> None:
    model = builders.mlp(0)
    found = list(runtime.outputs_of(model, [{"x": ones(n, 12)} for n in (1, 3)], ONE))
    assert [batch["fc3_out"].shape for batch in found] == [(1, 5), (3, 5)]


# ---------------------------------------------------------------------------------------------- refusals

X = [info("x", ["N", 3])]
REFUSED = {
    "no such op": ([helper.make_node("Foo", ["x"], ["y"], name="/m/Foo 0")], {}, "/m/Foo 0"),
    "no such attribute": ([helper.make_node("Relu", ["x"], ["y"], name="/m/Relu_0", a=1)], {}, "/m/Relu_0"),
    "shapes": ([helper.make_node("MatMul", ["x", "w"], ["y"], name="/m/MatMul_0")], {"w": ones(4, 2)}, "/m/MatMul_0"),
    "types": ([helper.make_node("And", ["x", "x"], ["y"], name="/m/And_0")], {}, "/m/And_0"),
    "no kernel": (
        [helper.make_node("Cast", ["x"], ["t"], to=TensorProto.INT16), helper.make_node("Conv", ["t", "t"], ["y"])],
        {},
        "",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_model_names_the_node_where_the_runtime_does(case: str) -> None:
    nodes, constants, name = REFUSED[case]
    model = model_of(nodes, X, [info("y")], constants)
    with pytest.raises(ModelError, match="ONNX Runtime refuses the model") as caught:
        runtime.Session(model, ONE)
    (problem,) = caught.value.problems
    assert name in problem.where
    assert "ONNXRuntimeError" not in problem.message
    assert "with`" not in problem.where
    assert "input`" not in problem.where


def test_a_failing_run_names_the_node() -> None:
    nodes = [helper.make_node("Gather", ["x", "i"], ["y"], name="/m/Gather 7", axis=1)]
    session = runtime.Session(model_of(nodes, X, [info("y")], {"i": np.array([9])}), ONE)
    with pytest.raises(ModelError, match="out of data bounds") as caught:
        session.run({"x": ones(2, 3)})
    assert caught.value.problems[0].where == "node `/m/Gather 7`"


@pytest.mark.parametrize("feeds", [{"z": ones(1, 3)}, {"x": ones(1, 4)}, {"x": np.ones((1, 3))}])
def test_feeds_that_do_not_fit_are_a_model_error(feeds: dict[str, Array]) -> None:
    session = runtime.Session(model_of([helper.make_node("Relu", ["x"], ["y"])], X, [info("y")]), ONE)
    with pytest.raises(ModelError, match="fails on these inputs"):
        session.run(feeds)
    assert session.run({"x": ones(1, 3)})["y"].shape == (1, 3)


def test_an_observed_value_that_is_not_there_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="nowhere"):
        runtime.Session(builders.mlp(0), ONE, ["nowhere"])


def test_shorten_drops_code_path_and_stack() -> None:
    message = (
        "[ONNXRuntimeError] : 1 : FAIL : /onnxruntime_src/onnxruntime/core/graph/graph.cc:12 "
        "void onnxruntime::Graph::Do(int, bool) Bad\n  thing"
    )
    assert runtime.shorten(message) == "Bad thing"


def test_shorten_cuts_long_messages_only() -> None:
    assert runtime.shorten("a" * 300) == "a" * 300
    assert runtime.shorten("a" * 301) == "a" * 297 + "..."


# ---------------------------------------------------------------------------------------------- constants


def constants_model() -> ir.Model:
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.eye(3, dtype=np.float32))),
        helper.make_node("Add", ["c", "w"], ["d"]),
        helper.make_node("Mul", ["d", "d"], ["e"]),
        helper.make_node("Split", ["e", "s"], ["e0", "e1"], axis=0),
        helper.make_node("MatMul", ["x", "e"], ["y"]),
        helper.make_node("Add", ["e0", "y"], ["z"]),
    ]
    w = np.arange(9, dtype=np.float32).reshape(3, 3)
    return model_of(nodes, X, [info("y"), info("e1"), info("z")], {"w": w, "s": np.array([1, 2])})


def test_a_constant_expression_equals_numpy() -> None:
    model = constants_model()
    e = (np.eye(3, dtype=np.float32) + np.arange(9, dtype=np.float32).reshape(3, 3)) ** 2
    wanted = {"e": e, "e1": e[1:], "w": np.arange(9).reshape(3, 3), "c": np.eye(3)}
    found = runtime.evaluate([value(model, name) for name in wanted], ONE)
    assert len(found) == len(wanted)
    for array, expected in zip(found, wanted.values(), strict=True):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected)


def test_large_constants_are_evaluated_too() -> None:
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model = model_of([helper.make_node("Neg", ["w"], ["d"])], X, [info("d")], {"w": w})
    np.testing.assert_array_equal(runtime.evaluate([value(model, "d")], ONE)[0], -w)


@pytest.mark.parametrize("name", ["y", "z"])
def test_what_depends_on_an_input_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="`x` is not constant"):
        runtime.evaluate([value(constants_model(), name)], ONE)


def test_evaluated_models_claim_no_newer_format_than_old_runtimes_read(monkeypatch: pytest.MonkeyPatch) -> None:
    versions: list[int | None] = []
    real = onnx_io.to_proto

    def seen(model: ir.Model) -> Any:
        versions.append(model.ir_version)
        return real(model)

    monkeypatch.setattr(onnx_io, "to_proto", seen)
    runtime.evaluate([value(constants_model(), "d")], ONE)
    assert versions == [10]


# ---------------------------------------------------------------------------------------------- observed shapes


def assert_observed(model: ir.Model, feeds: dict[str, Any], names: Sequence[str]) -> None:
    observed = runtime.observed_shapes(model, feeds, ONE)
    real = runtime.Session(model, ONE, names).run(feeds, names)
    assert names
    for name in names:
        assert observed[name].shape == real[name].shape, name
        assert observed[name].dtype == ir.DataType.from_numpy(real[name].dtype), name


def test_observed_shapes_are_the_real_ones() -> None:
    model = builders.residual_net(0)
    names = [str(node.outputs[0].name) for node in model.graph]
    assert_observed(model, {"x": ones(2, 3, 8, 8)}, names)


def test_shapes_that_depend_on_values_are_observed() -> None:
    model = model_of(
        [helper.make_node("NonZero", ["x"], ["i"]), helper.make_node("Neg", ["i"], ["y"])], X, [info("y", None, INT64)]
    )
    assert_observed(model, {"x": np.eye(3, dtype=np.float32)}, ["i", "y"])


def test_omitted_outputs_do_not_shift_the_shapes() -> None:
    nodes = [helper.make_node("LSTM", ["x", "W", "R"], ["", "", "c"], hidden_size=2)]
    model = model_of(nodes, [info("x", ["T", "N", 3])], [info("c")], {"W": ones(1, 8, 3), "R": ones(1, 8, 2)})
    assert_observed(model, {"x": ones(5, 4, 3)}, ["c"])


def branches(*inner: str) -> ir.Model:
    """y = relu(x) or a double of it; `inner` are the names of the branches' inner values."""
    then = helper.make_graph(
        [helper.make_node("Relu", ["x"], [inner[0]]), helper.make_node("Neg", [inner[0]], ["t"])], "t", [], [info("t")]
    )
    other = helper.make_graph(
        [helper.make_node("Concat", ["x", "x"], [inner[1]], axis=0), helper.make_node("Neg", [inner[1]], ["o"])],
        "o",
        [],
        [info("o")],
    )
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)]
    return model_of(nodes, [info("c", [], BOOL), *X], [info("y")])


@pytest.mark.parametrize(("taken", "name", "shape"), [(True, "a", (2, 3)), (False, "b", (4, 3))])
def test_values_of_the_branch_taken_are_observed(taken: bool, name: str, shape: tuple[int, ...]) -> None:
    observed = runtime.observed_shapes(branches("a", "b"), {"c": np.array(taken), "x": ones(2, 3)}, ONE)
    assert observed[name].shape == observed["y"].shape == shape
    assert {"a", "b"} & observed.keys() == {name}


def test_a_name_in_two_branches_is_not_observed() -> None:
    observed = runtime.observed_shapes(branches("a", "a"), {"c": np.array(True), "x": ones(2, 3)}, ONE)
    assert observed.keys() == {"t", "y"}


def test_observing_leaves_node_names_alone() -> None:
    model = builders.mlp(0)
    names = [node.name for node in model.graph]
    runtime.observed_shapes(model, {"x": ones(1, 12)}, ONE)
    assert [node.name for node in model.graph] == names


# ---------------------------------------------------------------------------------------------- one sample


def takes(*inputs: tuple[Dims, tuple[int, ...]]) -> tuple[dict[str, tuple[int, ...]], bool]:
    """Return what is left of feeds of the given shapes (declared, fed)."""
    ports = [info(f"x{k}", declared) for k, (declared, _) in enumerate(inputs)]
    nodes = [helper.make_node("Identity", [port.name], [f"{port.name}_y"]) for port in ports]
    model = model_of(nodes, ports, [info(f"{port.name}_y") for port in ports])
    feeds = {f"x{k}": np.arange(math.prod(fed), dtype=np.float32).reshape(fed) for k, (_, fed) in enumerate(inputs)}
    cut, one = runtime.one_sample(feeds, model)
    for name, array in cut.items():
        np.testing.assert_array_equal(array, feeds[name][tuple(slice(n) for n in array.shape)])
    return {name: array.shape for name, array in cut.items()}, one


@pytest.mark.parametrize(
    ("inputs", "left", "one"),
    [
        ([(["N", 3], (8, 3))], [(1, 3)], True),
        ([([None, 3], (8, 3))], [(1, 3)], True),
        ([([4, 3], (4, 3))], [(4, 3)], True),
        ([(["N", 3], (8, 3)), ([2, "N", 128], (2, 8, 128))], [(1, 3), (2, 1, 128)], True),
        ([(["N", 3], (8, 3)), ([2, None, 128], (2, 8, 128))], [(8, 3), (2, 8, 128)], False),
        ([([None, 3], (8, 3)), ([2, None, 128], (2, 8, 128))], [(8, 3), (2, 8, 128)], False),
        ([(["N", 3], (8, 3)), ([], ())], [(1, 3), ()], True),
        ([(["N", "T"], (8, 5)), (["N", "T", 2], (8, 5, 2))], [(1, 5), (1, 5, 2)], True),
        ([(["N", 3], (8, 3)), ([7, 3], (7, 3))], [(1, 3), (7, 3)], True),
        ([([], ())], [()], True),
    ],
)
def test_one_sample_is_cut_along_the_batch_axis_only(
    inputs: list[tuple[Dims, tuple[int, ...]]], left: list[tuple[int, ...]], one: bool
) -> None:
    shapes, found = takes(*inputs)
    assert list(shapes.values()) == left
    assert found == one


def test_feeds_that_are_no_arrays_stay_whole() -> None:
    feeds = {"x": [ones(2)], "z": ones(4, 2)}
    model = model_of([helper.make_node("Relu", ["z"], ["y"])], [info("x", ["N", 2]), info("z", ["N", 2])], [info("y")])
    assert runtime.one_sample(feeds, model) == (feeds, False)


# ---------------------------------------------------------------------------------------------- race


def test_a_race_runs_at_least_five_rounds_whatever_the_budget() -> None:
    model = builders.mlp(0)
    found = runtime.race(model, model, {"x": ones(1, 12)}, threads=1, budget=0)
    assert found.rounds == 5
    assert found.seconds > 0
    assert found.reference_seconds > 0
    assert 0 < found.low <= found.ratio <= found.high < math.inf


def test_a_race_divides_the_reference_by_the_candidate_and_swaps_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = builders.mlp(0), builders.mlp(1)
    turns: list[str] = []

    class Stub:
        def __init__(self, model: ir.Model, settings: Settings) -> None:
            assert settings == Settings(threads=3, optimise=True)
            self.name = "candidate" if model is fast else "reference"

        def run(self, feeds: Any) -> None:
            pass

    def seconds(session: Stub, feeds: Any) -> float:
        turns.append(session.name)
        return 1.0 if session.name == "candidate" else 3.0

    monkeypatch.setattr(runtime, "Session", Stub)
    monkeypatch.setattr(runtime, "_timed", seconds)
    found = runtime.race(fast, slow, {}, threads=3, budget=0)
    assert [found.seconds, found.reference_seconds, found.ratio] == [1, 3, 3]
    assert turns[:2] == turns[3:1:-1] != turns[2:4]


def test_a_race_stops_at_its_number_of_rounds() -> None:
    model = builders.mlp(0)
    assert runtime.race(model, model, {"x": ones(1, 12)}, threads=1, budget=60, rounds=7).rounds == 7


def test_a_session_that_is_asked_for_nothing_gives_nothing() -> None:
    session = runtime.Session(builders.mlp(0), ONE)
    assert session.run({"x": ones(1, 12)}, []) == {}
