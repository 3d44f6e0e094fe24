from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccompile.numerics import sketch
from ccompile.numerics.sketch import SPREAD, distance, sketch_pairs, sketch_run


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("seed", range(5))
def test_the_distance_of_dense_vectors_is_within_five_deviations(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(20_000)
    y = x + scale * rng.standard_normal(20_000)
    found = distance(sketch_run(0, x), sketch_run(0, y))
    assert found == pytest.approx(np.linalg.norm(x - y), rel=5 * SPREAD)


def test_one_entry_that_moved_is_seen_exactly() -> None:
    x = np.random.default_rng(0).standard_normal(100_000)
    y = x.copy()
    y[77_777] += 0.25
    assert distance(sketch_run(0, x), sketch_run(0, y)) == pytest.approx(0.25, rel=1e-9)


def test_equal_vectors_have_distance_zero_and_swapped_entries_do_not() -> None:
    x = np.random.default_rng(0).standard_normal(1000)
    assert distance(sketch_run(0, x), sketch_run(0, x.copy())) == 0
    assert distance(sketch_run(0, x), sketch_run(0, x[::-1])) > 1


@given(st.integers(0, 2**40), st.integers(0, 50), st.integers(0, 2**32 - 1))
def test_a_sketch_does_not_depend_on_where_the_vector_was_cut(start: int, cut: int, seed: int) -> None:
    x = np.random.default_rng(seed).integers(-100, 100, 50).astype(np.float64)
    parts = sketch_run(start, x[:cut]) + sketch_run(start + cut, x[cut:])
    assert np.array_equal(parts, sketch_run(start, x))


@given(st.integers(-5, 5), st.integers(0, 2**32 - 1))
def test_a_sketch_is_linear(factor: int, seed: int) -> None:
    x, y = np.random.default_rng(seed).integers(-100, 100, (2, 64)).astype(np.float64)
    assert np.array_equal(sketch_run(3, x + factor * y), sketch_run(3, x) + factor * sketch_run(3, y))


def test_long_vectors_are_hashed_in_chunks_to_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.arange(1000.0)
    whole = sketch_run(5, x), sketch_pairs(5, x)
    monkeypatch.setattr(sketch, "_CHUNK", 7)
    assert np.array_equal(sketch_run(5, x), whole[0])
    assert np.array_equal(sketch_pairs(5, x), whole[1])


@pytest.mark.parametrize("moved", [0, 1, 40, 3000])
def test_pairs_count_the_positions_that_differ(moved: int) -> None:
    rng = np.random.default_rng(moved)
    a = rng.integers(0, 10, 5000)
    b = a.copy()
    b[rng.choice(5000, moved, replace=False)] += 1
    found = distance(sketch_pairs(0, a), sketch_pairs(0, b)) ** 2 / 2
    assert found == pytest.approx(moved, rel=10 * SPREAD)
