"""Put several thinner linear layers in the place of one.

A layer's factors run one after the other: `Stage` by `Stage`, the bias in the last. Along each spatial axis one stage
has the layer's kernel; it takes the stride, pads and dilation of that axis, and where the kernel is 1 the first stage
does. That is the function of the composed kernel at every border, because no stage but the last has a bias: what is
zero outside the input stays zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.core import Array
from ccompile.moments import Layer

_BIAS_OPTIONAL = 11  # the opset from which on a Gemm may leave its bias out
Sides = tuple[bool, bool]  # whether a stage's cost goes with the layer's inputs, and with its outputs


@dataclass(frozen=True, eq=False)
class Stage:
    """A factor: `weight`[out, in / groups, *kernel] of a convolution, [out, in] of a dense layer; `letter` names it.

    `reads` and `makes`, of convolutions in one group: the order in which it takes its input channels, and in which its
    output channels go on; None leaves them as they are.
    """

    letter: str
    weight: Array
    groups: int = 1
    reads: Array | None = None
    makes: Array | None = None


def merged(per_group: Sequence[Sequence[Stage]]) -> list[Stage]:
    """Return the stages of a grouped layer from those of each group: side by side, as grouped convolutions.

    Stages that reorder channels are of one group only.
    """
    if len(per_group) == 1:
        return list(per_group[0])
    return [
        Stage(parts[0].letter, np.concatenate([part.weight for part in parts]), sum(part.groups for part in parts))
        for parts in zip(*per_group, strict=True)
    ]


def put(node: ir.Node, form: Layer, stages: Sequence[Stage], bias: Array | None) -> list[ir.Node]:
    """Replace a Conv, Gemm or MatMul by its stages and return their nodes; weights take the old one's type.

    bias[channels]: the last stage's; None leaves the one that the node has. A MatMul takes none. Raises
    FloatingPointError, and changes nothing, when a weight is not finite in that type.
    """
    old = graph.constant(node.inputs[form.weight])
    assert old is not None
    main = node.graph
    assert isinstance(main, ir.Graph)
    with np.errstate(all="ignore"):  # told below, as an error
        weights = [stage.weight.astype(old.dtype) for stage in stages]
        offset = None if bias is None else bias.astype(old.dtype)
    if not all(graph.is_finite(array) for array in (*weights, *([] if offset is None else [offset]))):
        raise FloatingPointError(f"the split weight of `{form.name}` is not finite in {old.dtype}")
    stem = str(node.inputs[form.weight].name)  # type: ignore[union-attr]
    value = node.inputs[1 - form.weight]
    last = node.inputs[2] if len(node.inputs) > 2 else None
    if (makes := stages[-1].makes) is not None and offset is None and last is not None:
        offset = graph.constant(last)
    if offset is not None and (offset.any() or last is not None):
        last = graph.add_constant(main, f"{stem}_bias", offset if makes is None else offset[np.argsort(makes)])
    nodes: list[ir.Node] = []
    for index, (stage, weight) in enumerate(zip(stages, weights, strict=True)):
        added = last if index == len(stages) - 1 else None
        if stage.reads is not None:
            nodes.append(_gather(node, value, stage.reads))
            value = nodes[-1].outputs[0]
        made = _stage(node, form, stage, weight, (value, added, f"{stem}_{stage.letter}"), index == 0)
        if added is not None and form.op == "Gemm" and bias is None:
            made.attributes["beta"] = ir.AttrFloat32("beta", float(graph.attribute(node, "beta", 1.0)))
        nodes.append(made)
        value = made.outputs[0]
        if stage.makes is not None:
            nodes.append(_gather(node, value, stage.makes))
            value = nodes[-1].outputs[0]
    graph.replace_node(node, nodes[-1])
    return nodes


def _gather(node: ir.Node, value: ir.Value | None, order: Array) -> ir.Node:
    """Return channels in an order."""
    main = node.graph
    assert isinstance(main, ir.Graph)
    indices = graph.add_constant(main, f"{node.name}_order", order.astype(np.int64))
    return graph.add_node("Gather", [value, indices], {"axis": 1}, before=node, base=f"{node.name}/order")


def _stage(
    node: ir.Node,
    form: Layer,
    stage: Stage,
    weight: Array,
    operands: tuple[ir.Value | None, ir.Value | None, str],
    first: bool,
) -> ir.Node:
    value, offset, name = operands
    main = node.graph
    assert isinstance(main, ir.Graph)
    base = f"{node.name}/{stage.letter}"
    tail = [offset] if offset is not None else []
    if form.op == "Conv":
        inputs = [value, graph.add_constant(main, name, weight), *tail]
        return graph.add_node("Conv", inputs, _geometry(node, form, stage, first), before=node, base=base)
    if form.op == "Gemm" and (tail or graph.opset(main) >= _BIAS_OPTIONAL):
        inputs = [value, graph.add_constant(main, name, weight), *tail]
        return graph.add_node("Gemm", inputs, {"transB": 1}, before=node, base=base)
    if form.op == "MatMul" and form.weight == 0:
        return graph.add_node("MatMul", [graph.add_constant(main, name, weight), value], before=node, base=base)
    turned = graph.add_constant(main, name, np.ascontiguousarray(weight.T))
    return graph.add_node("MatMul", [value, turned], before=node, base=base)


def _geometry(node: ir.Node, form: Layer, stage: Stage, first: bool) -> dict[str, graph.Attribute]:
    """Return the attributes of a convolution's stage."""
    kernel = list(stage.weight.shape[2:])
    axes = range(len(kernel))
    mine = [first if form.kernel[axis] == 1 else kernel[axis] == form.kernel[axis] for axis in axes]
    found: dict[str, graph.Attribute] = {"kernel_shape": kernel} if kernel else {}
    if stage.groups > 1:
        found["group"] = stage.groups
    for name, plain in (("strides", form.strides), ("dilations", form.dilations)):
        if any(plain[axis] != 1 for axis in axes if mine[axis]):
            found[name] = [plain[axis] if mine[axis] else 1 for axis in axes]
    pads = [form.pads[end * len(kernel) + axis] if mine[axis] else 0 for end in (0, 1) for axis in axes]
    if any(pads):
        found["pads"] = pads
    if any(mine) and form.auto_pad not in ("NOTSET", ""):
        found["auto_pad"] = form.auto_pad
    return found
