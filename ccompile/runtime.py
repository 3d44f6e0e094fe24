"""ONNX Runtime: outputs, chosen intermediates, constant expressions, real shapes and times, in bounded memory.

Sessions that compare run without graph optimisations (fusions change numbers); sessions that are timed run with them.
Weights are handed to the session as they are, never serialised.
"""

from __future__ import annotations

import ctypes
import json
import math
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
import onnx_ir as ir

from ccompile import graph, onnx_io
from ccompile.analysis.shapes import ValueType, infer
from ccompile.errors import ModelError

if TYPE_CHECKING:
    from ccompile.core import Array

Level = Literal["none", "basic", "extended", "all"]  # of ONNX Runtime's graph optimisations
_LEVELS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_IR_VERSION = 10  # of models made here: the oldest supported runtime refuses newer ones, whatever onnx is installed
Feeds = Mapping[str, Any]
Outputs = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How sessions run: `threads` 0 means all cores; `optimise` is for timing only; `level` overrides what it says.

    `profile`: where a profile's file name starts; `optimised`: the file that the graph that really runs is written to.
    """

    threads: int = 0
    optimise: bool = False
    profile: str = ""
    level: Level | None = None
    optimised: str = ""


class Session:
    """One loaded model. Raises ModelError, naming the node where ONNX Runtime does, when it refuses the model."""

    def __init__(self, model: ir.Model, settings: Settings, observed: Sequence[str] = ()) -> None:
        import onnxruntime as ort

        proto, weights = onnx_io.to_proto(model)
        for name in weights.keys() & set(graph.unread(model)):  # which ONNX Runtime forgets first
            del weights[name], proto.graph.initializer[[t.name for t in proto.graph.initializer].index(name)]
        present = {output.name for output in proto.graph.output}
        for name in observed:
            if name not in present:
                proto.graph.output.append(onnx.ValueInfoProto(name=name))
        options = _options(settings)
        self._held = [ort.OrtValue.ortvalue_from_numpy(_aligned(tensor)) for tensor in weights.values()]
        options.add_external_initializers(list(weights), self._held)
        self.names = [output.name for output in proto.graph.output]
        self.inputs = [value.name for value in proto.graph.input]
        with _refusals("ONNX Runtime refuses the model"):
            self._session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(self, feeds: Feeds, names: Sequence[str] | None = None) -> Outputs:
        """Return the named outputs, or all: arrays, lists for sequences, None for empty optionals."""
        wanted = list(self.names if names is None else names)
        with _refusals("ONNX Runtime fails on these inputs"):
            return _run(self._session, feeds, wanted) if wanted else {}  # asked for none, the runtime gives all

    def end_profiling(self) -> str:
        """Return the path of the profile written."""
        path: str = self._session.end_profiling()
        return path


def _run(session: Any, feeds: Feeds, names: Sequence[str]) -> Outputs:
    """Run an InferenceSession; types that its numpy interface lacks (bfloat16, float8, 4 and 2 bits) pass as bits."""
    fed = {name: _bits_in(value) if _is_foreign(value) else value for name, value in feeds.items()}
    types = {output.name: output.type for output in session.get_outputs()}
    if not any(types[name] in _FOREIGN for name in names):
        return dict(zip(names, session.run(list(names), fed), strict=True))
    import onnxruntime as ort

    held = {n: ort.OrtValue.ortvalue_from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in fed.items()}
    found = dict(zip(names, session.run_with_ort_values(list(names), held), strict=True))
    return {name: _bits_out(value) if types[name] in _FOREIGN else value.numpy() for name, value in found.items()}


_FOREIGN = {
    f"tensor({kind.name.lower()})" for kind in ir.DataType if kind.name.startswith(("BFLOAT", "FLOAT4", "FLOAT8"))
} | {f"tensor({name})" for name in ("int4", "uint4", "int2", "uint2")}


def _is_foreign(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.type.__module__ == "ml_dtypes"


def _bits_in(array: Array) -> Any:
    import onnxruntime as ort

    proto = onnx.numpy_helper.from_array(array)
    value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, proto.data_type)
    ctypes.memmove(value.data_ptr(), proto.raw_data, len(proto.raw_data))
    return value


def _bits_out(value: Any) -> Array:
    raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes()) if math.prod(value.shape()) else b""
    proto = onnx.TensorProto(dims=value.shape(), data_type=value.element_type(), raw_data=raw)
    found: Array = onnx.numpy_helper.to_array(proto)
    return found


def _options(settings: Settings) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    level = settings.level or ("all" if settings.optimise else "none")
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[level])
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.use_deterministic_compute = True
    options.enable_cpu_mem_arena = settings.optimise
    if settings.optimised:
        options.optimized_model_filepath = settings.optimised
    if settings.profile:
        options.enable_profiling = True
        options.profile_file_prefix = settings.profile
    ort.set_default_logger_severity(4)
    return options


def _aligned(tensor: ir.TensorProtocol) -> Array:
    return np.ascontiguousarray(tensor.numpy())


class _refusals:  # noqa: N801  (reads as a phrase at its use)
    """Turn ONNX Runtime's exceptions into ModelErrors with a short message."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or kind is None:
            return
        if not (kind.__module__.startswith("onnxruntime") or isinstance(error, RuntimeError | ValueError)):
            return
        text = shorten(str(error))
        node = _NODE.search(str(error))
        name = next(filter(None, node.groups()), "") if node else ""
        raise ModelError(f"{self.what}: {text}", f"node `{name}`" if name else "") from error


