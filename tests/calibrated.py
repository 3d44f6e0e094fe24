"""Calibration sets in memory, and steps that use them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import builders
import driver
import numpy as np
import onnx_ir as ir

from ccompile import graph, runtime
from ccompile.analysis import linear
from ccompile.moments import Layer
from ccompile.passes.prune_channels import PruneChannels
from ccompile.runtime import Settings
from ccompile.stats import Calibration
from ccompile.target import load_target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ccompile.core import Array

SETTINGS = Settings(1)
Feeds = dict[str, Any]


def feeds(model: ir.Model, sizes: Sequence[int] = (16, 16), seed: int = 5) -> list[Feeds]:
    """Seeded inputs, a batch of each size; every open dimension gets that size, integers are drawn below 4."""
    rng = np.random.default_rng(seed)
    found = []
    for size in sizes:
        batch: Feeds = {}
        for value in model.graph.inputs:
            dims = [dim if isinstance(dim, int) else size for dim in graph.declared_shape(value) or ()]
            kind = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
            drawn = rng.standard_normal(dims) if kind.kind == "f" else rng.integers(0, 4, dims)
            batch[str(value.name)] = np.asarray(drawn).astype(kind)
        found.append(batch)
    return found


def calibration(model: ir.Model, batches: Sequence[Feeds], **options: Any) -> Calibration:
    return Calibration(model, lambda: iter(batches), SETTINGS, **options)


def layers(model: ir.Model) -> dict[str, Layer]:
    """The linear layers by name."""
    found = {str(node.name): linear.layer(node) for node in model.graph}
    return {name: form for name, form in found.items() if isinstance(form, Layer)}


def outputs(model: ir.Model, batch: Mapping[str, Any], *observed: str) -> dict[str, Any]:
    return runtime.Session(model, SETTINGS, observed).run(batch)


def weight(model: ir.Model, name: str, index: int = 1) -> Array:
    """A copy of what input `index` of a node holds."""
    return np.array(graph.constant(graph.node_named(model.graph, name).inputs[index]))


def set_weight(model: ir.Model, name: str, array: Array, index: int = 1) -> None:
    graph.replace_constant(graph.node_named(model.graph, name), index, array.astype(np.float32))


def error(found: ir.Model, wanted: ir.Model, batches: Sequence[Feeds]) -> float:
    """Relative L2 distance of all outputs."""
    worst = 0.0
    for batch in batches:
        mine, theirs = outputs(found, batch), outputs(wanted, batch)
        for name, reference in theirs.items():
            assert reference.size
            worst = max(worst, float(np.linalg.norm(mine[name] - reference) / np.linalg.norm(reference)))
    return worst


def prune(
    model: ir.Model, batches: Sequence[Feeds] | None = None, seed: int = 0, target: str = "", **options: Any
) -> driver.Bench:
    """Run prune-channels, calibrated on `batches` (none when empty), with a tolerance that always holds."""
    given = feeds(model) if batches is None else batches
    run = driver.bench(model, feeds(model, seed=6), seed)
    run.statistics = calibration(model, given) if given else None
    if target:
        spec = replace(run.request.spec, target=load_target(target, Path()))
        run.request = replace(run.request, spec=spec)
        run.origin = run.state = run._state(model, run.state.outputs)
    run.step(0, PruneChannels.model_validate({"tolerance": {"relative_l2": 1e9}, **options}))
    assert run.record.verdict == "kept", run.record.reason
    assert run.result is not None
    return run


def skips(run: driver.Bench) -> dict[str, str]:
    """The reasons why nodes were left alone."""
    assert run.result is not None
    return {skip.node: skip.reason for skip in run.result.skipped}


def applied(run: driver.Bench) -> dict[str, str]:
    """The notes on the groups that were cut, by name."""
    assert run.result is not None
    return {site.nodes[0]: site.note for site in run.result.applied}


def dense_chain(depth: int, width: int = 4, seed: int = 2) -> ir.Model:
    """x[N, width]: dense and Relu, `depth` times."""
    net = builders.Net(seed)
    x = net.input("x", ["N", width])
    for index in range(depth):
        x = net.relu(net.dense(x, f"fc{index}", width, width))
    return net.model(x)
