"""ONNX files, read and written as streams: large weights never pass through protobuf.

Protobuf copies every byte field on the way in and out and refuses messages over 2 GiB. Here the reader walks the wire
format once, takes the `raw_data` of big initializers as views of the file's one buffer, and parses the small rest; the
writer emits the small rest and then each weight behind its own header. Weights are therefore held once.

Wire format: a message is a run of (tag, payload), tag = field << 3 | type, varint-encoded; type 2 is length-delimited.
Source: Protocol Buffers encoding; onnx.proto (ModelProto.graph 7, GraphProto.initializer 5, TensorProto.raw_data 9).
"""

from __future__ import annotations

import contextlib
import glob
import math
import os
import platform
import re
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import Message  # type: ignore[import-untyped]

from ccompile.errors import CcompileError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ccompile.core import Array

Buffer = memoryview
LARGE = 1024  # bytes: smaller weights stay inside the protobuf message, where shape inference sees their values
MESSAGE_LIMIT = 2**31 - 2**20  # bytes: protobuf's limit, less room for the rest of the message
_ALIGN = 4096  # external data offsets: a page, so that runtimes can map them
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PLAIN = frozenset(
    getattr(ir.DataType, name)
    for name in "BOOL INT8 INT16 INT32 INT64 UINT8 UINT16 UINT32 UINT64 FLOAT16 FLOAT DOUBLE".split()
)
assert sys.byteorder == "little", "ONNX stores little-endian weights; this machine is big-endian"


def is_detachable(tensor: ir.TensorProtocol | None) -> bool:
    """Return whether a weight is large and of a plain numpy dtype, so that it can live outside the message."""
    return tensor is not None and tensor.dtype in _PLAIN and tensor.nbytes >= LARGE


def _varint(buffer: Buffer, at: int) -> tuple[int, int]:
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


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _header(field: int, length: int) -> bytes:
    return _encode_varint(field << 3 | _BYTES) + _encode_varint(length)


def _fields(buffer: Buffer) -> Iterator[tuple[int, int, int, int]]:
    """Yield (field, start of the tag, start of the payload, end) for each field of a message; end <= len(buffer)."""
    at, size = 0, len(buffer)
    while at < size:
        start = at
        tag, at = _varint(buffer, at)
        kind = tag & 7
        if kind == _BYTES:
            length, at = _varint(buffer, at)
        elif kind == _VARINT:
            length = _varint(buffer, at)[1] - at
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
    for field, start, payload, end in _fields(buffer):
        if field == _RAW_DATA and end - payload >= LARGE:
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
    for field, start, payload, end in _fields(buffer):
        if field != _GRAPH:
            rest.append(buffer[start:end])
            continue
        message = buffer[payload:end]
        for inner, begin, content, stop in _fields(message):
            if inner != _INITIALIZER:
                graph.append(message[begin:stop])
                continue
            tensor, raw = _split_tensor(message[content:stop])
            if raw is not None:
                weights[index] = raw
            index += 1
            graph += [_header(_INITIALIZER, len(tensor)), tensor]
    body = b"".join(graph)
    return b"".join([*rest, _header(_GRAPH, len(body)), body]), weights


def read(path: Path) -> tuple[onnx.ModelProto, dict[str, Array], list[Buffer]]:
    """Return the model without its large weights, those by initializer name (read-only views), and all bytes read.

    The bytes are the file's, then those of its external data in order of appearance; the views look into them.

    Raises ModelError when the file is not an ONNX model, or its external data is missing, short or outside its folder.
    """
    where = str(path)
    try:
        buffer = memoryview(path.read_bytes())
    except OSError as error:
        raise ModelError(f"cannot read the model: {error.strerror}", where, "Is the path right?") from error
    if not buffer:
        raise ModelError("the file is empty", where, "An ONNX model was expected.")
    proto, views = _parsed(buffer, path)
    weights, everything = {}, [buffer]
    for index, tensor in enumerate(proto.graph.initializer):
        raw = views.get(index)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raw = _external(tensor, path)
            everything.append(raw)
        dtype = _known_dtype(tensor, where)
        if raw is not None or tensor.HasField("raw_data"):
            _check_size(tensor, dtype, tensor.raw_data if raw is None else raw, where)
        if raw is None:
            continue
        if dtype in _PLAIN:
            weights[tensor.name] = _as_array(tensor, dtype, raw)
        else:
            _embed(tensor, raw)
    for tensor in _other_tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            everything.append(_external(tensor, path))
            _embed(tensor, everything[-1])
    return proto, weights, everything


