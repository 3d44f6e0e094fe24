"""Can the source's outputs prove anything? They must be the same from run to run, and not the same on all samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ccompile.comparison import compare
from ccompile.errors import ModelError

if TYPE_CHECKING:
    import onnx_ir as ir

    from ccompile.core import Array
    from ccompile.runtime import Outputs


class Constancy:
    """Watches outputs batch by batch for those that are the same on all samples."""

    def __init__(self) -> None:
        self._first: dict[str, Array] = {}
        self._moved: set[str] = set()
        self._seen: dict[str, int] = {}

    def add(self, outputs: Outputs, samples: int) -> None:
        """Look at one batch; an output whose axis 0 is not the batch counts as one sample."""
        for name, value in outputs.items():
            if name in self._moved or not isinstance(value, np.ndarray | np.generic) or not value.size:
                continue
            whole: Array = np.asarray(value)
            rows = whole if whole.ndim and len(whole) == samples else whole[None]
            first = self._first.setdefault(name, np.array(rows[0]))
            self._seen[name] = self._seen.get(name, 0) + len(rows)
            same = rows.shape[1:] == first.shape and bool(np.all((rows == first) | ((rows != rows) & (first != first))))
            if not same or not _is_float(whole):
                self._moved.add(name)
                del self._first[name]

    @property
    def notes(self) -> list[str]:
        """Return what to say of float outputs that were the same on several samples."""
        constant = [name for name in self._first if self._seen[name] > 1]
        return [f"output `{name}` is the same on all samples: it proves little" for name in constant]


def _is_float(array: Array) -> bool:
    return array.dtype.kind in "fc" or "float" in array.dtype.name


_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}


def refuse_random(model: ir.Model, again: Outputs, first: Outputs) -> None:
    """Raise ModelError when two runs of a model on the same inputs differ by more than float reordering."""
    found = compare([again], [first], 1)
    moved = [name for name in found.exact_violations() if name not in found.unjudged]
    if not moved:
        return
    bodies = [model.graph, *(function.graph for function in model.functions.values())]
    nodes = [node for body in bodies for node in body.all_nodes() if _is_random(node)]
    named = ", ".join(f"`{node.name}` ({node.op_type})" for node in nodes[:3])
    raise ModelError(
        f"output `{moved[0]}` differs from run to run on the same inputs: nothing can be verified against it",
        f"node {named}" if named else "",
        "Make the random values an input of the model, or export it for inference.",
    )


def _is_random(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx"):
        return False
    training = node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None
    return training or node.op_type in _RANDOM
