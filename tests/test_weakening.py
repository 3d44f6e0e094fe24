"""The strongest form that holds: bisection, and what it does in a compile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import builders
import driver
import pytest
from calibrated import calibration, feeds

from ccompile.core import Budget
from ccompile.passes.prune_channels import PruneChannels
from ccompile.passes.tidy_graph import TidyGraph
from ccompile.tolerance import Tolerance
from ccompile.weakening import weakest

if TYPE_CHECKING:
    from collections.abc import Callable

    from ccompile.evidence import StepRecord


@dataclass
class Tried:
    share: float
    broken: str


def above(limit: float) -> Callable[[float], Tried]:
    return lambda share: Tried(share, "" if share >= limit else "broken")


@pytest.mark.parametrize("limit", [0.01, 0.3, 0.5, 0.77, 0.96])
def test_what_is_found_holds_and_is_within_a_round_of_the_limit(limit: float) -> None:
    found = weakest(above(limit))
    assert found is not None
    assert limit <= found.share <= limit + 1 / 32


def test_nothing_is_found_where_only_doing_nothing_holds() -> None:
    assert weakest(above(1.0)) is None


def test_a_budget_eases_towards_the_whole_source() -> None:
    step = PruneChannels(keep=Budget(macs=0.5), tolerance=Tolerance(argmax=0.1))
    assert step.eased(0.5).keep == Budget(macs=0.75)
    assert step.eased(0.0).keep == Budget(macs=0.5)


def pruned(limit: float, on_violation: str, keep: object) -> tuple[StepRecord, driver.Bench]:
    """Prune a random network, whose outputs may move by `limit`."""
    model = builders.mlp(0)
    run = driver.bench(model, feeds(model, seed=6))
    run.statistics = calibration(model, feeds(model, (64, 64, 64, 64)))
    step = {"keep": keep, "tolerance": {"relative_l2": limit}, "on_violation": on_violation}
    run.step(0, PruneChannels.model_validate(step))
    return run.record, run


@pytest.mark.parametrize("keep", [0.25, {"macs": 0.3}])
def test_a_step_that_breaks_goes_back_until_it_holds(keep: object) -> None:
    asked, _ = pruned(0.3, "fail", keep)
    assert asked.verdict == "failed"
    record, run = pruned(0.3, "weaken", keep)
    assert record.verdict == "weakened"
    assert 0 < record.weakened < 1
    assert "left its tolerance: relative_l2" in record.reason
    assert record.against_previous is not None
    moved = record.against_previous.outputs[0].relative_l2
    assert moved is not None
    assert moved <= 0.3
    assert run.price(run.model).report.macs < run.origin.cost.report.macs


def test_a_step_that_holds_is_not_weakened() -> None:
    record, _ = pruned(1e9, "weaken", 0.25)
    assert (record.verdict, record.weakened) == ("kept", 0.0)


def test_a_step_that_never_holds_is_reverted() -> None:
    record, run = pruned(1e-9, "weaken", 0.25)
    assert record.verdict == "reverted"
    assert run.price(run.model).report == run.origin.cost.report


def test_a_rewrite_has_no_strength_to_weaken() -> None:
    with pytest.raises(ValueError, match="on_violation"):
        TidyGraph.model_validate({"on_violation": "weaken"})
