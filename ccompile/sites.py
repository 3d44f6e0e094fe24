"""What happened at the places where a pass acted: the local error of each site, and the first one to blame."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from ccompile import graph, runtime
from ccompile.comparison import Running
from ccompile.core import Site
from ccompile.recording import HELD_BYTES, runs_within
from ccompile.runtime import Feeds, Settings
from ccompile.tolerance import EXACT_RELATIVE_L2, OutputComparison


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
) -> tuple[list[SiteError], dict[Site, str]]:
    """Measure each site alone: the previous graph's input through the new nodes, against the previous graph's output.

    Returns the errors of the sites that could be measured, and why the others could not.
    """
    known = {str(node.name): node for node in after.graph}
    values = _values_of(before)
    missing = {site: reason for site in sites if (reason := _unnamed(site, values))}
    found = []
    for group in _groups([site for site in sites if site not in missing], before, feeds, settings):
        names = sorted({name for site in group for name in (site.input, site.output)})
        inner = [name for name in names if name not in feeds]
        seen = runtime.Session(before, settings, inner).run(feeds, inner) | dict(feeds)
        for site in group:
            small = _extract(after, site, known, ir.DataType.from_numpy(np.asarray(seen[site.input]).dtype))
            if isinstance(small, str):
                missing[site] = small
                continue
            y = runtime.Session(small, settings).run({site.input: seen[site.input]})[site.output]
            found.append(_site_error(site, seen[site.input], y, seen[site.output]))
    measured = {error.site for error in found}
    opaque = {site: "numpy lacks the type of its input or output" for site in sites if site not in measured}
    return found, opaque | missing


def _unnamed(site: Site, values: set[str]) -> str:
    """Return what keeps a site from being observed in a graph with these values, or nothing."""
    for name, what in ((site.input, "input"), (site.output, "output")):
        if not name:
            return f"the site names no {what}"
        if name not in values:
            return f"the graph before the step has no value `{name}`"
    return ""


def _site_error(site: Site, x: Any, y: Any, reference: Any) -> SiteError:
    """Return the error of a site whose new nodes make `y` of `x` where the old ones made `reference`."""
    rounding = EXACT_RELATIVE_L2.get(str(reference.dtype), EXACT_RELATIVE_L2["float32"])
    x, y, reference = (np.asarray(value, np.float64) for value in (x, y, reference))
    error = float(np.linalg.norm(y - reference))
    norms = [float(np.linalg.norm(value)) for value in (x, reference)]
    gain, relative = (error / norm if norm else (math.inf if error else 0.0) for norm in norms)
    return SiteError(site, gain, relative, rounding)


def _values_of(model: ir.Model) -> set[str]:
    """Return the names of the graph inputs and of what top-level nodes produce."""
    names = {str(value.name) for value in model.graph.inputs}
    return names | {str(output.name) for node in model.graph for output in node.outputs if output.name}


def _extract(model: ir.Model, site: Site, known: Mapping[str, ir.Node], dtype: ir.DataType) -> ir.Model | str:
    """Return the site's nodes as a model from site.input to site.output, or why they do not make one.

    dtype: site.input's, which the graph itself may not declare.
    """
    nodes = [node for name, node in known.items() if name in site.nodes]
    if any(node.op_identifier() in model.functions or any(True for _ in graph.subgraphs(node)) for node in nodes):
        return "its nodes call a function or hold a subgraph"
    inside = {output for node in nodes for output in node.outputs}
    constants: dict[str, ir.TensorProtocol] = {}
    for value in (operand for node in nodes for operand in node.inputs if operand is not None):
        if value in inside or value.name == site.input:
            continue
        tensor = graph.stored(value)
        if tensor is None:
            return f"its nodes read `{value.name}` as well"
        constants[str(value.name)] = tensor
    if not any(value.name == site.output for value in inside):
        return f"its nodes do not make `{site.output}`"
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
    seen = [site for site in sites if not opaque & {site.input, site.output}]
    yield from runs_within(seen, lambda site: sizes.get(site.input, 0) + sizes.get(site.output, 0), HELD_BYTES)


# Element types that ONNX Runtime does not hand out as numpy arrays.
_OPAQUE = frozenset(
    kind for kind in ir.DataType if kind.name.startswith(("BFLOAT", "FLOAT8", "FLOAT4", "INT4", "UINT4"))
)


@dataclass(frozen=True)
class Blame:
    """The first site in topological order whose output left its tolerance, and by how much."""

    site: Site
    comparison: OutputComparison
    searched: int = 0


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
        running = {name: Running(name, rtol) for name in names}
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
