"""What a compile says is running."""

from __future__ import annotations

from pathlib import Path

import builders
import yaml

from ccompile import graph, spec
from ccompile.pipeline import compile_model
from ccompile.request import Request


def told(folder: Path, *passes: object) -> list[tuple[str, int, int]]:
    """All that a compile of a net of three dense layers tells, on two batches of data."""
    data = {part: {"synthetic": {}, "samples": 128, "batch": 64} for part in ("calibration", "verification")}
    graph.save(builders.mlp(0), folder / "model.onnx")
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
