"""YAML -> Spec of ready passes: every problem with line and column, all at once, before any model is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator
from pydantic.json_schema import models_json_schema

from ccompile import marks, registry
from ccompile.core import Pass
from ccompile.data import DataSpec
from ccompile.declaration import Declaration
from ccompile.errors import CcompileError, Problem, SpecError, nearest
from ccompile.marks import Document
from ccompile.overrides import override
from ccompile.target import Target, load_target, target_file, target_names
from ccompile.tolerance import Tolerance
from ccompile.validation import shortened, shown, validated

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
    """A checked spec: ready passes, the target with the file it came from, and where relative paths start.

    data_base: where those of the data start [base].
    """

    passes: tuple[Pass, ...]
    target: Target
    data: DataSpec | None
    gates: Gates
    name: str
    base: Path
    digest: str
    target_file: Path | None = None
    data_base: Path | None = None


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
    problems = [problem for text_of_set in sets for problem in override(document, text_of_set)]
    top = validated(_Top, document, (), problems)
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
    digest = hashlib.sha256(canonical).hexdigest()
    file = None if isinstance(top.target, dict) else target_file(top.target, base)
    return Spec(tuple(ready), target, top.data, top.gates, name, base, digest, file)


def _target(document: Document, base: Path, problems: list[Problem]) -> Target | None:
    wanted = document.data.get("target", DEFAULT_TARGET)
    if not isinstance(wanted, str | dict):
        return None  # reported by the schema
    if isinstance(wanted, dict):
        return validated(Target, document, ("target",), problems, wanted)
    try:
        return load_target(wanted, base)
    except CcompileError as error:
        problems += [document.problem(("target",), p.message, p.hint) for p in error.problems]
        return None


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
        message = f"the options of `{name}` are a mapping, not {shown(options)}"
        problems.append(document.problem(path, message, f"Write `- {name}: {{option: value}}`."))
        return None
    found = validated(known[name], document, path, problems, options)
    if found is not None:
        try:
            found.members(registry.find)
        except CcompileError as error:
            problems += [document.problem(path, problem.message, problem.hint) for problem in error.problems]
        except ValueError as error:
            problems.append(document.problem(path, str(error), ""))
    return found


def _order(document: Document, passes: Sequence[Pass]) -> Iterator[Problem]:
    names = [step.pass_name() for step in passes]
    for index, step in enumerate(passes):
        for earlier in step.after:
            if earlier in names[index + 1 :] and earlier not in names[:index]:
                hint = f"Move `{earlier}` (step {names.index(earlier, index) + 1}) before it."
                message = f"`{names[index]}` must come after `{earlier}`"
                yield document.problem(("passes", index), message, hint)


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
        summary = (registry.doc_of(kind).splitlines() or [""])[0]
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


def dump_step(step: Pass) -> str:
    """Return a step as YAML, such that `parse` gives it back."""
    return yaml.safe_dump([{step.pass_name(): step.given()}], sort_keys=True)
