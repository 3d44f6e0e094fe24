"""Weights of few values: the loss, feedback, descent and least squares, none of which may lose; brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import F, layers

from ccompile.numerics import levels
from ccompile.numerics.levels import Coded, Scaled

SLACK = 1e-9


def coded(W: F, k: int, seed: int, rows: bool = False, mask: bool = False) -> Coded:
    """Free levels drawn from the weights, of the whole or of each row, the codes at random."""
    rng = np.random.default_rng(seed)
    tables = np.sort(rng.choice(W.ravel(), (len(W) if rows else 1, k)), axis=1)
    return Coded(
        table=np.arange(len(W))[:, None] if rows else np.zeros((1, 1), np.int64),
        code=rng.integers(0, k, W.shape).astype(np.int32),
        mask=rng.random(W.shape) < 0.6 if mask else None,
        tables=tables,
    )


def scaled(W: F, pattern: tuple[float, ...], seed: int, rows: bool = False, mask: bool = False) -> Scaled:
    """A pattern times scales near the weights' sizes, the codes at random."""
    rng = np.random.default_rng(seed)
    return Scaled(
        table=np.arange(len(W))[:, None] if rows else np.zeros((1, 1), np.int64),
        code=rng.integers(0, len(pattern), W.shape).astype(np.int32),
        mask=rng.random(W.shape) < 0.6 if mask else None,
        pattern=np.array(pattern),
        scale=rng.uniform(0.1, 1, len(W) if rows else 1),
    )


@st.composite
def parts(draw: st.DrawFn) -> tuple[F, F, Coded | Scaled]:
    """A layer W[o, d] with its metric, and a structure with random codes."""
    drawn = draw(layers())
    W = drawn.W.reshape(len(drawn.W), -1)
    seed, rows, mask = draw(st.integers(0, 10**6)), draw(st.booleans()), draw(st.booleans())
    if draw(st.booleans()):
        return W, drawn.H, coded(W, draw(st.integers(1, 5)), seed, rows, mask)
    pattern = draw(
        st.sampled_from([(-1.0, 1.0), (-1.0, 0.0, 1.0), (-2.0, -1.0, 0.0, 1.0), (-1.0, -0.5, 0.0, 0.5, 1.0)])
    )
    return W, drawn.H, scaled(W, pattern, seed, rows, mask)


Part = tuple[F, F, Coded | Scaled]


def test_the_loss_is_the_trace() -> None:
    rng = np.random.default_rng(0)
    W, What, X = rng.standard_normal((3, 5)), rng.standard_normal((3, 5)), rng.standard_normal((20, 5))
    H = X.T @ X
    assert levels.loss(W, H, What) == pytest.approx(np.trace((What - W) @ H @ (What - W).T))
    assert levels.loss(W, H, What) == pytest.approx(np.square(X @ (What - W).T).sum())
    assert levels.loss(W, None, What) == pytest.approx(np.square(What - W).sum())


def test_the_factor_is_the_inverses() -> None:
    X = np.random.default_rng(0).standard_normal((20, 6))
    H = X.T @ X
    U = levels.factor(H)
    assert np.array_equal(U, np.triu(U))
    np.testing.assert_allclose(U.T @ U, np.linalg.inv(H), rtol=1e-9)


def test_no_factor_where_there_is_no_inverse() -> None:
    with pytest.raises(np.linalg.LinAlgError):
        levels.factor(np.ones((3, 3)))


def test_values_are_levels_behind_codes_and_zero_where_held() -> None:
    part = Coded(
        table=np.array([[0], [1]]),
        code=np.array([[0, 1, 1], [1, 0, 0]], np.int32),
        mask=np.array([[True, True, False], [True, True, True]]),
        tables=np.array([[1.0, 2.0], [3.0, np.inf]]),
    )
    part = replace(part, code=np.array([[0, 1, 1], [0, 0, 0]], np.int32))
    assert part.values.tolist() == [[1.0, 2.0, 0.0], [3.0, 3.0, 3.0]]


