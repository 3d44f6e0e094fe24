"""Calibration statistics of linear layers: Gram matrices of their real inputs, and cross moments with target outputs.

`collect` observes the source in one sweep over the calibration set. `Chain` advances the source and the current graph
side by side from layer to layer, holding only the tensors that are live at the cut, so that a sequential fit of a whole
network costs one forward pass of each graph, however deep it is. Batches stream; what is held beyond
verify.HELD_BYTES lies on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ccompile import runtime
from ccompile.analysis import linear
from ccompile.analysis.linear import Layer
from ccompile.core import Array
from ccompile.errors import PassError
from ccompile.runtime import Feeds, Settings
from ccompile.verify import HELD_BYTES, Recording

ROWS = 32_768  # rows kept per layer: a seeded sample of all rows
Batches = Callable[[], Iterable[Feeds]]


@dataclass
class Moments:
    """Raw moments of one layer over sampled rows, per group, in float64; y is the target's output.

    rows of `seen`; sx[g, d], sy[g, o], xx[g, d, d] = sum x x^T, yx[g, o, d] = sum y x^T, yy[g, o] = sum y^2. When d
    exceeds the rows, `xx` and `yx` are None and the rows themselves are kept: x[g, r, d], y[g, r, o].
    """

    layer: Layer
    rows: int = 0
    seen: int = 0
    sx: Array = field(default_factory=lambda: np.zeros(0))
    sy: Array = field(default_factory=lambda: np.zeros(0))
    yy: Array = field(default_factory=lambda: np.zeros(0))
    xx: Array | None = None
    yx: Array | None = None
    x: Array | None = None
    y: Array | None = None

    @property
    def mean_x(self) -> Array:
        """Return the mean input [g, d]."""
        return self.sx / max(self.rows, 1)

    @property
    def mean_y(self) -> Array:
        """Return the mean target output [g, o]."""
        return self.sy / max(self.rows, 1)

    @property
    def variance_y(self) -> Array:
        """Return the variance of the target output [g, o]."""
        return np.maximum(self.yy / max(self.rows, 1) - np.square(self.mean_y), 0.0)

    def centred(self) -> tuple[Array, Array]:
        """Return the centred sums (H[g, d, d], C[g, o, d]): x and y less their means."""
        if self.x is not None and self.y is not None:
            x, y = self.x - self.mean_x[:, None], self.y - self.mean_y[:, None]
            return x.transpose(0, 2, 1) @ x, y.transpose(0, 2, 1) @ x
        assert self.xx is not None
        assert self.yx is not None
        H = self.xx - self.sx[:, :, None] * self.mean_x[:, None, :]
        return H, self.yx - self.sy[:, :, None] * self.mean_x[:, None, :]

    @property
    def power(self) -> Array:
        """Return the centred sum of squares of the target output [g, o]."""
        return self.variance_y * self.rows

    def add(self, x: Array, y: Array, seen: int, wide: bool) -> None:
        """Add rows x[g, r, d], y[g, r, o] out of `seen`; `wide` keeps the rows."""
        first = not self.rows
        self.rows += x.shape[1]
        self.seen += seen
        sums = (x.sum(1), y.sum(1), np.square(y).sum(1))
        self.sx, self.sy, self.yy = sums if first else (self.sx + sums[0], self.sy + sums[1], self.yy + sums[2])
        if wide:
            self.x = x if self.x is None else np.concatenate([self.x, x], 1)
            self.y = y if self.y is None else np.concatenate([self.y, y], 1)
            return
        xx, yx = x.transpose(0, 2, 1) @ x, y.transpose(0, 2, 1) @ x
        self.xx = xx if self.xx is None else self.xx + xx
        self.yx = yx if self.yx is None else self.yx + yx


class _Sampler:
    """Picks the same seeded rows of a layer's batches for every graph."""

    def __init__(self, total: int, cap: int, seed: int) -> None:
        self.total, self.cap, self.seed = total, cap, seed

    def picks(self, layer: Layer, batch: int, share: float, count: int) -> Array:
        """Return sorted row numbers: all when they fit into the batch's share of the cap."""
        quota = max(1, int(np.ceil(self.cap * share)))
        if count <= quota:
            return np.arange(count)
        rng = np.random.default_rng([self.seed, batch, *layer.output.encode()])
        return np.sort(rng.choice(count, quota, replace=False))

    def add(self, moments: Moments, batch: int, x: Array, y: Array) -> None:
        """Add the picked rows of one batch: x and y are whole tensors."""
        form = moments.layer
        count = linear.row_count(form, y.shape)
        picks = self.picks(form, batch, 1 / max(self.total, 1), count)
        rows = linear.input_rows(form, x, y.shape, picks)
        moments.add(rows, linear.output_rows(form, y, picks), count, wide=form.columns > self.cap)


