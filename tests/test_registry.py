"""Passes of other packages: how entry points are read, and what a broken one leads to."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ccompile import registry
from ccompile.errors import PassError

PASS = """\"\"\"Do nothing.\"\"\"
from ccompile.core import PassResult, Rewrite

class DoNothing(Rewrite):
    kind = "exact"

    def run(self, view):
        return PassResult((), ())
"""


@pytest.fixture
def found_afresh() -> Iterator[None]:
    registry.passes.cache_clear()
    yield
    registry.passes.cache_clear()


def offer(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str, value: str) -> None:
    """Offer a module `do_nothing` as the entry point `value`."""
    (folder / "do_nothing.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "do_nothing", raising=False)
    entry = importlib.metadata.EntryPoint("nothing", value, registry.ENTRY_POINTS)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])


@pytest.mark.usefixtures("found_afresh")
@pytest.mark.parametrize("value", ["do_nothing", "do_nothing:DoNothing"])
def test_an_entry_point_names_a_module_or_its_class(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str
) -> None:
    offer(monkeypatch, tmp_path, PASS, value)
    assert registry.passes()["do-nothing"].__name__ == "DoNothing"


@pytest.mark.usefixtures("found_afresh")
@pytest.mark.parametrize("source", ["import nowhere_at_all", "1 / 0", "def"])
def test_an_entry_point_that_cannot_be_imported_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str
) -> None:
    offer(monkeypatch, tmp_path, source, "do_nothing")
    with pytest.raises(PassError, match="entry point `nothing = do_nothing`: cannot import the pass"):
        registry.passes()
