"""What did the outputs do: comparison against a reference, task metrics, local errors, and blame.

All sums are float64 and streamed batch by batch. The reference is always the second operand: the source model's or the
previous step's outputs.
"""

from __future__ import annotations

import importlib
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx
import onnx_ir as ir

from ccompile import graph, runtime
from ccompile.core import Comparison, OutputComparison, Site, Tolerance
from ccompile.errors import DataError, SpecError, nearest

if TYPE_CHECKING:
    from ccompile.core import Array
    from ccompile.data import DataSet
    from ccompile.runtime import Feeds, Outputs, Settings

HELD_BYTES = 256 << 20  # recorded outputs and observed intermediates beyond this go to disk, or wait for a later sweep


class Recording:
    """The outputs of a model, batch by batch, as they were; beyond HELD_BYTES they lie in a temporary folder."""

    def __init__(self, limit: int = HELD_BYTES) -> None:
        self._batches: list[Outputs] = []
        self._room = limit
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def append(self, outputs: Outputs) -> None:
        """Keep one batch."""
        self._batches.append({name: self._keep(value) for name, value in outputs.items()})

    def _keep(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray) or value.dtype.kind in "OSU" or not value.size:
            return value
        self._room -= value.nbytes
        if self._room >= 0:
            return value
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="ccompile-")
        path = Path(self._folder.name) / f"{self._room}.npy"
        np.save(path, value)
        return np.load(path, mmap_mode="r")

    def __iter__(self) -> Iterator[Outputs]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def class_axis(array: Array) -> int | None:
    """Return the axis over which an argmax makes sense: the last of [N, C] and [N, T, C], axis 1 of [N, C, H, W]."""
    if array.ndim not in (2, 3, 4) or array.dtype.kind != "f":
        return None
    axis = 1 if array.ndim == 4 else array.ndim - 1
    return axis if array.shape[axis] >= 2 else None


