"""Shared values end to end: round trips, best scales by brute force, groups, halves, masks, and stochastic rounding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import F, Sampled, layers

from ccompile.numerics import codebooks, kmeans, levels
from ccompile.numerics.codebooks import Grid, Layout, Levels

SIGNS, TERNARY = (-1.0, 1.0), (-1.0, 0.0, 1.0)
LAYOUTS = [Layout(), Layout("channel"), Layout("group", 8)]


def gaussian(o: int = 6, d: int = 24, seed: int = 0, tail: bool = False) -> F:
    rng = np.random.default_rng(seed)
    return rng.standard_t(2.2, (o, d)) if tail else rng.standard_normal((o, d))


def metric(d: int, seed: int = 0) -> F:
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((4 * d, d)) @ (np.eye(d) + 0.5 * rng.standard_normal((d, d)))
    gram: F = X.T @ X
    return gram


def lost(W: F, H: F | None, plan: Levels | Grid) -> float:
    if isinstance(plan, Levels):
        return codebooks.lost(codebooks.fit([W], [H], plan), [W], [H])
    return codebooks.lost(codebooks.quantise([W], [H], plan), [W], [H])


# ---------------------------------------------------------------------------------------------- layouts


def test_layouts_number_what_has_a_table_of_its_own() -> None:
    W = [np.zeros((2, 5)), np.zeros((2, 5))]
    assert [t.tolist() for t in Layout().tables(W)] == [[[0]], [[0]]]
    assert [t.tolist() for t in Layout("channel").tables(W)] == [[[0], [1]], [[2], [3]]]
    first, second = Layout("group", 2).tables(W)
    assert first.tolist() == [[0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]
    assert np.array_equal(second, first + 6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_table_fits_what_is_its_own(layout: Layout) -> None:
    W = gaussian(4, 24) * np.array([[0.01], [1.0], [7.0], [90.0]])
    (part,) = codebooks.fit([W], [None], Levels(4, layout))
    tables = np.broadcast_to(part.table, W.shape)
    for table in np.unique(tables):
        mine = W[tables == table]
        best = kmeans.cost(mine, None, kmeans.centroids(mine, None, 4))
        found = float(np.square(part.values[tables == table] - mine).sum())
        assert found == pytest.approx(best, rel=1e-9)


def test_groups_share_one_table_for_the_tensor() -> None:
    W, H = [gaussian(1, 9, seed) for seed in range(4)], [metric(9, seed) for seed in range(4)]
    parts = codebooks.fit(W, H, Levels(4))
    assert len(np.unique(np.stack([part.values for part in parts]))) <= 4
    alone = [codebooks.lost(codebooks.fit([w], [h], Levels(4)), [w], [h]) for w, h in zip(W, H, strict=True)]
    assert codebooks.lost(parts, W, H) > sum(alone)
    own = codebooks.fit(W, H, Levels(4, Layout("channel")))
    assert codebooks.lost(own, W, H) == pytest.approx(sum(alone), rel=0.3)


# ---------------------------------------------------------------------------------------------- free levels


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("start", ["optimal", "mixture"])
def test_as_many_levels_as_values_give_the_weight_back(layout: Layout, start: codebooks.Start) -> None:
    W = np.random.default_rng(0).choice([-0.7, 0.1, 0.2, 3.0], (6, 24))
    for H in (None, metric(24)):
        (part,) = codebooks.fit([W], [H], Levels(4, layout, start))
        np.testing.assert_allclose(part.values, W, atol=1e-3 if start == "mixture" else 1e-12)


def test_alike_inputs_make_it_plain_k_means() -> None:
    W = gaussian(8, 30)
    (part,) = codebooks.fit([W], [2.5 * np.eye(30)], Levels(5))
    wanted = kmeans.centroids(W, None, 5)
    np.testing.assert_allclose(np.unique(part.values), wanted, rtol=1e-9)
    assert np.array_equal(part.values, np.unique(part.values)[kmeans.index(W, wanted)])


def test_the_metric_weighs_the_start() -> None:
    W, h = gaussian(8, 30), np.random.default_rng(1).uniform(0.01, 4, 30)
    (part,) = codebooks.fit([W], [np.diag(h)], Levels(5))
    wanted = kmeans.centroids(W, np.broadcast_to(h, W.shape), 5)
    np.testing.assert_allclose(np.unique(part.values), wanted, rtol=1e-9)
    plain = Levels(5, weighted=False, rough=True, feedback=False)
    (other,) = codebooks.fit([W], [np.diag(h)], plain)
    np.testing.assert_allclose(np.unique(other.values), kmeans.centroids(W, None, 5), rtol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [2, 4])
def test_a_fit_to_the_metric_loses_less_than_one_without(layout: Layout, k: int) -> None:
    W, H = gaussian(8, 32), metric(32)
    (blind,) = codebooks.fit([W], [None], Levels(k, layout))
    assert lost(W, H, Levels(k, layout)) < 0.8 * levels.loss(W, H, blind.values)


def test_rounds_and_feedback_pay() -> None:
    W, H = gaussian(8, 32), metric(32)
    full, rough, plain = (
        lost(W, H, plan) for plan in (Levels(4), Levels(4, rough=True), Levels(4, rough=True, feedback=False))
    )
    assert full < rough < plain


@given(layers(), st.integers(1, 5), st.sampled_from(["tensor", "channel", "group"]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_more_rounds_never_lose(drawn: Sampled, k: int, scope: codebooks.Scope, feedback: bool) -> None:
    W, H = drawn.W.reshape(len(drawn.W), -1), drawn.H
    plans = [Levels(k, Layout(scope, 2), feedback=feedback, rough=rough) for rough in (False, True)]
    full, rough = (lost(W, H, plan) for plan in plans)
    assert full <= rough + 1e-9 * levels.loss(W, H, 0 * W)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zeros_stay_and_take_one_of_the_levels(layout: Layout) -> None:
    W, H = gaussian(6, 24), metric(24)
    W[np.abs(W) < 0.7] = 0.0
    (part,) = codebooks.fit([W], [H], Levels(4, layout), [W != 0])
    assert np.array_equal(part.values == 0, W == 0)
    for table in range(len(part.tables)):
        mine = part.values[np.broadcast_to(part.table, W.shape) == table]
        assert len(np.unique(mine)) <= 4


def test_a_row_of_zeros_alone_is_no_trouble() -> None:
    W = gaussian(4, 24)
    W[2] = 0
    for start in ("optimal", "lloyd", "mixture"):
        plan = Levels(4, Layout("channel"), start)
        (part,) = codebooks.fit([W], [metric(24)], plan, [W != 0])
        assert not part.values[2].any()
        assert np.isfinite(part.values).all()


@pytest.mark.parametrize(("k", "mask"), [(0, False), (1, True)])
def test_too_few_values_are_refused(k: int, mask: bool) -> None:
    W = np.array([[1.0, 0.0]])
    with pytest.raises(ValueError, match="there must be one"):
        codebooks.fit([W], [None], Levels(k), [W != 0] if mask else None)


# ---------------------------------------------------------------------------------------------- halves


@pytest.mark.parametrize("layout", LAYOUTS)
def test_levels_that_are_halves_lose_next_to_nothing(layout: Layout) -> None:
    W, H = gaussian(6, 24), metric(24)
    (part,) = codebooks.fit([W], [H], Levels(4, layout, half=True))
    held = part.tables[np.isfinite(part.tables)]
    assert np.array_equal(held.astype(np.float16).astype(np.float64), held)
    assert codebooks.lost([part], [W], [H]) <= 1.02 * lost(W, H, Levels(4, layout))


@pytest.mark.parametrize("size", [1e-7, 1e6])
@pytest.mark.parametrize("k", [4, 8])
def test_weights_beyond_the_range_of_halves_keep_their_levels(size: float, k: int) -> None:
    W = size * gaussian(4, 64)
    for full, half in [
        (lost(W, None, Levels(k, Layout("channel"))), lost(W, None, Levels(k, Layout("channel"), half=True))),
        (lost(W, None, Grid(TERNARY, Layout("channel"))), lost(W, None, Grid(TERNARY, Layout("channel"), half=True))),
    ]:
        assert half <= 1.01 * full


# ---------------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rounding", ["nearest", "feedback", "stochastic"])
def test_values_of_a_grid_come_back(layout: Layout, bits: int, rounding: codebooks.Rounding) -> None:
    rng = np.random.default_rng(0)
    scale = 0.375 if layout.scope == "tensor" else np.array([[0.5], [0.375], [2.0], [0.0625]])
    integers = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (4, 24))
    integers[:, ::8] = 2 ** (bits - 1) - 1
    W = scale * integers
    plan = Grid(codebooks.integers(bits), layout, rounding=rounding)
    (part,) = codebooks.quantise([W], [metric(24)], plan)
    np.testing.assert_allclose(part.values, W, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tail", [False, True])
def test_the_scale_of_signs_is_the_mean_size(tail: bool) -> None:
    W = gaussian(5, 200, tail=tail)
    (part,) = codebooks.quantise([W], [None], Grid(SIGNS, Layout("channel")))
    np.testing.assert_allclose(part.values, np.sign(W) * np.abs(W).mean(1, keepdims=True), rtol=1e-6)


def ternary(w: F, h: F) -> float:
    """The least cost over how many of the largest stay, each with its best scale."""
    order = np.argsort(-np.abs(w))
    size, cost = np.abs(w)[order], h[order]
    gains = [np.average(size[:k], weights=cost[:k]) ** 2 * cost[:k].sum() for k in range(1, len(w) + 1)]
    return float((cost * size**2).sum() - max(gains))


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [7, 500])
def test_the_threshold_of_ternary_weights_is_the_best(tail: bool, weighted: bool, n: int) -> None:
    W = gaussian(6, n, seed=n, tail=tail)
    h = np.random.default_rng(2).uniform(0.1, 3, n) if weighted else np.ones(n)
    for rough in (False, True):
        (part,) = codebooks.quantise([W], [np.diag(h)], Grid(TERNARY, Layout("channel"), rough=rough))
        found = (h * np.square(part.values - W)).sum(1)
        np.testing.assert_allclose(found, [ternary(row, h) for row in W], rtol=1e-6)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("pattern", [SIGNS, TERNARY, codebooks.integers(4)])
def test_powers_of_two_are_the_best_ones(tail: bool, pattern: tuple[float, ...]) -> None:
    W, values = gaussian(6, 500, tail=tail), np.array(pattern)
    (part,) = codebooks.quantise([W], [None], Grid(pattern, Layout("channel"), power=True))
    assert np.array_equal(np.log2(part.scale), np.log2(part.scale).round())
    scales = 2.0 ** np.arange(-12, 8)
    nearest = [values[np.abs(W[..., None] / scale - values).argmin(-1)] * scale for scale in scales]
    best = np.min([np.square(found - W).sum(1) for found in nearest], axis=0)
    np.testing.assert_allclose(np.square(part.values - W).sum(1), best, rtol=1e-9)


def test_clipping_is_near_the_best_scale() -> None:
    W, pattern = gaussian(4, 300), np.array(codebooks.integers(4))
    (part,) = codebooks.quantise([W], [None], Grid(tuple(pattern), Layout("channel")))
    tried = [pattern[np.abs(W[..., None] / s - pattern).argmin(-1)] * s for s in np.linspace(0.05, 0.8, 400)]
    best = np.min([np.square(found - W).sum(1) for found in tried], axis=0)
    assert (np.square(part.values - W).sum(1) <= 1.02 * best).all()
    (whole,) = codebooks.quantise([W], [None], Grid(tuple(pattern), Layout("channel"), search=False))
    np.testing.assert_allclose(whole.scale, np.maximum(W.max(1) / 7, -W.min(1) / 8), rtol=1e-6)


def test_scales_are_what_a_file_holds() -> None:
    W, H = gaussian(6, 24), metric(24)
    for half, kind in ((False, np.float32), (True, np.float16)):
        (part,) = codebooks.quantise([W], [H], Grid(codebooks.integers(4), Layout("channel"), half=half))
        assert np.array_equal(part.scale.astype(kind).astype(np.float64), part.scale)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_grid_fitted_to_the_metric_loses_less_than_one_without(layout: Layout) -> None:
    W, H = gaussian(8, 32), metric(32)
    for pattern in (SIGNS, TERNARY, codebooks.powers(3), codebooks.integers(3)):
        (blind,) = codebooks.quantise([W], [None], Grid(pattern, layout))
        assert lost(W, H, Grid(pattern, layout)) < 0.9 * levels.loss(W, H, blind.values)


def test_zeros_stay_in_a_grid() -> None:
    W, H = gaussian(6, 24), metric(24)
    W[np.abs(W) < 0.7] = 0.0
    for rounding in ("nearest", "feedback", "stochastic"):
        plan = Grid(codebooks.integers(3), Layout("channel"), rounding=rounding)
        (part,) = codebooks.quantise([W], [H], plan, [W != 0])
        assert not part.values[W == 0].any()
        assert part.values.any()


def test_a_weight_of_zeros_is_no_trouble() -> None:
    for pattern in (SIGNS, TERNARY, codebooks.integers(4)):
        for power in (False, True):
            W = np.zeros((2, 8))
            (part,) = codebooks.quantise([W], [None], Grid(pattern, Layout("channel"), power=power))
            assert np.isfinite(part.values).all()


def test_patterns_are_as_told() -> None:
    assert codebooks.integers(3) == (-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
    assert codebooks.powers(2) == (-1.0, 0.0, 1.0)
    assert len(codebooks.powers(4)) == 15


# ---------------------------------------------------------------------------------------------- at random


def test_stochastic_rounding_is_unbiased_with_the_variance_of_a_coin() -> None:
    eps, share, n = 0.25, np.array([[0.1], [0.5], [0.8]]), 40_000
    W = np.repeat(eps * (3 + share), n, axis=1)
    W[:, 0] = 7 * eps  # the largest: it makes the scale eps
    plan = Grid(codebooks.integers(4), Layout("channel"), search=False, rounding="stochastic")
    (part,) = codebooks.quantise([W], [None], plan)
    found = part.values[:, 1:]
    assert set(np.unique(found)) == {3 * eps, 4 * eps}
    variance = (share * (1 - share) * eps**2).ravel()
    np.testing.assert_allclose(found.mean(1), W[:, 1], atol=4 * np.sqrt(variance.max() / n))
    np.testing.assert_allclose(found.var(1), variance, rtol=0.03)


def test_stochastic_rounding_saturates_and_follows_its_seed() -> None:
    W = gaussian(4, 200, tail=True)
    plans = [Grid(codebooks.integers(2), Layout("channel"), rounding="stochastic", seed=seed) for seed in (0, 0, 1)]
    (first,), (again,), (other,) = (codebooks.quantise([W], [None], plan) for plan in plans)
    assert np.array_equal(first.code, again.code)
    assert not np.array_equal(first.code, other.code)
    relative = W / first.scale[:, None]
    assert (np.abs(relative) > 2).any()
    assert (first.pattern[first.code][relative >= 1] == 1).all()
    assert (first.pattern[first.code][relative <= -2] == -2).all()
