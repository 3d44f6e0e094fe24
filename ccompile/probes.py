"""Models of one kind of node at one size, built node by node, and the grids of a table that they make up."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ccompile.core import Array
from ccompile.tables import AXES, TableKind

OPSET, IR_VERSION = 20, 9
_POOL = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)  # what all numbers are taken from


Built = tuple[onnx.ModelProto, dict[str, Array]]
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Probe:
    """One size: a model with its inputs, and the work of what runs as one of `runs_as`."""

    sizes: tuple[float, ...]
    work: float
    runs_as: tuple[str, ...]
    build: Callable[[], Built]
    nodes: int = 1  # that share the work
    without: Callable[[], Built] | None = None  # what else the same nodes do, which does not count
    times: Callable[[int], Built] | None = None  # the same node so many times, and nothing else that grows with that


@dataclass(frozen=True)
class Series:
    """The probes of one grid of a table, in the order of its rates."""

    kind: TableKind
    dtype: str
    axes: tuple[tuple[int, ...], ...]
    probe: Callable[[Sizes], Probe]
    kernel: int | None = None
    op: str | None = None

    @property
    def name(self) -> str:
        """Return what is measured, in words."""
        what = self.op or (f"kernel {self.kernel}" if self.kernel is not None else "")
        return " ".join(part for part in (self.kind, what, self.dtype) if part)

    def probes(self) -> list[Probe]:
        """Return the probes, the last axis fastest."""
        return [self.probe(sizes) for sizes in itertools.product(*self.axes)]

    def named_axes(self) -> dict[str, tuple[int, ...]]:
        """Return the sizes by the names that tables have for them."""
        return dict(zip(AXES[self.kind], self.axes, strict=True))


def numbers(*shape: int, scale: float = 1.0) -> Array:
    """Return float32 numbers of a normal distribution; equal shapes give equal numbers."""
    found: Array = np.resize(_POOL, shape) * np.float32(scale)
    return found


class Net:
    """Builds a model node by node; what nothing reads is an output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.feeds: dict[str, Array] = {}

    def input(self, array: Array) -> str:
        """Add an input that is fed this array."""
        name = f"x{len(self.feeds)}"
        self.feeds[name] = array
        return name

    def constant(self, array: Array) -> str:
        """Add an initializer."""
        name = f"w{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Add a node; return its first output."""
        names = [f"y{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, names, name=f"n{len(self.nodes)}", **attributes))
        return names[0]

    def model(self) -> Built:
        """Return the model and its inputs."""
        read = {name for node in self.nodes for name in node.input}
        self.feeds = {name: array for name, array in self.feeds.items() if name in read}
        outputs = [name for node in self.nodes for name in node.output if name not in read]
        graph = helper.make_graph(
            self.nodes,
            "probe",
            [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
                for name, array in self.feeds.items()
            ],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            self.tensors,
        )
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION), self.feeds

    # ------------------------------------------------------------------------------------ integers

    def codes(self, value: str, zero: int = 128) -> str:
        """Bring a value to uint8."""
        return self.node("QuantizeLinear", value, *self._grid(zero))

    def encoded(self, value: str, zero: int = 128) -> str:
        """Bring a value to uint8 and back: what integer kernels are made from."""
        grid = self._grid(zero)
        return self.node("DequantizeLinear", self.node("QuantizeLinear", value, *grid), *grid)

    def _grid(self, zero: int) -> tuple[str, str]:
        return self.constant(np.array(0.05, np.float32)), self.constant(np.array(zero, np.uint8))

    def integers(self, *shape: int) -> str:
        """Add an int8 weight behind its DequantizeLinear."""
        codes = self.constant(np.clip(numbers(*shape) * 40, -127, 127).astype(np.int8))
        return self.node("DequantizeLinear", codes, self.constant(np.array(0.01, np.float32)))
