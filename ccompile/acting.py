"""Run one pass on a view: a rewrite by itself; a compression by sites, curves, a plan, and its application."""

from __future__ import annotations

import contextlib

from ccompile import blas
from ccompile.core import Compression, Pass, PassResult, Rewrite, Site, Skip, View
from ccompile.errors import PassError


def act(step: Pass, view: View) -> PassResult:
    """Let a pass rewrite view.graph in place. Raises PassError when it is of neither kind."""
    fits = isinstance(step, Compression) or step.needs_calibration
    with blas.one_thread() if fits else contextlib.nullcontext():
        return _act(step, view)


def _act(step: Pass, view: View) -> PassResult:
    if isinstance(step, Rewrite):
        return step.run(view)
    if isinstance(step, Compression):
        return _compress(step, view)
    raise PassError(f"`{step.pass_name()}` is neither a Rewrite nor a Compression")


def _compress(step: Compression, view: View) -> PassResult:
    """Let the pass name its sites, pick strengths on the graph as it came in, and apply them in topological order."""
    found = step.sites(view)
    skipped = [site for site in found if isinstance(site, Skip)]
    sites = [site for site in found if isinstance(site, Site)]
    curves = []
    for index, site in enumerate(sites):
        view.tell(f"curve {index + 1}/{len(sites)}")
        curves.append((site, step.choices(site, view)))
    plan = []
    for (site, _), chosen in zip(curves, step.plan(curves, view), strict=True):
        if isinstance(chosen, Skip):
            skipped.append(chosen)
        else:
            plan.append((site, chosen))
    return PassResult(tuple(step.apply_all(plan, view)), tuple(skipped))
