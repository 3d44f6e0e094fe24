"""`--set key=value`: changes to a spec's plain data before it is checked, reported by their own text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ccompile import marks
from ccompile.errors import Problem, SpecError
from ccompile.marks import Document
from ccompile.validation import shown


def override(document: Document, text: str) -> tuple[Problem, ...]:
    """Apply one `key=value`: the key is dotted, list items by index or, in `passes`, by pass name."""
    option = f"--set {text}"
    key, equals, value_text = text.partition("=")
    parts = [part for part in re.split(r"[.\[\]]+", key) if part]
    if not equals or not parts:
        return (Problem("write it as key=value", option, "For example --set passes.split-svd.energy=0.9"),)
    try:
        value = marks.parse(value_text, option).data if value_text.strip() else None
        path, created = _assign(document.data, parts, value, option)
    except SpecError as error:
        return tuple(Problem(problem.message, option, problem.hint) for problem in error.problems)
    known = [place for place in (*document.values, *document.keys) if place[: len(path)] == path]
    for place in (*known, *created, path):
        document.values[place] = document.keys[place] = marks.Mark(option=option)
    return ()


def _assign(data: Any, parts: Sequence[str], value: Any, option: str) -> tuple[marks.Path, list[marks.Path]]:
    """Set data[parts] = value; return the real path, and those of the mappings that had to be made for it."""
    path: marks.Path = ()
    created: list[marks.Path] = []
    for part in parts[:-1]:
        step, data = _into(data, part, option)
        path = (*path, *step)
        if isinstance(data, dict) and data.get(step[-1]) is None:
            data[step[-1]] = {}
            created.append(path)
        data = data[step[-1]]
    step, data = _into(data, parts[-1], option)
    if len(path) == 2 and path[0] == "passes" and step[-1] not in data and len(data) == 1:
        (name,) = data
        raise SpecError(
            f"`{parts[-1]}` is not the pass there", option, f"Write passes.{path[1]}.{name}.{parts[-1]}=..."
        )
    data[step[-1]] = value
    return (*path, *step), created


def _into(data: Any, part: str, option: str) -> tuple[marks.Path, Any]:
    """Return the real path of `part` in `data` and the container that holds its last element."""
    if isinstance(data, dict):
        return (part,), data
    if isinstance(data, list) and part.isdigit() and int(part) < len(data):
        return (int(part),), data
    if isinstance(data, list):
        named = [i for i, item in enumerate(data) if item == part or (isinstance(item, dict) and part in item)]
        if len(named) == 1:
            if not isinstance(data[named[0]], dict):
                data[named[0]] = {part: {}}
            return (named[0], part), data[named[0]]
        what = "is not in the list" if not named else f"is there {len(named)} times: use its index"
        raise SpecError(f"`{part}` {what}", option, f"The list has {len(data)} items, counted from 0.")
    raise SpecError(f"there is no place for `{part}` inside the plain value {shown(data)}", option)