def _parsed(buffer: Buffer, path: Path) -> tuple[onnx.ModelProto, dict[int, Buffer]]:
    """Return what `split` gives, the message parsed."""
    try:
        skeleton, views = split(buffer)
        proto = onnx.ModelProto.FromString(skeleton)
    except (ValueError, IndexError) as error:
        raise _not_onnx(path, error) from error
    except Exception as error:  # protobuf's DecodeError has no public, stable home across its implementations
        if type(error).__name__ != "DecodeError":
            raise
        raise _not_onnx(path, error) from error
    if (garbled := _garbled(proto)) is not None:
        raise ModelError(f"the name {garbled!r} is not UTF-8", str(path), "The file is damaged.")
    if not proto.graph.node and not proto.graph.output:
        raise ModelError("the model has no graph", str(path), "An ONNX model with nodes and outputs was expected.")
    return proto, views


def _embed(tensor: onnx.TensorProto, raw: Buffer) -> None:
    """Store a tensor's bytes in the message."""
    tensor.raw_data = bytes(raw)
    tensor.ClearField("data_location")
    tensor.ClearField("external_data")


def _garbled(message: Message) -> bytes | None:
    """Return the first text in a message that is not UTF-8: protobuf hands it out as bytes."""
    for field, value in message.ListFields():
        if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
            continue
        for part in (value,) if isinstance(value, str | bytes | Message) else value:
            found = _garbled(part) if field.type == field.TYPE_MESSAGE else part if isinstance(part, bytes) else None
            if found is not None:
                return found
    return None


def _not_onnx(path: Path, error: Exception) -> ModelError:
    said = "it ends in the middle of a field" if isinstance(error, IndexError) else str(error).partition("\n")[0]
    return ModelError(
        f"not an ONNX model: {said or type(error).__name__}",
        str(path),
        "The file is damaged, truncated, or of another format.",
    )


def _known_dtype(tensor: onnx.TensorProto, where: str) -> ir.DataType:
    known = tensor.data_type in ir.DataType.__members__.values() and tensor.data_type != ir.DataType.UNDEFINED
    if not known:
        raise ModelError(f"initializer `{tensor.name}` has the unknown data type {tensor.data_type}", where)
    return ir.DataType(tensor.data_type)


def _check_size(tensor: onnx.TensorProto, dtype: ir.DataType, raw: Buffer | bytes, where: str) -> None:
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(f"initializer `{tensor.name}` has a negative dimension {list(tensor.dims)}", where)
    expected = math.ceil(math.prod(tensor.dims) * dtype.bitwidth / 8) if dtype != ir.DataType.STRING else -1
    if expected != len(raw):
        raise ModelError(
            f"initializer `{tensor.name}` of {list(tensor.dims)} and {dtype} has {len(raw)} bytes, not {expected}",
            where,
            "The file is damaged or truncated.",
        )


def _as_array(tensor: onnx.TensorProto, dtype: ir.DataType, raw: Buffer) -> Array:
    array = np.frombuffer(raw, dtype=dtype.numpy()).reshape(tuple(tensor.dims))
    array.flags.writeable = False
    return array