# How ONNX Runtime names nodes: Name:'n', in node (n), Node (n) Op, In Node, ("n", ...), with name 'n', (node:'n' ep:.
_NODE = re.compile(r"""Name:'([^']+)'|[Nn]ode,? \("?([^"()]+)"?[,)]|[Nn]ode with name '([^']+)'|[Nn]ode: ?'([^']+)'""")


def shorten(message: str, limit: int = 300) -> str:
    """Return an ONNX Runtime message in one line, without its status code, source paths and stack.

    >>> shorten("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for Foo(1)")
    'Could not find an implementation for Foo(1)'
    """
    text = " ".join(message.split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", text)
    text = re.sub(r"/\S+/([\w.]+):\d+ [\w:<>~ *&,]+\([^)]*\)(?: \[[^\]]*\])? ?", "", text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def evaluate(values: Sequence[ir.Value], settings: Settings) -> list[Array]:
    """Return what constant-only values are, computed by the runtime itself on the nodes that lead to them.

    Raises ModelError when a value depends on a graph input or the runtime refuses a node.
    """
    nodes: dict[ir.Node, None] = {}
    constants: dict[str, ir.TensorProtocol] = {}
    stack = [(value, False) for value in values]
    while stack:
        value, done = stack.pop()
        node = value.producer()
        if value.is_initializer() and value.const_value is not None and not value.is_graph_input():
            constants[str(value.name)] = value.const_value
        elif node is None:
            raise ModelError(f"`{value.name}` is not constant")
        elif done:
            nodes.setdefault(node)
        elif node not in nodes:
            stack.append((value, True))
            stack += [(operand, False) for operand in node.inputs if operand is not None]
    owner = next((v.graph for v in values if v.graph is not None), None)
    opsets = [onnx.helper.make_opsetid(k, v) for k, v in (owner.opset_imports if owner else {}).items()]
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [ir.to_proto(node) for node in nodes],
            "constants",
            [],
            [onnx.ValueInfoProto(name=str(value.name)) for value in values],
            [ir.serde.serialize_tensor(graph.renamed(tensor, name)) for name, tensor in constants.items()],
        ),
        opset_imports=opsets,
        ir_version=_IR_VERSION,
    )
    session = Session(onnx_io.from_proto(proto)[0], settings)
    found = session.run({})
    return [np.asarray(found[str(value.name)]) for value in values]


