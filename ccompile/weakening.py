"""Find the strongest form of a step that keeps its contract, by bisection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

ROUNDS = 5  # the strength found is within 1/32 of the way back from the one asked for


class Outcome(Protocol):
    """What a try led to."""

    @property
    def broken(self) -> str:
        """Return how the contract broke, or nothing."""
        ...


T = TypeVar("T", bound=Outcome)


def weakest(attempt: Callable[[float], T], rounds: int = ROUNDS) -> T | None:
    """Return the try that goes back least, of those that hold: attempt(share), share in (0, 1) of the way to nothing.

    Share 0 is known to break, 1 does nothing. Returns None when none of the `rounds` tries holds.
    """
    breaks, holds, found = 0.0, 1.0, None
    for _ in range(rounds):
        share = (breaks + holds) / 2
        tried = attempt(share)
        if tried.broken:
            breaks = share
        else:
            holds, found = share, tried
    return found
