"""Calibration statistics of linear layers: Gram matrices of their real inputs, and cross moments with target outputs.

`collect` observes one graph in one sweep over the calibration set. `Chain` advances the source and the current graph
side by side from layer to layer, holding only the tensors that are live at the cut, so that a sequential fit of a whole
network costs one forward pass of each graph, however deep it is. Batches stream; what is held beyond HELD_BYTES lies on
disk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from ccompile import graph, runtime
from ccompile.analysis import linear, saturation
from ccompile.comparison import class_axis, compare
from ccompile.core import Array
from ccompile.errors import PassError
from ccompile.ledger import Ledger
from ccompile.moments import ChannelMoments, Layer, Moments, Spread
from ccompile.recording import HELD_BYTES, Recording, runs_within
from ccompile.runtime import Feeds, Outputs, Settings
from ccompile.tolerance import Comparison
from ccompile.walking import Batches, Walker, first_change

ROWS = 32_768  # rows kept per layer: a seeded sample of all rows
FEW = 16  # rows per column below which the ridge of a fit is tried on rows that are held out
PROBE = 4  # every PROBE-th batch is kept out of `moments`, for `impact`: what a curve costs is measured on fresh inputs


class Calibration:
    """The calibration set of a compile, as passes see it (core.Statistics)."""

    def __init__(
        self,
        source: ir.Model,
        batches: Batches,
        settings: Settings,
        seed: int = 0,
        cap: int = ROWS,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.source, self.batches, self.settings = source, batches, settings
        self.seed, self.cap, self.tell = seed, cap, tell
        self.count = sum(1 for _ in batches())
        self.ledger = Ledger()
        self._reference: Recording | None = None
        self._base: tuple[ir.Model, Recording] | None = None  # what `held_out` was last asked to compare with
        self._prefix: Walker | None = None  # of the graph that `impact` was last given as base
        if not self.count:
            raise PassError("the calibration data is empty")

    def moments(self, model: ir.Model, layers: Sequence[Layer]) -> Mapping[str, Moments]:
        """Return the moments of the layers of one graph by node name, the graph's own outputs as targets.

        One inference of each batch that `impact` does not use, or several when the observed tensors of all layers
        exceed HELD_BYTES.
        """
        found = {layer.name: self.ledger.watch(Moments(layer)) for layer in layers}
        done = 0
        for group in self._groups(model, layers):
            done += len(group)
            names = sorted({name for layer in group for name in (layer.input, layer.output)})
            session = runtime.Session(model, self.settings, names)
            for index, feeds in enumerate(self.batches()):
                if self._is_probe(index):
                    continue
                self.tell(f"statistics {done}/{len(layers)} layers, batch {index + 1}/{self.count}")
                inner = [name for name in names if name not in feeds]
                values = session.run(feeds, inner) | {name: feeds[name] for name in names if name in feeds}
                for layer in group:
                    rows = self.rows(layer, index, values[layer.input], values[layer.output])
                    found[layer.name].add(rows.x, rows.y, rows.seen, self.is_wide(layer, rows.seen))
            self.ledger.update()
        return found

    def _groups(self, model: ir.Model, layers: Sequence[Layer]) -> Iterator[list[Layer]]:
        seen = runtime.observed_shapes(model, next(iter(self.batches())), self.settings)
        sizes = {name: kind.nbytes or 0 for name, kind in seen.items()}
        return runs_within(layers, lambda form: sizes.get(form.input, 0) + sizes.get(form.output, 0), HELD_BYTES)

    def rows(
        self, form: Layer, batch: int, x: Array, y: Array, aim: Aim | None = None, other: Array | None = None
    ) -> Rows:
        """Return sampled rows of one batch: of a layer's input x, of the value y that it aims at, and of `other`.

        Without an aim, y is the layer's own output.
        """
        target, kept = (form, None) if aim is None else (aim.target, aim.kept)
        count = linear.row_count(target, y.shape)
        quota = max(1, -(-self.cap // self.count))
        picks = np.arange(count)
        if count > quota:
            rng = np.random.default_rng([self.seed, batch, *form.output.encode()])
            picks = np.sort(rng.choice(count, quota, replace=False))
        wanted = linear.output_rows(target, y, picks)
        if kept is not None:
            flat = wanted.transpose(1, 0, 2).reshape(len(picks), -1)[:, kept]
            wanted = flat.reshape(len(picks), form.groups, form.out).transpose(1, 0, 2)
        added = linear.output_rows(form, other, picks) if other is not None else np.zeros(1)
        return Rows(linear.input_rows(form, x, y.shape, picks), wanted, added, count)

    def is_wide(self, form: Layer, seen: int) -> bool:
        """Return whether a layer's rows take less than their products, where a batch has `seen`."""
        return form.columns > min(self.cap, seen * self.count)

    def spreads(self, model: ir.Model, axes: Mapping[str, int | None]) -> Mapping[str, Spread]:
        """Return how values of one graph are distributed on the batches that `held_out` does not use, in one sweep.

        axes: the values by name, each with the axis along which means are wanted, or None. Several sweeps where the
        values of one batch exceed HELD_BYTES.
        """
        found = {name: Spread(axis) for name, axis in axes.items()}
        seen = runtime.observed_shapes(model, next(iter(self.batches())), self.settings)
        sizes = {name: kind.nbytes or 0 for name, kind in seen.items()}
        for group in runs_within(list(found), lambda name: sizes.get(name, 0), HELD_BYTES):
            session = runtime.Session(model, self.settings, group)
            for index, feeds in enumerate(self.batches()):
                if self._is_probe(index):
                    continue
                self.tell(f"ranges, batch {index + 1}/{self.count}")
                values = session.run(feeds, [name for name in group if name not in feeds])
                for name in group:
                    found[name].add(np.asarray(values[name] if name in values else feeds[name]))
        return found

    def maps(self, model: ir.Model, values: Sequence[str], elements: int) -> Mapping[str, Array]:
        """Return a seeded draw of the maps [m, ...] of values [n, c, ...] on the batches that `held_out` does not use.

        elements: how many each value's maps have in all, at most, but one map per batch.
        """
        found: dict[str, list[Array]] = {name: [] for name in values}
        session = runtime.Session(model, self.settings, values)
        for index, feeds in enumerate(self.batches()):
            if self._is_probe(index):
                continue
            self.tell(f"maps, batch {index + 1}/{self.count}")
            made = session.run(feeds, [name for name in values if name not in feeds])
            for name in values:
                whole = np.asarray(made[name] if name in made else feeds[name])
                whole = whole.reshape(-1, *whole.shape[2:])
                quota = max(1, elements * len(whole) // max(whole.size * self.count, 1))
                rng = np.random.default_rng([self.seed, index, *name.encode()])
                picks = np.sort(rng.choice(len(whole), min(quota, len(whole)), replace=False))
                found[name].append(whole[picks])
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def held_out(self, model: ir.Model, base: ir.Model) -> Comparison:
        """Return the outputs of a graph against those of `base` on the batches that `moments` has not seen."""
        if self._base is None or self._base[0] is not base:
            outputs = self.ledger.watch(Recording())
            for found in runtime.outputs_of(base, self._probes(), self.settings):
                outputs.append(found)
            self._base = base, outputs
        mine = runtime.outputs_of(model, self._probes(), self.settings)
        return compare(mine, self._base[1], len(self._base[1]))

    def chain(self, model: ir.Model, reference: ir.Model | None = None, spare: bool = False) -> Chain:
        """Return a walk through the source, or another reference, and `model`, layer by layer.

        spare: leave out the batches that `held_out` uses.
        """
        self._prefix = None
        return Chain(self, model, reference or self.source, self._others if spare else self.batches)

    def impact(self, model: ir.Model, base: ir.Model | None = None) -> float:
        """Return how far a graph's outputs are from the source's, on batches that `moments` has not seen.

        Mean KL divergence of the softmax over classes where an output has classes, else the relative squared error;
        summed over outputs. With fewer than PROBE batches all are used. base: a graph that `model` is a changed copy
        of; what comes before the change is run once for all copies whose changes come later and later.
        """
        if self._reference is None:
            self._reference = self.ledger.watch(Recording())
            for outputs in runtime.outputs_of(self.source, self._probes(), self.settings):
                self._reference.append(outputs)
        mine = self._outputs(model, base)
        return float(np.mean([divergence(a, b) for a, b in zip(mine, self._reference, strict=True)]))

    def _outputs(self, model: ir.Model, base: ir.Model | None) -> Iterator[Outputs]:
        """Yield the outputs on the probes, from the first change on where `base` allows it."""
        if base is None:
            return runtime.outputs_of(model, self._probes(), self.settings)
        if self._prefix is None or self._prefix.model is not base:
            self._prefix = Walker(base, self._probes, self.settings, self.ledger)
        start, nodes = first_change(base, model), list(model.graph)
        made = {output for node in nodes[start:] for output in node.outputs}
        read, known = ({str(v.name) for v in runtime.read_values(n[start:])} for n in (nodes, self._prefix.nodes))
        if start < self._prefix.at or not made.issuperset(model.graph.outputs) or not read <= known:
            return runtime.outputs_of(model, self._probes(), self.settings)
        self._prefix.advance(start, "")
        return self._prefix.outputs_from(model, nodes[start:])

    def is_tried(self, found: Moments, index: int) -> bool:
        """Return whether a batch's rows are held out as well, to try ridges on: where rows are few for the columns."""
        return self._is_probe(index) and found.rows * self.count < FEW * found.layer.columns * (index + 1)

    def _is_probe(self, index: int) -> bool:
        return self.count >= PROBE and index % PROBE == PROBE - 1

    def _probes(self) -> Iterator[Feeds]:
        return (feeds for index, feeds in enumerate(self.batches()) if self.count < PROBE or self._is_probe(index))

    def _others(self) -> Iterator[Feeds]:
        return (feeds for index, feeds in enumerate(self.batches()) if not self._is_probe(index))


def divergence(candidate: Outputs, reference: Outputs) -> float:
    """Return the mean KL divergence (softmax over classes) or relative squared error, summed over float outputs."""
    total = 0.0
    for name, expected in reference.items():
        if not isinstance(expected, np.ndarray) or expected.dtype.kind != "f":
            continue
        a, b = (np.asarray(value, np.float64) for value in (candidate[name], expected))
        axis = class_axis(expected)
        if axis is None:
            total += float(np.square(a - b).sum() / max(np.square(b).sum(), 1e-30))
            continue
        p, q = (_log_probabilities(value, axis) for value in (b, a))
        total += float((np.exp(p) * (p - q)).sum(axis).mean())
    return total


def _log_probabilities(scores: Array, axis: int) -> Array:
    """Return log-probabilities, of scores through softmax, of probabilities (summing to 1) as they are."""
    if scores.min() >= 0 and np.abs(scores.sum(axis) - 1).max() < 1e-3:
        log: Array = np.log(np.clip(scores, 1e-12, None))
        return log
    shifted = scores - scores.max(axis, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis, keepdims=True))
    return result


