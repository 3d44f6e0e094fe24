"""Two models side by side: which nodes and weights were added, removed, resized or changed; how outputs move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ccompile import graph, onnx_io, runtime
from ccompile.comparison import compare, rtol_of
from ccompile.data import DataSpec, open_data
from ccompile.errors import DataError
from ccompile.identity import describe_weight, node_texts, weight_digest
from ccompile.runtime import Settings
from ccompile.tolerance import Comparison, Tolerance

SAMPLES = 16  # synthetic ones, unless a number is given


@dataclass(frozen=True)
class Given:
    """What two models are compared on: a file or folder of samples, else seeded synthetic ones of these shapes."""

    data: Path | None = None
    samples: int | None = None
    seed: int = 0
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    threads: int = 0


def compare_files(
    candidate: Path, reference: Path, given: Given, tolerance: Tolerance | None
) -> tuple[Comparison, str]:
    """Return the comparison of two model files, and what it was made on."""
    kind: dict[str, Any] = {"synthetic": {}, "shapes": dict(given.shapes), "seed": given.seed}
    if (data := given.data) is not None:
        if not data.exists():
            raise DataError("there is no such file or folder", f"--data {data}")
        kind = {"test_data" if data.is_dir() else "npz": str(data.resolve())}
    if given.samples is not None or data is None:
        kind["samples"] = given.samples or SAMPLES
    spec = DataSpec.model_validate({"verification": kind})
    models = [onnx_io.load(path).model for path in (candidate, reference)]
    inputs = open_data(spec, models[1], Path(), given.seed).verification
    mine, theirs = (
        runtime.outputs_of(model, (batch.feeds for batch in inputs.batches()), Settings(given.threads))
        for model in models
    )
    return compare(mine, theirs, inputs.samples, rtol_of(tolerance)), inputs.source


@dataclass(frozen=True)
class Change:
    """One difference: `kind` is added, removed, resized, retyped or changed."""

    kind: str
    what: str
    name: str
    before: str = ""
    after: str = ""


def compare_graphs(before: ir.Model, after: ir.Model) -> list[Change]:
    """Return the differences of interface, opsets, nodes and weights, by name, in that order; none means equal."""
    changes = _interface(before, after) + _opsets(before, after)
    mine, theirs = node_texts(after), node_texts(before)
    changes += [Change("removed", "node", name, theirs[name]) for name in theirs if name not in mine]
    changes += [Change("added", "node", name, "", mine[name]) for name in mine if name not in theirs]
    changes += [
        Change("changed", "node", name, theirs[name], mine[name])
        for name in theirs
        if name in mine and mine[name] != theirs[name]
    ]
    return changes + _weights(before, after)


def _opsets(before: ir.Model, after: ir.Model) -> list[Change]:
    old, new = ({name or "ai.onnx": str(n) for name, n in m.opset_imports.items()} for m in (before, after))
    found = [Change("removed", "opset", name, version) for name, version in old.items() if name not in new]
    found += [Change("added", "opset", name, "", version) for name, version in new.items() if name not in old]
    changed = [name for name, version in old.items() if new.get(name, version) != version]
    return found + [Change("changed", "opset", name, old[name], new[name]) for name in changed]


def _interface(before: ir.Model, after: ir.Model) -> list[Change]:
    old, new = ({name: f"{kind} {shape}" for name, kind, shape in graph.signature(m)} for m in (before, after))
    found = [Change("removed", "interface", name, text) for name, text in old.items() if name not in new]
    found += [Change("added", "interface", name, "", text) for name, text in new.items() if name not in old]
    found += [
        Change("changed", "interface", name, text, new[name])
        for name, text in old.items()
        if new.get(name, text) != text
    ]
    if not found and list(old) != list(new):
        found.append(Change("changed", "interface", "order", ", ".join(old), ", ".join(new)))
    return found


def _weights(before: ir.Model, after: ir.Model) -> list[Change]:
    old, new = before.graph.initializers, after.graph.initializers
    changes = [Change("removed", "weight", name, describe_weight(old[name])) for name in old if name not in new]
    changes += [Change("added", "weight", name, "", describe_weight(new[name])) for name in new if name not in old]
    for name in (name for name in old if name in new):
        texts = describe_weight(old[name]), describe_weight(new[name])
        if texts[0] != texts[1]:
            kind = "resized" if texts[0].split()[0] == texts[1].split()[0] else "retyped"
            changes.append(Change(kind, "weight", name, *texts))
        elif weight_digest(old[name]) != weight_digest(new[name]):
            changes.append(Change("changed", "weight", name, *texts))
    return changes


def as_data(changes: list[Change]) -> list[dict[str, Any]]:
    """Return the changes as plain data."""
    return [asdict(change) for change in changes]
