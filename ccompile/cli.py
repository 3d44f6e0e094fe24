"""The command line. The only file that prints or exits; everything heavy is imported where it is used."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ccompile import __version__
from ccompile.errors import CcompileError, ModelError, SpecError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from ccompile.diff import Given
    from ccompile.pipeline import Progress
    from ccompile.tolerance import Tolerance

OK, BROKEN, WRONG, BUG, INTERRUPTED = 0, 1, 2, 70, 130
_FILE = click.Path(path_type=Path)


class _DefaultToCompile(click.Group):
    """`ccompile MODEL -s SPEC -o OUT` is the compile; a known first word is a subcommand."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            _refuse_misspelt(args[0], self.commands)
            args = ["compile", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("--help", "--version", "-h"):
            args = ["compile", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage("ccompile", "MODEL -s SPEC -o OUT [OPTIONS]")
        formatter.write_usage("ccompile", "COMMAND [ARGS]...")


def _refuse_misspelt(word: str, commands: Collection[str]) -> None:
    """Refuse a first word that is no file and looks like a command (`insepct`)."""
    from difflib import get_close_matches

    near = get_close_matches(word, commands, n=1, cutoff=0.7)
    if near and not Path(word).exists():
        raise click.UsageError(f"There is no file and no command `{word}`. Did you mean `{near[0]}`?")


@click.group(cls=_DefaultToCompile, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(__version__, prog_name="ccompile")
def cli() -> None:
    """Compile an ONNX model to a smaller and faster one under a YAML spec, verified after every pass.

    \b
        ccompile model.onnx -s spec.yaml -o out.onnx

    \b
    Exit codes: 0 done, every contract and gate held; 1 a contract or gate broke (no model is
    written, the evidence says which); 2 the spec, the model, the data or the command line is
    wrong; 130 interrupted; 70 ccompile itself failed.
    """  # noqa: D301  (click wants a real \\b)


@cli.command("compile")
@click.argument("model", type=_FILE)
@click.option("-s", "--spec", type=_FILE, required=True, help="YAML compression spec.")
@click.option("-o", "--output", type=_FILE, required=True, help="Where the compiled model goes.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Change a spec value: passes.split-svd.rank=8.")
@click.option("--dump", type=_FILE, metavar="DIR", help="Write the model after each step into DIR.")
@click.option("--evidence", type=_FILE, metavar="FILE", help="Where the evidence goes [OUT.evidence.json].")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of all randomness.")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, show_default=True, help="Threads; 0: all cores.")
@click.option(
    "--jobs",
    type=click.IntRange(0, 256),
    default=1,
    show_default=True,
    help="Processes for work on layers; 0: all cores.",
)
@click.option("--measure", is_flag=True, help="Race the result against the source on this machine.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("-v", "--verbose", is_flag=True, help="Print every site and every skip with its reason.")
def compile_command(
    model: Path,
    spec: Path,
    output: Path,
    sets: tuple[str, ...],
    dump: Path | None,
    evidence: Path | None,
    seed: int,
    threads: int,
    jobs: int,
    measure: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    """Compile MODEL under a spec (the default command)."""
    from ccompile import pipeline, report
    from ccompile.request import Request
    from ccompile.spec import load

    request = Request(model, load(spec, sets), output, evidence, dump, seed, threads, measure, jobs)
    with _progress(quiet) as progress:
        result = pipeline.compile_model(request, progress)
    if not quiet:
        if verbose:
            _echo(report.evidence_summary(result))
        _show(report.evidence_table(result))
    failed = result.verdict == "failed"
    for line in report.verdict_lines(result, str(output), str(request.evidence_path)):
        if failed or not quiet:
            _echo(line, err=failed)
    return BROKEN if failed else OK


@cli.command()
@click.argument("model", type=_FILE)
@click.option("--target", default="generic-cpu", show_default=True, help="Name or path of the target.")
@click.option("--shape", "shapes", multiple=True, metavar="NAME=1,3,224,224", help="Shape of an input with open axes.")
@click.option("--groups", is_flag=True, help="Show the groups of coupled channels instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(model: Path, target: str, shapes: tuple[str, ...], groups: bool, as_json: bool) -> int:
    """Show what each op and layer costs, which passes could act there, and why others not.

    With --groups: which channels must be removed together, the layers that make and read them, and what pins them.
    """
    from dataclasses import asdict

    from ccompile import report
    from ccompile.inspection import inspect_groups, inspect_model
    from ccompile.target import load_target

    if groups:
        coupling = inspect_groups(model)
        if as_json:
            _echo(json.dumps(asdict(coupling), indent=1))
        else:
            _show(report.groups_table(coupling))
        return OK
    found = inspect_model(model, load_target(target, Path()), dict(_shape(text) for text in shapes))
    if as_json:
        _echo(json.dumps({"target": target, **asdict(found)}, indent=1))
    else:
        _show(report.inspect_table(found.cost, found.acts, target, found.notes))
    return OK


@cli.command("passes")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def passes_command(name: str | None, as_json: bool) -> int:
    """List the passes, or show the reference page of one."""
    from ccompile import registry, report

    kinds = registry.passes() if name is None else {name: registry.find(name)}
    if as_json:
        data = {
            known: {
                "contract": kind.kind,
                "after": kind.after,
                "doc": registry.doc_of(kind),
                "options": kind.model_json_schema(),
            }
            for known, kind in kinds.items()
        }
        _echo(json.dumps(data, indent=1))
    elif name is not None:
        _echo(report.pass_page(kinds[name]))
    else:
        rows = [(known, kind.kind, registry.doc_of(kind).splitlines()[0]) for known, kind in kinds.items()]
        _show(report.table(["pass", "contract", "what it does"], rows, left=3))
    return OK


@cli.command()
def schema() -> int:
    """Print the JSON Schema of specs, for editors."""
    from ccompile.spec import schema as build

    _echo(json.dumps(build(), indent=1))
    return OK


def _data_options(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command the options of `Given`, which it takes as `given`."""

    @functools.wraps(command)
    def with_given(
        data: Path | None, samples: int | None, seed: int, shapes: tuple[str, ...], threads: int, **others: Any
    ) -> int:
        from ccompile.diff import Given

        return command(given=Given(data, samples, seed, dict(_shape(text) for text in shapes), threads), **others)

    found: Callable[..., int] = with_given
    for option in (
        click.option("--data", type=_FILE, help="An .npz by input name, or a folder of test_data_set_*."),
        click.option("--samples", type=click.IntRange(1), help="Use this many samples [all, or 16 synthetic ones]."),
        click.option(
            "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Synthetic inputs."
        ),
        click.option("--shape", "shapes", multiple=True, metavar="NAME=1,3,224,224", help="Synthetic input shapes."),
        click.option("--threads", type=click.IntRange(0, 1024), default=0, show_default=True, help="0: all cores."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    ):
        found = option(found)
    return found


@cli.command()
@click.argument("before", type=_FILE)
@click.argument("after", type=_FILE)
@_data_options
def diff(before: Path, after: Path, given: Given, as_json: bool) -> int:
    """Show what AFTER adds, removes, resizes and changes, and how its outputs move."""
    from ccompile import diff as diffs
    from ccompile import graph, report
    from ccompile.evidence import ComparisonRecord

    changes = diffs.compare_graphs(graph.load(before).model, graph.load(after).model)
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
        _echo(json.dumps({**plain, "why": why} if why else plain, indent=1))
        return OK
    rows = [(c.kind, c.what, c.name, " -> ".join(text for text in (c.before, c.after) if text)) for c in changes]
    _show(report.table(["change", "what", "name", ""], rows, left=4) if rows else "The graphs are equal.")
    if record is None:
        _echo(f"outputs cannot be compared: {why}")
    else:
        _show(report.comparison_table(record, source))
    return OK


@cli.command()
@click.argument("output", type=_FILE)
@click.option("--against", type=_FILE, required=True, help="The model it was compiled from.")
@click.option("--atol", type=float, help="Largest absolute difference of an element.")
@click.option("--rtol", type=float, help="Largest difference relative to the reference element.")
@click.option("--relative-l2", type=float, help="|a - b| / |b| of an output.")
@click.option("--cosine", type=float, help="Least cosine similarity of an output.")
@click.option("--argmax", type=float, help="Least share of rows that keep their largest entry.")
@_data_options
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
    tolerance = _tolerance({name: value for name, value in limits.items() if value is not None})
    comparison, source = compare_files(output, against, given, tolerance)
    broken = comparison.exact_violations() if tolerance is None else comparison.violations(tolerance)
    record = ComparisonRecord.of(comparison)
    if as_json:
        plain = {"holds": not broken, "broken": broken, "outputs": record.model_dump(mode="json"), "data": source}
        _echo(json.dumps(plain, indent=1))
    else:
        _show(report.comparison_table(record, source))
    for name, found in broken.items():
        _echo(f"{output}: output `{name}`: {'; '.join(found)}", err=True)
    if broken and comparison.needed is not None:
        _echo(f"Limits that would each have passed: {comparison.needed}", err=True)
    return BROKEN if broken else OK


@cli.command()
@click.argument("model", type=_FILE)
@click.option("-o", "--output", type=_FILE, required=True, help="Where the packed model goes (OUT.ccz).")
@click.option("--against", type=_FILE, help="The model before compression, whose weights the ratio counts.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def pack(model: Path, output: Path, against: Path | None, as_json: bool) -> int:
    """Pack MODEL into a small file that `ccompile unpack` and `ccompile.load` give back bit for bit."""
    from ccompile import packing, packing_report

    account = packing.pack(model, output, against)
    if as_json:
        _echo(json.dumps(packing_report.as_data(account), indent=1))
        return OK
    _show(packing_report.account_table(account))
    for line in packing_report.account_lines(account, str(output), against is not None):
        _echo(line)
    return OK


@cli.command()
@click.argument("packed", type=_FILE)
@click.option("-o", "--output", type=_FILE, required=True, help="Where the model goes.")
@click.option("--limit", type=click.IntRange(1), metavar="BYTES", help="The most that the model may take.")
def unpack(packed: Path, output: Path, limit: int | None) -> int:
    """Write the model that PACKED holds, every checksum compared; a damaged file exits 2 and writes nothing."""
    from ccompile import packing, report

    _echo(f"{output}: {report.size(packing.unpack(packed, output, limit))}")
    return OK


@cli.group("target")
def target_group() -> None:
    """Make targets."""


@target_group.command("measure")
@click.option("-o", "--output", type=_FILE, required=True, help="Where the target goes (my-target.yaml).")
@click.option("--time", "seconds", default="60s", show_default=True, help="About how long to measure: 60s, 2m.")
@click.option("--threads", type=click.IntRange(0, 1024), default=1, show_default=True, help="Threads; 0: all cores.")
@click.option(
    "--like", default="x86-64-avx512-vnni", show_default=True, help="The target to take ops, opset and types from."
)
@click.option("--only", multiple=True, metavar="KIND", help="Measure these tables alone (conv, gemm, ops, ...).")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def target_measure(output: Path, seconds: str, threads: int, like: str, only: tuple[str, ...], quiet: bool) -> int:
    """Measure how fast ONNX Runtime is on this machine, and write a target with what was found."""
    from ccompile import disk, measuring
    from ccompile.target import load_target

    budget, kinds = _seconds(seconds), _kinds(only)
    base = load_target(like, Path())
    with _progress(quiet) as progress:
        found, notes = measuring.measure_target(
            base, output.stem, budget, threads, kinds, lambda text: progress(text, 0, 1)
        )
    try:
        disk.write_text(output, measuring.text_of(found, budget))
    except OSError as error:
        raise CcompileError(f"cannot write: {error.strerror}", str(output), "Name another path.") from error
    if not quiet:
        for note in notes:
            _echo(f"note: {note}")
        _echo(f"{output}: target `{found.name}`, {found.description}")
    return OK


def _seconds(text: str) -> float:
    """Return a duration such as 60, 60s, 1.5m in seconds."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        found = float(number) * unit
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise SpecError("write a time as 60s or 2m", f"--time {text}")
    return found


def _kinds(only: tuple[str, ...]) -> tuple[str, ...]:
    from ccompile.errors import nearest
    from ccompile.tables import AXES

    for kind in only:
        if kind not in AXES:
            there = nearest(kind, AXES).replace("It takes", "There are")
            raise SpecError(f"there is no table `{kind}`", "--only", there)
    return only


def _tolerance(limits: dict[str, float]) -> Tolerance | None:
    from ccompile.tolerance import Tolerance
    from ccompile.validation import from_options

    return from_options(Tolerance, limits) if limits else None


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, equals, dims = text.rpartition("=")
    try:
        shape = tuple(int(dim) for dim in dims.split(",")) if dims else ()
    except ValueError:
        shape = (-1,)
    if not equals or not name or any(dim < 1 for dim in shape):
        raise SpecError("write it as NAME=1,3,224,224", f"--shape {text}")
    return name, shape


def _console(err: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 240, highlight=False)


def _echo(text: str, err: bool = False) -> None:
    """Print; when the reader has gone (`| head`) the rest is dropped, and the verdict stands."""
    try:
        click.echo(text, err=err)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if err else sys.stdout).fileno())


def _show(what: RenderableType) -> None:
    console = _console()
    if console.is_terminal:
        console.print(what)
        return
    with console.capture() as captured:
        console.print(what)
    _echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """Yield what shows progress: a bar on a terminal, nothing elsewhere."""
    console = _console(err=True)
    if quiet or not console.is_terminal:
        yield lambda text, done, total: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (started with >&-)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    try:
        code = cli.main(list(arguments) if arguments is not None else None, "ccompile", standalone_mode=False)
        sys.stdout.flush()
    except CcompileError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except click.exceptions.Exit as done:
        code = done.exit_code
    except click.ClickException as error:
        error.show()
        code = WRONG
    except (KeyboardInterrupt, click.exceptions.Abort):
        click.echo("interrupted: the output is the previous one, or whole", err=True)
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    except OSError as error:
        click.echo(f"error: {error.filename or 'standard output'}: {error.strerror or error}", err=True)
        code = WRONG
    except MemoryError:
        click.echo("error: out of memory: nothing was written", err=True)
        code = WRONG
    except Exception:  # noqa: BLE001  (the last frame: a bug of ours must not look like exit 1)
        import traceback

        traceback.print_exc()
        click.echo("ccompile itself failed: please report this with the lines above", err=True)
        code = BUG
    sys.exit(code or OK)


if __name__ == "__main__":
    main()
