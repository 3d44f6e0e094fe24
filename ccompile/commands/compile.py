"""`ccompile MODEL -s SPEC -o OUT`, the default command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ccompile.commands.cache import cache_options, tell_cache
from ccompile.commands.console import BROKEN, OK, echo, progress, show
from ccompile.commands.options import FILE, lock_options, write_junit
from ccompile.commands.report import write_page

if TYPE_CHECKING:
    from ccompile.caching import Cache


@click.command("compile")
@click.argument("model", type=FILE)
@click.option("-s", "--spec", type=FILE, required=True, help="YAML compression spec.")
@click.option("-o", "--output", type=FILE, required=True, help="Where the compiled model goes.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Change a spec value: passes.split-svd.rank=8.")
@click.option("--dump", type=FILE, metavar="DIR", help="Write the model after each step into DIR.")
@click.option("--evidence", type=FILE, metavar="FILE", help="Where the evidence goes [OUT.evidence.json].")
@click.option("--report", "page", type=FILE, metavar="FILE", help="Write the evidence as an HTML page, too.")
@click.option("--junit", type=FILE, metavar="FILE", help="Write a JUnit XML file: a case per contract and gate.")
@click.option("--depfile", type=FILE, metavar="FILE", help="Write what was read, for Make, Ninja and CMake.")
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
@cache_options
@lock_options
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("-v", "--verbose", is_flag=True, help="Print every site and every skip with its reason.")
def compile_command(
    model: Path,
    spec: Path,
    output: Path,
    sets: tuple[str, ...],
    dump: Path | None,
    evidence: Path | None,
    page: Path | None,
    junit: Path | None,
    depfile: Path | None,
    seed: int,
    threads: int,
    jobs: int,
    measure: bool,
    quiet: bool,
    verbose: bool,
    cache: Cache,
    lock: tuple[Path | None, bool],
) -> int:
    """Compile MODEL under a spec (the default command)."""
    from ccompile import cases, pipeline, report
    from ccompile.request import Request
    from ccompile.spec import load

    request = Request(
        model, load(spec, sets), output, evidence, dump, seed, threads, measure, jobs, page, junit, None, *lock, depfile
    )
    with progress(quiet) as shown:
        result = pipeline.compile_model(request, shown, cache)
    tell_cache(cache, quiet)
    if page is not None:
        write_page(result, page)
    if junit is not None:
        write_junit(junit, f"ccompile {output.name}", cases.recorded(result))
    if not quiet:
        if verbose:
            echo(report.evidence_summary(result))
        show(report.evidence_table(result))
    failed = result.verdict == "failed"
    for line in report.verdict_lines(result, str(output), str(request.evidence_path)):
        if failed or not quiet:
            echo(line, err=failed)
    return BROKEN if failed else OK
