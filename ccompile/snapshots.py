"""Graphs, layers and weights as the evidence records them: small, of bounded size, equal for equal models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ccompile import blas, graph
from ccompile.analysis import linear
from ccompile.core import Array, Site
from ccompile.cost import ModelCost
from ccompile.record import Record

NODES = 4000  # larger graphs are not recorded
WEIGHTS = 400  # sites of a step whose weights are recorded
BINS = 41
_SPECTRUM = 48  # singular values told
_SAMPLED = 1 << 18  # weights that a histogram counts
_SIDE = 512  # of a matrix whose spectrum is computed: the shorter one


class NodeRecord(Record):
    """A node: the values it reads and makes, by name, and type and shape of the weights it reads."""

    name: str
    op: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    weights: tuple[str, ...] = ()


class LayerRecord(Record):
    """cost.NodeCost of a node of the main graph, without what is free.

    `drift`: how far the value it makes is from the source's value of the same name, as relative L2; None where there is
    none of that shape.
    """

    node: str
    op: str
    params: int
    macs: int
    stored_bytes: int
    moved_bytes: int
    seconds: float
    drift: float | None = None


class WeightRecord(Record):
    """A layer's weight before and after: shares[BINS] of the weights between -limit and limit, and of zeros.

    `spectrum`: singular values of the weight before, the largest 1, at `ranks`; of grouped layers, of all groups.
    """

    shape: tuple[int, ...]
    limit: float
    before: tuple[float, ...]
    zeros_before: float
    after: tuple[float, ...] = ()
    zeros_after: float | None = None
    ranks: tuple[int, ...] = ()
    spectrum: tuple[float, ...] = ()


class ChangeRecord(Record):
    """What a step did to the graph: nodes that are gone, and nodes that are new or not what they were."""

    removed: tuple[str, ...] = ()
    changed: tuple[NodeRecord, ...] = ()


def nodes_of(model: ir.Model) -> tuple[NodeRecord, ...]:
    """Return the main graph, without Constant nodes; nothing of a graph of more than NODES."""
    if len(model.graph) > NODES:
        return ()
    return tuple(_node(node) for node in model.graph if node.op_type != "Constant")


def _node(node: ir.Node) -> NodeRecord:
    reads, weights = [], []
    for value in dict.fromkeys(value for value in node.inputs if value is not None):
        tensor = graph.stored(value)
        if tensor is None:
            reads.append(str(value.name))
        elif tensor.size > 1:
            weights.append(f"{tensor.dtype.name.lower()} {'x'.join(map(str, graph.dims_of(tensor)))}")
    kind = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
    makes = tuple(str(value.name) for value in node.outputs if value.name)
    return NodeRecord(name=str(node.name), op=kind, reads=tuple(reads), makes=makes, weights=tuple(weights))


def change_of(before: ir.Model, after: ir.Model) -> ChangeRecord | None:
    """Return how the graph after differs from the one before; None where either has more than NODES."""
    old, new = ({node.name: node for node in nodes_of(model)} for model in (before, after))
    if max(len(before.graph), len(after.graph)) > NODES:
        return None
    changed = tuple(node for name, node in new.items() if old.get(name) != node)
    return ChangeRecord(removed=tuple(name for name in old if name not in new), changed=changed)


def layers_of(cost: ModelCost, drifts: Mapping[str, float]) -> tuple[LayerRecord, ...]:
    """Return the nodes that cost anything, at most NODES; drifts: by node."""
    rows = [node for node in cost.nodes if node.seconds or node.stored_bytes or node.macs]
    return tuple(
        LayerRecord(
            node=row.name,
            op=row.op,
            params=row.params,
            macs=row.macs,
            stored_bytes=row.stored_bytes,
            moved_bytes=row.moved_bytes,
            seconds=row.seconds,
            drift=drifts.get(row.name),
        )
        for row in rows[:NODES]
    )


# ---------------------------------------------------------------------------------------------- weights


def weights_of(before: ir.Model, after: ir.Model, sites: Iterable[Site]) -> dict[Site, WeightRecord]:
    """Return the weights of the first WEIGHTS sites at which a layer with a constant weight stood."""
    old, new = ({str(node.name): node for node in model.graph} for model in (before, after))
    makers = {str(value.name): node for node in before.graph for value in node.outputs}
    found: dict[Site, WeightRecord] = {}
    with blas.one_thread():
        for site in sites:
            if len(found) == WEIGHTS:
                break
            node = old.get(site.nodes[0]) or makers.get(site.output)
            W = None if node is None else _matrix(node)
            if node is not None and W is not None:
                twin = new.get(str(node.name))
                found[site] = weight_record(W, None if twin is None else _matrix(twin))
    return found


def _matrix(node: ir.Node) -> Array | None:
    """Return a layer's weight W[g, o, d], or None where it is no layer of finite floats."""
    form = linear.layer(node)
    if isinstance(form, str) or graph.constant(node.inputs[form.weight]) is None:
        return None
    W = linear.matrix(node, form)
    return W if W.size and np.isfinite(W).all() else None


def weight_record(W: Array, now: Array | None) -> WeightRecord:
    """Return the record of a weight W[g, o, d], and of what it is now, of any shape."""
    limit = float(np.abs(W).max()) or 1.0
    ranks, spectrum = _spectrum(W)
    after: dict[str, object] = {}
    if now is not None:
        after = {"after": _shares(now, limit), "zeros_after": _short(float((now == 0).mean()))}
    return WeightRecord(
        shape=W.shape[int(W.shape[0] == 1) :],
        limit=_short(limit),
        before=_shares(W, limit),
        zeros_before=_short(float((W == 0).mean())),
        ranks=ranks,
        spectrum=spectrum,
        **after,
    )


def _shares(W: Array, limit: float) -> tuple[float, ...]:
    """Return the share of the weights in each of BINS bins between -limit and limit; beyond counts at the ends."""
    flat = W.reshape(-1)
    flat = np.clip(flat[:: -(-flat.size // _SAMPLED)], -limit, limit)
    counts, _ = np.histogram(flat, BINS, (-limit, limit))
    return tuple(_short(count / flat.size) for count in counts)


def _spectrum(W: Array) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return ranks and singular values, from the eigenvalues of the smaller Gram matrix; nothing of large matrices."""
    side = min(W.shape[1:])
    if side > _SIDE or side < 2:
        return (), ()
    gram = W @ W.transpose(0, 2, 1) if W.shape[1] == side else W.transpose(0, 2, 1) @ W
    values = np.sqrt(np.clip(np.linalg.eigvalsh(gram.astype(np.float64)), 0.0, None)).reshape(-1)
    values = np.sort(values)[::-1]
    picks: Sequence[int] = np.unique(np.linspace(0, values.size - 1, _SPECTRUM).round().astype(int)).tolist()
    top = float(values[0]) or 1.0
    return tuple(index + 1 for index in picks), tuple(_short(float(values[index]) / top, 3) for index in picks)


def _short(value: float, digits: int = 4) -> float:
    """Return a number rounded to a few digits: files stay small, and last bits do not matter.

    >>> _short(0.123456)
    0.1235
    """
    return float(f"{value:.{digits}g}")
