"""Models as files: read and checked, brought to one form, and written whole or not at all.

Weights are read-only; large ones stay out of the messages that ONNX's and the runtime's own code gets.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from ccompile import files
from ccompile.errors import ModelError
from ccompile.graph import LINEAR, default_name, dims_of, is_finite, name_nodes, renamed, stored, stored_chain

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ccompile.core import Array

MIN_OPSET = 7

# Ops of whose constant operands non-finite values are refused.
_WEIGHTED = (*LINEAR, "BatchNormalization", "LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class Source:
    """A model as read: the graph, SHA-256 and bytes of what was read, what loading changed, its external data."""

    model: ir.Model
    path: Path
    digest: str
    size: int
    notes: tuple[str, ...] = ()
    external: tuple[Path, ...] = ()


class SparseTensor(ir.LazyTensor):
    """A sparse initializer: kept as it is stored; `numpy` gives it dense. Source: onnx.proto SparseTensorProto."""

    def __init__(self, proto: onnx.SparseTensorProto) -> None:
        values = proto.values
        super().__init__(
            self._dense, ir.DataType(values.data_type), ir.Shape(list(proto.dims)), name=values.name, cache=False
        )
        self.proto = proto

    @property
    def nbytes(self) -> int:
        """Return the stored bytes: values and indices."""
        values: Array = onnx.numpy_helper.to_array(self.proto.values)
        return int(values.nbytes + 8 * math.prod(self.proto.indices.dims))

    def _dense(self) -> ir.TensorProtocol:
        values = onnx.numpy_helper.to_array(self.proto.values)
        indices = onnx.numpy_helper.to_array(self.proto.indices)
        dense = np.zeros(tuple(self.proto.dims), dtype=values.dtype)
        if indices.ndim == 2:
            dense[tuple(indices.T)] = values
        else:
            dense.reshape(-1)[indices] = values
        dense.flags.writeable = False
        return ir.Tensor(dense, name=self.name)


def load(path: Path | str, finite: bool = True) -> Source:
    """Read an ONNX model; weights with NaN or infinity are refused unless `finite` is false.

    Initializers listed among the graph inputs become plain constants, every node gets a unique name, and types come
    from the runtime's rules, never from declared intermediate shapes.
    Raises ModelError: unreadable, damaged or invalid files, opsets and types that cannot be represented, and weights
    that are not finite.
    """
    path = Path(path)
    proto, weights, pieces, external = files.read(path)
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    size = sum(piece.nbytes for piece in pieces)
    model, notes = from_proto(proto, weights, str(path))
    with _representable(str(path)):
        to_proto(model)  # what cannot be written back is refused here, not by a later step
    if finite:
        _check_finite(model, str(path))
    return Source(model, path, digest.hexdigest(), size, notes, external)


def from_proto(
    proto: onnx.ModelProto, weights: Mapping[str, Array] | None = None, where: str = "model"
) -> tuple[ir.Model, tuple[str, ...]]:
    """Return the model and notes on what was normalised; `weights` are the detached initializers by name.

    Raises ModelError when an opset or type cannot be represented, by name.
    """
    _check_opsets(proto, where)
    sparse = {s.values.name: s for s in proto.graph.sparse_initializer}
    proto.graph.ClearField("sparse_initializer")
    for name, held in sparse.items():
        proto.graph.initializer.add(name=name, data_type=held.values.data_type, dims=[0])
    detached = weights or {}
    _check_names(proto, where)
    with _representable(where):
        model = ir.from_proto(proto)
        for name, value in model.graph.initializers.items():
            if name in sparse:
                value.const_value = SparseTensor(sparse[name])
            elif name in detached:
                value.const_value = ir.Tensor(detached[name], name=name)
            elif value.const_value is not None:
                value.const_value = renamed(value.const_value, name)
                value.const_value.numpy()  # damaged small tensors raise here, not in the middle of a compile
            tensor = value.const_value
            if tensor is not None:
                value.shape, value.type = ir.Shape(dims_of(tensor)), ir.TensorType(tensor.dtype)
        return model, _normalise(model)


@contextlib.contextmanager
def _representable(where: str) -> Iterator[None]:
    """Turn what onnx_ir raises on graphs that it cannot represent into a ModelError."""
    try:
        yield
    except (ir.serde.SerdeError, NotImplementedError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise _unrepresentable(error, where) from error


def _unrepresentable(error: BaseException, where: str) -> ModelError:
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ModelError(f"the graph cannot be represented: {text}", where, "The file is damaged, or its exporter is.")


def _check_opsets(proto: onnx.ModelProto, where: str) -> None:
    newest = onnx.defs.onnx_opset_version()
    opset = {entry.domain: entry.version for entry in proto.opset_import}
    version = opset.get("", opset.get("ai.onnx"))
    if version is None:
        if any(node.domain in ("", "ai.onnx") for node in proto.graph.node):
            raise ModelError("the model does not say which opset it uses", where, "Add an opset_import for ai.onnx.")
        return
    if not MIN_OPSET <= version <= newest:
        raise ModelError(
            f"opset {version} is outside {MIN_OPSET} to {newest}",
            where,
            "Convert it with onnx.version_converter, or install a newer onnx.",
        )


def _check_names(proto: onnx.ModelProto, where: str) -> None:
    """Refuse graphs that are not in single static assignment form, before they confuse anything."""
    initializers = [t.name for t in proto.graph.initializer]
    defined = [i.name for i in proto.graph.input if i.name not in set(initializers)] + initializers
    for node in proto.graph.node:
        defined += [name for name in node.output if name]
    twice = [name for name, count in Counter(defined).items() if count > 1]
    if twice:
        raise ModelError(f"`{twice[0]}` is defined more than once", where, "Value names must be unique in a graph.")
    known = set(defined)
    for output in proto.graph.output:
        if output.name not in known:
            raise ModelError(f"graph output `{output.name}` is produced by no node", where)
    _check_reads(proto.graph, frozenset(), where)


def _check_reads(proto: onnx.GraphProto, outer: frozenset[str], where: str) -> None:
    """Refuse nodes that read what neither their graph nor one around it defines."""
    known = outer | {value.name for value in proto.input} | {tensor.name for tensor in proto.initializer}
    known |= {sparse.values.name for sparse in proto.sparse_initializer}
    known |= {name for node in proto.node for name in node.output}
    for node in proto.node:
        for name in node.input:
            if name and name not in known:
                what = f"node `{node.name or node.op_type}` reads `{name}`, which nothing defines"
                raise ModelError(what, where, "The file is damaged, or its exporter is.")
        for held in node.attribute:
            for inner in (*held.graphs, *([held.g] if held.HasField("g") else [])):
                _check_reads(inner, known, where)


def _normalise(model: ir.Model) -> tuple[str, ...]:
    notes = []
    graph = model.graph
    overridable = [value for value in graph.inputs if value.name in graph.initializers]
    if overridable:
        kept = [value for value in graph.inputs if value.name not in graph.initializers]
        graph.inputs.clear()
        graph.inputs.extend(kept)
        model.ir_version = max(model.ir_version or 4, 4)
        notes.append(f"{len(overridable)} initializers listed as graph inputs are now constants")
    notes += _sort(model)
    name_nodes(graph)
    return tuple(notes)


def _sort(model: ir.Model) -> list[str]:
    """Put nodes behind those they read, which the format asks for and runtimes forgive; return a note if any moved."""
    moved = 0
    parts: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for part in parts:
        before = list(part)
        part.sort()
        moved += sum(mine is not other for mine, other in zip(before, part, strict=True))
    return ["nodes were not in topological order: they are now"] if moved else []


def _check_finite(model: ir.Model, where: str) -> None:
    for node in model.graph:
        if node.op_type not in _WEIGHTED or node.domain not in ("", "ai.onnx"):
            continue
        for value in node.inputs:
            behind = [operand for link in stored_chain(value) or () for operand in link.inputs]
            for tensor in (stored(part) for part in (value, *behind)):
                if tensor is None or not tensor.dtype.is_floating_point() or is_finite(tensor.numpy()):
                    continue
                assert value is not None
                raise ModelError(
                    f"weight `{value.name}` of node `{node.name}` has NaN or infinity",
                    where,
                    "Export the model again: no tolerance can hold for such a weight.",
                )


def save(
    model: ir.Model,
    path: Path | str,
    metadata: Mapping[str, str] | None = None,
    limit: int = files.MESSAGE_LIMIT,
    approve: files.Approve = lambda path, data: None,
) -> Path | None:
    """Write the model whole or not at all, with `metadata` added; return the external data file if there is one.

    limit: bytes beyond which weights go to external data; approve: see files.write.
    """
    proto, weights = to_proto(model)
    for node in proto.graph.node:
        if node.name == default_name(node.op_type, node.output):
            node.ClearField("name")
    for key, value in (metadata or {}).items():
        for entry in [entry for entry in proto.metadata_props if entry.key == key]:
            proto.metadata_props.remove(entry)
        proto.metadata_props.add(key=key, value=value)
    return files.write(proto, weights, Path(path), limit, approve)


def to_proto(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """Return the model with its large initializers as external placeholders (location = name), and their tensors."""
    large: dict[str, ir.TensorProtocol] = {}
    sparse: dict[str, SparseTensor] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, SparseTensor):
            sparse[name] = tensor
            value.const_value = ir.tensor(np.zeros(0, np.float32), name=name)
        elif tensor is not None and files.is_detachable(tensor):
            large[name] = tensor
            value.const_value = ir.ExternalTensor(
                name, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(dims_of(tensor)), name=name
            )
    try:
        proto = ir.to_proto(model)
    finally:
        for name, tensor in (*large.items(), *sparse.items()):
            model.graph.initializers[name].const_value = tensor
    inner = [info for info in proto.graph.value_info if info.name not in model.graph.initializers]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(inner)  # a tensor says its own type
    if sparse:
        kept = [t for t in proto.graph.initializer if t.name not in sparse]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)
        proto.graph.sparse_initializer.extend(s.proto for s in sparse.values())
    return proto, large


def skeleton(model: ir.Model) -> onnx.ModelProto:
    """Return the model with large and sparse initializers as graph inputs, for ONNX's checker and shape inference."""
    proto, large = to_proto(model)
    kept = [t for t in proto.graph.initializer if t.name not in large]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, SparseTensor):
            large[name] = value.const_value
    proto.graph.ClearField("sparse_initializer")
    for name, tensor in large.items():
        proto.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.dtype.value, dims_of(tensor)))
    return proto


def check(model: ir.Model) -> str:
    """Return what ONNX's checker says against the model in one line, or nothing."""
    try:
        onnx.checker.check_model(skeleton(model).SerializeToString())
    except onnx.checker.ValidationError as error:
        return " ".join(str(error).split())[:400]
    return ""
