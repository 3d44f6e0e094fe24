"""Npz files: headers checked against the model before anything is read, rows then streamed front to back."""

from __future__ import annotations

import contextlib
import hashlib
import math
import zipfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ccompile.errors import nearest
from ccompile.sources.ports import check_fit
from ccompile.sources.stream import Batch, Stream, content_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ccompile.core import Array
    from ccompile.sources.ports import Port
    from ccompile.sources.request import Request

_CHUNK = 1 << 20  # bytes per read
_UNUSED_KEYS = frozenset({"label", "labels"})  # often saved beside the inputs; no mistake when nobody asks for them


def open_npz(request: Request) -> Stream:
    """Return the rows of a file with one array per input; raises DataError when it is damaged or does not fit."""
    digest = _digest(request)
    with request.reading(), zipfile.ZipFile(request.path) as archive:
        members = _members(archive, request)
        constants = _constants(archive, members, request)
    rows = {port.name: port for port in request.inputs if port.name not in constants}
    label = None if request.source.labels is None else members[request.source.labels]
    count, notes = request.window(_length({name: members[name] for name in rows}, label, request))
    size, whole = request.batch_size(rows.values()) if rows else (1, False)

    def pieces() -> Iterator[Batch]:
        with request.reading(), zipfile.ZipFile(request.path) as archive, contextlib.ExitStack() as stack:
            readers = {name: _Rows(stack, archive, members[name], request.start) for name in rows}
            labels = _Rows(stack, archive, label, request.start) if label else None
            for at in range(0, count, size):
                taken = min(size, count - at)
                feeds = {name: _as_fed(reader.take(taken), rows[name]) for name, reader in readers.items()}
                yield Batch(feeds, labels.take(taken) if labels else None, taken)

    content = content_of("npz", digest, request.start, request.source.labels)
    return Stream(count, pieces, content, size, whole, constants, notes, label is not None)


@dataclass(frozen=True)
class _Member:
    """One array of an npz: its place, type and shape."""

    entry: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def _digest(request: Request) -> str:
    with request.reading(), request.path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise request.refuse("not an npz file, or a truncated one", "Write it with np.savez(path, x=...).")
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _members(archive: zipfile.ZipFile, request: Request) -> dict[str, _Member]:
    """Return the arrays that are used, by key, after checking that the keys and the arrays are those of the model."""
    entries = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    names = [port.name for port in request.inputs]
    label = request.source.labels
    if label is not None:
        request.check_known(label, entries, "key of the npz, but `labels` names it")
    for key in entries:
        if key not in _UNUSED_KEYS and key != label and key not in names:
            raise request.refuse(f"`{key}` is no input of the model", nearest(key, names))
    for port in request.inputs:
        if port.name in entries and port.kind in ("sequence", "sparse"):
            raise request.refuse(f"`{port.name}` is of {port.kind} type, an npz cannot hold it", "Use `test_data`.")
    missing = [port.name for port in request.inputs if port.name not in entries and port.kind != "optional"]
    if missing:
        raise request.refuse(f"the model also takes {', '.join(f'`{name}`' for name in missing)}", request.takes)
    members = {key: _member(archive, info, request) for key, info in entries.items() if key in names or key == label}
    for port in request.inputs:
        if port.name in members:
            check_fit(port, members[port.name].dtype, members[port.name].shape, request.where, rows=True)
    return members


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, request: Request) -> _Member:
    key = info.filename.removesuffix(".npy")
    with archive.open(info) as stream:
        shape, by_columns, dtype = _header(stream)
        start = stream.tell()
    if dtype.hasobject:
        raise request.refuse(f"`{key}` holds Python objects, which are never unpickled", f"Save {key}.astype(...).")
    if by_columns and len(shape) > 1:
        raise request.refuse(
            f"`{key}` is stored by columns, so its samples cannot be streamed", f"Save np.ascontiguousarray({key})."
        )
    if start + math.prod(shape) * dtype.itemsize != info.file_size:
        raise request.refuse(
            f"`{key}` is damaged: its size is not that of {list(shape)} {dtype.name}", "Write it again."
        )
    return _Member(info.filename, dtype, shape)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return (shape, stored by columns, dtype) of an .npy stream and leave it at the first element."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(stream)
    if any(dim < 0 for dim in shape):
        raise ValueError(f"negative dimension in {shape}")
    return shape, by_columns, dtype


def _constants(archive: zipfile.ZipFile, members: Mapping[str, _Member], request: Request) -> dict[str, Any]:
    """Return the feeds that are the same for all samples: scalars, and None for optional inputs that are left out."""
    constants: dict[str, Any] = {}
    for port in request.inputs:
        member = members.get(port.name)
        if member is None:
            constants[port.name] = None
        elif not member.shape:
            with archive.open(member.entry) as stream:
                _header(stream)
                constants[port.name] = _as_fed(_filled(stream, (), member.dtype), port)
    return constants


def _length(rows: Mapping[str, _Member], label: _Member | None, request: Request) -> int:
    """Return the common length of all sample arrays; 1 when every input is a scalar."""
    lengths = {name: member.shape[0] for name, member in rows.items()}
    if label is not None:
        if not label.shape:
            raise request.refuse(
                f"the labels `{request.source.labels}` are a scalar", "One label per sample is needed."
            )
        lengths[str(request.source.labels)] = label.shape[0]
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"`{name}` {length}" for name, length in lengths.items())
        raise request.refuse(f"the arrays differ in length: {listed}", "Axis 0 counts samples in each of them.")
    return next(iter(lengths.values()), 1)


class _Rows:
    """One array of an npz, read front to back."""

    def __init__(self, stack: contextlib.ExitStack, archive: zipfile.ZipFile, member: _Member, start: int) -> None:
        self.member = member
        self.left = member.shape[0] - start
        self.stream = stack.enter_context(archive.open(member.entry))
        _header(self.stream)
        skip = start * math.prod(member.shape[1:]) * member.dtype.itemsize
        while skip:
            got = len(self.stream.read(min(skip, _CHUNK)))
            if not got:
                raise EOFError("it ends early")
            skip -= got

    def take(self, rows: int) -> Array:
        array = _filled(self.stream, (rows, *self.member.shape[1:]), self.member.dtype)
        self.left -= rows
        if not self.left:
            self.stream.read(1)  # zipfile compares the checksum at the end of the member
        return array


def _filled(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return the next elements of a stream, read in chunks so that no second copy of the array is held."""
    array = np.empty(shape, dtype)
    target = array.reshape(-1).view(np.uint8) if array.nbytes else np.empty(0, np.uint8)
    at = 0
    while at < target.size:
        chunk = stream.read(min(_CHUNK, target.size - at))
        if not chunk:
            raise EOFError("it ends early")
        target[at : at + len(chunk)] = np.frombuffer(chunk, np.uint8)
        at += len(chunk)
    return array


def _as_fed(array: Array, port: Port) -> Array:
    """Return an array of an npz in the numpy type that runtimes take: native bytes, str objects, bfloat16."""
    if port.dtype is None or array.dtype == port.numpy:
        return array
    return array.view(port.numpy) if array.dtype.kind == "V" else array.astype(port.numpy)