def collect(
    model: ir.Model, layers: Sequence[Layer], batches: Batches, settings: Settings, seed: int = 0, cap: int = ROWS
) -> dict[str, Moments]:
    """Return the moments of the layers of one graph, by node name, its own outputs as targets.

    One inference of each batch, or several when the observed tensors of all layers exceed HELD_BYTES. Raises PassError
    without calibration data.
    """
    found = {layer.name: Moments(layer) for layer in layers}
    sampler = _Sampler(sum(1 for _ in batches()), cap, seed)
    if not sampler.total:
        raise PassError("calibration data is empty")
    for group in _groups(model, layers, next(iter(batches())), settings):
        names = sorted({name for layer in group for name in (layer.input, layer.output)})
        session = runtime.Session(model, settings, names)
        for index, feeds in enumerate(batches()):
            inner = [name for name in names if name not in feeds]
            values = session.run(feeds, inner) | {name: feeds[name] for name in names if name in feeds}
            for layer in group:
                sampler.add(found[layer.name], index, values[layer.input], values[layer.output])
    return found


def _groups(model: ir.Model, layers: Sequence[Layer], feeds: Feeds, settings: Settings) -> Iterator[list[Layer]]:
    sizes = {name: seen.nbytes or 0 for name, seen in runtime.observed_shapes(model, feeds, settings).items()}
    group: list[Layer] = []
    held = 0
    for layer in layers:
        size = sizes.get(layer.input, 0) + sizes.get(layer.output, 0)
        if group and held + size > HELD_BYTES:
            yield group
            group, held = [], 0
        group.append(layer)
        held += size
    if group:
        yield group


class _Walker:
    """One graph on its way through the calibration set: what is live at the cut, batch by batch."""

    def __init__(self, model: ir.Model, batches: Batches, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.nodes = list(model.graph)
        self.index = {str(node.name): at for at, node in enumerate(self.nodes)}
        self.at = 0
        self.live = Recording()
        for feeds in batches():
            self.live.append(dict(feeds))

    def advance(self, to: int, wanted: str) -> None:
        """Run nodes[at:to] on every batch and keep what later nodes read, and `wanted`."""
        part = self.nodes[self.at : to]
        needed = {wanted} | {str(value.name) for value in runtime.read_values(self.nodes[to:])}
        made = {str(output.name) for node in part for output in node.outputs if output.name}
        kept = Recording()
        session = None
        for values in self.live:
            passing = {name: value for name, value in values.items() if name in needed}
            if made:
                if session is None:
                    dtypes = {name: np.asarray(value).dtype for name, value in values.items()}
                    session = runtime.Session(
                        runtime.part_of(self.model, part, dtypes, sorted(made & needed)), self.settings
                    )
                passing |= session.run({name: v for name, v in values.items() if name in session.inputs})
            kept.append(passing)
        self.live, self.at = kept, to

    def values(self, name: str) -> Iterator[Array]:
        """Yield a live value, batch by batch."""
        return (np.asarray(outputs[name]) for outputs in self.live)


class Chain:
    """Source and current graph, side by side, layer by layer in the current graph's order."""

    def __init__(
        self,
        source: ir.Model,
        current: ir.Model,
        batches: Batches,
        settings: Settings,
        seed: int = 0,
        cap: int = ROWS,
    ) -> None:
        self.source = _Walker(source, batches, settings)
        self.current = _Walker(current, batches, settings)
        self.sampler = _Sampler(len(self.current.live), cap, seed)
        self.producer = {str(output.name): at for at, node in enumerate(self.source.nodes) for output in node.outputs}

    def moments(self, layer: Layer) -> Moments:
        """Return the moments of a layer's current inputs with the source's outputs at the value of the same name.

        Layers must be asked for in topological order. Raises PassError when the source has no such value.
        """
        if layer.output not in self.producer:
            raise PassError(f"the source has no value `{layer.output}` to fit to", f"node {layer.name}")
        self.current.advance(max(self.current.index[layer.name], self.current.at), layer.input)
        self.source.advance(max(self.producer[layer.output] + 1, self.source.at), layer.output)
        found = Moments(layer)
        pairs = zip(self.current.values(layer.input), self.source.values(layer.output), strict=True)
        for index, (x, y) in enumerate(pairs):
            self.sampler.add(found, index, x, y)
        return found
