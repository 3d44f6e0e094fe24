"""`ccompile compare`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ccompile.commands.console import BROKEN, OK, echo, show
from ccompile.commands.options import FILE


@click.command()
@click.argument("before", type=FILE)
@click.argument("after", type=FILE)
@click.option(
    "--format", "form", type=click.Choice(["text", "markdown", "json"]), default="text", show_default=True, help="Form."
)
@click.option(
    "--fail-on",
    "limits",
    multiple=True,
    metavar="KIND[=LIMIT]",
    help="Exit 1 on such a change: origin, accuracy[=0.005], cost[=0.02], gates, steps, choices. Repeatable.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def compare(before: Path, after: Path, form: str, limits: tuple[str, ...], quiet: bool) -> int:
    """Show what changed between two builds, from their evidence files: for pull requests.

    Limits: of accuracy in the metric's own unit, of cost as a share of the build before.
    """
    from ccompile import builds, builds_report
    from ccompile.evidence import Evidence

    asked = [builds.Limit.parse(text) for text in limits]
    found = builds.changes(Evidence.read(before), Evidence.read(after))
    failed = builds.failures(found, asked)
    if quiet:
        pass
    elif form == "json":
        echo(json.dumps(builds_report.as_data(found, failed), indent=1))
    elif form == "markdown":
        echo(builds_report.markdown(found, failed, (before.name, after.name)))
    else:
        show(builds_report.text(found, failed))
    for change in failed:
        echo(f"{after}: {change.kind} {change.what}: {change.before} -> {change.after}", err=True)
    return BROKEN if failed else OK
