"""Targets: what a machine runs, what it holds and how fast it is, read from `specs/targets/*.yaml`.

Every rate is an estimate unless its file says that it was measured. Units: GMAC/s = 1e9 multiply-accumulates a second
(GFLOP/s is twice that), GB/s = 1e9 bytes a second, MiB = 2**20 bytes. Rates are of one inference on the cores that the
file names, at batch 1.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import onnx_ir as ir
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from ccompile import graph, specs
from ccompile.errors import Problem, SpecError, nearest
from ccompile.tables import TableKind, Tables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ccompile.analysis.shapes import Shapes
    from ccompile.core import CostReport

MIB = 2**20
RateKind = Literal["conv", "conv1x1", "depthwise", "ragged", "gemm", "gemv", "recurrent", "elementwise"]
Positive = Annotated[float, Field(gt=0)]
Table = Annotated[dict[str, Positive], Field(min_length=1)]

# A dtype without a rate of its own runs at that of the next one here that has one.
_RUNS_AS = {
    "uint8": ("int8", "float32"),
    "int8": ("float32",),
    "float16": ("float32",),
    "bfloat16": ("float16", "float32"),
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Opset(_Part):
    """The versions of the default operator domain that a target reads."""

    min: PositiveInt = Field(description="oldest opset")
    max: PositiveInt = Field(description="newest opset")

    @model_validator(mode="after")
    def _ordered(self) -> Opset:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class Step(_Part):
    """The multiples to which a machine rounds channels up: what it computes, not what it was asked for."""

    in_channels: PositiveInt = Field(default=1, description="input channels come in multiples of this")
    out_channels: PositiveInt = Field(default=1, description="output channels come in multiples of this")


class Rates(_Part):
    """Rates of work by kind and by dtype; a dtype that is missing runs as float32 (uint8 as int8)."""

    conv: Table = Field(description="convolutions with a kernel above 1, GMAC/s")
    conv1x1: Table = Field(description="1x1 convolutions, GMAC/s")
    depthwise: Table = Field(description="one input channel per group, GMAC/s")
    ragged: Table | None = Field(
        default=None,
        description="depthwise convolutions whose channels are no multiple of `align`, GMAC/s; by default as depthwise",
    )
    gemm: Table = Field(description="matrix products of several rows, GMAC/s")
    gemv: Table = Field(description="matrix products of one row, GMAC/s, apart from the bandwidth limit")
    recurrent: Table = Field(description="LSTM, GRU, RNN, GMAC/s")
    elementwise: Table = Field(description="everything else, G elements/s")


class Layout(_Part):
    """The layout in which float32 convolutions of images run: channels in blocks."""

    block: PositiveInt = Field(description="channels in a block")
    inputs: PositiveInt = Field(default=1, description="a dense convolution's input channels come in multiples of this")
    depthwise: PositiveInt = Field(default=1, description="channels of a depthwise one come in multiples of this")
    carries: tuple[str, ...] = Field(
        default=(), description="ops that work on blocks where all their inputs are in blocks"
    )


class Cache(_Part):
    """A faster memory before the main one: the first `mib` of what a node moves come from it."""

    mib: Positive = Field(description="size, MiB")
    bandwidth_gb_s: Positive = Field(description="bandwidth, GB/s")


class Memory(_Part):
    """What fits; a limit that is not given does not bind. Sizes in MiB, whatever the key's short name suggests."""

    weights_mib: Positive | None = Field(default=None, description="for weights as stored (flash), MiB")
    activations_mib: Positive | None = Field(default=None, description="for live activations (RAM), MiB")
    total_mib: Positive | None = Field(
        default=None, description="for weights as held by the runtime and activations, MiB"
    )


