"""The packed artifact `.ccz`: a model file in parts, each coded on its own, that decodes to the same bytes or to none.

    magic, version | coded streams of part 0, part 1, ... | index | CRC-32 of magic, version and index | its length

Part 0 is the model file without its large tensors, the other parts are those, in order. The index holds the size and
the SHA-256 (its first half) of the model, then for each part: where in part 0 it belongs (as a distance from the one
before), its size, its view with the filler of a sparse one, the coder and length of each stream, and the CRC-32 of the
streams. Numbers are varints, checksums little-endian. Every byte of the file is under a checksum that is compared
before the byte is decoded; the model's is compared at the end. A size is believed only where the index, the whole and
the tensor's own header in part 0 agree on it.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import numpy as np

from ccompile import coders, positions, views
from ccompile.errors import ModelError
from ccompile.splice import announces
from ccompile.views import View
from ccompile.wire import Buffer, encode_varint, varint

if TYPE_CHECKING:
    from ccompile.core import Array

MAGIC, VERSION = b"\x89CCZ", 1
_HEAD = MAGIC + bytes([VERSION])
_TAIL = struct.Struct("<II")  # CRC-32, length of the index
_CRC = struct.Struct("<I")
_DIGEST = 16  # bytes
_LIMIT, _RATIO = 1 << 30, 1000  # bytes that any file may unpack to, and bytes for each of its own


@dataclass(frozen=True)
class Part:
    """A part's place in part 0, its size, and how it is coded; streams: (coder, bytes)."""

    position: int
    size: int
    view: View
    filler: int
    streams: tuple[tuple[int, int], ...]
    checksum: int

    @property
    def coded(self) -> int:
        """Return the bytes of its streams."""
        return sum(length for _, length in self.streams)


@dataclass(frozen=True)
class Index:
    """What a file holds; size: of the model, in bytes; digest: of the model."""

    size: int
    digest: bytes
    parts: tuple[Part, ...]


class Digest:
    """The checksum of a model, piece by piece."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.size = 0

    def add(self, piece: Buffer | bytes) -> None:
        """Take the next bytes."""
        self._hash.update(piece)
        self.size += len(piece)

    @property
    def value(self) -> bytes:
        """Return the checksum of what was added."""
        return self._hash.digest()[:_DIGEST]


class Writer:
    """Writes a file part by part: part 0 first, the others by position."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._parts: list[bytes] = []
        self._position = 0
        out.write(_HEAD)

    def add(self, position: int, size: int, view: View, filler: int, streams: Sequence[coders.Coded]) -> int:
        """Write a part and return the bytes that it takes, its entry in the index included."""
        checksum = 0
        entry = encode_varint(position - self._position) + encode_varint(size) + bytes([view.number])
        entry += bytes([filler]) if view.sparse else b""
        for stream in streams:
            self._out.write(stream.data)
            checksum = zlib.crc32(stream.data, checksum)
            entry += bytes([stream.coder]) + encode_varint(len(stream.data))
        entry += _CRC.pack(checksum)
        self._parts.append(entry)
        self._position = position
        return len(entry) + sum(len(stream.data) for stream in streams)

    def finish(self, digest: Digest) -> None:
        """Write the index."""
        content = encode_varint(digest.size) + digest.value + b"".join(self._parts)
        self._out.write(content + _TAIL.pack(zlib.crc32(_HEAD + content), len(content)))


def default_limit(packed: int) -> int:
    """Return the bytes that a file of `packed` bytes may unpack to when nobody says more.

    >>> default_limit(100), default_limit(10**9)
    (1073741824, 1000000000000)
    """
    return max(_LIMIT, _RATIO * packed)