@dataclass(frozen=True, eq=False)
class Aim:
    """What a layer is fitted to: the source's `value`, made by `target`, of whose channels (flat) `kept` are wanted.

    `other`: the current value that an Add behind the layer adds to its output to make up `value`, if any.
    """

    value: str
    other: str
    target: Layer
    kept: Array | None


@dataclass(frozen=True, eq=False)
class Rows:
    """Sampled rows of one batch, out of `seen`: x[g, r, d], and wanted[g, r, o] of the layer's output and `other`."""

    x: Array
    wanted: Array
    other: Array
    seen: int

    @property
    def y(self) -> Array:
        """Return the target [g, r, o] of the layer's own output."""
        return self.wanted - self.other


@dataclass(frozen=True, eq=False)
class Sight:
    """What an activation shows of a layer: `limits` outside which it forgets, and the fit (W[g, o, d], b[g, o]) so far.

    Where the wanted value lies outside, any value outside does: the fit's own is taken as the target if it is, else
    the limit. The least-squares fit to these targets loses no more behind the activation than the fit so far
    (majorisation), where the fit to the wanted values themselves spends its freedom on what nobody sees.
    Source: Zhang et al. 2015, arXiv:1505.06798 (nonlinear responses).
    """

    limits: tuple[float, float]
    W: Array
    b: Array

    def targets(self, rows: Rows) -> tuple[Array, float]:
        """Return targets [g, r, o] of the layer's own output, and what the fit loses behind the activation."""
        (low, high), wanted = self.limits, rows.wanted
        made = rows.x @ self.W.transpose(0, 2, 1) + self.b[:, None] + rows.other
        seen = np.where(wanted <= low, np.minimum(made, low), np.where(wanted >= high, np.maximum(made, high), wanted))
        left = float(np.square(np.clip(made, low, high) - np.clip(wanted, low, high)).sum())
        return seen - rows.other, left


