"""Refits against numpy's least squares, realisable targets and the promise to be never worse."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccompile.numerics.least_squares import affine_repair, center, quadratic_error, refit, refit_wide, relative_error

F = npt.NDArray[np.floating[Any]]


def data(seed: int, n: int = 100, d: int = 8, o: int = 3, rank: int | None = None) -> tuple[F, F, F]:
    """Return inputs X[n, d] of the given rank, targets Y[n, o] and a start W0[o, d]."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, rank or d)) @ rng.normal(size=(rank or d, d))
    return X, rng.normal(size=(n, o)) + X[:, :1], rng.normal(size=(o, d))


def error(X: F, Y: F, W: F) -> float:
    return float(np.square(Y - X @ W.T).sum())


def test_refit_is_numpys_least_squares() -> None:
    X, Y, W0 = data(0)
    fit = refit(X.T @ X, Y.T @ X, W0, 0.0)
    np.testing.assert_allclose(fit.W, np.linalg.lstsq(X, Y, rcond=None)[0].T, rtol=1e-10, atol=1e-12)
    assert (fit.rank, fit.unchanged) == (8, 0)


def test_refit_with_a_ridge_is_least_squares_on_extended_data() -> None:
    X, Y, W0 = data(1)
    root = np.sqrt(0.3 * np.square(X).sum() / 8)
    longer, targets = np.vstack([X, root * np.eye(8)]), np.vstack([Y, root * W0.T])
    want = np.linalg.lstsq(longer, targets, rcond=None)[0].T
    np.testing.assert_allclose(refit(X.T @ X, Y.T @ X, W0, 0.3).W, want, rtol=1e-10)


def test_a_realisable_target_is_reproduced_through_changed_inputs() -> None:
    rng = np.random.default_rng(2)
    source, W = rng.normal(size=(60, 5)), rng.normal(size=(3, 5))
    mixed = source @ rng.normal(size=(5, 5))
    Y = source @ W.T
    fit = refit(mixed.T @ mixed, Y.T @ mixed, W, 0.0)
    np.testing.assert_allclose(mixed @ fit.W.T, Y, atol=1e-10)


def test_a_huge_ridge_keeps_the_weight() -> None:
    X, Y, W0 = data(3)
    np.testing.assert_allclose(refit(X.T @ X, Y.T @ X, W0, 1e12).W, W0, atol=1e-9)


@pytest.mark.parametrize("planted", ["rank", "duplicate", "dead"])
def test_rank_deficient_inputs_are_fitted_and_the_rest_of_the_weight_stays(planted: str) -> None:
    X, Y, W0 = data(4, rank=5 if planted == "rank" else None)
    if planted == "duplicate":
        X[:, 3] = X[:, 1]
    if planted == "dead":
        X[:, 3] = 0
    fit = refit(X.T @ X, Y.T @ X, W0, 0.0)
    assert fit.rank == {"rank": 5, "duplicate": 7, "dead": 7}[planted]
    best = np.linalg.lstsq(X, Y, rcond=None)[0].T
    assert error(X, Y, fit.W) == pytest.approx(error(X, Y, best), rel=1e-8)
    outside = np.eye(8) - np.linalg.pinv(X) @ X
    np.testing.assert_allclose((fit.W - W0) @ outside, 0, atol=1e-8)
    assert refit(X.T @ X, Y.T @ X, W0, 0.01).rank == 8


def test_zero_inputs_leave_the_weight_alone() -> None:
    W0 = np.ones((2, 3))
    fit = refit(np.zeros((3, 3)), np.zeros((2, 3)), W0, 0.01)
    assert np.array_equal(fit.W, W0)
    assert (fit.rank, fit.unchanged) == (0, 2)


@pytest.mark.parametrize("ridge", [0.0, 0.01])
@pytest.mark.parametrize(("n", "d"), [(10, 30), (30, 10), (12, 12)])
def test_the_wide_form_equals_the_narrow_one(n: int, d: int, ridge: float) -> None:
    X, Y, W0 = data(5, n=n, d=d)
    narrow, wide = refit(X.T @ X, Y.T @ X, W0, ridge), refit_wide(X, Y, W0, ridge)
    np.testing.assert_allclose(wide.W, narrow.W, rtol=1e-6, atol=1e-7)
    if ridge == 0:
        assert wide.rank == narrow.rank == min(n, d)


