"""`ccompile target measure`: targets made on the machine itself."""

from __future__ import annotations

from pathlib import Path

import click

from ccompile.commands.console import OK, echo, progress
from ccompile.commands.options import FILE, seconds_of
from ccompile.errors import CcompileError, SpecError


@click.group("target")
def target() -> None:
    """Make targets."""


@target.command("measure")
@click.option("-o", "--output", type=FILE, required=True, help="Where the target goes (my-target.yaml).")
@click.option("--time", "seconds", default="60s", show_default=True, help="About how long to measure: 60s, 2m.")
@click.option("--threads", type=click.IntRange(0, 1024), default=1, show_default=True, help="Threads; 0: all cores.")
@click.option(
    "--like", default="x86-64-avx512-vnni", show_default=True, help="The target to take ops, opset and types from."
)
@click.option("--only", multiple=True, metavar="KIND", help="Measure these tables alone (conv, gemm, ops, ...).")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def measure(output: Path, seconds: str, threads: int, like: str, only: tuple[str, ...], quiet: bool) -> int:
    """Measure how fast ONNX Runtime is on this machine, and write a target with what was found."""
    from ccompile import disk, measuring
    from ccompile.target import load_target

    budget, kinds = seconds_of(seconds), _kinds(only)
    base = load_target(like, Path())
    with progress(quiet) as shown:
        found, notes = measuring.measure_target(
            base, output.stem, budget, threads, kinds, lambda text: shown(text, 0, 1)
        )
    try:
        disk.write_text(output, measuring.text_of(found, budget))
    except OSError as error:
        raise CcompileError(f"cannot write: {error.strerror}", str(output), "Name another path.") from error
    if not quiet:
        for note in notes:
            echo(f"note: {note}")
        echo(f"{output}: target `{found.name}`, {found.description}")
    return OK


def _kinds(only: tuple[str, ...]) -> tuple[str, ...]:
    from ccompile.errors import nearest
    from ccompile.tables import AXES

    for kind in only:
        if kind not in AXES:
            there = nearest(kind, AXES).replace("It takes", "There are")
            raise SpecError(f"there is no table `{kind}`", "--only", there)
    return only
