from __future__ import annotations

import io
import re
import sys
import tempfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from samples import INT64, OPEN, ROWS, STRING, both, joined, model_of, refusal, tensor, verify

from ccompile.errors import DataError


def test_rows_arrive_in_order_and_twice_the_same(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS)
    data = verify(OPEN, tmp_path, npz="v.npz", batch=4).verification
    for _ in range(2):
        batches = list(data.batches())
        assert [batch.samples for batch in batches] == [4, 4, 2]
        np.testing.assert_array_equal(joined(batches, "x"), ROWS)
    assert (data.samples, data.source, data.has_labels) == (10, "npz v.npz, 10 samples", False)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), batch=st.integers(1, 45), start=st.integers(0, 12), deflated=st.booleans())
def test_batches_hold_every_row_once_for_any_batch_size(rows: int, batch: int, start: int, deflated: bool) -> None:
    x = np.arange(rows * 6, dtype=np.float32).reshape(rows, 2, 3) + 1
    y = np.arange(rows)
    with tempfile.TemporaryDirectory() as name:
        save = np.savez_compressed if deflated else np.savez
        # `start` rows of calibration, repeated inside the verification file, must vanish and keep labels aligned
        seen = -np.arange(start * 6, dtype=np.float32).reshape(start, 2, 3) - 1
        mixed, labels = np.concatenate([x, seen]), np.concatenate([y, np.full(start, -1)])
        order = np.random.default_rng(start).permutation(len(mixed))
        save(f"{name}/v.npz", x=mixed[order], y=labels[order])
        np.savez(f"{name}/c.npz", x=np.concatenate([seen, np.zeros((1, 2, 3), np.float32)]))
        data = both(
            model_of(tensor("x", ["N", 2, 3])),
            Path(name),
            {"npz": "c.npz"},
            {"npz": "v.npz", "labels": "y", "batch": batch},
        )
        batches = list(data.verification.batches())
    kept = order[order < rows]
    assert data.verification.samples == rows == sum(b.samples for b in batches)
    assert all(b.samples == batch for b in batches[:-1])
    np.testing.assert_array_equal(joined(batches, "x"), x[kept])
    np.testing.assert_array_equal(np.concatenate([b.labels for b in batches if b.labels is not None]), y[kept])


def test_a_deflated_file_streams_in_bounded_memory(tmp_path: Path) -> None:
    big = np.zeros((4096, 4096), np.float32)  # 64 MiB
    big[:, 0] = np.arange(4096)
    np.savez_compressed(tmp_path / "v.npz", x=big, z=big[:, :1], y=np.arange(4096))
    del big
    model = model_of(tensor("x", ["N", 4096]), tensor("z", ["N", 1]))
    tracemalloc.start()
    try:
        data = verify(model, tmp_path, npz="v.npz", labels="y", batch=32).verification
        firsts = [batch.feeds["x"][:, 0].copy() for batch in data.batches()]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(np.concatenate(firsts), np.arange(4096))
    assert peak < 16 * 2**20


def test_a_scalar_input_is_fed_with_every_batch(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS, sr=np.array(16000, np.int64))
    model = model_of(tensor("x", ["N", 5]), tensor("sr", [], INT64))
    batches = list(verify(model, tmp_path, npz="v.npz", batch=5).verification.batches())
    assert [int(batch.feeds["sr"]) for batch in batches] == [16000, 16000]
    assert all(batch.feeds["sr"].shape == () for batch in batches)


def test_labels_are_a_key_of_the_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS, target=np.arange(10))
    data = verify(OPEN, tmp_path, npz="v.npz", labels="target", batch=10).verification
    (batch,) = data.batches()
    assert data.has_labels
    np.testing.assert_array_equal(batch.labels, np.arange(10))
    assert "Did you mean `target`?" in refusal(OPEN, tmp_path, npz="v.npz", labels="tarpet")


