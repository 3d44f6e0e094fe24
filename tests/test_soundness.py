from __future__ import annotations

import math
from typing import Any

import builders
import numpy as np
import pytest

from ccompile.errors import ModelError
from ccompile.soundness import Constancy, refuse_random


def noted(*batches: tuple[Any, int]) -> bool:
    constancy = Constancy()
    for value, samples in batches:
        constancy.add({"y": value}, samples)
    return constancy.notes == ["output `y` is the same on all samples: it proves little"]


def test_an_output_that_is_the_same_on_all_samples_is_noted() -> None:
    row = np.array([[1, math.nan]], np.float32)
    assert noted((np.repeat(row, 3, 0), 3))
    assert noted((row, 1), (row, 1))
    assert noted((row[0, 0], 4), (row[0, 0], 4))


def test_an_output_that_moves_on_one_sample_is_not_noted() -> None:
    row = np.array([[1, 2]], np.float32)
    assert not noted((np.repeat(row, 3, 0), 3), (row + 1, 1))
    assert not noted((np.concatenate([row, row + 1]), 2))


def test_one_sample_is_not_called_constant() -> None:
    assert not noted((np.ones((1, 2), np.float32), 1))


def test_integers_sequences_and_empty_outputs_are_left_to_the_comparison() -> None:
    assert not noted((np.ones((3, 2), np.int64), 3))
    assert not noted(([np.ones(2, np.float32)], 3))
    assert not noted((np.ones((3, 0), np.float32), 3))


def test_outputs_that_differ_without_a_random_node_are_refused_all_the_same() -> None:
    model = builders.mlp(0)
    first = {"fc3_out": np.ones((2, 5), np.float32)}
    with pytest.raises(ModelError, match="output `fc3_out` differs from run to run"):
        refuse_random(model, {"fc3_out": first["fc3_out"] * 2}, first)
    refuse_random(model, {"fc3_out": first["fc3_out"] * np.float32(1 + 1e-6)}, first)


def test_nan_and_empty_outputs_are_not_called_random() -> None:
    for value in (np.full(3, np.nan, np.float32), np.zeros(0, np.float32)):
        refuse_random(builders.mlp(0), {"y": value}, {"y": value})
