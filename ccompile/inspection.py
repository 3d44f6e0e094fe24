"""A model on a target before any compile: what each node costs, which passes could act on it, and why others not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ccompile import cost, graph, registry, runtime
from ccompile.analysis.shapes import infer
from ccompile.core import Compression, Pass, PassResult, Rewrite, Site, Skip, View
from ccompile.cost import ModelCost
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
    """The cost per node and the passes per node."""

    cost: ModelCost
    acts: tuple[Acts, ...]
    notes: tuple[str, ...]


def inspect_model(path: Path, target: Target, shapes: Mapping[str, tuple[int, ...]]) -> Inspection:
    """Price a model at batch 1, or at the given input shapes, and ask every pass where it could act.

    Raises ModelError when the model cannot be read.
    """
    source = graph.load(path)
    types = infer(source.model, cost.example_shapes(source.model, shapes))
    return Inspection(cost.price(source.model, types, target), tuple(acts(source.model, target)), source.notes)


def acts(model: ir.Model, target: Target) -> Sequence[Acts]:
    """Return, for every node that a pass has something to say about, what it says; the model is not changed."""
    could: dict[str, list[str]] = defaultdict(list)
    refused: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, kind in registry.passes().items():
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
