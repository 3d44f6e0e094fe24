"""Independent work, site by site: in this process, or in several.

What is mapped are functions of ccompile.numerics, and methods of passes that call them, on arrays; their results must
not depend on where they ran. BLAS rounds differently with another number of threads, so each call has exactly one, in
this process as in a worker: more processes, not more threads, use more cores. Nothing here imports numpy: a worker says
how many threads it wants before that. Another backend is another class with `map`.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Protocol, TypeVar

from ccompile import blas
from ccompile.errors import CcompileError

S = TypeVar("S")
T = TypeVar("T")
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class Executor(Protocol):
    """Whatever can run independent work."""

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> list[T]:
        """Return function(item) of each item, in order; raises what the first item to fail raised."""
        ...


class InProcess:
    """One item after the other, here."""

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> list[T]:
        """Return function(item) of each item, in order.

        >>> InProcess().map(abs, [-1, 2])
        [1, 2]
        """
        return [_alone(function, item) for item in items]


class Processes:
    """Up to `jobs` processes, started when there is work for them; `close` ends them, with what they are doing."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._pool: ProcessPoolExecutor | None = None
        self._alive: Connection | None = None

    def map(self, function: Callable[[S], T], items: Iterable[S]) -> list[T]:
        """Return function(item) of each item, in order; `items` is read only as far as there are processes to work.

        `function` must be one that a new process can import. Raises CcompileError when a process died.
        """
        waiting: collections.deque[Future[T]] = collections.deque()
        found: list[T] = []
        try:
            for item in items:
                if len(waiting) > self.jobs:
                    found.append(waiting.popleft().result())
                waiting.append(self._submit(function, item))
            return found + [future.result() for future in waiting]
        except BrokenProcessPool as error:
            raise CcompileError("one of the processes died", "--jobs", "Out of memory? Give fewer.") from error
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """End all processes, idle or not."""
        if self._pool is not None and self._alive is not None:
            self._alive.close()
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = self._alive = None

    def _submit(self, function: Callable[[S], T], item: S) -> Future[T]:
        pool = self._started()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # for a process that this starts
        try:
            return pool.submit(_alone, function, item)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            ours, self._alive = context.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(self.jobs, context, _begin, (ours,))
        return self._pool


@contextlib.contextmanager
def executor(jobs: int) -> Iterator[Executor]:
    """Yield an executor of `jobs` processes (0: one per core; 1: this one only), and end it."""
    count = jobs or os.cpu_count() or 1
    if count == 1:
        yield InProcess()
        return
    processes = Processes(count)
    try:
        yield processes
    finally:
        processes.close()


def _alone(function: Callable[[S], T], item: S) -> T:
    with blas.one_thread():
        return function(item)


def _begin(alive: Connection) -> None:
    """Make a process ready: one thread, deaf to Ctrl-C, and gone as soon as the other end of `alive` is."""
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()


def _end_with(alive: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        alive.recv_bytes()
    os._exit(1)