class Chain:
    """Source and current graph, side by side, layer by layer in the current graph's order."""

    def __init__(self, calibration: Calibration, current: ir.Model, source: ir.Model, batches: Batches) -> None:
        self.calibration = calibration
        self.source, self.current = (
            Walker(model, batches, calibration.settings, calibration.ledger) for model in (source, current)
        )
        self.producer = {str(output.name): at for at, node in enumerate(self.source.nodes) for output in node.outputs}
        first = next(iter(batches()))
        self.shapes, self.source_shapes = (
            {name: kind.shape for name, kind in runtime.observed_shapes(model, first, calibration.settings).items()}
            for model in (current, source)
        )

    def moments(self, layer: Layer, target: Layer | None = None, kept: Array | None = None) -> Moments:
        """Return the moments of a layer's current inputs with the source's outputs at the value of the same name.

        Layers must be asked for in topological order. target: the layer in the source, when its channels were cut;
        kept: which of the target's channels, flat over groups, the layer still has. Raises PassError when the source
        has no such value, or, without `kept`, one of another shape.
        """
        self._check(layer.name, layer.output, same_shape=kept is None)
        self.current.reach(layer.name, layer.input)
        aim = self._aim(layer, target, kept)
        self._reach(layer.name, aim.value)
        watch, held = self.calibration.ledger.watch, None
        found = watch(Moments(layer))
        for index, rows in enumerate(self._rows(layer, aim)):
            start, y = found.rows, rows.y
            found.add(rows.x, y, rows.seen, self.calibration.is_wide(layer, rows.seen))
            if self.calibration.is_tried(found, index):
                held = held or watch(Moments(layer))
                held.add(rows.x, y, rows.seen, wide=found.x is not None)
                found.spans.append((start, found.rows))
        found.held = held
        self.calibration.ledger.update()
        return found

    def visible(
        self, known: Moments, fit: tuple[Array, Array], target: Layer | None = None, kept: Array | None = None
    ) -> Moments | None:
        """Return the moments of the layer asked for last with targets as the activation behind it sees them.

        known: its moments; fit: W[g, o, d], b[g, o] so far; see Sight. None where nothing is forgotten.
        """
        layer = known.layer
        aim = self._aim(layer, target, kept)
        output = graph.node_named(self.current.model.graph, layer.name).outputs[0]
        reader = graph.only_use(output)
        limits = saturation.limits(reader.outputs[0] if aim.other and reader is not None else output)
        if limits is None:
            return None
        found, sight = known.towards(), Sight(limits, *fit)
        for rows in self._rows(layer, aim):
            found.retarget(rows.x, *sight.targets(rows))
        self.calibration.ledger.update()
        return found

    def _rows(self, layer: Layer, aim: Aim) -> Iterator[Rows]:
        """Yield sampled rows, batch by batch."""
        others = self.current.values(aim.other) if aim.other else itertools.repeat(None)
        triples = zip(self.current.values(layer.input), self.source.values(aim.value), others, strict=False)
        for index, (x, y, other) in enumerate(triples):
            yield self.calibration.rows(layer, index, x, y, aim, other)

    def channels(self, node: str, value: str, target: str) -> ChannelMoments:
        """Return the moments per channel (axis 1) of what a node reads now, with the source's `target` as target.

        Nodes must be asked for in topological order, as in `moments`. Raises PassError when the source has no value
        `target` of the shape that it has now.
        """
        self._check(node, target, same_shape=True)
        self.current.reach(node, value)
        self._reach(node, target)
        found = ChannelMoments()
        for x, y in zip(self.current.values(value), self.source.values(target), strict=True):
            found.add(x, y)
        return found

    def _check(self, node: str, target: str, same_shape: bool) -> None:
        if target not in self.producer:
            raise PassError(f"the source has no value `{target}` to fit to", f"node {node}")
        now, then = self.shapes.get(target), self.source_shapes.get(target)
        if same_shape and now != then:
            raise PassError(f"`{target}` had another shape in the source: {then}, now {now}", f"node {node}")

    def _reach(self, node: str, target: str) -> None:
        """Advance the source until it has made `target`, and hold it."""
        if self.producer[target] < self.source.at and target not in next(iter(self.source.live), {}):
            raise PassError(f"the source makes `{target}` before what other layers were fitted to", f"node {node}")
        self.source.advance(max(self.producer[target] + 1, self.source.at), target)

    def _aim(self, layer: Layer, target: Layer | None, kept: Array | None) -> Aim:
        """Return what a layer is fitted to.

        Where only an Add reads the layer and its other operand is there already (a residual path), the sum is the
        goal, so that the fit also makes up for what the other path has lost; else the layer's own output.
        """
        own = Aim(layer.output, "", target or layer, kept)
        output = graph.node_named(self.current.model.graph, layer.name).outputs[0]
        reader = graph.only_use(output)
        if reader is None or reader.op_type != "Add" or reader.domain not in ("", "ai.onnx"):
            return own
        other = next((str(v.name) for v in reader.inputs if v is not None and v is not output), "")
        total = str(reader.outputs[0].name)
        held = next(iter(self.current.live), {})
        if total not in self.producer or other not in held:
            return own
        if self.shapes.get(other) != self.shapes.get(layer.output):
            return own
        return replace(own, value=total, other=other)
