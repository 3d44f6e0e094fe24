"""What the result of a compile depends on, as digests: the tool and its passes, libraries, machine, request, data."""

from __future__ import annotations

import functools
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ccompile import contracts, metrics
from ccompile.core import Pass
from ccompile.data import Data
from ccompile.evidence import versions
from ccompile.request import Request
from ccompile.store import digest_of, key_of


@functools.cache
def tool_digest() -> str:
    """Return the SHA-256 of ccompile's own source, its passes included."""
    import ccompile.passes

    roots = [*ccompile.__path__, *ccompile.passes.__path__]
    return _digest_of_files(path for root in roots for path in Path(root).rglob("*.py"))


@functools.cache
def pass_digest(kind: type[Pass]) -> str:
    """Return the SHA-256 of the package that a pass of another distribution is in; nothing for our own."""
    top = kind.__module__.partition(".")[0]
    module = sys.modules.get(kind.__module__)
    if top == "ccompile" or module is None or not getattr(module, "__file__", None):
        return ""
    package = sys.modules.get(top)
    roots = [Path(root) for root in getattr(package, "__path__", ())]
    return _digest_of_files([Path(str(module.__file__)), *(path for root in roots for path in root.rglob("*.py"))])


def _digest_of_files(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of files by content, whatever their folder and order."""
    found = {path.resolve() for path in paths}
    return key_of(sorted((path.name, digest_of(path.read_bytes())) for path in found))


def target_digest(request: Request) -> str:
    """Return the SHA-256 of all that is known of the target."""
    return key_of(request.spec.target.model_dump(mode="json"))


def metric_digest(request: Request) -> str:
    """Return the SHA-256 of the task metrics: their names, and the source of those that are the user's own."""
    names = sorted(request.spec.gates.metric)
    own = [name for name in names if name not in metrics.METRICS]
    files = [Path(path) for name in own for path in metrics.files_of(name, request.spec.base)]
    return key_of(names, _digest_of_files(files))


def environment() -> dict[str, Any]:
    """Return what numbers depend on besides the request: versions and source, the processor, its cores."""
    return {
        "versions": versions(),
        "tool": tool_digest(),
        "machine": (platform.system(), platform.machine(), _processor(), os.cpu_count()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
    }


def _processor() -> str:
    """Return the model of the processor: its kernels, and how they round, are its own."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def base_key(request: Request, source: str, data: Data) -> str:
    """Return the digest of what every step depends on; source: digest of the model."""
    spec = request.spec
    default = contracts.default_tolerance(spec.gates).model_dump(mode="json")
    sets = [None if found is None else (found.digest, found.source) for found in (data.calibration, data.verification)]
    default = {name: str(value) for name, value in default.items()}  # infinity
    options = (request.seed, request.threads, target_digest(request), default, metric_digest(request))
    return key_of("base", source, sets, options, environment())


def step_key(base: str, state: str, index: int, step: Pass, locked: dict[str, str]) -> str:
    """Return the digest of all that a step depends on; state: digest of the graph that it is given.

    locked: the decisions that it must repeat.
    """
    return key_of("step", base, state, index, step.pass_name(), step.given(), pass_digest(type(step)), locked)


def compile_key(base: str, request: Request, locked: dict[str, str]) -> str:
    """Return the digest of all that a whole compile depends on."""
    spec = request.spec
    steps = [(step.pass_name(), step.given(), pass_digest(type(step))) for step in spec.passes]
    return key_of("compile", base, spec.digest, steps, spec.gates.model_dump(mode="json"), locked)
