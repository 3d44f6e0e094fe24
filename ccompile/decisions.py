"""What a compile decided by times, kept so that a later one can repeat it without measuring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ccompile.errors import PassError

_HINT = "The model, the spec or ccompile is not what it was when it was locked: compile without the lock."


@dataclass
class Decisions:
    """Decisions by key, `NN-pass/site`; with `locked` ones, those are repeated and nothing new is decided."""

    locked: Mapping[str, str] | None = None
    made: dict[str, str] = field(default_factory=dict)

    def decide(self, step: str, site: str, compute: Callable[[], str]) -> str:
        """Return the locked decision for a site of a step, or compute() where nothing is locked.

        Raises PassError when there is a lock that says nothing about it.
        """
        key = f"{step}/{site}"
        if self.locked is None:
            self.made[key] = compute()
        elif key in self.locked:
            self.made[key] = self.locked[key]
        else:
            raise PassError(f"the lock has no decision for `{key}`", hint=_HINT)
        return self.made[key]

    def finish(self) -> None:
        """Raise PassError when something is locked that this compile never asked for."""
        unused = sorted((self.locked or {}).keys() - self.made.keys())
        if unused:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            raise PassError(f"the lock decides `{unused[0]}`{more}, which this compile does not ask for", hint=_HINT)
