"""Accuracy against cost, and against measured seconds, of several techniques.

    python bench/curves.py MODEL.onnx --calibration calib.npz --verification test.npz [--labels label] [--samples N]
        [--shares 0.9,0.75,0.5] [--techniques prune-channels:inner,prune-channels:inner:l1,split-spatial,allocate]
        [--step 'LABEL={prune-channels: {keep: @, coupled: false}}'] [--repair] [--measure] [-o table.md]

One compile per point, one thread. A technique is a pass that spends a budget, here a share of the source's `--budget`
(macs, params, ...), and words that change it:

    inner, coupled                          prune-channels: groups of one producer and one reader only, or residual
                                            spines too (its default)
    l1 l2 random activation geometric-median  prune-channels: this criterion, and no refit, as usually published
    refit                                   prune-channels: this criterion, but with the refit
    repair                                  a `repair` step behind it
    align16                                 prune-channels: channels kept in multiples of 16 (or any number)
    macs, params, stored_bytes, seconds     this budget instead of `--budget`

`allocate` weighs the techniques of `--among`. `--step` adds any steps: YAML, with @ for the share. Prints a Markdown
table (rows: shares; columns: techniques; top-1 in percent, or without labels the share of samples that keep the
source's class; the share of the cost in brackets where it is not the one asked for), then what each name stands for.
With `--measure`, also how many times faster than the source one sample runs: both in turns, the median of the ratios
and its quartiles.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccompile import onnx_io, pipeline, runtime
from ccompile.data import open_data
from ccompile.errors import CcompileError
from ccompile.request import Request
from ccompile.spec import parse

AMONG = "prune-channels,split-svd,split-spatial,split-tucker"
CRITERIA = ("l1", "l2", "random", "activation", "geometric-median")
BUDGETS = ("macs", "params", "stored_bytes", "resident_bytes", "seconds")
FREE = {"relative_l2": 1e9}  # a curve has no contract to break


@dataclass(frozen=True)
class Point:
    """What came out at one share: quality in percent, the cost's share, the speed-up with its quartiles."""

    quality: float
    cost: float
    seconds: float
    speed: tuple[float, float, float] | None = None


