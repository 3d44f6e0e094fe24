"""`ccompile check`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ccompile.commands.console import BROKEN, OK, echo, show
from ccompile.commands.options import FILE, check_report, data_options, tolerance_of, write_junit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ccompile.cases import Case
    from ccompile.diff import Given
    from ccompile.evidence import Evidence
    from ccompile.spec import Spec

_ALONE = ("samples", "seed", "shapes")  # what evidence says already
_WITH_EVIDENCE = ("spec", "timing", "slower", "optimisation", "metric_drop", "other_data", "rejudge", "junit", "sets")


@click.command()
@click.argument("output", type=FILE)
@click.option("--evidence", type=FILE, help="What its compile recorded: OUT.evidence.json.")
@click.option("--against", type=FILE, help="The model it was compiled from.")
@click.option("-s", "--spec", type=FILE, help="The spec it was compiled under: says where the data are.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Change a spec value, as at the compile.")
@click.option("--atol", type=float, help="Largest absolute difference of an element.")
@click.option("--rtol", type=float, help="Largest difference relative to the reference element.")
@click.option("--relative-l2", type=float, help="|a - b| / |b| of an output.")
@click.option("--cosine", type=float, help="Least cosine similarity of an output.")
@click.option("--argmax", type=float, help="Least share of rows that keep their largest entry.")
@click.option("--metric-drop", type=click.FloatRange(0), help="Largest drop of a recorded metric [0.002].")
@click.option("--timing", is_flag=True, help="Time it: in turns with --against, else against the recorded time.")
@click.option(
    "--slower", type=click.FloatRange(0), help="Share of speed that may be lost [0.1; 0.5 without --against]."
)
@click.option(
    "--optimisation",
    type=click.Choice(["none", "basic", "extended", "all"]),
    help="Run it at this level of ONNX Runtime's optimisations [none].",
)
@click.option("--other-data", is_flag=True, help="The samples need not be those recorded, only like them.")
@click.option("--rejudge", is_flag=True, help="Run nothing: judge what was recorded by other limits.")
@click.option("--junit", type=FILE, metavar="FILE", help="Write a JUnit XML file: a case per thing judged.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@data_options
@click.pass_context
def check(context: click.Context, /, given: Given, as_json: bool, quiet: bool, **options: Any) -> int:
    """Judge OUTPUT by the evidence of its compile, or compare it with another model; exit 1 when something broke.

    With --evidence: the file, its inputs, outputs, metrics, cost and gates of today against those recorded. The limits
    then say how far outputs may be from the recorded ones; with --rejudge they are gates on what was recorded.

    With --against alone: outputs on real or seeded inputs. Without any limit only float reordering is allowed.
    """
    names = ("atol", "rtol", "relative_l2", "cosine", "argmax")
    limits = {name: value for name in names if (value := options.pop(name)) is not None}
    _refuse_idle(context, options["evidence"] is not None, options["rejudge"])
    if options["evidence"] is None:
        if options["against"] is None:
            raise click.UsageError("Give --evidence OUT.evidence.json, or --against MODEL, or both.")
        return _compare(context.params["output"], options["against"], limits, given, as_json, quiet)
    return _judge(limits, given, as_json, quiet, **options)


def _refuse_idle(context: click.Context, evidence: bool, rejudge: bool) -> None:
    """Refuse options that would do nothing."""
    idle: tuple[str, ...] = _ALONE if evidence else _WITH_EVIDENCE
    if evidence and rejudge:
        idle = (*_ALONE, "against", "data", "timing", "slower", "optimisation", "metric_drop", "other_data", "threads")
    why = "without --evidence" if not evidence else "when nothing is run" if rejudge else "with --evidence"
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in idle and context.get_parameter_source(name) != ParameterSource.DEFAULT:
            raise click.UsageError(f"{parameter.opts[-1]} means nothing {why}.")


def _compare(output: Path, against: Path, limits: dict[str, float], given: Given, as_json: bool, quiet: bool) -> int:
    from ccompile import report
    from ccompile.diff import compare_files
    from ccompile.evidence import ComparisonRecord

    tolerance = tolerance_of(limits)
    comparison, source = compare_files(output, against, given, tolerance)
    broken = comparison.exact_violations() if tolerance is None else comparison.violations(tolerance)
    record = ComparisonRecord.of(comparison)
    if as_json and not quiet:
        plain = {"holds": not broken, "broken": broken, "outputs": record.model_dump(mode="json"), "data": source}
        echo(json.dumps(plain, indent=1))
    elif not quiet:
        show(report.comparison_table(record, source))
    for name, found in broken.items():
        echo(f"{output}: output `{name}`: {'; '.join(found)}", err=True)
    if broken and comparison.needed is not None:
        echo(f"Limits that would each have passed: {comparison.needed}", err=True)
    return BROKEN if broken else OK


def _judge(
    limits: dict[str, float],
    given: Given,
    as_json: bool,
    quiet: bool,
    *,
    output: Path,
    evidence: Path,
    spec: Path | None,
    sets: tuple[str, ...],
    junit: Path | None,
    rejudge: bool,
    **options: Any,
) -> int:
    from ccompile import spec as specs
    from ccompile.evidence import Evidence

    if junit is not None:
        check_report(junit, (output, evidence, spec, options["against"], given.data))
    read = Evidence.read(evidence)
    loaded = specs.load(spec, sets) if spec is not None else None
    found: tuple[Sequence[Case], str, Sequence[str]]
    if rejudge:
        found = _rejudged(read, loaded, limits), read.verification.source, ()
    else:
        found = _today(read, loaded, limits, given, output, evidence.parent, **options)
    cases, data, notes = found
    if junit is not None:
        write_junit(junit, f"ccompile check {output.name}", cases)
    broken = [case for case in cases if case.verdict == "broken"]
    if as_json and not quiet:
        plain = {"holds": not broken, "cases": [asdict(case) for case in cases], "data": data, "notes": notes}
        echo(json.dumps(plain, indent=1))
    elif not quiet:
        _show_cases(cases, data, notes)
    for case in broken:
        echo(f"{output}: {case}", err=True)
    return BROKEN if broken else OK


def _rejudged(evidence: Evidence, spec: Spec | None, limits: dict[str, float]) -> Sequence[Case]:
    from ccompile.cases import rejudged

    tolerance_of(limits)  # refuses limits that promise nothing
    return rejudged(evidence, spec.passes if spec else None, spec.gates if spec else None, limits)


def _today(
    evidence: Evidence,
    spec: Spec | None,
    limits: dict[str, float],
    given: Given,
    output: Path,
    base: Path,
    *,
    against: Path | None,
    metric_drop: float | None,
    optimisation: Any,
    **options: Any,
) -> tuple[Sequence[Case], str, Sequence[str]]:
    from ccompile.checks.today import METRIC_DROP, Check, check_build

    asked = Check(
        output,
        evidence,
        base,
        against,
        spec,
        given.data,
        tolerance_of(limits),
        METRIC_DROP if metric_drop is None else metric_drop,
        threads=given.threads,
        level=optimisation or "none",
        **options,
    )
    found = check_build(asked)
    return found.cases, found.data, found.notes


def _show_cases(cases: Sequence[Case], data: str, notes: Sequence[str]) -> None:
    from ccompile import report

    show(report.cases_table(cases))
    for note in notes:
        echo(f"note: {note}")
    echo(f"judged on {data}")
