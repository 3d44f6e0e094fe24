"""The cut finds what trying every assignment finds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ccompile.numerics.regions import Passage, cheapest, cost


@pytest.mark.parametrize("seed", range(40))
def test_no_assignment_is_cheaper(seed: int) -> None:
    rng = np.random.default_rng(seed)
    floats, integers = ([float(x) for x in rng.random(7)] for _ in range(2))
    passages = [Passage(None, (0, 1), 0.1, 0.1)]
    for maker in range(7):
        later = [int(at) for at in range(maker + 1, 7) if rng.random() < 0.4]
        price = 0.3 * rng.random(2)
        passages.append(Passage(maker, (*later, *([None] if not later else [])), float(price[0]), float(price[1])))
    found = cheapest(floats, integers, passages)
    assert len(found) == 7
    best = min(cost(list(chosen), floats, integers, passages) for chosen in itertools.product([False, True], repeat=7))
    assert cost(found, floats, integers, passages) == pytest.approx(best, abs=1e-4)


def test_what_is_forbidden_stays_in_float() -> None:
    assert cheapest([9.0, 9.0], [np.inf, 1.0], [Passage(0, (1,), 1.0, 1.0)]) == [False, True]


def test_a_passage_that_is_forbidden_ties_a_reader_to_its_maker() -> None:
    tie = [Passage(0, (1,), np.inf, 0.0)]
    assert cheapest([1.0, 9.0], [5.0, 1.0], tie) == [True, True]
    assert cheapest([1.0, 2.0], [5.0, 1.0], tie) == [False, False]


def test_a_slow_unit_between_fast_ones_is_taken_along() -> None:
    chain = [Passage(0, (1,), 1.0, 1.0), Passage(1, (2,), 1.0, 1.0)]
    assert cheapest([9.0, 1.0, 9.0], [1.0, 2.5, 1.0], chain) == [True, True, True]
    assert cheapest([9.0, 1.0, 9.0], [1.0, 3.5, 1.0], chain) == [True, False, True]


def test_nothing_to_decide_is_no_unit() -> None:
    assert cheapest([], [], []) == []
    assert cheapest([0.0], [0.0], []) == [False]