def observed_shapes(model: ir.Model, feeds: Feeds, settings: Settings) -> dict[str, ValueType]:
    """Return the real types of the values, those in subgraphs included, that one run on `feeds` produces.

    Uses the runtime's own profile, so that no intermediate tensor is kept. Values of nodes that did not run are absent,
    and so are inner values whose name stands in several subgraphs.
    """
    copy = graph.copy(model)
    by_key: dict[str, ir.Node] = {}
    times: Counter[str] = Counter()
    for index, node in enumerate(copy.graph.all_nodes()):
        node.name = f"@{index}@"
        by_key[node.name] = node
        times.update(str(output.name) for output in node.outputs if output.name)
    found: dict[str, ValueType] = {}
    with tempfile.TemporaryDirectory() as folder:
        profiled = Settings(settings.threads, settings.optimise, str(Path(folder) / "profile"))
        session = Session(copy, profiled)
        session.run(feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    for event in events:
        key = re.match(r"@\d+@", event.get("name", ""))
        shapes = event.get("args", {}).get("output_type_shape")
        if key is None or not shapes:
            continue
        outputs = [output for output in by_key[key.group()].outputs if output.name]
        for output, entry in zip(outputs, shapes, strict=False):
            ((kind, dims),) = entry.items()
            if times[str(output.name)] == 1:
                found[str(output.name)] = ValueType(_dtype(kind), tuple(dims))
    return found


def types_of(model: ir.Model, feeds: Feeds, settings: Settings) -> dict[str, ValueType]:
    """Return the types of all values on `feeds`: inferred, and observed where inference does not know."""
    shapes = {name: value.shape for name, value in feeds.items() if isinstance(value, np.ndarray)}
    types: dict[str, ValueType] = infer(model, shapes)
    produced = [str(output.name) for node in model.graph for output in node.outputs if output.name]
    inner = any(True for node in model.graph for _ in graph.subgraphs(node))
    if inner or any(name not in types or types[name].static is None for name in produced):
        types |= observed_shapes(model, feeds, settings)
    return types


def _dtype(name: str) -> ir.DataType | None:
    aliases = {"float": "FLOAT", "double": "DOUBLE", "bool": "BOOL"}
    return getattr(ir.DataType, aliases.get(name, name.upper()), None)


@dataclass(frozen=True)
class Timing:
    """Seconds per inference of two models run in turns; `ratio` is reference over candidate, with its quartiles."""

    seconds: float
    reference_seconds: float
    ratio: float
    low: float
    high: float
    rounds: int


def race(
    candidate: ir.Model, reference: ir.Model, feeds: Feeds, threads: int, budget: float = 4.0, rounds: int = 400
) -> Timing:
    """Time two models in turns on the same inputs, optimised as deployed.

    budget: seconds in all; at least 5 and at most `rounds` pairs are run after a warm-up. The median of the ratios of
    neighbouring runs is robust against the drift of a shared machine.
    """
    settings = Settings(threads=threads, optimise=True)
    sessions = [Session(candidate, settings), Session(reference, settings)]
    for session in sessions:
        session.run(feeds)
    times: list[tuple[float, float]] = []
    stop = time.perf_counter() + budget
    while len(times) < 5 or (time.perf_counter() < stop and len(times) < rounds):
        pair = [_timed(session, feeds) for session in (sessions if len(times) % 2 else sessions[::-1])]
        times.append((pair[0], pair[1]) if len(times) % 2 else (pair[1], pair[0]))
    mine, other = np.array(times).T
    low, middle, high = np.quantile(other / mine, [0.25, 0.5, 0.75])
    return Timing(float(np.median(mine)), float(np.median(other)), float(middle), float(low), float(high), len(times))


def _timed(session: Session, feeds: Feeds) -> float:
    start = time.perf_counter()
    session.run(feeds)
    return time.perf_counter() - start


def read_values(nodes: Iterable[ir.Node]) -> set[ir.Value]:
    """Return the values that nodes read and do not make themselves, constants left out, captured ones included."""
    read: set[ir.Value] = set()
    made: set[ir.Value] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        made.update(node.outputs)
        read.update(value for value in node.inputs if value is not None and not graph.is_constant(value))
        for subgraph in graph.subgraphs(node):
            made.update(subgraph.inputs)
            read.update(value for value in subgraph.outputs if not graph.is_constant(value))
            stack += list(subgraph)
    return read - made


def part_of(
    model: ir.Model, nodes: Sequence[ir.Node], dtypes: Mapping[str, np.dtype[Any]], outputs: Sequence[str]
) -> ir.Model:
    """Return some consecutive nodes as a model: inputs are what they read, of the given types; weights are shared."""
    constants: dict[str, ir.TensorProtocol] = {}
    inside = {output for node in nodes for output in node.outputs}
    stack = list(nodes)
    while stack:
        node = stack.pop()
        stack += [inner for subgraph in graph.subgraphs(node) for inner in subgraph]
        for value in node.inputs:
            if value is None or value in inside or value.graph is not model.graph:
                continue
            if (tensor := graph.constant_tensor(value)) is not None:
                constants[str(value.name)] = tensor
    inputs = sorted(str(value.name) for value in read_values(nodes))
    infos = [
        onnx.helper.make_tensor_value_info(name, ir.DataType.from_numpy(dtypes[name]).value, None) for name in inputs
    ]
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [ir.to_proto(node) for node in nodes],
            "part",
            infos,
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [onnx.TensorProto(name=name, data_type=t.dtype.value, dims=[0]) for name, t in constants.items()],
        ),
        opset_imports=[onnx.helper.make_opsetid(domain, number) for domain, number in model.opset_imports.items()],
        functions=[ir.to_proto(function) for function in model.functions.values()],
        ir_version=model.ir_version,
    )
    part = ir.from_proto(proto)
    for name, tensor in constants.items():
        part.graph.initializers[name].const_value = tensor
    return part


