"""Runs of the command line: how one ended, and how to start one as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIDY = "version: 1\ndata: {verification: {npz: verification.npz, samples: 4}}\npasses: [tidy-graph]\n"


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]


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
