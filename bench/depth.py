"""How the time and memory of prune-channels grow with the depth of a network.

    python bench/depth.py [--depths 10 20 40 80] [--channels 32] [--size 16] [--samples 64] [--repeat 3]

Each network is a stem, then `depth` residual blocks relu(x + conv(relu(conv(x)))) of 3x3 convolutions with seeded
weights, pooling and a dense layer. Each compile (keep 0.75 of the channels inside every block, refit of all layers) is
a process of its own, in turns over the depths; medians. Prints, per depth, the seconds of each phase, as the compile's
own progress tells them: the statistics sweep, the curves, the refit, and all; all over that of the first depth per
block; and peak memory above the imports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

COMPILE = """
import json, re, sys, time
from pathlib import Path
import onnxruntime, scipy.linalg
from ccompile import pipeline
from ccompile.request import Request
from ccompile.spec import parse
spec = parse(sys.argv[2])
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024
base, phases, now = peak(), {}, ["", time.perf_counter()]
def progress(text, done, total):
    start, (before, since) = time.perf_counter(), now
    phases[before] = phases.get(before, 0.0) + start - since
    now[:] = (text.partition(": ")[2] or text).split(" ")[0], start
evidence = pipeline.compile_model(Request(Path(sys.argv[1]), spec, Path(sys.argv[3]), threads=1), progress)
assert evidence.verdict == "ok", evidence.reason
found = [phases[name] for name in ("statistics", "curve", "refit")]
print(json.dumps([*found, evidence.timing["total"], peak() - base]))
"""
SPEC = """
version: 1
data:
  calibration: {synthetic: {}, samples: %d, batch: 16}
  verification: {synthetic: {}, samples: 4}
passes: [prune-channels: {keep: 0.75, coupled: false, tolerance: {relative_l2: 1.0e+9}}]
"""


def chain(depth: int, channels: int, size: int) -> onnx.ModelProto:
    """Return the network with `depth` residual blocks."""
    rng = np.random.default_rng(depth)
    nodes, weights = [], []

    def weight(name: str, *shape: int, scale: float = 1.0) -> str:
        spread = scale * np.sqrt(2 / np.prod(shape[1:]))
        weights.append(numpy_helper.from_array((spread * rng.standard_normal(shape)).astype(np.float32), name))
        return name

    def node(op: str, *inputs: str, name: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [f"{name}_out"], name, **attributes))
        return f"{name}_out"

    def conv(x: str, name: str, read: int, scale: float = 1.0) -> str:
        bias = numpy_helper.from_array(np.zeros(channels, np.float32), f"{name}.b")
        weights.append(bias)
        return node(
            "Conv", x, weight(f"{name}.w", channels, read, 3, 3, scale=scale), bias.name, name=name, pads=[1] * 4
        )

    x = conv("x", "stem", 3)
    for index in range(depth):
        y = node("Relu", conv(x, f"a{index}", channels), name=f"relu_a{index}")
        x = node("Add", x, conv(y, f"b{index}", channels, scale=0.3), name=f"add{index}")
        x = node("Relu", x, name=f"relu{index}")
    x = node("Flatten", node("GlobalAveragePool", x, name="pool"), name="flat")
    out = node("Gemm", x, weight("fc.w", 10, channels), name="fc", transB=1)
    ends = [
        helper.make_tensor_value_info("x", 1, ["N", 3, size, size]),
        helper.make_tensor_value_info(out, 1, ["N", 10]),
    ]
    made = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def compiled(depth: int, given: argparse.Namespace, folder: Path) -> list[float]:
    path = folder / f"chain{depth}.onnx"
    if not path.exists():
        onnx.save(chain(depth, given.channels, given.size), path)
    arguments = [sys.executable, "-c", COMPILE, str(path), SPEC % given.samples, str(folder / "out.onnx")]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    return [float(value) for value in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 20, 40, 80])
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [[compiled(depth, given, Path(folder)) for depth in given.depths] for _ in range(given.repeat)]
    found = [[statistics.median(values) for values in zip(*turn, strict=True)] for turn in zip(*runs, strict=True)]
    print("| blocks | statistics s | curves s | refit s | all s | all per block, to the first | peak MB |")
    print("|---|---|---|---|---|---|---|")
    for depth, (*seconds, peak) in zip(given.depths, found, strict=True):
        ratio = seconds[-1] / depth / (found[0][3] / given.depths[0])
        cells = " | ".join(f"{value:.1f}" for value in seconds)
        print(f"| {depth} | {cells} | {ratio:.2f} | {peak / 1e6:.0f} |")


if __name__ == "__main__":
    main()
