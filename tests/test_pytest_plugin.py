"""The pytest plugin, in test files of a user's own."""

from __future__ import annotations

import tomllib
from pathlib import Path

import builders
import pytest
from runs import ROOT, Run

from ccompile import graph

pytest_plugins = ["pytester"]

CLOSE = """
def test_close(assert_onnx_close):
    assert_onnx_close("OTHER.onnx", "model.onnx")

def test_check(ccompile_check):
    cases = ccompile_check("out.onnx", against="model.onnx", spec="spec.yaml")
    assert "holds" in {case.verdict for case in cases}

def test_limit(ccompile_check):
    ccompile_check("out.onnx", relative_l2=1e-3)
"""


@pytest.fixture
def built(pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder with a compiled model and its evidence; plugins are those that a run names."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    graph.save(builders.mlp(0), pytester.path / "model.onnx")
    graph.save(builders.mlp(1), pytester.path / "other.onnx")
    (pytester.path / "spec.yaml").write_text("version: 1\npasses: [tidy-graph]\n")
    pytester.makeini("[pytest]")
    assert run("model.onnx", "-s", "spec.yaml", "-o", "out.onnx", "--threads", 1).code == 0
    return pytester


def ended(built: pytest.Pytester, text: str) -> pytest.RunResult:
    built.makepyfile(text)
    return built.runpytest_subprocess("-p", "ccompile.pytest_plugin")


def test_fixtures_pass_where_nothing_moved(built: pytest.Pytester) -> None:
    ended(built, CLOSE.replace("OTHER", "out")).assert_outcomes(passed=3)


def test_assert_onnx_close_fails_with_what_would_have_passed(built: pytest.Pytester) -> None:
    found = ended(built, CLOSE.replace("OTHER", "other"))
    found.assert_outcomes(passed=2, failed=1)
    found.stdout.fnmatch_lines(["*Limits that would each have passed*"])


def test_ccompile_check_fails_with_the_cases_that_broke(built: pytest.Pytester) -> None:
    (built.path / "out.onnx").write_bytes((built.path / "other.onnx").read_bytes())
    found = ended(built, CLOSE.replace("OTHER", "model"))
    found.assert_outcomes(passed=1, failed=2)
    found.stdout.fnmatch_lines(["*out.onnx: artifact weights:*"])


def test_the_plugin_is_declared() -> None:
    project = tomllib.loads(Path(ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"ccompile": "ccompile.pytest_plugin"}