def test_labels_of_another_length_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS, y=np.arange(9))
    assert "`x` 10, `y` 9" in refusal(OPEN, tmp_path, npz="v.npz", labels="y")


def test_a_label_key_that_nobody_asks_for_is_ignored(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS, label=np.array([object()] * 10, dtype=object))
    assert verify(OPEN, tmp_path, npz="v.npz").verification.samples == 10


def test_a_key_that_is_no_input_is_refused_with_the_nearest(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", image=ROWS, imagf=ROWS)
    text = refusal(model_of(tensor("image", ["N", 5])), tmp_path, npz="v.npz")
    assert "`imagf` is no input" in text
    assert "Did you mean `image`?" in text


def test_a_missing_input_is_refused_with_what_the_model_takes(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS)
    text = refusal(model_of(tensor("x", ["N", 5]), tensor("z", ["N", 2], INT64)), tmp_path, npz="v.npz")
    assert "`z`" in text
    assert "z: int64 [N, 2]" in text


def test_another_dtype_is_refused_with_the_remedy(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS.astype(np.float64))
    text = refusal(OPEN, tmp_path, npz="v.npz")
    assert "`x` is float64, the model takes float32" in text
    assert "x.astype(np.float32)" in text


def test_another_size_is_refused_with_its_axis(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=np.zeros((2, 1, 30, 28), np.float32))
    model = model_of(tensor("x", [None, 1, 28, 28]))
    assert "axis 2 has 30, the model takes 28" in refusal(model, tmp_path, npz="v.npz")


@pytest.mark.parametrize("shape", [(5,), (2, 5, 1), ()])
def test_another_rank_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.savez(tmp_path / "v.npz", x=np.zeros(shape, np.float32))
    assert f"rank {len(shape)}" in refusal(OPEN, tmp_path, npz="v.npz")


def test_open_axes_take_any_size(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=np.zeros((3, 1, 30, 28), np.float32))
    assert verify(model_of(tensor("x", ["N", 1, "H", -1])), tmp_path, npz="v.npz").verification.samples == 3


def test_an_input_without_declared_shape_takes_any_rank(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=np.zeros((3, 7), np.float32))
    assert verify(model_of(tensor("x", None)), tmp_path, npz="v.npz").verification.samples == 3


def test_more_samples_than_there_are_use_all_with_a_note(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS)
    data = verify(OPEN, tmp_path, npz="v.npz", samples=99)
    assert data.verification.samples == 10
    assert any("99 samples wanted, 10 there" in note for note in data.notes)


def test_samples_takes_the_first(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS)
    batches = list(verify(OPEN, tmp_path, npz="v.npz", samples=3).verification.batches())
    np.testing.assert_array_equal(joined(batches, "x"), ROWS[:3])


def test_a_fixed_batch_drops_the_remainder_with_a_note(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS)
    data = verify(model_of(tensor("x", [4, 5])), tmp_path, npz="v.npz")
    assert [batch.feeds["x"].shape for batch in data.verification.batches()] == [(4, 5), (4, 5)]
    assert data.verification.samples == 8
    assert any("last 2 dropped" in note for note in data.notes)


def test_a_fixed_batch_that_cannot_be_filled_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS)
    assert "do not fill" in refusal(model_of(tensor("x", [11, 5])), tmp_path, npz="v.npz")


def test_a_batch_that_the_model_does_not_take_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS)
    assert "the model fixes 4" in refusal(model_of(tensor("x", [4, 5])), tmp_path, npz="v.npz", batch=2)


def test_inputs_with_different_fixed_batches_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS, z=ROWS)
    model = model_of(tensor("x", [1, 5]), tensor("z", [2, 5]))
    assert "test_data" in refusal(model, tmp_path, npz="v.npz")


