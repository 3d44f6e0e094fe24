"""YAML -> Spec of ready passes: every problem with line and column, all at once, before any model is read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.json_schema import models_json_schema
from pydantic_core import ErrorDetails

from ccompile import marks, registry
from ccompile.core import Pass, Tolerance
from ccompile.data import DataSpec
from ccompile.errors import CcompileError, Problem, SpecError, nearest
from ccompile.marks import Document, dotted
from ccompile.target import Target, load_target, target_names

VERSION = 1
DEFAULT_TARGET = "generic-cpu"
Share = Annotated[float, Field(gt=0, le=1000)]


class MetricGate(BaseModel):
    """A task metric's limit: `drop` below the source's value, or a least value; in the metric's own unit."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    drop: float | None = Field(None, ge=0, description="largest loss against the source model (0.005 is half a point)")
    min: float | None = Field(None, description="least value of the compiled model")

    @model_validator(mode="after")
    def _something(self) -> MetricGate:
        if self.drop is None and self.min is None:
            raise ValueError("give `drop`, `min` or both")
        return self


class Gates(BaseModel):
    """What the result must reach: shares of the source's cost, and how far outputs may move from the source's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    params: Share | None = Field(None, description="parameters, as a share of the source's")
    nonzero: Share | None = Field(None, description="nonzero parameters, as a share of the source's")
    macs: Share | None = Field(None, description="multiply-accumulates, as a share of the source's")
    multiplications: Share | None = Field(None, description="multiplications, as a share of the source's")
    stored_bytes: Share | None = Field(None, description="bytes in the file, as a share of the source's")
    resident_bytes: Share | None = Field(None, description="bytes of loaded weights, as a share of the source's")
    moved_bytes: Share | None = Field(None, description="bytes moved per inference, as a share of the source's")
    peak_activation_bytes: Share | None = Field(
        None, description="peak of live activations, as a share of the source's"
    )
    seconds: Share | None = Field(None, description="seconds estimated for the target, as a share of the source's")
    measured_seconds: Share | None = Field(None, description="seconds measured on this machine, share of the source's")
    atol: float | None = Field(None, ge=0, description="largest absolute difference of an element from the source's")
    rtol: float | None = Field(None, ge=0, description="largest difference relative to the source's element")
    relative_l2: float | None = Field(None, ge=0, description="|a - b| / |b| against the source's outputs")
    cosine: float | None = Field(None, ge=-1, le=1, description="least cosine similarity with the source's outputs")
    argmax: float | None = Field(None, ge=0, le=1, description="least share of rows that keep the source's argmax")
    metric: dict[str, MetricGate] = Field(
        {}, description="task metrics: top1, top5, or module:function(outputs, labels) -> float", max_length=32
    )

    @property
    def tolerance(self) -> Tolerance | None:
        """Return the accuracy gates as one tolerance against the source."""
        given = {name: getattr(self, name) for name in Tolerance.model_fields if getattr(self, name) is not None}
        return Tolerance(**given) if given else None

    @property
    def shares(self) -> dict[str, float]:
        """Return the cost gates by name."""
        names = [name for name in type(self).model_fields if name not in (*Tolerance.model_fields, "metric")]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class _Top(BaseModel):
    """A ccompile spec."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = Field(description="version of the spec's format: 1")
    target: str | dict[str, Any] = Field(
        DEFAULT_TARGET, description="what the model will run on: a name, the path of a YAML file, or an inline target"
    )
    data: DataSpec | None = Field(None, description="inputs; without them seeded synthetic ones are used")
    passes: list[Any] = Field(min_length=1, max_length=1000, description="steps, in order")
    gates: Gates = Field(default_factory=Gates, description="what the result must reach, checked at the end")


@dataclass(frozen=True)
class Spec:
    """A checked spec: ready passes, the target, and where relative paths start."""

    passes: tuple[Pass, ...]
    target: Target
    data: DataSpec | None
    gates: Gates
    name: str
    base: Path
    digest: str


