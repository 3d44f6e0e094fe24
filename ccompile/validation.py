"""Pydantic's complaints in a spec's words: where it stands, what is wrong, what the field means, the nearest name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ccompile import marks
from ccompile.errors import Problem, SpecError, nearest
from ccompile.marks import Document

T = TypeVar("T", bound=BaseModel)


def validated(
    kind: type[T], document: Document, path: marks.Path, problems: list[Problem], data: object = None
) -> T | None:
    """Return `data`, which stands at `path` of the document (the whole of it by default), as a `kind`.

    What is wrong is added to `problems`, a problem a place; then the result is None.
    """
    try:
        return kind.model_validate(document.data if data is None else data)
    except ValidationError as error:
        seen: set[marks.Path] = set()
        for detail in error.errors(include_url=False):
            if detail["type"] == "too_short" and detail["input"]:
                continue  # items that were refused themselves are not counted
            place = _real_path(document.data, (*path, *detail["loc"]))
            if place not in seen:  # a value that fits no branch of a union is one mistake: the first branch speaks
                problems.append(_problem(kind, document, path, detail))
            seen.add(place)
        return None


def from_options(kind: type[T], given: Mapping[str, object]) -> T:
    """Return a `kind` made from command line options. Raises SpecError that names each wrong option."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        problems = []
        for detail in error.errors(include_url=False):
            option = f"--{'.'.join(map(str, detail['loc'])).replace('_', '-')}"
            problems.append(Problem(_said(detail), option, _described(kind, detail["loc"])))
        raise SpecError.of(problems) from error


def _problem(kind: type[BaseModel], document: Document, base: marks.Path, detail: ErrorDetails) -> Problem:
    path = _real_path(document.data, (*base, *detail["loc"]))
    if detail["type"] == "extra_forbidden":
        owner, known = path[:-1], _fields_at(kind, detail["loc"][:-1])
        named = next((f"`{part}`" for part in reversed(owner) if isinstance(part, str)), "a spec")
        message = f"{named} has no {'option' if base else 'key'} `{shortened(path[-1])}`"
        return document.problem(path, message, nearest(str(path[-1]), known), at_key=True)
    return document.problem(path, _said(detail), _described(kind, detail["loc"]))


def _said(detail: ErrorDetails) -> str:
    """Return what is wrong with a field, in a spec's words."""
    if detail["type"] == "missing":
        return f"`{detail['loc'][-1]}` is missing"
    if detail["type"] == "value_error":
        return detail["msg"].removeprefix("Value error, ")
    said = detail["msg"].partition(", unable to parse")[0].removeprefix("Input ")
    said = re.sub(r" or instance of \w+| after validation, not \d+", "", said)
    said = said.replace("dictionary", "mapping").replace("Tuple", "List").replace("tuple", "list")
    return f"{said[0].lower()}{said[1:]}, got {shown(detail.get('input'))}"


def shown(given: object) -> str:
    """Return a value as people write it in YAML.

    >>> shown(None), shown("x"), shown("1"), shown([1]), shown(True)
    ('nothing', '`x`', "`'1'`", 'a list', '`true`')
    """
    if given is None:
        return "nothing"
    if isinstance(given, dict | list | tuple):
        return "a mapping" if isinstance(given, dict) else "a list"
    return f"`{shortened(yaml.safe_dump(given, width=10_000, allow_unicode=True).splitlines()[0])}`"


def shortened(value: object, limit: int = 60) -> str:
    """Return a value's text, cut to `limit` characters.

    >>> shortened("abcdefgh", 6)
    'abc...'
    """
    text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _real_path(data: Any, loc: tuple[str | int, ...]) -> marks.Path:
    """Return `loc` without the tags that pydantic puts in for unions: only steps that the data has, and the last."""
    path: list[str | int] = []
    for index, part in enumerate(loc):
        inside = isinstance(data, dict) and part in data
        listed = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if inside or listed:
            path.append(part)
            data = data[part]
        elif index == len(loc) - 1 and isinstance(data, dict) and re.fullmatch(r"[a-z_0-9]+", str(part)):
            path.append(part)
    return tuple(path)


def _fields_at(kind: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    """Return the field names of the model at `loc` inside `kind`."""
    models = _models_at(kind, loc)
    return sorted({field.alias or name for model in models for name, field in model.model_fields.items()})


def _models_at(kind: Any, loc: Sequence[str | int]) -> list[type[BaseModel]]:
    found = list(_models_in(kind))
    for part in loc:
        inner = [
            m
            for model in found
            if part in model.model_fields
            for m in _models_in(model.model_fields[str(part)].annotation)
        ]
        found = inner or found
    return found


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)


def _described(kind: type[BaseModel], loc: Sequence[str | int]) -> str:
    """Return what the field at `loc` means."""
    for length in range(len(loc), 0, -1):
        for model in _models_at(kind, loc[: length - 1]):
            field = model.model_fields.get(str(loc[length - 1]))
            if field is not None and field.description:
                return f"`{loc[length - 1]}`: {field.description}{_limits(field)}."
    return ""


def _limits(field: FieldInfo) -> str:
    """Return the limits of a field in words, such as ` (> 0 and <= 1)`."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    annotated = [field.annotation, *getattr(field.annotation, "__args__", ())]
    known = [*field.metadata, *(entry for part in annotated for entry in getattr(part, "__metadata__", ()))]
    known += [entry for info in known for entry in getattr(info, "metadata", ())]
    found = [
        f"{sign} {getattr(entry, name)}" for name, sign in signs.items() for entry in known if hasattr(entry, name)
    ]
    return f" ({' and '.join(found)})" if found else ""
