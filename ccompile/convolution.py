"""What a lowering needs to know of a convolution: its arrays, its pads in numbers, and the sizes that are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis import linear
from ccompile.analysis.shapes import UNKNOWN, Dim, ValueType
from ccompile.core import Array
from ccompile.moments import Layer


@dataclass(frozen=True, eq=False)
class Convolution:
    """y = W * x + b at stride 1: `weight`[o, c / groups, *kernel], `bias`[o] or None; x is [batch, c, *sizes].

    `before` and `after` are the pads of each axis; `batch` and `sizes` are None where they are not known.
    """

    x: ir.Value
    weight: Array
    bias: Array | None
    groups: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    batch: int | None
    sizes: tuple[int | None, ...]

    def at(self, node: ir.Node) -> Convolution:
        """Return the same convolution of what another node, such as a copy in an excerpt, reads."""
        data = node.inputs[0]
        assert data is not None
        return replace(self, x=data)

    @property
    def outs(self) -> int:
        """Return the output channels."""
        return int(self.weight.shape[0])

    @property
    def ins(self) -> int:
        """Return the input channels."""
        return int(self.weight.shape[1]) * self.groups

    @property
    def kernel(self) -> tuple[int, ...]:
        """Return the taps of each axis."""
        return tuple(self.weight.shape[2:])

    @property
    def depthwise(self) -> bool:
        """Return whether each channel is convolved with one kernel of its own."""
        return self.groups == self.ins == self.outs

    @property
    def out_sizes(self) -> tuple[int | None, ...]:
        """Return the output's sizes."""
        axes = zip(self.sizes, self.before, self.after, self.kernel, strict=True)
        return tuple(None if size is None else size + a + b - k + 1 for size, a, b, k in axes)

    def along(self, axis: int) -> tuple[int, int, int, int, int]:
        """Return (size, pad before, pad after, taps, output size) of a known axis."""
        size, out = self.sizes[axis], self.out_sizes[axis]
        assert size is not None
        assert out is not None
        return size, self.before[axis], self.after[axis], self.kernel[axis], out


def read(node: ir.Node, known: Mapping[str, ValueType]) -> Convolution | str:
    """Return a Conv node as a lowering takes it, or why it takes none such."""
    form = linear.layer(node) if node.op_type == "Conv" else "it is no Conv"
    if isinstance(form, str):
        return form
    weight, bias = graph.constant(node.inputs[1]), node.inputs[2] if len(node.inputs) > 2 else None
    data = node.inputs[0]
    if weight is None or data is None or (bias is not None and graph.constant(bias) is None):
        return "its weight or bias is not constant"
    if any(link.op_type in graph.ENCODED for link in graph.stored_chain(node.inputs[1]) or ()):
        return "its weight is stored in a smaller form"
    if weight.dtype != np.float32:
        return f"it computes in {weight.dtype}"
    if any(step != 1 for step in form.strides):
        return f"stride {'x'.join(map(str, form.strides))}"
    if any(step != 1 and taps > 1 for step, taps in zip(form.dilations, form.kernel, strict=True)):
        return f"dilation {'x'.join(map(str, form.dilations))}"
    before, after = _pads(form)
    if min((*before, *after), default=0) < 0:
        return "it crops its input"
    dims = known.get(str(data.name), UNKNOWN).shape
    batch, *sizes = (None,) * (1 + len(form.kernel)) if dims is None else (_number(d) for d in (dims[0], *dims[2:]))
    offset = None if bias is None else graph.constant(bias)
    return Convolution(data, weight, offset, form.groups, before, after, batch, tuple(sizes))


def _number(dim: Dim) -> int | None:
    return dim if isinstance(dim, int) else None


def _pads(form: Layer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the pads before and after each axis; at stride 1 SAME adds taps - 1 in all."""
    spatial = len(form.kernel)
    if form.auto_pad in ("NOTSET", ""):
        return form.pads[:spatial], form.pads[spatial:]
    if form.auto_pad == "VALID":
        return (0,) * spatial, (0,) * spatial
    less, more = tuple((k - 1) // 2 for k in form.kernel), tuple(k // 2 for k in form.kernel)
    return (less, more) if form.auto_pad == "SAME_UPPER" else (more, less)
