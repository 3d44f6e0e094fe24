"""What changed between two builds: each kind of change is found, shown and can be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import Ended, Run

from ccompile import builds, builds_report
from ccompile.builds import Change, Limit
from ccompile.errors import SpecError
from ccompile.evidence import Evidence


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The evidence of the digits example, as plain data."""
    from runs import ROOT

    from ccompile import pipeline, spec
    from ccompile.request import Request

    example, folder = ROOT / "examples" / "01_digits", tmp_path_factory.mktemp("builds")
    request = Request(example / "digits.onnx", spec.load(example / "spec.yaml"), folder / "out.onnx", threads=1)
    found: dict[str, Any] = json.loads(pipeline.compile_model(request).text())
    return found


GATE = {"name": "stored_bytes", "value": 0.88, "holds": True, "detail": "0.99 asked"}


def edited(base: dict[str, Any], **changes: Any) -> Evidence:
    """Return evidence in which values at dotted paths are others (`steps__2__verdict="kept"`)."""
    data = json.loads(json.dumps(base))
    for path, value in changes.items():
        *way, last = (int(part) if part.isdigit() else part for part in path.split("__"))
        at = data
        for part in way:
            at = at[part]
        at[last] = value
    return Evidence.model_validate(data)


def found(base: dict[str, Any], **changes: Any) -> list[Change]:
    return builds.changes(edited(base), edited(base, **changes))


def test_a_build_does_not_differ_from_itself_nor_by_its_timing(base: dict[str, Any]) -> None:
    assert found(base, timing={"total": 99.0}) == []


@pytest.mark.parametrize(
    ("changes", "kind", "what", "worse", "by"),
    [
        ({"spec__digest": "f" * 64}, "origin", "spec", True, 0),
        ({"versions__numpy": "1.0"}, "origin", "version of numpy", True, 0),
        ({"verification__digest": "f" * 64}, "origin", "verification", True, 0),
        ({"steps__2__metrics__top1": 0.5}, "accuracy", "top1", True, pytest.approx(510 / 512 - 0.5)),
        ({"steps__2__metrics__top1": 1.0}, "accuracy", "top1", False, 0),
        (
            {"final__outputs__0__relative_l2": 1.5},
            "accuracy",
            "relative L2 of logits",
            True,
            pytest.approx(1.5, abs=0.01),
        ),
        ({"final__outputs__0__argmax": 0.5}, "accuracy", "argmax of logits", True, pytest.approx(0.5, abs=0.01)),
        ({"steps__2__cost__macs": 10}, "cost", "macs", False, 0),
        ({"output__bytes": 860690}, "cost", "bytes of the file", True, pytest.approx(1)),
        ({"gates__0__holds": False}, "gates", "stored_bytes", True, 0),
        ({"gates__0": {**GATE, "limit": 0.99}}, "gates", "stored_bytes", True, 0),
        ({"steps__0__options": {"compact": True}}, "steps", "tidy-graph", True, 0),
        ({"steps__2__applied__0__note": "rank 9"}, "choices", "split-svd /head/hidden/V, /head/hidden/U", True, 0),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_kind_of_change_is_found(
    base: dict[str, Any], changes: dict[str, Any], kind: str, what: str, worse: bool, by: Any
) -> None:
    (change,) = found(base, **changes)
    assert (change.kind, change.what, change.worse) == (kind, what, worse)
    assert change.by == by
    assert change.before != change.after


def test_a_metric_that_is_gone_is_worse_than_any_limit(base: dict[str, Any]) -> None:
    (change,) = found(base, steps__2__metrics={})
    assert builds.failures([change], [Limit("accuracy", 1.0)]) == [change]


def test_steps_and_sites_that_came_and_went_are_told(base: dict[str, Any]) -> None:
    steps = base["steps"]
    changes = found(base, steps=[steps[0], steps[0], steps[2]])
    assert [(change.what, change.before == "none", change.after == "none") for change in changes] == [
        ("fold-batchnorm", False, True),
        ("tidy-graph #2", True, False),
    ]
    skip = {"node": "/head/hidden", "reason": "too small", "candidates": []}
    changes = found(base, steps__2__applied=[], steps__2__skipped=[*steps[2]["skipped"], skip])
    assert {(change.kind, change.after) for change in changes} >= {("choices", "left alone: too small")}


def test_what_was_weighed_at_a_site_is_part_of_its_choice(base: dict[str, Any]) -> None:
    weighed = {"technique": "split-svd", "strength": 8, "error": 0.1, "impact": 0.1, "cost": 1, "chosen": True}
    (change,) = found(base, steps__2__applied__0__candidates=[weighed])
    assert change.after.endswith("[split-svd 8]")


# ---------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("limit", "fails"),
    [("cost", True), ("cost=0.4", True), ("cost=0.6", False), ("accuracy", False), ("choices", False)],
)
def test_limits_refuse_what_is_worse_by_more(base: dict[str, Any], limit: str, fails: bool) -> None:
    changes = found(base, output__bytes=int(base["output"]["bytes"] * 1.5))
    assert builds.failures(changes, [Limit.parse(limit)]) == (changes if fails else [])


@pytest.mark.parametrize("text", ["", "nope", "cost=", "cost=x", "cost=-1", "cost=inf", "cost=nan", "choices=0.1"])
def test_a_limit_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"--fail-on"):
        Limit.parse(text)


