"""Keeping verification apart from calibration: one source is split, samples that occur in both are found."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from ccompile.core import Array
    from ccompile.sources.request import Request
    from ccompile.sources.stream import Stream


def shared_samples(calibration: Request, verification: Request) -> int:
    """Return how many samples calibration takes from the source that verification names as well, or 0.

    Raises DataError when calibration takes all of it.
    """
    kind = calibration.source.kind
    if kind != verification.source.kind or kind == "synthetic" or _real(calibration) != _real(verification):
        return 0
    if calibration.source.samples is None:
        raise calibration.refuse(
            "verification names the same source, and calibration takes all of it",
            "Give calibration a number, for example `samples: 256`; verification then takes what follows.",
        )
    return calibration.source.samples


def unseen(stream: Stream, seen: Stream) -> Array | None:
    """Return keep[n]: False where sample n of `stream` also occurs in `seen`; None when none does."""
    known = set(_fingerprints(seen))
    keep = np.fromiter((mark not in known for mark in _fingerprints(stream)), dtype=np.bool_, count=stream.count)
    return None if keep.all() else keep


def _real(request: Request) -> Path:
    try:
        return request.path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise request.refuse(f"cannot read it: {error}") from error


def _fingerprints(stream: Stream) -> Iterator[bytes]:
    """Yield 16 bytes per sample that stand for all its inputs."""
    for piece in stream.pieces():
        if not stream.size:
            yield _fingerprint(piece.feeds)
            continue
        for row in range(piece.samples):
            yield _fingerprint({**{name: x[row] for name, x in piece.feeds.items()}, **stream.constants})


def _fingerprint(feeds: Mapping[str, Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(feeds):
        values = feeds[name] if isinstance(feeds[name], list) else [feeds[name]]
        for value in values:
            content = b"" if value is None else _bytes_of(value)
            digest.update(f"{name} {value is None} {len(content)} ".encode())
            digest.update(content)
    return digest.digest()


def _bytes_of(value: object) -> bytes:
    if isinstance(value, list):
        return b"".join(_bytes_of(part) for part in value)
    array = np.asarray(value)
    return json.dumps(array.tolist(), default=repr).encode() if array.dtype.hasobject else array.tobytes()
