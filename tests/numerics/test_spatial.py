"""Spatial splits: the closed form is the optimum, data never hurt, planted splits come back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SHAPES, F, Sampled, layer, layers

from ccompile.numerics import bottleneck, spatial, weighted
from ccompile.numerics.spatial import Order

ORDERS: tuple[Order, Order] = ("vertical", "horizontal")


def run(W: F, x: F) -> F:
    """Convolve x[c, h, w] with W[o, c, kh, kw], no padding."""
    patches = np.lib.stride_tricks.sliding_window_view(x, W.shape[2:], (1, 2))
    result: F = np.einsum("chwij,ocij->ohw", patches, W)
    return result


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_without_data_the_error_is_the_discarded_spectrum(shape: tuple[int, int, int, int], order: Order) -> None:
    W, s = layer(1, *shape).W, spatial.spectrum(layer(1, *shape).W, order)
    assert len(s) == spatial.rank_max(W.shape, order)
    for rank in range(1, len(s) + 1):
        split = spatial.fit(W, None, rank, order)
        assert split.loss == pytest.approx(np.square(s[rank:]).sum(), abs=1e-12 * np.square(s).sum())
        assert split.loss == pytest.approx(float(np.square(split.compose() - W).sum()))


@pytest.mark.parametrize("order", ORDERS)
def test_the_kernels_in_sequence_are_the_composed_convolution(order: Order) -> None:
    W, x = layer(2, 5, 3, 3, 5).W, np.random.default_rng(0).standard_normal((3, 9, 10))
    split = spatial.fit(W, None, 4, order)
    first, second = split.kernels()
    np.testing.assert_allclose(run(second, run(first, x)), run(split.compose(), x), atol=1e-10)
    assert (first.size, second.size) == spatial.parameters(W.shape, 4, order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(10))
def test_no_alternating_start_beats_the_closed_form(order: Order, seed: int) -> None:
    W, rng = layer(3).W, np.random.default_rng(seed)
    M = (W if order == "vertical" else W.transpose(0, 1, 3, 2)).transpose(1, 2, 0, 3).reshape(12, 18)
    V = rng.standard_normal((12, 4))
    for _ in range(300):
        U = np.linalg.lstsq(V, M, rcond=None)[0]
        V = np.linalg.lstsq(U.T, M.T, rcond=None)[0].T
    assert spatial.fit(W, None, 4, order).loss <= np.square(V @ U - M).sum() * (1 + 1e-12)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [None, 9])
def test_full_rank_is_exact(shape: tuple[int, int, int, int], order: Order, n: int | None) -> None:
    sample = layer(4, *shape, n=n)
    split = spatial.fit(sample.W, sample.H, spatial.rank_max(shape, order), order)
    assert split.error < 1e-7
    assert split.loss == pytest.approx(sample.measured(split.compose()), abs=1e-12 * sample.energy)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_planted_split_is_recovered(order: Order, rank: int) -> None:
    sample = layer(5, 8, 4, 3, 5)
    planted = spatial.fit(sample.W, None, rank, order).compose()
    for H in (None, sample.H):
        split = spatial.fit(planted, H, rank, order)
        np.testing.assert_allclose(split.compose(), planted, atol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layers(), st.sampled_from(ORDERS), st.data())
def test_data_never_hurt(sample: Sampled, order: Order, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, spatial.rank_max(sample.W.shape, order)))
    split = spatial.fit(sample.W, sample.H, rank, order)
    free = weighted.loss(sample.H, sample.W, spatial.fit(sample.W, None, rank, order).compose())
    assert split.loss <= free + 1e-12 * sample.energy
    assert split.loss == pytest.approx(sample.measured(split.compose()), rel=1e-6, abs=1e-12 * sample.energy)
    V = split.V.reshape(rank, -1)
    np.testing.assert_allclose(V @ V.T, np.eye(rank), atol=1e-10)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(4))
def test_data_help_a_lot_and_no_random_start_does_much_better(order: Order, seed: int) -> None:
    sample = layer(seed, 8, 4, 3, 3)
    split = spatial.fit(sample.W, sample.H, 4, order)
    free = weighted.loss(sample.H, sample.W, spatial.fit(sample.W, None, 4, order).compose())
    assert split.loss < 0.9 * free
    # Any start, then the same sweeps: the optimum is not known, but the prepared start should be among the best.
    turned = np.arange(36).reshape(4, 3, 3).transpose((0, 1, 2) if order == "vertical" else (0, 2, 1)).ravel()
    W = sample.W.reshape(8, 36)[:, turned].reshape(8, 12, 3)
    problem = bottleneck.Problem(W, sample.H[np.ix_(turned, turned)], None)
    for start in range(5):
        B = np.linalg.qr(np.random.default_rng(start).standard_normal((12, 4)))[0].T
        state = problem.solve(B)
        for _ in range(30):
            state = problem.sweep(state, 5)
        assert split.loss <= 1.15 * state.loss


@pytest.mark.parametrize("order", ORDERS)
def test_sweeps_descend(order: Order) -> None:
    sample = layer(6, 9, 5, 3, 3)
    losses = [spatial.fit(sample.W, sample.H, 5, order, sweeps).loss for sweeps in range(6)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_uncorrelated_inputs_change_nothing() -> None:
    W = layer(7).W
    free, data = spatial.fit(W, None, 5), spatial.fit(W, 3.0 * np.eye(36), 5)
    assert data.loss == pytest.approx(3 * free.loss)
    assert data.error == pytest.approx(free.error)


def test_a_dead_column_costs_nothing() -> None:
    sample = layer(8, dead=(0, 4, 20))
    split = spatial.fit(sample.W, sample.H, 4)
    changed = sample.W.copy().reshape(6, -1)
    changed[:, [0, 4, 20]] = 100.0
    assert split.loss == pytest.approx(weighted.loss(sample.H, changed.reshape(sample.W.shape), split.compose()))


def test_equal_input_gives_equal_bytes() -> None:
    sample = layer(9)
    first, again = (spatial.fit(sample.W.copy(), sample.H.copy(), 4) for _ in range(2))
    assert first.U.tobytes() == again.U.tobytes()
    assert first.V.tobytes() == again.V.tobytes()


def test_wrong_ranks_and_shapes_are_refused() -> None:
    sample = layer(10)
    for rank in (0, 13):
        with pytest.raises(ValueError, match=r"must lie in 1 \.\. 12"):
            spatial.fit(sample.W, sample.H, rank)
    with pytest.raises(ValueError, match="need"):
        spatial.fit(sample.W, sample.H[:-1, :-1], 2)
