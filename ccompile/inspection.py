"""A model before any compile: what each node costs, which passes could act on it or why not, what is coupled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ccompile import cost, graph, onnx_io, profiling, registry, runtime
from ccompile.analysis.channels import Group, channels
from ccompile.analysis.shapes import UNKNOWN, ValueType, infer
from ccompile.core import Compression, Pass, PassResult, Rewrite, Site, Skip, View
from ccompile.cost import ModelCost
from ccompile.errors import ModelError
from ccompile.profiling import Measured
from ccompile.runtime import Settings
from ccompile.target import Target


@dataclass(frozen=True)
class Acts:
    """Which passes could act on a node, and why others could not."""

    node: str
    could: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Inspection:
    """The cost per node, the passes per node, and what was assumed or could not be known."""

    cost: ModelCost
    acts: tuple[Acts, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class GroupFacts:
    """A group of coupled channels: the nodes that make, follow and read them, and (node, reason) of what pins them."""

    name: str
    units: int
    producers: tuple[str, ...]
    through: tuple[str, ...]
    readers: tuple[str, ...]
    pinned: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, group: Group) -> GroupFacts:
        """Return the facts of a group, each node once."""
        pinned = tuple((skip.node, skip.reason) for skip in group.pinned)
        made, through, read = (
            tuple(dict.fromkeys(member.node for member in group.by_role(role)))
            for role in ("producer", "through", "consumer")
        )
        return cls(group.name, group.size, made, through, read, pinned)


@dataclass(frozen=True)
class Coupling:
    """The groups of a model in topological order, and what else is to be known."""

    groups: tuple[GroupFacts, ...]
    notes: tuple[str, ...]


def inspect_groups(path: Path) -> Coupling:
    """Return the groups of coupled channels of a model. Raises ModelError when it cannot be read."""
    source = onnx_io.load(path)
    inside = [str(node.name) for node in source.model.graph if any(True for _ in graph.subgraphs(node))]
    more = f" and {len(inside) - 1} more" if len(inside) > 1 else ""
    hidden = [f"channels inside the subgraphs of `{inside[0]}`{more} are not looked at"] if inside else []
    found = tuple(GroupFacts.of(group) for group in channels(source.model).groups)
    return Coupling(found, (*source.notes, *hidden))


def inspect_model(path: Path, target: Target, shapes: Mapping[str, tuple[int, ...]]) -> Inspection:
    """Price a model at batch 1, or at the given input shapes, and ask every pass where it could act.

    Raises ModelError when the model cannot be read.
    """
    source = onnx_io.load(path)
    example = cost.example_shapes(source.model, shapes)
    notes = [*source.notes, *cost.guessed_axes(source.model, shapes)]
    for name, shape in shapes.items():
        if shape and shape[0] != example[name][0]:
            notes.append(f"input `{name}`: costs are of one sample, not of the {shape[0]} given")
    types, refused = _types(source.model, example)
    notes += [refused] if refused else []
    return Inspection(cost.price(source.model, types, target), tuple(acts(source.model, target)), tuple(notes))


def measure_model(
    path: Path, target: Target, shapes: Mapping[str, tuple[int, ...]], threads: int, seconds: float
) -> Measured:
    """Return what the layers of a model take on this machine, at batch 1 on seeded noise, beside the estimates.

    seconds: about how long to measure.

    Raises ModelError when the model cannot be read or run.
    """
    model = onnx_io.load(path).model
    example = cost.example_shapes(model, shapes)
    types, refused = _types(model, example)
    if refused:
        raise ModelError(refused, hint="Give the shapes of its inputs with `--shape`.")
    graph.name_nodes(model.graph)
    estimates = {node.name: node.seconds for node in cost.price(model, types, target).nodes}
    rng, feeds = np.random.default_rng(0), _feeds(model, example)
    for name, array in feeds.items():
        if array.dtype.kind == "f":
            feeds[name] = rng.standard_normal(array.shape).astype(array.dtype)
    return profiling.measure(model, estimates, feeds, threads, target.node_overhead_us * 1e-6, seconds)


def _types(model: ir.Model, example: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, ValueType], str]:
    """Return the types of all values on inputs of those shapes, observed in a run where they cannot be inferred.

    The second is why they could not be observed, in words, or nothing.
    """
    types = infer(model, example)
    produced = [str(output.name) for node in model.graph for output in node.outputs if output.name]
    inner = any(True for node in model.graph for _ in graph.subgraphs(node))
    if not inner and all(types.get(name, UNKNOWN).static is not None for name in produced):
        return types, ""
    try:
        return types | runtime.observed_shapes(model, _feeds(model, example), Settings()), ""
    except ModelError as error:
        counted = "what has a shape that cannot be inferred counts as nothing (`--shape` may help)"
        return types, f"{counted}; observing it failed: {error.problems[0].message}"


def _feeds(model: ir.Model, example: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return zeros for inputs of floats and ones for others; raises ModelError for an input that takes no such."""
    feeds: dict[str, Any] = {}
    for value in model.graph.inputs:
        name = str(value.name)
        if name not in example or value.dtype is None or not isinstance(value.type, ir.TensorType):
            raise ModelError(f"no value is known for input `{name}`")
        if value.dtype == ir.DataType.STRING:
            feeds[name] = np.full(example[name], "", object)
        else:
            make = np.zeros if value.dtype.is_floating_point() else np.ones
            feeds[name] = make(example[name], value.dtype.numpy())
    return feeds


def acts(model: ir.Model, target: Target) -> Sequence[Acts]:
    """Return, for every node that a pass has something to say about, what it says; the model is not changed."""
    could: dict[str, list[str]] = defaultdict(list)
    refused: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, kind in registry.passes().items():
        if kind.needs_calibration:
            continue  # it has something to say of a graph that earlier steps changed only
        result = _dry_run(kind.model_construct(), model, target)
        for site in result.applied:
            for node in site.nodes:
                could[node] += [name] if name not in could[node] else []
        for skip in result.skipped:
            if skip.reason:
                refused[skip.node].append((name, skip.reason))
    order = [str(node.name) for node in model.graph]
    return [Acts(n, tuple(could[n]), tuple(refused[n])) for n in order if n in could or n in refused]


def _dry_run(step: Pass, model: ir.Model, target: Target) -> PassResult:
    copy = graph.copy(model)
    settings = Settings(threads=1)
    view = View(
        copy, target, np.random.default_rng(0), step, graph.facts, lambda values: runtime.evaluate(values, settings)
    )
    if isinstance(step, Rewrite):
        return step.run(view)
    assert isinstance(step, Compression)
    found = step.sites(view)
    return PassResult(
        tuple(site for site in found if isinstance(site, Site)), tuple(skip for skip in found if isinstance(skip, Skip))
    )
