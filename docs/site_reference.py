"""Reference pages of the documentation site, from the declarations: the spec, each pass, targets, recipes, commands."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import generate
import yaml
from site_options import flow, options_table, spec_parts, spec_schema, target_parts

import ccompile
from ccompile import registry, target
from ccompile.cli import cli
from ccompile.core import Pass
from ccompile.errors import CcompileError
from ccompile.spec import parse

SPECS = Path(__file__).resolve().parent.parent / "specs"
_WIDE = "---\nhide: [toc]\n---\n"
_GENERATED = "<!-- Generated from the declarations; do not edit. -->"


def pages(guides: Mapping[str, str]) -> dict[str, str]:
    """Return every reference page by its path; `guides` (name -> Markdown) are linked from the passes they name."""
    found = {
        "reference/spec.md": spec_page(),
        "reference/targets.md": targets_page(),
        "reference/recipes.md": recipes_page(),
        "reference/commands.md": commands_page(),
        "reference/python.md": python_page(),
        "reference/passes/index.md": f"# Passes\n\n{_GENERATED}\n\n{_PASSES_HEAD}\n\n{_pass_table()}\n",
    }
    return found | {pass_uri(name): pass_page(kind, guides) for name, kind in registry.passes().items()}


# ---------------------------------------------------------------------------------------------- the spec


def spec_page() -> str:
    """Return the reference of all keys of a spec but the passes' options."""
    found = spec_schema()
    defs = found["$defs"]
    top = f"## The whole spec\n\n{options_table(found, defs, 'spec-')}"
    parts = [
        f"## {title}\n\n{defs[name]['description']}\n\n{options_table(defs[name], defs, f'{name.lower()}-')}"
        for name, title in spec_parts().items()
    ]
    return "\n\n".join([f"{_WIDE}# Spec\n\n{_GENERATED}\n\n{_SPEC_HEAD}", top, *parts]) + "\n"


# ---------------------------------------------------------------------------------------------- passes


def pass_names() -> list[str]:
    """Return the names of all passes, sorted."""
    return list(registry.passes())


def pass_uri(name: str) -> str:
    """Return the path of a pass's page."""
    return f"reference/passes/{name}.md"


def _pass_table() -> str:
    rows = generate.pass_table("").replace("](#", "](").splitlines()
    for at, name in enumerate(pass_names(), start=2):
        rows[at] = rows[at].replace(f"]({name})", f"]({name}.md)")
    return "\n".join(rows)


def pass_page(kind: type[Pass], guides: Mapping[str, str]) -> str:
    """Return the reference of one pass: its algebra, a step to copy, its options, and the guides that use it."""
    name = kind.pass_name()
    declared = kind.model_json_schema()
    first, _, rest = registry.doc_of(kind).partition("\n")
    used = [f"[{_title(text)}](../../guides/{stem}.md)" for stem, text in guides.items() if f"passes/{name}.md" in text]
    parts = [
        f"{_WIDE}# {name}\n\n{_GENERATED}\n\n{first}",
        f"```text\n{rest.strip()}\n```",
        f"Contract: {kind.kind}." + (f" Comes after: {', '.join(map(_linked, kind.after))}." if kind.after else ""),
        f"As a step of a [spec](../spec.md):\n\n```yaml\n{_indented(pass_example(name))}```",
        *([f"Guides: {', '.join(used)}."] if used else []),
        f"## Options\n\n{options_table(declared, declared.get('$defs', {}), '', '../')}",
    ]
    return "\n\n".join(parts) + "\n"


def _linked(name: str) -> str:
    return f"[`{name}`]({name}.md)"


def _title(text: str) -> str:
    return text.splitlines()[0].removeprefix("# ")


def pass_example(name: str) -> list[Any]:
    """Return a step that a spec may hold, with the least that the pass asks for. Raises LookupError."""
    kind = registry.find(name)
    told = {"tolerance": {"argmax": 0.98}} if kind.kind == "lossy" else {}
    among = ["prune-channels", "split-svd", "split-spatial"]
    strengths: list[dict[str, Any]] = [
        {"error": 0.02},
        {"keep": 0.5},
        {"bits": 4},
        {"budget": {"macs": 0.5}, "among": among},
    ]
    wanted = [given for given in strengths if given.keys() <= kind.model_fields.keys()]
    for given in [*([] if kind.kind == "exact" else wanted), {}]:
        step = [{name: given | told} if given | told else name]
        if _is_valid(step):
            return step
    raise LookupError(f"no example of `{name}` is valid: give `pass_example` its strength")


def _is_valid(steps: list[Any]) -> bool:
    try:
        parse(yaml.safe_dump({"version": 1, "passes": steps}))
    except CcompileError:
        return False
    return True


def _indented(steps: list[Any]) -> str:
    """Return steps as they stand in a spec, each step's options on its line."""
    lines = [
        f"  - {step}" if isinstance(step, str) else f"  - {next(iter(step))}: {{{flow(next(iter(step.values())))}}}"
        for step in steps
    ]
    return "passes:\n" + "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------- targets, recipes


