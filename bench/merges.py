"""How much faster merge-linear makes linear layers that follow each other: measured beside the source.

    python bench/merges.py [--channels 64] [--size 56] [--rounds 60] [--passes merge-linear]

Each model (batch 1, seeded weights) is compiled with the passes; then both run in turns, A B A B, with one thread, and
the 25th percentile of the thread's CPU time counts. Prints the ratio source / compiled and the relative L2 between the
outputs, as a table.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from ccompile import pipeline, spec
from ccompile.request import Request

SPEC = """
version: 1
data: {verification: {synthetic: {}, samples: 2}}
passes: [%s]
"""
Layers = list[tuple[str, dict[str, object], tuple[int, ...]]]


def chain(layers: Layers, shape: tuple[int, ...]) -> onnx.ModelProto:
    """Return layers (op, attributes, shape of the weight or none) one behind the other."""
    rng, nodes, weights, at = np.random.default_rng(0), [], [], "x"
    for index, (op, attributes, weight) in enumerate(layers):
        operands = [at]
        if weight:
            spread = np.sqrt(2 / np.prod(weight[1:]))
            for name, array in (("w", spread * rng.standard_normal(weight)), ("b", rng.standard_normal(weight[0]))):
                operands.append(f"{name}{index}")
                weights.append(numpy_helper.from_array(array.astype(np.float32), operands[-1]))
        at = f"y{index}"
        nodes.append(helper.make_node(op, operands, [at], f"layer{index}", **attributes))
    ends = [helper.make_tensor_value_info(name, 1, list(dims)) for name, dims in (("x", shape), (at, "NCHW"))]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def models(c: int) -> dict[str, Layers]:
    """Return the pairs of layers, on `c` channels."""
    pool: tuple[str, dict[str, object], tuple[int, ...]] = (
        "AveragePool", {"kernel_shape": [2, 2], "strides": [2, 2]}, ()
    )  # fmt: skip
    return {
        "conv3x3 + AveragePool2": [("Conv", {"pads": [1] * 4}, (c, c, 3, 3)), pool],
        "conv1x1 + AveragePool2": [("Conv", {}, (c, c, 1, 1)), pool],
        "conv1x1 + conv1x1": [("Conv", {}, (c, c, 1, 1))] * 2,
    }


def interleaved(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """Return the 25th percentile of each run's CPU seconds, run in turns."""
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 3):
        for run, found in zip(runs, seconds, strict=True):
            start = time.thread_time()
            run()
            if turn >= 3:
                found.append(time.thread_time() - start)
    return [float(np.percentile(found, 25)) for found in seconds]


def session(path: Path) -> ort.InferenceSession:
    """Return a session of one thread, as deployed."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])


def row(name: str, layers: Layers, given: argparse.Namespace, folder: Path) -> str:
    """Compile one model and return its line of the table."""
    source, compiled = folder / "source.onnx", folder / "compiled.onnx"
    shape = (1, given.channels, given.size, given.size)
    onnx.save(chain(layers, shape), source)
    evidence = pipeline.compile_model(Request(source, spec.parse(SPEC % given.passes), compiled, threads=1))
    assert evidence.verdict == "ok", evidence.reason
    x = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    both = [session(source), session(compiled)]
    a, b = (np.asarray(one.run(None, x)[0], np.float64) for one in both)
    before, after = interleaved([lambda one=one: one.run(None, x) for one in both], given.rounds)  # type: ignore[misc]
    error = float(np.linalg.norm(a - b) / np.linalg.norm(a))
    return f"| {name} | {before * 1e6:.0f} | {after * 1e6:.0f} | {before / after:.2f}x | {error:.1e} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--size", type=int, default=56)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--passes", default="merge-linear")
    given = parser.parse_args()
    print("| layers | source us | compiled us | ratio | relative L2 |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, layers in models(given.channels).items():
            print(row(name, layers, given, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
