"""Runs one pass on one small model through a compile's own steps, and writes and reads graphs as text."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx
import onnx_ir as ir

from ccompile import graph, onnx_io, running, runtime, target
from ccompile.data import Batch, Data, DataSet
from ccompile.onnx_io import Source
from ccompile.recording import Recording
from ccompile.request import Request
from ccompile.spec import Gates, Spec

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping, Sequence

    from ccompile.core import Array, Pass, PassResult
    from ccompile.evidence import StepRecord
    from ccompile.sources.stream import Stream

HEADER = '<ir_version: 10, opset_import: ["" : 18]>\n'
SIZES = ((3, 8, 9, 7), (1, 7, 8, 9))  # what the symbols of the first, second, ... name become, batch by batch


class Held:
    """Stands for a stream: batches that are held, of any shapes."""

    def __init__(self, batches: Sequence[Mapping[str, Any]]) -> None:
        self._batches = [Batch(dict(feeds), None, 1) for feeds in batches]

    def batches(self, keep: Array | None) -> Iterator[Batch]:
        assert keep is None
        yield from self._batches


def data_of(batches: Sequence[Mapping[str, Any]]) -> DataSet:
    """Return a data set of these feeds, one sample each."""
    return DataSet(len(batches), "drawn", "", (), False, cast("Stream", Held(batches)), None)


def draw_feeds(model: ir.Model, seed: int = 0) -> list[dict[str, Array]]:
    """Return seeded inputs, one batch per entry of SIZES; symbols are bound in order of appearance."""
    rng = np.random.default_rng(seed)
    symbols: dict[str, None] = {}
    for value in model.graph.inputs:
        symbols.update(dict.fromkeys(dim for dim in graph.declared_shape(value) or () if isinstance(dim, str)))
    found = []
    for sizes in SIZES if symbols else SIZES[:1]:
        bound = dict(zip(symbols, sizes, strict=False))
        feeds = {}
        for value in model.graph.inputs:
            dims = [dim if isinstance(dim, int) else bound[str(dim)] for dim in graph.declared_shape(value) or ()]
            assert value.dtype is not None
            kind = value.dtype.numpy()
            drawn = rng.standard_normal(dims) if kind.kind == "f" else rng.integers(0, 2, dims)
            feeds[str(value.name)] = drawn.astype(kind)
        found.append(feeds)
    return found


@dataclass
class Bench(running.Run):
    """A compile of one step on a model and feeds in memory. After `step`: `model`, `record` and `result`."""

    result: PassResult | None = None

    @property
    def model(self) -> ir.Model:
        """Return the graph as it stands."""
        return self.state.model

    @property
    def record(self) -> StepRecord:
        """Return the last step's record."""
        return self.steps[-1]

    def _attempt(self, index: int, step: Pass, ease: float, known: dict[Hashable, Any]) -> running.Attempt:
        attempt = super()._attempt(index, step, ease, known)
        self.result = attempt.result
        return attempt


def bench(
    model: ir.Model,
    feeds: Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
    calibration: Sequence[Mapping[str, Any]] | None = None,
) -> Bench:
    """Return a compile that has run and priced `model` on `feeds`, and no step yet; data not given are drawn."""
    given = draw_feeds(model, seed) if feeds is None else feeds
    spec = Spec((), target.load_target("generic-cpu", Path()), None, Gates(), "spec.yaml", Path(), "")
    run = Bench(Request(Path("model.onnx"), spec, Path("out.onnx"), seed=seed, threads=1))
    run.settings = runtime.Settings(1)
    run.source = Source(model, Path("model.onnx"), "", 0)
    run.data = Data(data_of(calibration or draw_feeds(model, seed + 1)), data_of(given))
    run.samples = len(given)
    outputs = Recording()
    for produced in runtime.outputs_of(model, given, run.settings):
        outputs.append(produced)
    run.single, _ = runtime.one_sample(given[0], model)
    run.metrics, run.source_metrics = {}, {}
    run.origin = run.state = run._state(model, outputs)
    run.statistics = run._calibration()
    return run


