"""The wire format of ONNX files, as far as large weights need it: their bytes are found without parsing.

A message is a run of (tag, payload), tag = field << 3 | type, varint-encoded; type 2 is length-delimited.
Source: Protocol Buffers encoding; onnx.proto (ModelProto.graph 7, GraphProto.initializer 5, TensorProto.raw_data 9).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

Buffer = memoryview
LARGE = 1024  # bytes: smaller weights stay inside the protobuf message, where shape inference sees their values
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def varint(buffer: Buffer, at: int) -> tuple[int, int]:
    """Return the number at a place and the place behind it. Raises IndexError at the end, ValueError past 10 bytes."""
    value = shift = 0
    while True:
        byte = buffer[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a varint longer than 10 bytes")


def encode_varint(value: int) -> bytes:
    """Return a number in groups of seven bits, the low ones first.

    >>> encode_varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def header(field: int, length: int) -> bytes:
    """Return what stands before the `length` bytes of a length-delimited field."""
    return encode_varint(field << 3 | _BYTES) + encode_varint(length)


def fields(buffer: Buffer) -> Iterator[tuple[int, int, int, int]]:
    """Yield (field, start of the tag, start of the payload, end) for each field of a message; end <= len(buffer)."""
    at, size = 0, len(buffer)
    while at < size:
        start = at
        tag, at = varint(buffer, at)
        kind = tag & 7
        if kind == _BYTES:
            length, at = varint(buffer, at)
        elif kind == _VARINT:
            length = varint(buffer, at)[1] - at
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + length > size:
            raise ValueError("a field runs past the end of the file")
        yield tag >> 3, start, at, at + length
        at += length


def _split_tensor(buffer: Buffer) -> tuple[bytes, Buffer | None]:
    """Return a serialised TensorProto without its raw_data, and the raw_data when it is large."""
    raw: Buffer | None = None
    kept: list[Buffer] = []
    for field, start, payload, end in fields(buffer):
        if field == RAW_DATA and end - payload >= LARGE:
            raw = buffer[payload:end]
        else:
            kept.append(buffer[start:end])
    return b"".join(kept), raw


def split(buffer: Buffer) -> tuple[bytes, dict[int, Buffer]]:
    """Return a serialised ModelProto without the raw_data of its large initializers, and those by initializer index.

    Raises ValueError when the bytes are not a protobuf message.
    """
    rest: list[bytes | Buffer] = []
    graph: list[bytes | Buffer] = []
    weights: dict[int, Buffer] = {}
    index = 0
    for field, start, payload, end in fields(buffer):
        if field != GRAPH:
            rest.append(buffer[start:end])
            continue
        message = buffer[payload:end]
        for inner, begin, content, stop in fields(message):
            if inner != INITIALIZER:
                graph.append(message[begin:stop])
                continue
            tensor, raw = _split_tensor(message[content:stop])
            if raw is not None:
                weights[index] = raw
            index += 1
            graph += [header(INITIALIZER, len(tensor)), tensor]
    body = b"".join(graph)
    return b"".join([*rest, header(GRAPH, len(body)), body]), weights