def _external(tensor: onnx.TensorProto, path: Path) -> Buffer:
    """Return a read-only map of a tensor's external data, refusing what lies outside the model's folder."""
    where = f"{path}: tensor `{tensor.name}`"
    info = {entry.key: entry.value for entry in tensor.external_data}
    location = info.get("location", "")
    folder = path.resolve().parent
    target = (folder / location).resolve() if location and "\0" not in location else folder
    if not location or Path(location).is_absolute() or not target.is_relative_to(folder) or target == folder:
        raise ModelError(
            f"external data `{location}` lies outside the model's folder", where, "Keep it beside the model."
        )
    if tensor.data_type == onnx.TensorProto.STRING:
        raise ModelError("strings cannot be external data", where, "Store this tensor in the model.")
    try:
        offset = int(info.get("offset", 0))
        size = target.stat().st_size
        length = int(info.get("length", size - offset))
    except OSError as error:
        raise ModelError(
            f"external data `{location}`: {error.strerror}", where, "Copy it beside the model as well."
        ) from error
    except ValueError as error:
        raise ModelError(f"external data has a bad offset or length: {info}", where) from error
    if not target.is_file():
        raise ModelError(f"external data `{location}` is not a file", where)
    if offset < 0 or length < 0 or offset + length > size:
        raise ModelError(
            f"external data `{location}` is too short: bytes {offset} to {offset + length} of {size}",
            where,
            "The data file is truncated, or belongs to another model.",
        )
    if not length:
        return memoryview(b"")
    return memoryview(np.memmap(target, dtype=np.uint8, mode="r", offset=offset, shape=(length,)))  # type: ignore[arg-type]


