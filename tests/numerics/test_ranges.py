"""Histograms count what they were given; grids hold 0; ranges are those of a brute-force search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccompile.numerics import ranges
from ccompile.numerics.ranges import Grid, Histogram


def histogram(*batches: np.ndarray) -> Histogram:
    found = Histogram()
    for batch in batches:
        found.add(batch.astype(np.float32))
    return found


def outliers(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.standard_normal(20_000), [60.0, -40.0]])


@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), min_size=1, max_size=6))
def test_every_value_is_counted_in_its_bin_however_the_range_grows(batches: list[list[float]]) -> None:
    found = histogram(*map(np.array, batches))
    values = np.concatenate([np.array(batch, np.float32) for batch in batches]).astype(np.float64)
    assert found.counts.sum() == values.size
    assert (found.low, found.high) == (values.min(), values.max())
    wanted = np.bincount(np.floor(values / found.width).astype(np.int64) - found.start, minlength=len(found.counts))
    assert (found.counts == wanted).all()
    assert len(found.counts) <= ranges.BINS + 2


def test_the_order_of_batches_does_not_matter() -> None:
    a, b = outliers(1), outliers(2) * 100
    one, other = histogram(a, b), histogram(b, a)
    assert (one.exponent, one.low, one.high) == (other.exponent, other.low, other.high)
    assert one.quantile(0.3) == other.quantile(0.3)


def test_what_is_not_finite_is_left_out() -> None:
    found = histogram(np.array([1.0, np.nan, np.inf, -2.0]))
    assert (found.low, found.high, found.counts.sum()) == (-2.0, 1.0, 2)


def test_a_large_batch_is_sampled_but_its_extremes_are_exact() -> None:
    values = np.zeros(1 << 20)
    values[[12_345, 54_321]] = 3.0, -7.0
    found = histogram(values)
    assert (found.low, found.high) == (-7.0, 3.0)
    assert 0 < found.counts.sum() < values.size


@given(st.floats(-1e5, 1e5), st.floats(-1e5, 1e5), st.sampled_from([3, 128, 256]))
def test_zero_is_exact_on_every_grid(a: float, b: float, levels: int) -> None:
    at = ranges.grid(min(a, b), max(a, b), levels)
    assert 0 <= at.zero < levels
    assert at.decode(at.encode(np.zeros(1)))[0] == 0.0


def test_scale_and_zero_follow_the_formulas() -> None:
    at = ranges.grid(-1.0, 4.1)
    assert at.scale == pytest.approx(5.1 / 255)
    assert at.zero == round(1.0 / (5.1 / 255)) == 50


def test_values_on_the_grid_are_exact_and_others_within_half_a_step() -> None:
    at = Grid(0.125, 17)
    codes = np.arange(256)
    assert (at.encode(at.decode(codes)) == codes).all()
    x = np.random.default_rng(0).uniform(at.low, at.high, 1000)
    assert np.abs(at.decode(at.encode(x)) - x).max() <= at.scale / 2 + 1e-12


def test_values_outside_saturate() -> None:
    at = ranges.grid(-1.0, 1.0)
    assert at.encode(np.array([-5.0, 5.0])).tolist() == [0, 255]


def test_a_range_of_nothing_but_zero_has_a_grid() -> None:
    assert ranges.grid(0.0, 0.0) == Grid(1.0, 0)


def test_the_least_squares_range_is_that_of_a_brute_force_search() -> None:
    found = histogram(outliers())
    shares = np.linspace(0.02, 1, 60)
    tried = [
        ranges.squared_error(found, found.low * a, found.high * b, 16) for a, b in itertools.product(shares, shares)
    ]
    best = ranges.squared_error(found, *ranges.least_squares(found, 16), 16)
    assert best <= 1.6 * min(tried)
    assert best < 0.3 * ranges.squared_error(found, *ranges.minmax(found), 16)


def test_least_squares_never_loses_to_the_whole_range() -> None:
    for seed in range(5):
        found = histogram(np.random.default_rng(seed).standard_t(3, 2000))
        whole, best = ranges.minmax(found), ranges.least_squares(found)
        assert ranges.squared_error(found, *best) <= ranges.squared_error(found, *whole)


def test_a_percentile_leaves_its_share_at_both_ends() -> None:
    found = histogram(np.arange(10_000.0))
    low, high = ranges.percentile(found, 0.98)
    assert low == pytest.approx(100, abs=2 * found.width)
    assert high == pytest.approx(9900, abs=2 * found.width)


def test_entropy_cuts_outliers_and_keeps_a_flat_range() -> None:
    assert ranges.entropy(histogram(outliers()), 64)[1] < 30.0
    flat = histogram(np.random.default_rng(0).uniform(0, 1, 50_000))
    assert ranges.entropy(flat)[1] > 0.95


def test_limits_take_what_lies_beyond_to_themselves() -> None:
    found = histogram(np.array([-3.0, -1.0, 0.5, 2.0, 9.0])).within(0.0, 6.0)
    assert (found.low, found.high, found.counts.sum()) == (0.0, 6.0, 5)
    assert histogram(np.array([1.0])).within(-9.0, 9.0).high == 1.0


@given(st.floats(-8, 0), st.floats(0.1, 8), st.floats(-20, 20))
def test_a_shift_is_a_whole_number_of_steps_or_refused(low: float, high: float, shift: float) -> None:
    low, high = min(low, shift), max(high, shift)
    found = ranges.shifted(low, high, shift)
    plain = ranges.grid(low, high)
    if found is None:
        assert abs(shift) < 0.98 * plain.scale
        return
    at, steps = found
    assert at.scale * steps == pytest.approx(shift, rel=1e-6)
    assert 0.97 * plain.scale <= at.scale <= 2.04 * plain.scale
