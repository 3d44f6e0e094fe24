"""One-dimensional k-means: brute force, Lloyd from any start, many rows at once, and the mixture."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccompile.numerics import kmeans

F = npt.NDArray[np.float64]


def brute(values: F, weights: F, k: int) -> float:
    """The least cost over all cuts of the sorted values into at most k intervals."""
    order = np.argsort(values)
    x, h = values[order], weights[order]
    costs = []
    for count in range(min(k, len(x))):
        for cuts in itertools.combinations(range(1, len(x)), count):
            parts = [(a, b) for a, b in itertools.pairwise((0, *cuts, len(x))) if h[a:b].sum() > 0]
            costs.append(
                sum(float((h[a:b] * (x[a:b] - np.average(x[a:b], weights=h[a:b])) ** 2).sum()) for a, b in parts)
            )
    return min(costs)


@st.composite
def samples(draw: st.DrawFn, most: int = 10) -> tuple[F, F]:
    """Values with ties, and weights of which some are zero."""
    n = draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    values = rng.standard_normal(n) * draw(st.sampled_from([1e-6, 1.0, 1e6])) + draw(st.sampled_from([0.0, 5.0]))
    if draw(st.booleans()):
        values = values.round(1)
    weights = np.where(rng.random(n) < 0.2, 0.0, rng.uniform(0.01, 3, n))
    weights[0] = 1.0
    return values, weights


@given(samples(), st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_the_dynamic_program_finds_what_brute_force_finds(sample: tuple[F, F], k: int) -> None:
    values, weights = sample
    found = kmeans.centroids(values, weights, k)
    assert 1 <= len(found) <= k
    assert (np.diff(found) > 0).all()
    power = float((weights * np.square(values - np.average(values, weights=weights))).sum())
    assert kmeans.cost(values, weights, found) == pytest.approx(
        brute(values, weights, k), rel=1e-6, abs=1e-9 * power + 1e-13 * float((weights * values**2).sum())
    )


@given(samples(40), st.integers(1, 8), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_no_start_leads_lloyd_below_the_optimum_and_lloyd_never_loses(sample: tuple[F, F], k: int, seed: int) -> None:
    values, weights = sample
    start = np.sort(np.random.default_rng(seed).choice(values, k))
    led = kmeans.lloyd(values, weights, start)
    slack = 1e-9 * float((weights * values**2).sum())
    assert kmeans.cost(values, weights, led) <= kmeans.cost(values, weights, start) + slack
    best = kmeans.centroids(values, weights, k)
    assert kmeans.cost(values, weights, best) <= kmeans.cost(values, weights, led) + slack


@pytest.mark.parametrize("k", [3, 4, 50])
def test_as_many_centroids_as_values_are_exact(k: int) -> None:
    values = np.array([0.1, -2.0, 0.1, 7.0, -2.0])
    assert kmeans.centroids(values, None, k).tolist() == [-2.0, 0.1, 7.0]


def test_equal_weights_are_no_weights() -> None:
    values = np.random.default_rng(0).standard_normal(200)
    plain = kmeans.centroids(values, None, 7)
    np.testing.assert_allclose(kmeans.centroids(values, np.full(200, 3.7), 7), plain, rtol=1e-12)


def test_values_without_weight_move_nothing() -> None:
    values, weights = np.array([0.0, 1.0, 50.0, 10.0]), np.array([1.0, 1.0, 0.0, 1.0])
    assert kmeans.centroids(values, weights, 2).tolist() == [0.5, 10.0]
    assert kmeans.centroids(values, np.zeros(4), 4).tolist() == [0.0, 1.0, 10.0, 50.0]  # then all count alike


def test_many_values_are_merged_with_next_to_no_loss() -> None:
    rng = np.random.default_rng(1)
    values, weights = rng.standard_t(3, 3000), rng.uniform(0.1, 2, 3000)
    exact = kmeans.cost(values, weights, kmeans.centroids(values, weights, 16, cells=3000))
    merged = kmeans.cost(values, weights, kmeans.centroids(values, weights, 16, cells=1000))
    assert exact <= merged <= 1.02 * exact


@pytest.mark.parametrize(("values", "weights", "k"), [([], None, 1), ([1.0], None, 0), ([np.nan], None, 1)])
def test_what_has_no_answer_is_refused(values: list[float], weights: F | None, k: int) -> None:
    with pytest.raises(ValueError, match="k-means needs"):
        kmeans.centroids(np.array(values), weights, k)


@pytest.mark.parametrize("weights", [[1.0], [-1.0, 1.0], [np.inf, 1.0]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="one finite weight >= 0"):
        kmeans.centroids(np.array([1.0, 2.0]), np.array(weights), 1)


def test_of_two_as_near_the_lower_is_taken() -> None:
    found = np.array([-1.0, 0.0, 3.0])
    assert kmeans.index(np.array([-9.0, -0.5, -0.4, 1.5, 1.6, 9.0]), found).tolist() == [0, 0, 1, 1, 2, 2]
    assert kmeans.nearest(np.array([-0.5, 1.6]), found).tolist() == [-1.0, 3.0]


# ---------------------------------------------------------------------------------------------- many rows


def of_rows(values: F, weights: F, k: int) -> list[float]:
    found = kmeans.many(values, weights, k)
    assert found.shape == (len(values), k)
    assert (found[:, 1:] >= found[:, :-1]).all()
    return [kmeans.cost(v, h, row[np.isfinite(row)]) for v, h, row in zip(values, weights, found, strict=True)]


@pytest.mark.parametrize("tail", ["normal", "heavy"])
@pytest.mark.parametrize(("n", "k"), [(64, 4), (144, 16), (144, 32), (576, 16), (576, 64)])
def test_rows_at_once_are_near_the_optimum_of_each(tail: str, n: int, k: int) -> None:
    rng = np.random.default_rng(n + k)
    values = rng.standard_normal((5, n)) if tail == "normal" else rng.standard_t(3, (5, n))
    weights = rng.uniform(0.1, 2, (5, n))
    for mine, v, h in zip(of_rows(values, weights, k), values, weights, strict=True):
        best = kmeans.cost(v, h, kmeans.centroids(v, h, k))
        assert best * (1 - 1e-9) <= mine <= best * (1.01 if k <= 4 else 1.05 if k <= 16 else 1.5)


@pytest.mark.parametrize(("n", "distinct", "k"), [(9, 3, 4), (300, 8, 8), (300, 100, 128), (5, 5, 16)])
def test_rows_of_few_distinct_values_are_exact(n: int, distinct: int, k: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(distinct)[rng.integers(0, distinct, (4, n))]
    assert of_rows(values, np.ones((4, n)), k) == [0.0] * 4


def test_rows_far_from_zero_keep_their_digits() -> None:
    values = 1e6 + np.random.default_rng(0).standard_normal((2, 200))
    for mine, row in zip(of_rows(values, np.ones((2, 200)), 4), values, strict=True):
        assert mine <= 1.01 * kmeans.cost(row, None, kmeans.centroids(row, None, 4))


def test_one_centroid_of_a_row_is_its_mean() -> None:
    values, weights = np.array([[0.0, 1.0, 5.0], [2.0, 2.0, 4.0]]), np.array([[1.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    np.testing.assert_allclose(kmeans.many(values, weights, 1), [[11 / 4], [2.0]])


def test_a_row_is_fitted_alike_alone_and_among_others() -> None:
    rng = np.random.default_rng(3)
    values, weights = rng.standard_normal((40, 100)), rng.uniform(0.1, 1, (40, 100))
    together = kmeans.many(values, weights, 8)
    for index in (0, 17, 39):
        assert np.array_equal(kmeans.many(values[index : index + 1], weights[index : index + 1], 8)[0], together[index])


# ---------------------------------------------------------------------------------------------- the mixture


def test_a_mixture_finds_planted_means() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([mean + 0.02 * rng.standard_normal(400) for mean in (-1.0, 0.2, 0.9)])
    np.testing.assert_allclose(kmeans.mixture(values, None, 3), [-1.0, 0.2, 0.9], atol=0.01)


def test_a_component_may_stay_at_zero_with_its_share() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([0.1 + 0.05 * rng.standard_normal(500), 1 + 0.05 * rng.standard_normal(100)])
    found = kmeans.mixture(values, None, 2, zero=0.8)
    assert 0.0 in found
    assert 0.0 not in kmeans.mixture(values, None, 2)


def test_weights_count_in_a_mixture() -> None:
    values, weights = np.array([0.0, 0.0, 3.0, 10.0]), np.array([1.0, 1.0, 1.0, 5.0])
    repeated = np.array([0.0, 0.0, 3.0] + [10.0] * 5)
    np.testing.assert_allclose(kmeans.mixture(values, weights, 2), kmeans.mixture(repeated, None, 2), rtol=1e-6)
