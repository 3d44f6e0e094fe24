"""Can the source's outputs prove anything? What differs from sample to sample can; what never moves proves little."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ccompile.core import Array
    from ccompile.runtime import Outputs


class Constancy:
    """Watches outputs batch by batch for those that are the same on all samples."""

    def __init__(self) -> None:
        self._first: dict[str, Array] = {}
        self._moved: set[str] = set()
        self._seen: dict[str, int] = {}

    def add(self, outputs: Outputs, samples: int) -> None:
        """Look at one batch; an output whose axis 0 is not the batch counts as one sample."""
        for name, value in outputs.items():
            if name in self._moved or not isinstance(value, np.ndarray | np.generic) or not value.size:
                continue
            whole: Array = np.asarray(value)
            rows = whole if whole.ndim and len(whole) == samples else whole[None]
            first = self._first.setdefault(name, np.array(rows[0]))
            self._seen[name] = self._seen.get(name, 0) + len(rows)
            same = rows.shape[1:] == first.shape and bool(np.all((rows == first) | ((rows != rows) & (first != first))))
            if not same or not _is_float(whole):
                self._moved.add(name)
                del self._first[name]

    @property
    def notes(self) -> list[str]:
        """Return what to say of float outputs that were the same on several samples."""
        constant = [name for name in self._first if self._seen[name] > 1]
        return [f"output `{name}` is the same on all samples: it proves little" for name in constant]


def _is_float(array: Array) -> bool:
    return array.dtype.kind in "fc" or "float" in array.dtype.name