def test_other_levels_keep_their_codes_when_they_change_order() -> None:
    part = Coded(table=np.zeros((1, 1), np.int64), code=np.array([[0, 1, 2]], np.int32), tables=np.array([[1.0, 2, 3]]))
    turned = part.with_tables(np.array([[5.0, 4.0, 9.0]]))
    assert turned.tables.tolist() == [[4.0, 5.0, 9.0]]
    assert turned.values.tolist() == [[5.0, 4.0, 9.0]]


# ---------------------------------------------------------------------------------------------- no move loses


@given(parts())
@settings(max_examples=100, deadline=None)
def test_descent_never_loses_and_ends_where_no_single_weight_gains(case: Part) -> None:
    W, H, part = case
    slack = SLACK * levels.loss(W, H, 0 * W)
    found = levels.descend(part, W, H, sweeps=200)
    assert levels.loss(W, H, found.values) <= levels.loss(W, H, part.values) + slack
    if levels.descend(found, W, H, 1).code.tolist() != found.code.tolist():
        return  # stopped because little was gained
    kinds = part.tables.shape[1] if isinstance(part, Coded) else len(part.pattern)
    now = levels.loss(W, H, found.values)
    for o, j in itertools.product(range(len(W)), range(min(W.shape[1], 6))):
        for code in range(kinds):
            other = found.code.copy()
            other[o, j] = code
            assert levels.loss(W, H, found.coded(other).values) >= now - 1e-7 * levels.loss(W, H, 0 * W)


@given(parts())
@settings(max_examples=100, deadline=None)
def test_feedback_is_never_worse_than_rounding(case: Part) -> None:
    W, H, part = case
    slack = SLACK * levels.loss(W, H, 0 * W)
    found, plain = levels.feedback(part, W, H), levels.round_to(part, W, H)
    assert levels.loss(W, H, found.values) <= levels.loss(W, H, plain.values) + slack


@given(parts(), st.sampled_from([1, 3, 50]))
@settings(max_examples=150, deadline=None)
def test_settling_never_loses_and_keeps_what_is_held(case: Part, rounds: int) -> None:
    W, H, part = case
    slack = SLACK * levels.loss(W, H, 0 * W)
    (found,) = levels.settle([part], [W], [H], rounds)
    assert levels.loss(W, H, found.values) <= levels.loss(W, H, part.values) + slack
    if part.mask is not None:
        assert not found.values[~part.mask].any()
    if isinstance(found, Scaled):
        assert (found.scale > 0).all()


def test_feedback_gains_where_inputs_are_correlated() -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((200, 16)) @ (np.eye(16) + 0.5)
    W, H = rng.standard_normal((12, 16)), X.T @ X
    part = Coded(table=np.zeros((1, 1), np.int64), code=np.zeros(W.shape, np.int32), tables=np.array([[-1.0, 0, 1]]))
    plain = levels.loss(W, H, levels.round_to(part, W, H).values)
    fed = levels.feedback(part, W, H)
    assert levels.loss(W, H, fed.values) < 0.5 * plain
    assert levels.loss(W, H, levels.descend(fed, W, H).values) < levels.loss(W, H, fed.values)


def test_in_a_diagonal_metric_feedback_and_descent_are_rounding() -> None:
    rng = np.random.default_rng(0)
    W, H = rng.standard_normal((5, 7)), np.diag(rng.uniform(0.1, 2, 7))
    part = coded(W, 4, 0)
    plain = levels.round_to(part, W)
    for found in (levels.feedback(part, W, H), levels.feedback(part, W, None), levels.descend(part, W, H)):
        assert np.array_equal(found.values, plain.values)


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    X = rng.standard_normal((90, 23)) @ (np.eye(23) + 0.3)
    W, H = rng.standard_normal((6, 23)), X.T @ X
    part = coded(W, 4, 1, rows=True)
    whole = [move(part, W, H).code for move in (levels.feedback, levels.descend)]
    monkeypatch.setattr(levels, "BLOCK", 5)
    blocks = [move(part, W, H).code for move in (levels.feedback, levels.descend)]
    assert all(map(np.array_equal, whole, blocks))


