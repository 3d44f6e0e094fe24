"""What a model put out, batch by batch, held as it was: in memory up to a limit, then on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from ccompile.core import Array
    from ccompile.runtime import Outputs

T = TypeVar("T")
HELD_BYTES = 256 << 20  # recorded outputs and observed intermediates beyond this go to disk, or wait for a later sweep


@dataclass(frozen=True)
class _Spilled:
    """An array in a file; open only while it is read, as open files are few."""

    path: Path

    def load(self) -> Array:
        array: Array = np.load(self.path, mmap_mode="r")
        return array


class Recording:
    """The outputs of a model, batch by batch, as they were; beyond `limit` bytes they lie in a temporary folder."""

    def __init__(self, limit: int | None = None) -> None:
        self._batches: list[Outputs] = []
        self._room = HELD_BYTES if limit is None else limit
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.nbytes = 0  # in memory

    def append(self, outputs: Outputs) -> None:
        """Keep one batch."""
        self._batches.append({name: self._keep(value) for name, value in outputs.items()})

    def _keep(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._keep(item) for item in value]
        if not isinstance(value, np.ndarray) or value.dtype.kind in "OSU" or not value.size:
            return value
        self._room -= value.nbytes
        if self._room >= 0:
            self.nbytes += value.nbytes
            return value
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="ccompile-")
        path = Path(self._folder.name) / f"{self._room}.npy"
        np.save(path, value)
        return _Spilled(path)

    def __iter__(self) -> Iterator[Outputs]:
        for batch in self._batches:
            yield {name: _loaded(value) for name, value in batch.items()}

    def __len__(self) -> int:
        return len(self._batches)


def _loaded(value: Any) -> Any:
    if isinstance(value, list):
        return [_loaded(item) for item in value]
    return value.load() if isinstance(value, _Spilled) else value


def runs_within(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Yield runs of items, in order, whose sizes sum to at most `limit`; an item above it stands alone.

    >>> list(runs_within([3, 4, 9, 1], lambda item: item, 8))
    [[3, 4], [9], [1]]
    """
    run: list[T] = []
    held = 0
    for item in items:
        if run and held + size(item) > limit:
            yield run
            run, held = [], 0
        run.append(item)
        held += size(item)
    if run:
        yield run
