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
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx
import onnx_ir as ir

from ccompile import graph, runtime
from ccompile.core import EXACT_RELATIVE_L2, Comparison, OutputComparison, Site, Tolerance
from ccompile.errors import DataError, SpecError, nearest

if TYPE_CHECKING:
    from ccompile.core import Array
    from ccompile.data import DataSet
    from ccompile.runtime import Feeds, Outputs, Settings

HELD_BYTES = 256 << 20  # recorded outputs and observed intermediates beyond this go to disk, or wait for a later sweep


@dataclass(frozen=True)
class _Spilled:
    """An array in a file; open only while it is read, as open files are few."""

    path: Path

    def load(self) -> Array:
        array: Array = np.load(self.path, mmap_mode="r")
        return array


class Recording:
    """The outputs of a model, batch by batch, as they were; beyond `limit` bytes they lie in a temporary folder."""

    def __init__(self, limit: int | None = None) -> None:
        self._batches: list[Outputs] = []
        self._room = HELD_BYTES if limit is None else limit
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def append(self, outputs: Outputs) -> None:
        """Keep one batch."""
        self._batches.append({name: self._keep(value) for name, value in outputs.items()})

    def _keep(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._keep(item) for item in value]
        if not isinstance(value, np.ndarray) or value.dtype.kind in "OSU" or not value.size:
            return value
        self._room -= value.nbytes
        if self._room >= 0:
            return value
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="ccompile-")
        path = Path(self._folder.name) / f"{self._room}.npy"
        np.save(path, value)
        return _Spilled(path)

    def __iter__(self) -> Iterator[Outputs]:
        for batch in self._batches:
            yield {name: _loaded(value) for name, value in batch.items()}

    def __len__(self) -> int:
        return len(self._batches)


def _loaded(value: Any) -> Any:
    if isinstance(value, list):
        return [_loaded(item) for item in value]
    return value.load() if isinstance(value, _Spilled) else value


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
            if candidate.keys() != reference.keys():
                self.problem = self.problem or "a map has other keys"
                return
            candidate, reference = _map_values(candidate, reference)
        if reference is None or candidate is None:
            self.elements += 1
            self.mismatches += reference is not candidate
        elif (mine := _form(candidate)) != (theirs := _form(reference)):
            self.problem = self.problem or f"a {mine} instead of a {theirs}"
        elif isinstance(reference, list):
            if len(candidate) != len(reference):
                self.problem = self.problem or f"{len(candidate)} elements instead of {len(reference)}"
            for a, b in zip(candidate, reference, strict=False):
                self.update(a, b)
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
        if b.dtype.kind not in "fc" and "float" not in b.dtype.name:
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
        """Count the rows whose first largest entry in `a` is a largest one in `b`: a tie of `b` may be broken anyhow.

        A candidate that is constant therefore agrees by chance only, however many entries it makes largest.
        """
        picked = np.take_along_axis(b, a.argmax(-1)[..., None], -1)[..., 0]
        self.rows += picked.size
        self.kept += int(np.count_nonzero(picked >= b.max(-1)))
        if self.kl is None or b.min() < -1e-6 or np.abs(b.sum(-1) - 1).max() > 1e-3:
            self.kl = None
            return
        p, q = np.clip(b, 1e-12, None), np.clip(a, 1e-12, None)
        self.kl += float((p * np.log(p / q)).sum())

    def result(self) -> OutputComparison:
        """Return the comparison over all that was added."""
        problem = self.problem
        if not all(map(math.isfinite, (self.error, self.reference, self.candidate, self.dot, self.max_abs))):
            problem = problem or "its values are too large to compare"
        relative = math.sqrt(self.error / self.reference) if self.reference else (math.inf if self.max_abs else 0.0)
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
            cosine=min(max(self.dot / norms, -1.0), 1.0) if norms else float(self.reference == self.candidate),
            argmax=self.kept / self.rows if self.rows else None,
            kl=max(self.kl, 0.0) / self.rows if self.rows and self.kl is not None else None,
            mismatches=self.mismatches,
            problem=problem,
        )


def _form(value: Any) -> str:
    return "sequence" if isinstance(value, list) else "map" if isinstance(value, dict) else "tensor"


def _map_values(candidate: Mapping[Any, Any], reference: Mapping[Any, Any]) -> tuple[Array, Array]:
    """Return the values of two maps in one order; the runtime hands float32 out as Python floats."""
    both = np.array([[values[key] for key in reference] for values in (candidate, reference)])
    if both.dtype == np.float64:
        with np.errstate(over="ignore"):
            narrow = both.astype(np.float32)
        both = narrow if np.array_equal(narrow, both, equal_nan=True) else both
    return both[0], both[1]


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
    if labels.ndim != 1:
        raise DataError(f"labels of shape {list(labels.shape)}: top1 and top5 take one class per sample")
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
        found = getattr(_module(module, base), function)
    except (Exception, SystemExit) as error:  # the user's module runs here
        said = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise SpecError(f"metric `{name}`: {said}", hint="It is a function (outputs, labels) -> float.") from error
    finally:
        sys.path.remove(str(base.resolve()))
    if not callable(found):
        raise SpecError(f"metric `{name}` is not a function", hint="It is a function (outputs, labels) -> float.")
    metric: Metric = found
    return metric


def _module(name: str, base: Path) -> ModuleType:
    """Return the module beside the spec, whatever else of that name was imported before, or one on the Python path."""
    path = base / f"{name}.py"
    if not path.exists():
        return importlib.import_module(name)
    loader = SourceFileLoader(name, str(path))
    module = ModuleType(name)
    module.__file__ = str(path)
    loader.exec_module(module)
    return module


