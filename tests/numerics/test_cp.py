"""CP splits: planted factors come back, data never hurt, cancelling terms are flagged and corrected."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import F, Sampled, layer, layers

from ccompile.numerics import canonical, cp, weighted
from ccompile.numerics.cp import Way

WAYS: tuple[Way, Way] = (3, 4)


def planted(seed: int, o: int, c: int, kh: int, kw: int, rank: int) -> F:
    rng = np.random.default_rng(seed)
    factors = [rng.standard_normal(shape) for shape in ((o, rank), (rank, c), (rank, kh), (rank, kw))]
    W: F = np.einsum("or,rc,ri,rj->ocij", *factors)
    return W


def border(a: F, b: F) -> F:
    """Return a tensor of rank 3 that tensors of rank 2 approach as closely as they like."""
    W: F = sum(np.einsum("i,j,k->ijk", *term) for term in ((a, a, b), (a, b, a), (b, a, a)))[..., None]
    return W


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("sides", [(3, 3), (3, 5), (1, 7)])
def test_planted_ranks_are_recovered(rank: int, sides: tuple[int, int], way: Way) -> None:
    W, H = planted(rank, 8, 5, *sides, rank), layer(1, 8, 5, *sides).H
    for metric in (None, H):
        found = cp.fit(W, metric, rank, way)
        np.testing.assert_allclose(found.compose(), W, atol=1e-6)
        assert not found.degenerate


def test_a_planted_rank_is_recovered_from_random_starts_too() -> None:
    W = planted(5, 8, 6, 3, 3, 3)
    problem = canonical.Problem(W, None, 4)
    states = [problem.run(problem.solve(canonical.random(W.shape, 3, seed)), 500, 0.0) for seed in range(3)]
    assert min(state.loss for state in states) < 1e-12 * np.square(W).sum()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(3, 2, 2, 2), (2, 3, 1, 3), (4, 3, 1, 1)])
def test_full_rank_is_exact(shape: tuple[int, int, int, int], way: Way) -> None:
    sample = layer(2, *shape)
    for H in (None, sample.H):
        assert cp.fit(sample.W, H, cp.rank_max(shape, way), way, sweeps=400).error < 1e-5


def test_for_a_matrix_it_is_the_svd() -> None:
    W = layer(3, 9, 6, 1, 1).W
    for rank in (1, 3, 5):
        want = float(np.square(weighted.spectrum(W.reshape(9, 6), None)[rank:]).sum())
        assert cp.fit(W, None, rank).loss == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_the_kernels_in_sequence_are_the_composed_convolution(way: Way) -> None:
    sample = layer(4, 6, 4, 3, 5)
    found = cp.fit(sample.W, sample.H, 5, way)
    first, *middle, last = found.kernels()
    kernel = middle[0][:, 0] if way == 3 else middle[0][:, 0] * middle[1][:, 0]
    What = np.einsum("or,rij,rc->ocij", last[:, :, 0, 0], kernel, first[:, :, 0, 0])
    np.testing.assert_allclose(What, found.compose(), atol=1e-12)
    assert tuple(k.size for k in (first, *middle, last)) == cp.parameters(sample.W.shape, 5, way)
    np.testing.assert_allclose(np.linalg.norm(kernel.reshape(5, -1), axis=1), 1)
    np.testing.assert_allclose(np.linalg.norm(found.a, axis=0), np.linalg.norm(found.b, axis=1))
    terms = np.einsum("or,rc,rij->rocij", found.a, found.b, kernel)
    assert found.degeneracy == pytest.approx(np.square(terms).sum() / np.square(sample.W).sum())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(layers(), st.sampled_from(WAYS), st.data())
def test_data_never_hurt(sample: Sampled, way: Way, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(5, cp.rank_max(sample.W.shape, way))))
    found, free = (cp.fit(sample.W, H, rank, way, 1, 12) for H in (sample.H, None))
    slack = 1e-12 * sample.energy * max(1.0, found.degeneracy)
    assert found.loss <= weighted.loss(sample.H, sample.W, free.compose()) * (1 + 1e-9) + slack
    assert found.loss == pytest.approx(sample.measured(found.compose()), rel=1e-6, abs=slack)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(3))
def test_sweeps_descend_and_data_help_a_lot(seed: int, way: Way) -> None:
    sample = layer(seed, 8, 6)
    found, free = (cp.fit(sample.W, H, 6, way) for H in (sample.H, None))
    assert found.loss < 0.9 * weighted.loss(sample.H, sample.W, free.compose())
    problem = canonical.Problem(sample.W if way == 4 else sample.W.reshape(8, 6, 9), sample.H, 4)
    state = problem.solve(canonical.random(problem.shape, 6, seed))
    for _ in range(20):
        before, state = state, problem.sweep(state)
        assert state.loss <= before.loss * (1 + 1e-12)


def test_long_factors_find_what_exact_solves_find(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = layer(5, 8, 6)
    exact = cp.fit(sample.W, sample.H, 5)
    monkeypatch.setattr(canonical, "EXACT_SIZE", 0)
    assert cp.fit(sample.W, sample.H, 5, steps=30).loss == pytest.approx(exact.loss, rel=0.1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(4))
def test_the_tensor_without_a_best_approximation_is_flagged(seed: int, way: Way) -> None:
    rng = np.random.default_rng(seed)
    a, b = np.eye(2) if seed == 0 else rng.standard_normal((2, 4))
    early, late = (cp.fit(border(a, b), None, 2, way, sweeps=sweeps) for sweeps in (60, 2000))
    assert late.error < early.error < 0.05
    assert late.degeneracy > early.degeneracy, "the norms grow as the error falls"
    assert early.degenerate
    assert late.degenerate
    assert cp.fit(border(a, b), None, 1, way).degenerate is False


@pytest.mark.parametrize("way", WAYS)
def test_a_correction_tames_what_cancels(way: Way) -> None:
    found = cp.fit(border(*np.eye(2)), None, 2, way, sweeps=500)
    tamed = cp.correct(found, border(*np.eye(2)), None, 0.1)
    assert tamed.error <= 0.1 * (1 + 1e-9)
    assert tamed.degeneracy < 0.2 * found.degeneracy


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("with_data", [False, True])
def test_a_correction_keeps_the_error_and_lowers_the_norms(way: Way, with_data: bool) -> None:
    sample = layer(6, 8, 6)
    H = sample.H if with_data else None
    found = cp.fit(sample.W, H, 8, way)
    sizes = [cp.correct(found, sample.W, H, found.error * slack).degeneracy for slack in (1.0, 1.02, 1.1, 1.5)]
    assert all(size <= found.degeneracy for size in sizes)
    assert sizes[-1] < sizes[1] < 0.9 * found.degeneracy
    assert cp.correct(found, sample.W, H, 1.02 * found.error).error <= 1.02 * found.error * (1 + 1e-9)


def test_a_correction_of_nothing_is_nothing() -> None:
    sample = layer(9)
    for W, H in ((0 * sample.W, sample.H), (sample.W, 0 * sample.H), (0 * sample.W, None)):
        found = cp.fit(W, H, 2)
        assert np.isfinite(cp.correct(found, W, H, 0.1).compose()).all()


def test_equal_input_gives_equal_bytes() -> None:
    sample = layer(7)
    first, again = (cp.fit(sample.W.copy(), sample.H.copy(), 5) for _ in range(2))
    assert [k.tobytes() for k in first.kernels()] == [k.tobytes() for k in again.kernels()]


def test_what_does_not_fit_is_refused() -> None:
    sample = layer(8)
    with pytest.raises(ValueError, match=r"rank 0 must lie in 1 \.\. 36"):
        cp.fit(sample.W, sample.H, 0)
    with pytest.raises(ValueError, match="need"):
        cp.fit(sample.W, sample.H[:-1, :-1], 2)
    found = cp.fit(sample.W, sample.H, 2)
    with pytest.raises(ValueError, match="must be >="):
        cp.correct(found, sample.W, sample.H, 0.5 * found.error)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("data", [False, True])
def test_a_curve_tells_about_what_fits_lose(way: Way, data: bool) -> None:
    sample = layer(3, 8, 6)
    H, most = sample.H if data else None, cp.rank_max(sample.W.shape, way)
    ranks = [2, 5, 9, 14, most]
    told = cp.losses(sample.W, H, ranks, way)
    fitted = [cp.fit(sample.W, H, rank, way).loss for rank in ranks]
    assert told[-1] == 0
    assert list(np.diff(told) < 0) == [True] * 4
    for a, b in zip(told[:3], fitted[:3], strict=True):
        assert 0.8 * b <= a <= 1.5 * b
