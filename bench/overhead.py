"""What a compile costs beyond one onnx.load and one inference session of the same model.

    python bench/overhead.py MODEL.onnx [MODEL.onnx ...] [--stored]

Each measurement is a process of its own, in turns (baseline, compile, baseline, ...), medians of three. `--stored`
first writes the model with its generated weights (ConstantOfShape, as in the light_* models) stored as seeded random
numbers. Prints, per model: weight bytes W; seconds of onnx.load + session; seconds of the compile, and of it the
verification runs; (compile - verification) / baseline; peak memory above the imports, as multiples of W.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BASELINE = """
import json, re, sys, time
import onnx, onnxruntime
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024
base = peak()
start = time.perf_counter()
model = onnx.load(sys.argv[1])
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
seconds = time.perf_counter() - start
print(json.dumps([seconds, 0.0, peak() - base]))
"""
COMPILE = """
import json, re, sys, time
from pathlib import Path
from ccompile import onnx_io, pipeline
from ccompile.request import Request
from ccompile.spec import parse
import onnxruntime
spec = parse(sys.argv[2])
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024
base = peak()
evidence = pipeline.compile_model(Request(Path(sys.argv[1]), spec, Path(sys.argv[3])))
assert evidence.verdict == "ok", evidence.reason
timing = evidence.timing
print(json.dumps([timing["total"], timing["verification"], peak() - base]))
"""
SPEC = "version: 1\ndata: {verification: {synthetic: {}, samples: 1}}\npasses: [tidy-graph, fold-batchnorm]\n"


def run(code: str, *arguments: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    return [float(value) for value in json.loads(done.stdout.splitlines()[-1])]


def stored(path: Path, folder: Path) -> Path:
    """Write the model with every large ConstantOfShape output stored as seeded random weights."""
    import numpy as np

    from ccompile import graph, onnx_io

    model = onnx_io.load(path).model
    rng = np.random.default_rng(0)
    for node in list(model.graph):
        array = graph.constant(node.outputs[0]) if node.op_type == "ConstantOfShape" else None
        if array is None:
            continue
        weights = (array.flat[0] * (1 + 0.01 * rng.standard_normal(array.shape))).astype(array.dtype)
        node.outputs[0].replace_all_uses_with(graph.add_constant(model.graph, f"{node.name}_w", weights))
    graph.remove_dead(model.graph)
    out = folder / f"stored_{path.name}"
    onnx_io.save(model, out)
    return out


def weight_bytes(path: Path) -> int:
    from ccompile import cost, onnx_io
    from ccompile.analysis.shapes import infer
    from ccompile.target import load_target

    model = onnx_io.load(path).model
    types = infer(model, cost.example_shapes(model))
    return cost.price(model, types, load_target("generic-cpu", Path())).report.resident_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--shipped", action="store_true", help="ResNet-50 and VGG-19 of the onnx package")
    parser.add_argument("--stored", action="store_true")
    arguments = parser.parse_args()
    if arguments.shipped:
        import onnx

        light = Path(onnx.__file__).parent / "backend/test/data/light"
        arguments.models += [light / "light_resnet50.onnx", light / "light_vgg19.onnx"]
    print("| model | W MB | load + session s | compile s | verifying s | ratio beyond | baseline peak | compile peak |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for given in arguments.models:
            path = stored(given, Path(folder)) if arguments.stored else given
            out = str(Path(folder) / "out.onnx")
            pairs = [(run(BASELINE, str(path)), run(COMPILE, str(path), SPEC, out)) for _ in range(3)]
            base, mine = (
                [statistics.median(column) for column in zip(*side, strict=True)] for side in zip(*pairs, strict=True)
            )
            weights = weight_bytes(path)
            beyond = (mine[0] - mine[1]) / base[0]
            print(
                f"| {path.stem} | {weights / 1e6:.1f} | {base[0]:.2f} | {mine[0]:.2f} | {mine[1]:.2f} | {beyond:.2f}x "
                f"| {base[2] / weights:.2f} W | {mine[2] / weights:.2f} W |"
            )


if __name__ == "__main__":
    main()
