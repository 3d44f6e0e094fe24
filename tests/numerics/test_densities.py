"""Lines in classes of like density: planted classes are found, and merging is as good as brute force on small cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccompile.numerics.densities import bits_cost, partitions

ONES = st.lists(st.integers(0, 50), min_size=1, max_size=9).map(np.array)


def cost(ones: np.ndarray[tuple[int], np.dtype[np.int64]], labels: np.ndarray[tuple[int], np.dtype[np.int64]]) -> float:
    counts, sizes = np.bincount(labels, ones), np.bincount(labels) * 50
    return float(bits_cost(counts, sizes).sum())


def test_planted_classes_are_found() -> None:
    ones = np.random.default_rng(0).permutation(np.repeat([2, 3, 40, 41, 0], 20))
    one, two, three = partitions(ones, 100, 3)
    assert set(one) == {0}
    np.testing.assert_array_equal(two, ones >= 40)
    np.testing.assert_array_equal(three, np.select([ones >= 40, ones >= 2], [2, 1], 0))


def test_lines_of_one_density_are_one_class() -> None:
    (labels,) = partitions(np.full(7, 3), 10, 4)
    assert labels.tolist() == [0] * 7


@given(ONES)
def test_partitions_are_by_density_and_each_has_one_class_more(
    ones: np.ndarray[tuple[int], np.dtype[np.int64]],
) -> None:
    found = partitions(ones, 50, 4)
    assert [int(labels.max()) + 1 for labels in found] == list(range(1, min(4, len(set(ones.tolist()))) + 1))
    for labels in found:
        assert (np.diff(labels[np.argsort(ones, kind="stable")]) >= 0).all()
        assert all(len(set(labels[ones == one].tolist())) == 1 for one in ones)


@given(ONES)
def test_more_classes_never_cost_more(ones: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
    costs = [cost(ones, labels) for labels in partitions(ones, 50, 9)]
    assert costs == pytest.approx(sorted(costs, reverse=True))


def test_two_classes_of_three_densities_are_the_best_there_are() -> None:
    for ones in map(np.array, itertools.combinations(range(0, 51, 10), 3)):
        best = min(cost(ones, (ones > cut).astype(np.int64)) for cut in ones[:2])
        assert cost(ones, partitions(ones, 50, 2)[1]) == pytest.approx(best)


@pytest.mark.parametrize(("ones", "size", "bits"), [(0, 10, 0), (10, 10, 0), (5, 10, 10), (1, 4, 3.245112), (0, 0, 0)])
def test_the_cost_of_bits_is_their_entropy(ones: int, size: int, bits: float) -> None:
    assert bits_cost(np.array([ones]), np.array([size]))[0] == pytest.approx(bits, abs=1e-6)