def one_sample(feeds: Feeds, model: ir.Model, samples: int = 1) -> tuple[dict[str, Any], bool]:
    """Return the feeds cut to one sample, or at most `samples`, and whether there was a batch axis to cut.

    The batch axis is every axis with the symbol of the first open leading axis; without a symbol, the leading axis of
    all inputs, if no input has another open axis only. Otherwise the feeds stay whole (recurrent state, for example).
    """
    declared = {str(value.name): graph.declared_shape(value) or () for value in model.graph.inputs}
    leading = [dims[0] for dims in declared.values() if dims and not isinstance(dims[0], int)]
    if not leading or any(not isinstance(value, np.ndarray) for value in feeds.values()):
        return dict(feeds), not leading
    symbol = next((dim for dim in leading if isinstance(dim, str)), None)
    for dims in declared.values():
        inner_only = bool(dims) and isinstance(dims[0], int) and any(not isinstance(dim, int) for dim in dims)
        if inner_only and (symbol is None or symbol not in dims):
            return dict(feeds), False
    cut = {}
    for name, value in feeds.items():
        dims = declared[name]
        if value.ndim == 0:
            cut[name] = value
            continue
        axes = [axis for axis, dim in enumerate(dims) if (dim == symbol if symbol else axis == 0 and dim is None)]
        cut[name] = value[tuple(slice(0, samples) if axis in axes else slice(None) for axis in range(value.ndim))]
    return cut, True


def run_file(path: Path, feeds: Feeds, settings: Settings) -> Outputs:
    """Return the outputs of a model file as any user of the runtime would load it, by path."""
    import onnxruntime as ort

    options = _options(settings)
    with _refusals("ONNX Runtime refuses the file written"):
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return _run(session, feeds, names)


def outputs_of(model: ir.Model, batches: Iterable[Feeds], settings: Settings) -> Iterator[Outputs]:
    """Yield the model's outputs batch by batch; the session lives as long as the iteration."""
    session = Session(model, settings)
    for feeds in batches:
        yield session.run(feeds)
