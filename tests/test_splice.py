"""Model files with their tensors cut out and pasted in again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import ZOO
from onnx import TensorProto, helper, numpy_helper

from ccompile.splice import INSIDE, Cut, announces, cut, refuse_external, size_of
from ccompile.wire import header

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor  # type: ignore[import-untyped]

    from ccompile.splice import Piece
    from ccompile.wire import Buffer

W = np.arange(600, dtype=np.float32).reshape(20, 30)


def pasted(pieces: list[Piece]) -> bytes:
    return b"".join(piece.data if isinstance(piece, Cut) else piece for piece in pieces)


def cuts(proto: onnx.ModelProto) -> list[Cut]:
    """Cut, assert that pasting gives the file back, and return the tensors."""
    data = proto.SerializeToString()
    pieces = cut(memoryview(data), refuse_external)
    assert pasted(pieces) == data
    return [piece for piece in pieces if isinstance(piece, Cut)]


def model(*nodes: onnx.NodeProto, initializers: tuple[TensorProto, ...] = ()) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph(nodes, "g", [], [], initializers))


def tensor(name: str) -> TensorProto:
    return numpy_helper.from_array(W, name)


def test_the_table_names_every_way_to_a_tensor() -> None:
    kinds: dict[str, Descriptor] = {}
    stack = [onnx.ModelProto.DESCRIPTOR]
    while stack:
        kind = stack.pop()
        kinds[kind.name] = kind
        inner = [field.message_type for field in kind.fields if field.message_type is not None]
        stack += [below for below in inner if below.name not in kinds]
    leads, before = {"TensorProto"}, 0
    while len(leads) > before:
        before = len(leads)
        for name, kind in kinds.items():
            leads |= {name} if any(f.message_type and f.message_type.name in leads for f in kind.fields) else set()
    ways = {
        name: {
            f.number: f.message_type.name for f in kinds[name].fields if f.message_type and f.message_type.name in leads
        }
        for name in leads - {"TensorProto"}
    }
    assert ways == INSIDE


@pytest.mark.parametrize("name", ZOO)
def test_a_model_is_pasted_together_again(name: str) -> None:
    cuts(ir.to_proto(ZOO[name](0)))


def test_tensors_are_found_in_subgraphs_attributes_and_functions() -> None:
    inner = helper.make_graph([helper.make_node("Constant", [], ["y"], value=tensor("deep"))], "b", [], [])
    inner.initializer.append(tensor("branch"))
    nodes = [helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)]
    nodes.append(helper.make_node("Custom", [], ["t"], domain="d", several=[tensor("one"), tensor("two")]))
    proto = model(*nodes, initializers=(tensor("w"),))
    constant = helper.make_node("Constant", [], ["o"], value=tensor("inside"))
    proto.functions.append(helper.make_function("d", "F", [], ["o"], [constant], []))
    sparse = helper.make_sparse_tensor(tensor("s"), numpy_helper.from_array(np.arange(600), "i"), [10_000])
    proto.graph.sparse_initializer.append(sparse)
    found = [found.name for found in cuts(proto)]
    assert sorted(found) == sorted(["deep", "branch"] * 2 + ["one", "two", "w", "s", "i", "inside"])


def test_a_cut_knows_what_it_is() -> None:
    nibbles = helper.make_tensor("q", TensorProto.UINT4, [30, 20], bytes(300), raw=True)
    (weight, index) = cuts(model(initializers=(tensor("w"), nibbles)))
    assert (weight.dtype, weight.shape, weight.width, weight.is_float) == ("FLOAT", (20, 30), 32, True)
    assert (index.dtype, index.shape, index.width, index.is_float) == ("UINT4", (30, 20), 4, False)
    assert bytes(weight.data) == W.tobytes()


def test_elements_in_typed_fields_are_cut_too() -> None:
    floats = helper.make_tensor("w", TensorProto.FLOAT, W.shape, W.reshape(-1).tolist())
    integers = helper.make_tensor("i", TensorProto.INT64, [600], list(range(600)))
    assert [found.width for found in cuts(model(initializers=(floats, integers)))] == [32, 8]


def test_small_tensors_stay() -> None:
    assert cuts(model(initializers=(numpy_helper.from_array(W[:2, :30], "w"),))) == []
    assert len(cuts(model(initializers=(numpy_helper.from_array(W[:3, :30], "w"),)))) == 1


def test_external_data_takes_its_place_and_all_else_of_the_tensor_stays() -> None:
    away = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=W.shape, doc_string="kept")
    away.data_location = TensorProto.EXTERNAL
    away.external_data.add(key="location", value="w.bin")
    asked: list[str] = []

    def external(about: TensorProto) -> Buffer:
        asked.append(about.external_data[0].value)
        return memoryview(W.tobytes())

    pieces = cut(memoryview(model(initializers=(away,)).SerializeToString()), external)
    assert asked == ["w.bin"]
    (found,) = onnx.ModelProto.FromString(pasted(pieces)).graph.initializer
    assert found == TensorProto(name="w", data_type=1, dims=W.shape, doc_string="kept", raw_data=W.tobytes())
    with pytest.raises(ValueError, match="`w` points to external data"):
        cut(memoryview(model(initializers=(away,)).SerializeToString()), refuse_external)


def test_a_length_that_is_oddly_written_is_left_alone() -> None:
    inside = tensor("w").SerializeToString()
    odd = inside.replace(b"\x4a\xe0\x12", b"\x4a\xe0\x92\x00")  # 2400 with a needless byte
    assert len(odd) == len(inside) + 1
    plain = model().SerializeToString()
    data = plain + b"\x3a" + bytes([len(odd) + 3 & 0x7F | 0x80, len(odd) + 3 >> 7]) + b"\x2a"
    data += bytes([len(odd) & 0x7F | 0x80, len(odd) >> 7]) + odd
    assert len(onnx.ModelProto.FromString(data).graph.initializer) == 1
    pieces = cut(memoryview(data), refuse_external)
    assert pasted(pieces) == data
    assert not any(isinstance(piece, Cut) for piece in pieces)


def test_every_cut_is_announced_before_it() -> None:
    pieces = cut(memoryview(model(initializers=(tensor("w"),)).SerializeToString()), refuse_external)
    before = bytes(pieces[0].data if isinstance(pieces[0], Cut) else pieces[0])
    assert announces(before, size_of(pieces[1]))
    assert not announces(before, size_of(pieces[1]) + 1)
    assert not announces(b"", 5)


def test_messages_nested_without_end_are_refused() -> None:
    graph = b""
    for _ in range(40):
        for field in (6, 5, 1):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            graph = header(field, len(graph)) + graph
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        cut(memoryview(header(7, len(graph)) + graph), refuse_external)


@pytest.mark.parametrize("data", [b"\x3a\xff\x01", b"\xff" * 20, b"\x3a\x04\x2a\x7f\x00\x00"])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises((ValueError, IndexError)):
        cut(memoryview(data), refuse_external)
