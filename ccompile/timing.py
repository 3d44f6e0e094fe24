"""Times on this machine: models run in turns, the first quartile of each, so that a busy machine disturbs all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from ccompile.runtime import Feeds, Session, Settings

Run = Callable[[], object]
Timer = Callable[[Sequence[Run], bool], list[float]]

_SLICE = 0.004  # seconds that one turn of one run should take at least, so that clocks do not count
_TURNS = 9  # at least; what a quartile needs
BUDGET = 0.6  # seconds for each run in all


def interleaved(runs: Sequence[Run], alone: bool, budget: float = BUDGET, turns: int = _TURNS) -> list[float]:
    """Return seconds per call: the first quartile over turns in which each run has a slice.

    alone: all work is done by the calling thread, whose CPU time then counts, so that other processes do not.
    Turns go on until the budget of each run is spent, but at least `turns` are made.
    """
    clock = time.thread_time if alone else time.perf_counter
    counts = [_calls(run, clock) for run in runs]
    found: list[list[float]] = []
    stop = time.perf_counter() + budget * len(runs)
    while len(found) < turns or time.perf_counter() < stop:
        found.append([_slice(run, count, clock) for run, count in zip(runs, counts, strict=True)])
    return [float(seconds) for seconds in np.quantile(np.array(found), 0.25, axis=0)]


def _calls(run: Run, clock: Callable[[], float]) -> int:
    """Return how many calls fill a slice; runs it, which warms it up."""
    run()
    seconds = min(_slice(run, 1, clock) for _ in range(2))
    return max(1, round(_SLICE / max(seconds, 1e-7)))


def _slice(run: Run, count: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(count):
        run()
    return (clock() - start) / count


def race(parts: Sequence[ir.Model], feeds: Feeds, threads: int, timer: Timer = interleaved) -> list[float]:
    """Return the seconds per inference of models that run in turns, as deployed, on the feeds that each has."""
    sessions = [Session(part, Settings(threads, optimise=True)) for part in parts]
    own = [{name: feeds[name] for name in session.inputs} for session in sessions]
    return timer([partial(s.run, fed) for s, fed in zip(sessions, own, strict=True)], threads == 1)
