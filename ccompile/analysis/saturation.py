"""Where an activation forgets what it was given: beyond which limits a value's only reader gives the limit itself.

op      forgets                              keeps
Relu    everything below 0                   above
Clip    everything outside [min, max]        between
"""

from __future__ import annotations

import math

import onnx_ir as ir

from ccompile import graph


def limits(value: ir.Value) -> tuple[float, float] | None:
    """Return (low, high) outside which nothing of the value is seen, or None where all of it is.

    Clip with limits that are not constant is taken to show all.
    """
    reader = graph.only_use(value)
    if reader is None or reader.domain not in ("", "ai.onnx"):
        return None
    if reader.op_type == "Relu":
        return 0.0, math.inf
    if reader.op_type != "Clip" or reader.inputs[0] is not value:
        return None
    found = []
    for index, (name, default) in enumerate((("min", -math.inf), ("max", math.inf)), start=1):
        operand = reader.inputs[index] if len(reader.inputs) > index else None
        limit = graph.constant(operand)
        if operand is not None and limit is None:
            return None
        found.append(float(graph.attribute(reader, name, default) if limit is None else limit.reshape(-1)[0]))
    low, high = found
    return (low, high) if low < high and (math.isfinite(low) or math.isfinite(high)) else None