# ---------------------------------------------------------------------------------------------- shown


HOSTILE = Change("choices", "a|b\n<script>`x`", "*before*", "[after](http://x)", True)


def test_markdown_shows_hostile_names_as_text() -> None:
    text = builds_report.markdown([HOSTILE], [HOSTILE], ("<a>", "b"))
    (row,) = [line for line in text.splitlines() if line.startswith("| fails")]
    assert row == r"| fails | a\|b &lt;script&gt;\`x\` | \*before\* | \[after\](http://x) |"
    assert "<script>" not in text
    assert "**1 change is not allowed.**" in text


def test_long_lists_are_cut_with_a_count() -> None:
    many = [Change("choices", f"site {n}", "a", "b", True) for n in range(50)]
    text = builds_report.markdown(many, [], ("a", "b"))
    assert text.count("| site ") == 40
    assert "... and 10 more" in text
    assert "Choices (50)" in text


@pytest.fixture
def files(base: dict[str, Any], tmp_path: Path) -> tuple[Path, Path]:
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    before.write_text(edited(base).text())
    after.write_text(edited(base, output__bytes=10**6, steps__2__metrics__top1=0.99).text())
    return before, after


def compare(run: Run, files: tuple[Path, Path], *arguments: object) -> Ended:
    return run("compare", *files, *arguments)


def test_compare_exits_0_unless_a_change_is_refused(files: tuple[Path, Path], run: Run) -> None:
    ended = compare(run, files)
    assert (ended.code, ended.err) == (0, "")
    assert "bytes of the file" in ended.out
    ended = compare(run, files, "--fail-on", "cost=0.02", "--fail-on", "accuracy=0.1", "-q")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.count("\n") == 1
    assert "cost bytes of the file" in ended.err


def test_compare_gives_markdown_and_json(files: tuple[Path, Path], run: Run) -> None:
    assert compare(run, files, "--format", "markdown").out.startswith("### ccompile: a.json → b.json\n")
    data = json.loads(compare(run, files, "--format", "json", "--fail-on", "accuracy").out)
    assert (data["holds"], data["failed"]) == (False, ["top1"])
    assert [change["what"] for change in data["changes"]] == ["top1", "bytes of the file"]


def test_equal_builds_say_so(files: tuple[Path, Path], run: Run) -> None:
    for form in ("text", "markdown"):
        assert "The builds are equal" in compare(run, (files[0], files[0]), "--format", form).out


@pytest.mark.parametrize("text", [None, "{}", '{"evidence_schema": 9}'])
def test_what_is_no_evidence_is_refused(files: tuple[Path, Path], run: Run, text: str | None) -> None:
    files[1].unlink() if text is None else files[1].write_text(text)
    ended = compare(run, files)
    assert (ended.code, ended.out) == (2, "")
    assert str(files[1]) in ended.err


def test_the_evidence_of_a_failed_build_is_compared_as_well(files: tuple[Path, Path], digits: Path, run: Run) -> None:
    ended = run(
        digits / "digits.onnx", "-s", digits / "spec.yaml", "-o", digits / "x.onnx", "-q", "--set", "gates.macs=0.1"
    )
    assert ended.code == 1
    ended = compare(run, (files[0], digits / "x.onnx.evidence.json"), "--fail-on", "gates")
    assert ended.code == 1
    assert "gates macs: none -> broken" in ended.err
