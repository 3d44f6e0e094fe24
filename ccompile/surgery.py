"""Cut channels out of a graph: slice every constant that carries them and correct every number that counts them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis.channels import Group, Size
from ccompile.core import Array
from ccompile.errors import PassError

Masks = Mapping[int, tuple[Size, Array]]  # Size.index -> the Size, and which positions stay


def remove(model: ir.Model, cuts: Mapping[Group, Array]) -> None:
    """Remove, from each group at once, the units that are False in keep[size].

    The groups must be those of this very model (analysis.channels). Weights get fresh arrays; what encodes sizes is
    corrected; declared shapes of inner values, then wrong, are dropped. The signature stays.
    Raises PassError, before anything changes, when a group is pinned, `keep` does not fit, or a value would be empty.
    """
    refusals = refused(cuts)
    if refusals:
        raise PassError(refusals[0], hint="; ".join(refusals[1:]))
    nodes = {str(node.name): node for node in model.graph}
    for (node, index), axes in _constants(nodes, cuts).items():
        _cut_constant(nodes[node], index, axes)
    for name, masks in _sizes(cuts).items():
        _CORRECT[nodes[name].op_type](nodes[name], masks)
    for inner in nodes.values():
        for output in inner.outputs:
            if not output.is_graph_output():
                output.shape = None
    graph.remove_dead(model.graph)


def refused(cuts: Mapping[Group, Array]) -> list[str]:
    """Return why these cuts cannot be made, or nothing."""
    found = []
    left: dict[tuple[str, int], Array] = {}
    for group, keep in cuts.items():
        if group.pinned:
            found.append(f"group `{group.name}` is pinned: `{group.pinned[0].node}`: {group.pinned[0].reason}")
        if keep.shape != (group.size,) or keep.dtype != np.bool_:
            found.append(f"group `{group.name}`: `keep` must be {group.size} booleans")
            continue
        for carrier in group.carriers:
            key = (carrier.value, carrier.axis)
            left[key] = left.get(key, np.True_) & kept(carrier.unit, keep)
    empty = [name for (name, _), mask in left.items() if not mask.any()]
    return found + [f"`{name}` would have no channel left" for name in empty]


def kept(unit: Array, keep: Array) -> Array:
    """Return which positions stay when the units that are False in `keep` go; -1 belongs to no unit and stays.

    >>> kept(np.array([0, 1, -1, 1]), np.array([True, False])).tolist()
    [True, False, True, False]
    """
    stays: Array = (unit < 0) | keep[unit]
    return stays


def _constants(nodes: Mapping[str, ir.Node], cuts: Mapping[Group, Array]) -> dict[tuple[str, int], dict[int, Array]]:
    """Return, for each constant by one of its readers (node, input), which positions of which axes stay.

    What a node reads now counts, not what it read when the groups were found: weights may have been replaced since.
    """
    reader: dict[ir.Value | None, tuple[str, int]] = {}
    axes: dict[tuple[str, int], dict[int, Array]] = {}
    for group, keep in cuts.items():
        for member in group.members:
            value = nodes[member.node].inputs[member.input]
            found = axes.setdefault(reader.setdefault(value, (member.node, member.input)), {})
            found[member.axis] = found.get(member.axis, np.True_) & kept(member.unit, keep)
    return axes


def _cut_constant(node: ir.Node, index: int, axes: Mapping[int, Array]) -> None:
    """Replace a constant, for all its readers, by its slice."""
    old, main = node.inputs[index], node.graph
    array = graph.constant(old)
    assert old is not None
    assert array is not None
    assert isinstance(main, ir.Graph)
    for axis, mask in axes.items():
        array = np.compress(mask, array, axis)
    name = str(old.name)
    new = graph.add_constant(main, name, array)
    old.replace_all_uses_with(new)
    if old.is_initializer():
        main.initializers.pop(name)
        new.name = name


def _sizes(cuts: Mapping[Group, Array]) -> dict[str, dict[int, tuple[Size, Array]]]:
    found: dict[str, dict[int, tuple[Size, Array]]] = {}
    for group, keep in cuts.items():
        for size in group.sizes:
            masks = found.setdefault(size.node, {})
            earlier = masks[size.index][1] if size.index in masks else np.True_
            masks[size.index] = (size, earlier & kept(size.unit, keep))
    return found


# ------------------------------------------------------------------------------------------ numbers that count channels


def _counted(masks: Masks) -> list[int]:
    """Return the numbers of a node, those that count channels counted again."""
    now = list(next(iter(masks.values()))[0].now)
    for index, (_, mask) in masks.items():
        now[index] = int(mask.sum())
    return now


def _store(node: ir.Node, index: int, name: str, numbers: Sequence[int]) -> None:
    """Give a node new numbers, in the attribute where it has them, else as a constant input."""
    if name in node.attributes:
        node.attributes[name] = ir.AttrInt64s(name, list(numbers))
        return
    old = graph.constant(node.inputs[index]) if len(node.inputs) > index else None
    graph.replace_constant(node, index, np.asarray(numbers, np.int64 if old is None else old.dtype))


def _target(node: ir.Node, masks: Masks) -> None:
    numbers = _counted(masks)
    _store(node, 3 if node.op_type == "Resize" else 1, "shape", numbers)
    if 0 in numbers:
        node.attributes.pop("allowzero", None)  # analysis writes 0 where a size is copied


def _split(node: ir.Node, masks: Masks) -> None:
    opset = graph.opset(node.graph) if isinstance(node.graph, ir.Graph) else 1
    if opset < 13:
        node.attributes["split"] = ir.AttrInt64s("split", _counted(masks))
    else:
        _store(node, 1, "split", _counted(masks))
    node.attributes.pop("num_outputs", None)


def _groups(node: ir.Node, masks: Masks) -> None:
    name = "group" if node.op_type in ("Conv", "ConvTranspose") else "num_groups"
    node.attributes[name] = ir.AttrInt64(name, _counted(masks)[0])


def _slice(node: ir.Node, masks: Masks) -> None:
    for place, name in ((1, "starts"), (2, "ends")):
        stored = graph.attribute(node, name) if name in node.attributes else graph.constant(node.inputs[place])
        numbers = np.asarray(stored).reshape(-1).tolist()
        for index, (size, mask) in masks.items():
            numbers[index] = int(mask[: size.now[place - 1]].sum())
        _store(node, place, name, numbers)


def _pad(node: ir.Node, masks: Masks) -> None:
    stored = graph.attribute(node, "pads") if "pads" in node.attributes else graph.constant(node.inputs[1])
    numbers = np.asarray(stored).reshape(-1).tolist()
    half = len(numbers) // 2
    for index, (size, mask) in masks.items():
        begin, end = size.now
        numbers[index] = int(mask[:begin].sum())
        numbers[half + index] = int(mask[len(mask) - end :].sum())
    _store(node, 1, "pads", numbers)


def _gather(node: ir.Node, masks: Masks) -> None:
    ((size, mask),) = masks.values()
    place = np.cumsum(mask) - 1
    _store(node, 1, "", [int(place[index]) for index in size.now if mask[index]])


_CORRECT: dict[str, Callable[[ir.Node, Masks], None]] = {
    "Conv": _groups,
    "ConvTranspose": _groups,
    "Expand": _target,
    "Gather": _gather,
    "GroupNormalization": _groups,
    "Pad": _pad,
    "Reshape": _target,
    "Resize": _target,
    "Slice": _slice,
    "Split": _split,
}
