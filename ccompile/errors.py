"""Errors that a user can act on: what is wrong, where, and what would be right."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `where` locates it, `hint` says what would be right."""

    message: str
    where: str = ""
    hint: str = ""
    place: tuple[int, int] = (0, 0)  # line and column, for sorting; (0, 0) when it has none

    def __str__(self) -> str:
        head = f"{self.where}: {self.message}" if self.where else self.message
        return head if not self.hint else head + "\n" + "\n".join("  " + line for line in self.hint.splitlines())


class CcompileError(Exception):
    """Base of every error that ccompile reports without a traceback; `exit_code` is the process's."""

    exit_code = 2

    def __init__(self, message: str, where: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.problems: tuple[Problem, ...] = (Problem(message, where, hint),)

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> Self:
        """Return one error that reports all `problems`, in order."""
        found = tuple(problems)
        error = cls(found[0].message)
        error.problems = found
        return error

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class SpecError(CcompileError):
    """The spec or a command line value is wrong."""


class ModelError(CcompileError):
    """The model cannot be read, is not valid, or does not fit the target."""


class DataError(CcompileError):
    """Calibration or verification data is missing, empty or does not fit the model."""


class PassError(CcompileError):
    """A pass cannot act as told on this model (an option that fits no node, for example)."""


class ContractError(CcompileError):
    """A contract or a gate did not hold: the only error that means *the result is not good enough*."""

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names the nearest known name, or all of them when none is near.

    >>> nearest("enrgy", ["energy", "rank"])
    'Did you mean `energy`? It takes: energy, rank.'
    >>> nearest("zzz", ["energy", "rank"])
    'It takes: energy, rank.'
    """
    names = sorted(known)
    by_case = {known_name.casefold(): known_name for known_name in names}
    close = get_close_matches(name.casefold(), by_case, n=1, cutoff=0.5)
    listed = f"It takes: {', '.join(names)}." if names else "It takes nothing."
    return f"Did you mean `{by_case[close[0]]}`? {listed}" if close else listed