class Target(_Part):
    """A machine with its runtime."""

    name: str = Field(min_length=1, description="name, as in specs")
    description: str = Field(default="", description="the machine, its runtime and where the numbers come from")
    opset: Opset = Field(description="versions of the default operator domain")
    ops: tuple[str, ...] | Literal["*"] = Field(
        default="*", description="ops of the default domain that run; * means all"
    )
    lacks: tuple[str, ...] = Field(default=(), description="ops that do not run, where `ops` is *")
    domains: tuple[str, ...] = Field(default=(), description="other operator domains that run, all their ops")
    dtypes: tuple[str, ...] = Field(min_length=1, description="element types that values may have, ONNX names")
    staircase: dict[str, Step] = Field(
        default_factory=dict, alias="align", description="by dtype, multiples of channels that are really computed"
    )
    rates: Rates = Field(description="how fast it computes")
    bandwidth_gb_s: Positive = Field(description="main memory bandwidth, GB/s")
    cache: Cache | None = Field(default=None, description="a faster memory before the main one")
    node_overhead_us: float = Field(ge=0, description="fixed time of each node that runs, microseconds")
    fused: tuple[str, ...] = Field(
        default=(),
        description="ops that cost nothing right after a linear op; QuantizeLinear and DequantizeLinear: around one",
    )
    session_overhead_us: float = Field(default=0, ge=0, description="fixed time of each inference, microseconds")
    layout: Layout | None = Field(
        default=None, description="a layout of its own for convolutions; without it changes of layout cost nothing"
    )
    tables: Tables = Field(default_factory=Tables, description="measured rates by size, which go before `rates`")
    memory: Memory = Field(default_factory=Memory, description="what fits")

    @model_validator(mode="after")
    def _consistent(self) -> Target:
        if self.lacks and self.ops != "*":
            raise ValueError("`lacks` only makes sense with `ops: '*'`: remove the ops from the list instead")
        known = {dtype_name(dtype) for dtype in ir.DataType}
        named = {*self.dtypes, *self.staircase, *(d for _, table in self.rates for d in table or ())}
        named |= {dtype for _, kind in self.tables for dtype in kind}
        for dtype in sorted(named - known):
            raise ValueError(f"`{dtype}` is not an ONNX element type. {nearest(dtype, known)}")
        return self

    def runs(self, op_type: str, domain: str = "") -> bool:
        """Return whether the target has this op."""
        if domain not in ("", "ai.onnx"):
            return domain in self.domains
        return op_type not in self.lacks if self.ops == "*" else op_type in self.ops

    @property
    def newest(self) -> int:
        """Return the newest opset that the target takes."""
        return self.opset.max

    def holds(self, dtype: str) -> bool:
        """Return whether values may have this element type."""
        return dtype in self.dtypes

    def align(self, channels: int) -> int:
        """Return the number of output channels that the target really computes for `channels`, in float32 if it has it.

        The staircase of the first dtype stands in where float32 has none.
        """
        step = self.staircase.get("float32") or next(iter(self.staircase.values()), Step())
        return round_up_to(channels, step.out_channels)

    def step(self, dtype: str) -> Step:
        """Return the channel multiples of a dtype, as it runs."""
        for name in (dtype, *_RUNS_AS.get(dtype, ())):
            if name in self.staircase:
                return self.staircase[name]
        return Step()

    def measured(
        self, kind: TableKind, dtype: str, sizes: Mapping[str, float], *, kernel: int = 1, op: str = ""
    ) -> float | None:
        """Return the rate in 1/s that a table gives: of `dtype`, or of what it runs as; None where none was measured.

        A type with a rate of its own never takes another type's table.
        """
        for name in (dtype, *_RUNS_AS.get(dtype, ())):
            found = self.tables.rate(kind, name, sizes, kernel=kernel, op=op)
            if found is not None or name in self.rates.conv:
                return found
        return None

    def rate(self, kind: RateKind, dtype: str) -> float:
        """Return the rate in 1/s: of `dtype`, else of what it runs as, else the slowest that is given."""
        given: dict[str, float] | None = getattr(self.rates, kind)
        names = (dtype, *_RUNS_AS.get(dtype, ("float32",)))
        if kind == "ragged" and (given is None or not any(name in given for name in names)):
            given = self.rates.depthwise
        table = given or {}
        for name in names:
            if name in table:
                return table[name] * 1e9
        return min(table.values()) * 1e9

    def seconds_to_move(self, nbytes: int) -> float:
        """Return the time to move `nbytes`: up to the cache's size at its bandwidth, the rest at main memory's."""
        cached = min(nbytes, self.cache.mib * MIB) if self.cache else 0
        fast = cached / (self.cache.bandwidth_gb_s * 1e9) if self.cache else 0.0
        return fast + (nbytes - cached) / (self.bandwidth_gb_s * 1e9)


