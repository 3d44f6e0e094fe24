from __future__ import annotations

import gc
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ccompile.comparison import compare
from ccompile.recording import Recording
from ccompile.tolerance import Tolerance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ccompile.core import Array


def f32(*values: Any) -> Array:
    return np.array(values, np.float32)


def spilled_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("ccompile-*"))


BATCHES: list[dict[str, Any]] = [
    {
        "y": np.arange(100, dtype=np.float32) * k,
        "n": np.array([k]),
        "s": np.array(["a"], object),
        "l": [f32(*range(50))],
    }
    for k in range(4)
]


def assert_same(recording: Recording, batches: Sequence[dict[str, Any]]) -> None:
    found = list(recording)
    assert len(found) == len(recording) == len(batches) > 0
    for mine, theirs in zip(found, batches, strict=True):
        assert list(mine) == list(theirs)
        assert compare([mine], [theirs], 1).violations(Tolerance(atol=0)) == {}


@pytest.mark.parametrize("limit", [0, 500, 10**6])
def test_a_recording_gives_back_what_it_was_given(limit: int) -> None:
    recording = Recording(limit)
    for batch in BATCHES:
        recording.append(batch)
    assert_same(recording, BATCHES)
    assert_same(recording, BATCHES)


def test_a_recording_goes_to_disk_only_beyond_its_limit_and_leaves_nothing() -> None:
    before = spilled_folders()
    small, large = Recording(10**6), Recording(0)
    for recording in (small, large):
        recording.append(BATCHES[0])
    made = spilled_folders() - before
    assert len(made) == 1
    assert len(list(next(iter(made)).iterdir())) == 3
    del small, large, recording
    gc.collect()
    assert not spilled_folders() & made


def test_what_is_on_disk_is_not_in_memory() -> None:
    recording, array = Recording(0), f32(*range(9))
    gone = weakref.ref(array)
    recording.append({"y": array})
    del array
    assert gone() is None
    assert len(recording) == 1


def test_a_recording_on_disk_holds_no_file_open() -> None:
    recording = Recording(0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(50):
        recording.append({"y": f32(1, 2)})
    assert len(list(Path("/proc/self/fd").iterdir())) == before