def read_index(file: IO[bytes], where: str, limit: int | None = None) -> Index:
    """Return the index of a file, every number in it checked against the file and the others.

    limit: bytes that the model may have. Raises ModelError when the file is damaged or the model larger.
    """
    packed = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(len(_HEAD))
    if head[: len(MAGIC)] != MAGIC:
        raise ModelError("not a packed model", where, "A file that `ccompile pack` made was expected.")
    if head != _HEAD:
        version = head[len(MAGIC)] if len(head) == len(_HEAD) else "none"
        raise ModelError(f"version {version} of the format is not known", where, f"This ccompile reads {VERSION}.")
    file.seek(max(packed - _TAIL.size, 0))
    tail = file.read(_TAIL.size)
    checksum, length = _TAIL.unpack(tail) if len(tail) == _TAIL.size else (0, packed)
    streams = packed - _TAIL.size - length - len(_HEAD)
    if streams < 0:
        raise _damaged(where, "it is truncated")
    file.seek(len(_HEAD) + streams)
    content = file.read(length)
    if zlib.crc32(_HEAD + content) != checksum:
        raise _damaged(where, "the checksum of its index does not hold")
    try:
        index = _parsed(memoryview(content))
        _check(index, streams)
    except (ValueError, IndexError) as error:
        raise _damaged(where, f"its index is wrong: {error}") from error
    if index.size > (default_limit(packed) if limit is None else limit):
        most = default_limit(packed) if limit is None else limit
        raise ModelError(
            f"it says that it unpacks to {index.size:,} bytes, more than {most:,}",
            where,
            "Give a higher limit (`--limit`) if you trust it.",
        )
    return index


def _damaged(where: str, message: str) -> ModelError:
    return ModelError(f"the packed model is damaged: {message}", where, "Pack the model again, or copy it again.")


def _parsed(content: Buffer) -> Index:
    size, at = varint(content, 0)
    digest = bytes(content[at : at + _DIGEST])
    at += _DIGEST
    parts: list[Part] = []
    position = 0
    while at < len(content):
        distance, at = varint(content, at)
        length, at = varint(content, at)
        view = View.of(content[at])
        filler = content[at + 1] if view.sparse else 0
        at += 1 + view.sparse
        streams = []
        for _ in range(view.streams):
            coder = content[at]
            coded, at = varint(content, at + 1)
            if coder >= coders.NUMBER:
                raise ValueError(f"there is no coder {coder}")
            streams.append((coder, coded))
        checksum = _CRC.unpack(bytes(content[at : at + _CRC.size]).ljust(_CRC.size, b"\0"))[0]
        at += _CRC.size
        position += distance
        parts.append(Part(position, length, view, filler, tuple(streams), checksum))
    if at != len(content) or not parts:
        raise ValueError("it ends in the middle of a part")
    return Index(size, digest, tuple(parts))


def _check(index: Index, streams: int) -> None:
    """Raise ValueError when the parts are not those of the file or do not make the model."""
    first, *others = index.parts
    if sum(part.coded for part in index.parts) != streams:
        raise ValueError("its streams are not as long as the file")
    if sum(part.size for part in index.parts) != index.size:
        raise ValueError("its parts are not as long as the model")
    if not index.size:
        raise ValueError("the model is empty")
    if first.position or any(part.position > first.size for part in others):
        raise ValueError("a part lies outside the model")


def pieces(file: IO[bytes], index: Index, where: str) -> Iterator[Buffer]:
    """Yield the bytes of the model in order, holding part 0 and one other part at a time.

    Raises ModelError as soon as a checksum or a size does not hold; the last check is behind the last piece, so what
    was yielded is to be used only when the iteration ends.
    """
    file.seek(len(_HEAD))
    digest = Digest()
    first, *others = index.parts
    rest = _decoded(file, first, where, "the graph").data.toreadonly()
    at = 0
    for number, part in enumerate(others, 1):
        what = f"tensor {number} of {len(others)}"
        if not announces(bytes(rest[max(part.position - 10, 0) : part.position]), part.size):
            raise _damaged(where, f"{what} is not of the size that the graph says")
        for piece in (rest[at : part.position], _decoded(file, part, where, what).data):
            digest.add(piece)
            yield piece
        at = part.position
    digest.add(rest[at:])
    yield rest[at:]
    if (digest.size, digest.value) != (index.size, index.digest):
        raise _damaged(where, "the checksum of the model does not hold")


def _decoded(file: IO[bytes], part: Part, where: str, what: str) -> Array:
    """Return the bytes of the part that the file stands at."""
    coded = [file.read(length) for _, length in part.streams]
    checksum = 0
    for data in coded:
        checksum = zlib.crc32(data, checksum)
    if checksum != part.checksum:
        raise _damaged(where, f"the checksum of {what} does not hold")

    def read(index: int, length: int) -> Array:
        coder = part.streams[index][0]
        if coder == coders.POSITIONS:
            return np.frombuffer(positions.decode(coded[index], length), np.uint8)
        return np.frombuffer(coders.decode(coded[index], coder, length), np.uint8)

    try:
        return views.join(part.filler, part.size, part.view, read)
    except ValueError as error:
        raise _damaged(where, f"{what} cannot be decoded: {error}") from error
