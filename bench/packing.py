"""What packing makes of sparse, clustered weights, and how fast they decode.

    python bench/packing.py [--weights 266200] [--repeat 5] [MODEL.onnx ...]

Synthetic: normal weights in a matrix of 784 columns, the smallest pruned, the others clustered, stored as ONNX UINT4
indices with a codebook. Prints, per setting: the order-0 entropy in bits per weight; the bits that Huffman codes (of
packed bytes, as zlib's Huffman-only strategy makes them), zstandard, LZMA and `ccompile pack` (everything included)
take; how many times smaller than float32 the packed file is; and MB/s of float32 weights decoded, the best of all
repeats, with the checksums, on one core. Models named are packed and decoded as they are.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ccompile import coders, container, packing
from ccompile.numerics.huffman import entropy

COLUMNS = 784
SETTINGS = [(3, 0.92), (4, 0.92), (4, 0.9), (3, 0.8), (4, 0.5), (2, 0.0), (3, 0.0), (4, 0.0)]


def clusters(count: int, bits: int, zeros: float) -> np.ndarray:
    """Return indices of normal weights; 0 stands for the share `zeros` of least magnitude."""
    weights = np.random.default_rng(0).standard_normal(count)
    kept = np.abs(weights) >= np.quantile(np.abs(weights), zeros)
    levels = np.linspace(-3, 3, (1 << bits) - (zeros > 0))
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, weights)
    return np.where(kept, nearest + (zeros > 0), 0).astype(np.uint8)


def clustered(indices: np.ndarray, bits: int) -> onnx.ModelProto:
    shape = [indices.size // COLUMNS, COLUMNS]
    packed = (indices[::2] | indices[1::2] << 4).astype(np.uint8).tobytes()
    stored = [
        helper.make_tensor("indices", TensorProto.UINT4, shape, packed, raw=True),
        numpy_helper.from_array(np.linspace(-1, 1, 1 << bits).astype(np.float32), "codebook"),
    ]
    nodes = [
        helper.make_node("Cast", ["indices"], ["wide"], "cast", to=TensorProto.INT32),
        helper.make_node("Gather", ["codebook", "wide"], ["w"], "gather"),
        helper.make_node("Gemm", ["x", "w"], ["y"], "fc", transB=1),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", None]) for name in "xy"]
    main = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    return helper.make_model(main, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def packed(model: Path, repeat: int) -> tuple[int, float, float]:
    """Return the packed bytes, the ratio to float32 weights, and the MB/s of float32 weights decoded."""
    target = model.with_suffix(".ccz")
    account = packing.pack(model, target)
    content, seconds = target.read_bytes(), []
    for _ in range(repeat):
        start = time.perf_counter()
        file = io.BytesIO(content)
        for _piece in container.pieces(file, container.read_index(file, str(target)), str(target)):
            pass
        seconds.append(time.perf_counter() - start)
    return account.bytes_packed, account.ratio, 4e-6 * account.weights / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--weights", type=int, default=266_200)
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    count = given.weights - given.weights % (2 * COLUMNS)
    print("| weights | entropy | huffman | zstd | lzma | packed | ratio | decode MB/s |\n" + "|---" * 8 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for bits, zeros in SETTINGS:
            indices = clusters(count, bits, zeros)
            model = Path(folder) / "m.onnx"
            model.write_bytes(clustered(indices, bits).SerializeToString())
            data = (indices[::2] | indices[1::2] << 4).astype(np.uint8).tobytes()
            names = (coders.HUFFMAN, coders.ZSTD, coders.FIRST_LZMA + 1)
            sizes = [len(coders.encode(data, coder)) for coder in names]
            size, ratio, rate = packed(model, given.repeat)
            cells = [entropy(np.bincount(indices)), *(8 * found / count for found in (*sizes, size))]
            shown = " | ".join(f"{cell:.3f}" for cell in cells)
            print(f"| {count}, {bits} bits, {zeros:.0%} zeros | {shown} | {ratio:.2f} | {rate:.0f} |")
        for path in given.models:
            model = Path(folder) / path.name
            model.write_bytes(path.read_bytes())
            size, ratio, rate = packed(model, given.repeat)
            share = f"{size / path.stat().st_size:.3f} of the file"
            print(f"| {path.name} | - | - | - | - | {share} | {ratio:.2f} | {rate:.0f} |")


if __name__ == "__main__":
    main()
