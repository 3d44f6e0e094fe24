"""How much memory calibration statistics hold, so that a compile can tell."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from ccompile.moments import Moments


class Holding(Protocol):
    """Whatever holds arrays."""

    @property
    def nbytes(self) -> int:
        """Return the bytes in memory."""
        ...


H = TypeVar("H", bound=Holding)


@dataclass
class Ledger:
    """The layers that were observed, the most rows of one, and the most bytes that were held at a time."""

    layers: set[str] = field(default_factory=set)
    rows: int = 0
    peak: int = 0
    _held: list[weakref.ReferenceType[Holding]] = field(default_factory=list)

    def watch(self, holding: H) -> H:
        """Return `holding`, which counts from now on for as long as it lives."""
        self._held.append(weakref.ref(holding))
        return holding

    def update(self) -> None:
        """Take account of what is held now."""
        held = [holding for found in self._held if (holding := found()) is not None]
        self._held = [weakref.ref(holding) for holding in held]
        self.peak = max(self.peak, sum(holding.nbytes for holding in held))
        for holding in held:
            if isinstance(holding, Moments):
                self.layers.add(holding.layer.name)
                self.rows = max(self.rows, holding.rows)

    def record(self) -> dict[str, int]:
        """Return what is to be told, nothing when no layer was observed."""
        return {"layers": len(self.layers), "rows": self.rows, "bytes": self.peak} if self.layers else {}
