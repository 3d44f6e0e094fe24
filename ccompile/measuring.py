"""`ccompile target measure`: a target whose rates were measured on this machine, with the runtime that is installed.

Each probe (benchmarks.py) is a small model; what counts is how long its nodes take by the runtime's own profile, less
what the profile itself takes, which the emptiest nodes tell. The probes of a grid run in turns, so that a busy machine
disturbs all of them, and the mean of the faster half of the runs stands: near the first quartile, and finer than the
microseconds of the profile.
"""

from __future__ import annotations

import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import yaml

from ccompile import benchmarks, onnx_io, timing
from ccompile.core import Array
from ccompile.probes import Probe, Series
from ccompile.runtime import Session, Settings
from ccompile.tables import TableKind, Tables
from ccompile.target import RateKind, Target

_LEAST_ROUNDS = 3
_ROW_RUNS, _ROW_SECONDS = 8, 0.004
_LEAST_US = 0.1  # of a node: less is not told from nothing
_KERNEL_US = 0.5  # of a kernel with work in a profile of whole microseconds: less is not told from that
_SHORT_US = 5.0  # what a profile in whole microseconds tells badly
_FEW_AND_MANY, _COUNTING_SECONDS = (8, 32), 0.05
_BLOCKS = (4, 8, 16, 32)
_STEPS = (32, 16, 8, 4, 2, 1)
_WIDTHS = (33, 36, 40, 44, 48, 49, 52, 56, 60, 64)  # channels from which a staircase is told
_STEEP = 1.2  # how much worse than the best staircase one may fit that has longer steps

# Where in the tables the rates stand that hold for whatever was not measured.
_TYPICAL: Mapping[RateKind, tuple[TableKind, int, dict[str, float]]] = {
    "conv": ("conv", 9, {"inputs": 64, "outputs": 64, "positions": 784}),
    "conv1x1": ("conv", 1, {"inputs": 64, "outputs": 64, "positions": 784}),
    "depthwise": ("depthwise", 9, {"channels": 64, "positions": 784}),
    "ragged": ("ragged", 9, {"channels": 120, "positions": 784}),
    "gemm": ("gemm", 1, {"rows": 128, "inputs": 1024, "outputs": 1024}),
    "gemv": ("gemm", 1, {"rows": 1, "inputs": 256, "outputs": 256}),
}


