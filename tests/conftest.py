"""What several test files share: the digits example in a folder of its own, and the command line in this process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ccompile import cli

ROOT = Path(__file__).resolve().parent.parent
TIDY = "version: 1\ndata: {verification: {npz: verification.npz, samples: 4}}\npasses: [tidy-graph]\n"


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """A copy of examples/01_digits, and `tidy.yaml`, which is quick."""
    shutil.copytree(ROOT / "examples" / "01_digits", tmp_path / "digits")
    (tmp_path / "digits" / "tidy.yaml").write_text(TIDY)
    return tmp_path / "digits"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""

    def run_here(*arguments: object) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, out, err)

    return run_here


def command(*arguments: object) -> list[str]:
    """Return the command line as a process of its own."""
    return [sys.executable, "-m", "ccompile", *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment with this tree's ccompile first."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", **changes}


def spawn(*arguments: object, cwd: Path, **changes: str) -> Ended:
    """Run the command line in a process of its own."""
    ended = subprocess.run(
        command(*arguments), cwd=cwd, env=environment(**changes), capture_output=True, text=True, timeout=120
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def scratch_files(folder: Path) -> list[Path]:
    """Return what an unfinished write would have left."""
    return sorted(folder.glob(".*ccompile-tmp"))
