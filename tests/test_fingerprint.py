"""What is kept of inputs and outputs: the same however they were batched, and another for each way to differ."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ccompile.fingerprint import Inputs, OutputPrint, prints_of
from ccompile.numerics.sketch import distance
from ccompile.prints import InputRecord, OutputPrintRecord

RNG = np.random.default_rng(0)
FLOATS = RNG.standard_normal((12, 5)).astype(np.float32)


def printed(*batches: Any) -> OutputPrint:
    (found,) = prints_of({"y": batch} for batch in batches)
    return found


def test_sketches_do_not_depend_on_the_batches() -> None:
    whole, parts = printed(FLOATS), printed(FLOATS[:7], FLOATS[7:])
    assert np.allclose(whole.values, parts.values, rtol=1e-12, atol=1e-12)
    assert np.array_equal(whole.decisions, parts.decisions)
    assert (whole.elements, whole.positions) == (parts.elements, parts.positions) == (60, 12)
    assert whole.norm == pytest.approx(np.linalg.norm(FLOATS.astype(np.float64)))


def test_a_row_that_changes_its_mind_is_one_decision() -> None:
    changed = FLOATS.copy()
    changed[3] = -changed[3]
    assert distance(printed(FLOATS).decisions, printed(changed).decisions) ** 2 == pytest.approx(2)


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (np.array([1, 2]), np.array([1, 3])),
        (np.array([True, False]), np.array([True, True])),
        (np.array(["a", "b"]), np.array(["a", "c"])),
        ([np.ones(2)], [np.zeros(2)]),
        ([np.ones(2)], [np.ones(2), np.ones(2)]),
        ({"a": 1.0}, {"b": 1.0}),
        (None, np.zeros(1)),
        (np.ones(2, ml_dtypes.bfloat16), np.zeros(2, ml_dtypes.bfloat16)),
        (np.ones(2, np.complex64), np.full(2, 1j, np.complex64)),
        (np.ones((1, 4)), np.ones((2, 2))),
        (np.ones(2), np.ones(2, np.float32)),
        (np.zeros(0), np.zeros((0, 2))),
    ],
    ids=str,
)
def test_any_difference_is_another_digest(value: Any, other: Any) -> None:
    assert printed(value).digest == printed(value).digest != printed(other).digest


@pytest.mark.parametrize(
    ("value", "other"), [(np.array([1, 2]), np.array([1, 3])), (np.array(["a", "b"]), np.array(["a", "c"]))], ids=str
)
def test_one_element_that_is_no_float_is_one_decision(value: Any, other: Any) -> None:
    assert distance(printed(value).decisions, printed(other).decisions) ** 2 == pytest.approx(2)


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    found = printed(np.array([1.0, np.nan, np.inf, -2.0]))
    assert found.strange == 2
    assert found.norm == pytest.approx(5**0.5)
    assert distance(found.values, printed(np.array([1.0, 0.0, 0.0, -2.0])).values) == 0


def test_a_record_gives_the_sketches_back() -> None:
    found = printed(FLOATS)
    record = OutputPrintRecord.of(found)
    assert np.array_equal(record.sketch("values"), found.values)
    assert np.array_equal(record.sketch("decisions"), found.decisions)
    assert not OutputPrintRecord.of(printed(np.zeros(2))).sketch("values").any()


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
def test_inputs_are_described_by_channel(last: bool) -> None:
    x = RNG.standard_normal((6, 3, 7, 5)) * np.array([1, 2, 3]).reshape(1, 3, 1, 1)
    inputs = Inputs()
    for part in (x[:4], x[4:]):
        inputs.add({"x": np.moveaxis(part, 1, 3) if last else part}, len(part))
    record = InputRecord.of(inputs.prints[0])
    assert record.samples == 6
    for name, expected in (
        ("low", x.min((0, 2, 3))),
        ("high", x.max((0, 2, 3))),
        ("mean", x.mean((0, 2, 3))),
        ("std", x.std((0, 2, 3))),
        ("spread", x.mean((2, 3)).std(0)),
    ):
        assert getattr(record, name) == pytest.approx(expected)


def test_the_digest_of_inputs_does_not_depend_on_the_batches() -> None:
    digests = set()
    for cuts in ([], [3], [1, 2, 9]):
        inputs = Inputs()
        for part in np.split(FLOATS, cuts):
            inputs.add({"x": part}, len(part))
        digests.add(inputs.prints[0].digest)
    assert len(digests) == 1


@pytest.mark.parametrize("value", [None, [np.ones(2)], np.array(["a"]), np.array([True]), np.full(3, np.nan)], ids=str)
def test_inputs_without_a_distribution_have_a_digest_only(value: Any) -> None:
    inputs = Inputs()
    inputs.add({"x": value}, 1)
    record = InputRecord.of(inputs.prints[0])
    assert record.digest
    assert record.mean == ()
