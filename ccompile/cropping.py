"""Make a convolution's kernel smaller where its outer taps are zero: the same function at every border."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis import linear
from ccompile.core import Array
from ccompile.moments import Layer


def crop(node: ir.Node) -> str:
    """Take outer taps that are zero off a Conv with explicit pads; return what was done in words, or nothing.

    The first taps of an axis can go as long as pads before it are left to take off, the last as those behind it: output
    position i reads s i - p + d t for tap t, so that `a` taps less in front are p - a d pads.
    """
    form = linear.layer(node)
    if isinstance(form, str) or form.op != "Conv" or form.auto_pad not in ("NOTSET", ""):
        return ""
    weight = graph.constant(node.inputs[1])
    assert weight is not None
    count = len(form.kernel)
    part: list[slice] = []
    pads = list(form.pads)
    for axis in range(count):
        first, last = _spare(weight, form, axis)
        part.append(slice(first, form.kernel[axis] - last))
        pads[axis] -= first * form.dilations[axis]
        pads[count + axis] -= last * form.dilations[axis]
    small = weight[(slice(None), slice(None), *part)]
    if small.shape == weight.shape:
        return ""
    graph.replace_constant(node, 1, np.ascontiguousarray(small))
    node.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", list(small.shape[2:]))
    node.attributes["pads"] = ir.AttrInt64s("pads", pads)
    return f"kernel {'x'.join(map(str, form.kernel))} cropped to {'x'.join(map(str, small.shape[2:]))}"


def _spare(weight: Array, form: Layer, axis: int) -> tuple[int, int]:
    """Return how many zero taps can go at the beginning and the end of an axis; one always stays."""
    others = tuple(at for at in range(weight.ndim) if at != 2 + axis)
    alive = np.flatnonzero((weight != 0).any(others))
    size, step, count = form.kernel[axis], form.dilations[axis], len(form.kernel)
    first, last = (int(alive[0]), size - 1 - int(alive[-1])) if len(alive) else (0, size - 1)
    return min(first, form.pads[axis] // step), min(last, form.pads[count + axis] // step)
