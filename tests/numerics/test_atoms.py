"""Shared kernels: bases are orthonormal and complete, Parseval holds, planted atoms come back, data never hurt."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SHAPES, F, Sampled, layer, layers

from ccompile.numerics import atoms, weighted

Basis = Callable[[int, int], F]

SIDES = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (3, 5), (1, 7), (7, 2), (8, 8)]
BASES: list[Basis] = [atoms.dct_atoms, atoms.haar_atoms]


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("sides", SIDES)
def test_a_basis_is_orthonormal_and_starts_with_the_constant(basis: Basis, sides: tuple[int, int]) -> None:
    found = basis(*sides)
    flat = found.reshape(len(found), -1)
    np.testing.assert_allclose(flat @ flat.T, np.eye(sides[0] * sides[1]), atol=1e-12)
    np.testing.assert_allclose(found[0], 1 / np.sqrt(sides[0] * sides[1]))
    assert np.linalg.matrix_rank(found, tol=1e-9).max() == 1, "atoms are separable"


def test_the_dct_is_that_of_scipy() -> None:
    from scipy.fft import dctn

    kernel = np.random.default_rng(0).standard_normal((3, 5))
    want = np.sort(dctn(kernel, norm="ortho").ravel())
    np.testing.assert_allclose(np.sort(np.tensordot(atoms.dct_atoms(3, 5), kernel, 2)), want)


def test_frequencies_ascend() -> None:
    changes = [np.abs(np.diff(a, axis=0)).sum() + np.abs(np.diff(a, axis=1)).sum() for a in atoms.dct_atoms(4, 4)]
    assert changes[0] < 1e-12
    assert max(changes[:3]) < min(changes[-3:])
    np.testing.assert_allclose(atoms.haar_atoms(4, 4)[1] * 4, np.tile([1, 1, -1, -1], (4, 1)))


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_full_basis_is_exact_and_parseval_gives_every_subset(basis: Basis, shape: tuple[int, int, int, int]) -> None:
    sample = layer(1, *shape)
    found = basis(shape[2], shape[3])
    for H in (None, sample.H):
        assert atoms.fit(sample.W, H, found).error < 1e-7
    energy = np.square(np.tensordot(sample.W, found, ((2, 3), (1, 2)))).sum((0, 1))
    for keep in ([0], range(0, len(found), 2), range(len(found) // 2, len(found))):
        lost = energy.sum() - energy[list(keep)].sum()
        assert atoms.fit(sample.W, None, found[list(keep)]).loss == pytest.approx(lost, abs=1e-12 * energy.sum())


def test_without_data_the_selected_atoms_are_the_best() -> None:
    W, basis = layer(2).W, atoms.dct_atoms(3, 3)
    for count in (1, 3, 8):
        best = min(atoms.fit(W, None, basis[list(keep)]).loss for keep in itertools.combinations(range(9), count))
        assert atoms.fit(W, None, basis[atoms.select(W, None, basis, count)]).loss == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
def test_with_data_the_selected_atoms_are_the_best_or_close(seed: int) -> None:
    sample, basis = layer(seed, 5, 3), atoms.haar_atoms(3, 3)
    for count in (2, 4):
        losses = [atoms.fit(sample.W, sample.H, basis[list(k)]).loss for k in itertools.combinations(range(9), count)]
        keep = atoms.select(sample.W, sample.H, basis, count)
        found = atoms.fit(sample.W, sample.H, basis[keep]).loss
        assert keep.tolist() == sorted(set(keep.tolist()))
        assert min(losses) * (1 - 1e-9) <= found <= 1.3 * min(losses)
        free = basis[atoms.select(sample.W, None, basis, count)]
        assert found <= atoms.fit(sample.W, sample.H, free).loss * (1 + 1e-9)


def test_a_kernel_without_detail_needs_one_wavelet() -> None:
    W = np.random.default_rng(3).standard_normal((6, 4, 1, 1)) * np.ones((1, 1, 4, 4))
    basis = atoms.haar_atoms(4, 4)
    assert atoms.select(W, None, basis, 1).tolist() == [0]
    np.testing.assert_allclose(atoms.fit(W, None, basis[:1]).compose(), W, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_planted_separable_atoms_are_recovered(count: int) -> None:
    rng = np.random.default_rng(4)
    planted = np.einsum("mi,mj->mij", rng.standard_normal((count, 3)), rng.standard_normal((count, 5)))
    W = np.tensordot(rng.standard_normal((8, 4, count)), planted, 1)
    for H in (None, layer(4, 8, 4, 3, 5).H):
        np.testing.assert_allclose(atoms.learn(W, H, count).compose(), W, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_learned_atoms_are_exact(shape: tuple[int, int, int, int]) -> None:
    sample = layer(5, *shape)
    for H in (None, sample.H):
        found = atoms.learn(sample.W, H, shape[2] * shape[3])
        assert found.error < 1e-7
        assert found.v is not None
        assert found.h is not None
        np.testing.assert_allclose(np.einsum("mi,mj->mij", found.v, found.h), found.atoms)
        assert found.P.size + found.v.size + found.h.size == sum(atoms.parameters(shape, len(found.atoms)))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(layers(), st.data())
def test_data_never_hurt(sample: Sampled, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, sample.W.shape[2] * sample.W.shape[3]))
    found, free = (atoms.learn(sample.W, H, count, 5) for H in (sample.H, None))
    assert found.loss <= weighted.loss(sample.H, sample.W, free.compose()) * (1 + 1e-9) + 1e-12 * sample.energy
    assert found.loss == pytest.approx(sample.measured(found.compose()), rel=1e-6, abs=1e-12 * sample.energy)
    fixed = atoms.dct_atoms(*sample.W.shape[2:])[:count]
    least, plain = (atoms.fit(sample.W, H, fixed) for H in (sample.H, None))
    assert least.loss <= weighted.loss(sample.H, sample.W, plain.compose()) + 1e-12 * sample.energy


@pytest.mark.parametrize("seed", range(3))
def test_learned_atoms_lose_less_than_fixed_ones(seed: int) -> None:
    sample = layer(seed, 8, 5)
    basis = atoms.dct_atoms(3, 3)
    fixed = atoms.fit(sample.W, sample.H, basis[atoms.select(sample.W, sample.H, basis, 3)])
    assert atoms.learn(sample.W, sample.H, 3).loss < fixed.loss


def test_sweeps_descend() -> None:
    sample = layer(6)
    losses = [atoms.learn(sample.W, sample.H, 3, sweeps).loss for sweeps in (0, 5, 10, 20)]
    assert losses == sorted(losses, reverse=True)


def test_equal_input_gives_equal_bytes() -> None:
    sample = layer(7)
    first, again = (atoms.learn(sample.W.copy(), sample.H.copy(), 3) for _ in range(2))
    assert first.P.tobytes() == again.P.tobytes()
    assert first.atoms.tobytes() == again.atoms.tobytes()


def test_what_does_not_fit_is_refused() -> None:
    sample = layer(8)
    with pytest.raises(ValueError, match="need"):
        atoms.fit(sample.W, None, atoms.dct_atoms(3, 2))
    with pytest.raises(ValueError, match="no complete orthonormal basis"):
        atoms.select(sample.W, None, atoms.dct_atoms(3, 3)[:5], 2)
    with pytest.raises(ValueError, match="count 10 must lie in"):
        atoms.learn(sample.W, sample.H, 10)
    with pytest.raises(ValueError, match="count 0 must lie in"):
        atoms.select(sample.W, None, atoms.dct_atoms(3, 3), 0)