def test_no_samples_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS[:0])
    assert "no sample" in refusal(OPEN, tmp_path, npz="v.npz")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(OPEN, tmp_path, npz="gone.npz")
    assert "cannot read" in refusal(OPEN, tmp_path, npz=".")


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=np.array([{}], dtype=object))
    assert "never unpickled" in refusal(OPEN, tmp_path, npz="v.npz")


def test_arrays_stored_by_columns_are_refused_with_the_remedy(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=np.asfortranarray(ROWS))
    assert "np.ascontiguousarray(x)" in refusal(OPEN, tmp_path, npz="v.npz")


def test_big_endian_arrays_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS.astype(">f4"))
    (batch,) = verify(OPEN, tmp_path, npz="v.npz").verification.batches()
    assert batch.feeds["x"].dtype == np.float32
    np.testing.assert_array_equal(batch.feeds["x"], ROWS)


def test_strings_are_fed_as_objects(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=np.array([["a"], ["bc"]]))
    (batch,) = verify(model_of(tensor("x", ["N", 1], STRING)), tmp_path, npz="v.npz").verification.batches()
    assert batch.feeds["x"].tolist() == [["a"], ["bc"]]
    assert batch.feeds["x"].dtype == object


def test_bfloat16_survives_the_npz(tmp_path: Path) -> None:
    model = model_of(tensor("x", ["N", 5], TensorProto.BFLOAT16))
    want = model.graph.inputs[0].dtype.numpy()  # type: ignore[union-attr]
    np.savez(tmp_path / "v.npz", x=ROWS.astype(want))
    (batch,) = verify(model, tmp_path, npz="v.npz").verification.batches()
    assert batch.feeds["x"].dtype == want
    np.testing.assert_array_equal(batch.feeds["x"].astype(np.float32), ROWS)
    np.savez(tmp_path / "v.npz", x=ROWS)
    assert "float32, the model takes bfloat16" in refusal(model, tmp_path, npz="v.npz")


def test_what_is_no_zip_or_a_truncated_one_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS)
    whole = (tmp_path / "v.npz").read_bytes()
    for content in (b"", b"no zip at all", whole[:-30], whole[: len(whole) // 2]):
        (tmp_path / "v.npz").write_bytes(content)
        assert "v.npz" in refusal(OPEN, tmp_path, npz="v.npz")


def test_no_damaged_byte_gives_a_traceback_or_wrong_rows(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "v.npz", x=ROWS, y=np.arange(10))
    whole = (tmp_path / "v.npz").read_bytes()
    refused = 0
    for at in range(len(whole)):
        (tmp_path / "v.npz").write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            data = verify(OPEN, tmp_path, npz="v.npz", labels="y")
            np.testing.assert_array_equal(joined(list(data.verification.batches()), "x"), ROWS)
        except DataError:
            refused += 1
    assert refused > len(whole) // 4


def test_a_header_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (10**9, 5)})
    with zipfile.ZipFile(tmp_path / "v.npz", "w") as archive:
        archive.writestr("x.npy", member.getvalue() + b"\0" * 40)
    assert "damaged" in refusal(OPEN, tmp_path, npz="v.npz")


def test_the_digest_depends_on_content_and_parameters_only(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS)
    np.savez(tmp_path / "same.npz", x=ROWS)
    np.savez(tmp_path / "other.npz", x=ROWS + 1)

    def digest(**options: Any) -> str:
        return verify(OPEN, tmp_path, **options).verification.digest

    first = digest(npz="v.npz")
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert first == digest(npz="v.npz") == digest(npz="same.npz")
    assert len({first, digest(npz="other.npz"), digest(npz="v.npz", samples=4), digest(npz="v.npz", batch=2)}) == 4


def test_an_unfinished_iteration_closes_the_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=ROWS)
    data = verify(OPEN, tmp_path, npz="v.npz", batch=1).verification
    batches = data.batches()
    next(batches)
    del batches
    if sys.platform == "linux":
        held = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
        assert (tmp_path / "v.npz").resolve() not in held
