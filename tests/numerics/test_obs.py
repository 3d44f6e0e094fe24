"""Structured OBS against constrained least squares, brute force and planted redundancy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from ccompile.numerics import consumers, obs, saliency
from ccompile.numerics.obs import Consumer, remove_units, repair, subset_loss, swap_search

F = npt.NDArray[np.float64]


def sample(
    seed: int, units: int = 6, b: int = 1, o: int = 4, fixed: int = 0, n: int = 200, weight: float = 1.0
) -> tuple[Consumer, F]:
    """Return a consumer with correlated inputs in shuffled column order, and its inputs X[n, d]."""
    rng = np.random.default_rng(seed)
    d = units * b + fixed
    X = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)
    unit = rng.permutation(np.concatenate([np.repeat(np.arange(units), b), np.full(fixed, -1)]))
    return Consumer(rng.normal(size=(o, d)), X.T @ X, unit, weight), X


def best_loss(consumer: Consumer, X: F, keep: Sequence[int]) -> float:
    """Return min |W X - W' X|^2 over W' on the kept columns, by numpy's least squares."""
    columns = np.isin(consumer.unit, [*keep, -1])
    Y = X @ consumer.W.T
    fit = np.linalg.lstsq(X[:, columns], Y, rcond=None)[0] if columns.any() else np.zeros((0, Y.shape[1]))
    return consumer.weight * float(np.square(Y - X[:, columns] @ fit).sum())


@pytest.mark.parametrize(("b", "fixed"), [(1, 0), (1, 3), (4, 0), (9, 2)])
def test_the_loss_of_a_subset_is_that_of_constrained_least_squares(b: int, fixed: int) -> None:
    consumer, X = sample(1, b=b, fixed=fixed)
    for keep in ([], [2], [0, 3], [1, 2, 4, 5], list(range(6))):
        want = best_loss(consumer, X, keep)
        assert subset_loss([consumer], np.array(keep), 0.0) == pytest.approx(want, rel=1e-10, abs=1e-9)


@pytest.mark.parametrize("b", [1, 4])
def test_a_removal_is_the_cheapest_and_its_loss_that_of_least_squares(b: int) -> None:
    pairs = [sample(2, units=7, b=b, fixed=2), sample(3, units=7, b=b, o=3, weight=0.3)]
    trace = remove_units([consumer for consumer, _ in pairs], 0.0)
    assert sorted(trace.order.tolist()) == list(range(7))
    for k in range(7):
        alive = np.setdiff1d(np.arange(7), trace.order[:k])
        options = {u: sum(best_loss(c, X, [v for v in alive if v != u]) for c, X in pairs) for u in alive.tolist()}
        assert min(options, key=lambda u: options[u]) == trace.order[k]
        assert trace.loss[k] == pytest.approx(options[int(trace.order[k])], rel=1e-10)