def steps_of(technique: str, share: float | str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the passes that a technique's words stand for. Raises SystemExit for a word that is none."""
    name, *words = technique.split(":")
    what = next((word for word in words if word in BUDGETS), given.budget)
    options: dict[str, Any] = {"budget" if name == "allocate" else "keep": {what: share}, "tolerance": FREE}
    if name == "allocate":
        options["among"] = given.among.split(",")
    for word in words:
        if word in ("inner", "coupled"):
            options["coupled"] = word == "coupled"
        elif word in CRITERIA:
            options |= {"criterion": word, "refit": "all" if "refit" in words else "none"}
        elif word.startswith("align") and word[5:].isdigit():
            options["align"] = int(word[5:])
        elif word not in ("refit", "repair", *BUDGETS):
            raise SystemExit(f"{technique}: there is no word `{word}`")
    repaired = given.repair or "repair" in words
    return [{name: options}] + ([{"repair": {"tolerance": FREE}}] if repaired else [])


def settings(label: str, share: float | str, given: argparse.Namespace) -> str:
    """Return the passes of a column as one line of YAML."""
    if label in given.own:
        return str(given.own[label].replace("@", str(share)))
    return ", ".join(json.dumps(step).replace('"', "") for step in steps_of(label, share, given))


def spec_of(passes: str, given: argparse.Namespace) -> str:
    labels = f", labels: {given.labels}" if given.labels else ""
    verification = f"npz: {json.dumps(str(given.verification.resolve()))}{labels}, batch: {given.batch}"
    samples = f", samples: {given.samples}" if given.samples else ""
    calibrated = f", samples: {given.calibration_samples}" if given.calibration_samples else ""
    return "\n".join(
        (
            "version: 1",
            f"target: {given.target}",
            "data:",
            f"  calibration: {{npz: {json.dumps(str(given.calibration.resolve()))}, batch: 64{calibrated}}}",
            f"  verification: {{{verification}{samples}}}",
            f"passes: [{passes}]",
        )
    )


def measured(label: str, share: float, given: argparse.Namespace, out: Path) -> Point | str:
    """Return the point of one compile, or why there is none."""
    spec = parse(spec_of(settings(label, share, given), given), label)
    start = time.perf_counter()
    try:
        evidence = pipeline.compile_model(Request(given.model, spec, out, threads=1))
    except CcompileError as error:
        return str(error).splitlines()[0]
    seconds = time.perf_counter() - start
    if evidence.verdict != "ok":
        return evidence.reason.splitlines()[0]
    last = evidence.steps[-1]
    agreement = last.against_source.outputs[0].argmax if last.against_source is not None else None
    found = last.metrics.get("top1", agreement)
    assert last.cost is not None
    what = next((word for word in label.split(":") if word in BUDGETS), given.budget)
    cost = getattr(last.cost, what) / getattr(evidence.source_cost, what)
    speed = raced(out, spec, given) if given.measure else None
    return Point(100 * (float("nan") if found is None else found), cost, seconds, speed)


def raced(path: Path, spec: Any, given: argparse.Namespace) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile of how many times faster than the source one sample runs."""
    source = onnx_io.load(given.model).model
    first = next(iter(open_data(spec.data, source, spec.base, 0).verification.batches()))
    timing = runtime.race(onnx_io.load(path).model, source, runtime.one_sample(first.feeds, source)[0], threads=1)
    return timing.low, timing.ratio, timing.high


def source_quality(given: argparse.Namespace) -> float:
    """Return the source's quality in percent."""
    if not given.labels:
        return 100.0
    with tempfile.TemporaryDirectory() as folder:
        spec = parse(spec_of("tidy-graph", given), "source")
        evidence = pipeline.compile_model(Request(given.model, spec, Path(folder) / "source.onnx", threads=1))
    return 100 * (evidence.source_metrics.get("top1") or float("nan"))


def rows(title: str, columns: list[str], lines: list[tuple[str, list[str]]]) -> list[str]:
    head = [f"| {' | '.join([title, *columns])} |", "|---" * (len(columns) + 1) + "|"]
    return head + [f"| {' | '.join([name, *cells])} |" for name, cells in lines] + [""]


def shown(point: Point | str, share: float) -> str:
    if isinstance(point, str):
        return "-"
    return f"{point.quality:.2f}" + (f" ({point.cost:.3f})" if abs(point.cost - share) > 0.005 else "")


def faster(point: Point | str) -> str:
    if isinstance(point, str) or point.speed is None:
        return "-"
    low, middle, high = point.speed
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def report(points: dict[tuple[float, str], Point | str], columns: list[str], given: argparse.Namespace) -> list[str]:
    """Return the lines of the tables, the settings, and the points that could not be made."""
    shares = list(dict.fromkeys(share for share, _ in points))
    what = "top-1 %" if given.labels else "same class %"
    lines = [f"{given.model.name}: {what}, source {source_quality(given):.2f}", ""]
    cells = [(f"{share:g}", [shown(points[share, name], share) for name in columns]) for share in shares]
    lines += rows(f"share of {given.budget}", columns, cells)
    if given.measure:
        lines += ["times faster than the source, one sample, one thread: median [quartiles]", ""]
        cells = [(f"{share:g}", [faster(points[share, name]) for name in columns]) for share in shares]
        lines += rows(f"share of {given.budget}", columns, cells)
    lines += [f"- `{name}`: `{settings(name, '@', given)}`" for name in columns]
    lines += [f"- no {name} at {share:g}: {point}" for (share, name), point in points.items() if isinstance(point, str)]
    return lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--verification", type=Path, required=True)
    parser.add_argument("--labels", help="key of the labels in the verification file")
    parser.add_argument("--samples", type=int, help="first verification samples only")
    parser.add_argument("--calibration-samples", type=int)
    parser.add_argument("--batch", type=int, default=250, help="of verification")
    parser.add_argument("--target", default="generic-cpu")
    parser.add_argument("--shares", default="0.9,0.75,0.5")
    parser.add_argument("--budget", default="macs", choices=BUDGETS)
    parser.add_argument("--techniques", default="", help="comma separated")
    parser.add_argument("--among", default=AMONG, help="what allocate weighs")
    parser.add_argument("--step", action="append", default=[], help="LABEL=YAML, @ is the share")
    parser.add_argument("--repair", action="store_true", help="a repair step behind each")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--keep", type=Path, help="folder for the compiled models")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    given.own = dict(step.split("=", 1) for step in given.step)
    return given


def main() -> None:
    given = arguments()
    columns = [*filter(None, given.techniques.split(",")), *given.own]
    points: dict[tuple[float, str], Point | str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        for share in map(float, given.shares.split(",")):
            for name in columns:
                out = folder / f"{given.model.stem}_{name.replace(':', '-')}_{share:g}.onnx"
                point = points[share, name] = measured(name, share, given, out)
                seconds = "" if isinstance(point, str) else f", {point.seconds:.0f} s"
                print(f"{share:g} {name}: {shown(point, share)} {faster(point)}{seconds}", file=sys.stderr, flush=True)
    text = "\n".join(report(points, columns, given)) + "\n"
    print(text, end="")
    if given.output is not None:
        given.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
