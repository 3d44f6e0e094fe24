from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from samples import OPEN, ROWS, both, joined, model_of, source, tensor

from ccompile.data import DataSpec, open_data
from ccompile.errors import DataError


def test_one_file_is_split_between_calibration_and_verification(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS)
    data = both(OPEN, tmp_path, {"npz": "v.npz", "samples": 4}, {"npz": "./v.npz", "samples": 3})
    assert data.calibration is not None
    np.testing.assert_array_equal(joined(list(data.calibration.batches()), "x"), ROWS[:4])
    np.testing.assert_array_equal(joined(list(data.verification.batches()), "x"), ROWS[4:7])
    assert any("the first 4 are left to it" in note for note in data.notes)


def test_one_file_without_a_number_for_calibration_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS)
    with pytest.raises(DataError, match="samples: 256"):
        both(OPEN, tmp_path, {"npz": "v.npz"}, {"npz": "v.npz"})


def test_one_file_that_calibration_uses_up_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS)
    with pytest.raises(DataError, match="nothing is left"):
        both(OPEN, tmp_path, {"npz": "v.npz", "samples": 10}, {"npz": "v.npz"})


def test_samples_seen_in_calibration_are_dropped_and_labels_stay_aligned(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", x=ROWS[[1, 5, 6]])
    np.savez(tmp_path / "v.npz", x=ROWS, y=np.arange(10) * 10)
    data = both(OPEN, tmp_path, {"npz": "c.npz"}, {"npz": "v.npz", "labels": "y", "batch": 3})
    batches = list(data.verification.batches())
    left = [0, 2, 3, 4, 7, 8, 9]
    assert data.verification.samples == 7
    assert [batch.samples for batch in batches] == [3, 3, 1]
    np.testing.assert_array_equal(joined(batches, "x"), ROWS[left])
    assert [int(v) for b in batches if b.labels is not None for v in b.labels] == [10 * i for i in left]
    assert any("3 of 10 dropped" in note for note in data.notes)


def test_verification_that_calibration_holds_entirely_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", x=ROWS)
    np.savez(tmp_path / "v.npz", x=ROWS[::-1].copy())
    with pytest.raises(DataError, match="every sample also occurs"):
        both(OPEN, tmp_path, {"npz": "c.npz"}, {"npz": "v.npz"})


def test_dropping_counts_before_a_fixed_batch_is_filled(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", x=ROWS[:3])
    np.savez(tmp_path / "v.npz", x=ROWS)
    data = both(model_of(tensor("x", [3, 5])), tmp_path, {"npz": "c.npz"}, {"npz": "v.npz"})
    assert data.verification.samples == 6
    np.testing.assert_array_equal(joined(list(data.verification.batches()), "x"), ROWS[3:9])


def test_calibration_alone_is_never_verified_on(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", x=ROWS)
    data = open_data(DataSpec(calibration=source(npz="c.npz")), OPEN, tmp_path, 0)
    assert data.verification.source == "synthetic normal, 16 samples"
    assert any("calibration data must not judge itself" in note for note in data.notes)


@pytest.mark.parametrize("kind", ["synthetic", "npz"])
def test_random_calibration_says_what_it_is(tmp_path: Path, kind: str) -> None:
    np.savez(tmp_path / "c.npz", x=ROWS)
    given: dict[str, object] = {"synthetic": {}} if kind == "synthetic" else {"npz": "c.npz"}
    data = both(OPEN, tmp_path, given, {"synthetic": {}})
    assert data.calibration is not None
    said = "seeded random inputs: layers are fitted to noise, not to data"
    assert (said in data.calibration.notes) is (kind == "synthetic")
    assert (f"calibration: {said}" in data.notes) is (kind == "synthetic")