def test_moments_give_the_error_of_the_samples() -> None:
    X, Y, W = data(6)
    H, C, yy = X.T @ X, Y.T @ X, float(np.square(Y).sum())
    assert quadratic_error(H, C, yy, W) == pytest.approx(error(X, Y, W), rel=1e-12)
    assert relative_error(H, C, yy, W) == pytest.approx(np.sqrt(error(X, Y, W) / yy))
    assert relative_error(H, 0 * C, 0.0, W) == float("inf")
    assert relative_error(H, 0 * C, 0.0, 0 * W) == 0.0


def test_centred_moments_give_the_fit_with_a_bias() -> None:
    X, Y, W0 = data(7)
    X, Y = X + 3, Y - 2
    H, C = center(X.T @ X, Y.T @ X, X.mean(0), Y.mean(0), len(X))
    fit = refit(H, C, W0, 0.0)
    bias = Y.mean(0) - fit.W @ X.mean(0)
    want = np.linalg.lstsq(np.column_stack([X, np.ones(len(X))]), Y, rcond=None)[0].T
    np.testing.assert_allclose(np.column_stack([fit.W, bias]), want, rtol=1e-8, atol=1e-10)
    assert error(X, Y - bias, fit.W) <= error(X, Y, refit(X.T @ X, Y.T @ X, W0, 0.0).W)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 4)),
    scale=st.floats(-6, 6),
    ridge=st.sampled_from([0.0, 1e-8, 0.01, 1.0]),
    solved=st.booleans(),
)
def test_a_refit_is_never_worse_than_its_start(
    seed: int, shape: tuple[int, int, int], scale: float, ridge: float, solved: bool
) -> None:
    n, d, o = shape
    X, Y, W0 = data(seed, n, d, o)
    X = X * 10.0 ** np.random.default_rng(seed).uniform(-abs(scale), abs(scale), d)
    if solved:
        W0 = np.linalg.lstsq(X, Y, rcond=None)[0].T
    before = error(X, Y, W0)
    for fit in (refit(X.T @ X, Y.T @ X, W0, ridge), refit_wide(X, Y, W0, ridge)):
        assert error(X, Y, fit.W) <= before + 1e-9 * float(np.square(Y).sum() + np.square(X @ W0.T).sum())


def test_wrong_shapes_and_values_are_refused() -> None:
    with pytest.raises(ValueError, match="need"):
        refit(np.eye(2), np.ones((1, 3)), np.ones((1, 3)), 0.0)
    with pytest.raises(ValueError, match="need"):
        refit_wide(np.ones((4, 2)), np.ones((3, 1)), np.ones((1, 2)), 0.0)
    with pytest.raises(ValueError, match="not finite"):
        refit(np.full((1, 1), np.nan), np.ones((1, 1)), np.ones((1, 1)), 0.0)
    with pytest.raises(ValueError, match="ridge"):
        refit(np.eye(1), np.ones((1, 1)), np.ones((1, 1)), -1.0)
    with pytest.raises(ValueError, match="rho"):
        affine_repair(np.zeros(1), np.ones(1), np.ones(1), np.zeros(1), 1.5)


def moments(now: F, source: F) -> tuple[F, F, F, F]:
    centred = now - now.mean(0)
    return now.mean(0), np.square(centred).mean(0), (centred * (source - source.mean(0))).mean(0), source.mean(0)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), rho=st.floats(0, 1))
def test_affine_repair_is_never_worse_and_better_with_less_shrinkage(seed: int, rho: float) -> None:
    rng = np.random.default_rng(seed)
    source = rng.normal(size=(20, 4))
    now = source * rng.normal(size=4) + rng.normal(size=(20, 4)) * rng.uniform(0, 2) + rng.normal(size=4)
    errors = [np.square(source - now).mean(0)]
    for strength in (0.0, rho, 1.0):
        g, t = affine_repair(*moments(now, source), strength)
        errors.append(np.square(source - g * now - t).mean(0))
    assert all((after <= before + 1e-12).all() for before, after in itertools.pairwise(errors))


def test_affine_repair_undoes_an_affine_change_and_leaves_constant_channels_their_slope() -> None:
    source = np.random.default_rng(8).normal(size=(50, 3))
    now = source * [0.5, 2.0, 0.0] + [1.0, -3.0, 7.0]
    g, t = affine_repair(*moments(now, source), np.ones(3))
    np.testing.assert_allclose((now * g + t)[:, :2], source[:, :2], atol=1e-12)
    assert g[2] == 1.0
    assert t[2] == pytest.approx(source[:, 2].mean() - 7.0)