def targets_page() -> str:
    """Return the targets that come with ccompile and every key of a target's file."""
    defs = spec_schema()["$defs"]
    rows = ["| target | what it is | opset | element types |", "|---|---|---|---|"]
    for name in target.target_names():
        found = target.load_target(name, Path())
        opset = f"{found.opset.min} to {found.opset.max}"
        rows.append(f"| [`{name}`](#{name}) | {found.description} | {opset} | {', '.join(found.dtypes)} |")
    keys = [
        f"### {name}\n\n{defs[name]['description']}\n\n{options_table(defs[name], defs, f'{name.lower()}-')}"
        for name in target_parts()
    ]
    files = [
        f"### {name}\n\n```yaml\n{(SPECS / 'targets' / f'{name}.yaml').read_text(encoding='utf-8')}```"
        for name in target.target_names()
    ]
    listed = "\n".join(rows)
    return (
        "\n\n".join(
            [
                f"{_WIDE}# Targets\n\n{_GENERATED}\n\n{_TARGETS_HEAD}\n\n{listed}",
                "## Keys of a target",
                *keys,
                "## The files",
                *files,
            ]
        )
        + "\n"
    )


def recipes_page() -> str:
    """Return the specs that come with ccompile, whole."""
    parts = [
        f"# Recipes\n\n{_GENERATED}\n\nSpecs that come with ccompile, in `specs/`. Copy one beside your model and data."
    ]
    for path in sorted(SPECS.glob("*.yaml")):
        parts.append(f"## {path.stem}\n\n```yaml\n{path.read_text(encoding='utf-8')}```")
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------- commands, Python


def commands_page() -> str:
    """Return the help of every command."""
    parts = [f"{_WIDE}# Commands\n\n{_GENERATED}\n\n<!-- include README.md: Commands -->"]
    for name, command in _commands(cli, ""):
        context = click.Context(command, info_name=f"ccompile {name}", max_content_width=100)
        parts.append(f"## {name}\n\n```text\n{command.get_help(context)}\n```")
    return "\n\n".join(parts) + "\n"


def _commands(group: click.Group, before: str) -> Iterator[tuple[str, click.Command]]:
    """Yield the commands of a group by all their words, those of its groups in their places."""
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from _commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def python_page() -> str:
    """Return the public names of the package with their signatures and documentation."""
    parts = [f"# Python\n\n{_GENERATED}\n\nThe public names of the package `ccompile`. All else may change."]
    for name in ccompile.__all__:
        found = getattr(ccompile, name)
        if callable(found):
            parts.append(f"## {name}\n\n```text\n{_signature(name, found)}\n```\n\n{inspect.getdoc(found)}")
        if inspect.isclass(found):
            rows = [f"| `{key}` | {inspect.getdoc(getattr(found, key))} |" for key in _properties(found)]
            parts.append("\n".join(["| property | what it is |", "|---|---|", *rows]))
    return "\n\n".join([*parts, f"## In pytest\n\n```text\n{_fixtures()}\n```"]) + "\n"


def _signature(name: str, found: Callable[..., object]) -> str:
    """Return a signature, a parameter a line."""
    known = list(inspect.signature(found).parameters.values())
    parameters = [f"    {parameter},".replace("'", "") for parameter in known]
    named = sum(parameter.kind is not inspect.Parameter.KEYWORD_ONLY for parameter in known)
    if named < len(known):
        parameters.insert(named, "    *,")
    returned = inspect.signature(found).return_annotation
    end = "" if inspect.isclass(found) else f" -> {returned}"
    return "\n".join([f"{name}(", *parameters, f"){end}"])


def _properties(kind: type) -> list[str]:
    """Return the public properties of a class that say what they are."""
    return [
        key for key, value in vars(kind).items() if isinstance(value, (property, cached_property)) and key[0] != "_"
    ]


def _fixtures() -> str:
    """Return what the fixtures say of themselves, from their source: a site is built without pytest."""
    tree = ast.parse((Path(ccompile.__file__).parent / "pytest_plugin.py").read_text(encoding="utf-8"))
    found = [part for part in tree.body if isinstance(part, ast.FunctionDef) and part.decorator_list]
    return "\n\n".join(f"{part.name}\n{textwrap.indent(ast.get_docstring(part) or '', '    ')}" for part in found)


_PASSES_HEAD = """\
A pass rewrites the graph. A spec lists passes in order. Each is verified after it ran: against its contract, on the
verification inputs. `exact` passes change nothing but rounding. `lossy` passes need a tolerance, or a gate on accuracy.
[Which pass for which goal](../../guides/choosing.md) helps to choose."""
_SPEC_HEAD = """\
Every key that a spec may have. Options of passes are on [the page of each pass](passes/index.md). How a spec is put
together is in [Write a spec](../guides/specs.md). `ccompile schema` prints the same as a JSON Schema for editors."""
_TARGETS_HEAD = """\
A target says what the machine runs, what it holds and how fast it is. `target:` in a spec names one of these, the path
of a YAML file, or is a mapping with the same keys. Rates are estimates unless the file says that they were measured."""
