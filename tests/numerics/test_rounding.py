"""Integers of grid-valued weights are exact; other roundings never lose to the nearest; equalised ranges are equal."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ccompile.numerics import rounding


def layer(seed: int, rows: int = 5, columns: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """A weight and the second moments of correlated inputs."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((200, columns)) @ rng.standard_normal((columns, columns))
    return rng.standard_normal((rows, columns)), X.T @ X / 200


def loss(W: np.ndarray, scale: np.ndarray, Q: np.ndarray, H: np.ndarray) -> float:
    return rounding.output_loss(W, scale[:, None] * Q, H)


def test_weights_on_a_grid_are_exact_whatever_the_rounding() -> None:
    rng = np.random.default_rng(0)
    Q = rng.integers(-127, 128, (4, 9)).astype(float)
    Q[:, 0] = 127
    scale = np.array([0.5, 0.01, 2.0, 1e-4])
    W, H = Q * scale[:, None], layer(1, columns=9)[1]
    assert np.allclose(rounding.largest(W, 127), scale)
    for found in (
        rounding.nearest(W, scale, 127),
        rounding.descend(W, scale, H, 127),
        rounding.feed_back(W, scale, H, 127),
    ):
        assert (found == Q).all()


@pytest.mark.parametrize("limit", [7, 63, 127])
def test_codes_stay_within_the_limit(limit: int) -> None:
    W, H = layer(2)
    scale = rounding.least_squares(W, limit)
    for found in (rounding.nearest(W, scale, limit), rounding.descend(W, scale, H, limit)):
        assert np.abs(found).max() <= limit
        assert (found == np.rint(found)).all()


@pytest.mark.parametrize("seed", range(5))
def test_descent_and_feedback_lose_less_of_the_output_than_the_nearest(seed: int) -> None:
    W, H = layer(seed, columns=30)
    scale = rounding.largest(W, 7)
    plain = loss(W, scale, rounding.nearest(W, scale, 7), H)
    assert loss(W, scale, rounding.descend(W, scale, H, 7), H) < 0.7 * plain
    assert loss(W, scale, rounding.feed_back(W, scale, H, 7), H) < plain


def test_descent_comes_close_to_the_best_integers_of_a_small_layer() -> None:
    W, H = layer(3, rows=1, columns=5)
    scale = rounding.largest(W, 3)
    tried = [loss(W, scale, np.array([q], float), H) for q in itertools.product(range(-3, 4), repeat=5)]
    assert loss(W, scale, rounding.descend(W, scale, H, 3), H) <= 1.5 * min(tried)


def test_inputs_without_correlation_make_descent_the_nearest() -> None:
    W, _ = layer(4)
    scale = rounding.largest(W, 15)
    assert (rounding.descend(W, scale, np.eye(12), 15) == rounding.nearest(W, scale, 15)).all()


def test_least_squares_scales_never_lose_to_the_whole_range() -> None:
    W = np.random.default_rng(5).standard_t(2, (50, 64))
    error = [
        np.square(W - s[:, None] * rounding.nearest(W, s, 7)).sum(1)
        for s in (rounding.least_squares(W, 7), rounding.largest(W, 7))
    ]
    assert (error[0] <= error[1]).all()
    assert error[0].sum() < 0.96 * error[1].sum()


def test_rows_of_zeros_have_a_scale() -> None:
    assert rounding.least_squares(np.zeros((2, 3)), 127).tolist() == [1.0, 1.0]


def test_balanced_channels_have_equal_ranges() -> None:
    first, second = np.array([8.0, 0.5, 3.0]), np.array([2.0, 2.0, 3.0])
    s = rounding.balance(first, second)
    assert np.allclose(first / s, second * s)


def test_a_dead_channel_is_left_alone() -> None:
    assert rounding.balance(np.array([0.0, 2.0]), np.array([1.0, 0.0])).tolist() == [1.0, 1.0]
