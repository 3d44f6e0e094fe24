"""Graph inputs and outputs as a model declares them, and whether an array fits one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

PortKind = Literal["tensor", "sequence", "optional", "sparse"]
_KINDS: dict[type, PortKind] = {
    ir.SequenceType: "sequence",
    ir.OptionalType: "optional",
    ir.SparseTensorType: "sparse",
}


@dataclass(frozen=True)
class Port:
    """A graph input or output as declared; `shape` is None when even the rank is open.

    >>> str(Port("x", ir.DataType.FLOAT, ("N", None, 28), "tensor"))
    'x: float32 [N, ?, 28]'
    """

    name: str
    dtype: ir.DataType | None
    shape: tuple[int | str | None, ...] | None
    kind: PortKind

    @property
    def numpy(self) -> np.dtype[Any]:
        """Return the numpy type of its elements; float32 when none is declared."""
        return np.dtype(np.float32) if self.dtype is None else self.dtype.numpy()

    @property
    def type_name(self) -> str:
        """Return the element type by the name that users write."""
        return "str" if self.dtype == ir.DataType.STRING else self.numpy.name

    def __str__(self) -> str:
        dims = "any shape" if self.shape is None else "[" + ", ".join(str(d or "?") for d in self.shape) + "]"
        return f"{self.name}: {self.type_name} {dims}"


def port_of(value: ir.Value) -> Port:
    """Return what a graph input or output declares."""
    kind = _KINDS.get(type(value.type), "tensor")
    shape = graph.declared_shape(value) if kind == "tensor" else None
    return Port(str(value.name), value.dtype, shape, kind)


def check_fit(port: Port, dtype: np.dtype[Any], shape: Sequence[int], where: str, *, rows: bool) -> None:
    """Raise DataError unless an array fits an input; with `rows`, axis 0 counts samples and may have any length.

    >>> check_fit(Port("x", ir.DataType.FLOAT, ("N", 5), "tensor"), np.dtype("f4"), (10, 4), "v.npz", rows=True)
    Traceback (most recent call last):
    ccompile.errors.DataError: v.npz: `x`: axis 1 has 4, the model takes 5
      x: float32 [N, 5].
    """
    want, given = port.numpy, dtype.newbyteorder("=")
    as_stored = want.kind == "V" and given.kind == "V" and want.itemsize == given.itemsize  # numpy saves bfloat16 so
    as_text = port.dtype == ir.DataType.STRING and given.kind == "U"
    if port.dtype is not None and given != want and not as_stored and not as_text:
        in_numpy = port.dtype != ir.DataType.STRING and hasattr(np, port.type_name)  # not bfloat16
        name = f"np.{port.type_name}" if in_numpy else port.type_name
        message = f"`{port.name}` is {given.name}, the model takes {port.type_name}"
        raise DataError(message, where, f"Convert it: {port.name}.astype({name}).")
    if port.shape is None:
        return
    if len(shape) != len(port.shape):
        message = f"`{port.name}` has rank {len(shape)} {list(shape)}, the model takes rank {len(port.shape)}"
        raise DataError(message, where, f"{port}.")
    for axis, (got, dim) in enumerate(zip(shape, port.shape, strict=True)):
        if isinstance(dim, int) and got != dim and not (rows and axis == 0):
            raise DataError(f"`{port.name}`: axis {axis} has {got}, the model takes {dim}", where, f"{port}.")
