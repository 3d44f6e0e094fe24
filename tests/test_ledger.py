"""What statistics hold is counted while it lives, and told."""

from __future__ import annotations

import builders
import calibrated
import numpy as np
import pytest

from ccompile.ledger import Ledger
from ccompile.moments import Layer, Moments
from ccompile.recording import Recording

LAYER = Layer("fc", "Gemm", "x", "y", 1, 1, 2, 3, 1)


def filled(rows: int, wide: bool = False) -> Moments:
    found = Moments(LAYER)
    found.add(np.ones((1, rows, 3)), np.ones((1, rows, 2)), rows, wide)
    return found


@pytest.mark.parametrize(("wide", "numbers"), [(False, 3 + 2 + 2 + 9 + 6), (True, 3 + 2 + 2 + 7 * (3 + 2))])
def test_moments_hold_sums_and_either_grams_or_rows(wide: bool, numbers: int) -> None:
    assert filled(7, wide).nbytes == 8 * numbers


def test_a_recording_holds_what_is_in_memory_only() -> None:
    held = Recording(limit=100)
    held.append({"a": np.zeros(20, np.float32), "b": np.zeros(30, np.float32)})
    assert held.nbytes == 80


def test_the_peak_is_of_what_lived_at_one_time() -> None:
    ledger = Ledger()
    first, second = ledger.watch(filled(7)), ledger.watch(filled(9))
    ledger.update()
    both = first.nbytes + second.nbytes
    del first, second
    third = ledger.watch(filled(20, wide=True))
    ledger.update()
    assert ledger.peak == max(both, third.nbytes)
    assert ledger.record() == {"layers": 1, "rows": 20, "bytes": ledger.peak}


def test_nothing_observed_is_nothing_told() -> None:
    assert Ledger().record() == {}


def test_a_calibration_tells_layers_rows_and_at_least_what_its_moments_hold() -> None:
    model = builders.mlp(0)
    given = calibrated.calibration(model, calibrated.feeds(model))
    found = given.moments(model, list(calibrated.layers(model).values()))
    told = given.ledger.record()
    assert told["layers"] == len(found)
    assert told["rows"] == max(moments.rows for moments in found.values())
    assert told["bytes"] == sum(moments.nbytes for moments in found.values())
    chain = given.chain(model)
    for layer in calibrated.layers(model).values():
        chain.moments(layer)
    assert given.ledger.peak > told["bytes"]