def round_up_to(count: int, multiple: int) -> int:
    """Return the least multiple that is >= count.

    >>> round_up_to(49, 16)
    64
    """
    return -(-count // multiple) * multiple


def dtype_name(dtype: ir.DataType) -> str:
    """Return the ONNX name of an element type as targets write it.

    >>> dtype_name(ir.DataType.FLOAT)
    'float32'
    """
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


# ---------------------------------------------------------------------------------------------- loading


def _folder() -> Path:
    return Path(str(specs.__file__)).parent / "targets"


def target_names() -> tuple[str, ...]:
    """Return the names of the targets that come with ccompile."""
    return tuple(sorted(path.stem for path in _folder().glob("*.yaml")))


def load_target(what: str | dict[str, Any], base: Path) -> Target:
    """Return a target: the name of a shipped one, the path of a YAML file (relative to `base`), or the mapping itself.

    Raises SpecError with every problem found: unknown name, unreadable file, unknown or missing keys, bad values.
    """
    if isinstance(what, dict):
        return _validated(what, "target")
    if (path := target_file(what, base)) is not None:
        return _read(path)
    hint = nearest(what, target_names()).replace("It takes:", "There are:")
    raise SpecError(f"there is no target `{what}`", "target", f"{hint} Or give the path of a YAML file.")


def target_file(what: str, base: Path) -> Path | None:
    """Return the file of a target that is given by name or path; None when there is none of that name."""
    if what in target_names():
        return _folder() / f"{what}.yaml"
    return base / what if what.endswith((".yaml", ".yml")) or "/" in what else None


def _read(path: Path) -> Target:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"cannot read the target: {error.strerror}", str(path), "Is the path right?") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"not YAML: {' '.join(str(error).split())}", str(path)) from error
    if not isinstance(raw, dict):
        raise SpecError("a target is a mapping of keys", str(path), nearest("", _keys(())))
    return _validated(raw, str(path))


def _validated(raw: dict[str, Any], source: str) -> Target:
    try:
        return Target.model_validate(raw)
    except ValidationError as error:
        raise SpecError.of(_problem(found, source) for found in error.errors()) from error


def _problem(found: Any, source: str) -> Problem:
    path = tuple(found["loc"])
    where = f"{source}: {'.'.join(str(part) for part in path)}" if path else source
    if found["type"] == "extra_forbidden":
        return Problem(f"unknown key `{path[-1]}`", where, nearest(str(path[-1]), _keys(path[:-1])))
    if found["type"] == "missing":
        return Problem(f"`{path[-1]}` is missing", where)
    return Problem(str(found["msg"]).removeprefix("Value error, "), where)


def _keys(path: tuple[str | int, ...]) -> list[str]:
    parts: dict[str, type[BaseModel]] = {
        "opset": Opset, "rates": Rates, "memory": Memory, "align": Step, "cache": Cache
    }  # fmt: skip
    model = parts.get(str(path[0]), Target) if path else Target
    return [field.alias or name for name, field in model.model_fields.items()]


# ---------------------------------------------------------------------------------------------- does a model fit?


