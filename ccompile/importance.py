"""How much each unit of a group matters by simple measures: of the weights that make it, or of what its readers see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis.channels import Group
from ccompile.analysis.cuts import Reader
from ccompile.core import Array
from ccompile.moments import Moments
from ccompile.numerics import saliency

OfWeights = Literal["l1", "l2", "geometric-median"]
_MEASURES: dict[OfWeights, Callable[[Array], Array]] = {
    "l1": saliency.l1_norms,
    "l2": saliency.l2_norms,
    "geometric-median": saliency.median_distances,
}


def of_weights(model: ir.Model, group: Group, measure: OfWeights) -> Array:
    """Return the importance of each unit from its producers' rows, summed over producers."""
    total = np.zeros(group.size)
    for member in group.by_role("producer"):
        value = graph.node_named(model.graph, member.node).inputs[member.input]
        array = graph.constant(value)
        if array is None or array.ndim < 2:
            continue
        rows = np.moveaxis(array, member.axis, 0).reshape(array.shape[member.axis], -1).astype(np.float64)
        known = member.unit >= 0
        np.add.at(total, member.unit[known], _MEASURES[measure](rows)[known])
    return total


def of_activations(
    readers: Sequence[Reader], moments: Mapping[str, Moments], size: int, centred: Callable[[Reader], bool]
) -> Array:
    """Return the root mean square of each unit as its readers see it, behind activation and normalisation.

    Each reader counts relative to its own average unit, so that one behind a normalisation says as much as one before.
    centred: whether a reader sees deviations from the mean only, because its bias makes up for the rest.
    """
    total, readings = np.zeros(size), np.zeros(size)
    for reader in readers:
        found = moments[reader.layer.name]
        power = found.square_x - (np.square(found.mean_x) if centred(reader) else 0.0)
        known = reader.unit >= 0
        columns = np.bincount(reader.unit[known], minlength=size)
        sums = np.bincount(reader.unit[known], weights=np.maximum(power, 0.0)[known], minlength=size)
        read = columns > 0
        each = sums[read] / columns[read]
        total[read] += each / max(float(each.mean()), 1e-300)
        readings[read] += 1
    scores: Array = np.sqrt(total / np.maximum(readings, 1))
    return scores