@dataclass
class _Running:
    """Streamed sums over one output."""

    name: str
    rtol: float
    dtype: str = ""
    elements: int = 0
    mismatches: int = 0
    max_abs: float = 0.0
    excess: float = 0.0
    error: float = 0.0
    reference: float = 0.0
    candidate: float = 0.0
    dot: float = 0.0
    rows: int = 0
    kept: int = 0
    kl: float | None = 0.0
    problem: str = ""

    def update(self, candidate: Any, reference: Any) -> None:
        """Add one batch; sequences add their elements, maps their values."""
        if isinstance(reference, dict) and isinstance(candidate, dict):
            reference, candidate = ([d[k] for k in sorted(d)] for d in (reference, candidate))
        if isinstance(reference, list) and isinstance(candidate, list):
            if len(candidate) != len(reference):
                self.problem = self.problem or f"{len(candidate)} elements instead of {len(reference)}"
            for a, b in zip(candidate, reference, strict=False):
                self.update(a, b)
        elif reference is None or candidate is None:
            self.elements += 1
            self.mismatches += reference is not candidate
        else:
            self._arrays(np.asarray(candidate), np.asarray(reference))

    def _arrays(self, a: Array, b: Array) -> None:
        self.dtype = self.dtype or str(b.dtype)
        if a.shape != b.shape:
            self.problem = self.problem or f"shape {list(a.shape)} instead of {list(b.shape)}"
            return
        if a.dtype != b.dtype:
            self.problem = self.problem or f"type {a.dtype} instead of {b.dtype}"
            return
        self.elements += b.size
        if b.dtype.kind not in "fc" and b.dtype.name != "bfloat16":
            self.mismatches += int(np.count_nonzero(a != b))
            return
        if b.size:
            self._floats(a, b)

    def _floats(self, a: Array, b: Array) -> None:
        wide = np.complex128 if b.dtype.kind == "c" else np.float64
        a, b = a.astype(wide), b.astype(wide)
        finite = np.isfinite(b)
        strange = ~finite
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        self.mismatches += int(np.count_nonzero(strange & ~same)) + int(np.count_nonzero(finite & ~np.isfinite(a)))
        both = finite & np.isfinite(a)
        if not both.any():
            return
        x, y = (a, b) if both.all() else (np.where(both, a, 0), np.where(both, b, 0))
        difference = np.abs(x - y)
        self.max_abs = max(self.max_abs, float(difference.max()))
        self.excess = max(self.excess, float((difference - self.rtol * np.abs(y)).max()))
        self.error += float(np.vdot(difference, difference).real)
        self.reference += float(np.vdot(y, y).real)
        self.candidate += float(np.vdot(x, x).real)
        self.dot += float(np.vdot(x, y).real)
        if wide is np.float64 and (axis := class_axis(y)) is not None:
            self._classes(np.moveaxis(x, axis, -1), np.moveaxis(y, axis, -1))

    def _classes(self, a: Array, b: Array) -> None:
        best = b.argmax(-1)
        chosen = np.take_along_axis(a, best[..., None], -1)[..., 0]
        self.rows += best.size
        self.kept += int(np.count_nonzero(chosen >= a.max(-1)))
        if self.kl is None or b.min() < -1e-6 or np.abs(b.sum(-1) - 1).max() > 1e-3:
            self.kl = None
            return
        p, q = np.clip(b, 1e-12, None), np.clip(a, 1e-12, None)
        self.kl += float((p * np.log(p / q)).sum())

    def result(self) -> OutputComparison:
        """Return the comparison over all that was added."""
        relative = math.sqrt(self.error / self.reference) if self.reference else (math.inf if self.error else 0.0)
        norms = math.sqrt(self.reference) * math.sqrt(self.candidate)
        return OutputComparison(
            name=self.name,
            dtype=self.dtype,
            elements=self.elements,
            max_abs=self.max_abs,
            atol_needed=max(self.excess, 0.0),
            relative_l2=relative,
            sqnr_db=-20 * math.log10(relative)
            if 0 < relative < math.inf
            else (math.inf if not relative else -math.inf),
            cosine=min(self.dot / norms, 1.0) if norms else float(self.reference == self.candidate),
            argmax=self.kept / self.rows if self.rows else None,
            kl=max(self.kl, 0.0) / self.rows if self.rows and self.kl is not None else None,
            mismatches=self.mismatches,
            problem=self.problem,
        )


def compare(candidate: Iterable[Outputs], reference: Iterable[Outputs], samples: int, rtol: float = 0.0) -> Comparison:
    """Compare outputs batch by batch; `rtol` is the share of |reference| that `atol_needed` leaves out.

    An output that one side lacks is a problem of that output. Raises ValueError when the batches do not pair up.
    """
    running: dict[str, _Running] = {}
    for mine, theirs in zip(candidate, reference, strict=True):
        for name in (*theirs, *(name for name in mine if name not in theirs)):
            stats = running.setdefault(name, _Running(name, rtol))
            if name in mine and name in theirs:
                stats.update(mine[name], theirs[name])
            else:
                stats.problem = "missing" if name in theirs else "not in the reference"
    return Comparison(tuple(stats.result() for stats in running.values()), samples)


def rtol_of(tolerance: Tolerance | None) -> float:
    """Return the relative part of a tolerance, 0 without one."""
    return tolerance.rtol or 0.0 if tolerance is not None else 0.0


# ---------------------------------------------------------------------------------------------- task metrics


class Metric(Protocol):
    """A task metric: outputs by name over all samples, and labels; higher is better."""

    def __call__(self, outputs: Mapping[str, Array], labels: Array) -> float:
        """Return the metric."""
        ...


def _top(k: int, outputs: Mapping[str, Array], labels: Array) -> float:
    for scores in outputs.values():
        if scores.ndim == 2 and len(scores) == len(labels) and class_axis(scores) is not None:
            best = np.argpartition(-scores, min(k, scores.shape[1]) - 1, axis=1)[:, :k] if k > 1 else None
            hits = scores.argmax(1) == labels if best is None else (best == labels[:, None]).any(1)
            return float(hits.mean())
    raise DataError("no output has scores of shape [samples, classes] for top1/top5", hint="Name a function instead.")


