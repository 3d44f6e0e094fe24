"""Forms of a weight: every bit comes back, in every opset, run with optimisations and without; the smallest wins."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from builders import Net
from hypothesis import given, settings
from hypothesis import strategies as st

from ccompile import decoding, forms, graph, onnx_io, storage
from ccompile.decoding import Form, Means, Sliced
from ccompile.forms import Bitmask, Blocks, Codebook, Grid, Outliers, Plain, Sparse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ccompile.core import Array

OPSETS = [11, 13, 18, 21]
TINY = decoding.overhead(1, 1)


def model_of(array: Array, opset: int) -> ir.Model:
    """One node that reads the weight: its output is the weight, bit by bit, where x is 1."""
    net = Net(0)
    x = net.input("x", [1], ir.DataType.from_numpy(array.dtype))
    return net.model(net.node("Mul", x, net.constant(array, "weight"), name="layer"), opsets={"": opset})


def message(model: ir.Model) -> bytes:
    proto, large = onnx_io.to_proto(model)
    for stored in proto.graph.initializer:
        if stored.name in large:
            stored.CopyFrom(ir.to_proto(large[stored.name]))
    found: bytes = proto.SerializeToString()
    return found


def stored(array: Array, form: Form, means: Means) -> ir.Model:
    model = model_of(array, means.opset)
    storage.replace_weight(graph.node_named(model.graph, "layer"), 1, form, means)
    graph.remove_dead(model.graph)
    return model


def run(model: ir.Model, kind: np.dtype[np.generic], optimise: bool) -> Array:
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(message(model), options, providers=["CPUExecutionProvider"])
    found: Array = session.run(None, {"x": np.ones(1, kind)})[0]
    return found


def same(found: Array | None, wanted: Array) -> None:
    assert found is not None
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert found.tobytes() == wanted.tobytes()


def check(array: Array, form: Form | None, means: Means) -> ir.Model:
    """Assert that a form gives back every bit: seen through, and run both ways, checked and decoded by its own ops."""
    assert form is not None
    model = stored(array, form, means)
    weight = graph.node_named(model.graph, "layer").inputs[1]
    same(graph.constant(weight), array)
    assert {node.op_type for node in model.graph} - {"Mul"} <= form.ops
    assert storage.is_lossless(weight) or isinstance(form, Sparse)
    assert onnx_io.check(model) == ""
    for optimise in (False, True):
        same(run(model, array.dtype, optimise), array)
    return model


def few(k: int, shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> Array:
    """An array of exactly k values, -0 and 0 among them where k > 2."""
    rng = np.random.default_rng(seed)
    levels = np.array([*(rng.permutation(4 * k)[: max(k - 2, 2)] - 2 * k + 0.5) / 64, 0.0, -0.0], dtype)
    code = rng.permutation(np.arange(math.prod(shape)) % k)
    found: Array = levels[code if k <= 2 else -1 - code].reshape(shape)
    return found


# ---------------------------------------------------------------------------------------------- every bit


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_into_one_table(bits: int, opset: int) -> None:
    means = Means(opset)
    for k, shape in ((2**bits, (16, 24)), (2 ** (bits - 1) + 1, (7, 41))):
        array = few(k, shape)
        form = storage.codebook(array, means)
        assert isinstance(form, Codebook)
        assert form.bits == bits
        check(array, form, means)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_codes_of_any_float_type(dtype: str, bits: int) -> None:
    for opset in (13, 21):
        array = few(2**bits, (9, 57), dtype)
        check(array, storage.codebook(array, Means(opset)), Means(opset))


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_codes_of_any_number(count: int, bits: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, count)
    model = model_of(np.zeros(1, np.float32), 13)
    node = graph.node_named(model.graph, "layer")
    for to in (onnx.TensorProto.INT32, onnx.TensorProto.INT64):
        place = decoding.Place(node, Means(13))
        value = decoding.unpacked(place, codes, bits, (count,), to)
        found = graph.constant(value)
        assert found is not None
        assert found.dtype == (np.int32 if to == onnx.TensorProto.INT32 else np.int64)
        assert found.tolist() == codes.tolist()
    assert decoding.pack(codes, bits).size == decoding.packed_bytes(count, bits)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("count", "size"), [(2, 4), (16, 3), (100, 6), (256, 2)])
def test_codes_of_blocks(count: int, size: int, turned: bool, opset: int) -> None:
    rng = np.random.default_rng(0)
    table = rng.permutation(count * size).reshape(count, size).astype(np.float32) - 0.5
    rows = table[rng.permutation(np.arange(40 * 12) % count).reshape(40, 12)].reshape(40, -1)
    array = np.ascontiguousarray(rows.T) if turned else rows
    form = storage.blocks(array, Means(opset), size, turned)
    assert isinstance(form, Blocks)
    assert form.vectors.shape == (count, size)
    model = check(array, form, Means(opset))
    grown = len(message(model)) - len(message(stored(array, Plain(array), Means(opset)))) + array.nbytes
    assert grown == pytest.approx(form.nbytes, rel=0.125, abs=130)  # beside the weight that it stands for


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("count", "gap"), [(1, 9), (5, 40), (40, 90), (3, 9000)])
def test_values_of_their_own_among_codes(count: int, gap: int, dtype: str, opset: int) -> None:
    array = few(8, (count * gap // 7 + 30, 7), dtype)
    flat = array.ravel()
    flat[3 + gap * np.arange(count)] = 1000 + np.arange(count)
    form = storage.outliers(array, Means(opset), 8)
    assert isinstance(form, Outliers)
    assert form.where.tolist() == (3 + gap * np.arange(count)).tolist()
    model = check(array, form, Means(opset))
    grown = len(message(model)) - len(message(stored(array, Plain(array), Means(opset)))) + array.nbytes
    assert grown == pytest.approx(form.nbytes, rel=0.125, abs=200)


def test_without_values_of_their_own_there_are_no_outliers() -> None:
    assert storage.outliers(few(8, (9, 9)), Means(21), 8) is None


def test_too_many_blocks_have_no_codes() -> None:
    assert storage.blocks(np.arange(257 * 2, dtype=np.float32).reshape(257, 2), Means(21), 2) is None


PARTS = [
    ((6, 4, 3, 3), Sliced(6, 36, 1)),  # output channels of a convolution
    ((10, 33), Sliced(1, 10, 33)),  # of a dense layer, stored [i, o]
    ((33, 12), Sliced(33 * 3, 4, 1)),  # blocks of 4 columns, stored [o, i]
    ((12, 33), Sliced(3, 4, 33)),  # and stored [i, o]
]


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(("shape", "part"), PARTS)
def test_codes_into_tables_of_slices(shape: tuple[int, ...], part: Sliced, opset: int) -> None:
    rng = np.random.default_rng(0)
    tables = rng.standard_normal((part.a, 3, part.c)).astype(np.float32)
    tables[0, 0, 0], tables[-1, 1, -1] = -0.0, 0.0
    codes = rng.integers(0, 3, part.shape)
    array = np.take_along_axis(tables, codes, 1).reshape(shape)
    form = storage.codebook(array, Means(opset), part)
    assert isinstance(form, Codebook)
    assert form.levels.shape == (part.a, len(form.levels[0]), part.c)
    check(array, form, Means(opset))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_codes_into_tables_of_any_width(bits: int, dtype: str) -> None:
    rng = np.random.default_rng(1)
    tables = rng.standard_normal((3, 2**bits)).astype(dtype)
    array = np.stack([row[rng.permutation(np.arange(600) % 2**bits)] for row in tables])
    for opset in (11, 21):
        form = storage.codebook(array, Means(opset), Sliced(3, 600, 1))
        assert isinstance(form, Codebook)
        assert form.bits == bits
        check(array, form, Means(opset))


def test_levels_that_are_halves_are_stored_as_halves() -> None:
    rng = np.random.default_rng(0)
    array = np.stack([row[rng.integers(0, 16, 200)] for row in rng.standard_normal((8, 16)).astype(np.float16)])
    exact = storage.codebook(array.astype(np.float32), Means(13), Sliced(8, 200, 1))
    model = check(array.astype(np.float32), exact, Means(13))
    assert {v.dtype for v in model.graph.initializers.values()} >= {ir.DataType.FLOAT16}
    other = storage.codebook(array.astype(np.float32) * np.float32(1.1), Means(13), Sliced(8, 200, 1))
    model = check(array.astype(np.float32) * np.float32(1.1), other, Means(13))
    assert ir.DataType.FLOAT16 not in {v.dtype for v in model.graph.initializers.values()}


def test_minus_zero_is_a_half_too() -> None:
    levels = np.arange(64, dtype=np.float32).reshape(1, 64, 1)
    levels[0, 0] = -0.0
    half, halved = forms._half(levels)
    assert halved
    assert half.dtype == np.float16
    assert np.signbit(half[0, 0, 0])


@pytest.mark.parametrize("k", [257, 300])
def test_too_many_values_have_no_table(k: int) -> None:
    array = few(k, (30, 20))
    assert storage.codebook(array, Means(13)) is None
    assert storage.codebook(array, Means(13), Sliced(1, 600, 1)) is None
    assert storage.codebook(array, Means(13), Sliced(30, 20, 1)) is not None
    assert storage.codebook(few(256, (30, 20)), Means(13)) is not None


def test_integers_have_no_table() -> None:
    assert storage.codebook(np.arange(9), Means(13)) is None


def grid(bits: int, part: Sliced, shape: tuple[int, ...], means: Means, dtype: str = "float32") -> tuple[Array, Grid]:
    rng = np.random.default_rng(bits)
    pattern = (np.arange(2**bits) - 2 ** (bits - 1)).astype(dtype)
    codes = rng.integers(0, 2**bits, part.shape)
    scale = rng.uniform(0.01, 1, (part.a, 1, part.c)).astype(dtype)
    return (pattern[codes] * scale).reshape(shape), Grid(codes, pattern, scale, shape, means)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, 16])
def test_integers_and_scales(bits: int, opset: int) -> None:
    for shape, part in PARTS[:2]:
        array, form = grid(bits, part, shape, Means(opset))
        model = check(array, form, Means(opset))
        kinds = {value.dtype for value in model.graph.initializers.values()}
        if bits in (8, 16):
            assert {8: ir.DataType.INT8, 16: ir.DataType.INT16}[bits] in kinds
        assert (ir.DataType.INT4 in kinds) is (bits == 4 and opset >= 21)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_integers_and_scales_of_other_float_types(dtype: str) -> None:
    for bits in (3, 4, 8):
        check(*grid(bits, PARTS[0][1], PARTS[0][0], Means(21), dtype), Means(21))


def test_a_pattern_may_be_any() -> None:
    pattern = np.array([-1.0, -0.5, 0.0, 0.5, 1.0], np.float32)
    codes = np.random.default_rng(0).integers(0, 5, (4, 30, 1))
    scale = np.array([0.3, 1.0, 7.0, 0.01], np.float32).reshape(4, 1, 1)
    check((pattern[codes] * scale).reshape(4, 30), Grid(codes, pattern, scale, (4, 30), Means(13)), Means(13))


def sparse_of(shape: tuple[int, ...], share: float, dtype: str = "float32", k: int = 0) -> Array:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape) if not k else rng.standard_normal(k)[rng.integers(0, k, shape)]
    return np.where(rng.random(shape) < share, values, 0.0).astype(dtype)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("shape", [(8, 8), (7, 11), (5, 3, 3, 3)])
@pytest.mark.parametrize("k", [0, 6])
def test_a_mask_and_what_is_not_zero(shape: tuple[int, ...], k: int, opset: int) -> None:
    array = sparse_of(shape, 0.3, k=k)
    array.flat[3] = -0.0
    form = storage.bitmask(array, Means(opset))
    assert isinstance(form, Bitmask)
    assert form.mask.flat[3]
    check(array, form, Means(opset))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_mask_of_any_float_type(dtype: str) -> None:
    for share in (0.05, 0.9):
        array = sparse_of((9, 21), share, dtype)
        check(array, storage.bitmask(array, Means(13)), Means(13))


def test_a_weight_without_zeros_has_no_mask() -> None:
    assert storage.bitmask(np.full((4, 4), -0.0, np.float32), Means(13)) is None
    assert storage.bitmask(np.zeros((4, 4), np.float32), Means(13)) is not None


@pytest.mark.parametrize("opset", OPSETS)
def test_indices_and_values(opset: int) -> None:
    array = sparse_of((6, 5, 3), 0.1)
    model = check(array, storage.sparse(array), Means(opset))
    assert len(onnx.ModelProto.FromString(message(model)).graph.sparse_initializer) == 1


def test_what_a_sparse_initializer_would_lose_has_none() -> None:
    array = sparse_of((6, 5), 0.3)
    array.flat[np.flatnonzero(array == 0)[0]] = -0.0
    assert storage.sparse(array) is None
    assert storage.sparse(np.zeros((6, 5), np.float32)) is None
    assert storage.sparse(sparse_of((6, 5), 0.3, "float16")) is None


def test_one_value_everywhere() -> None:
    array = np.full((9, 9), 0.3, np.float32)
    check(array, storage.codebook(array, Means(13)), Means(13))
    zeros = np.zeros((9, 9), np.float32)
    check(zeros, storage.bitmask(zeros, Means(13)), Means(13))


def test_several_weights_share_what_decodes_them() -> None:
    net = Net(0)
    x = net.input("x", [1])
    arrays = [few(8, (8, 24), seed=seed) for seed in range(3)]
    for index, array in enumerate(arrays):
        x = net.node("Mul", x, net.constant(array, f"w{index}"), name=f"layer{index}")
    model = net.model(x)
    for index, array in enumerate(arrays):
        form = storage.codebook(array, Means(18))
        assert form is not None
        storage.replace_weight(graph.node_named(model.graph, f"layer{index}"), 1, form, Means(18))
    for index, array in enumerate(arrays):
        same(graph.constant(graph.node_named(model.graph, f"layer{index}").inputs[1]), array)
    assert len([name for name in model.graph.initializers if name.startswith("shifts")]) == 1


def test_a_name_that_is_taken_by_something_else_is_left_alone() -> None:
    net = Net(0)
    x, array = net.input("x", [1]), few(8, (8, 24))
    other = net.constant(np.array([9.0], np.float32), "shifts")
    model = net.model(net.node("Mul", net.node("Mul", x, other), net.constant(array, "w"), name="layer"))
    form = storage.codebook(array, Means(18))
    assert form is not None
    storage.replace_weight(graph.node_named(model.graph, "layer"), 1, form, Means(18))
    same(graph.constant(graph.node_named(model.graph, "layer").inputs[1]), array)
    assert graph.constant(other) == 9.0


def test_a_weight_that_others_read_too_stays_for_them() -> None:
    net = Net(0)
    x, array = net.input("x", [1]), few(8, (8, 24))
    w = net.constant(array, "w")
    model = net.model(net.node("Mul", x, w, name="layer"), net.node("Neg", w))
    form = storage.codebook(array, Means(18))
    assert form is not None
    found = storage.replace_weight(graph.node_named(model.graph, "layer"), 1, form, Means(18))
    assert "w" in model.graph.initializers
    assert found.name != "w"
    same(graph.constant(found), array)


# ---------------------------------------------------------------------------------------------- the smallest


def cases() -> list[tuple[Array, list[Sliced]]]:
    found: list[tuple[Array, list[Sliced]]] = [
        (few(k, (n // 8, 8)), []) for k, n in itertools.product((2, 5, 16, 100), (128, 512, 4096))
    ]
    found += [
        (sparse_of((n // 8, 8), share, k=k), []) for n, share, k in itertools.product((512, 4096), (0.02, 0.3), (0, 4))
    ]
    rng = np.random.default_rng(0)
    for n, k in itertools.product((100, 800), (2, 6)):
        rows = np.stack([row[rng.integers(0, k, n)] for row in rng.standard_normal((12, k)).astype(np.float32)])
        found.append((rows, [Sliced(12, n, 1)]))
    return found + [(rng.standard_normal((16, 16)).astype(np.float32), [Sliced(16, 16, 1)])]


def added(array: Array, form: Form, means: Means) -> int:
    """The bytes that a form adds to the file: of the model with it, without what the plain weight takes."""
    plain = model_of(array, means.opset)
    held = plain.graph.initializers["weight"].const_value
    assert held is not None
    return len(message(stored(array, form, means))) - (len(message(plain)) - len(ir.to_proto(held).SerializeToString()))


def forms_of(array: Array, parts: Sequence[Sliced], means: Means) -> list[Form]:
    tables = [storage.codebook(array, means, part) for part in (None, *parts)]
    every: list[Form | None] = [Plain(array), *tables, storage.bitmask(array, means), storage.sparse(array)]
    return [form for form in every if form is not None]


@pytest.mark.parametrize("opset", [13, 21])
def test_a_form_of_hundreds_of_weights_says_nearly_what_it_adds_to_the_file(opset: int) -> None:
    means = Means(opset)
    for array, parts in cases():
        if array.size < 400:
            continue
        for form in forms_of(array, parts, means):
            assert form.nbytes == pytest.approx(added(array, form, means), rel=0.15, abs=TINY), form.name
    for bits, (shape, part) in itertools.product((3, 4, 8, 16), PARTS[:1]):
        array, integers = grid(bits, part, shape, means)
        assert integers.nbytes == pytest.approx(added(array, integers, means), rel=0.15, abs=TINY), integers.name


@pytest.mark.parametrize("opset", [13, 21])
def test_the_smallest_form_makes_the_smallest_file_or_nearly(opset: int) -> None:
    means = Means(opset)
    chosen = set()
    for array, parts in cases():
        form = storage.smallest(array, means, parts)
        chosen.add(type(form))
        least = min(added(array, other, means) for other in forms_of(array, parts, means))
        assert added(array, form, means) <= 1.1 * least, (form.name, array.shape)
    assert chosen == {Plain, Codebook, Bitmask, Sparse}


def test_other_forms_are_weighed_too() -> None:
    array, integers = grid(8, PARTS[0][1], PARTS[0][0], Means(13))
    assert storage.smallest(array, Means(13), [], [integers]) is integers
    assert isinstance(storage.smallest(array, Means(13)), Plain | Codebook)


@pytest.mark.parametrize("op", ["BitShift", "Mod", "Gather", "Reshape"])
def test_targets_without_the_ops_get_what_they_can_run(op: str) -> None:
    array = few(4, (32, 32))
    means = Means(13, lambda other: other != op)
    assert isinstance(storage.smallest(array, means), Plain)
    assert isinstance(storage.smallest(array, Means(13)), Codebook)
    assert isinstance(storage.smallest(sparse_of((64, 64), 0.02), means), Sparse)  # which needs none


def test_codes_of_four_bits_need_no_shifts_where_the_target_has_them() -> None:
    array, lacks = few(16, (32, 32)), ("BitShift", "Mod", "Reshape", "Slice")
    assert isinstance(storage.smallest(array, Means(21, lambda op: op not in lacks)), Codebook)
    assert isinstance(storage.smallest(array, Means(21, lambda op: op not in lacks, native=False)), Plain)
    assert isinstance(storage.smallest(array, Means(18, lambda op: op not in lacks)), Plain)


def test_old_opsets_and_other_types_stay_plain() -> None:
    array = few(4, (32, 32))
    assert isinstance(storage.smallest(array, Means(10)), Plain)
    assert isinstance(storage.smallest(array.astype(np.int32), Means(13)), Plain)


def test_stored_bytes_are_of_all_that_a_value_is_made_of() -> None:
    array, means = few(4, (32, 32)), Means(13)
    form = storage.codebook(array, means)
    assert form is not None
    model = stored(array, form, means)
    weight = graph.node_named(model.graph, "layer").inputs[1]
    held = [graph.constant(value) for value in model.graph.initializers.values()]
    assert storage.stored_bytes(weight) == sum(each.nbytes for each in held if each is not None)
    assert storage.stored_bytes(model_of(array, 13).graph.initializers["weight"]) == array.nbytes
    assert storage.stored_bytes(model.graph.inputs[0]) == 0
