"""`ccompile inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ccompile.commands.console import OK, echo, show
from ccompile.commands.options import FILE, seconds_of, shape


@click.command()
@click.argument("model", type=FILE)
@click.option("--target", default="generic-cpu", show_default=True, help="Name or path of the target.")
@click.option("--shape", "shapes", multiple=True, metavar="NAME=1,3,224,224", help="Shape of an input with open axes.")
@click.option("--groups", is_flag=True, help="Show the groups of coupled channels instead.")
@click.option("--measure", is_flag=True, help="Run it here, and show each layer's time beside the estimate.")
@click.option("--threads", type=click.IntRange(0, 1024), default=1, show_default=True, help="For --measure; 0: all.")
@click.option("--time", "seconds", default="3s", show_default=True, help="For --measure: about how long, 10s, 1m.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(
    model: Path,
    target: str,
    shapes: tuple[str, ...],
    groups: bool,
    measure: bool,
    threads: int,
    seconds: str,
    as_json: bool,
) -> int:
    """Show what each op and layer costs, which passes could act there, and why others not.

    With --groups: which channels must be removed together, the layers that make and read them, and what pins them.
    With --measure: how long each layer takes on this machine, beside what the target says of it.
    """
    from dataclasses import asdict

    from ccompile import report
    from ccompile.inspection import inspect_groups, inspect_model, measure_model
    from ccompile.target import load_target

    if groups:
        coupling = inspect_groups(model)
        if as_json:
            echo(json.dumps(asdict(coupling), indent=1))
        else:
            show(report.groups_table(coupling))
        return OK
    if measure:
        given, budget = dict(shape(text) for text in shapes), seconds_of(seconds)
        taken = measure_model(model, load_target(target, Path()), given, threads, budget)
        if as_json:
            echo(json.dumps({"target": target, **asdict(taken), "near": taken.near}, indent=1))
        else:
            show(report.measured_table(taken, target))
        return OK
    found = inspect_model(model, load_target(target, Path()), dict(shape(text) for text in shapes))
    if as_json:
        echo(json.dumps({"target": target, **asdict(found)}, indent=1))
    else:
        show(report.inspect_table(found.cost, found.acts, target, found.notes))
    return OK
