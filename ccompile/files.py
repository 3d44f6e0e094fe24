"""ONNX files, read and written as streams: large weights never pass through protobuf.

Protobuf copies every byte field on the way in and out and refuses messages over 2 GiB. Here the reader walks the wire
format once, takes the `raw_data` of big initializers as views of the file's one buffer, and parses the small rest; the
writer emits the small rest and then each weight behind its own header. Weights are therefore held once.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import Message  # type: ignore[import-untyped]

from ccompile.disk import remove_stale, removed_on_failure, scratch_of, write_whole, writing
from ccompile.errors import ModelError
from ccompile.wire import GRAPH, INITIALIZER, LARGE, RAW_DATA, Buffer, header, split

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ccompile.core import Array

Approve = Callable[[Path, Path | None], object]
MESSAGE_LIMIT = 2**31 - 2**20  # bytes: protobuf's limit, less room for the rest of the message
_ALIGN = 4096  # external data offsets: a page, so that runtimes can map them
_PLAIN = frozenset(
    getattr(ir.DataType, name)
    for name in "BOOL INT8 INT16 INT32 INT64 UINT8 UINT16 UINT32 UINT64 FLOAT16 FLOAT DOUBLE".split()
)
assert sys.byteorder == "little", "ONNX stores little-endian weights; this machine is big-endian"


def is_detachable(tensor: ir.TensorProtocol | None) -> bool:
    """Return whether a weight is large and of a plain numpy dtype, so that it can live outside the message."""
    return tensor is not None and tensor.dtype in _PLAIN and tensor.nbytes >= LARGE


def read(path: Path) -> tuple[onnx.ModelProto, dict[str, Array], list[Buffer], tuple[Path, ...]]:
    """Return the model without its large weights, those by initializer name (read-only views), all bytes read, and
    the files of external data.

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
    weights, everything, beside = {}, [buffer], dict.fromkeys(_external_files(proto, path))
    for index, tensor in enumerate(proto.graph.initializer):
        raw = views.get(index)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raw = external_data(tensor, path)
            everything.append(raw)
        dtype = _known_dtype(tensor, where)
        if raw is not None or tensor.HasField("raw_data"):
            _check_size(tensor, dtype, tensor.raw_data if raw is None else raw, where)
        if raw is None:
            continue
        if dtype in _PLAIN:
            weights[tensor.name] = array_of(tensor, dtype, raw)
        else:
            _embed(tensor, raw)
    for tensor in _other_tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            everything.append(external_data(tensor, path))
            _embed(tensor, everything[-1])
    return proto, weights, everything, tuple(beside)


def _external_files(proto: onnx.ModelProto, path: Path) -> Iterator[Path]:
    for tensor in (*proto.graph.initializer, *_other_tensors(proto)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield from (path.parent / entry.value for entry in tensor.external_data if entry.key == "location")


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


def array_of(tensor: onnx.TensorProto, dtype: ir.DataType, raw: Buffer | bytes) -> Array:
    """Return a weight's bytes as a read-only array of its type and shape."""
    array = np.frombuffer(raw, dtype=dtype.numpy()).reshape(tuple(tensor.dims))
    array.flags.writeable = False
    return array


def external_data(tensor: onnx.TensorProto, path: Path) -> Buffer:
    """Return a read-only map of a tensor's external data, refusing what lies outside the model's folder."""
    where = f"{path}: tensor `{tensor.name}`"
    info = {entry.key: entry.value for entry in tensor.external_data}
    location = info.get("location", "")
    folder = path.resolve().parent
    target = (folder / location).resolve() if location and "\0" not in location else folder
    beside = Path(os.path.normpath(folder / location)) if "\0" not in location else folder
    if not target.is_relative_to(folder) and beside.is_relative_to(folder):
        raise ModelError(
            f"external data `{location}` is a symlink to {target}, outside the model's folder",
            where,
            "Copy the file itself beside the model.",
        )
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
    approve: Approve = lambda path, data: None,
) -> Path | None:
    """Write the model at `path`, whole or not at all; return the external data file when the size needs one.

    approve: sees the finished file beside `path`, and its external data, just before it takes its name, and may put
    what belongs to it in place; when it raises, nothing is changed.
    proto: its external placeholders name entries of `weights`. Over protobuf's 2 GiB the weights go to a file beside
    the model whose name carries their digest, so that a crash between the two renames never mixes two builds.
    Raises CcompileError when the disk is full or the folder is not writable; then nothing is changed.
    """
    remove_stale(path)
    if proto.ByteSize() + sum(tensor.nbytes for tensor in weights.values()) <= limit:
        write_whole(path, lambda out: _write_inline(proto, weights, out), lambda out: approve(out, None))
        _remove_data(path, None)
        return None
    scratch = scratch_of(path.with_name(path.name + ".data"))
    with writing(path), removed_on_failure(scratch):
        digest = _write_weights(proto, weights, scratch)
        data = path.with_name(f"{path.name}.{digest[:12]}.data")
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = data.name
        new = not data.exists()
        scratch.replace(data)
    with removed_on_failure(data) if new else contextlib.nullcontext():
        content = proto.SerializeToString(deterministic=True)
        write_whole(path, lambda out: out.write(content), lambda out: approve(out, data))
    _remove_data(path, data)
    return data


def is_data_of(data: Path, path: Path) -> bool:
    """Return whether a file has the name of the external data that `write` makes beside `path`."""
    mine = re.fullmatch(re.escape(path.name) + r"\.[0-9a-f]{12}\.data", data.name)
    return mine is not None and data.parent.resolve() == path.parent.resolve()


def _remove_data(path: Path, kept: Path | None) -> None:
    """Remove the external data of the builds before, which nothing names any more."""
    for old in path.parent.iterdir():
        if old != kept and is_data_of(old, path):
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
            head = bare.SerializeToString(deterministic=True) + header(RAW_DATA, length)
        head = header(INITIALIZER, len(head) + length) + head
        pieces.append((head, weight))
        size += len(head) + length
    out.write(shell.SerializeToString(deterministic=True))
    out.write(header(GRAPH, size))
    out.write(graph)
    for head, weight in pieces:
        out.write(head)
        if weight is not None:
            out.write(bytes_of(weight))


def bytes_of(tensor: ir.TensorProtocol) -> memoryview:
    """Return the bytes of a weight that can live outside the message (is_detachable)."""
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
            content = bytes_of(weights[tensor.name])
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
