"""`ccompile bisect`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ccompile.commands.console import BROKEN, OK, echo, progress
from ccompile.commands.options import FILE, tolerance_of
from ccompile.errors import SpecError

if TYPE_CHECKING:
    from ccompile.bisecting import Bisected
    from ccompile.spec import Gates


@click.command()
@click.argument("model", type=FILE)
@click.option("-s", "--spec", type=FILE, required=True, help="YAML compression spec.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Change a spec value: passes.split-svd.rank=8.")
@click.option("--atol", type=float, help="Largest absolute difference of an element from the source's.")
@click.option("--rtol", type=float, help="Largest difference relative to the source's element.")
@click.option("--relative-l2", type=float, help="|a - b| / |b| of an output against the source's.")
@click.option("--cosine", type=float, help="Least cosine similarity of an output with the source's.")
@click.option("--argmax", type=float, help="Least share of rows that keep the source's largest entry.")
@click.option("--metric-drop", "drops", multiple=True, metavar="NAME=DROP", help="Largest drop of a metric: top1=0.01.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of all randomness.")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, show_default=True, help="Threads; 0: all cores.")
@click.option("--jobs", type=click.IntRange(0, 256), default=1, show_default=True, help="Processes; 0: all cores.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def bisect(
    model: Path,
    spec: Path,
    sets: tuple[str, ...],
    drops: tuple[str, ...],
    seed: int,
    threads: int,
    jobs: int,
    as_json: bool,
    quiet: bool,
    **options: float | None,
) -> int:
    """Find the step, and the site in it, that breaks a contract or a limit of MODEL under a spec; write nothing.

    Without limits here, those of the spec's gates on accuracy. Exit 0: all hold; 1: something breaks.
    """
    from ccompile import bisecting
    from ccompile.request import Request
    from ccompile.spec import load

    limits = _limits({name: value for name, value in options.items() if value is not None}, drops)
    request = Request(model, load(spec, sets), Path("nothing is written"), seed=seed, threads=threads, jobs=jobs)
    with progress(quiet) as shown:
        found = bisecting.bisect(request, limits, shown)
    if as_json and not quiet:
        echo(json.dumps({"holds": found.holds, **asdict(found)}, indent=1))
    elif not found.holds or not quiet:
        for line in _lines(found):
            echo(line, err=not found.holds)
    return OK if found.holds else BROKEN


def _limits(given: dict[str, float], drops: tuple[str, ...]) -> Gates | None:
    from ccompile.spec import Gates

    tolerance = tolerance_of(given)
    metric = dict(_drop(text) for text in drops)
    if tolerance is None and not metric:
        return None
    plain: dict[str, Any] = {} if tolerance is None else tolerance.limits()
    return Gates(**plain, metric=metric)


def _drop(text: str) -> tuple[str, dict[str, float]]:
    name, equals, number = text.rpartition("=")
    try:
        drop = float(number)
    except ValueError:
        drop = -1.0
    if not equals or not name or not 0 <= drop < float("inf"):
        raise SpecError("write it as NAME=DROP, the drop a number from 0 on", f"--metric-drop {text}")
    return name, {"drop": drop}


def _lines(found: Bisected) -> list[str]:
    if found.holds:
        return [*(f"note: {note}" for note in found.notes), "every step keeps its contract, and the result its limits"]
    head = f"step {found.step} {found.name} breaks it: {found.reason}" if found.step else found.reason
    lines = [head]
    if guilt := found.guilt:
        where = f"site {guilt.place} of {guilt.sites}, {', '.join(guilt.nodes)}"
        if guilt.alone:
            lines.append(f"{where}, breaks it alone: {guilt.reason}")
        else:
            before = f"the {guilt.place - 1} before it" if guilt.place > 2 else "the one before it"
            lines.append(f"{where}, tips it over together with {before}; alone it holds")
        lines.append(f"found by carrying out the step {guilt.tried} times")
    return [*lines, *(f"note: {note}" for note in found.notes)]
