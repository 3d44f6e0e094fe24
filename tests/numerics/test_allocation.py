"""Allocation against brute force: exact where it says so, never over budget, the same answer every time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccompile.core import Array
from ccompile.numerics import allocation as module
from ccompile.numerics.allocation import Curve, allocate, allocate_interacting, exact, within


def curves_of(seed: int, sites: int = 4, options: int = 5, convex: bool = False, whole: bool = True) -> list[Curve]:
    rng = np.random.default_rng(seed)
    curves = []
    for _ in range(sites):
        costs = np.sort(rng.integers(0, 30, options) if whole else rng.uniform(0, 30, options))
        if convex:
            costs = np.arange(options) * int(rng.integers(1, 4))
            errors = np.cumsum(np.sort(rng.exponential(size=options)))[::-1]
        else:
            errors = (
                rng.permutation(np.sort(rng.exponential(size=options)))
                if seed % 2
                else np.sort(rng.random(options))[::-1]
            )
        curves.append(Curve(errors.copy(), costs))
    return curves


def error(curves: Sequence[Curve], choice: Sequence[int]) -> float:
    return float(sum(curve.errors[option] for curve, option in zip(curves, choice, strict=True)))


def cost(curves: Sequence[Curve], choice: Sequence[int]) -> float:
    return math.fsum(float(curve.costs[option]) for curve, option in zip(curves, choice, strict=True))


def brute_force(curves: Sequence[Curve], budget: float) -> float:
    every = itertools.product(*(range(len(curve.errors)) for curve in curves))
    return min((error(curves, choice) for choice in every if cost(curves, choice) <= budget), default=np.inf)


def budget_of(curves: Sequence[Curve], share: float) -> float:
    least, most = (math.fsum(float(f(curve.costs)) for curve in curves) for f in (np.min, np.max))
    return least + share * (most - least)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.83, 1.0])
@pytest.mark.parametrize("seed", range(8))
def test_the_dynamic_program_equals_brute_force(seed: int, share: float) -> None:
    curves = curves_of(seed)
    budget = budget_of(curves, share)
    choice = exact(curves, budget)
    assert cost(curves, choice) <= budget
    assert error(curves, choice) == pytest.approx(brute_force(curves, budget))
    assert allocate(curves, budget) == choice


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), sites=st.integers(1, 5), options=st.integers(1, 5))
def test_the_hull_walk_never_beats_the_optimum_nor_breaks_the_budget(
    seed: int, share: float, sites: int, options: int
) -> None:
    curves = curves_of(seed, sites, options, whole=False)
    budget = budget_of(curves, share * 0.999999)
    choice = allocate(curves, budget)
    assert cost(curves, choice) <= budget
    best = brute_force(curves, budget)
    assert best - 1e-12 <= error(curves, choice)
    spread = max(float(np.ptp(curve.errors)) for curve in curves)
    assert error(curves, choice) <= best + spread, "one step of one site is all that the hull can lose"


def test_the_hull_walk_is_close_to_the_optimum_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_CELLS", -1)
    gaps = []
    for seed in range(60):
        curves = curves_of(seed, sites=6, options=8)
        budget = budget_of(curves, 0.1 + 0.8 * (seed / 60))
        choice, best = allocate(curves, budget), error(curves, exact(curves, budget))
        assert cost(curves, choice) <= budget
        gaps.append(error(curves, choice) / best - 1)
    assert min(gaps) >= -1e-12
    assert np.mean(gaps) < 0.02


@pytest.mark.parametrize("seed", range(10))
def test_the_hull_walk_is_optimal_at_the_vertices_of_convex_curves(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_CELLS", -1)
    curves = curves_of(seed, sites=4, options=6, convex=True)
    for multiplier in (0.01, 0.1, 0.3, 1.0):
        vertex = [int((curve.errors + multiplier * curve.costs).argmin()) for curve in curves]
        budget = cost(curves, vertex)
        assert error(curves, allocate(curves, budget)) == pytest.approx(error(curves, exact(curves, budget)))


def test_a_larger_budget_never_costs_accuracy() -> None:
    curves = curves_of(3, sites=6, options=8)
    errors = [error(curves, allocate(curves, budget_of(curves, share))) for share in np.linspace(0, 1, 20)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("cells", [-1, 10**6])
def test_permuting_sites_and_options_permutes_the_answer(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_CELLS", cells)
    for seed in range(0, 20, 2):
        curves = curves_of(seed, sites=5, options=6)
        budget, rng = budget_of(curves, 0.5), np.random.default_rng(seed)
        plain, order = allocate(curves, budget), rng.permutation(5)
        assert error(curves, plain) == pytest.approx(
            error([curves[i] for i in order], allocate([curves[i] for i in order], budget))
        )
        options = rng.permutation(6)
        shuffled = [Curve(curve.errors[options], curve.costs[options]) for curve in curves]
        assert error(shuffled, allocate(shuffled, budget)) == pytest.approx(error(curves, plain))


@pytest.mark.parametrize("cells", [-1, 10**6])
def test_a_sensitive_site_keeps_its_strength(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_CELLS", cells)
    curve = Curve(np.array([0.0, 0.1, 0.3, 0.6]), np.array([4, 3, 2, 1]))
    assert allocate([curve, curve], 5, [1.0, 100.0]) == [3, 0]
    assert allocate([curve, curve], 5, [100.0, 1.0]) == [0, 3]


def test_a_plan_whose_price_is_no_plain_sum_is_corrected_until_it_keeps_the_limit() -> None:
    asked: list[float] = []

    def solve(left: float) -> float:
        asked.append(left)
        return left

    assert within(solve, lambda plan: plan + 3.0, limit=10.0, left=9.0) == 7.0
    assert asked == [9.0, 7.0]


def test_a_price_in_stairs_is_met_though_each_one_is_hardly_over() -> None:
    plan = within(lambda left: left, lambda plan: 5.0 * math.ceil(plan / 5.0 + 0.001), limit=99.9, left=99.0)
    assert 90.0 <= plan < 95.0


def test_a_correction_beyond_the_cheapest_plan_is_taken_back() -> None:
    def solve(left: float) -> float:
        if left < 7.5:
            raise ValueError("cannot be reached")
        return left

    assert 7.5 <= within(solve, lambda plan: 10.1 if plan > 8.0 else 9.9, limit=10.0, left=8.3) <= 8.0
    with pytest.raises(ValueError, match="cannot be reached"):
        within(solve, lambda plan: plan, limit=10.0, left=7.0)


def test_a_limit_that_no_correction_reaches_is_refused() -> None:
    with pytest.raises(ValueError, match="none keeps it"):
        within(lambda left: left, lambda _: 11.0, limit=10.0, left=10.0)


@pytest.mark.parametrize("cells", [-1, 10**6])
def test_everything_fits_or_nothing_does(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_CELLS", cells)
    curves = curves_of(4)
    assert error(curves, allocate(curves, 1e9)) == sum(float(curve.errors.min()) for curve in curves)
    least = sum(float(curve.costs.min()) for curve in curves)
    assert cost(curves, allocate(curves, least)) == least
    with pytest.raises(ValueError, match=rf"budget of {least - 1:g} .* still cost {least:g}"):
        allocate(curves, least - 1)
    with pytest.raises(ValueError, match="cannot be reached"):
        exact(curves, least - 1)
    assert allocate([], 0) == []


def test_equal_errors_take_the_cheaper_then_the_earlier_option() -> None:
    curve = Curve(np.array([1.0, 1.0, 1.0]), np.array([5, 2, 2]))
    assert allocate([curve], 10) == exact([curve], 10) == [1]
    assert allocate([Curve(curve.errors, curve.costs + 0.5)], 10) == [1]


def test_large_costs_with_a_common_divisor_stay_exact() -> None:
    curves = [Curve(curve.errors, curve.costs * 36_864 + 7) for curve in curves_of(5)]
    budget = budget_of(curves, 0.4)
    assert error(curves, exact(curves, budget)) == pytest.approx(brute_force(curves, budget))


def test_many_sites_spend_nearly_the_whole_budget() -> None:
    curves = curves_of(6, sites=60, options=300, whole=False)
    budget = budget_of(curves, 0.5)
    assert 0.999 * budget < cost(curves, allocate(curves, budget)) <= budget


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="one error and one cost"):
        Curve(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="not finite"):
        Curve(np.array([np.nan]), np.zeros(1))
    with pytest.raises(ValueError, match="1 sensitivities for 4 sites"):
        allocate(curves_of(0), 100, [1.0])
    with pytest.raises(ValueError, match="negative"):
        allocate(curves_of(0), 100, [-1.0] * 4)
    with pytest.raises(ValueError, match="integer costs"):
        exact(curves_of(0, whole=False), 100)


class Chain:
    """Layers in a row: layer l costs area[l] * kept[l] * kept[l + 1]; option c of a site keeps its width minus c."""

    def __init__(self, seed: int, widths: Sequence[int]) -> None:
        rng = np.random.default_rng(seed)
        self.widths, self.area = np.array(widths), rng.integers(1, 5, len(widths) + 1)
        self.errors = [np.cumsum(np.append(0, rng.exponential(size=width - 1))) for width in widths]
        if seed % 2:
            self.errors = [np.append(0, np.cumsum(np.sort(np.diff(error)))) for error in self.errors]

    def cost(self, choices: Array) -> Array:
        kept = np.pad(self.widths - choices, ((0, 0), (1, 1)), constant_values=3)
        total: Array = (self.area * kept[:, 1:] * kept[:, :-1]).sum(1)
        return total

    def error(self, choice: Sequence[int]) -> float:
        return float(sum(error[option] for error, option in zip(self.errors, choice, strict=True)))

    def brute_force(self, budget: float) -> float:
        every = np.array(list(itertools.product(*(range(width) for width in self.widths))))
        sums = sum(error[every[:, site]] for site, error in enumerate(self.errors))
        return float(np.min(sums, where=self.cost(every) <= budget, initial=np.inf))

    def budget(self, share: float) -> float:
        full = np.zeros((1, len(self.widths)), int)
        return float(share * self.cost(full)[0])


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("seed", range(8))
def test_two_interacting_sites_reach_the_optimum(seed: int, share: float) -> None:
    chain = Chain(seed, [8, 11])
    choice = allocate_interacting(chain.errors, chain.cost, chain.budget(share))
    assert chain.cost(np.array([choice]))[0] <= chain.budget(share)
    assert chain.error(choice) == pytest.approx(chain.brute_force(chain.budget(share)))


def test_four_interacting_sites_come_close_and_hold_the_budget() -> None:
    gaps = []
    for seed, share in itertools.product(range(10), (0.3, 0.5, 0.8)):
        chain = Chain(seed, [7, 9, 6, 8])
        choice, best = (
            allocate_interacting(chain.errors, chain.cost, chain.budget(share)),
            chain.brute_force(chain.budget(share)),
        )
        assert chain.cost(np.array([choice]))[0] <= chain.budget(share)
        gaps.append(chain.error(choice) / best - 1)
    assert min(gaps) >= -1e-12
    assert np.mean(gaps) < 0.02
    assert max(gaps) < 0.2


def test_without_interaction_it_agrees_with_the_knapsack() -> None:
    gaps = []
    for seed in range(0, 20, 2):
        curves = curves_of(seed, sites=4, options=6)
        table = [curve.costs for curve in curves]
        total = sum_of(table)
        budget = budget_of(curves, 0.5)
        choice = allocate_interacting([curve.errors for curve in curves], total, budget)
        assert cost(curves, choice) <= budget
        gaps.append(error(curves, choice) / error(curves, exact(curves, budget)) - 1)
    assert np.mean(gaps) < 0.02


def sum_of(table: Sequence[Array]) -> module.CostFunction:
    def total(choices: Array) -> Array:
        sums: Array = np.sum([costs[choices[:, site]] for site, costs in enumerate(table)], 0)
        return sums

    return total


def test_interacting_ends_are_the_mildest_and_the_cheapest_choice() -> None:
    chain = Chain(1, [5, 6, 4])
    assert allocate_interacting(chain.errors, chain.cost, chain.budget(1.0)) == [0, 0, 0]
    least = float(chain.cost(np.array([[4, 5, 3]]))[0])
    assert allocate_interacting(chain.errors, chain.cost, least) == [4, 5, 3]
    with pytest.raises(ValueError, match=f"still cost {least:g}"):
        allocate_interacting(chain.errors, chain.cost, least - 1)


def test_interacting_sensitivity_moves_the_burden() -> None:
    chain = Chain(2, [9, 9])
    budget = chain.budget(0.5)
    first = allocate_interacting(chain.errors, chain.cost, budget, [100.0, 1.0])
    second = allocate_interacting(chain.errors, chain.cost, budget, [1.0, 100.0])
    assert first[0] < second[0]
    assert first[1] > second[1]


def test_a_deep_chain_spends_nearly_the_whole_budget() -> None:
    chain = Chain(3, [64] * 20)
    choice = allocate_interacting(chain.errors, chain.cost, chain.budget(0.5))
    assert 0.999 * chain.budget(0.5) < chain.cost(np.array([choice]))[0] <= chain.budget(0.5)
