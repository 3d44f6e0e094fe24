"""What the evidence tells of the choices that a pass had at a site."""

from __future__ import annotations

import numpy as np
import pytest
from driver import Bench, model_of, run_step

from ccompile.core import Candidate, Choice
from ccompile.curves import TOLD, told, weighed
from ccompile.passes.split_svd import SplitSvd

CHOICES = [Choice(0.0, 0.0, 100, 1000), Choice(8.0, 0.1, 80, 800), Choice(4.0, 0.3, 40, 400)]
DENSE = """
g (float[N, 24] x) => (float[N, 20] y) <float[24, 20] w> { y = MatMul(x, w) }
"""


def step(**options: object) -> SplitSvd:
    return SplitSvd.model_validate({"tolerance": {"argmax": 0.1}, "rank": 8, **options})


def test_the_choice_taken_is_the_one_marked() -> None:
    found = weighed(step(), CHOICES, CHOICES[1])
    assert [(one.technique, one.cost, one.chosen) for one in found] == [
        ("split-svd", 400, False),
        ("split-svd", 800, True),
        ("none", 1000, False),
    ]


def test_a_site_left_whole_has_its_whole_form_marked() -> None:
    assert [one.technique for one in weighed(step(), CHOICES, None) if one.chosen] == ["none"]


@pytest.mark.parametrize(("budget", "unit"), [({"params": 0.5}, "params"), ({"macs": 0.5}, "macs")])
def test_cost_is_in_the_measure_of_the_budget(budget: dict[str, float], unit: str) -> None:
    assert {one.unit for one in weighed(step(rank=None, keep=budget), CHOICES, None)} == {unit}


def test_cost_is_in_bytes_where_weights_are_stored_in_fewer() -> None:
    choices = [Choice(float(n), n / 10, 100, 1000, stored_bytes=400.0 - n) for n in range(3)]
    assert [one.cost for one in weighed(step(), choices, None)] == [398, 399, 400]


def test_one_choice_is_no_curve() -> None:
    assert weighed(step(), CHOICES[:1], None) == ()


def test_of_many_the_ends_and_the_chosen_one_are_told() -> None:
    many = [Candidate("t", float(n), 0.0, None, float(n), n == 33) for n in range(1000)]
    costs = [one.cost for one in told(many)]
    assert len(costs) <= TOLD + 2
    assert (costs[0], costs[-1]) == (0, 999)
    assert 33 in costs
    assert costs == sorted(costs)


def test_an_applied_site_carries_its_curve_with_the_rank_that_was_taken() -> None:
    run = split(rank=5)
    (site,) = run.record.applied
    (taken,) = [one for one in site.candidates if one.chosen]
    assert (taken.technique, taken.strength) == ("split-svd", 5)
    errors = [one.error or 0.0 for one in site.candidates]
    assert errors == sorted(errors, reverse=True)  # cheapest first


def test_a_skipped_site_carries_its_curve() -> None:
    run = split(error=1e-9)
    (skip,) = run.record.skipped
    assert len(skip.candidates) > 2
    assert [one.technique for one in skip.candidates if one.chosen] == ["none"]


def split(**options: object) -> Bench:
    model, _ = model_of(DENSE)
    feeds = [{"x": np.random.default_rng(0).standard_normal((8, 24)).astype(np.float32)}]
    given = {"tolerance": {"relative_l2": 2}, "statistics": "weights", **options}
    return run_step(SplitSvd.model_validate(given), model, feeds)
