"""The guide to writing a pass: its pass does what it says, and `make pass` writes one that runs."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import driver
import pytest
from blocks import blocks
from runs import ROOT

from ccompile import registry

GRAPH = """g (float[2,3] x) => (float[2,3] y) {
   [drop] a = Dropout (x)
   [act] y = Relu (a)
}"""
MASKED = """g (float[2,3] x) => (float[2,3] y, bool[2,3] m) {
   [drop] a, m = Dropout (x)
   [act] y = Relu (a)
}"""


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"written_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def from_guide(tmp_path: Path) -> ModuleType:
    """The module of the pass that the guide shows."""
    guide = (ROOT / "docs" / "guides" / "new-pass.md").read_text(encoding="utf-8")
    (code,) = [block.text for block in blocks(guide) if block.first == "# drop_dropout.py"]
    (tmp_path / "drop_dropout.py").write_text(code)
    return imported(tmp_path / "drop_dropout.py")


def test_the_pass_of_the_guide_acts_where_it_says(from_guide: ModuleType) -> None:
    model, _ = driver.model_of(GRAPH)
    run = driver.run_step(from_guide.DropDropout(), model)
    assert run.record.verdict == "kept", run.record.reason
    assert [node.op_type for node in run.model.graph] == ["Relu"]


def test_the_pass_of_the_guide_says_why_not_elsewhere(from_guide: ModuleType) -> None:
    model, _ = driver.model_of(MASKED)
    run = driver.run_step(from_guide.DropDropout(), model)
    assert run.result is not None
    assert [skip.node for skip in run.result.skipped] == ["drop"]
    assert not run.result.applied


def test_a_new_pass_is_a_pass(tmp_path: Path) -> None:
    for folder in ("docs", "passes", "tests/passes"):
        (tmp_path / folder).mkdir(parents=True)
    script = shutil.copy(ROOT / "docs" / "new_pass.py", tmp_path / "docs")
    subprocess.run([sys.executable, script, "drop-dropout"], check=True, capture_output=True)
    kind = registry.declared(imported(tmp_path / "passes" / "drop_dropout.py"))
    assert kind.__name__ == "DropDropout"
    refused = subprocess.run([sys.executable, script, "drop-dropout"], check=False, capture_output=True, text=True)
    assert (refused.returncode, refused.stderr) == (1, "drop-dropout exists already\n")
