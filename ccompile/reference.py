"""What passes are, in words: their pages for the terminal and their options for the documentation."""

from __future__ import annotations

from collections.abc import Mapping

from ccompile import registry
from ccompile.core import Pass


def pass_page(kind: type[Pass]) -> str:
    """Return the reference page of a pass: its docstring, contract, order and options."""
    lines = [f"{kind.pass_name()} ({kind.kind})", "", registry.doc_of(kind), ""]
    if kind.after:
        lines += [f"Comes after: {', '.join(kind.after)}.", ""]
    lines.append("Options:")
    for name, takes, default, text in options(kind):
        lines.append(f"  {name}: {takes}, default {default}\n      {text}")
    return "\n".join(lines)


def options(kind: type[Pass]) -> list[tuple[str, str, str, str]]:
    """Return (name, type and limits, default, description) of each option."""
    schema = kind.model_json_schema()
    found = []
    for name, entry in schema["properties"].items():
        default = "none" if entry.get("default") is None else str(entry["default"]).lower()
        found.append((name, kind_of(entry), "[]" if default == "()" else default, entry.get("description", "")))
    return found


def kind_of(entry: Mapping[str, object]) -> str:
    """Return the type and the limits of a value in words, from its JSON Schema.

    >>> kind_of({"anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": 1}, {"type": "null"}]})
    'number > 0 and <= 1'
    """
    if "anyOf" in entry:
        alternatives = entry["anyOf"]
        assert isinstance(alternatives, list)
        return " or ".join(kind_of(part) for part in alternatives if part.get("type") != "null")
    if "$ref" in entry:
        return str(entry["$ref"]).rpartition("/")[2].lower()
    if "enum" in entry:
        values = entry["enum"]
        assert isinstance(values, list)
        return " | ".join(map(str, values))
    if "const" in entry:
        return str(entry["const"])
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = " and ".join(f"{sign} {entry[key]:g}" for key, sign in signs.items() if key in entry)
    if entry.get("type") == "array":
        return _kind_of_list(entry)
    if isinstance(values := entry.get("additionalProperties"), dict):
        return f"mapping of name to {kind_of(values)}"
    return f"{entry.get('type', 'anything')}{' ' + limits if limits else ''}"


def _kind_of_list(entry: Mapping[str, object]) -> str:
    if isinstance(parts := entry.get("prefixItems"), list):
        return f"[{', '.join(map(kind_of, parts))}]"
    items = entry.get("items", {})
    assert isinstance(items, dict)
    return f"list of {kind_of(items)}"
