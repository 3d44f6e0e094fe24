"""Finds passes: every module of ccompile.passes, and the entry points "ccompile.passes" of installed packages."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
import sys
from typing import TYPE_CHECKING

from ccompile.core import Pass
from ccompile.errors import PassError, nearest

if TYPE_CHECKING:
    from types import ModuleType

ENTRY_POINTS = "ccompile.passes"


@functools.cache
def passes() -> dict[str, type[Pass]]:
    """Return all passes by name, sorted.

    Raises PassError: two modules claim one name (a second copy of a pass, for example), or a module has no pass.
    """
    import ccompile.passes

    found: dict[str, type[Pass]] = {}
    modules = [
        importlib.import_module(f"ccompile.passes.{info.name}")
        for info in pkgutil.iter_modules(ccompile.passes.__path__)
    ]
    modules += [importlib.import_module(entry.value) for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)]
    for module in modules:
        kind = declared(module)
        name = kind.pass_name()
        if name in found:
            raise PassError(f"two modules declare the pass `{name}`", f"{found[name].__module__}, {module.__name__}")
        found[name] = kind
    return dict(sorted(found.items()))


def declared(module: ModuleType) -> type[Pass]:
    """Return the one pass that a module declares. Raises PassError when there is none, or more than one."""
    kinds = [
        kind
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, Pass) and kind.__module__ == module.__name__
    ]
    if len(kinds) != 1:
        raise PassError(f"a pass module declares exactly one pass, this one {len(kinds)}", module.__name__)
    return kinds[0]


def find(name: str) -> type[Pass]:
    """Return a pass by name. Raises PassError with the nearest known name."""
    known = passes()
    if name not in known:
        raise PassError(f"there is no pass `{name}`", hint=nearest(name, known).replace("It takes", "There are"))
    return known[name]


def doc_of(kind: type[Pass]) -> str:
    """Return the docstring of a pass's file: its reference."""
    return (sys.modules[kind.__module__].__doc__ or "").strip()
