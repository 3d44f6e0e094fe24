"""Truncated conjugate gradients descend from wherever they start; sweeps keep the best."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from layers import F

from ccompile.numerics.alternating import alternate, descend, inverse, kronecker


def quadratic(N: F, b: F, f: F) -> float:
    return float(f @ N @ f - 2 * f @ b)


def system(seed: int, size: int = 12, rank: int = 12) -> tuple[F, F, F]:
    """Return N[size, size] of this rank, a right side in its range, and a start."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((size, rank)) * np.arange(1, rank + 1) ** -2.0
    N: F = root @ root.T
    return N, N @ rng.standard_normal(size), rng.standard_normal(size)


@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_every_step_descends(rank: int, preconditioned: bool) -> None:
    N, b, start = system(1, rank=rank)
    ready = np.linalg.inv(N + 1e-3 * np.eye(12))
    values = [
        quadratic(N, b, descend(lambda f: N @ f, b, start, k, 0, (lambda f: ready @ f) if preconditioned else None))
        for k in range(9)
    ]
    assert values[0] == quadratic(N, b, start)
    slack = 1e-12 * abs(values[0])
    assert all(later <= earlier + slack for earlier, later in itertools.pairwise(values))
    assert values[-1] < values[0]


def test_enough_steps_solve_the_system() -> None:
    N, b, start = system(2)
    np.testing.assert_allclose(N @ descend(lambda f: N @ f, b, start, 200, 1e-14), b, atol=1e-8 * np.abs(b).max())


def test_a_singular_system_keeps_what_it_does_not_see() -> None:
    N, b, start = system(3, rank=4)
    unseen = np.linalg.svd(N)[0][:, 4:]
    moved = descend(lambda f: N @ f, b, start, 50)
    np.testing.assert_allclose(unseen.T @ moved, unseen.T @ start, atol=1e-8)


def test_the_optimum_stays_where_it_is() -> None:
    N, _, start = system(4)
    np.testing.assert_allclose(descend(lambda f: N @ f, N @ start, start), start)
    assert descend(lambda f: 0 * f, np.ones(3), np.ones(3)).tolist() == [1, 1, 1]


def test_a_kronecker_preconditioner_solves_a_kronecker_system_at_once() -> None:
    left, b, _ = system(5, 3, 3)
    right, _, _ = system(6, 4, 4)
    target = np.outer(b, np.ones(4))
    found = descend(lambda F: left @ F @ right, target, np.zeros((3, 4)), 4, 0, kronecker(left, right))
    np.testing.assert_allclose(left @ found @ right, target, rtol=1e-6)


def test_an_inverse_exists_for_any_semidefinite_matrix() -> None:
    N, _, _ = system(7, rank=3)
    assert np.isfinite(inverse(N)).all()
    assert np.linalg.eigvalsh(inverse(N)).min() > 0
    assert inverse(np.zeros((2, 2))).tolist() == [[1, 0], [0, 1]]


def test_sweeps_keep_the_best_and_stop() -> None:
    seen: list[float] = []

    def sweep(x: float) -> float:
        seen.append(x)
        return x - 3

    assert alternate(10.0, sweep, abs, 100, 0.0) == 1.0
    assert seen == [10, 7, 4, 1], "the sweep from 1 to -2 was worse and ended it"
    assert alternate(10.0, sweep, abs, 0, 0.0) == 10.0
    assert alternate(10.0, sweep, abs, 100, 0.5) == 7.0
