"""`ccompile report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ccompile.commands.console import OK
from ccompile.commands.options import FILE
from ccompile.errors import SpecError

if TYPE_CHECKING:
    from ccompile.evidence import Evidence


@click.command("report")
@click.argument("evidence", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="Where the page goes.")
def report_command(evidence: Path, output: Path) -> int:
    """Show EVIDENCE as one HTML page that works without a network."""
    from ccompile.evidence import Evidence

    if output.resolve() == evidence.resolve():
        raise SpecError("the page would overwrite the evidence", str(output), "Choose another path.")
    write_page(Evidence.read(evidence), output)
    return OK


def write_page(evidence: Evidence, path: Path) -> None:
    """Write evidence as an HTML page, whole or not at all."""
    from ccompile import disk, page

    disk.write_text(path, page.render(evidence))
