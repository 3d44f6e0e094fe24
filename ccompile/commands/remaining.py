"""How long what is running will take, from its own counters."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

_COUNTER = re.compile(r"(\d+)/(\d+)")
_LEAST = 3.0  # seconds that must have been seen before anything is said
_SHARE = 0.02  # of the part that must have been seen


class Remaining:
    """Tells the seconds left of the part that runs, `refit 3/20 layers`, from how fast its counters went.

    It speaks of that part alone: how long the parts behind it take nobody knows, and nothing is said of them.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._part, self._share = "", 0.0  # what was last seen
        self._start = (0.0, 0.0)  # the time and the share done when the part was first seen

    def of(self, text: str) -> str:
        """Return what to say behind a line of progress: nothing as long as there is no telling."""
        part, now, share = _COUNTER.sub("", text), self._clock(), share_done(text)
        if part != self._part or share < self._share:
            self._start = now, share
        self._part, self._share = part, share
        passed, done = now - self._start[0], share - self._start[1]
        if passed < _LEAST or done < _SHARE or share >= 1:
            return ""
        return f"about {told(passed / done * (1 - share))} left of this part"


def share_done(text: str) -> float:
    """Return the share that the counters in a text tell; a second one counts within a unit of the first.

    >>> share_done("refit 3/4 layers"), share_done("layers 3/4, batch 1/2"), share_done("verification")
    (0.75, 0.625, 0.0)
    """
    share, unit = 0.0, 1.0
    counters = [(int(done), int(total)) for done, total in _COUNTER.findall(text) if int(total) > 0]
    for index, (done, total) in enumerate(counters):
        last = index == len(counters) - 1
        share += unit * min(done if last else max(done - 1, 0), total) / total
        unit /= total
    return share


def told(seconds: float) -> str:
    """Return a time as roughly as it is known.

    >>> told(7.3), told(44), told(400), told(7300)
    ('10 s', '45 s', '7 min', '2.0 h')
    """
    if seconds < 100:
        return f"{max(5 * round(seconds / 5), 5) if seconds > 20 else 10} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
