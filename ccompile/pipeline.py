"""A compile from request to evidence: step after step, or what the cache knows of it."""

from __future__ import annotations

import time
from dataclasses import replace

from ccompile import finishing, locking
from ccompile.caching import Cache, LostError
from ccompile.decisions import Decisions
from ccompile.evidence import Evidence
from ccompile.executor import executor
from ccompile.request import Request, check_paths
from ccompile.running import Progress, Run


def compile_model(
    request: Request, progress: Progress = lambda text, done, total: None, cache: Cache | None = None
) -> Evidence:
    """Run a compile; write model and evidence when all held, only the evidence when a contract or gate broke.

    cache: results of earlier compiles, which are repeated where nothing that they depend on has changed, the times that
    they took included. Raises CcompileError (exit 2) when the request itself is wrong; then nothing is written.
    """
    check_paths(request)
    if request.lock is not None and request.is_held:
        request = replace(request, locked=locking.read(request.lock).decisions)
    cache = cache or Cache()
    try:
        return _compile(request, progress, cache)
    except LostError:
        cache.lose()
        return _compile(request, progress, cache)


def _compile(request: Request, progress: Progress, cache: Cache) -> Evidence:
    start = time.perf_counter()
    total = len(request.spec.passes) + 2
    progress("reading and running the source", 0, total)
    with executor(request.jobs) as executing:
        run = Run(request, executing, progress=progress, decisions=Decisions(request.locked), cache=cache)
        run.read()
        if (known := cache.whole()) is not None:
            progress("nothing has changed: taken from the cache", total, total)
            return finishing.repeat(run, *known)
        run.begin()
        for index, step in enumerate(request.spec.passes):
            run.step(index, step)
            if run.steps[-1].verdict == "failed":
                break
    progress("gates and output", total - 1, total)
    evidence = finishing.finish(run, start)
    progress("done", total, total)
    return evidence
