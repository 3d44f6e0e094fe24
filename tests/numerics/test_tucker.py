"""Tucker splits: planted ranks come back, data never hurt, the ranks that another cannot use are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SHAPES, F, Sampled, layer, layers

from ccompile.numerics import tucker, weighted


def planted(seed: int, o: int, c: int, kh: int, kw: int, s: int, r: int) -> F:
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((o, s)), rng.standard_normal((s, r, kh, kw)), rng.standard_normal((r, c))
    W: F = np.einsum("os,srij,rc->ocij", *factors)
    return W


@pytest.mark.parametrize(("s", "r"), [(1, 1), (2, 3), (5, 2)])
def test_planted_ranks_are_recovered(s: int, r: int) -> None:
    W, H = planted(1, 8, 5, 3, 3, s, r), layer(1, 8, 5).H
    for metric in (None, H):
        split = tucker.fit(W, metric, r, s)
        np.testing.assert_allclose(split.compose(), W, atol=1e-6)
        np.testing.assert_allclose(tucker.fit(W, metric, r).compose(), W, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [None, 9])
def test_full_ranks_are_exact(shape: tuple[int, int, int, int], n: int | None) -> None:
    sample = layer(2, *shape, n=n)
    r, s = tucker.rank_max(shape)
    for H in (None, sample.H):
        for output in (None, s):
            assert tucker.fit(sample.W, H, r, output).error < 1e-7


@pytest.mark.parametrize("output", [None, 4])
def test_the_factors_compose_and_their_sizes_are_known(output: int | None) -> None:
    sample = layer(3, 8, 5, 3, 2)
    for H in (None, sample.H):
        split = tucker.fit(sample.W, H, 3, output)
        B, G, *last = (kernel.reshape(kernel.shape[0], -1) for kernel in split.kernels())
        inner = np.einsum("srt,rc->sct", G.reshape(len(G), 3, 6), B).reshape(len(G), -1)
        What = inner if not last else last[0] @ inner
        np.testing.assert_allclose(What.reshape(sample.W.shape), split.compose(), atol=1e-12)
        assert tuple(kernel.size for kernel in split.kernels()) == tucker.parameters(sample.W.shape, 3, output)
        np.testing.assert_allclose(B @ B.T, np.eye(3), atol=1e-10)
        if split.A is not None:
            np.testing.assert_allclose(split.A.T @ split.A, np.eye(4), atol=1e-10)


def test_without_data_orthogonal_iterations_beat_the_truncated_hosvd() -> None:
    W = layer(4, 12, 10).W
    A = np.linalg.svd(W.reshape(12, -1))[0][:, :3]
    B = np.linalg.svd(W.transpose(1, 0, 2, 3).reshape(10, -1))[0][:, :3].T
    hosvd = float(np.square(W).sum() - np.square(np.einsum("ocij,os,rc->srij", W, A, B)).sum())
    assert tucker.fit(W, None, 3, 3).loss < hosvd


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layers(), st.data())
def test_data_never_hurt(sample: Sampled, data: st.DataObject) -> None:
    o, _, kh, kw = sample.W.shape
    r = data.draw(st.integers(1, tucker.rank_max(sample.W.shape)[0]))
    least = -(-r // (kh * kw))
    s = data.draw(st.sampled_from([None, *range(least, min(o, r * kh * kw) + 1)]))
    split, free = tucker.fit(sample.W, sample.H, r, s), tucker.fit(sample.W, None, r, s)
    assert split.loss <= weighted.loss(sample.H, sample.W, free.compose()) + 1e-12 * sample.energy
    assert split.loss == pytest.approx(sample.measured(split.compose()), rel=1e-6, abs=1e-12 * sample.energy)


@pytest.mark.parametrize("seed", range(4))
def test_sweeps_descend_and_data_help_a_lot(seed: int) -> None:
    sample = layer(seed, 10, 8)
    losses = [tucker.fit(sample.W, sample.H, 3, 4, sweeps).loss for sweeps in range(5)]
    assert losses == sorted(losses, reverse=True)
    free = tucker.fit(sample.W, None, 3, 4).compose()
    assert losses[-1] < 0.9 * weighted.loss(sample.H, sample.W, free)


def test_a_one_by_one_kernel_gives_the_activation_aware_svd() -> None:
    sample = layer(5, 9, 7, 1, 1)
    for rank in (1, 3, 6):
        A, B = weighted.truncate(sample.W.reshape(9, 7), sample.H, rank)
        best = weighted.loss(sample.H, sample.W.reshape(9, 7), A @ B)
        assert tucker.fit(sample.W, sample.H, rank).loss == pytest.approx(best, rel=1e-2)
        assert tucker.fit(sample.W, sample.H, rank, rank, 100).loss >= best * (1 - 1e-9)


def test_a_full_output_rank_is_the_input_side_only() -> None:
    sample = layer(6, 6, 5)
    one, two = tucker.fit(sample.W, sample.H, 2), tucker.fit(sample.W, sample.H, 2, 6)
    assert one.loss == pytest.approx(two.loss, rel=1e-6)


def test_equal_input_gives_equal_bytes() -> None:
    sample = layer(7)
    first, again = (tucker.fit(sample.W.copy(), sample.H.copy(), 2, 3) for _ in range(2))
    assert [k.tobytes() for k in first.kernels()] == [k.tobytes() for k in again.kernels()]


@pytest.mark.parametrize(("r", "s"), [(0, 1), (5, None), (1, 0), (1, 7), (4, 1)])
def test_ranks_that_make_no_sense_are_refused(r: int, s: int | None) -> None:
    sample = layer(8, 6, 4, 1, 3)
    with pytest.raises(ValueError, match="must lie in 1"):
        tucker.fit(sample.W, sample.H, r, s)
