"""Merging neurons: exact on planted copies, refused where the activation does not allow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ccompile.numerics.neurons import MergePlan, merge_columns, merge_plan

F = npt.NDArray[np.floating[Any]]
Activation = Callable[[F], F]


def relu(x: F) -> F:
    return np.maximum(x, 0)


def leaky(x: F) -> F:
    return np.where(x > 0, x, 0.1 * x)


def sigmoid(x: F) -> F:
    return 1 / (1 + np.exp(-x))


def widened(seed: int, scale: F, n: int = 5) -> tuple[F, F, F]:
    """Return rows[n + k, f], bias and consumer[o, n + k] of n neurons and a copy per entry of `scale`[k], shuffled."""
    rng = np.random.default_rng(seed)
    rows, bias = rng.normal(size=(n, 7)), rng.normal(size=n)
    parent = rng.integers(0, n, len(scale))
    order = rng.permutation(n + len(scale))
    rows, bias = np.vstack([rows, rows[parent] * scale[:, None]]), np.append(bias, bias[parent] * scale)
    return rows[order], bias[order], rng.normal(size=(3, n + len(scale)))


def change(layer: tuple[F, F, F], plan: MergePlan, f: Activation) -> float:
    rows, bias, W = layer
    x = np.random.default_rng(99).normal(size=(64, rows.shape[1]))
    before = f(x @ rows.T + bias) @ W.T
    after = f(x @ rows[plan.keep].T + bias[plan.keep]) @ merge_columns(W, plan.M).T
    return float(np.abs(before - after).max())


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("f", [relu, leaky, sigmoid, np.tanh])
@pytest.mark.parametrize("seed", range(3))
def test_duplicates_merge_exactly_through_any_activation(f: Activation, seed: int, scaled: bool) -> None:
    layer = widened(seed, np.ones(4))
    plan = merge_plan(layer[0], layer[1], layer[2].T, cos_min=1.0, scaled=scaled)
    assert len(plan.keep) == 5
    assert change(layer, plan, f) < 1e-12
    assert plan.saliency.max() < 1e-12


@pytest.mark.parametrize("f", [relu, leaky])
@pytest.mark.parametrize("seed", range(3))
def test_scaled_copies_merge_exactly_through_homogeneous_activations(f: Activation, seed: int) -> None:
    layer = widened(seed, np.array([0.5, 2.0, 3.0, 0.1]))
    plan = merge_plan(layer[0], layer[1], layer[2].T, cos_min=1.0, scaled=True)
    assert len(plan.keep) == 5
    assert change(layer, plan, f) < 1e-12
    assert change(layer, plan, sigmoid) > 1e-3, "a scale does not pass through a sigmoid"


def test_scaled_copies_stay_where_scaling_is_not_allowed() -> None:
    layer = widened(0, np.array([0.5, 2.0, 3.0, 0.1]))
    plan = merge_plan(layer[0], layer[1], layer[2].T, cos_min=1.0, scaled=False)
    assert len(plan.keep) == 9
    assert np.array_equal(plan.M, np.eye(9))


def test_negative_copies_stay() -> None:
    layer = widened(1, np.array([-1.0, -2.0]))
    assert len(merge_plan(layer[0], layer[1], layer[2].T, cos_min=1.0, scaled=True).keep) == 7


def test_a_copy_that_differs_in_its_bias_stays() -> None:
    rows, bias, W = widened(2, np.ones(2))
    copies = merge_plan(rows, bias, W.T, cos_min=0.999).order
    bias[copies] += 1
    assert len(merge_plan(rows, bias, W.T, cos_min=0.999).keep) == 7


def test_zero_neurons_vanish_through_relu_only() -> None:
    rows, bias, W = widened(3, np.array([0.0]))
    plan = merge_plan(rows, bias, W.T, cos_min=1.0, scaled=True)
    assert len(plan.keep) == 5
    assert change((rows, bias, W), plan, relu) < 1e-12
    assert len(merge_plan(rows, bias, W.T, cos_min=1.0).keep) == 6


@pytest.mark.parametrize("seed", range(3))
def test_an_amount_takes_the_cheapest_pairs_and_at_least_one_neuron_stays(seed: int) -> None:
    layer = widened(seed, np.ones(3))
    plan = merge_plan(layer[0], layer[1], layer[2].T, amount=2)
    assert len(plan.keep) == 6
    assert change(layer, plan, relu) < 1e-12
    more = merge_plan(np.abs(layer[0]), layer[1] * 0 + 1, layer[2].T, amount=100)
    assert len(more.keep) == 1
    assert len(more.order) == 7


def test_the_first_saliency_bounds_the_change() -> None:
    layer = widened(4, np.zeros(0))
    plan = merge_plan(np.abs(layer[0]), layer[1], layer[2].T, amount=1)
    x = np.random.default_rng(5).normal(size=(64, 7))
    rows = np.abs(layer[0])
    before = relu(x @ rows.T + layer[1]) @ layer[2].T
    after = relu(x @ rows[plan.keep].T + layer[1][plan.keep]) @ merge_columns(layer[2], plan.M).T
    bound = plan.saliency[0] * (np.square(x).sum(1) + 1)
    assert (np.square(before - after).sum(1) <= bound * (1 + 1e-9)).all()


def test_chains_of_copies_compose_their_scales() -> None:
    rows = np.array([[1.0, 2.0], [2.0, 4.0], [8.0, 16.0]])
    W = np.array([[100.0, 10.0, 1.0]])
    plan = merge_plan(rows, np.zeros(3), W.T, cos_min=1.0, scaled=True)
    assert len(plan.keep) == 1
    np.testing.assert_allclose(plan.M @ rows[plan.keep], rows)


def test_permuting_neurons_permutes_the_plan() -> None:
    rows, bias, W = widened(6, np.random.default_rng(6).uniform(0.5, 2, 4))
    rows += 0.01 * np.random.default_rng(7).normal(size=rows.shape)
    order = np.random.default_rng(8).permutation(9)
    plain = merge_plan(rows, bias, W.T, amount=3, scaled=True)
    other = merge_plan(rows[order], bias[order], W.T[order], amount=3, scaled=True)
    assert order[other.order].tolist() == plain.order.tolist()
    np.testing.assert_allclose(
        merge_columns(W[:, order], other.M)[:, np.argsort(order[other.keep])], merge_columns(W, plain.M)
    )


def test_convolutions_merge_tap_by_tap() -> None:
    rng = np.random.default_rng(9)
    W, M = rng.normal(size=(3, 4, 2, 2)), rng.normal(size=(4, 2))
    merged = merge_columns(W.reshape(3, -1), M).reshape(3, 2, 2, 2)
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        np.testing.assert_allclose(merged[:, :, y, x], W[:, :, y, x] @ M)


def test_wrong_shapes_and_values_are_refused() -> None:
    with pytest.raises(ValueError, match="need"):
        merge_plan(np.ones((3, 2)), np.ones(2), np.ones((3, 1)))
    with pytest.raises(ValueError, match="cos_min"):
        merge_plan(np.ones((3, 2)), np.ones(3), np.ones((3, 1)), cos_min=-0.5)
    with pytest.raises(ValueError, match="does not split"):
        merge_columns(np.ones((1, 5)), np.eye(2))


def test_only_neurons_of_one_kind_merge() -> None:
    kind = np.array([0, 0, 1, 1, 1])
    plan = merge_plan(np.ones((5, 3)), np.ones(5), np.ones((5, 2)), cos_min=1.0, kind=kind)
    assert sorted(kind[plan.keep].tolist()) == [0, 1]
    assert plan.M.sum(0).tolist() == [2.0, 3.0]
    assert not (plan.M.astype(bool) & (kind[:, None] != kind[plan.keep])).any()


@pytest.mark.parametrize("seed", range(4))
def test_each_saliency_counts_what_earlier_merges_added(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, bias, columns = rng.normal(size=(8, 4)), rng.normal(size=8), rng.normal(size=(8, 3))
    full = merge_plan(rows, bias, columns)
    for k in range(1, len(full.order)):
        so_far, j = merge_plan(rows, bias, columns, amount=k), full.order[k]
        carried = so_far.M[:, so_far.keep == j].T @ columns
        others = [i for i in so_far.keep if i != j]
        gap = np.square(np.column_stack([rows, bias])[others] - np.append(rows[j], bias[j])).sum(1)
        assert np.isclose(gap, full.saliency[k] / np.square(carried).sum()).any()
