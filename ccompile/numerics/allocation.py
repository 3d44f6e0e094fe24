"""Spend one budget across many sites: a strength for each, so that the summed error is least.

Multiple-choice knapsack: minimise sum_l s_l e_l(c_l) subject to sum_l cost_l(c_l) <= budget, one option c_l per site.
Small integer cases are solved exactly; larger ones by walking the lower convex hulls in order of slope (which visits
the solutions of the Lagrangian for falling multipliers, without a bisection), filling the slack, and exchanging between
pairs of sites. When sites share costs (multiply-adds of a pruned layer: kept inputs times kept outputs) the total is a
function of all choices, see `allocate_interacting`.

Equal sums are resolved the same way every time: the cheaper option, then the earlier one.

Source: Shoham and Gersho 1988; Sinha and Zoltners 1979 (hulls); Frantar and Alistarh 2022, arXiv:2201.13096 (SPDY, DP).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
T = TypeVar("T")

# Up to this many (site, budget unit) cells the dynamic program answers within a second.
EXACT_CELLS = 2_000_000
# Pair moves of interacting sites try options up to this far from the current ones, in order of error.
WINDOW = 15
# Corrections of a budget whose measure is not a plain sum.
ROUNDS = 8
# A plan this close below its budget is spent well enough.
NEAR = 0.01

CostFunction = Callable[[Array], Array]


@dataclass(frozen=True, eq=False)
class Curve:
    """The options of one site: `errors[c]` >= 0 (comparable between sites) and `costs[c]` (what the budget counts)."""

    errors: Array
    costs: Array

    def __post_init__(self) -> None:
        if self.errors.ndim != 1 or self.errors.shape != self.costs.shape or not len(self.errors):
            raise ValueError(
                f"a curve needs one error and one cost per option, got {self.errors.shape}, {self.costs.shape}"
            )
        if not (np.isfinite(self.errors).all() and np.isfinite(self.costs).all()):
            raise ValueError("a curve has an error or a cost that is not finite")


def allocate(curves: Sequence[Curve], budget: float, sensitivity: Sequence[float] | None = None) -> list[int]:
    """Return the option of each site with the least sum of sensitivity * error whose costs sum to at most `budget`.

    Exact when all costs are integers and there are few cells (EXACT_CELLS), else near: at most one hull step of the
    optimum away, and optimal on convex curves when the budget falls on a vertex. Raises ValueError when the cheapest
    options exceed the budget.

    >>> curve = Curve(np.array([0.0, 1.0, 4.0]), np.array([3, 2, 1]))
    >>> allocate([curve, curve], 4, sensitivity=[1.0, 10.0])
    [2, 0]
    """
    errors = _weighted([curve.errors for curve in curves], sensitivity)
    costs = [curve.costs.astype(np.float64) for curve in curves]
    _check_reachable(math.fsum(float(cost.min()) for cost in costs), budget)
    if _cells(costs, budget) <= EXACT_CELLS:
        return _solve_exactly(errors, costs, budget)
    choice = _walk_hulls(errors, costs, budget)
    _fill(errors, costs, budget, choice)
    while _exchange(errors, costs, budget, choice):
        _fill(errors, costs, budget, choice)
    return choice


def within(solve: Callable[[float], T], price: Callable[[T], float], limit: float, left: float) -> T:
    """Return a solve(left) whose price is at most `limit`, for a price that the sum below `left` only approximates.

    What the price is over comes off `left`, twice as much each time; a plan that leaves more than NEAR of the limit is
    bettered by bisection. ROUNDS plans are priced at most. Raises ValueError when none fits, or what `solve` raises
    when not even the first `left` can be reached.

    >>> within(int, lambda plan: 1.5 * plan, limit=10.0, left=10.0)
    6
    """
    found: list[T] = []
    low, high, step = -math.inf, math.inf, 0.0  # what fits or cannot be reached, what does not fit
    for _ in range(ROUNDS):
        try:
            plan = solve(left)
        except ValueError:
            if math.isinf(high):
                raise
            low = left
        else:
            over = price(plan) - limit
            if over <= 1e-9 * limit:
                found.append(plan)
                low = left
                if math.isinf(high) or over >= -NEAR * limit:
                    break
            else:
                high, step = left, max(over, 2 * step)
        left = high - step if math.isinf(low) else (low + high) / 2
    if not found:
        raise ValueError(f"{ROUNDS} plans were priced, and none keeps it")
    return found[-1]


def exact(curves: Sequence[Curve], budget: float) -> list[int]:
    """Return the optimum for integer costs by dynamic programming over the budget; memory sites * budget units.

    Raises ValueError for costs that are not integers, and when the cheapest options exceed the budget.

    >>> exact([Curve(np.array([0.0, 1.0]), np.array([5, 3])), Curve(np.array([0.0, 3.0]), np.array([5, 1]))], 8)
    [1, 0]
    """
    costs = [curve.costs.astype(np.float64) for curve in curves]
    if not math.isfinite(_cells(costs, budget)):
        raise ValueError("the dynamic program needs integer costs")
    _check_reachable(math.fsum(float(cost.min()) for cost in costs), budget)
    return _solve_exactly([curve.errors.astype(np.float64) for curve in curves], costs, budget)


def allocate_interacting(
    errors: Sequence[Array], cost: CostFunction, budget: float, sensitivity: Sequence[float] | None = None
) -> list[int]:
    """Return the option of each site with a small sum of errors whose joint cost is at most `budget`.

    `errors[l][c]`, in any order. `cost(choices[m, L]) -> [m]` prices m whole choice vectors at once; it must be
    monotone: which option of a site is the cheapest does not depend on the other sites.

    For a multiplier lam, coordinate descent on sum e + lam cost(choice), which prices each site exactly around the
    current choice and ends in a fixed point; lam is bisected until the budget holds; then single and pair moves on the
    true costs lower the error while anything fits. The budget holds exactly; the optimum is not promised. Raises
    ValueError when even the cheapest options exceed the budget.

    >>> def macs(choices):  # of three layers: 1 -> k, k -> m, m -> 1 channels, with 2 or 1 kept
    ...     k, m = (2 - choices).T
    ...     return k + k * m + m
    >>> allocate_interacting([np.array([0.0, 1.0]), np.array([0.0, 3.0])], macs, 5)
    [1, 0]
    """
    problem = _Interacting(_weighted(list(errors), sensitivity), cost, budget)
    _check_reachable(problem.price(problem.cheapest), budget)
    mildest = np.array([int(error.argmin()) for error in problem.errors])
    if problem.price(mildest) <= budget:
        return [int(option) for option in mildest]
    found = [problem.polish(start) for start in problem.bisect(mildest)]
    best = min(found, key=lambda choice: (problem.error(choice), choice.tolist()))
    return [int(option) for option in best]


def _weighted(errors: Sequence[Array], sensitivity: Sequence[float] | None) -> list[Array]:
    if sensitivity is None:
        sensitivity = [1.0] * len(errors)
    if len(sensitivity) != len(errors):
        raise ValueError(f"{len(sensitivity)} sensitivities for {len(errors)} sites")
    if not all(math.isfinite(scale) and scale >= 0 for scale in sensitivity):
        raise ValueError("a sensitivity is negative or not finite")
    return [scale * error.astype(np.float64) for scale, error in zip(sensitivity, errors, strict=True)]


def _check_reachable(least: float, budget: float) -> None:
    if not least <= budget:
        raise ValueError(
            f"the budget of {budget:.12g} cannot be reached: the strongest options still cost {least:.12g}"
        )


def _units(costs: Sequence[Array], budget: float) -> tuple[list[Array], int]:
    """Return each cost above its site's cheapest, in units of their greatest common divisor, and the budget's units."""
    over = [np.rint(cost - cost.min()).astype(np.int64) for cost in costs]
    divisor = max(int(np.gcd.reduce(np.concatenate(over))), 1) if over else 1
    slack = math.floor(budget - math.fsum(float(cost.min()) for cost in costs))
    most = sum(int(cost.max()) for cost in over)
    return [cost // divisor for cost in over], max(min(slack, most), 0) // divisor


def _cells(costs: Sequence[Array], budget: float) -> float:
    """Return the size of the dynamic program, infinite when a cost is not an integer that float64 holds exactly."""
    if not math.isfinite(budget) or not all(
        (cost == np.rint(cost)).all() and abs(cost).max() < 2**53 for cost in costs
    ):
        return math.inf
    return float(len(costs) * (_units(costs, budget)[1] + 1))


def _solve_exactly(errors: Sequence[Array], costs: Sequence[Array], budget: float) -> list[int]:
    """Fill best[u] = least error of the sites so far for at most u units, site by site, and trace the choices back."""
    units, capacity = _units(costs, budget)
    best = np.zeros(capacity + 1)
    taken = []
    for error, unit in zip(errors, units, strict=True):
        least, option_of = np.full(capacity + 1, np.inf), np.zeros(capacity + 1, np.int32)
        for option in np.lexsort((np.arange(len(unit)), unit)):
            first = int(unit[option])
            if first > capacity:
                break
            sums = best[: capacity + 1 - first] + error[option]
            better = sums < least[first:]
            least[first:][better], option_of[first:][better] = sums[better], option
        best = least
        taken.append(option_of)
    left, choice = capacity, []
    for unit, option_of in zip(reversed(units), reversed(taken), strict=True):
        choice.append(int(option_of[left]))
        left -= int(unit[choice[-1]])
    return choice[::-1]


def _walk_hulls(errors: Sequence[Array], costs: Sequence[Array], budget: float) -> list[int]:
    """Start at the cheapest options and take the hull steps with the most error saved per cost while they fit.

    A site whose step does not fit stays where it is, others go on.
    """
    hulls = [_hull(error, cost) for error, cost in zip(errors, costs, strict=True)]
    steps = []
    for site, hull in enumerate(hulls):
        key = -math.inf
        for index, (low, high) in enumerate(itertools.pairwise(hull)):
            saved = (errors[site][low] - errors[site][high]) / (costs[site][high] - costs[site][low])
            key = max(key, -float(saved))
            steps.append((key, site, index))
    choice, stuck = [hull[0] for hull in hulls], set()
    total = _total(costs, choice)
    for _, site, index in sorted(steps):
        low, high = hulls[site][index], hulls[site][index + 1]
        after = total + costs[site][high] - costs[site][low]
        if site in stuck or after > budget:
            stuck.add(site)
            continue
        choice[site], total = high, after
    # Running sums round; give back the last steps that only fitted by rounding.
    for _, site, index in sorted(steps, reverse=True):
        if _total(costs, choice) <= budget:
            break
        if choice[site] == hulls[site][index + 1]:
            choice[site] = hulls[site][index]
    return choice


def _hull(errors: Array, costs: Array) -> list[int]:
    """Return the options on the lower convex hull, from the cheapest to the least error."""
    hull: list[int] = []
    for option in np.lexsort((np.arange(len(costs)), errors, costs)).tolist():
        if hull and errors[option] >= errors[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (errors[a] - errors[b]) * (costs[option] - costs[a]) > (errors[a] - errors[option]) * (
                costs[b] - costs[a]
            ):
                break
            hull.pop()
        hull.append(option)
    return hull


def _total(costs: Sequence[Array], choice: Sequence[int]) -> float:
    return math.fsum(float(cost[option]) for cost, option in zip(costs, choice, strict=True))


def _fill(errors: Sequence[Array], costs: Sequence[Array], budget: float, choice: list[int]) -> None:
    """Improve one site at a time, each time the largest saving that fits, in place."""
    while True:
        best, slack = (0.0, 0.0, -1, -1), budget - _total(costs, choice)
        for site, (error, cost) in enumerate(zip(errors, costs, strict=True)):
            gain = np.where(cost - cost[choice[site]] <= slack, error[choice[site]] - error, -np.inf)
            option = int(np.lexsort((np.arange(len(cost)), cost, -gain))[0])
            trial = [*choice[:site], option, *choice[site + 1 :]]
            if gain[option] > 0 and _total(costs, trial) <= budget:
                best = min(best, (-float(gain[option]), float(cost[option]), site, option))
        if best[2] < 0:
            return
        choice[best[2]] = best[3]


def _exchange(errors: Sequence[Array], costs: Sequence[Array], budget: float, choice: list[int]) -> bool:
    """Re-choose, in place, the two sites that together lower the error most; return whether there are any."""
    frontiers = [_frontier(error, cost) for error, cost in zip(errors, costs, strict=True)]
    slack, best = budget - _total(costs, choice), (0.0, choice)
    for first, second in itertools.combinations(range(len(errors)), 2):
        now = errors[first][choice[first]] + errors[second][choice[second]]
        rest = slack + costs[first][choice[first]] + costs[second][choice[second]]
        mine, other = frontiers[first], frontiers[second]
        fit = np.searchsorted(costs[second][other], rest - costs[first][mine], side="right") - 1
        sums = np.where(fit >= 0, errors[first][mine] + errors[second][other[fit]], np.inf)
        at = int(sums.argmin())
        gain = float(now - sums[at])
        if gain <= max(best[0], 1e-12 * abs(now)):
            continue
        trial = list(choice)
        trial[first], trial[second] = int(mine[at]), int(other[fit[at]])
        if _total(costs, trial) <= budget:
            best = (gain, trial)
    choice[:] = best[1]
    return best[0] > 0


def _frontier(errors: Array, costs: Array) -> Array:
    """Return the options that no cheaper or equal one beats, by rising cost and falling error."""
    order = np.lexsort((np.arange(len(costs)), errors, costs))
    least = np.minimum.accumulate(errors[order])
    frontier: Array = order[np.concatenate([[True], errors[order][1:] < least[:-1]])]
    return frontier


class _Interacting:
    """Sites whose costs depend on one another."""

    def __init__(self, errors: list[Array], cost: CostFunction, budget: float) -> None:
        self.errors, self.cost, self.budget = errors, cost, budget
        start = np.zeros(len(errors), np.int64)
        self.cheapest = np.array([int(self._priced(start, site).argmin()) for site in range(len(errors))], np.int64)

    def price(self, choice: Array) -> float:
        """Return the cost of one choice vector."""
        return float(self.cost(choice[None])[0])

    def error(self, choice: Array) -> float:
        """Return the summed error of one choice vector."""
        return math.fsum(float(error[option]) for error, option in zip(self.errors, choice, strict=True))

    def _priced(self, choice: Array, site: int) -> Array:
        """Return the total cost for every option of `site`, the others as they are."""
        trials = np.repeat(choice[None], len(self.errors[site]), 0)
        trials[:, site] = np.arange(len(trials))
        return self.cost(trials)

    def descend(self, multiplier: float, choice: Array) -> Array:
        """Return a fixed point of coordinate descent on error + multiplier * cost, from `choice`."""
        choice, changed = choice.copy(), True
        while changed:
            changed = False
            for site, error in enumerate(self.errors):
                value = error + multiplier * self._priced(choice, site)
                option = int(value.argmin())
                # Only real progress counts: rounding must not make it turn in circles.
                if value[option] < value[choice[site]] - 1e-12 * abs(value[choice[site]]):
                    choice[site], changed = option, True
        return choice

    def bisect(self, mildest: Array, rounds: int = 40) -> list[Array]:
        """Return choices within the budget: the cheapest, and the best found while bisecting the multiplier."""
        scale = max(sum(float(error.max()) for error in self.errors), 1e-300)
        high = scale / max(abs(self.price(mildest)), 1e-300)
        low, current, found = 0.0, mildest, [self.cheapest]
        for _ in range(rounds):
            if self.price(self.descend(high, mildest)) <= self.budget:
                break
            high *= 8
        for _ in range(rounds):
            middle = (low + high) / 2
            trials = [self.descend(middle, start) for start in (mildest, current, self.cheapest)]
            fitting = [trial for trial in trials if self.price(trial) <= self.budget]
            found += fitting
            low, high = (low, middle) if fitting else (middle, high)
            current = min(trials, key=lambda trial: self.error(trial) + middle * self.price(trial))
        unique = {tuple(choice.tolist()): choice for choice in found}
        return sorted(unique.values(), key=lambda choice: (self.error(choice), choice.tolist()))[:3] + [self.cheapest]

    def polish(self, choice: Array) -> Array:
        """Lower the error by single and pair moves that keep the budget, until there is none."""
        choice = choice.copy()
        while self._move_one(choice) or self._move_two(choice):
            pass
        return choice

    def _move_one(self, choice: Array) -> bool:
        best = (0.0, -1, -1)
        for site, error in enumerate(self.errors):
            gain = np.where(self._priced(choice, site) <= self.budget, error[choice[site]] - error, -np.inf)
            option = int(gain.argmax())
            best = min(best, (-float(gain[option]), site, option))
        if best[1] < 0:
            return False
        choice[best[1]] = best[2]
        return True

    def _move_two(self, choice: Array) -> bool:
        """Re-choose the first pair of sites that can lower the error together, in place."""
        near = [self._near(error, int(option)) for error, option in zip(self.errors, choice, strict=True)]
        for first in range(len(near)):
            for second in range(first + 1, len(near)):
                a, b = (grid.ravel() for grid in np.meshgrid(near[first], near[second], indexing="ij"))
                now = self.errors[first][choice[first]] + self.errors[second][choice[second]]
                sums = self.errors[first][a] + self.errors[second][b]
                tried = np.flatnonzero(sums < now - 1e-12 * abs(now))
                trials = np.repeat(choice[None], len(tried), 0)
                trials[:, first], trials[:, second] = a[tried], b[tried]
                fits = tried[self.cost(trials) <= self.budget] if len(tried) else tried
                if len(fits):
                    at = fits[sums[fits].argmin()]
                    choice[first], choice[second] = a[at], b[at]
                    return True
        return False

    @staticmethod
    def _near(error: Array, option: int) -> Array:
        """Return the options within WINDOW places of `option` in order of error."""
        order = np.argsort(error, kind="stable")
        place = int(np.flatnonzero(order == option)[0])
        near: Array = order[max(0, place - WINDOW) : place + WINDOW + 1]
        return near
