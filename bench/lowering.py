"""What exact lowerings win on models built here with random weights: times faster than the source, and the error.

    python bench/lowering.py [NAME ...] [--select measured] [--passes lower-winograd,lower-fft] [--seconds S] [-o FILE]

Names: vgg16, resnet18, replk-56, replk-28 (1x1, depthwise 31x31, 1x1, residual), dense-11, dense-15 (64 channels, 28
px), dense-11-wide, dense-15-wide (128 channels), line-1024, line-8192 (depthwise, one axis, 64 x 8192),
circulant-4096; by default all. Each is compiled with the passes and `select`, on one thread, and then raced against its
source: both in turns (A B A B), CPU time of the thread, ratio of the 25th percentiles and quartiles of the ratios of
turns. Prints a Markdown table, then what was put where.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from ccompile import pipeline
from ccompile.request import Request
from ccompile.spec import parse

Shape = tuple[int, ...]


class Net:
    """Adds nodes one after the other to a model of one input; every method returns the name of what it makes."""

    def __init__(self, shape: Shape) -> None:
        self.draw = np.random.default_rng(0)
        self.shape, self.nodes, self.weights = shape, [], []

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [out], f"{op.lower()}{len(self.nodes)}", **attributes))
        return out

    def weight(self, array: Any) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))
        return name

    def conv(self, x: str, o: int, i: int, kernel: Shape, stride: int = 1, groups: int = 1, gain: float = 1.0) -> str:
        fan = i // groups * math.prod(kernel)
        drawn = self.draw.standard_normal((o, i // groups, *kernel)) * gain / math.sqrt(fan)
        pads = [(k - 1) // 2 for k in kernel] + [k // 2 for k in kernel]
        w, b = self.weight(drawn), self.weight(0.1 * self.draw.standard_normal(o))
        return self.node("Conv", x, w, b, strides=[stride] * len(kernel), pads=pads, group=groups)

    def relu(self, x: str) -> str:
        return self.node("Relu", x)

    def model(self, out: str) -> onnx.ModelProto:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)
        y = helper.make_tensor_value_info(out, TensorProto.FLOAT, None)
        made = helper.make_graph(self.nodes, "net", [x], [y], self.weights)
        bare = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        return onnx.shape_inference.infer_shapes(bare)


def vgg16() -> onnx.ModelProto:
    """The convolutions of configuration D (Simonyan and Zisserman 2014, arXiv:1409.1556) at 224 x 224."""
    net, x, i = Net((1, 3, 224, 224)), "x", 3
    for o, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            x, i = net.relu(net.conv(x, o, i, (3, 3), gain=math.sqrt(2))), o
        x = net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    return net.model(x)


def resnet18() -> onnx.ModelProto:
    """He et al. 2015, arXiv:1512.03385, with batch normalisation folded in."""
    net, i = Net((1, 3, 224, 224)), 64
    x = net.relu(net.conv("x", 64, 3, (7, 7), 2))
    x = net.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    for o in (64, 128, 256, 512):
        for block in range(2):
            stride = 2 if o > 64 and block == 0 else 1
            y = net.conv(net.relu(net.conv(x, o, i, (3, 3), stride, gain=1.3)), o, o, (3, 3), gain=0.7)
            short = net.conv(x, o, i, (1, 1), stride, gain=0.7) if o != i else x
            x, i = net.relu(net.node("Add", y, short)), o
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    return net.model(net.node("MatMul", x, net.weight(net.draw.standard_normal((512, 1000)) / 20)))


def replk(channels: int, size: int) -> onnx.ModelProto:
    """One block of RepLKNet (Ding et al. 2022, arXiv:2203.06717), kernels merged."""
    net = Net((1, channels, size, size))
    y = net.relu(net.conv("x", channels, channels, (1, 1)))
    y = net.relu(net.conv(y, channels, channels, (31, 31), groups=channels))
    return net.model(net.node("Add", net.conv(y, channels, channels, (1, 1)), "x"))


def dense(kernel: int, channels: int) -> onnx.ModelProto:
    net = Net((1, channels, 28, 28))
    return net.model(net.conv("x", channels, channels, (kernel, kernel)))


def line(taps: int) -> onnx.ModelProto:
    net = Net((1, 64, 8192))
    return net.model(net.conv("x", 64, 64, (taps,), groups=64))


def circulant(n: int) -> onnx.ModelProto:
    net = Net((1, n))
    column = net.draw.standard_normal(n) / math.sqrt(n)
    return net.model(net.node("MatMul", "x", net.weight(np.stack([np.roll(column, j) for j in range(n)]))))


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "vgg16": vgg16,
    "resnet18": resnet18,
    "replk-56": lambda: replk(128, 56),
    "replk-28": lambda: replk(256, 28),
    "dense-11": lambda: dense(11, 64),
    "dense-15": lambda: dense(15, 64),
    "dense-11-wide": lambda: dense(11, 128),
    "dense-15-wide": lambda: dense(15, 128),
    "line-1024": lambda: line(1024),
    "line-8192": lambda: line(8192),
    "circulant-4096": lambda: circulant(4096),
}


@dataclass(frozen=True)
class Result:
    """Of one model: seconds of the source, how many times faster with quartiles, relative L2, what was put where."""

    seconds: float
    speed: float
    quartiles: tuple[float, float]
    error: float
    sites: list[str]

    def row(self, name: str) -> str:
        low, high = self.quartiles
        return f"| {name} | {1e3 * self.seconds:.3f} | {self.speed:.2f} | {low:.2f}-{high:.2f} | {self.error:.1e} |"


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measured(name: str, given: argparse.Namespace, folder: Path) -> Result:
    """Build a model, compile it, and race both."""
    source, out = folder / f"{name}.onnx", folder / f"{name}.out.onnx"
    onnx.save(MODELS[name](), source)
    steps = [{step: {"select": given.select}} for step in given.passes.split(",")]
    spec = {"version": 1, "target": given.target, "passes": steps}
    evidence = pipeline.compile_model(Request(source, parse(json.dumps(spec), name), out, threads=1))
    if evidence.verdict != "ok":
        raise SystemExit(f"{name}: {evidence.reason}")
    sites = [f"{site.nodes[0]}: {site.note}" for step in evidence.steps for site in step.applied]
    runs = [session(source), session(out)]
    feeds = {"x": np.random.default_rng(1).standard_normal(runs[0].get_inputs()[0].shape).astype(np.float32)}
    wanted, found = (run.run(None, feeds)[0].astype(np.float64) for run in runs)
    times = race(runs, feeds, given.seconds)
    first, ratios = np.quantile(times, 0.25, axis=0), times[:, 0] / times[:, 1]
    low, high = np.quantile(ratios, [0.25, 0.75])
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    return Result(float(first[0]), float(first[0] / first[1]), (float(low), float(high)), error, sites)


def race(runs: list[ort.InferenceSession], feeds: dict[str, Any], seconds: float) -> Any:
    """Return the CPU seconds of every run in every turn, [turns, runs]; a turn of a run takes about 5 ms or more."""
    counts = []
    for run in runs:
        run.run(None, feeds)
        start = time.thread_time()
        run.run(None, feeds)
        counts.append(max(1, round(0.005 / max(time.thread_time() - start, 1e-6))))
    times: list[list[float]] = []
    stop = time.perf_counter() + seconds
    while len(times) < 9 or time.perf_counter() < stop:
        row = []
        for run, count in zip(runs, counts, strict=True):
            start = time.thread_time()
            for _ in range(count):
                run.run(None, feeds)
            row.append((time.thread_time() - start) / count)
        times.append(row)
    return np.array(times)


def main() -> None:
    """Read the arguments, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*MODELS, []])
    parser.add_argument("--select", default="measured")
    parser.add_argument("--passes", default="lower-winograd,lower-fft")
    parser.add_argument("--target", default="x86-64-avx512-vnni")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("-o", "--output", default="")
    given = parser.parse_args()
    rows = ["| model | source ms | speed | quartiles | relative L2 |", "|---|---|---|---|---|"]
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.names or MODELS:
            found = measured(name, given, Path(folder))
            rows.append(found.row(name))
            notes += [f"- {name} {site}" for site in found.sites] or [f"- {name}: left alone"]
            print(rows[-1], flush=True)
    text = "\n".join([*rows, "", *notes]) + "\n"
    print(text, end="")
    if given.output:
        Path(given.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
