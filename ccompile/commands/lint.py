"""`ccompile lint`."""

from __future__ import annotations

from pathlib import Path

import click

from ccompile.commands.console import OK, WRONG, echo
from ccompile.commands.options import FILE
from ccompile.errors import CcompileError


@click.command()
@click.argument("specs", type=FILE, nargs=-1, required=True)
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def lint(specs: tuple[Path, ...], quiet: bool) -> int:
    """Check SPECS, without any model: every mistake in all of them with its line, exit 2 when there is one."""
    from ccompile.spec import load

    code = OK
    for path in specs:
        try:
            found = load(path)
        except CcompileError as error:
            echo(f"error: {error}", err=True)
            code = WRONG
        else:
            steps = len(found.passes)
            told = f"{path}: {steps} {'steps' if steps > 1 else 'step'} for {found.target.name}"
            if not quiet:
                echo(told)
    return code