def check(model: ir.Model, target: Target, report: CostReport, peak_node: str, shapes: Shapes) -> tuple[Problem, ...]:
    """Return why a model does not run on a target: opset, ops, element types, memory.

    One problem per op or element type, at the first node that has it, with the number of nodes; nodes of subgraphs and
    of local functions are included. `report` and `peak_node` come from cost.price.
    """
    nodes = list(_all_nodes(model))
    return (
        *_check_opset(model, nodes, target),
        *_check_ops(model, nodes, target),
        *_check_dtypes(nodes, target, shapes),
        *_check_memory(model, target, report, peak_node),
    )


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _name(node: ir.Node) -> str:
    return f"node `{node.name or node.op_type}`"


def _check_opset(model: ir.Model, nodes: list[ir.Node], target: Target) -> Iterator[Problem]:
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if version is None or not nodes or target.opset.min <= version <= target.opset.max:
        return
    yield Problem(
        f"opset {version} is outside {target.opset.min} to {target.opset.max} of target `{target.name}`",
        f"{_name(nodes[0])} and all others",
        "Convert the model with onnx.version_converter, or choose another target.",
    )


def _check_ops(model: ir.Model, nodes: list[ir.Node], target: Target) -> Iterator[Problem]:
    def missing(node: ir.Node) -> list[str]:
        if node.op_identifier() in model.functions or target.runs(node.op_type, node.domain):
            return []
        return [f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type]

    for op, (first, count) in _grouped(nodes, missing).items():
        yield Problem(
            f"target `{target.name}` has no `{op}` ({count} node{'s' * (count > 1)})",
            _name(first),
            "Lower it to other ops, or choose another target.",
        )


def _check_dtypes(nodes: list[ir.Node], target: Target, shapes: Shapes) -> Iterator[Problem]:
    def dtype_of(value: ir.Value) -> ir.DataType | None:
        tensor = graph.stored(value)
        known = shapes.get(str(value.name))
        return tensor.dtype if tensor is not None else (known.dtype if known and known.dtype else value.dtype)

    def missing(node: ir.Node) -> list[str]:
        found = {dtype_of(value) for value in (*node.inputs, *node.outputs) if value is not None}
        named = {dtype_name(dtype) for dtype in found if dtype not in (None, ir.DataType.UNDEFINED)}
        return sorted(named - set(target.dtypes))

    for dtype, (first, count) in _grouped(nodes, missing).items():
        yield Problem(
            f"target `{target.name}` has no element type {dtype} ({count} node{'s' * (count > 1)})",
            _name(first),
            f"It has: {', '.join(target.dtypes)}.",
        )


def _grouped(nodes: list[ir.Node], ask: Callable[[ir.Node], list[str]]) -> dict[str, tuple[ir.Node, int]]:
    found: dict[str, tuple[ir.Node, int]] = {}
    for node in nodes:
        for key in ask(node):
            first, count = found.get(key, (node, 0))
            found[key] = (first, count + 1)
    return found


def _check_memory(model: ir.Model, target: Target, report: CostReport, peak_node: str) -> Iterator[Problem]:
    limits = target.memory
    peak = f"node `{peak_node}`"
    total = report.resident_bytes + report.peak_activation_bytes
    for limit, needed, what, where in (
        (limits.weights_mib, report.stored_bytes, "stored weights", _heaviest(model)),
        (limits.activations_mib, report.peak_activation_bytes, "activations live at the peak", peak),
        (limits.total_mib, total, "weights and activations at the peak", peak),
    ):
        if limit is not None and needed > math.floor(limit * MIB):
            yield Problem(
                f"{what}: {needed} bytes exceed the {math.floor(limit * MIB)} bytes of target `{target.name}`", where
            )


def _heaviest(model: ir.Model) -> str:
    """Return the node that reads the largest stored tensor, in words."""

    def largest(node: ir.Node) -> int:
        tensors = [graph.stored(value) for value in node.inputs]
        return max((tensor.nbytes for tensor in tensors if tensor is not None), default=0)

    node = max(model.graph.all_nodes(), key=largest, default=None)
    return "the graph, which has no nodes" if node is None else _name(node)
