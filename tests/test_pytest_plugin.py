"""The pytest plugin, in test files of a user's own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import builders
import pytest
from runs import ROOT, Run

from ccompile import onnx_io

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
def built(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a compiled model and its evidence."""
    onnx_io.save(builders.mlp(0), tmp_path / "model.onnx")
    onnx_io.save(builders.mlp(1), tmp_path / "other.onnx")
    (tmp_path / "spec.yaml").write_text("version: 1\npasses: [tidy-graph]\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.chdir(tmp_path)
    assert run("model.onnx", "-s", "spec.yaml", "-o", "out.onnx", "--threads", 1).code == 0
    return tmp_path


def ended(built: Path, text: str) -> tuple[dict[str, int], str]:
    """How many tests passed and failed in a process of their own, with no plugin but ours, and what was printed."""
    (built / "test_built.py").write_text(text)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "ccompile.pytest_plugin",
        "-p",
        "no:cacheprovider",
        "test_built.py",
    ]
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=built, env=alone, capture_output=True, text=True, check=False)
    return {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}, done.stdout


def test_fixtures_pass_where_nothing_moved(built: Path) -> None:
    assert ended(built, CLOSE.replace("OTHER", "out"))[0] == {"passed": 3}


def test_assert_onnx_close_fails_with_what_would_have_passed(built: Path) -> None:
    counts, text = ended(built, CLOSE.replace("OTHER", "other"))
    assert counts == {"passed": 2, "failed": 1}
    assert "Limits that would each have passed" in text


def test_ccompile_check_fails_with_the_cases_that_broke(built: Path) -> None:
    (built / "out.onnx").write_bytes((built / "other.onnx").read_bytes())
    counts, text = ended(built, CLOSE.replace("OTHER", "model"))
    assert counts == {"passed": 1, "failed": 2}
    assert "out.onnx: artifact weights:" in text


def test_the_plugin_is_declared() -> None:
    project = tomllib.loads(Path(ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"ccompile": "ccompile.pytest_plugin"}
