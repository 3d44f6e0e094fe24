"""What counts as a weight, what as a codebook, and how symbols are counted."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from ccompile.accounting import account_of, codebooks, symbols_of, weights_in
from ccompile.numerics.huffman import average_length, entropy
from ccompile.splice import Cut

W = np.arange(600, dtype=np.float32).reshape(20, 30)


def tensor(name: str, kind: type = np.float32) -> TensorProto:
    return numpy_helper.from_array(W.astype(kind), name)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [(np.float32, 600), (np.float16, 600), (np.float64, 600), (np.int8, 600), (np.uint8, 600)]
    + [(np.int64, 0), (np.int32, 0), (np.bool_, 0)],
)
def test_floats_and_short_integers_are_weights(kind: type, weights: int) -> None:
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor("w", kind)]))
    assert weights_in(model) == weights


def test_weights_are_counted_wherever_they_stand() -> None:
    deep = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor(""))], "deep", [], [])
    branch = helper.make_graph([helper.make_node("If", ["a"], ["b"], then_branch=deep)], "b", [], [], [tensor("w")])
    main = helper.make_graph([helper.make_node("If", ["a"], ["b"], then_branch=branch)], "g", [], [], [tensor("v")])
    values = numpy_helper.from_array(np.ones(5, np.float32), "s")
    main.sparse_initializer.append(helper.make_sparse_tensor(values, numpy_helper.from_array(np.arange(5), "i"), [100]))
    model = helper.make_model(main)
    inside = helper.make_node("Constant", [], ["o"], value=tensor(""))
    model.functions.append(helper.make_function("d", "F", [], ["o"], [inside], []))
    assert weights_in(model) == 4 * 600 + 100


def test_codebooks_are_found_behind_casts_and_reshapes() -> None:
    nodes = [
        helper.make_node("Reshape", ["indices", "shape"], ["r"]),
        helper.make_node("Cast", ["r"], ["c"], to=TensorProto.INT64),
        helper.make_node("Gather", ["book", "c"], ["w"]),
        helper.make_node("Gather", ["x", "c"], ["other"]),
    ]
    stored = [tensor("indices", np.uint8), tensor("book"), numpy_helper.from_array(np.array([600]), "shape")]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], stored))
    assert codebooks(model) == {"indices": frozenset({"book"})}
    assert weights_in(model) == 600


def test_symbols_are_counted_at_their_width() -> None:
    data = np.array([0x10, 0x00, 0x02], np.uint8)
    found = symbols_of(data, 4, 5)  # 0 1 0 0 2; the last nibble is not an element
    assert found is not None
    counts = np.array([3, 1, 1])
    assert found[:4] == (3, 0.6, entropy(counts), average_length(counts))
    assert found.relative == 2  # two entries of 5 + 1 bits


def test_too_many_values_are_no_symbols() -> None:
    halves = np.arange(100, dtype=np.float16)
    assert symbols_of(halves.view(np.uint8), 16, 100) is None
    assert symbols_of(np.tile(halves[:50], 2).view(np.uint8), 16, 100) is not None
    assert symbols_of(np.zeros(0, np.uint8), 8, 0) is None


@pytest.mark.parametrize("shape", [(-1, 5), (1 << 40,), (0,)])
def test_a_shape_that_lies_is_not_believed(shape: tuple[int, ...]) -> None:
    made = account_of(Cut("w", "UINT8", shape, 8, False, memoryview(bytes(300))), 10, "", 0)
    assert made.elements == (0 if shape == (0,) else 300)


def test_few_floats_have_a_codebook_of_their_own() -> None:
    data = np.tile(np.array([1, 2, 4], np.float32), 100)
    made = account_of(Cut("w", "FLOAT", (300,), 32, True, data.view(np.uint8).data), 10, "", 0)
    assert (made.bytes_codebook, made.bytes_index) == (12, 75)
