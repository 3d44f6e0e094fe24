"""The examples in docstrings hold."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import ccompile

ROOT = Path(ccompile.__file__).parent


def modules() -> list[str]:
    found = [path.relative_to(ROOT.parent).with_suffix("") for path in ROOT.rglob("*.py")]
    names = {".".join(path.parts) for path in found} | {
        f"ccompile.passes.{path.stem}" for path in (ROOT / "passes").resolve().glob("*.py")
    }
    return sorted(name for name in names if name.rpartition(".")[2] not in ("__init__", "__main__"))


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings_hold(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_docstrings_have_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for name in modules() for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) > 30
