"""Locks: what moved is named before any work; what times decided is repeated; other bytes are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
import yaml
from runs import Ended, Run
from test_pipeline import plant

from ccompile import graph, locking, onnx_io, provenance
from ccompile.core import PassResult, Site, View
from ccompile.evidence import versions

LOCK = "out.onnx.lock.yaml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx_io.save(builders.mlp(0), tmp_path / "model.onnx")
    write_data(tmp_path, 0)
    write_spec(tmp_path, ["tidy-graph"])
    return tmp_path


def write_data(folder: Path, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((8, 12)).astype(np.float32)
    np.savez(folder / "verification.npz", x=x)


def write_spec(folder: Path, passes: list[Any], **more: Any) -> None:
    data = {"verification": {"npz": "verification.npz"}}
    (folder / "spec.yaml").write_text(yaml.safe_dump({"version": 1, "data": data, "passes": passes, **more}))


def compile_to(run: Run, folder: Path, *extra: object) -> Ended:
    return run(folder / "model.onnx", "-s", folder / "spec.yaml", "-o", folder / "out.onnx", "--threads", 1, *extra)


def locked_then(run: Run, folder: Path, *extra: object) -> Ended:
    """Return how a build held to its lock ends; the previous output must stand when it fails."""
    before = (folder / "out.onnx").read_bytes()
    ended = compile_to(run, folder, "--locked", *extra)
    assert (folder / "out.onnx").read_bytes() == before
    return ended


# ---------------------------------------------------------------------------------------------- what a lock says


def test_a_lock_says_what_went_in_what_came_out_and_what_was_chosen(folder: Path, run: Run) -> None:
    step = {"split-svd": {"rank": 2, "only": ["fc2"], "statistics": "weights", "tolerance": {"relative_l2": 99}}}
    write_spec(folder, ["tidy-graph", step])
    assert compile_to(run, folder, "--lock").code == 0
    lock = locking.read(folder / LOCK)
    assert lock.output.digest == onnx_io.load(folder / "out.onnx").digest
    assert lock.inputs.source.digest == onnx_io.load(folder / "model.onnx").digest
    assert lock.inputs.libraries.keys() == {"numpy", "scipy", "onnx", "onnx-ir", "onnxruntime"}
    assert [(choice.step, choice.verdict) for choice in lock.steps] == [
        ("01-tidy-graph", "kept"),
        ("02-split-svd", "kept"),
    ]
    assert [site for site in lock.steps[1].sites if "fc2" in site]
    assert (folder / LOCK).read_text() == lock.text()


def test_a_lock_comes_back_as_it_was(folder: Path, run: Run) -> None:
    compile_to(run, folder, "--lock")
    first = (folder / LOCK).read_text()
    compile_to(run, folder, "--lock", "--no-cache")
    assert (folder / LOCK).read_text() == first


def test_no_lock_is_written_unless_asked_for(folder: Path, run: Run) -> None:
    compile_to(run, folder)
    assert not (folder / LOCK).exists()


def test_the_lock_goes_where_it_is_told(folder: Path, run: Run) -> None:
    assert compile_to(run, folder, "--lock", "--lock-file", folder / "my.yaml").code == 0
    assert not (folder / LOCK).exists()
    assert locked_then(run, folder, "--lock-file", folder / "my.yaml").code == 0


def test_a_compile_that_fails_leaves_the_lock(folder: Path, run: Run) -> None:
    compile_to(run, folder, "--lock")
    before = (folder / LOCK).read_text()
    write_spec(folder, ["tidy-graph"], gates={"macs": 0.1})
    assert compile_to(run, folder, "--lock").code == 1
    assert (folder / LOCK).read_text() == before


# ---------------------------------------------------------------------------------------------- what moved


@pytest.mark.parametrize("cached", [True, False])
def test_a_build_that_did_not_move_gives_the_same_bytes(folder: Path, run: Run, cached: bool) -> None:
    compile_to(run, folder, "--lock")
    assert locked_then(run, folder, *([] if cached else ["--no-cache"])).code == 0


def test_everything_that_moved_is_named_at_once_before_any_work(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_to(run, folder, "--lock")
    onnx_io.save(builders.mlp(1), folder / "model.onnx")
    write_data(folder, 1)
    write_spec(folder, ["tidy-graph"], target="nvidia-t4")
    monkeypatch.setattr(provenance, "tool_digest", lambda: "f" * 64)
    monkeypatch.setattr("ccompile.runtime.Session", None)
    known = {**versions(), "onnxruntime": "0.1"}
    monkeypatch.setattr("ccompile.locking.versions", lambda: known)
    ended = locked_then(run, folder, "--seed", 5, "--threads", 2)
    assert ended.code == 1
    for what in (
        "the model has moved: model.onnx (",
        "the spec has moved: spec.yaml (",
        "the target has moved: nvidia-t4 (",
        "the verification data has moved: npz verification.npz, 8 samples (",
        "ccompile has moved: ",
        "`seed` has moved: 5, locked 0",
        "onnxruntime has moved: 0.1, locked ",
    ):
        assert what in ended.err
    assert ended.err.count("--lock` instead") == 1


def test_a_comment_in_the_spec_moves_nothing(folder: Path, run: Run) -> None:
    compile_to(run, folder, "--lock")
    (folder / "spec.yaml").write_text((folder / "spec.yaml").read_text() + "# why\n")
    assert locked_then(run, folder).code == 0


def test_other_bytes_from_the_same_inputs_are_refused(folder: Path, run: Run) -> None:
    compile_to(run, folder, "--lock")
    lock = locking.read(folder / LOCK)
    other = lock.model_copy(update={"output": lock.output.model_copy(update={"digest": "0" * 64})})
    (folder / LOCK).write_text(other.text())
    for extra in ([], ["--no-cache"]):
        ended = locked_then(run, folder, *extra)
        assert ended.code == 1
        assert "the same inputs gave other bytes: SHA-256 " in ended.err


# ---------------------------------------------------------------------------------------------- what times decide


def plant_timed(monkeypatch: pytest.MonkeyPatch, decided: list[str]) -> None:
    """Register a pass that asks for a decision, as times would make it: otherwise each time."""

    def edit(view: View) -> PassResult:
        def measured() -> str:
            decided.append("abcdef"[len(decided)])
            return decided[-1]

        name = view.decide("fc1", measured)
        graph.node_named(view.graph, "fc1").name = f"fc1_{name}"
        return PassResult((Site((f"fc1_{name}",), note=name),))

    plant(monkeypatch, edit)


@pytest.mark.parametrize("cached", [True, False])
def test_what_times_decided_is_repeated_without_measuring(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    decided: list[str] = []
    plant_timed(monkeypatch, decided)
    write_spec(folder, ["planted"])
    assert compile_to(run, folder, "--lock", "--no-cache").code == 0
    first = (folder / "out.onnx").read_bytes()
    assert locking.read(folder / LOCK).decisions == {"01-planted/fc1": "a"}
    extra = [] if cached else ["--no-cache"]
    compile_to(run, folder, *extra)
    assert (folder / "out.onnx").read_bytes() != first  # measured anew, and decided otherwise
    assert compile_to(run, folder, "--locked", *extra).code == 0
    assert (folder / "out.onnx").read_bytes() == first
    assert decided == ["a", "b"]
    compile_to(run, folder, *extra)  # what was held to a lock is not what is decided freely
    assert (folder / "out.onnx").read_bytes() != first


# ---------------------------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize("text", ["", "lock: 2", "- a", "{", "lock: 1"])
def test_what_is_no_lock_is_refused(folder: Path, run: Run, text: str) -> None:
    (folder / LOCK).write_text(text)
    ended = compile_to(run, folder, "--locked")
    assert (ended.code, "not a lock" in ended.err) == (2, True)


def test_a_lock_that_is_not_there_is_refused(folder: Path, run: Run) -> None:
    ended = compile_to(run, folder, "--locked")
    assert (ended.code, "cannot read the lock" in ended.err, "--lock" in ended.err) == (2, True, True)


@pytest.mark.parametrize("extra", [["--lock", "--locked"], ["--lock-file", "a.yaml"]])
def test_options_that_exclude_each_other(folder: Path, run: Run, extra: list[str]) -> None:
    assert compile_to(run, folder, *extra).code == 2


@pytest.mark.parametrize("name", ["spec.yaml", "model.onnx", "out.onnx", "out.onnx.evidence.json"])
def test_a_lock_overwrites_nothing_else(folder: Path, run: Run, name: str) -> None:
    assert compile_to(run, folder, "--lock", "--lock-file", folder / name).code == 2
