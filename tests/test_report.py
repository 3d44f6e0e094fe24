"""What the tables show at every width: the terminal's, and the wide one of a file."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from rich.console import Console, RenderableType
from rich.text import Text
from runs import Run

from ccompile import report
from ccompile.evidence import ComparisonRecord, Evidence
from ccompile.inspection import inspect_model
from ccompile.target import load_target
from ccompile.tolerance import Comparison, OutputComparison


def shown(what: RenderableType, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    with console.capture() as captured:
        console.print(what)
    return captured.get()


@pytest.fixture
def evidence(run: Run, digits: Path) -> Evidence:
    assert run(digits / "digits.onnx", "-s", digits / "spec.yaml", "-o", digits / "out.onnx", "--threads", 1).code == 0
    return Evidence.read(digits / "out.onnx.evidence.json")


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


@pytest.mark.parametrize("name", ["[bold]x[/]", "[/oops]", "gate[0]/w", "[red]"])
def test_brackets_in_a_cell_are_text(name: str) -> None:
    assert name in shown(report.table(["layer", "op"], [(name, "Conv"), (Text(name, "red"), "Add")], left=2), 80)


@pytest.mark.parametrize("width", [80, 100, 240])
def test_the_evidence_keeps_step_verdict_and_sites_at_every_width(evidence: Evidence, width: int) -> None:
    text = shown(report.evidence_table(evidence), width)
    assert [line.split()[:3] for line in lines_of(text, "step ")] == [["step", "verdict", "sites"]]
    for step in evidence.steps:
        assert len(found := lines_of(text, f"{step.index} {step.name}")) == 1
        assert found[0].split()[2:4] == ["kept", f"{len(step.applied)}/{len(step.applied) + len(step.skipped)}"]
    assert all(len(line.rstrip()) <= width for line in text.splitlines())


def test_a_narrow_evidence_table_says_what_it_left_out(evidence: Evidence) -> None:
    narrow, wide = (shown(report.evidence_table(evidence), width) for width in (80, 240))
    assert "left out at this width: est. time, stored" in narrow
    assert "left out" not in wide
    assert "est. time" in lines_of(wide, "step ")[0]


def test_a_reverted_step_says_why(evidence: Evidence) -> None:
    step = evidence.steps[2].model_copy(update={"verdict": "reverted", "reason": "`[y]` left its tolerance"})
    changed = evidence.model_copy(update={"steps": (*evidence.steps[:2], step)})
    assert "note: step 3 split-svd reverted: `[y]` left its tolerance" in shown(report.evidence_table(changed), 240)


@pytest.mark.parametrize("used", [True, False])
def test_calibration_is_told_with_what_its_statistics_held_where_a_step_used_it(evidence: Evidence, used: bool) -> None:
    held = {"layers": 34, "rows": 32768, "bytes": 210_000_000}
    timing = {**evidence.timing, "statistics": held if used else None}
    text = shown(report.evidence_table(evidence.model_copy(update={"timing": timing})), 240)
    assert ("34 layers, up to 32,768 rows each, 210 MB held at most" in text) is used
    assert ("calibrated on 256 samples: npz calibration.npz" in text) is used


def compared(dtype: str, mismatches: int, **changes: object) -> ComparisonRecord:
    """A comparison of four elements of one output."""
    output = OutputComparison("y", dtype, 4, 0.0, 0.0, 0.0, math.inf, 1.0, (4 - mismatches) / 4, None, mismatches)
    return ComparisonRecord.of(Comparison((replace(output, **changes),), 4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("comparison", "shares", "furthest"),
    [
        (compared("int64", 1), ("-", "75.00%"), "1 differ"),
        (compared("int64", 0), ("0.0e+00", "100.00%"), "0"),
        (compared("float32", 1), ("broken", "-"), "1 broken"),
        (compared("int64", 0, problem="missing"), ("broken", "-"), "missing"),
    ],
)
def test_integers_that_differ_are_a_share_and_no_break(
    evidence: Evidence, comparison: ComparisonRecord, shares: tuple[str, str], furthest: str
) -> None:
    step = evidence.steps[0].model_copy(update={"against_previous": comparison, "against_source": comparison})
    row = lines_of(shown(report.evidence_table(evidence.model_copy(update={"steps": (step,)})), 240), "1 tidy-graph")
    assert row[0].split()[4:7] == [shares[0], *shares]
    assert furthest in shown(report.comparison_table(comparison, "drawn"), 120)


@pytest.mark.parametrize(("width", "below"), [(80, True), (1500, False)])
def test_a_narrow_inspection_gives_each_refusal_once_below(digits: Path, width: int, below: bool) -> None:
    found = inspect_model(digits / "digits.onnx", load_target("generic-cpu", Path()), {})
    text = shown(report.inspect_table(found.cost, found.acts, "generic-cpu"), width)
    assert bool(lines_of(text, "not split-spatial: ")) is below
    assert all(len(line.rstrip()) <= width for line in text.splitlines())


def test_inspect_shows_names_with_brackets(run: Run, tmp_path: Path) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"], name="gate[/0]")
    values = [onnx.helper.make_tensor_value_info(name, 1, [1, 4]) for name in "xy"]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", values[:1], values[1:]), opset_imports=[onnx.helper.make_opsetid("", 18)]
    )
    onnx.save(model, tmp_path / "m.onnx")
    ended = run("inspect", tmp_path / "m.onnx")
    assert ended.code == 0
    assert "gate[/0]" in ended.out
