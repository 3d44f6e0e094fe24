"""`ccompile check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ccompile.commands.console import BROKEN, OK, echo, show
from ccompile.commands.options import FILE, data_options, tolerance_of

if TYPE_CHECKING:
    from ccompile.diff import Given


@click.command()
@click.argument("output", type=FILE)
@click.option("--against", type=FILE, required=True, help="The model it was compiled from.")
@click.option("--atol", type=float, help="Largest absolute difference of an element.")
@click.option("--rtol", type=float, help="Largest difference relative to the reference element.")
@click.option("--relative-l2", type=float, help="|a - b| / |b| of an output.")
@click.option("--cosine", type=float, help="Least cosine similarity of an output.")
@click.option("--argmax", type=float, help="Least share of rows that keep their largest entry.")
@data_options
def check(
    output: Path,
    against: Path,
    atol: float | None,
    rtol: float | None,
    relative_l2: float | None,
    cosine: float | None,
    argmax: float | None,
    given: Given,
    as_json: bool,
) -> int:
    """Compare OUTPUT with another model on real or seeded inputs; exit 1 when it leaves the tolerance.

    Without any tolerance only float reordering is allowed.
    """
    from ccompile import report
    from ccompile.diff import compare_files
    from ccompile.evidence import ComparisonRecord

    limits = {"atol": atol, "rtol": rtol, "relative_l2": relative_l2, "cosine": cosine, "argmax": argmax}
    tolerance = tolerance_of({name: value for name, value in limits.items() if value is not None})
    comparison, source = compare_files(output, against, given, tolerance)
    broken = comparison.exact_violations() if tolerance is None else comparison.violations(tolerance)
    record = ComparisonRecord.of(comparison)
    if as_json:
        plain = {"holds": not broken, "broken": broken, "outputs": record.model_dump(mode="json"), "data": source}
        echo(json.dumps(plain, indent=1))
    else:
        show(report.comparison_table(record, source))
    for name, found in broken.items():
        echo(f"{output}: output `{name}`: {'; '.join(found)}", err=True)
    if broken and comparison.needed is not None:
        echo(f"Limits that would each have passed: {comparison.needed}", err=True)
    return BROKEN if broken else OK