def load(path: Path | str, sets: Sequence[str] = ()) -> Spec:
    """Read a spec file; each of `sets` is `key=value` with a dotted key. Raises SpecError with all problems."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise SpecError(f"cannot read the spec: {error.strerror}", str(path)) from error
    except UnicodeDecodeError as error:
        raise SpecError("not UTF-8 text", str(path), "A spec is a YAML file.") from error
    return parse(text, str(path), path.parent, sets)


def parse(text: str, name: str = "spec", base: Path = Path(), sets: Sequence[str] = ()) -> Spec:
    """Check a spec's text. Raises SpecError with all problems, each with line and column."""
    document = marks.parse(text, name)
    if not isinstance(document.data, dict):
        what = "a list" if isinstance(document.data, list) else f"`{document.data}`"
        problem = document.problem((), f"a spec is a mapping, not {what}", "Start with `version: 1` and `passes:`.")
        raise SpecError.of([problem])
    for text_of_set in sets:
        _set(document, text_of_set)
    problems: list[Problem] = []
    top = _validated(_Top, document, (), problems)
    steps = document.data.get("passes")
    passes = [_step(document, i, step, problems) for i, step in enumerate(steps if isinstance(steps, list) else [])]
    ready = [step for step in passes if step is not None]
    if len(ready) == len(passes):
        problems += _order(document, ready)
        problems += _promises(document, ready, document.data.get("gates"))
    target = _target(document, base, problems)
    if problems or top is None or target is None:
        raise SpecError.of(problems)
    canonical = json.dumps(document.data, sort_keys=True, default=str).encode()
    return Spec(tuple(ready), target, top.data, top.gates, name, base, hashlib.sha256(canonical).hexdigest())


def _target(document: Document, base: Path, problems: list[Problem]) -> Target | None:
    wanted = document.data.get("target", DEFAULT_TARGET)
    if not isinstance(wanted, str | dict):
        return None  # reported by the schema
    try:
        return load_target(wanted, base)
    except CcompileError as error:
        problems += [document.problem(("target",), p.message, p.hint) for p in error.problems]
        return None


def _validated(
    kind: type[BaseModel], document: Document, path: marks.Path, problems: list[Problem], data: Any = None
) -> Any:
    try:
        return kind.model_validate(document.data if data is None else data)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            problems.append(_problem(kind, document, path, detail))
        return None


