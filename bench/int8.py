"""quantize-activations beside onnxruntime.quantization's static QDQ, on the same calibration data, in one run.

    python bench/int8.py MODEL.onnx --calibration calib.npz --verification test.npz [--labels label] [--samples N]
        [--calibration-samples N] [--batch N] [--target NAME] [--options '{ranges: mse}'] [--seconds S] [-o table.md]
        [--before '[{prune-channels: {keep: {macs: 0.85}, align: 16}}]']

Prints a Markdown table: source, ours, onnxruntime's with a scale per channel and with one per tensor (uint8
activations, int8 weights); top-1 in percent, or without labels the share of samples that keep the source's class, of
the models as they are deployed; and how many times faster than the source one sample runs: all in turns on one thread,
quartiles of the ratios. A form that cannot be made or loaded has its reason. Steps of `--before` stand between
fold-batchnorm and quantize-activations in ours.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import yaml

from ccompile import pipeline
from ccompile.errors import CcompileError
from ccompile.request import Request
from ccompile.spec import parse

CLEAN = ("tidy-graph", "fold-batchnorm")
FREE = {"relative_l2": 1e9}  # a benchmark has no contract to break


def ours(given: argparse.Namespace, folder: Path) -> Path:
    """Compile the model with quantize-activations. Raises CcompileError."""
    out = folder / "ours.onnx"
    steps = [*CLEAN, *yaml.safe_load(given.before), {"quantize-activations": yaml.safe_load(given.options)}]
    spec = {
        "version": 1,
        "target": given.target,
        "data": {
            "calibration": {"npz": given.calibration, "samples": given.calibration_samples, "batch": given.batch},
            "verification": {"npz": given.verification, "samples": 32, "batch": given.batch},
        },
        "gates": FREE,
        "passes": steps,
    }
    text = yaml.safe_dump(spec, sort_keys=False)
    evidence = pipeline.compile_model(Request(Path(given.model), parse(text, "int8.yaml", Path()), out, threads=1))
    if evidence.verdict != "ok":
        raise CcompileError(evidence.reason)
    return out


def theirs(given: argparse.Namespace, folder: Path, per_channel: bool) -> Path:
    """Quantise the model with onnxruntime.quantization, after its own pre-processing."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = feeds(given.model, given.calibration, given.calibration_samples, given.batch)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    clean, out = folder / "clean.onnx", folder / f"theirs{per_channel}.onnx"
    quant_pre_process(given.model, clean, skip_symbolic_shape=True)
    options = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": per_channel}
    quantize_static(clean, out, Reader(), quant_format=QuantFormat.QDQ, **options)
    return out


def feeds(model: str, npz: str, samples: int, batch: int) -> Iterator[dict[str, Any]]:
    """Yield the model's inputs from an npz, batch by batch."""
    proto = onnx.load(model, load_external_data=False)
    stored = {tensor.name for tensor in proto.graph.initializer}
    with np.load(npz) as arrays:
        given = {value.name: arrays[value.name] for value in proto.graph.input if value.name not in stored}
    count = min(samples, *(len(array) for array in given.values()))
    for at in range(0, count, batch):
        yield {name: array[at : min(at + batch, count)] for name, array in given.items()}


def session(path: Path | str) -> Any:
    """Load a model as it is deployed, on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def classes(path: Path | str, given: argparse.Namespace) -> Any:
    """Return the class of every verification sample (and position)."""
    made = session(path)
    batches = feeds(given.model, given.verification, given.samples, given.batch)
    return np.concatenate([made.run(None, batch)[0].argmax(-1) for batch in batches])


def race(paths: list[Path | str], given: argparse.Namespace) -> list[tuple[float, float, float]]:
    """Run all models in turns on one sample; return the quartiles of first over each, by thread time."""
    one = next(feeds(given.model, given.verification, 1, 1))
    made = [session(path) for path in paths]
    times: list[list[float]] = []
    order, rng = np.arange(len(made)), np.random.default_rng(0)  # each behind each other: some leave more in the caches
    stop = time.perf_counter() + given.seconds
    while len(times) < 10 or time.perf_counter() < stop:
        row, last = [0.0] * len(made), order[-1]
        order = rng.permutation(len(made))
        if order[0] == last:  # whoever runs behind itself finds its caches warm
            order = order[::-1]
        for index in order:
            start = time.thread_time()
            made[index].run(None, one)
            row[index] = time.thread_time() - start
        times.append(row)
    ratios = np.array(times[2:])
    quartiles = np.quantile(ratios[:, :1] / ratios, [0.25, 0.5, 0.75], axis=0).T
    return [(float(low), float(middle), float(high)) for low, middle, high in quartiles]


def table(given: argparse.Namespace, folder: Path) -> str:
    """Make all forms, measure them, and return the table."""
    forms: dict[str, Path | str] = {"source": given.model}
    reasons = []
    makers = {
        "quantize-activations": lambda: ours(given, folder),
        "onnxruntime, per channel": lambda: theirs(given, folder, per_channel=True),
        "onnxruntime, per tensor": lambda: theirs(given, folder, per_channel=False),
    }
    for name, make in makers.items():
        try:
            forms[name] = make()
            session(forms[name])
        except Exception as error:  # noqa: BLE001  (whatever another tool raises is its result here)
            forms.pop(name, None)
            reasons.append(f"- no {name}: {' '.join(str(error).split())[:200]}")
    reference = classes(given.model, given)
    if given.labels:
        with np.load(given.verification) as arrays:
            reference = arrays[given.labels][: len(reference)]
    speeds = race(list(forms.values()), given)
    head = f"{Path(given.model).name}: {'top-1' if given.labels else 'same class'} %, times faster than the source\n"
    rows = [head, "| form | quality | speed | quartiles |", "|---|---|---|---|"]
    for (name, path), (low, middle, high) in zip(forms.items(), speeds, strict=True):
        quality = 100 * float(np.mean(classes(path, given) == reference))
        rows.append(f"| {name} | {quality:.2f} | {middle:.2f} | {low:.2f}-{high:.2f} |")
    return "\n".join([*rows, *reasons]) + "\n"


def main() -> None:
    """Read the arguments, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--verification", required=True)
    parser.add_argument("--labels", default="")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--calibration-samples", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--target", default="x86-64-avx512-vnni")
    parser.add_argument("--options", default="{}")
    parser.add_argument("--before", default="[]")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("-o", "--output", default="")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = table(given, Path(folder))
    print(text, end="")
    if given.output:
        Path(given.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
