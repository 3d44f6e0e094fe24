"""An end within a second of Ctrl-C, wherever the program is."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence

GRACE = 0.7  # seconds in which the program may end by itself, and clean up
_WORDS = b"interrupted: the output is the previous one, or whole\n"
_SHOW_CURSOR = b"\x1b[?25h"


@contextlib.contextmanager
def ending_soon() -> Iterator[None]:
    """End the process with 128 + N when it does not end by itself within GRACE of signal N, SIGINT or SIGTERM.

    Python answers a signal between two of its own instructions: not while a factorisation or an inference runs, which
    may take many seconds. Nothing is written then, so that there is nothing to clean up; processes of `--jobs` end with
    this one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    over = threading.Event()
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(ours, over), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        theirs.close()  # the watcher reads the end
        watcher.join()
        ours.close()


@contextlib.contextmanager
def interruptible() -> Iterator[Sequence[int]]:
    """Raise SystemExit on SIGTERM and KeyboardInterrupt on SIGINT, and tell which came, in a list that grows.

    A library may make an error of its own of a KeyboardInterrupt: the list tells it from a bug. A signal that the shell
    has us ignore, as it does for a job in the background, stays ignored; the handlers of before come back at the end.
    """
    came: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    kept = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in kept:
        signal.signal(number, interrupt)
    try:
        yield came
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _watch(ours: socket.socket, over: threading.Event) -> None:
    while number := ours.recv(1):
        if number[0] in (signal.SIGINT, signal.SIGTERM) and not over.wait(GRACE):
            with contextlib.suppress(OSError):
                os.write(2, (_SHOW_CURSOR if sys.__stderr__ is not None and sys.__stderr__.isatty() else b"") + _WORDS)
            os._exit(128 + number[0])
