"""JUnit files: what CI systems read of a compile."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from runs import Run

from ccompile import junit
from ccompile.cases import Case

BROKEN = Case("gate", "argmax", "broken", "0.9 measured", "A limit of 0.9 would pass.")


def test_every_case_stands_with_its_verdict() -> None:
    cases = [Case("contract", "1 tidy-graph", "holds", "kept"), BROKEN, Case("gate", "atol", "not judged", "no source")]
    suite = ElementTree.fromstring(junit.text("s", cases))
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "1", "1")
    assert [[child.tag for child in case] for case in suite] == [["system-out"], ["failure"], ["skipped"]]
    failure = suite[1][0]
    assert failure.get("message") == "0.9 measured"
    assert failure.text == "gate argmax: 0.9 measured\n  A limit of 0.9 would pass."


@pytest.mark.parametrize("name", ["<script>&\"'", "]]>", "\x00\x1b[31m", "\ud800", "a\nb", "\N{SNOWMAN}\U0001f600"])
def test_any_name_gives_xml_that_can_be_read(name: str) -> None:
    text = junit.text(name, [Case("gate", name, "broken", name, name)])
    suite = ElementTree.fromstring(text.encode())
    assert len(suite) == 1
    assert suite[0].get("name", "").isprintable() or "\n" in name


def test_compile_writes_a_case_per_contract_and_gate(digits: Path, run: Run) -> None:
    out, report = digits / "out.onnx", digits / "junit.xml"
    assert run(digits / "digits.onnx", "-s", digits / "spec.yaml", "-o", out, "--junit", report, "-q").code == 0
    suite = ElementTree.parse(report).getroot()
    names = [(case.get("classname"), case.get("name")) for case in suite]
    assert names == [
        ("contract", "1 tidy-graph"),
        ("contract", "2 fold-batchnorm"),
        ("contract", "3 split-svd"),
        ("gate", "stored_bytes"),
        ("gate", "metric.top1.drop"),
    ]
    assert suite.get("failures") == "0"


@pytest.mark.parametrize(
    ("change", "broken"), [("gates.stored_bytes=0.1", "stored_bytes"), ("passes.split-svd.energy=0.4", "3 split-svd")]
)
def test_a_broken_compile_says_so_in_its_report(digits: Path, run: Run, change: str, broken: str) -> None:
    out, report = digits / "out.onnx", digits / "junit.xml"
    ended = run(digits / "digits.onnx", "-s", digits / "spec.yaml", "-o", out, "--junit", report, "-q", "--set", change)
    assert ended.code == 1
    failed = [case for case in ElementTree.parse(report).getroot() if case.find("failure") is not None]
    assert [case.get("name") for case in failed] == [broken]
    assert "would" in "".join(failed[0].itertext())


@pytest.mark.parametrize("report", ["digits.onnx", "missing/junit.xml", "."])
def test_a_report_that_cannot_stand_there_is_refused_before_any_work(
    digits: Path, run: Run, report: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(digits)
    ended = run("digits.onnx", "-s", "tidy.yaml", "-o", "out.onnx", "--junit", report)
    assert (ended.code, "Traceback" in ended.err) == (2, False)
    assert not (digits / "out.onnx").exists()
