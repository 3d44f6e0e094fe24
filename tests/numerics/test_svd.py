"""Truncated SVD: known answers, the optimum, and the ranks that energies and errors ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ccompile.numerics import svd

if TYPE_CHECKING:
    from ccompile.core import Array

MATRICES = hnp.arrays(np.float64, st.tuples(st.integers(1, 7), st.integers(1, 7)), elements=st.floats(-100, 100))
SPECTRA = st.lists(st.floats(0, 1e3), min_size=1, max_size=9).map(lambda s: np.array(sorted(s, reverse=True)))


def matrix(o: int = 9, i: int = 6, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((o, i))


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_planted_rank_is_recovered(rank: int) -> None:
    W = matrix(20, rank, 1) @ matrix(rank, 12, 2)
    assert svd.rank_for_error(svd.spectrum(W), 1e-10) == rank
    A, B = svd.best(W, rank)
    np.testing.assert_allclose(A @ B, W, atol=1e-12 * np.abs(W).max() * 20)


def test_a_planted_spectrum_is_recovered() -> None:
    left, right = (np.linalg.qr(matrix(6, 6, seed))[0] for seed in (1, 2))
    planted = np.array([5.0, 3.0, 2.0, 1.0, 0.5, 0.1])
    np.testing.assert_allclose(svd.decompose(left * planted @ right)[1], planted, rtol=1e-12)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (5, 5), (1, 4), (4, 1), (1, 1)])
def test_full_rank_is_exact(shape: tuple[int, int]) -> None:
    W = matrix(*shape)
    A, B = svd.best(W, min(shape))
    assert A.shape == (shape[0], min(shape))
    assert B.shape == (min(shape), shape[1])
    assert np.linalg.norm(A @ B - W) <= 1e-12 * np.linalg.norm(W)


@pytest.mark.parametrize("rank", range(7))
def test_the_error_is_the_discarded_spectrum(rank: int) -> None:
    W = matrix()
    s = svd.spectrum(W)
    A, B = svd.best(W, rank)
    lost = W - A @ B
    assert np.linalg.norm(lost) == pytest.approx(np.sqrt(np.square(s[rank:]).sum()), abs=1e-12)
    assert np.linalg.norm(lost, 2) == pytest.approx(s[rank] if rank < 6 else 0, abs=1e-12)
    assert svd.tail_errors(s)[rank] == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(W), abs=1e-12)


def test_no_other_factors_come_closer() -> None:
    W, rng = matrix(), np.random.default_rng(3)
    A, B = svd.best(W, 2)
    best = np.linalg.norm(W - A @ B)
    for _ in range(200):
        guess = rng.standard_normal((9, 2)) if rng.integers(2) else A + 0.01 * rng.standard_normal(A.shape)
        fitted = np.linalg.lstsq(guess, W, rcond=None)[0]  # the best partner that this guess can have
        assert np.linalg.norm(W - guess @ fitted) >= best * (1 - 1e-12)


def test_both_factors_carry_the_same_norm() -> None:
    A, B = svd.best(matrix(), 4)
    np.testing.assert_allclose(np.linalg.norm(A, axis=0), np.linalg.norm(B, axis=1))


def test_signs_are_fixed() -> None:
    W = matrix()
    for scaled in (W, W.astype(np.float32), np.asfortranarray(W), W.copy()[::1]):
        U, _, _ = svd.decompose(scaled)
        assert (np.take_along_axis(U, np.abs(U).argmax(0)[None], 0) > 0).all()
    first, again = svd.decompose(W), svd.decompose(W.copy())
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True))
    np.testing.assert_allclose(svd.decompose(-W)[0], first[0], atol=1e-12)
    np.testing.assert_allclose(svd.decompose(-W)[2], -first[2], atol=1e-12)


def test_single_precision_is_decomposed_in_double() -> None:
    W = matrix().astype(np.float32)
    U, s, V = svd.decompose(W)
    assert {U.dtype, s.dtype, V.dtype} == {np.dtype(np.float64)}
    assert np.linalg.norm(U * s @ V - W) <= 1e-12 * np.linalg.norm(W)


def test_the_input_is_not_written() -> None:
    W = matrix()
    W.flags.writeable = False
    before = W.tobytes()
    svd.decompose(W)
    assert W.tobytes() == before


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_is_refused(bad: float) -> None:
    W = matrix()
    W[2, 3] = bad
    with pytest.raises(np.linalg.LinAlgError, match="not finite"):
        svd.decompose(W)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_large_matrices_go_by_a_gram_matrix(shape: tuple[int, int], rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    W = matrix(*shape).astype(np.float32)
    A, B = svd.best(W, rank)
    s = svd.spectrum(W)
    monkeypatch.setattr(svd, "LARGE", 4)
    np.testing.assert_allclose(svd.spectrum(W), s, rtol=1e-7)
    P, Q = svd.best(W, rank)
    np.testing.assert_allclose(P @ Q, A @ B, atol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(P, axis=0), np.linalg.norm(Q, axis=1), rtol=1e-7)
    again = svd.best(W.copy(), rank)
    assert (again[0].tobytes(), again[1].tobytes()) == (P.tobytes(), Q.tobytes())


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_a_large_matrix_of_a_small_rank_is_given_back(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svd, "LARGE", 4)
    W = matrix(shape[0], 2, 1) @ matrix(2, shape[1], 2)
    for rank in (2, 5):
        A, B = svd.best(W, rank)
        np.testing.assert_allclose(A @ B, W, atol=1e-12 * np.abs(W).max())
    with pytest.raises(np.linalg.LinAlgError, match="not finite"):
        svd.best(np.full(shape, np.nan), 1)


def test_a_matrix_of_zeros_has_rank_one_at_most() -> None:
    s = svd.spectrum(np.zeros((4, 3)))
    assert not s.any()
    assert svd.tail_errors(s).tolist() == [0, 0, 0, 0]
    assert svd.rank_for_energy(s, 1.0) == 1
    assert svd.rank_for_error(s, 0.0) == 1
    A, B = svd.best(np.zeros((4, 3)), 1)
    assert not (A @ B).any()


@pytest.mark.parametrize(
    ("energy", "rank"), [(0.5, 1), (0.64, 1), (0.65, 2), (0.9, 2), (0.99, 2), (0.995, 3), (1.0, 3)]
)
def test_energies_ask_for_known_ranks(energy: float, rank: int) -> None:
    assert svd.rank_for_energy(np.sqrt(np.array([0.64, 0.35, 0.01])), energy) == rank


@pytest.mark.parametrize(("error", "rank"), [(0.99, 1), (0.6, 1), (0.59, 2), (0.1, 2), (0.09, 3), (0.0, 3)])
def test_errors_ask_for_known_ranks(error: float, rank: int) -> None:
    assert svd.rank_for_error(np.sqrt(np.array([0.64, 0.35, 0.01])), error) == rank


@settings(max_examples=100, deadline=None, derandomize=True)
@given(MATRICES)
def test_the_factors_are_an_ordered_orthonormal_decomposition(W: Array) -> None:
    U, s, V = svd.decompose(W)
    k, scale = min(W.shape), max(float(np.abs(W).max()), 1e-300)
    assert U.shape == (W.shape[0], k)
    assert s.shape == (k,)
    assert V.shape == (k, W.shape[1])
    assert (s >= 0).all()
    assert (np.diff(s) <= 0).all()
    np.testing.assert_allclose(U.T @ U, np.eye(k), atol=1e-12)
    np.testing.assert_allclose(V @ V.T, np.eye(k), atol=1e-12)
    np.testing.assert_allclose(U * s @ V, W, atol=1e-12 * scale)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SPECTRA)
def test_tail_errors_fall_from_one_to_zero(s: Array) -> None:
    errors = svd.tail_errors(s)
    assert len(errors) == len(s) + 1
    assert errors[0] == (1 if np.square(s).any() else 0)
    assert errors[-1] == 0
    assert (np.diff(errors) <= 0).all()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SPECTRA, st.floats(0, 0.999))
def test_the_rank_for_an_error_is_the_least_one(s: Array, error: float) -> None:
    rank, errors = svd.rank_for_error(s, error), svd.tail_errors(s)
    assert errors[rank] <= error * (1 + 1e-9)
    assert rank == 1 or errors[rank - 1] > error


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SPECTRA, st.floats(0.001, 1))
def test_the_rank_for_an_energy_is_the_least_one(s: Array, energy: float) -> None:
    rank, squares = svd.rank_for_energy(s, energy), np.square(s)
    assert squares[:rank].sum() >= energy * squares.sum() * (1 - 1e-9)
    assert rank == 1 or squares[: rank - 1].sum() <= energy * squares.sum() * (1 + 1e-9)
