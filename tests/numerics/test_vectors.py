"""Product quantisation: planted vectors come back, one column is k-means, every step descends, data never hurt."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccompile.numerics import codebooks, levels, vectors

F = np.ndarray


def gaussian(o: int, d: int, seed: int = 0) -> F:
    return np.random.default_rng(seed).standard_normal((o, d))


def metric(d: int, seed: int = 0) -> F:
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((4 * d, d)) @ (np.eye(d) + 0.5 * rng.standard_normal((d, d)))
    gram: F = X.T @ X
    return gram


def lost(W: F, H: F | None, k: int, v: int, rough: bool = False) -> float:
    return vectors.lost(vectors.fit([W], [H], k, v, rough), [W], [H])


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize(("k", "v"), [(1, 2), (4, 2), (7, 4), (16, 3)])
def test_planted_vectors_come_back(k: int, v: int, data: bool) -> None:
    rng = np.random.default_rng(1)
    table = rng.integers(-9, 9, (k, v)).astype(float)
    W = table[rng.integers(0, k, (32, 24 // v))].reshape(32, -1)
    (part,) = vectors.fit([W], [metric(W.shape[1]) if data else None], k, v)
    np.testing.assert_allclose(part.values, W, atol=1e-9)
    assert len(part.vectors) <= k


def test_as_many_vectors_as_blocks_lose_nothing_and_few_blocks_make_few() -> None:
    W = np.array([[1.0, 2.0, 3.0, 5.0], [3.0, 5.0, 1.0, 2.0]])
    (part,) = vectors.fit([W], [None], 200, 2)
    assert part.vectors.shape == (2, 2)
    assert np.array_equal(part.values, W)


def test_two_vectors_are_the_best_of_all_partitions() -> None:
    W = gaussian(7, 2, 3)
    best = min(
        sum(float(np.square(W[list(part)] - W[list(part)].mean(0)).sum()) for part in (left, right))
        for size in range(1, 7)
        for left in itertools.combinations(range(7), size)
        for right in [tuple(set(range(7)) - set(left))]
    )
    found = min(vectors.lost(vectors.fit([W], [None], 2, 2, seed=s), [W], [None]) for s in range(5))
    assert found == pytest.approx(best, rel=1e-3)  # rounded to float16


def test_one_column_is_what_levels_do() -> None:
    W, H = gaussian(16, 24), metric(24)
    scalar = codebooks.lost(codebooks.fit([W], [H], codebooks.Levels(8)), [W], [H])
    assert lost(W, H, 8, 1) == pytest.approx(scalar, rel=0.2)


def test_blocks_lose_less_than_single_weights_at_equal_bits() -> None:
    rng = np.random.default_rng(0)
    W, H = rng.standard_normal((256, 32)), metric(32)
    scalar = codebooks.lost(codebooks.fit([W], [H], codebooks.Levels(4)), [W], [H])
    assert lost(W, H, 256, 4) < scalar  # 2 bits a weight both


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 4), st.integers(1, 12), st.integers(0, 99))
def test_data_never_hurt(o: int, blocks: int, v: int, k: int, seed: int) -> None:
    W, H = gaussian(o, blocks * v, seed), metric(blocks * v, seed)
    (free,) = vectors.fit([W], [None], k, v)
    found = lost(W, H, k, v)
    start = vectors.lost([free], [W], [H])
    assert found <= 1.05 * start + 1e-9 * levels.loss(W, H, np.zeros_like(W))


@pytest.mark.parametrize("seed", range(3))
def test_turns_descend(seed: int) -> None:
    W, H = gaussian(24, 32, seed), metric(32, seed)
    assert lost(W, H, 16, 4) < lost(W, H, 16, 4, rough=True)


def test_groups_share_one_table() -> None:
    W = [gaussian(6, 8, s) for s in range(3)]
    H = [metric(8, s) for s in range(3)]
    parts = vectors.fit(W, H, 5, 2)
    assert all(np.array_equal(part.vectors, parts[0].vectors) for part in parts)
    assert len(np.unique(np.concatenate([part.values.reshape(-1, 2) for part in parts]), axis=0)) <= 5


def test_a_block_that_costs_nothing_may_be_anything() -> None:
    W, H = gaussian(6, 8), metric(8)
    H[:2], H[:, :2] = 0, 0
    assert lost(W, H, 8, 2) < 0.5 * levels.loss(W, H, np.zeros_like(W))


def test_equal_input_gives_equal_numbers() -> None:
    W, H = gaussian(8, 16), metric(16)
    first, second = (vectors.fit([W], [H], 6, 4)[0].values for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize(("k", "v"), [(0, 2), (4, 3)])
def test_what_does_not_divide_is_refused(k: int, v: int) -> None:
    with pytest.raises(ValueError, match="rows must fall into blocks"):
        vectors.fit([gaussian(2, 4)], [None], k, v)