def test_an_order_may_be_given() -> None:
    rng = np.random.default_rng(4)
    X = rng.standard_normal((90, 9)) @ (np.eye(9) + 0.5)
    W, H = rng.standard_normal((6, 9)), X.T @ X
    part = coded(W, 3, 1)
    default = levels.feedback(part, W, H)
    assert np.array_equal(levels.feedback(part, W, H, np.argsort(-H.diagonal(), kind="stable")).code, default.code)
    assert not np.array_equal(levels.feedback(part, W, H, np.argsort(H.diagonal(), kind="stable")).code, default.code)


# ---------------------------------------------------------------------------------------------- brute force


def design(part: Coded | Scaled, W: F, H: F) -> tuple[F, F]:
    """A and b of the least squares |A p - b|^2 that the parameters solve, sqrt(H) on each row."""
    values, vectors = np.linalg.eigh(H)
    root = vectors * np.sqrt(np.maximum(values, 0))
    count = len(part.parameters)
    columns = []
    for index in range(count):
        unit = np.where(part.place == index, part.held(np.broadcast_to(part.factor, W.shape), part.mask), 0.0)
        columns.append((unit @ root).ravel())
    return np.stack(columns, 1), (W @ root).ravel()


@given(layers(), st.integers(0, 10**6), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_settled_levels_are_least_squares(drawn: object, seed: int, rows: bool, mask: bool) -> None:
    W, H = drawn.W.reshape(len(drawn.W), -1), drawn.H  # type: ignore[attr-defined]
    part = coded(W, 4, seed, rows, mask)
    (found,) = levels.settle([part], [W], [H], rounds=200)
    A, b = design(part, W, H)
    best = float(np.square(A @ np.linalg.lstsq(A, b, rcond=1e-12)[0] - b).sum())
    assert levels.loss(W, H, found.values) == pytest.approx(best, rel=1e-5, abs=1e-7 * float(b @ b))


def test_settled_scales_are_least_squares() -> None:
    rng = np.random.default_rng(0)
    X, W = rng.standard_normal((50, 8)), rng.standard_normal((4, 8))
    H = X.T @ X
    part = scaled(W, (-1.0, 0.0, 1.0), 0, rows=True)
    part = levels.round_to(part, W)  # with nearest codes no scale wants to be negative here
    (found,) = levels.settle([part], [W], [H], rounds=50)
    A, b = design(part, W, H)
    wanted = np.linalg.lstsq(A, b, rcond=None)[0]
    assert (wanted > 0).all()
    np.testing.assert_allclose(found.scale, wanted, rtol=1e-6)


def test_groups_settle_what_they_share_together() -> None:
    rng = np.random.default_rng(0)
    W = [rng.standard_normal((3, 5)) for _ in range(3)]
    H = [np.cov(rng.standard_normal((5, 30))) for _ in range(3)]
    given_ = [replace(coded(each, 3, 7), code=coded(each, 3, seed).code) for seed, each in enumerate(W)]
    given_ = [replace(part, tables=given_[0].tables) for part in given_]
    found = levels.settle(given_, W, H, rounds=100)
    assert all(np.array_equal(part.tables, found[0].tables) for part in found)
    systems = [design(part, w, h) for part, w, h in zip(given_, W, H, strict=True)]
    A, b = np.concatenate([a for a, _ in systems]), np.concatenate([b for _, b in systems])
    best = float(np.square(A @ np.linalg.lstsq(A, b, rcond=None)[0] - b).sum())
    lost = sum(levels.loss(w, h, part.values) for part, w, h in zip(found, W, H, strict=True))
    assert lost == pytest.approx(best, rel=1e-9)


def test_a_level_of_zero_stays_and_the_others_settle_around_it() -> None:
    rng = np.random.default_rng(0)
    X, W = rng.standard_normal((60, 8)), rng.standard_normal((4, 8)) + 0.5
    H = X.T @ X + 30
    part = replace(coded(W, 3, 0), tables=np.array([[-1.0, 0.0, 1.0]]))
    (found,) = levels.settle([part], [W], [H], rounds=50)
    A, b = design(part, W, H)
    best = float(np.square(A[:, [0, 2]] @ np.linalg.lstsq(A[:, [0, 2]], b, rcond=None)[0] - b).sum())
    assert (found.tables == 0).sum() == 1
    assert levels.loss(W, H, found.values) == pytest.approx(best, rel=1e-9)


def test_a_scale_that_would_turn_negative_stays_and_the_others_settle() -> None:
    W, H = np.array([[1.0, 1.0], [-1.0, 1.0]]), np.array([[1.0, 0.2], [0.2, 1.0]])
    part = Scaled(
        table=np.array([[0], [1]]),
        code=np.array([[1, 1], [1, 0]], np.int32),
        pattern=np.array([-1.0, 1.0]),
        scale=np.array([0.5, 0.5]),
    )
    (found,) = levels.settle([part], [W], [H])
    np.testing.assert_allclose(found.scale, [1.0, 0.5])


def test_blocks_of_a_row_settle_without_the_one_that_may_not_move() -> None:
    W, H = np.array([[-1.0, 2.0]]), np.array([[1.0, 0.9], [0.9, 1.0]])
    part = Scaled(
        table=np.array([[0, 1]]), code=np.array([[1, 1]], np.int32), pattern=np.array([-1.0, 1.0]), scale=np.ones(2)
    )
    (found,) = levels.settle([part], [W], [H])
    assert found.scale[0] == 1.0
    assert found.scale[1] == pytest.approx(2 - 0.9 * 2)  # the vertex, given the first weight's error of 2


def test_fixed_scales_stay() -> None:
    W = np.random.default_rng(0).standard_normal((2, 4))
    part = replace(scaled(W, (-1.0, 1.0), 0), fixed=True)
    (found,) = levels.settle([part], [W], [np.eye(4)])
    assert np.array_equal(found.scale, part.scale)


# ---------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize(
    "pattern", [(-2.0, -1.0, 0.0, 1.0), (-1.0, -0.5, 0.0, 0.5, 1.0), (-1.0, -0.25, 0.0, 0.25, 1.0)]
)
def test_the_nearest_entry_of_a_pattern_is_found_and_the_ends_hold(pattern: tuple[float, ...]) -> None:
    part = scaled(np.ones((1, 1)), pattern, 0)
    relative = np.concatenate([np.linspace(-3, 3, 601), np.array(pattern)]) + 1e-6
    found = part.pattern[part.nearest(relative)]
    assert np.array_equal(found, part.pattern[np.abs(relative[:, None] - part.pattern).argmin(1)])
    assert part.nearest(np.array([-0.5 * (abs(pattern[0]) + abs(pattern[1]))]))[0] == 0  # of two as near the lower


@pytest.mark.parametrize("dead", [(0,), (0, 3, 5)])
def test_dead_inputs_and_a_singular_metric_are_no_trouble(dead: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((4, 6))
    X[:, list(dead)] = 0
    W, H = rng.standard_normal((5, 6)), X.T @ X
    for part in (coded(W, 3, 0, rows=True), scaled(W, (-1.0, 0.0, 1.0), 0)):
        found = levels.descend(levels.feedback(part, W, H), W, H)
        (found,) = levels.settle([found], [W], [H])
        assert np.isfinite(found.values).all()
        assert levels.loss(W, H, found.values) <= levels.loss(W, H, levels.round_to(part, W, H).values) * (1 + 1e-9)
        nothing = levels.descend(levels.feedback(part, W, 0 * H), W, 0 * H)
        assert np.array_equal(nothing.values, levels.round_to(part, W).values)
