"""A model file as a run of bytes with its large tensors cut out, wherever they stand, and nothing else changed.

The rest, with the tensors' own headers, is kept byte for byte: pasted together again, the file is the same. External
data takes the place in the file that its bytes would have had; the fields that pointed to it are dropped.
Source: onnx.proto (field numbers); Protocol Buffers encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from ccompile.wire import RAW_DATA, Buffer, encode_varint, fields, header

# Message -> the fields that lead to tensors, and their messages.
INSIDE = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
}
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL_DATA, _DATA_LOCATION = 1, 2, 8, 13, 14
# The fields of a tensor that hold its elements as they are, and their bits; varints are as good as bytes.
_ELEMENTS = {RAW_DATA: 0, 4: 32, 10: 64, 5: 8, 7: 8, 11: 8}
_BYTES = 2  # the wire type of all these fields
_DEPTH = 100  # of messages in each other, as protobuf limits it
LEAST = 256  # bytes: smaller tensors stay in the rest


@dataclass(frozen=True)
class Cut:
    """The bytes of a tensor. shape: as declared; width: bits of an element, 8 where it is not known."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    width: int
    is_float: bool
    data: Buffer


Piece = Buffer | bytes | Cut
External = Callable[[onnx.TensorProto], Buffer]


def cut(model: Buffer, external: External, least: int = LEAST) -> list[Piece]:
    """Return the file in order: bytes to keep, and the tensors of at least `least` bytes.

    external: gives the bytes that a tensor keeps elsewhere.
    Raises ValueError or IndexError when the bytes are not a model.
    """
    return _Cutter(external, least).message(model, "ModelProto", 0)


def refuse_external(tensor: onnx.TensorProto) -> Buffer:
    """Raise ValueError: the tensor keeps its bytes in another file."""
    raise ValueError(f"tensor `{tensor.name}` points to external data")


def size_of(piece: Piece) -> int:
    """Return the bytes of a piece."""
    return len(piece.data if isinstance(piece, Cut) else piece)


class _Cutter:
    def __init__(self, external: External, least: int) -> None:
        self.external = external
        self.least = least

    def message(self, message: Buffer, kind: str, depth: int) -> list[Piece]:
        """Return the pieces of a message."""
        if kind == "TensorProto":
            return self.tensor(message)
        if depth > _DEPTH:
            raise ValueError(f"messages nested more than {_DEPTH} deep")
        pieces: list[Piece] = []
        for field, start, payload, end in fields(message):
            inner = INSIDE[kind].get(field)
            if inner is None or message[start] & 7 != _BYTES:
                pieces.append(message[start:end])
                continue
            parts = self.message(message[payload:end], inner, depth + 1)
            size = sum(map(size_of, parts))
            pieces.append(message[start:payload] if size == end - payload else header(field, size))
            pieces += parts
        return _joined(pieces)

    def tensor(self, message: Buffer) -> list[Piece]:
        """Return the pieces of a tensor, external data in its place."""
        found = list(fields(message))
        known = {field for field, *_ in found} & {_DIMS, _DATA_TYPE, _NAME, _DATA_LOCATION}
        largest = max((end - payload for field, _, payload, end in found if field in _ELEMENTS), default=0)
        if _DATA_LOCATION not in known and largest < self.least:
            return [message]
        kept = b"".join(message[start:end] for field, start, _, end in found if field not in _ELEMENTS)
        about = onnx.TensorProto.FromString(kept)
        if about.data_location != onnx.TensorProto.EXTERNAL:
            return _joined([piece for place in found for piece in self._field(message, place, about)])
        data = self.external(about)
        away = (_EXTERNAL_DATA, _DATA_LOCATION, RAW_DATA)
        rest: list[Piece] = [message[start:end] for field, start, _, end in found if field not in away]
        whole = _cut_of(about, RAW_DATA, data) if len(data) >= self.least else data
        return _joined([*rest, header(RAW_DATA, len(data)), whole])

    def _field(self, message: Buffer, place: tuple[int, int, int, int], about: onnx.TensorProto) -> Iterator[Piece]:
        field, start, payload, end = place
        data = message[payload:end]
        is_plain = bytes(message[start:payload]) == header(field, len(data))  # not if its length is oddly written
        if field in _ELEMENTS and len(data) >= self.least and is_plain:
            yield message[start:payload]
            yield _cut_of(about, field, data)
        else:
            yield message[start:end]


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces, neighbours that are kept as one."""
    found: list[Piece] = []
    kept: list[Buffer | bytes] = []
    for piece in pieces:
        if not isinstance(piece, Cut):
            kept.append(piece)
            continue
        found += [b"".join(kept), piece]
        kept = []
    return [*found, b"".join(kept)] if kept else found


def _cut_of(about: onnx.TensorProto, field: int, data: Buffer) -> Cut:
    known = about.data_type in ir.DataType.__members__.values() and about.data_type != onnx.TensorProto.STRING
    dtype = ir.DataType(about.data_type) if known else ir.DataType.UNDEFINED
    width = _ELEMENTS[field] or (dtype.bitwidth if known and about.data_type else 8)
    fits = width in (1, 2, 4, 8, 16, 32, 64)
    is_float = known and bool(about.data_type) and dtype.is_floating_point()
    return Cut(about.name, dtype.name, tuple(about.dims), width if fits else 8, is_float, data)


def announces(before: bytes, size: int) -> bool:
    """Return whether the bytes before a tensor end with its size."""
    return before.endswith(encode_varint(size))
