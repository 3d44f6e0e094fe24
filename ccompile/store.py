"""A folder of contents by digest and records by key, shared by any number of processes, any of which may be killed.

    DIR/objects/ab/cdef...   contents; the name is their SHA-256, compared whenever they are read
    DIR/records/ab/cdef...   JSON by key, its own SHA-256 in the first line
    DIR/scratch/...          files being filled, renamed into place when they are whole

What does not read back as it was written is removed, with a note. Nothing here can fail a compile: a folder that cannot
be written is a note as well, and nothing is stored. Contents are data, never code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT = 4_000_000_000  # bytes
_STALE = 3600.0  # seconds after which a scratch file is of a process that was killed
_ROOM = 0.8  # share of the limit that is left standing when it was exceeded, so that not every compile must remove
Content = bytes | memoryview


@dataclass(frozen=True)
class Usage:
    """What a store holds: compiles and steps, contents, bytes of all."""

    records: int
    objects: int
    nbytes: int


def digest_of(content: Content) -> str:
    """Return the SHA-256.

    >>> digest_of(b"")[:8]
    'e3b0c442'
    """
    return hashlib.sha256(content).hexdigest()


def key_of(*parts: Any) -> str:
    """Return the SHA-256 of plain data, whatever the order of its mappings.

    >>> key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}) != key_of({"a": 1})
    True
    """
    return digest_of(json.dumps(parts, sort_keys=True).encode())


@dataclass
class Store:
    """The store in a folder; `notes` tells what was dropped, and why nothing is stored."""

    folder: Path
    limit: int = LIMIT
    notes: list[str] = field(default_factory=list)
    broken: bool = False

    def put(self, content: Content) -> str:
        """Store a content; return its digest."""
        digest = digest_of(content)
        path = self._path("objects", digest)
        try:
            if path.stat().st_size == len(content):
                os.utime(path)
                return digest
        except OSError:
            pass
        self._write(path, content)
        return digest

    def get(self, digest: str) -> bytes | None:
        """Return a content, or None when it is not there or not what it was."""
        path = self._path("objects", digest)
        content = self._read(path)
        if content is not None and digest_of(content) != digest:
            self._drop(path)
            return None
        return content

    def holds(self, digest: str) -> bool:
        """Return whether there is a content of that name, without reading it."""
        return self._path("objects", digest).exists()

    def write(self, key: str, record: dict[str, Any]) -> None:
        """Store a record of plain data under a key; NaN and infinities may be in it."""
        text = json.dumps(record).encode()
        self._write(self._path("records", key), digest_of(text).encode() + b"\n" + text)

    def read(self, key: str) -> dict[str, Any] | None:
        """Return the record of a key, or None when there is none, or a damaged one."""
        path = self._path("records", key)
        content = self._read(path)
        if content is None:
            return None
        digest, _, text = content.partition(b"\n")
        if digest_of(text).encode() != digest:
            self._drop(path)
            return None
        record: dict[str, Any] = json.loads(text)
        return record

    def remove(self, key: str) -> None:
        """Forget the record of a key."""
        _remove(self._path("records", key))

    def trim(self) -> None:
        """Remove what was used least recently while all exceeds the limit, and what killed processes left."""
        for path in self.folder.glob("scratch/*"):
            if (known := _stat(path)) is not None and time.time() - known.st_mtime > _STALE:
                _remove(path)
        found = sorted(self._files(), key=lambda item: item[1].st_mtime_ns)
        held = sum(known.st_size for _, known in found)
        if held <= self.limit:
            return
        for path, known in found:
            if held <= self.limit * _ROOM:
                break
            _remove(path)
            held -= known.st_size

    def usage(self) -> Usage:
        """Return what is held."""
        kinds = [(path.parent.parent.name, known.st_size) for path, known in self._files()]
        records = sum(kind == "records" for kind, _ in kinds)
        return Usage(records, len(kinds) - records, sum(size for _, size in kinds))

    def clear(self) -> Usage:
        """Remove everything; return what was held."""
        usage = self.usage()
        for path in (*self.folder.glob("scratch/*"), *(path for path, _ in self._files())):
            _remove(path)
        return usage

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for kind in ("records", "objects"):
            for path in self.folder.glob(f"{kind}/??/*"):
                if (known := _stat(path)) is not None:
                    yield path, known

    def _path(self, kind: str, digest: str) -> Path:
        return self.folder / kind / digest[:2] / digest[2:]

    def _read(self, path: Path) -> bytes | None:
        try:
            content = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._tell(f"{path.name} cannot be read: {error.strerror}")
            return None
        return content

    def _drop(self, path: Path) -> None:
        self._tell(f"dropped a damaged entry, {path.parent.parent.name}/{path.parent.name}{path.name[:10]}")
        _remove(path)

    def _write(self, path: Path, content: Content) -> None:
        """Put a file in place, whole; digests are compared when it is read, so it need not be flushed to the disk."""
        if self.broken:
            return
        scratch = None
        try:
            for folder in (path.parent, self.folder / "scratch"):
                folder.mkdir(parents=True, exist_ok=True)
            handle, scratch = tempfile.mkstemp(dir=self.folder / "scratch")
            with os.fdopen(handle, "wb") as out:
                out.write(content)
            Path(scratch).replace(path)
        except OSError as error:
            self.broken = True
            self._tell(f"nothing is stored in {self.folder}: {error.strerror}")
        finally:
            if scratch is not None:
                _remove(Path(scratch))

    def _tell(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _stat(path: Path) -> os.stat_result | None:
    """Return what the system knows of a file, or None when another process has just removed it."""
    try:
        return path.stat()
    except OSError:
        return None


def _remove(path: Path) -> None:
    """Remove a file, unless it is gone, or the system does not let us: then it stays, and does no harm."""
    with contextlib.suppress(OSError):
        path.unlink()