def _other_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield the tensors that are not top-level initializers: attributes, subgraphs, functions."""

    def of_nodes(nodes: Iterator[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                    yield from graph.initializer
                    yield from of_nodes(iter(graph.node))

    yield from of_nodes(iter(proto.graph.node))
    for function in proto.functions:
        yield from of_nodes(iter(function.node))


def write(
    proto: onnx.ModelProto,
    weights: Mapping[str, ir.TensorProtocol],
    path: Path,
    limit: int = MESSAGE_LIMIT,
    approve: Callable[[Path], None] = lambda path: None,
) -> Path | None:
    """Write the model at `path`, whole or not at all; return the external data file when the size needs one.

    approve: sees the finished file beside `path` before it takes its name; when it raises, nothing is changed.
    proto: its external placeholders name entries of `weights`. Over protobuf's 2 GiB the weights go to a file beside
    the model whose name carries their digest, so that a crash between the two renames never mixes two builds.
    Raises CcompileError when the disk is full or the folder is not writable; then nothing is changed.
    """
    remove_stale(path)
    if proto.ByteSize() + sum(tensor.nbytes for tensor in weights.values()) <= limit:
        _whole(path, lambda out: _write_inline(proto, weights, out), approve)
        _remove_data(path, None)
        return None
    scratch = _scratch(path.with_name(path.name + ".data"))
    with _disk(path), _removed_on_failure(scratch):
        digest = _write_weights(proto, weights, scratch)
        data = path.with_name(f"{path.name}.{digest[:12]}.data")
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = data.name
        new = not data.exists()
        scratch.replace(data)
    with _removed_on_failure(data) if new else contextlib.nullcontext():
        _whole(path, lambda out: out.write(proto.SerializeToString(deterministic=True)), approve)
    _remove_data(path, data)
    return data


def _remove_data(path: Path, kept: Path | None) -> None:
    """Remove the external data of the builds before, which nothing names any more."""
    for old in path.parent.iterdir():
        if old != kept and re.fullmatch(re.escape(path.name) + r"\.[0-9a-f]{12}\.data", old.name):
            old.unlink()


def _write_inline(proto: onnx.ModelProto, weights: Mapping[str, ir.TensorProtocol], out: IO[bytes]) -> None:
    shell = onnx.ModelProto()
    shell.CopyFrom(proto)
    del shell.graph.initializer[:]
    graph = shell.graph.SerializeToString(deterministic=True)
    shell.ClearField("graph")
    pieces: list[tuple[bytes, ir.TensorProtocol | None]] = []
    size = len(graph)
    for tensor in proto.graph.initializer:  # in their order
        weight = weights[tensor.name] if tensor.data_location == onnx.TensorProto.EXTERNAL else None
        if weight is None:
            head, length = tensor.SerializeToString(deterministic=True), 0
        else:
            bare = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            length = weight.nbytes
            head = bare.SerializeToString(deterministic=True) + _header(_RAW_DATA, length)
        head = _header(_INITIALIZER, len(head) + length) + head
        pieces.append((head, weight))
        size += len(head) + length
    out.write(shell.SerializeToString(deterministic=True))
    out.write(_header(_GRAPH, size))
    out.write(graph)
    for head, weight in pieces:
        out.write(head)
        if weight is not None:
            out.write(_bytes_of(weight))


def _bytes_of(tensor: ir.TensorProtocol) -> memoryview:
    array = np.ascontiguousarray(tensor.numpy())
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def _write_weights(proto: onnx.ModelProto, weights: Mapping[str, ir.TensorProtocol], path: Path) -> str:
    """Write the weights page-aligned, point the placeholders at them, and return the SHA-256 of the file."""
    import hashlib

    digest = hashlib.sha256()
    with path.open("wb") as out:
        at = 0
        for tensor in proto.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            padding = b"\0" * (-at % _ALIGN)
            content = _bytes_of(weights[tensor.name])
            for piece in (padding, content):
                out.write(piece)
                digest.update(piece)
            del tensor.external_data[:]
            for key, value in (("location", ""), ("offset", at + len(padding)), ("length", len(content))):
                tensor.external_data.add(key=key, value=str(value))
            at += len(padding) + len(content)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def probe(path: Path) -> None:
    """Raise CcompileError when a file cannot be put at `path`: not a regular file, or the folder is not writable."""
    _refuse_special(path)
    scratch = _scratch(path)
    with _disk(path), _removed_on_failure(scratch):
        scratch.open("wb").close()
        scratch.unlink()


def _refuse_special(path: Path) -> None:
    """Refuse to replace a device, a pipe or a folder by a file (`-o /dev/null` as root would)."""
    if path.exists() and not path.is_file():
        raise CcompileError("it is there already and is no regular file", str(path), "Name another file.")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; raises CcompileError when the disk refuses."""
    _whole(path, lambda out: out.write(text.encode()))


def _scratch(path: Path) -> Path:
    return path.with_name(f".{path.name}.{_machine()}-{os.getpid()}.ccompile-tmp")


def _machine() -> str:
    """Return the machine's or container's name: process numbers mean nothing on another one."""
    return platform.node().replace(".", "_").replace("-", "_")


def remove_stale(path: Path) -> None:
    """Remove what killed runs left beside `path`; files of live processes stay."""
    for left in path.parent.glob(f".{glob.escape(path.name)}*.ccompile-tmp"):
        machine, _, pid = left.name.split(".")[-2].rpartition("-")
        alive = not Path("/proc").exists() or Path(f"/proc/{pid}").exists()
        if machine == _machine() and pid.isdigit() and not alive:
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CcompileError(
            f"cannot write: {error.strerror}", str(path), "Nothing was changed. Is there space, and permission?"
        ) from error


def _whole(
    path: Path, fill: Callable[[IO[bytes]], object], approve: Callable[[Path], None] = lambda path: None
) -> None:
    """Fill a scratch file beside `path`, flush it to the disk, and rename it over `path`."""
    _refuse_special(path)
    scratch = _scratch(path)
    with _disk(path), _removed_on_failure(scratch):
        with scratch.open("wb") as out:
            fill(out)
            out.flush()
            os.fsync(out.fileno())
        approve(scratch)
        scratch.replace(path)
