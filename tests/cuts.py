"""What cutting channels must mean: the same as zeroing, in the original, what reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ccompile import graph, onnx_io, runtime, surgery
from ccompile.analysis.channels import Group, channels
from ccompile.runtime import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ccompile.core import Array

SETTINGS = Settings(threads=1)
Cuts = dict[Group, "Array"]


def feeds(model: ir.Model, rng: np.random.Generator, free: int = 2) -> dict[str, Array]:
    """Random inputs; open dimensions get `free`, integers are drawn below 4."""
    found: dict[str, Array] = {}
    for value in model.graph.inputs:
        dims = [dim if isinstance(dim, int) else free for dim in graph.declared_shape(value) or ()]
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
        draw = rng.standard_normal(dims) if dtype.kind == "f" else rng.integers(0, 4, dims)
        found[str(value.name)] = np.asarray(draw).astype(dtype)
    return found


def outputs(model: ir.Model, inputs: Mapping[str, Any], observed: tuple[str, ...] = ()) -> dict[str, Any]:
    return runtime.Session(model, SETTINGS, observed).run(inputs)


def keep_all_but(group: Group, *units: int) -> Array:
    keep = np.ones(group.size, bool)
    keep[list(units)] = False
    return keep


def random_cuts(model: ir.Model, rng: np.random.Generator, share: float) -> Cuts:
    """For every free group, a random `share` of its units (at least one) to remove, if that empties no value."""
    cuts: Cuts = {}
    for group in channels(model).free:
        gone = rng.permutation(group.size)[: max(1, round(share * group.size))]
        keep = keep_all_but(group, *gone)
        if not surgery.refused({**cuts, group: keep}):
            cuts[group] = keep
    return cuts


def with_zeroed_readers(model: ir.Model, cuts: Cuts) -> ir.Model:
    """The original with zeros in all weight columns that read removed channels."""
    twin = graph.copy(model)
    weights: dict[tuple[str, int], Array] = {}
    for group, keep in cuts.items():
        for member in group.by_role("consumer"):
            key = (member.node, member.input)
            if key not in weights:
                weights[key] = np.array(graph.constant(graph.node_named(twin.graph, key[0]).inputs[key[1]]))
            weights[key][tuple([slice(None)] * member.axis + [~surgery.kept(member.unit, keep)])] = 0
    for (name, index), weight in weights.items():
        graph.replace_constant(graph.node_named(twin.graph, name), index, weight)
    return twin


def with_dead_units(model: ir.Model, cuts: Cuts) -> ir.Model:
    """The original with zeros in all that makes or shifts the channels that `cuts` removes."""
    twin = graph.copy(model)
    for group, keep in cuts.items():
        for member in group.members:
            node = graph.node_named(twin.graph, member.node)
            shift = node.op_type in ("Add", "Sub") or (node.op_type == "BatchNormalization" and member.input in (2, 3))
            if member.role == "producer" or shift or (node.op_type in graph.LINEAR and member.input == 2):
                array = np.array(graph.constant(node.inputs[member.input]))
                array[tuple([slice(None)] * member.axis + [~surgery.kept(member.unit, keep)])] = 0
                graph.replace_constant(node, member.input, array)
    return twin


def cut(model: ir.Model, cuts: Cuts) -> ir.Model:
    """A copy without the removed channels, found valid, with the signature of the original."""
    twin = graph.copy(model)
    groups = {group.name: group for group in channels(twin).groups}
    surgery.remove(twin, {groups[group.name]: keep for group, keep in cuts.items()})
    assert onnx_io.check(twin) == ""
    assert graph.signature(twin) == graph.signature(model)
    return twin


def assert_close(found: Mapping[str, Any], wanted: Mapping[str, Any], relative: float = 2e-6) -> None:
    assert found.keys() == wanted.keys()
    assert found
    for name, array in wanted.items():
        assert found[name].shape == array.shape
        assert array.size
        assert np.isfinite(array).all()
        assert np.linalg.norm(found[name] - array) <= relative * max(float(np.linalg.norm(array)), 1e-30), name


def params(model: ir.Model) -> int:
    """Number of stored weight elements."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return sum(tensor.size for tensor in tensors if tensor is not None and tensor.dtype.is_floating_point())
