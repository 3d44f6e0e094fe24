"""Entropy, Huffman code lengths and relative indices, against brute force and known answers."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccompile.numerics.huffman import average_length, code_lengths, entropy, relative_entries

if TYPE_CHECKING:
    from ccompile.core import Array

COUNTS = st.lists(st.integers(0, 10_000), min_size=1, max_size=64).map(np.array)


def best_length(counts: list[int]) -> int:
    """Return the fewest bits of any prefix code, over all lengths that Kraft's inequality allows."""
    options = itertools.product(range(1, len(counts)), repeat=len(counts))
    allowed = (lengths for lengths in options if sum(2.0**-bits for bits in lengths) <= 1)
    return min(sum(n * bits for n, bits in zip(counts, lengths, strict=True)) for lengths in allowed)


@given(COUNTS.filter(lambda counts: np.count_nonzero(counts) >= 2))
def test_the_kraft_sum_of_a_huffman_code_is_one(counts: Array) -> None:
    lengths = code_lengths(counts)
    assert sum(2.0 ** -int(bits) for bits in lengths[counts > 0]) == 1
    assert not lengths[counts == 0].any()


@given(COUNTS.filter(lambda counts: np.count_nonzero(counts) >= 2))
def test_the_average_length_lies_between_the_entropy_and_one_bit_more(counts: Array) -> None:
    found = entropy(counts)
    assert found - 1e-9 <= average_length(counts) < found + 1


@given(st.lists(st.integers(1, 40), min_size=2, max_size=5))
def test_no_prefix_code_is_shorter(counts: list[int]) -> None:
    assert int(np.array(counts) @ code_lengths(np.array(counts))) == best_length(counts)


@pytest.mark.parametrize("counts", [[8, 4, 2, 1, 1], [1, 1], [1, 1, 1, 1], [16, 0, 8, 8]])
def test_shares_that_are_powers_of_a_half_cost_their_entropy(counts: list[int]) -> None:
    assert average_length(np.array(counts)) == entropy(np.array(counts))


@pytest.mark.parametrize(("counts", "length"), [([], 0), ([0, 0], 0), ([0, 7], 1)])
def test_fewer_than_two_symbols_have_no_entropy(counts: list[int], length: int) -> None:
    assert entropy(np.array(counts, np.int64)) == 0
    assert average_length(np.array(counts, np.int64)) == length


def test_skewed_counts_make_long_codes() -> None:
    fibonacci = [1, 1, 2, 3, 5, 8, 13, 21]
    assert code_lengths(np.array(fibonacci)).tolist() == [7, 7, 6, 5, 4, 3, 2, 1]


def entries_one_by_one(kept: Array, gap_bits: int) -> int:
    """Walk as a writer of relative indices would."""
    entries, gap = 0, 0
    for is_kept in kept:
        gap += 1
        if is_kept or gap == 1 << gap_bits:
            entries += 1
            gap = 0
    return entries


@given(st.lists(st.booleans(), max_size=80), st.integers(1, 5))
def test_relative_entries_are_those_of_a_writer(kept: list[bool], gap_bits: int) -> None:
    flags = np.array([*kept, True])  # a writer needs no filler behind the last element
    assert relative_entries(flags, gap_bits) == entries_one_by_one(flags, gap_bits)


def test_the_paper_s_example_needs_one_filler() -> None:
    kept = np.zeros(16, bool)
    kept[[1, 4, 15]] = True  # figure 2: gaps of 3 bits, 11 after position 4
    assert relative_entries(kept, 3) == 4


def test_nothing_kept_needs_no_entry() -> None:
    assert relative_entries(np.zeros(1000, bool), 5) == 0