def _problem(kind: type[BaseModel], document: Document, base: marks.Path, detail: ErrorDetails) -> Problem:
    path = _real_path(document.data, (*base, *detail["loc"]))
    if detail["type"] == "extra_forbidden":
        owner, known = path[:-1], _fields_at(kind, detail["loc"][:-1])
        named = next((part for part in reversed(owner) if isinstance(part, str)), "a spec")
        message = f"`{named}` has no {'option' if base else 'key'} `{path[-1]}`"
        return document.problem(path, message, nearest(str(path[-1]), known), at_key=True)
    if detail["type"] == "missing":
        return document.problem(path, f"`{detail['loc'][-1]}` is missing", _described(kind, detail["loc"]))
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    given = detail.get("input")
    if not isinstance(given, dict | list | BaseModel) and detail["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, got `{given}`"
    return document.problem(path, message, _described(kind, detail["loc"]))


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
    return sorted({name for model in models for name in model.model_fields})


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
                return f"`{loc[length - 1]}`: {field.description}."
    return ""


def _step(document: Document, index: int, step: Any, problems: list[Problem]) -> Pass | None:
    path: marks.Path = ("passes", index)
    options: Any = {}
    if isinstance(step, str):
        name = step
    elif isinstance(step, dict) and len(step) == 1:
        name, options = next(iter(step.items()))
        path = (*path, name)
        options = {} if options is None else options
    else:
        hint = "Write `- split-svd: {energy: 0.9}`: one name, and its options below it."
        problems.append(document.problem(path, "a step is a pass's name, or one name with its options", hint))
        return None
    known = registry.passes()
    if name not in known:
        hint = nearest(name, known).replace("It takes", "There are")
        problems.append(document.problem(path, f"there is no pass `{name}`", hint, at_key=True))
        return None
    if not isinstance(options, dict):
        problems.append(document.problem(path, f"options of `{name}` are a mapping, not `{options}`"))
        return None
    found: Pass | None = _validated(known[name], document, path, problems, options)
    return found


def _order(document: Document, passes: Sequence[Pass]) -> Iterator[Problem]:
    names = [step.pass_name() for step in passes]
    for index, step in enumerate(passes):
        for earlier in step.after:
            if earlier in names[index + 1 :] and earlier not in names[:index]:
                path = ("passes", index)
                yield document.problem(path, f"`{names[index]}` must come after `{earlier}`", "Swap the two steps.")


def _promises(document: Document, passes: Sequence[Pass], gates: Any) -> Iterator[Problem]:
    accuracy = (*Tolerance.model_fields, "metric")
    gated = isinstance(gates, dict) and any(gates.get(name) not in (None, {}) for name in accuracy)
    for index, step in enumerate(passes):
        if step.kind == "lossy" and step.tolerance is None and not gated:
            yield document.problem(
                ("passes", index),
                f"`{step.pass_name()}` changes outputs: say how far they may move",
                "Give the step `tolerance: {relative_l2: 0.05}`, or the spec `gates: {argmax: 0.99}` or a metric.",
            )


def _set(document: Document, text: str) -> None:
    """Apply one `key=value`: the key is dotted, list items by index or, in `passes`, by pass name."""
    option = f"--set {text}"
    key, equals, value_text = text.partition("=")
    if not equals or not key:
        raise SpecError("write it as key=value", option, "For example --set passes.split-svd.energy=0.9")
    value = marks.parse(value_text, option).data if value_text.strip() else None
    parts = [part for part in re.split(r"[.\[\]]+", key) if part]
    data = document.data
    path: marks.Path = ()
    for position, part in enumerate(parts):
        step, data = _into(data, part, option)
        path = (*path, *step)
        last = position == len(parts) - 1
        if last:
            data[step[-1]] = value
        else:
            data = _descend(data, step[-1])
    for known in [p for p in (*document.values, *document.keys) if p[: len(path)] == path]:
        document.values[known] = document.keys[known] = marks.Mark(option=option)
    document.values[path] = document.keys[path] = marks.Mark(option=option)


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
    raise SpecError(f"`{part}` is inside a plain value", option)


def _descend(data: Any, key: str | int) -> Any:
    if isinstance(data, dict) and (key not in data or data[key] is None):
        data[key] = {}
    return data[key]


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of specs, with every pass and its options, for editors."""
    kinds = registry.passes()
    _, both = models_json_schema(
        [(_Top, "validation"), (Target, "validation"), *((kind, "validation") for kind in kinds.values())],
        ref_template="#/$defs/{model}",
    )
    defs = both["$defs"]
    top = defs.pop("_Top")
    steps: list[dict[str, Any]] = []
    for name, kind in kinds.items():
        summary = (registry_doc(kind).splitlines() or [""])[0]
        options = {"$ref": f"#/$defs/{kind.__name__}"}
        defs[kind.__name__]["description"] = summary
        steps.append({"const": name, "description": summary})
        steps.append(
            {
                "type": "object",
                "description": summary,
                "properties": {name: {"anyOf": [options, {"type": "null"}]}},
                "required": [name],
                "additionalProperties": False,
            }
        )
    top["properties"]["passes"]["items"] = {"anyOf": steps}
    top["properties"]["target"]["anyOf"] = [
        {"type": "string", "examples": list(target_names())},
        {"$ref": "#/$defs/Target"},
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ccompile spec",
        **top,
        "$defs": dict(sorted(defs.items())),
    }


def registry_doc(kind: type[Pass]) -> str:
    """Return the docstring of a pass's module: its reference page."""
    import sys

    return (sys.modules[kind.__module__].__doc__ or "").strip()


def dump_step(step: Pass) -> str:
    """Return a step as YAML, such that `parse` gives it back."""
    return yaml.safe_dump([{step.pass_name(): step.given()}], sort_keys=True)


__all__ = ["Gates", "MetricGate", "Spec", "dotted", "dump_step", "load", "parse", "schema"]
