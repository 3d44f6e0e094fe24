"""The recipes of specs/ compile the example beside its data, as their first lines say."""

import shutil
from pathlib import Path

import pytest
from runs import spawn

ROOT = Path(__file__).parents[1]


@pytest.fixture
def example(tmp_path: Path) -> Path:
    for path in (ROOT / "examples" / "01_digits").glob("*.*"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_deep_compression_packs_the_digits_twenty_times_smaller(example: Path) -> None:
    recipe = shutil.copy(ROOT / "specs" / "deep-compression.yaml", example)
    model, small, packed = example / "digits.onnx", example / "small.onnx", example / "small.ccz"
    quick = ["--set", "passes.prune-weights.sensitivity=false"]
    labels = ["--set", "data.verification.labels=label", "--set", "gates.metric.top1.drop=0.02"]
    assert spawn(model, "-s", recipe, "-o", small, *quick, *labels, cwd=example).code == 0
    assert spawn("pack", small, "-o", packed, "--against", model, cwd=example).code == 0
    assert packed.stat().st_size * 20 < model.stat().st_size


def test_exact_lowerings_keep_the_digits(example: Path) -> None:
    recipe = shutil.copy(ROOT / "specs" / "faster.yaml", example)
    verification = ["--set", "data.verification.npz=verification.npz", "--set", "gates.argmax=1.0"]
    ended = spawn(example / "digits.onnx", "-s", recipe, "-o", example / "fast.onnx", *verification, cwd=example)
    assert ended.code == 0
    assert "lower-winograd" in ended.out
