"""Every formulation of every node of a model, each in place of the node, run beside the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ccompile import graph, onnx_io, runtime
from ccompile.core import View
from ccompile.lowering import Formulation, Lowering
from ccompile.runtime import Settings
from ccompile.target import load_target


def view_of(step: Lowering, model: ir.Model) -> View:
    return View(model, load_target("generic-cpu", Path()), np.random.default_rng(0), step, graph.facts, lambda _: [])


def rewritten(step: Lowering, model: ir.Model) -> dict[tuple[str, str], ir.Model]:
    """Return the model with one node in one other formulation, by (node, label)."""
    found = {}
    view = view_of(step, model)
    for node in model.graph:
        forms = step.formulations(node, view)
        for form in forms if isinstance(forms, Sequence) else ():
            found[str(node.name), form.label] = _with(form, model, str(node.name))
    return found


def _with(form: Formulation, model: ir.Model, name: str) -> ir.Model:
    twin = graph.copy(model)
    form.build(twin.graph, graph.node_named(twin.graph, name))
    graph.remove_dead(twin.graph)
    assert not onnx_io.check(twin)
    assert graph.signature(twin) == graph.signature(model)
    return twin


def worst(model: ir.Model, twin: ir.Model, feeds: Mapping[str, Any]) -> float:
    """Return the largest relative L2 between the outputs of two models."""
    outputs = [runtime.Session(one, Settings(1)).run(feeds) for one in (model, twin)]
    errors = []
    for name, y in outputs[0].items():
        one, other = np.asarray(y, np.float64), np.asarray(outputs[1][name], np.float64)
        assert one.shape == other.shape
        assert one.size
        errors.append(float(np.linalg.norm(one - other) / np.linalg.norm(one)))
    return max(errors)
