"""`ccompile pack` and `ccompile unpack`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ccompile.commands.console import OK, echo, show
from ccompile.commands.options import FILE


@click.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="Where the packed model goes (OUT.ccz).")
@click.option("--against", type=FILE, help="The model before compression, whose weights the ratio counts.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def pack(model: Path, output: Path, against: Path | None, as_json: bool, quiet: bool) -> int:
    """Pack MODEL into a small file that `ccompile unpack` and `ccompile.load` give back bit for bit."""
    from ccompile import packing, packing_report

    account = packing.pack(model, output, against)
    if quiet:
        return OK
    if as_json:
        echo(json.dumps(packing_report.as_data(account), indent=1))
        return OK
    show(packing_report.account_table(account))
    for line in packing_report.account_lines(account, str(output), against is not None):
        echo(line)
    return OK


@click.command()
@click.argument("packed", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="Where the model goes.")
@click.option("--limit", type=click.IntRange(1), metavar="BYTES", help="The most that the model may take.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def unpack(packed: Path, output: Path, limit: int | None, quiet: bool) -> int:
    """Write the model that PACKED holds, every checksum compared; a damaged file exits 2 and writes nothing."""
    from ccompile import packing, report

    written = packing.unpack(packed, output, limit)
    if not quiet:
        echo(f"{output}: {report.size(written)}")
    return OK