@pytest.mark.parametrize("ridge", [0.0, 0.01])
@pytest.mark.parametrize(("units", "b", "o", "fixed"), [(300, 1, 5, 0), (60, 9, 5, 0), (60, 9, 1, 0), (40, 4, 3, 70)])
def test_the_trace_agrees_with_the_subset_loss_through_flushes_and_refreshes(
    units: int, b: int, o: int, fixed: int, ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obs, "PANEL_COLUMNS", 16)
    consumer, _ = sample(4, units=units, b=b, o=o, fixed=fixed, n=1500)
    trace = remove_units([consumer], ridge)
    for k in (1, 10, units // 2, units - 3):
        want = subset_loss([consumer], trace.keep(units - k), ridge)
        assert trace.loss[k - 1] == pytest.approx(want, rel=1e-9)


def test_columns_outside_the_group_are_factored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(H: F) -> F:
        sizes.append(len(H))
        return consumers.invert(H)

    monkeypatch.setattr(obs, "invert", counted)
    consumer, _ = sample(4, units=32, fixed=90)
    remove_units([consumer], 0.01)
    assert len(sizes) >= 4, "it starts afresh whenever half is gone"
    assert max(sizes) <= 16


def test_units_may_differ_in_size_and_be_absent_from_a_consumer() -> None:
    rng = np.random.default_rng(5)
    X, Z = rng.normal(size=(80, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(80, 3))
    first = Consumer(rng.normal(size=(2, 6)), X.T @ X, np.array([3, 0, 0, -1, 3, 3]))
    second = Consumer(rng.normal(size=(2, 3)), Z.T @ Z, np.array([1, 0, 1]))
    trace = remove_units([first, second], 0.0)
    assert trace.units == 4
    assert trace.order[0] == 2, "nobody reads unit 2"
    for k in range(1, 5):
        keep = trace.keep(4 - k).tolist()
        want = best_loss(first, X, keep) + best_loss(second, Z, keep)
        assert trace.loss[k - 1] == pytest.approx(want, rel=1e-10, abs=1e-12)


def test_repair_is_the_least_squares_solution_and_its_residual_is_orthogonal() -> None:
    consumer, X = sample(6, b=4, fixed=2)
    keep = np.array([0, 2, 5])
    W, shift = repair(consumer, keep, 0.0)
    columns = np.isin(consumer.unit, [0, 2, 5, -1])
    want = np.linalg.lstsq(X[:, columns], X @ consumer.W.T, rcond=None)[0].T
    np.testing.assert_allclose(W[:, columns], want, rtol=1e-10, atol=1e-10)
    assert not W[:, ~columns].any()
    assert not shift.any()
    np.testing.assert_allclose((consumer.W - W) @ X.T @ X[:, columns], 0, atol=1e-7)


def test_centring_is_least_squares_with_a_bias_and_never_worse() -> None:
    consumer, X = sample(7, n=60)
    centred = Consumer(consumer.W, consumer.H, consumer.unit, mean=X.mean(0), count=len(X))
    keep = np.array([1, 4])
    W, shift = repair(centred, keep, 0.0)
    error = float(np.square(X @ (consumer.W - W).T - shift).sum())
    assert subset_loss([centred], keep, 0.0) == pytest.approx(error, rel=1e-10)
    Y, design = X @ consumer.W.T, np.column_stack([X[:, np.isin(consumer.unit, keep)], np.ones(len(X))])
    residual = Y - design @ np.linalg.lstsq(design, Y, rcond=None)[0]
    assert error == pytest.approx(float(np.square(residual).sum()), rel=1e-10)
    assert error <= subset_loss([consumer], keep, 0.0)


@pytest.mark.parametrize("kind", ["dead", "duplicate", "dependent", "constant"])
@pytest.mark.parametrize("b", [1, 4])
def test_planted_redundancy_goes_first_and_costs_nothing(kind: str, b: int) -> None:
    rng = np.random.default_rng(8)
    X = rng.normal(size=(300, 8, b)) + 1
    planted = {
        "dead": 0 * X[:, 1],
        "duplicate": X[:, 1],
        "dependent": 2 * X[:, 1] - X[:, 6],
        "constant": 0 * X[:, 1] + 3,
    }
    X[:, 4] = planted[kind]
    x = X.reshape(300, -1)
    mean = x.mean(0) if kind == "constant" else None
    consumer = Consumer(rng.normal(size=(5, 8 * b)), x.T @ x, np.repeat(np.arange(8), b), mean=mean, count=300)
    trace = remove_units([consumer], 0.0)
    assert trace.order[0] in {"dead": {4}, "duplicate": {1, 4}, "dependent": {1, 4, 6}, "constant": {4}}[kind]
    assert trace.loss[0] <= 1e-8 * trace.loss[-1] < trace.loss[1]
    for k in range(1, 8):
        assert trace.loss[k - 1] == pytest.approx(subset_loss([consumer], trace.keep(8 - k), 0.0), rel=1e-6, abs=1e-9)
    W, shift = repair(consumer, trace.keep(7), 0.0)
    np.testing.assert_allclose(x @ W.T + shift, x @ consumer.W.T, atol=1e-6)


def test_more_units_than_samples_reports_the_ridge_it_took() -> None:
    rng = np.random.default_rng(9)
    X = rng.normal(size=(10, 25))
    consumer = Consumer(rng.normal(size=(3, 25)), X.T @ X, np.arange(25))
    trace = remove_units([consumer], 0.0)
    assert trace.ridge == (1e-10,)
    assert trace.loss[14] < 1e-6 * trace.loss[-1], "15 of 25 columns are superfluous at rank 10"
    assert remove_units([sample(9)[0]], 0.0).ridge == (0.0,)
    assert remove_units([consumer], 0.01).ridge == (0.01,)


def test_a_dead_group_costs_nothing() -> None:
    trace = remove_units([Consumer(np.ones((2, 3)), np.zeros((3, 3)), np.arange(3))])
    assert not trace.loss.any()


@pytest.mark.parametrize("seed", range(5))
def test_swaps_are_never_worse_than_their_start_and_report_the_exact_loss(seed: int) -> None:
    pairs = [sample(seed, units=12, b=3, fixed=2), sample(seed + 50, units=12, b=1, o=2, weight=2.0)]
    consumers = [consumer for consumer, _ in pairs]
    start = np.random.default_rng(seed).choice(12, 5, replace=False)
    found = swap_search(consumers, start, ridge=0.0)
    assert len(found.keep) == 5
    assert found.swaps > 0
    assert found.loss < subset_loss(consumers, start, 0.0)
    assert found.loss == pytest.approx(sum(best_loss(c, X, found.keep.tolist()) for c, X in pairs), rel=1e-9)


def test_the_predicted_change_of_a_swap_is_exact() -> None:
    consumers = [sample(20, units=8, b=3)[0], sample(21, units=8, b=2, weight=0.5)[0]]
    start = np.array([0, 1, 2, 3])
    before, after = subset_loss(consumers, start, 0.0), swap_search(consumers, start, 1, 8, 0.0)
    options = [
        subset_loss(consumers, np.setdiff1d(np.append(start, unit), [out]), 0.0)
        for unit in range(4, 8)
        for out in start
    ]
    assert after.swaps == 1
    assert after.loss == pytest.approx(min(options), rel=1e-10)
    assert after.loss < before


def test_fixed_units_are_not_swapped_out() -> None:
    consumers = [sample(20, units=8, b=3)[0]]
    start = np.array([0, 1, 2, 3])
    free = swap_search(consumers, start, ridge=0.0).keep
    gone = np.setdiff1d(start, free)[:1]
    held = swap_search(consumers, start, ridge=0.0, fixed=gone.tolist())
    assert gone.size
    assert gone[0] in held.keep
    assert not np.array_equal(held.keep, start)


def test_greedy_with_swaps_reaches_the_optimum_in_most_seeds() -> None:
    optimal = better = 0
    for seed in range(20):
        consumers = [sample(seed, units=8, b=2, n=40)[0]]
        greedy = remove_units(consumers, 0.0).keep(4)
        found = swap_search(consumers, greedy, ridge=0.0)
        best = min(subset_loss(consumers, np.array(keep), 0.0) for keep in itertools.combinations(range(8), 4))
        assert best <= found.loss * (1 + 1e-9)
        assert found.loss <= subset_loss(consumers, greedy, 0.0)
        optimal += found.loss <= best * (1 + 1e-9)
        better += found.swaps > 0
    assert optimal >= 16
    assert better > 0


@pytest.mark.parametrize("keep", [[], list(range(6))])
def test_there_is_nothing_to_swap_at_the_ends(keep: list[int]) -> None:
    found = swap_search([sample(10)[0]], np.array(keep, int))
    assert found.keep.tolist() == keep
    assert found.swaps == 0


@pytest.mark.parametrize("seed", range(5))
def test_renaming_units_renames_the_answer(seed: int) -> None:
    consumer, _ = sample(seed, units=10, b=3)
    name = np.random.default_rng(seed).permutation(10)
    renamed = Consumer(consumer.W, consumer.H, name[consumer.unit])
    plain, other = remove_units([consumer]), remove_units([renamed])
    assert other.order.tolist() == name[plain.order].tolist()
    np.testing.assert_allclose(other.loss, plain.loss, rtol=1e-10)


def test_a_larger_ridge_never_lowers_the_loss_and_bounds_the_true_one() -> None:
    consumer, X = sample(11, b=4)
    losses = [subset_loss([consumer], np.array([0, 3]), ridge) for ridge in (0.0, 1e-4, 0.01, 0.1, 1.0)]
    assert losses == sorted(losses)
    W, _ = repair(consumer, np.array([0, 3]), 0.1)
    assert float(np.square(X @ (consumer.W - W).T).sum()) <= losses[3]


def test_with_a_diagonal_hessian_the_order_is_that_of_optimal_brain_damage() -> None:
    rng = np.random.default_rng(12)
    h, W = rng.uniform(1, 5, 9), rng.normal(size=(4, 9))
    trace = remove_units([Consumer(W, np.diag(h), np.arange(9))], 0.0)
    saliencies = h * np.square(W).sum(0)
    assert trace.order.tolist() == np.argsort(saliencies).tolist()
    np.testing.assert_allclose(trace.loss, np.cumsum(np.sort(saliencies)), rtol=1e-12)


def test_a_weight_scales_a_consumers_say() -> None:
    H, unit = np.eye(2), np.arange(2)
    first, second = np.array([[1.0, 2.0]]), np.array([[2.0, 1.0]])
    heavy = [Consumer(first, H, unit, weight=10.0), Consumer(second, H, unit)]
    light = [Consumer(first, H, unit, weight=0.1), Consumer(second, H, unit)]
    assert remove_units(heavy, 0.0).order[0] == 0
    assert remove_units(light, 0.0).order[0] == 1


def test_a_limit_stops_early_on_the_same_path() -> None:
    consumer, _ = sample(13, b=4)
    whole, part = remove_units([consumer]), remove_units([consumer], limit=2)
    assert part.order.tolist() == whole.order[:2].tolist()
    assert part.keep(4).tolist() == whole.keep(4).tolist()
    with pytest.raises(ValueError, match="cannot keep 3"):
        part.keep(3)


def test_inputs_are_left_alone() -> None:
    consumer, X = sample(14)
    consumer = Consumer(consumer.W, consumer.H, consumer.unit, mean=X.mean(0), count=len(X))
    W, H = consumer.W.copy(), consumer.H.copy()
    swap_search([consumer], remove_units([consumer]).keep(3))
    repair(consumer, np.array([1]))
    assert np.array_equal(consumer.W, W)
    assert np.array_equal(consumer.H, H)


def test_wrong_shapes_and_values_are_refused() -> None:
    with pytest.raises(ValueError, match="need"):
        Consumer(np.ones((2, 3)), np.eye(2), np.arange(3))
    with pytest.raises(ValueError, match="number of samples"):
        Consumer(np.ones((2, 3)), np.eye(3), np.arange(3), mean=np.zeros(3))
    with pytest.raises(ValueError, match="not finite"):
        Consumer(np.full((2, 3), np.nan), np.eye(3), np.arange(3))
    with pytest.raises(ValueError, match="booleans"):
        subset_loss([sample(0)[0]], np.ones(6, bool))
    with pytest.raises(ValueError, match="at least one"):
        remove_units([])
    with pytest.raises(np.linalg.LinAlgError, match="positive definite"):
        remove_units([Consumer(np.ones((1, 2)), np.array([[1.0, 9.0], [9.0, 1.0]]), np.arange(2))])


def test_simple_criteria_ignore_the_order_of_rows() -> None:
    rng = np.random.default_rng(15)
    rows, order = rng.normal(size=(9, 5)), rng.permutation(9)
    for criterion in (saliency.l1_norms, saliency.l2_norms, saliency.median_distances):
        np.testing.assert_allclose(criterion(rows[order]), criterion(rows)[order])
    assert np.array_equal(
        saliency.random_scores(4, np.random.default_rng(0)), saliency.random_scores(4, np.random.default_rng(0))
    )