def top1(outputs: Mapping[str, Array], labels: Array) -> float:
    """Return the share of samples whose largest score is the label's."""
    return _top(1, outputs, labels)


def top5(outputs: Mapping[str, Array], labels: Array) -> float:
    """Return the share of samples whose label is among the five largest scores."""
    return _top(5, outputs, labels)


METRICS: dict[str, Metric] = {"top1": top1, "top5": top5}


def find_metric(name: str, base: Path) -> Metric:
    """Return a metric by name, or `module:function`, the module found beside the spec or on the Python path.

    Raises SpecError: unknown name, module or function.
    """
    if name in METRICS:
        return METRICS[name]
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise SpecError(f"unknown metric `{name}`", hint=nearest(name, METRICS) + " Or name a `module:function`.")
    sys.path.insert(0, str(base.resolve()))
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # the user's module runs here
        said = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise SpecError(f"metric `{name}`: {said}", hint="It is a function (outputs, labels) -> float.") from error
    finally:
        sys.path.remove(str(base.resolve()))
    if not callable(found):
        raise SpecError(f"metric `{name}` is not a function", hint="It is a function (outputs, labels) -> float.")
    metric: Metric = found
    return metric


def measure(metrics: Mapping[str, Metric], outputs: Iterable[Outputs], labels: Sequence[Array]) -> dict[str, float]:
    """Return each metric over all batches. Raises DataError when a metric fails on these outputs."""
    if not metrics or not labels:
        return {}
    batches = list(outputs)
    names = [name for name, value in batches[0].items() if isinstance(value, np.ndarray) and value.ndim]
    whole = {name: np.concatenate([np.asarray(batch[name]) for batch in batches]) for name in names}
    truth = np.concatenate(list(labels))
    values = {}
    for name, metric in metrics.items():
        try:
            values[name] = float(metric(whole, truth))
        except (Exception, SystemExit) as error:  # the user's function runs here
            raise DataError(f"metric `{name}` fails: {type(error).__name__}: {error}") from error
    return values


# ---------------------------------------------------------------------------------------------- sites


@dataclass(frozen=True)
class SiteError:
    """What a site does to its output on real inputs, given the previous graph's input: |dy| / |x| and |dy| / |y|."""

    site: Site
    gain: float
    relative: float

    @property
    def holds(self) -> bool:
        """Return whether the stated bound holds, with 1e-4 for float rounding."""
        return self.site.bound is None or self.gain <= self.site.bound * (1 + 1e-4) + 1e-6


def site_errors(
    before: ir.Model, after: ir.Model, sites: Sequence[Site], feeds: Feeds, settings: Settings
) -> list[SiteError]:
    """Measure each site alone: the previous graph's input through the new nodes, against the previous graph's output.

    Sites without input, output and nodes, or whose new nodes read other variable values, are left out.
    """
    known = {str(node.name): node for node in after.graph}
    local = [
        (site, small)
        for site in sites
        if site.input and site.output and (small := _extract(after, site, known)) is not None
    ]
    found = []
    for group in _groups([site for site, _ in local], before, feeds, settings):
        names = sorted({name for site in group for name in (site.input, site.output)})
        inner = [name for name in names if name not in feeds]
        seen = runtime.Session(before, settings, inner).run(feeds, inner) | dict(feeds)
        for site in group:
            small = next(model for other, model in local if other is site)
            small.graph.inputs[0].type = ir.TensorType(ir.DataType.from_numpy(np.asarray(seen[site.input]).dtype))
            y = runtime.Session(small, settings).run({site.input: seen[site.input]})[site.output]
            x, reference = (np.asarray(seen[name], np.float64) for name in (site.input, site.output))
            error = float(np.linalg.norm(np.asarray(y, np.float64) - reference))
            norms = [float(np.linalg.norm(v)) for v in (x, reference)]
            found.append(SiteError(site, *(error / norm if norm else float(error > 0) for norm in norms)))
    return found