def run_step(step: Pass, model: ir.Model, feeds: Sequence[Mapping[str, Any]] | None = None, seed: int = 0) -> Bench:
    """Run one step on a copy of `model`, verified as in a compile."""
    run = bench(model, feeds, seed)
    run.step(0, step)
    return run


# ---------------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class Text:
    """A graph in comparable form: its structure as text; its weights by name with what is known of them."""

    structure: str
    kinds: dict[str, tuple[int, tuple[int, ...]]]
    values: dict[str, Array]


def read_text(text: str) -> tuple[onnx.ModelProto, set[str]]:
    """Parse a graph, or a model where `<ir_version ...>` comes first; return it and the names of its open weights."""
    proto = onnx.parser.parse_model(text if text.lstrip().startswith("<") else HEADER + text)
    made = {name for node in proto.graph.node for name in node.output}
    return proto, {info.name for info in proto.graph.value_info} - made


def model_of(text: str) -> tuple[ir.Model, set[str]]:
    """Return the model that a text writes, and the names of the weights that had to be drawn (see `draw_weight`)."""
    proto, drawn = read_text(text)
    for info in [info for info in proto.graph.value_info if info.name in drawn]:
        proto.graph.initializer.append(draw_weight(info))
    del proto.graph.value_info[:]
    return onnx_io.from_proto(proto)[0], drawn


def draw_weight(info: onnx.ValueInfoProto) -> onnx.TensorProto:
    """Return a weight of magnitude 0.5 to 1.5 and either sign (positive when its name ends in `var`), from its name."""
    kind = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
    dims = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
    rng = np.random.default_rng(zlib.crc32(info.name.encode()))
    drawn = rng.uniform(0.5, 1.5, dims) * (1 if info.name.endswith("var") else rng.choice([-1, 1], dims))
    array = drawn.astype(kind) if kind.kind == "f" else rng.integers(0, 100, dims).astype(kind)
    return onnx.numpy_helper.from_array(np.asarray(array), info.name)


def comparable(proto: onnx.GraphProto) -> Text:
    """Return the comparable form of a graph; weights named only by type are in `kinds` but not in `values`."""
    bare = onnx.GraphProto()
    bare.CopyFrom(proto)
    made = {name for node in bare.node for name in node.output}
    kinds = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in bare.initializer}
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in bare.initializer}
    for info in bare.value_info:
        if info.name not in made:
            tensor = info.type.tensor_type
            kinds[info.name] = (tensor.elem_type, tuple(dim.dim_value for dim in tensor.shape.dim))
    for stale in (bare.initializer, bare.value_info):
        del stale[:]
    bare.name = "g"
    for node in bare.node:
        attributes = sorted(node.attribute, key=lambda found: found.name)
        del node.attribute[:]
        node.attribute.extend(attributes)
        node.doc_string = ""
        del node.metadata_props[:]
    return Text(onnx.printer.to_text(bare), kinds, values)


def proto_of(model: ir.Model) -> onnx.GraphProto:
    """Return a model's graph with its weights inside."""
    found: onnx.GraphProto = ir.to_proto(model).graph
    return found


def write_text(model: ir.Model, floats: bool) -> str:
    """Return a graph's text: weights of up to 16 integers, and if `floats` up to 8 floats, by value; others by type."""
    proto = proto_of(model)
    known = comparable(proto)
    items = []
    for name, (kind, dims) in sorted(known.kinds.items()):
        declared = onnx.TensorProto.DataType.Name(kind).lower() + (f"[{','.join(map(str, dims))}]" if dims else "")
        array = known.values[name]
        told = array.size <= 16 if array.dtype.kind in "iub" else floats and array.size <= 8 and kind in (1, 11)
        entry = f"{declared} {name}"
        if told:
            entry += " = {" + ", ".join(_number(item) for item in array.reshape(-1)) + "}"
        items.append(entry)
    head, brace, body = known.structure.partition("{")
    head = " ".join(head.split())
    weights = f"\n<{', '.join(items)}>" if items else ""
    return head + weights + "\n" + brace + body.rstrip()


def _number(item: Any) -> str:
    if isinstance(item, np.floating):
        return f"{float(item):.6g}"
    return str(int(item))