def measure(metrics: Mapping[str, Metric], outputs: Iterable[Outputs], labels: Sequence[Array]) -> dict[str, float]:
    """Return each metric over all batches; outputs whose batches do not stack on axis 0 are not shown to it.

    Raises DataError when a metric fails on these outputs.
    """
    if not metrics or not labels:
        return {}
    batches = list(outputs)
    names = [name for name in batches[0] if _stacks([batch[name] for batch in batches])]
    whole = {name: np.concatenate([np.asarray(batch[name]) for batch in batches]) for name in names}
    truth = np.concatenate(list(labels))
    values = {}
    for name, metric in metrics.items():
        try:
            values[name] = float(metric(whole, truth))
        except DataError:
            raise
        except (Exception, SystemExit) as error:  # the user's function runs here
            raise DataError(f"metric `{name}` fails: {type(error).__name__}: {error}") from error
    return values


def _stacks(values: Sequence[Any]) -> bool:
    if not all(isinstance(value, np.ndarray) and value.ndim for value in values):
        return False
    return len({value.shape[1:] for value in values}) == 1


# ---------------------------------------------------------------------------------------------- sites


@dataclass(frozen=True)
class SiteError:
    """What a site does to its output on real inputs, given the previous graph's input: |dy| / |x| and |dy| / |y|."""

    site: Site
    gain: float
    relative: float
    rounding: float = EXACT_RELATIVE_L2["float32"]

    @property
    def holds(self) -> bool:
        """Return whether |dy| <= bound |x| + rounding |y|; `rounding` is what an exact pass may do to the output."""
        if self.site.bound is None or self.relative <= self.rounding:
            return True
        return self.gain * (1 - self.rounding / self.relative) <= self.site.bound * (1 + 1e-6)


def site_errors(
    before: ir.Model, after: ir.Model, sites: Sequence[Site], feeds: Feeds, settings: Settings
) -> list[SiteError]:
    """Measure each site alone: the previous graph's input through the new nodes, against the previous graph's output.

    Sites without input, output and nodes are left out, those whose new nodes read other variable values, and those
    whose input the previous graph did not have.
    """
    known = {str(node.name): node for node in after.graph}
    values = _values_of(before)
    found = []
    for group in _groups([site for site in sites if {site.input, site.output} <= values], before, feeds, settings):
        names = sorted({name for site in group for name in (site.input, site.output)})
        inner = [name for name in names if name not in feeds]
        seen = runtime.Session(before, settings, inner).run(feeds, inner) | dict(feeds)
        for site in group:
            small = _extract(after, site, known, ir.DataType.from_numpy(np.asarray(seen[site.input]).dtype))
            if small is None:
                continue
            y = runtime.Session(small, settings).run({site.input: seen[site.input]})[site.output]
            x, reference = (np.asarray(seen[name], np.float64) for name in (site.input, site.output))
            error = float(np.linalg.norm(np.asarray(y, np.float64) - reference))
            norms = [float(np.linalg.norm(v)) for v in (x, reference)]
            gain, relative = (error / norm if norm else (math.inf if error else 0.0) for norm in norms)
            rounding = EXACT_RELATIVE_L2.get(str(seen[site.output].dtype), EXACT_RELATIVE_L2["float32"])
            found.append(SiteError(site, gain, relative, rounding))
    return found


def _values_of(model: ir.Model) -> set[str]:
    """Return the names of the graph inputs and of what top-level nodes produce."""
    names = {str(value.name) for value in model.graph.inputs}
    return names | {str(output.name) for node in model.graph for output in node.outputs if output.name}


def _extract(model: ir.Model, site: Site, known: Mapping[str, ir.Node], dtype: ir.DataType) -> ir.Model | None:
    """Return the site's nodes as a model from site.input to site.output, or None when they read anything else.

    dtype: site.input's, which the graph itself may not declare.
    """
    nodes = [node for name, node in known.items() if name in site.nodes]
    if any(node.op_identifier() in model.functions or any(True for _ in graph.subgraphs(node)) for node in nodes):
        return None
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
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [ir.to_proto(node) for node in nodes],
            "site",
            [onnx.helper.make_tensor_value_info(site.input, dtype.value, None)],
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
    """Yield runs of sites whose observed values fit into HELD_BYTES together; values that numpy lacks are left out."""
    if not sites:
        return
    types = runtime.observed_shapes(model, feeds, settings)
    opaque = {name for name, seen in types.items() if seen.dtype in _OPAQUE}
    sizes = {name: seen.nbytes or 0 for name, seen in types.items()}
    group: list[Site] = []
    held = 0
    for site in sites:
        if opaque & {site.input, site.output}:
            continue
        size = sizes.get(site.input, 0) + sizes.get(site.output, 0)
        if group and held + size > HELD_BYTES:
            yield group
            group, held = [], 0
        group.append(site)
        held += size
    if group:
        yield group


# Element types that ONNX Runtime does not hand out as numpy arrays.
_OPAQUE = frozenset(
    kind for kind in ir.DataType if kind.name.startswith(("BFLOAT", "FLOAT8", "FLOAT4", "INT4", "UINT4"))
)


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
    """Return the first site whose output, a value of both graphs, leaves its tolerance, or None.

    Memory is bounded: sites are observed in groups, in topological order, and the search stops at the first guilty one.
    """
    order = {str(node.name): index for index, node in enumerate(after.graph)}
    both = _values_of(before) & _values_of(after)
    named = [site for site in sites if site.output in both]
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