@dataclass
class Bench:
    """Runs probes within a budget of seconds. `tell`: shown what is measured."""

    threads: int
    stop: float
    tell: Callable[[str], None] = lambda text: None
    empty_us: float = 0.0  # what the profile says of a node that does nothing
    node_seconds: float = 0.0  # what a node costs beside its work
    notes: list[str] = field(default_factory=list)

    def grid(self, series: Series, share: float) -> dict[str, Any] | None:
        """Return a grid of a table as plain data, or None, with a note, where a kernel does not run as it should.

        share: of the time that is left.
        """
        self.tell(series.name)
        probes = series.probes()
        deadline = time.perf_counter() + max(self.stop - time.perf_counter(), 0.0) * share
        others = [replace(probe, build=probe.without) for probe in probes if probe.without is not None]
        found = self.profiled([*probes, *others], deadline)
        if others:
            pairs = zip(found[: len(probes)], found[len(probes) :], strict=True)
            found = [max(taken - without, _LEAST_US * 1e-7) for taken, without in pairs]
        else:
            found = [max(taken, probe.nodes * _KERNEL_US * 1e-6) for probe, taken in zip(probes, found, strict=True)]
        found = [self.counted(probe, seconds) for probe, seconds in zip(probes, found, strict=True)]
        if lost := [probe for probe, seconds in zip(probes, found, strict=True) if math.isnan(seconds)]:
            self.notes.append(f"{series.name}: not measured, nothing ran as {' or '.join(lost[0].runs_as)}")
            return None
        rates = [rounded(probe.work / seconds / 1e9) for probe, seconds in zip(probes, found, strict=True)]
        named = {"kernel": series.kernel, "op": series.op}
        axes = {name: list(sizes) for name, sizes in series.named_axes().items()}
        return {name: value for name, value in named.items() if value is not None} | {"axes": axes, "rates": rates}

    def profiled(self, probes: Sequence[Probe], deadline: float) -> list[float]:
        """Return the seconds of each probe's nodes, run in turns until the deadline, at least a few times."""
        with tempfile.TemporaryDirectory() as folder:
            runs = []
            for index, probe in enumerate(probes):
                proto, feeds = probe.build()
                runs.append((self.session(proto, str(Path(folder) / f"{index}")), feeds))
            rounds = 0
            while rounds < _LEAST_ROUNDS or time.perf_counter() < deadline:
                for session, feeds in runs:
                    _in_a_row(partial(session.run, feeds))
                rounds += 1
            files = [session.end_profiling() for session, _ in runs]
            return [self.seconds_of(probe, Path(file)) for probe, file in zip(probes, files, strict=True)]

    def session(self, proto: onnx.ModelProto, profile: str = "") -> Session:
        """Return a session as deployed."""
        return Session(onnx_io.from_proto(proto)[0], Settings(self.threads, optimise=True, profile=profile))

    def seconds_of(self, probe: Probe, file: Path) -> float:
        """Return the seconds of a probe's nodes in a profile, NaN where they did not run."""
        times = durations(file, probe.runs_as)
        first = len(times) // (2 * _LEAST_ROUNDS)  # the runs that warm up
        taken = lower_mean(times[first:]) - self.empty_us if times else math.nan
        return probe.nodes * max(taken, _LEAST_US) * 1e-6 if times else math.nan

    def counted(self, probe: Probe, seconds: float) -> float:
        """Return a short node's seconds from whole inferences with few and with many of it; profiles tell whole us."""
        if probe.times is None or not seconds < _SHORT_US * 1e-6:
            return seconds
        runs = [partial(self.session(proto).run, feeds) for proto, feeds in map(probe.times, _FEW_AND_MANY)]
        few, many = timing.interleaved(runs, self.threads == 1, budget=_COUNTING_SECONDS)
        taken = (many - few) / (_FEW_AND_MANY[1] - _FEW_AND_MANY[0]) - self.node_seconds
        return max(taken, _LEAST_US * 1e-7)

    # -------------------------------------------------------------------------------- what is no table

    def overheads(self) -> tuple[float, float]:
        """Return the microseconds of a node and of an inference beside its nodes; learns what a profile adds."""
        self.tell("overheads")
        short, long = 8, 64
        built = [benchmarks.small_chain(nodes) for nodes in (short, long)]
        runs = [partial(self.session(proto).run, feeds) for proto, feeds in built]
        few, many = timing.interleaved(runs, self.threads == 1, budget=0.2)
        node = self.node_seconds = max((many - few) / (long - short), 1e-8)
        probe = Probe((), 0.0, ("Softsign", "Abs"), lambda: built[1])
        self.empty_us = 0.0
        (profiled,) = self.profiled([probe], time.perf_counter() + 0.1)
        self.empty_us = profiled * 1e6
        return node * 1e6, max(few - short * node, 0.0) * 1e6

    def ops_of(self, built: tuple[onnx.ModelProto, Mapping[str, Array]]) -> list[str]:
        """Return the ops that really run, one entry per node."""
        proto, feeds = built
        with tempfile.TemporaryDirectory() as folder:
            session = self.session(proto, str(Path(folder) / "p"))
            session.run(feeds)
            return [event["args"]["op_name"] for event in _events(Path(session.end_profiling()))]

    def layout(self) -> dict[str, Any] | None:
        """Return the blocked layout of convolutions, or None where there is none."""
        self.tell("layout")

        def is_blocked(inputs: int, groups: int) -> bool:
            probe = benchmarks.conv((3, 3), inputs, inputs, (8, 8), groups)
            return "ReorderInput" in self.ops_of(probe.build())

        block = next((block for block in _BLOCKS if is_blocked(4 * block, 4)), None)
        if block is None:
            return None
        steps = [step for step in _BLOCKS if step < block]
        inputs = next((step for step in (1, 2, *steps) if is_blocked(block + step, 1)), block)
        depthwise = next((step for step in (2, *steps) if is_blocked(block + step, block + step)), block)
        carries = [op for op in benchmarks.CARRIED if self.carries(op)]
        return {"block": block, "inputs": inputs, "depthwise": depthwise, "carries": carries}

    def fused(self) -> list[str]:
        """Return the ops that become part of a convolution before them."""
        self.tell("fusions")
        without = len(self.ops_of(benchmarks.behind_conv(None)))
        return [op for op in benchmarks.CARRIED if len(self.ops_of(benchmarks.behind_conv(op))) == without]

    def carries(self, op: str) -> bool:
        """Return whether an op works on blocks."""
        return self.ops_of(benchmarks.between(op)).count("ReorderInput") == 1

    def staircase(self, dtype: str, share: float) -> dict[str, int]:
        """Return the multiples to which channels of a convolution are rounded up."""
        self.tell(f"staircase {dtype}")
        is_integer, fixed, image = dtype == "int8", 64, (28, 28)
        outs = [benchmarks.conv((3, 3), fixed, width, image, is_integer=is_integer) for width in _WIDTHS]
        ins = [benchmarks.conv((3, 3), width, fixed, image, is_integer=is_integer) for width in _WIDTHS]
        deadline = time.perf_counter() + max(self.stop - time.perf_counter(), 0.0) * share
        found = self.profiled([*ins, *outs], deadline)
        return {
            "in_channels": step_of(_WIDTHS, found[: len(ins)]),
            "out_channels": step_of(_WIDTHS, found[len(ins) :]),
        }


