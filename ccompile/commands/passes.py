"""`ccompile passes` and `ccompile schema`."""

from __future__ import annotations

import json

import click

from ccompile.commands.console import OK, echo, show


@click.command("passes")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def passes_command(name: str | None, as_json: bool) -> int:
    """List the passes, or show the reference page of one."""
    from ccompile import reference, registry, report

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
        echo(json.dumps(data, indent=1))
    elif name is not None:
        echo(reference.pass_page(kinds[name]))
    else:
        rows = [(known, kind.kind, registry.doc_of(kind).splitlines()[0]) for known, kind in kinds.items()]
        show(report.table(["pass", "contract", "what it does"], rows, left=3))
    return OK


@click.command()
def schema() -> int:
    """Print the JSON Schema of specs, for editors."""
    from ccompile.spec import schema as build

    echo(json.dumps(build(), indent=1))
    return OK
