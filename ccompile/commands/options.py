"""Options that several commands take, and their values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ccompile.errors import CcompileError, SpecError

if TYPE_CHECKING:
    from ccompile.cases import Case
    from ccompile.tolerance import Tolerance

FILE = click.Path(path_type=Path)


def data_options(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command the options of `Given`, which it takes as `given`."""

    @functools.wraps(command)
    def with_given(
        data: Path | None, samples: int | None, seed: int, shapes: tuple[str, ...], threads: int, **others: Any
    ) -> int:
        from ccompile.diff import Given

        return command(given=Given(data, samples, seed, dict(shape(text) for text in shapes), threads), **others)

    found: Callable[..., int] = with_given
    for option in (
        click.option("--data", type=FILE, help="An .npz by input name, or a folder of test_data_set_*."),
        click.option("--samples", type=click.IntRange(1), help="Use this many samples [all, or 16 synthetic ones]."),
        click.option(
            "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Synthetic inputs."
        ),
        click.option("--shape", "shapes", multiple=True, metavar="NAME=1,3,224,224", help="Synthetic input shapes."),
        click.option("--threads", type=click.IntRange(0, 1024), default=0, show_default=True, help="0: all cores."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    ):
        found = option(found)
    return found


def lock_options(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command the options of locks, which it takes as `lock`: the file, and whether the build is held to it."""

    @click.option("--lock", "locks", is_flag=True, help="Write what the build is made of, and every choice, to a lock.")
    @click.option("--locked", "holds", is_flag=True, help="Exit 1 when anything moved from the lock, and repeat it.")
    @click.option("--lock-file", type=FILE, metavar="FILE", help="The lock [OUT.lock.yaml].")
    @functools.wraps(command)
    def with_lock(locks: bool, holds: bool, lock_file: Path | None, output: Path, **others: Any) -> int:
        if locks and holds:
            raise click.UsageError("--lock and --locked exclude each other.")
        if lock_file is not None and not (locks or holds):
            raise click.UsageError("--lock-file goes with --lock or --locked.")
        file = lock_file or output.with_name(output.name + ".lock.yaml")
        return command(output=output, lock=(file if locks or holds else None, holds), **others)

    return with_lock


def tolerance_of(limits: dict[str, float]) -> Tolerance | None:
    """Return the tolerance of the limits given, None without any; raises SpecError with all that is wrong."""
    from ccompile.tolerance import Tolerance
    from ccompile.validation import from_options

    return from_options(Tolerance, limits) if limits else None


def shape(text: str) -> tuple[str, tuple[int, ...]]:
    """Return the input and the shape that `NAME=1,3,224,224` says; raises SpecError."""
    name, equals, dims = text.rpartition("=")
    try:
        shape = tuple(int(dim) for dim in dims.split(",")) if dims else ()
    except ValueError:
        shape = (-1,)
    if not equals or not name or any(dim < 1 for dim in shape):
        raise SpecError("write it as NAME=1,3,224,224", f"--shape {text}")
    return name, shape


def check_report(path: Path, inputs: Iterable[Path | None]) -> None:
    """Raise CcompileError, before any work, when a report cannot stand at `path` or would destroy an input."""
    from ccompile import disk

    for other in inputs:
        if other is not None and other.resolve() == path.resolve():
            raise CcompileError(f"the report would overwrite {other}", str(path), "Choose another path.")
    if not path.parent.is_dir():
        raise CcompileError("the folder of the report does not exist", str(path.parent), "Make it first.")
    disk.probe(path)


def write_junit(path: Path, suite: str, cases: Iterable[Case]) -> None:
    """Write cases as JUnit XML, whole or not at all."""
    from ccompile import disk, junit

    disk.write_text(path, junit.text(suite, cases))


def seconds_of(text: str) -> float:
    """Return a duration such as 60, 60s, 1.5m in seconds."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        found = float(number) * unit
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise SpecError("write a time as 60s or 2m", f"--time {text}")
    return found
