"""Clusters of lines and subspaces: planted ones come back, sizes are kept, assignments are the best there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from layers import F

from ccompile.numerics import clusters


def planted(seed: int, sizes: tuple[int, ...], dimension: int, k: int = 1, v: int = 8) -> tuple[F, list[int]]:
    """Return items[n, k, v] in random subspaces of this dimension, shuffled, and their labels by first occurrence."""
    rng = np.random.default_rng(seed)
    items = [rng.standard_normal((size, k, dimension)) @ rng.standard_normal((dimension, v)) for size in sizes]
    order = rng.permutation(sum(sizes))
    labels = np.repeat(np.arange(len(sizes)), sizes)[order]
    names = list(dict.fromkeys(labels.tolist()))
    return np.concatenate(items)[order], [names.index(label) for label in labels.tolist()]


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("dimension", "k"), [(1, 1), (1, 4), (2, 3)])
def test_planted_subspaces_are_recovered(dimension: int, k: int, balanced: bool) -> None:
    for seed in range(5):
        items, labels = planted(seed, (6, 6, 6), dimension, k)
        assert clusters.cluster(items, 3, dimension, balanced).tolist() == labels


def test_unequal_sizes_are_found_unless_they_must_be_equal() -> None:
    items, labels = planted(1, (2, 9, 4), 1)
    assert clusters.cluster(items, 3, 1).tolist() == labels
    assert np.bincount(clusters.cluster(items, 3, 1, balanced=True)).tolist() == [5, 5, 5]


@pytest.mark.parametrize(("n", "groups"), [(6, 3), (7, 3), (5, 2), (4, 4), (3, 1)])
def test_a_balanced_assignment_is_the_best_of_all(n: int, groups: int) -> None:
    for seed in range(5):
        gain = np.random.default_rng(seed).standard_normal((n, groups)) ** 2
        labels = clusters.assign(gain, True)
        sizes = np.bincount(labels, minlength=groups)
        assert sizes.max() - sizes.min() <= 1
        options = [
            sum(gain[item, label] for item, label in enumerate(choice))
            for choice in itertools.product(range(groups), repeat=n)
            if np.ptp(np.bincount(choice, minlength=groups)) <= 1
        ]
        assert gain[np.arange(n), labels].sum() == pytest.approx(max(options))


def test_more_restarts_never_gain_less() -> None:
    items = np.random.default_rng(2).standard_normal((20, 2, 5))

    def gain(restarts: int) -> float:
        labels = clusters.cluster(items, 4, 1, restarts=restarts)
        gains = clusters.gains(items, clusters.subspaces(items, labels, 4, 1))
        return float(gains[np.arange(20), labels].sum())

    found = [gain(restarts) for restarts in (1, 4, 16)]
    assert found == sorted(found)


def test_every_cluster_has_an_item_even_among_zeros_and_twins() -> None:
    for items in (np.zeros((5, 1, 3)), np.ones((5, 1, 3))):
        assert sorted(set(clusters.cluster(items, 3, 1).tolist())) == [0, 1, 2]
    assert clusters.cluster(np.ones((4, 1, 2)), 1, 1).tolist() == [0, 0, 0, 0]


def test_equal_input_and_seed_give_equal_labels() -> None:
    items = np.random.default_rng(3).standard_normal((20, 2, 5))
    first, again = (clusters.cluster(items.copy(), 4, 1, seed=7).tolist() for _ in range(2))
    assert first == again


@pytest.mark.parametrize("count", [0, 6])
def test_clusters_without_items_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=r"need 1 \.\. 5"):
        clusters.cluster(np.ones((5, 1, 2)), count, 1)
