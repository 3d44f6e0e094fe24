"""An opened source, and how the pieces that it reads become batches."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ccompile.core import Array


@dataclass(frozen=True)
class Batch:
    """Inputs of one inference.

    feeds: by input name an array, a list of arrays (sequence inputs), or None (an optional input left out).
    labels[n], when there are any. expected: outputs by name, from output_N.pb.
    """

    feeds: dict[str, Any]
    labels: Array | None
    samples: int
    expected: dict[str, Any] | None = None


@dataclass(frozen=True)
class Stream:
    """An opened source: `pieces` reads its `count` samples anew, in order.

    content: digest of what it reads and of the parameters. size: samples per batch, pieces then stack samples on axis 0
    and hold at most `size`; 0: each piece is a batch as it is. whole: a batch that is not full cannot be run.
    constants: feeds that are the same for all samples.
    """

    count: int
    pieces: Callable[[], Iterator[Batch]]
    content: str
    size: int = 0
    whole: bool = False
    constants: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    has_labels: bool = False

    def batches(self, keep: Array | None) -> Iterator[Batch]:
        """Yield the samples that keep[n] is true for (None: all), holding about one batch at a time."""
        pieces: Iterable[Batch] = self.pieces()
        if keep is not None:
            pieces = _kept(pieces, keep)
        if self.size:
            pieces = _regrouped(pieces, self.size, self.whole)
        for batch in pieces:
            yield replace(batch, feeds={**batch.feeds, **self.constants})


def content_of(*parts: object) -> str:
    """Return the SHA-256 of file digests and parameters.

    >>> content_of("npz", 0) == content_of("npz", 1)
    False
    """
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()


def _kept(pieces: Iterable[Batch], keep: Array) -> Iterator[Batch]:
    at = 0
    for piece in pieces:
        chosen = keep[at : at + piece.samples]
        at += piece.samples
        if chosen.all():
            yield piece
        elif chosen.any():
            yield _rows(piece, chosen, int(chosen.sum()))


def _regrouped(pieces: Iterable[Batch], size: int, whole: bool) -> Iterator[Batch]:
    """Yield batches of `size` samples from pieces that hold at most as many; the last one may be smaller."""
    held: Batch | None = None
    for piece in pieces:
        held = piece if held is None else _joined(held, piece)
        if held.samples >= size:
            rest = held.samples - size
            yield _rows(held, slice(size), size)
            held = _rows(held, slice(size, None), rest) if rest else None
    if held is not None and not whole:
        yield held


def _joined(a: Batch, b: Batch) -> Batch:
    feeds = {name: np.concatenate([x, b.feeds[name]]) for name, x in a.feeds.items()}
    labels = None if a.labels is None or b.labels is None else np.concatenate([a.labels, b.labels])
    return Batch(feeds, labels, a.samples + b.samples)


def _rows(batch: Batch, index: Array | slice, count: int) -> Batch:
    labels = None if batch.labels is None else batch.labels[index]
    return Batch({name: x[index] for name, x in batch.feeds.items()}, labels, count)