def _extract(model: ir.Model, site: Site, known: Mapping[str, ir.Node]) -> ir.Model | None:
    """Return the site's nodes as a model from site.input (its type left open) to site.output.

    None when they read any other variable value.
    """
    nodes = [known[name] for name in site.nodes if name in known]
    inside = {output for node in nodes for output in node.outputs}
    constants: dict[str, ir.TensorProtocol] = {}
    for value in (operand for node in nodes for operand in node.inputs if operand is not None):
        if value in inside or value.name == site.input:
            continue
        tensor = graph.stored(value)
        if tensor is None:
            return None
        constants[str(value.name)] = tensor
    if not any(value.name == site.output for value in inside):
        return None
    if not any(value is not None and value.name == site.input for node in nodes for value in node.inputs):
        return None
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [ir.to_proto(node) for node in nodes],
            "site",
            [onnx.ValueInfoProto(name=site.input)],
            [onnx.ValueInfoProto(name=site.output)],
            [onnx.helper.make_tensor(name, t.dtype.value, [0], []) for name, t in constants.items()],
        ),
        opset_imports=[onnx.helper.make_opsetid(k, v) for k, v in model.opset_imports.items()],
        ir_version=model.ir_version,
    )
    small = ir.from_proto(proto)
    for name, tensor in constants.items():
        small.graph.initializers[name].const_value = tensor
    return small


def _groups(sites: Sequence[Site], model: ir.Model, feeds: Feeds, settings: Settings) -> Iterator[list[Site]]:
    """Yield runs of sites whose observed values fit into HELD_BYTES together."""
    if not sites:
        return
    sizes = {name: seen.nbytes or 0 for name, seen in runtime.observed_shapes(model, feeds, settings).items()}
    group: list[Site] = []
    held = 0
    for site in sites:
        size = sizes.get(site.input, 0) + sizes.get(site.output, 0)
        if group and held + size > HELD_BYTES:
            yield group
            group, held = [], 0
        group.append(site)
        held += size
    yield group


@dataclass(frozen=True)
class Blame:
    """The first site in topological order whose output left its tolerance, and by how much."""

    site: Site
    comparison: OutputComparison
    searched: int = field(default=0)


def blame(
    before: ir.Model,
    after: ir.Model,
    sites: Sequence[Site],
    batches: Callable[[], Iterable[Feeds]],
    breaks: Callable[[OutputComparison], bool],
    settings: Settings,
    rtol: float = 0.0,
) -> Blame | None:
    """Return the first site whose output (the same value in both graphs) leaves its tolerance, or None.

    Memory is bounded: sites are observed in groups, in topological order, and the search stops at the first guilty one.
    """
    order = {str(node.name): index for index, node in enumerate(after.graph)}
    named = [site for site in sites if site.output]
    named.sort(key=lambda site: max((order.get(name, -1) for name in site.nodes), default=-1))
    first = next(iter(batches()), None)
    if first is None:
        return None
    searched = 0
    for group in _groups([replace(site, input="") for site in named], before, first, settings):
        names = [site.output for site in group]
        running = {name: _Running(name, rtol) for name in names}
        old, new = (runtime.Session(model, settings, names) for model in (before, after))
        for feeds in batches():
            theirs, mine = old.run(feeds, names), new.run(feeds, names)
            for name in names:
                running[name].update(mine[name], theirs[name])
        for site in group:
            searched += 1
            result = running[site.output].result()
            if breaks(result):
                return Blame(next(s for s in named if s.output == site.output), result, searched)
    return None


def labels_of(data: DataSet) -> list[Array]:
    """Return the labels of a data set, batch by batch; empty when it has none."""
    return [batch.labels for batch in data.batches() if batch.labels is not None] if data.has_labels else []
