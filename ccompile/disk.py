"""Files that appear whole or not at all: filled beside their place, flushed, renamed; nothing is left behind."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ccompile.errors import CcompileError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def probe(path: Path) -> None:
    """Raise CcompileError when a file cannot be put at `path`: not a regular file, or the folder is not writable."""
    _refuse_special(path)
    scratch = scratch_of(path)
    with writing(path), removed_on_failure(scratch):
        scratch.open("wb").close()
        scratch.unlink()


def _refuse_special(path: Path) -> None:
    """Refuse to replace a device, a pipe or a folder by a file (`-o /dev/null` as root would)."""
    if path.exists() and not path.is_file():
        raise CcompileError("it is there already and is no regular file", str(path), "Name another file.")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; raises CcompileError when the disk refuses."""
    write_whole(path, lambda out: out.write(text.encode()))


def scratch_of(path: Path) -> Path:
    """Return the name beside `path` under which this process fills it."""
    return path.with_name(f".{path.name}.{_machine()}-{os.getpid()}.ccompile-tmp")


def _machine() -> str:
    """Return the machine's or container's name: process numbers mean nothing on another one."""
    return platform.node().replace(".", "_").replace("-", "_")


def remove_stale(path: Path) -> None:
    """Remove what killed runs left beside `path`; files of live processes stay."""
    for left in path.parent.glob(f".{glob.escape(path.name)}*.ccompile-tmp"):
        machine, _, pid = left.name.split(".")[-2].rpartition("-")
        alive = not Path("/proc").exists() or Path(f"/proc/{pid}").exists()
        if machine == _machine() and pid.isdigit() and not alive:
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def removed_on_failure(path: Path) -> Iterator[None]:
    """Remove the file when the block does not end well, whatever stops it."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report what the system refuses while `path` is written as a CcompileError."""
    try:
        yield
    except OSError as error:
        raise CcompileError(
            f"cannot write: {error.strerror}", str(path), "Nothing was changed. Is there space, and permission?"
        ) from error


def write_whole(
    path: Path, fill: Callable[[IO[bytes]], object], approve: Callable[[Path], object] = lambda path: None
) -> None:
    """Fill a scratch file beside `path`, flush it to the disk, have it approved, and rename it over `path`."""
    _refuse_special(path)
    remove_stale(path)
    scratch = scratch_of(path)
    with writing(path), removed_on_failure(scratch):
        with scratch.open("wb") as out:
            fill(out)
            out.flush()
            os.fsync(out.fileno())
        approve(scratch)
        scratch.replace(path)
