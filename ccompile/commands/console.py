"""Exit codes, and all that commands print: on a terminal with colours and a progress bar, elsewhere as plain text."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from ccompile.running import Progress

OK, BROKEN, WRONG, BUG = 0, 1, 2, 70


def _console(err: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 240, highlight=False)


def echo(text: str, err: bool = False) -> None:
    """Print; when the reader has gone (`| head`) the rest is dropped, and the verdict stands."""
    try:
        click.echo(text, err=err)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if err else sys.stdout).fileno())


def show(what: RenderableType) -> None:
    """Print a table or text: as wide as the terminal there, 240 columns and without trailing blanks elsewhere."""
    console = _console()
    if console.is_terminal:
        console.print(what)
        return
    with console.capture() as captured:
        console.print(what)
    echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Progress]:
    """Yield what shows progress: a bar on a terminal, nothing elsewhere."""
    console = _console(err=True)
    if quiet or not console.is_terminal:
        yield lambda text, done, total: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from ccompile.commands.remaining import Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    left = Remaining()
    with Progress(
        *columns, TimeElapsedColumn(), TextColumn("{task.fields[left]}"), console=console, transient=True
    ) as bar:
        task = bar.add_task("starting", total=None, left="")
        yield lambda text, done, total: bar.update(
            task, description=text, completed=done, total=total, left=left.of(text)
        )
