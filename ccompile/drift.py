"""How far the values inside a compiled graph are from the source's: where in the network outputs begin to move."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from ccompile import runtime
from ccompile.analysis.shapes import ValueType
from ccompile.comparison import Running
from ccompile.recording import HELD_BYTES, runs_within
from ccompile.runtime import Feeds, Settings

SAMPLES = 4  # of the first verification batch
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


def drifts(
    source: ir.Model,
    result: ir.Model,
    types: tuple[Mapping[str, ValueType], Mapping[str, ValueType]],
    feeds: Feeds,
    settings: Settings,
) -> dict[str, float]:
    """Return the relative L2 of the first value that each node of `result` makes, against the source's of that name.

    types: of the values of both graphs for one sample; feeds: at most SAMPLES. Values of another shape or type, and of
    none, are left out, and so are those that are zero or not finite in the source.
    """
    makers = {str(node.outputs[0].name): str(node.name) for node in result.graph if node.outputs}
    theirs = {str(value.name) for node in source.graph for value in node.outputs}
    names = [name for name in makers if name in theirs and _comparable(name, *types)]
    found = {}
    for group in runs_within(names, lambda name: SAMPLES * (types[0][name].nbytes or 0), HELD_BYTES):
        old, new = (runtime.Session(model, settings, group).run(feeds, group) for model in (source, result))
        for name in group:
            running = Running(name, 0.0)
            running.update(new[name], old[name])
            compared = running.result()
            if not compared.problem and not compared.mismatches and math.isfinite(compared.relative_l2):
                found[makers[name]] = compared.relative_l2
    return found


def _comparable(name: str, *types: Mapping[str, ValueType]) -> bool:
    known: Sequence[ValueType] = [seen[name] for seen in types if name in seen]
    if len(known) < 2 or any(one.dtype not in _FLOATS or one.static is None for one in known):
        return False
    return known[0].static == known[1].static and known[0].dtype == known[1].dtype
