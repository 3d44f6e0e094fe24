"""Run one pass on a view: a rewrite by itself; a compression by sites, curves, a plan, and its application."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import onnx_ir as ir

from ccompile import blas, graph
from ccompile.core import Candidate, Choice, Compression, Pass, PassResult, Rewrite, Site, Skip, View
from ccompile.curves import weighed
from ccompile.errors import PassError


def check_selectors(step: Pass, model: ir.Model, where: str) -> list[str]:
    """Return notes on what of `skip` names no node. Raises PassError where `only` names none: nothing would be done."""
    facts = [graph.facts(node) for node in model.graph]
    for selector in step.only or ():
        if not any(selector.matches(known) for known in facts):
            names = ", ".join(str(known["name"]) for known in facts[:8])
            raise PassError(f"`only: {selector}` names no node", where, f"The first nodes are: {names}")
    unmatched = (selector for selector in step.skip if not any(selector.matches(known) for known in facts))
    return [f"{where}: `skip: {selector}` names no node" for selector in unmatched]


def act(step: Pass, view: View, ease: float = 0.0, keep: Callable[[Site], bool] = lambda site: True) -> PassResult:
    """Let a pass rewrite view.graph in place, `ease` of the way back from the strength asked for to none (1.0).

    keep: which of the sites that a compression planned are carried out. Raises PassError when it is of neither kind.
    """
    fits = isinstance(step, Compression) or step.needs_calibration
    with blas.one_thread() if fits else contextlib.nullcontext():
        return _act(step, view, ease, keep)


def _act(step: Pass, view: View, ease: float, keep: Callable[[Site], bool]) -> PassResult:
    if isinstance(step, Rewrite):
        return step.run(view)
    if isinstance(step, Compression):
        return _compress(step, view, ease, keep)
    raise PassError(f"`{step.pass_name()}` is neither a Rewrite nor a Compression")


def _compress(step: Compression, view: View, ease: float, keep: Callable[[Site], bool]) -> PassResult:
    """Let the pass name its sites, pick strengths on the graph as it came in, and apply them in topological order."""
    found = step.sites(view)
    skipped = [site for site in found if isinstance(site, Skip)]
    sites = [site for site in found if isinstance(site, Site)]
    view.tell(f"curves of {len(sites)} sites")
    step.prepare(sites, view)
    curves = [(site, step.choices(site, view)) for site in sites]
    softer = step.eased(ease) if ease else step
    chosen = softer.plan(curves, view)
    if ease and softer is step:
        chosen = [_milder(site, choices, pick, ease) for (site, choices), pick in zip(curves, chosen, strict=True)]
    plan: list[tuple[Site, Choice]] = []
    offered: dict[str, tuple[Candidate, ...]] = {}
    nothing: dict[str, tuple[Candidate, ...]] = {}
    tells = bool(view.once("weighed", lambda: nothing))  # a pass that weighs several techniques tells it by itself
    for (site, choices), pick in zip(curves, chosen, strict=True):
        taken = pick if isinstance(pick, Choice) else None
        told = () if tells else weighed(step, choices, taken)
        if isinstance(pick, Skip):
            skipped.append(replace(pick, candidates=pick.candidates or told))
        elif keep(site):
            plan.append((site, pick))
            offered[_place(site)] = told
    applied = (
        replace(made, candidates=made.candidates or offered.get(_place(made), ()))
        for made in step.apply_all(plan, view)
    )
    return PassResult(tuple(applied), tuple(skipped))


def _place(site: Site) -> str:
    """Return what a site and what was made of it have in common."""
    return site.output or site.nodes[0]


def _milder(site: Site, choices: Sequence[Choice], pick: Choice | Skip, ease: float) -> Choice | Skip:
    """Go `ease` of the way back along a curve, whose first entry leaves the site as it is."""
    if isinstance(pick, Skip):
        return pick
    index = math.floor(choices.index(pick) * (1 - ease))
    return choices[index] if index else Skip(site.nodes[0], "weakened until nothing was left to do")
