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
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic.json_schema import models_json_schema
from pydantic_core import ErrorDetails

from ccompile import marks, registry
from ccompile.core import Declaration, Pass, Tolerance
from ccompile.data import DataSpec
from ccompile.errors import CcompileError, Problem, SpecError, nearest
from ccompile.marks import Document, dotted
from ccompile.target import Target, load_target, target_names

VERSION = 1
DEFAULT_TARGET = "generic-cpu"
Share = Annotated[float, Field(gt=0, le=1000)]


class MetricGate(Declaration):
    """A task metric's limit: `drop` below the source's value, or a least value; in the metric's own unit."""

    drop: float | None = Field(None, ge=0, description="largest loss against the source model (0.005 is half a point)")
    min: float | None = Field(None, description="least value of the compiled model")

    @model_validator(mode="after")
    def _something(self) -> MetricGate:
        if self.drop is None and self.min is None:
            raise ValueError("give `drop`, `min` or both")
        return self


class Gates(Declaration):
    """What the result must reach: shares of the source's cost, and how far outputs may move from the source's."""

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


class _Top(Declaration):
    """A ccompile spec."""

    version: Literal[1] = Field(description="version of the spec's format: 1")
    target: str | dict[str, Any] = Field(
        DEFAULT_TARGET, description="what the model will run on: a name, the path of a YAML file, or an inline target"
    )
    data: DataSpec | None = Field(None, description="inputs; without them seeded synthetic ones are used")
    passes: list[Any] = Field(min_length=1, max_length=1000, description="steps, in order")
    gates: Gates = Field(default_factory=Gates, description="what the result must reach, checked at the end")

    @field_validator("gates", mode="before")
    @classmethod
    def _none_given(cls, value: object) -> object:
        return {} if value is None else value  # `gates:` with every line below it commented out


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
        with path.open("rb") as stream:
            text = stream.read(marks.MAX_BYTES + 4).decode("utf-8-sig")
    except OSError as error:
        raise SpecError(f"cannot read the spec: {error.strerror}", str(path), "Is the path right?") from error
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
    problems = [problem for text_of_set in sets for problem in _set(document, text_of_set)]
    top = _validated(_Top, document, (), problems)
    steps = document.data.get("passes")
    passes = [_step(document, i, step, problems) for i, step in enumerate(steps if isinstance(steps, list) else [])]
    ready = [step for step in passes if step is not None]
    if len(ready) == len(passes):
        problems += _order(document, ready)
        problems += _promises(document, ready, document.data.get("gates"))
    if top is not None:
        problems += _labels(document, top)
    target = _target(document, base, problems)
    if problems or top is None or target is None:
        raise SpecError.of(sorted(problems, key=lambda problem: problem.place))
    canonical = json.dumps(document.data, sort_keys=True, default=str).encode()
    return Spec(tuple(ready), target, top.data, top.gates, name, base, hashlib.sha256(canonical).hexdigest())


def _target(document: Document, base: Path, problems: list[Problem]) -> Target | None:
    wanted = document.data.get("target", DEFAULT_TARGET)
    if not isinstance(wanted, str | dict):
        return None  # reported by the schema
    if isinstance(wanted, dict):
        inline: Target | None = _validated(Target, document, ("target",), problems, wanted)
        return inline
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
        seen: set[marks.Path] = set()
        for detail in error.errors(include_url=False):
            if detail["type"] == "too_short" and detail["input"]:
                continue  # items that were refused themselves are not counted
            place = _real_path(document.data, (*path, *detail["loc"]))
            if place not in seen:  # a value that fits no branch of a union is one mistake: the first branch speaks
                problems.append(_problem(kind, document, path, detail))
            seen.add(place)
        return None


def _problem(kind: type[BaseModel], document: Document, base: marks.Path, detail: ErrorDetails) -> Problem:
    path = _real_path(document.data, (*base, *detail["loc"]))
    if detail["type"] == "extra_forbidden":
        owner, known = path[:-1], _fields_at(kind, detail["loc"][:-1])
        named = next((f"`{part}`" for part in reversed(owner) if isinstance(part, str)), "a spec")
        message = f"{named} has no {'option' if base else 'key'} `{shortened(path[-1])}`"
        return document.problem(path, message, nearest(str(path[-1]), known), at_key=True)
    if detail["type"] == "missing":
        return document.problem(path, f"`{detail['loc'][-1]}` is missing", _described(kind, detail["loc"]))
    if detail["type"] == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
    else:
        said = detail["msg"].partition(", unable to parse")[0].removeprefix("Input ")
        said = (
            re.sub(r" or instance of \w+| after validation, not \d+", "", said)
            .replace("dictionary", "mapping")
            .replace("Tuple", "List")
            .replace("tuple", "list")
        )
        message = f"{said[0].lower()}{said[1:]}, got {_shown(detail.get('input'))}"
    return document.problem(path, message, _described(kind, detail["loc"]))


def _shown(given: Any) -> str:
    """Return a value as people write it in YAML.

    >>> _shown(None), _shown("x"), _shown("1"), _shown([1]), _shown(True)
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
        problems.append(document.problem(path, f"there is no pass `{shortened(name)}`", hint, at_key=True))
        return None
    if not isinstance(options, dict):
        message = f"the options of `{name}` are a mapping, not {_shown(options)}"
        problems.append(document.problem(path, message, f"Write `- {name}: {{option: value}}`."))
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
    given = gates if isinstance(gates, dict) else {}
    gated = bool(given.get("metric")) or any(given.get(name) is not None for name in Tolerance.model_fields)
    for index, step in enumerate(passes):
        if step.kind == "lossy" and step.tolerance is None and not gated:
            yield document.problem(
                ("passes", index),
                f"`{step.pass_name()}` changes outputs: say how far they may move",
                "Give the step `tolerance: {relative_l2: 0.05}`, or the spec `gates: {argmax: 0.99}` or a metric.",
            )


def _labels(document: Document, top: _Top) -> Iterator[Problem]:
    """Refuse metric gates without labels to measure them on."""
    verification = top.data.verification if top.data is not None else None
    if top.gates.metric and (verification is None or verification.labels is None):
        hint = "Give `data.verification` a source with labels: `npz: verify.npz, labels: <key>`, or `images`."
        yield document.problem(("gates", "metric"), "a metric needs labels", hint, at_key=True)


def _set(document: Document, text: str) -> tuple[Problem, ...]:
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
    raise SpecError(f"there is no place for `{part}` inside the plain value {_shown(data)}", option)


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
        **top,
        "title": "ccompile spec",
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
