"""`ccompile diff`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ccompile.commands.console import OK, echo, show
from ccompile.commands.options import FILE, data_options
from ccompile.errors import ModelError

if TYPE_CHECKING:
    from ccompile.diff import Given


@click.command()
@click.argument("before", type=FILE)
@click.argument("after", type=FILE)
@data_options
def diff(before: Path, after: Path, given: Given, as_json: bool) -> int:
    """Show what AFTER adds, removes, resizes and changes, and how its outputs move."""
    from ccompile import diff as diffs
    from ccompile import onnx_io, report
    from ccompile.evidence import ComparisonRecord

    changes = diffs.compare_graphs(onnx_io.load(before).model, onnx_io.load(after).model)
    record, source, why = None, "", ""
    try:
        comparison, source = diffs.compare_files(after, before, given, None)
        record = ComparisonRecord.of(comparison)
    except ModelError as error:
        if not any(change.what == "interface" for change in changes):
            raise
        why = error.problems[0].message
    if as_json:
        outputs = None if record is None else record.model_dump(mode="json")
        plain = {"changes": diffs.as_data(changes), "outputs": outputs, "data": source}
        echo(json.dumps({**plain, "why": why} if why else plain, indent=1))
        return OK
    rows = [(c.kind, c.what, c.name, " -> ".join(text for text in (c.before, c.after) if text)) for c in changes]
    show(report.table(["change", "what", "name", ""], rows, left=4) if rows else "The graphs are equal.")
    if record is None:
        echo(f"outputs cannot be compared: {why}")
    else:
        show(report.comparison_table(record, source))
    return OK
