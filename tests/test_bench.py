"""The benchmark scripts that compile run on the shipped example."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT


def curves(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "curves.py"), str(folder / "digits.onnx")]
    command += ["--calibration", str(folder / "calibration.npz"), "--verification", str(folder / "verification.npz")]
    command += ["--samples", "64", "--calibration-samples", "64", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_curves_compare_two_techniques_at_two_shares(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    techniques = "prune-channels:inner:l1,prune-channels:inner:l1:refit"
    done = curves(digits, "--labels", "label", "--shares", "0.9,0.6", "--techniques", techniques, "-o", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout == out.read_text(encoding="utf-8")
    lines = done.stdout.splitlines()
    assert lines[0] == "digits.onnx: top-1 %, source 100.00"
    assert lines[2] == "| share of macs | prune-channels:inner:l1 | prune-channels:inner:l1:refit |"
    table = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines[4:6]}
    assert sorted(table) == ["0.6", "0.9"]
    bare, refitted = (float(cell.split(" ")[0]) for cell in table["0.6"])
    assert 50 < bare <= refitted <= 100
    assert "criterion: l1, refit: none" in done.stdout
    assert "criterion: l1, refit: all" in done.stdout


def test_curves_tell_a_point_that_cannot_be_made(digits: Path) -> None:
    step = "tiny={prune-channels: {keep: {macs: @}, only: [/head/hidden], tolerance: {relative_l2: 1.0e+9}}}"
    done = curves(digits, "--shares", "0.01", "--step", step)
    assert done.returncode == 0, done.stderr
    assert "same class %, source 100.00" in done.stdout
    assert "| 0.01 | - |" in done.stdout
    assert "- no tiny at 0.01: " in done.stdout


@pytest.mark.parametrize("word", ["inn", "alignx"])
def test_curves_refuse_an_unknown_word(digits: Path, word: str) -> None:
    done = curves(digits, "--techniques", f"prune-channels:{word}")
    assert done.returncode == 1
    assert f"prune-channels:{word}: there is no word `{word}`" in done.stderr


def test_packing_tells_sizes_and_rates(digits: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "packing.py"), str(digits / "digits.onnx")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--weights", "8000", "--repeat", "1"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert (len(rows), {len(row) for row in rows}) == (9, {len(head)})
    for row in rows[:-1]:
        entropy, *coded, packed = map(float, row[1:6])
        assert 0 < entropy < packed
        assert packed < min(coded) + 0.8  # the graph and the container, on few weights
    assert rows[-1][0] == "digits.onnx"


def int8(folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "bench" / "int8.py"), str(folder / "digits.onnx")]
    command += ["--calibration", str(folder / "calibration.npz"), "--verification", str(folder / "verification.npz")]
    command += ["--samples", "64", "--calibration-samples", "64", "--seconds", "0.1", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_int8_stands_beside_the_runtimes_own_quantisation(digits: Path) -> None:
    rows = [line.strip("| ").split(" | ") for line in int8(digits, "--labels", "label").splitlines()[4:]]
    assert [row[0] for row in rows] == [
        "source",
        "quantize-activations",
        "onnxruntime, per channel",
        "onnxruntime, per tensor",
    ]
    assert all(float(row[1]) >= 95 for row in rows)
    assert rows[0][2] == "1.00"


def test_int8_runs_the_steps_that_stand_before(digits: Path) -> None:
    printed = int8(digits, "--before", "[no-such-step]")
    assert "- no quantize-activations: int8.yaml" in printed
    assert "no-such-step" in printed


def test_lowering_builds_compiles_and_races() -> None:
    command = [sys.executable, str(ROOT / "bench" / "lowering.py"), "circulant-4096", "--select", "always"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--seconds", "0.1"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("| circulant-4096 |"))
    assert float(row.split(" | ")[-1].strip(" |")) < 1e-5
    assert "- circulant-4096 matmul0: circulant, 128 x 32" in done.stdout


def test_merges_tells_speed_and_error_of_each_pair_of_layers() -> None:
    command = [sys.executable, str(ROOT / "bench" / "merges.py"), "--channels", "4", "--size", "8", "--rounds", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["conv3x3 + AveragePool2", "conv1x1 + AveragePool2", "conv1x1 + conv1x1"]
    assert all(float(row[4]) < 1e-5 for row in rows)
