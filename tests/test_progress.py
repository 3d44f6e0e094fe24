"""What a compile says is running."""

from __future__ import annotations

from pathlib import Path

import builders
import yaml

from ccompile import onnx_io, spec
from ccompile.commands.remaining import Remaining
from ccompile.pipeline import compile_model
from ccompile.request import Request


def told(folder: Path, *passes: object) -> list[tuple[str, int, int]]:
    """All that a compile of a net of three dense layers tells, on two batches of data."""
    data = {part: {"synthetic": {}, "samples": 128, "batch": 64} for part in ("calibration", "verification")}
    onnx_io.save(builders.mlp(0), folder / "model.onnx")
    text = yaml.safe_dump({"version": 1, "passes": list(passes), "data": data})
    found: list[tuple[str, int, int]] = []
    request = Request(folder / "model.onnx", spec.parse(text), folder / "out.onnx", threads=1)
    evidence = compile_model(request, lambda text, done, total: found.append((text, done, total)))
    assert evidence.verdict == "ok", evidence.reason
    return found


def test_a_rewrite_is_one_line_until_it_is_verified(tmp_path: Path) -> None:
    assert told(tmp_path, "tidy-graph") == [
        ("reading and running the source", 0, 3),
        ("step 1 tidy-graph", 1, 3),
        ("step 1 tidy-graph: verification", 1, 3),
        ("gates and output", 2, 3),
        ("done", 3, 3),
    ]


def test_a_compression_says_what_of_it_is_running(tmp_path: Path) -> None:
    step = {"prune-channels": {"keep": {"macs": 0.8}, "tolerance": {"relative_l2": 100.0}}}
    lines = told(tmp_path, "tidy-graph", step, {"repair": {"tolerance": {"relative_l2": 100.0}}})
    assert {(done, total) for text, done, total in lines if "prune" in text} == {(2, 5)}
    start = "step 2 prune-channels: "
    assert [text.removeprefix(start) for text, _, _ in lines if text.startswith(start)] == [
        "curves of 2 sites",
        "statistics 2/2 layers, batch 1/2",
        "statistics 2/2 layers, batch 2/2",
        "sensitivity 1/2 groups",
        "sensitivity 2/2 groups",
        "refit 1/2 layers",  # what reads the first cut, and all behind it
        "refit 2/2 layers",
        "verification",
    ]
    start = "step 3 repair: "
    assert [text.removeprefix(start) for text, _, _ in lines if text.startswith(start)] == [
        *(f"layer {index}/3" for index in (1, 2, 3)),
        "verification",
    ]


# ---------------------------------------------------------------------------------------------- what is left


def left(*lines: tuple[float, str]) -> list[str]:
    """What is said behind each line, told at those seconds."""
    times = iter([time for time, _ in lines])
    remaining = Remaining(lambda: next(times))
    return [remaining.of(text) for _, text in lines]


def test_what_is_left_follows_from_how_fast_the_counter_went() -> None:
    lines = [(0.0, "refit 1/20 layers"), (60.0, "refit 5/20 layers"), (120.0, "refit 11/20 layers")]
    assert left(*lines) == ["", "about 4 min left of this part", "about 2 min left of this part"]


def test_nothing_is_said_before_anything_is_known() -> None:
    assert left((0.0, "refit 1/20"), (1.0, "refit 2/20"), (9.0, "verification"), (99.0, "verification")) == [""] * 4


def test_another_part_starts_anew() -> None:
    assert left((0.0, "refit 1/9"), (50.0, "refit 2/9"), (51.0, "cut 1/9"), (52.0, "cut 2/9"))[2:] == ["", ""]


def test_a_part_that_runs_again_starts_anew() -> None:
    assert left((0.0, "batch 1/9"), (50.0, "batch 9/9"), (51.0, "batch 1/9"), (52.0, "batch 2/9"))[1:] == ["", "", ""]
