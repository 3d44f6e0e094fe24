"""Run one pass on a view: a rewrite by itself; a compression by sites, curves, a plan, and its application."""

from __future__ import annotations

from ccompile import blas
from ccompile.core import Compression, Pass, PassResult, Rewrite, Site, Skip, View
from ccompile.errors import PassError


def act(step: Pass, view: View) -> PassResult:
    """Let a pass rewrite view.graph in place. Raises PassError when it is of neither kind."""
    if isinstance(step, Rewrite):
        return step.run(view)
    if isinstance(step, Compression):
        with blas.one_thread():
            return _compress(step, view)
    raise PassError(f"`{step.pass_name()}` is neither a Rewrite nor a Compression")


def _compress(step: Compression, view: View) -> PassResult:
    """Let the pass name its sites, pick strengths on the graph as it came in, and apply them in topological order."""
    found = step.sites(view)
    skipped = [site for site in found if isinstance(site, Skip)]
    curves = [(site, step.choices(site, view)) for site in found if isinstance(site, Site)]
    plan = []
    for (site, _), chosen in zip(curves, step.plan(curves, view), strict=True):
        if isinstance(chosen, Skip):
            skipped.append(chosen)
        else:
            plan.append((site, chosen))
    return PassResult(tuple(step.apply_all(plan, view)), tuple(skipped))