def _in_a_row(run: timing.Run) -> None:
    """Run several times, as caches are warm in a network: up to a limit of runs and one of seconds."""
    stop = time.perf_counter() + _ROW_SECONDS
    for _ in range(_ROW_RUNS):
        run()
        if time.perf_counter() > stop:
            break


def lower_mean(times: Sequence[float]) -> float:
    """Return the mean of the faster half.

    >>> lower_mean([9.0, 1.0, 2.0, 30.0])
    1.5
    """
    ordered = sorted(times)
    half = ordered[: max(len(ordered) // 2, 1)]
    return sum(half) / len(half)


def step_of(widths: Sequence[int], seconds: Sequence[float]) -> int:
    """Return the multiple to which widths are rounded up, by the times they take: the longest step that fits.

    >>> step_of((33, 40, 48, 49, 64), (3.0, 3.1, 3.0, 4.0, 4.0))
    16
    """

    def misfit(step: int) -> float:
        computed = [-(-width // step) * step for width in widths]
        each = [math.log(time / width) for time, width in zip(seconds, computed, strict=True)]
        middle = sum(each) / len(each)
        return math.sqrt(sum((value - middle) ** 2 for value in each) / len(each))

    best = min(misfit(step) for step in _STEPS)
    return next(step for step in _STEPS if misfit(step) <= _STEEP * best + 0.01)


def durations(profile: Path, ops: Collection[str]) -> list[float]:
    """Return the microseconds of the nodes of these ops in a profile, in order."""
    return [float(event["dur"]) for event in _events(profile) if event["args"]["op_name"] in ops]


def by_name(profile: Path, empty_us: float) -> dict[str, float]:
    """Return the seconds of each node in a profile, less what the profile adds."""
    times: dict[str, list[float]] = {}
    for event in _events(profile):
        times.setdefault(str(event["name"]).removesuffix("_kernel_time"), []).append(float(event["dur"]))
    return {name: max(lower_mean(taken[1:] or taken) - empty_us, 0.0) * 1e-6 for name, taken in times.items()}


def _events(profile: Path) -> Iterable[Mapping[str, Any]]:
    events = json.loads(profile.read_text())
    return [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]


def rounded(value: float) -> float:
    """Return three significant digits.

    >>> rounded(123.456), rounded(0.0123456)
    (123.0, 0.0123)
    """
    return float(f"{value:.3g}")


# ---------------------------------------------------------------------------------------------- the target


def measure_target(
    base: Target,
    name: str,
    seconds: float,
    threads: int,
    only: Collection[str] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[Target, tuple[str, ...]]:
    """Return a target that is `base` with what was measured in about `seconds`, and notes on what was not.

    only: kinds of tables; the rest of `base` then stays as it is. What cannot be measured is kept: ops, opset, types,
    memory, and the multiples of channels where `base` says them.
    """
    bench = Bench(threads, time.perf_counter() + seconds, tell)
    node_us, session_us = bench.overheads()
    chosen = [series for series in benchmarks.all_series() if not only or series.kind in only]
    tables: dict[str, dict[str, list[dict[str, Any]]]] = {}
    left = sum(len(series.probes()) for series in chosen)
    for series in chosen:
        count = len(series.probes())
        grid = bench.grid(series, count / left)
        left -= count
        if grid is not None:
            tables.setdefault(series.kind, {}).setdefault(series.dtype, []).append(grid)
    data = base.model_dump(mode="json", by_alias=True, exclude_unset=True)
    data |= {"name": name, "description": described(threads)}
    data["tables"] = dict(sorted({**data.get("tables", {}), **tables}.items()))
    if not only:
        data |= {"node_overhead_us": rounded(node_us), "session_overhead_us": rounded(session_us)}
        data["layout"] = bench.layout()
        data["fused"] = [op for op in base.fused if op.endswith("QuantizeLinear")] + bench.fused()
        if not base.staircase:
            data["align"] = {dtype: bench.staircase(dtype, 0.0) for dtype in ("float32", "int8")}
        _fill_rates(data, Tables.model_validate(tables))
    return Target.model_validate(data), tuple(bench.notes)


def described(threads: int) -> str:
    """Return on what a measurement was made."""
    count = "one thread" if threads == 1 else f"{threads or 'all'} threads"
    return f"{_processor()}, {count}, ONNX Runtime {version('onnxruntime')} (measured)"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _fill_rates(data: dict[str, Any], tables: Tables) -> None:
    """Derive what holds for whatever has no table: rates at typical sizes, and bandwidths from products of one row."""
    rates = data["rates"]
    for kind, (table, kernel, sizes) in _TYPICAL.items():
        for dtype in ("float32", "int8"):
            rate = tables.rate(table, dtype, sizes, kernel=kernel)
            if rate is not None and (kind != "ragged" or rates.get("ragged")):
                rates[kind] = {**rates[kind], dtype: rounded(rate / 1e9)}
    for dtype in ("float32", "int8"):
        each = [tables.rate("ops", dtype, {"elements": 65536}, op=op) for op in ("Add", "Mul")]
        known = [rate for rate in each if rate is not None]
        if known:
            rates["elementwise"] = {**rates["elementwise"], dtype: rounded(math.prod(known) ** (1 / len(known)) / 1e9)}
    large, small = (tables.rate("gemm", "float32", {"rows": 1, "inputs": n, "outputs": n}) for n in (4096, 1024))
    if large is not None and small is not None:
        cached = 4 * small / 1e9  # of what comes round and is too large, nothing is cached
        data["bandwidth_gb_s"] = rounded(min(4 * large / 1e9, cached))
        data["cache"] = {"mib": (data.get("cache") or {}).get("mib", 8.0), "bandwidth_gb_s": rounded(cached)}


def text_of(target: Target, seconds: float) -> str:
    """Return a target as a YAML file's text; equal targets give equal text."""
    data = target.model_dump(mode="json", by_alias=True, exclude_unset=True)
    head = (
        f"# Made by `ccompile target measure --time {seconds:g}s`: {target.description}.\n"
        "# `tables` are measured, 1e9 multiply-accumulates, taps or elements a second, each the mean of the faster\n"
        "# half of runs in turns; `rates` are theirs at typical sizes, estimates for all that has no table.\n"
    )
    return head + yaml.safe_dump(_plain(data), sort_keys=False, default_flow_style=None, width=118, allow_unicode=True)


def _plain(value: Any) -> Any:
    """Return data with whole numbers as integers."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
