"""What constants behind ops are: equal to what ONNX's reference evaluator and the runtime make of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from ccompile import graph, onnx_io

if TYPE_CHECKING:
    from ccompile.core import Array

ORT_NEWEST = 10  # the IR version that the runtime reads


def model_of(op: str, operands: list[Array | None], opset: int = 18, **attributes: Any) -> onnx.ModelProto:
    """One node on constants; a missing operand is None."""
    names = ["" if array is None else f"in{index}" for index, array in enumerate(operands)]
    stored = [numpy_helper.from_array(a, name) for a, name in zip(operands, names, strict=True) if a is not None]
    node = helper.make_node(op, names, ["y"], **attributes)
    kind = onnx.TensorProto.FLOAT
    made = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("y", kind, None)], stored)
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=ORT_NEWEST)
    inferred = onnx.shape_inference.infer_shapes(_without_output_type(proto))
    found = [info for info in inferred.graph.output if info.name == "y"]
    proto.graph.output[0].CopyFrom(found[0])
    return proto


def _without_output_type(proto: onnx.ModelProto) -> onnx.ModelProto:
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    bare.graph.output[0].ClearField("type")
    return bare


def seen(op: str, operands: list[Array | None], opset: int = 18, **attributes: Any) -> Array | None:
    model, _ = onnx_io.from_proto(model_of(op, operands, opset, **attributes))
    return graph.constant(model.graph.outputs[0])


def check(op: str, *operands: Array | None, opset: int = 18, reference: bool = True, **attributes: Any) -> Array:
    """Compare with the runtime, and with the reference where that can do it; return what is seen."""
    proto = model_of(op, list(operands), opset, **attributes)
    found = seen(op, list(operands), opset, **attributes)
    assert found is not None
    (ran,) = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {})
    both = [ran, *(ReferenceEvaluator(proto).run(None, {}) if reference else [])]
    for wanted in both:
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted, strict=True)
    return found


def drawn(seed: int, shape: tuple[int, ...], dtype: str = "float32") -> Array:
    rng = np.random.default_rng(seed)
    if dtype.startswith("float"):
        return rng.integers(-50, 50, shape).astype(dtype)  # sums of these are exact
    info = np.iinfo(dtype)
    return rng.integers(max(info.min, -100), min(info.max, 100), shape).astype(dtype)


SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
SEEDS = st.integers(0, 10**6)


@given(SHAPES, SHAPES, SEEDS, st.sampled_from(["int32", "int64"]))
@settings(max_examples=40, deadline=None)
def test_gather(shape: tuple[int, ...], at: tuple[int, ...], seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    axis = int(rng.integers(-len(shape), len(shape)))
    size = shape[axis]
    check("Gather", drawn(seed, shape), rng.integers(-size, size, at).astype(kind), axis=axis)
    check("Gather", drawn(seed, shape), np.array(-1, np.int64), axis=axis)


@given(SHAPES, SEEDS)
@settings(max_examples=40, deadline=None)
def test_gather_elements(shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    axis = int(rng.integers(-len(shape), len(shape)))
    at = [int(rng.integers(1, size + 1)) for size in shape]
    at[axis] = int(rng.integers(1, 6))
    indices = rng.integers(-shape[axis], shape[axis], at)
    check("GatherElements", drawn(seed, shape), indices, reference=False, axis=axis)


@given(SHAPES, SEEDS)
@settings(max_examples=40, deadline=None)
def test_scatter_elements(shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    axis = int(rng.integers(-len(shape), len(shape)))
    at = [int(rng.integers(1, size + 1)) for size in shape]
    order = [rng.permutation(shape[axis])[: at[axis]] for _ in range(math.prod(at) // at[axis])]
    rest = [size for index, size in enumerate(at) if index != axis % len(at)]
    indices = np.moveaxis(np.array(order).reshape(*rest, at[axis]), -1, axis)
    indices = np.where(rng.random(at) < 0.5, indices, indices - shape[axis])
    check("ScatterElements", drawn(seed, shape), indices, drawn(seed + 1, tuple(at)), reference=False, axis=axis)


@given(SHAPES, SEEDS)
@settings(max_examples=60, deadline=None)
def test_slice(shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, len(shape) + 1))
    axes = rng.permutation(len(shape))[:count] - len(shape) * rng.integers(0, 2, count)
    steps = rng.choice([-2, -1, 1, 2, 3], count)
    starts, ends = rng.integers(-6, 7, count), rng.choice([*range(-6, 7), -(2**31), 2**31 - 1], count)
    backwards = np.where((steps < 0) & (ends == 2**31 - 1), 3, ends)  # evaluators differ on "to the end", backwards
    check("Slice", drawn(seed, shape), starts, backwards, axes, steps, reference=False)
    check("Slice", drawn(seed, shape), starts, ends, axes, reference=False)
    check("Slice", drawn(seed, shape), starts, ends, reference=False)


def test_slice_without_axes_but_with_steps() -> None:
    assert check("Slice", drawn(0, (5, 4)), np.array([4]), np.array([-9]), None, np.array([-2])).shape == (3, 4)


def test_slice_of_old_opsets_has_attributes() -> None:
    assert check("Slice", drawn(0, (5, 4)), opset=9, starts=[1, -2], ends=[3, 9], axes=[1, 0]).shape == (2, 2)
    assert check("Slice", drawn(0, (5, 4)), opset=9, starts=[1], ends=[-1]).shape == (3, 4)


@given(SHAPES, SEEDS, st.booleans(), st.booleans(), st.sampled_from(["int32", "int64", "float32"]))
@settings(max_examples=60, deadline=None)
def test_running_sums(shape: tuple[int, ...], seed: int, reverse: bool, exclusive: bool, kind: str) -> None:
    axis = np.array(seed % (2 * len(shape)) - len(shape), np.int64)
    check("CumSum", drawn(seed, shape, kind), axis, reverse=int(reverse), exclusive=int(exclusive))


@given(SEEDS, st.sampled_from(["uint8", "int8", "int32", "int64", "float32"]))
@settings(max_examples=40, deadline=None)
def test_remainders(seed: int, kind: str) -> None:
    left, right = drawn(seed, (3, 4), kind), drawn(seed + 1, (4,), kind)
    right = np.where(right == 0, 3, right).astype(kind)
    for fmod in (0, 1) if kind != "float32" else (1,):
        check("Mod", left, right, fmod=fmod)


@pytest.mark.parametrize("kind", ["uint8", "uint32", "uint64"])
@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
def test_shifted_bits(kind: str, direction: str) -> None:
    left = np.random.default_rng(0).integers(0, 256, (5, 1)).astype(kind)
    check("BitShift", left, np.arange(8).astype(kind), direction=direction)


@given(SEEDS, st.sampled_from(["none", "left", "row", "both", "column"]), st.sampled_from(["int8", "uint8"]))
@settings(max_examples=40, deadline=None)
def test_integer_products(seed: int, zeros: str, right: str) -> None:
    m, k, n = np.random.default_rng(seed).integers(1, 5, 3)
    operands: list[Array] = [drawn(seed, (m, k), "uint8"), drawn(seed + 1, (k, n), right)]
    points = {
        "none": [],
        "left": [drawn(seed, (), "uint8")],
        "row": [drawn(seed, (m,), "uint8"), drawn(seed, (), right)],
        "both": [drawn(seed, (), "uint8"), drawn(seed, (), right)],
        "column": [drawn(seed, (), "uint8"), drawn(seed, (n,), right)],
    }[zeros]
    found = seen("MatMulInteger", [*operands, *points])
    assert found is not None
    if zeros == "row":  # which neither evaluator has
        left, other = (point.astype(np.int32) for point in points)
        wanted = (operands[0].astype(np.int32) - left[:, None]) @ (operands[1].astype(np.int32) - other)
        np.testing.assert_array_equal(found, wanted, strict=True)
    else:
        check("MatMulInteger", *operands, *points)


def test_integer_products_spread_over_planes() -> None:
    check("MatMulInteger", np.array([[1, 2, 4]], np.uint8)[None], drawn(0, (8, 3, 5), "uint8") & 1)


@pytest.mark.parametrize("op", ["Mul", "Add"])
def test_products_and_sums_of_constants(op: str) -> None:
    check(op, drawn(0, (3, 1, 4)), drawn(1, (2, 1)))


@pytest.mark.parametrize(("first", "end", "step"), [(0, 7, 1), (5, -4, -3), (2, 2, 1), (3, 1, 1), (-9, 0, 4)])
@pytest.mark.parametrize("kind", ["int32", "int64", "float32"])
def test_ranges(first: int, end: int, step: int, kind: str) -> None:
    check("Range", *(np.array(number, kind) for number in (first, end, step)))


@pytest.mark.parametrize(("op", "kind"), [("Mul", "float32"), ("Add", "int64"), ("Mod", "int64")])
def test_scalars_are_arrays_without_axes(op: str, kind: str) -> None:
    assert check(op, np.array(7, kind), np.array(4, kind)).shape == ()


OPS = [
    "Gather",
    "GatherElements",
    "ScatterElements",
    "Mul",
    "Add",
    "Range",
    "Mod",
    "BitShift",
    "Slice",
    "MatMulInteger",
    "CumSum",
]


@pytest.mark.parametrize("op", OPS)
def test_what_depends_on_an_input_is_no_constant(op: str) -> None:
    count = 3 if op in ("Slice", "Range", "ScatterElements") else 2
    for open_ in range(count):
        names = [f"in{index}" for index in range(count)]
        attributes = {"direction": "LEFT"} if op == "BitShift" else {}
        node = helper.make_node(op, names, ["y"], **attributes)
        kind = onnx.TensorProto.UINT8
        stored = [numpy_helper.from_array(np.ones(1, np.uint8), n) for i, n in enumerate(names) if i != open_]
        given_ = [helper.make_tensor_value_info(names[open_], kind, [1])]
        made = helper.make_graph([node], "g", given_, [helper.make_tensor_value_info("y", kind, None)], stored)
        model, _ = onnx_io.from_proto(
            helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        )
        assert graph.constant(model.graph.outputs[0]) is None
        assert not graph.is_constant(model.graph.outputs[0])
