from __future__ import annotations

import io
import re
import sys
import tempfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from pydantic import ValidationError

from ccompile import graph
from ccompile.data import Batch, Data, DataSource, DataSpec, Preprocess, Synthetic, open_data
from ccompile.errors import DataError

if TYPE_CHECKING:
    import onnx_ir as ir

    from ccompile.core import Array

FLOAT, INT64, UINT8, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8, TensorProto.STRING
Dims = list[int | str | None] | None


def tensor(name: str, dims: Dims, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, dims)


def model_of(*inputs: onnx.ValueInfoProto) -> ir.Model:
    """A model that hands its inputs through."""
    names = [value.name for value in inputs]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in names]
    outputs = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in inputs]
    for value in outputs:
        value.name += "_out"
    proto = helper.make_model(
        helper.make_graph(nodes, "g", list(inputs), outputs), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    return graph.from_proto(proto)[0]


def source(**options: Any) -> DataSource:
    return DataSource.model_validate(options)


def verify(model: ir.Model, base: Path, **options: Any) -> Data:
    return open_data(DataSpec(verification=source(**options)), model, base, 0)


def both(model: ir.Model, base: Path, calibration: dict[str, Any], verification: dict[str, Any]) -> Data:
    spec = DataSpec(calibration=source(**calibration), verification=source(**verification))
    return open_data(spec, model, base, 0)


def joined(batches: list[Batch], name: str) -> Array:
    return np.concatenate([batch.feeds[name] for batch in batches])


def refusal(model: ir.Model, base: Path, **options: Any) -> str:
    """The error that opening and reading the source as verification data gives."""
    with pytest.raises(DataError) as caught:
        for _ in verify(model, base, **options).verification.batches():
            pass
    assert "data.verification" in str(caught.value)
    return str(caught.value)


ROWS = np.arange(50, dtype=np.float32).reshape(10, 5)
OPEN = model_of(tensor("x", ["N", 5]))


# ------------------------------------------------------------------------------------------------ the spec


def test_exactly_one_source_is_needed() -> None:
    assert source(npz="a.npz").kind == "npz"
    for wrong in ({}, {"npz": "a.npz", "images": "b"}):
        with pytest.raises(ValidationError, match="exactly one of npz, test_data, images, synthetic"):
            source(**wrong)


def test_images_without_preprocess_are_refused_with_an_example() -> None:
    assert source(images="b", preprocess={"resize": 8}).preprocess == Preprocess(resize=8)
    with pytest.raises(ValidationError, match=r"preprocess: \{resize: 256"):
        source(images="b")


@pytest.mark.parametrize(
    "options",
    [
        {"synthetic": {}, "labels": "y"},
        {"npz": "a", "preprocess": {}},
        {"npz": "a", "input": "x"},
        {"test_data": "a", "batch": 4},
        {"npz": "a", "samples": 0},
        {"npz": "a", "sample": 3},
        {"npz": "a\0b"},
        {"synthetic": {"low": 1, "high": 1}},
        {"synthetic": {"integers": [3, 3]}},
        {"images": "a", "preprocess": {"mean": [0, 0]}},
        {"images": "a", "preprocess": {"std": [0]}},
    ],
)
def test_an_option_that_cannot_act_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        source(**options)


def test_every_option_has_a_description() -> None:
    for cls in (DataSpec, DataSource, Preprocess, Synthetic):
        assert all(option.description for option in cls.model_fields.values())


# ------------------------------------------------------------------------------------------------ npz


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


# ------------------------------------------------------------------------------------------------ calibration apart


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


# ------------------------------------------------------------------------------------------------ synthetic


def test_without_a_spec_seeded_inputs_are_drawn(tmp_path: Path) -> None:
    a, b, c = (open_data(None, OPEN, tmp_path, seed) for seed in (1, 1, 2))
    assert a.notes == ("verification: no data given: seeded synthetic inputs",)
    assert (a.calibration, a.verification.samples) == (None, 16)
    rows = [joined(list(data.verification.batches()), "x") for data in (a, b, c)]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])
    assert a.verification.digest == b.verification.digest != c.verification.digest


def test_synthetic_calibration_and_verification_differ(tmp_path: Path) -> None:
    data = both(OPEN, tmp_path, {"synthetic": {}}, {"synthetic": {}})
    assert data.calibration is not None
    seen = {row.tobytes() for row in joined(list(data.calibration.batches()), "x")}
    assert len(seen) == 16
    assert not seen & {row.tobytes() for row in joined(list(data.verification.batches()), "x")}


@pytest.mark.parametrize("name", ["FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16", "INT8", "INT32", "UINT64", "BOOL"])
def test_synthetic_values_have_the_input_type(tmp_path: Path, name: str) -> None:
    model = model_of(tensor("x", ["N", 64], getattr(TensorProto, name)))
    (batch, *_) = verify(model, tmp_path, synthetic={}).verification.batches()
    x = batch.feeds["x"]
    assert x.dtype == model.graph.inputs[0].dtype.numpy()  # type: ignore[union-attr]
    assert x.shape == (8, 64)
    if x.dtype.kind in "iub":
        assert set(x.reshape(-1).tolist()) == {0, 1}
    else:
        assert abs(float(x.astype(np.float64).std()) - 1) < 0.2


def test_ranges_of_synthetic_values_are_kept(tmp_path: Path) -> None:
    model = model_of(tensor("x", ["N", 200]), tensor("i", ["N", 200], INT64))
    options = {"distribution": "uniform", "low": 2, "high": 3, "integers": [-4, -1]}
    (batch, *_) = verify(model, tmp_path, synthetic=options).verification.batches()
    assert batch.feeds["x"].min() >= 2 > batch.feeds["x"].max() - 1
    assert set(batch.feeds["i"].reshape(-1).tolist()) == {-4, -3, -2}


def test_integers_that_the_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = model_of(tensor("x", ["N", 2], TensorProto.INT8))
    assert "int8" in refusal(model, tmp_path, synthetic={"integers": [0, 200]})


def test_an_open_axis_needs_a_shape(tmp_path: Path) -> None:
    model = model_of(tensor("x", ["N", 3, "H", "W"]))
    text = refusal(model, tmp_path, synthetic={})
    assert "`x`: axis 2 (H)" in text
    assert "shapes: {x: [1, 3, 224, 224]}" in text
    data = verify(model, tmp_path, synthetic={}, shapes={"x": [2, 3, 4, 6]}, samples=4).verification
    assert [batch.feeds["x"].shape for batch in data.batches()] == [(2, 3, 4, 6)] * 2


def test_shapes_that_contradict_the_model_are_refused(tmp_path: Path) -> None:
    model = model_of(tensor("x", ["N", 3]))
    assert "axis 1 has 4, the model takes 3" in refusal(model, tmp_path, synthetic={}, shapes={"x": [1, 4]})
    assert "rank 1" in refusal(model, tmp_path, synthetic={}, shapes={"x": [3]})
    assert "Did you mean `x`?" in refusal(model, tmp_path, synthetic={}, shapes={"xx": [1, 3]})


def test_dimensions_of_one_name_share_one_size(tmp_path: Path) -> None:
    model = model_of(tensor("x", ["N", 8]), tensor("state", [2, "N", 4]))
    batches = list(verify(model, tmp_path, synthetic={}, samples=6, batch=4).verification.batches())
    assert [batch.feeds["x"].shape for batch in batches] == [(4, 8), (2, 8)]
    assert [batch.feeds["state"].shape for batch in batches] == [(2, 4, 4), (2, 2, 4)]


def test_a_fixed_batch_rounds_synthetic_samples_up(tmp_path: Path) -> None:
    data = verify(model_of(tensor("x", [32, 5])), tmp_path, synthetic={})
    assert data.verification.samples == 32
    assert any("32 samples instead of 16" in note for note in data.notes)
    assert "fix 32" in refusal(model_of(tensor("x", [32, 5])), tmp_path, synthetic={}, batch=8)


def test_a_scalar_gets_a_synthetic_value(tmp_path: Path) -> None:
    model = model_of(tensor("x", [1, 5]), tensor("s", [], INT64))
    (batch, *_) = verify(model, tmp_path, synthetic={"integers": [7, 8]}).verification.batches()
    assert batch.feeds["s"].shape == ()
    assert int(batch.feeds["s"]) == 7


def test_strings_sequences_and_optionals_cannot_be_synthetic(tmp_path: Path) -> None:
    elem = helper.make_tensor_type_proto(FLOAT, None)
    for value, word in (
        (tensor("t", ["N"], STRING), "strings"),
        (helper.make_value_info("t", helper.make_sequence_type_proto(elem)), "sequence"),
        (helper.make_value_info("t", helper.make_optional_type_proto(elem)), "optional"),
    ):
        text = refusal(model_of(value), tmp_path, synthetic={})
        assert "`t`" in text
        assert word in text


# ------------------------------------------------------------------------------------------------ test data sets


def write_set(folder: Path, *inputs: Array, outputs: tuple[Array, ...] = ()) -> None:
    folder.mkdir(parents=True)
    for kind, arrays in (("input", inputs), ("output", outputs)):
        for index, array in enumerate(arrays):
            (folder / f"{kind}_{index}.pb").write_bytes(numpy_helper.from_array(array).SerializeToString())


def test_sets_come_in_natural_order_with_expected_outputs(tmp_path: Path) -> None:
    for number in (10, 2, 0, 1):
        x = np.full((number + 1, 5), number, np.float32)
        write_set(tmp_path / "m" / f"test_data_set_{number}", x, outputs=(x + 1,))
    data = verify(OPEN, tmp_path, test_data="m").verification
    batches = list(data.batches())
    assert [batch.feeds["x"][0, 0] for batch in batches] == [0, 1, 2, 10]
    assert [batch.samples for batch in batches] == [1, 1, 1, 1]
    assert (data.samples, data.source) == (4, "test_data m, 4 sets")
    for batch in batches:
        assert batch.expected is not None
        np.testing.assert_array_equal(batch.expected["x_out"], batch.feeds["x"] + 1)


def test_one_set_may_be_named_itself(tmp_path: Path) -> None:
    write_set(tmp_path / "test_data_set_3", ROWS)
    (batch,) = verify(OPEN, tmp_path, test_data="test_data_set_3").verification.batches()
    np.testing.assert_array_equal(batch.feeds["x"], ROWS)
    assert batch.expected is None


def test_a_state_keeps_its_own_batch_axis(tmp_path: Path) -> None:
    state = np.ones((2, 1, 128), np.float32)
    write_set(tmp_path / "test_data_set_0", ROWS[:1], state, np.array(16000))
    model = model_of(tensor("x", ["N", 5]), tensor("state", [2, "N", 128]), tensor("sr", [], INT64))
    (batch,) = verify(model, tmp_path, test_data=".").verification.batches()
    assert [batch.feeds[name].shape for name in ("x", "state", "sr")] == [(1, 5), (2, 1, 128), ()]


def test_sequences_and_optionals_are_read_and_run(tmp_path: Path) -> None:
    elem = helper.make_tensor_type_proto(FLOAT, None)
    parts = [ROWS, ROWS[:2]]
    folder = tmp_path / "test_data_set_0"
    folder.mkdir()
    (folder / "input_0.pb").write_bytes(numpy_helper.from_list(parts).SerializeToString())
    (folder / "input_1.pb").write_bytes(numpy_helper.from_optional(None).SerializeToString())
    model = model_of(
        helper.make_value_info("s", helper.make_sequence_type_proto(elem)),
        helper.make_value_info("o", helper.make_optional_type_proto(elem)),
    )
    (batch,) = verify(model, tmp_path, test_data=".").verification.batches()
    assert batch.feeds["o"] is None
    assert [part.tolist() for part in batch.feeds["s"]] == [part.tolist() for part in parts]
    sequence = model_of(helper.make_value_info("s", helper.make_sequence_type_proto(elem)))
    session = ort.InferenceSession(graph.to_proto(sequence)[0].SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"s": batch.feeds["s"]})
    assert [part.tolist() for part in out] == [part.tolist() for part in parts]


def test_sets_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "a" / "test_data_set_0", ROWS.astype(np.float64))
    write_set(tmp_path / "b" / "test_data_set_0", ROWS[:, :4])
    write_set(tmp_path / "c" / "test_data_set_0", ROWS, ROWS)
    write_set(tmp_path / "d" / "test_data_set_0")
    write_set(tmp_path / "e" / "test_data_set_0", ROWS)
    (tmp_path / "e" / "test_data_set_0" / "input_0.pb").write_bytes(b"\xff\xff\xff")
    write_set(tmp_path / "f" / "test_data_set_0", ROWS)
    (tmp_path / "f" / "test_data_set_0" / "input_0.pb").write_bytes(b"")
    (tmp_path / "g").mkdir()
    reasons = {
        "a": "float64, the model takes float32",
        "b": "axis 1 has 4",
        "c": "takes fewer inputs",
        "d": "no such file",
        "e": "test_data_set_0/input_0.pb is damaged",
        "f": "holds no tensor",
        "g": "no test_data_set_",
        "h": "no such folder",
    }
    for name, reason in reasons.items():
        assert reason in refusal(OPEN, tmp_path, test_data=name), name


def test_a_set_that_calibration_holds_is_dropped(tmp_path: Path) -> None:
    for number in range(3):
        write_set(tmp_path / f"test_data_set_{number}", ROWS[number : number + 1])
    np.savez(tmp_path / "c.npz", x=ROWS[1:2])
    data = both(OPEN, tmp_path, {"npz": "c.npz"}, {"test_data": "."})
    np.testing.assert_array_equal(joined(list(data.verification.batches()), "x"), ROWS[[0, 2]])
    assert data.verification.samples == 2


# ------------------------------------------------------------------------------------------------ images


def picture(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_images_are_decoded_cropped_and_normalised(tmp_path: Path) -> None:
    picture(tmp_path / "p" / "a.png", (51, 102, 255))
    options = {"crop": [4, 3], "mean": [0.2, 0.4, 0.5], "std": [1, 1, 0.5]}
    data = verify(model_of(tensor("x", ["N", 3, 4, 3])), tmp_path, images="p", preprocess=options).verification
    (batch,) = data.batches()
    assert batch.feeds["x"].dtype == np.float32
    np.testing.assert_allclose(batch.feeds["x"][0, :, 0, 0], [0, 0, 1], atol=1e-6)
    assert data.source == "images p, 1 sample"


def test_layout_and_channel_order_follow_the_spec(tmp_path: Path) -> None:
    picture(tmp_path / "p" / "a.png", (10, 20, 30))
    model = model_of(tensor("x", ["N", 4, 6, 3], UINT8))
    (batch,) = verify(
        model, tmp_path, images="p", preprocess={"layout": "NHWC", "channels": "BGR"}
    ).verification.batches()
    assert batch.feeds["x"].dtype == np.uint8
    assert batch.feeds["x"][0, 0, 0].tolist() == [30, 20, 10]
    text = refusal(model, tmp_path, images="p", preprocess={"layout": "NHWC", "scale": 0.5})
    assert "uint8" in text


def test_the_short_side_is_resized_and_the_centre_kept(tmp_path: Path) -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    model = model_of(tensor("x", [1, 1, 4, 4]))
    (batch,) = verify(
        model, tmp_path, images=".", preprocess={"resize": 4, "crop": 4, "channels": "L"}
    ).verification.batches()
    assert batch.feeds["x"].shape == (1, 1, 4, 4)
    assert batch.feeds["x"][0, 0, :, 1:3].min() == 1


def test_images_come_sorted_with_their_folder_as_class(tmp_path: Path) -> None:
    for name, color in (("b/2.png", 40), ("b/1.png", 30), ("a/x/9.png", 20), ("c/0.png", 50)):
        picture(tmp_path / "p" / name, (color, 0, 0))
    model = model_of(tensor("x", ["N", 3, None, None]))
    options: dict[str, Any] = {"images": "p", "preprocess": {"scale": 1}, "labels": "folders", "batch": 3}
    data = verify(model, tmp_path, **options)
    batches = list(data.verification.batches())
    assert joined(batches, "x")[:, 0, 0, 0].tolist() == [20, 30, 40, 50]
    assert [int(v) for b in batches if b.labels is not None for v in b.labels] == [0, 1, 1, 2]
    assert any("cover 2 of 3 classes" in note for note in verify(model, tmp_path, **options, samples=2).notes)


def test_labels_come_from_a_file_with_one_integer_per_line(tmp_path: Path) -> None:
    for index in range(3):
        picture(tmp_path / "p" / f"{index}.png", (index, 0, 0))
    (tmp_path / "good.txt").write_text("7\n8\n9\n")
    (tmp_path / "short.txt").write_text("7\n8\n")
    (tmp_path / "words.txt").write_text("cat\ndog\ncow\n")
    model = model_of(tensor("x", ["N", 3, 4, 6]))
    (batch,) = verify(model, tmp_path, images="p", preprocess={}, labels="good.txt").verification.batches()
    assert batch.labels is not None
    assert batch.labels.tolist() == [7, 8, 9]
    for name, reason in (("short.txt", "2 labels"), ("words.txt", "one integer per line"), ("gone.txt", "folders")):
        assert reason in refusal(model, tmp_path, images="p", preprocess={}, labels=name)
    assert "no subfolder" in refusal(model, tmp_path, images="p", preprocess={}, labels="folders")


def test_an_image_that_calibration_holds_is_dropped(tmp_path: Path) -> None:
    for index in range(4):
        picture(tmp_path / "v" / f"{index}.png", (index, 0, 0))
    picture(tmp_path / "c" / "copy.bmp", (2, 0, 0))
    model = model_of(tensor("x", ["N", 3, 4, 6]))
    options: dict[str, Any] = {"preprocess": {"scale": 1}}
    data = both(model, tmp_path, {"images": "c", **options}, {"images": "v", **options})
    assert joined(list(data.verification.batches()), "x")[:, 0, 0, 0].tolist() == [0, 1, 3]
    assert data.verification.samples == 3


def test_an_image_folder_is_split_between_calibration_and_verification(tmp_path: Path) -> None:
    for index in range(4):
        picture(tmp_path / "v" / f"{index}.png", (index, 0, 0))
    options: dict[str, Any] = {"images": "v", "preprocess": {"scale": 1}}
    data = both(model_of(tensor("x", ["N", 3, 4, 6])), tmp_path, {**options, "samples": 1}, options)
    assert joined(list(data.verification.batches()), "x")[:, 0, 0, 0].tolist() == [1, 2, 3]


def test_images_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    model = model_of(tensor("x", ["N", 3, 4, 6]))
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "bad" / "a.png", (0, 0, 0))
    (tmp_path / "bad" / "b.jpg").write_bytes(b"no image")
    picture(tmp_path / "large" / "a.png", (0, 0, 0), (9, 9))
    picture(tmp_path / "mixed" / "a.png", (0, 0, 0))
    picture(tmp_path / "mixed" / "b.png", (0, 0, 0), (9, 9))
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(tmp_path / "deep" / "a.png")
    for name, reason in (
        ("gone", "no such folder"),
        ("empty", "holds no image"),
        ("bad", "b.jpg"),
        ("large", "axis 2 has 9, the model takes 4"),
        ("mixed", "one batch needs one size"),
        ("deep", "8 bits"),
    ):
        assert reason in refusal(model, tmp_path, images=name, preprocess={}), name
    strings = model_of(tensor("x", ["N", 3, 4, 6], STRING))
    assert "takes no numbers" in refusal(strings, tmp_path, images="large", preprocess={})
    assert "smaller than the crop" in refusal(model, tmp_path, images="large", preprocess={"crop": 10})


def test_missing_pillow_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "p" / "a.png", (0, 0, 0))
    monkeypatch.setitem(sys.modules, "PIL", None)
    text = refusal(model_of(tensor("x", ["N", 3, 4, 6])), tmp_path, images="p", preprocess={})
    assert 'pip install "ccompile[images]"' in text


def test_images_feed_the_named_input_and_the_rest_gets_one_seeded_value(tmp_path: Path) -> None:
    picture(tmp_path / "p" / "a.png", (9, 9, 9))
    model = model_of(tensor("x", ["N", 3, 4, 6]), tensor("y", ["N", 3, 4, 6]), tensor("s", ["N", 2]))
    assert "input: NAME" in refusal(model, tmp_path, images="p", preprocess={})
    assert "Did you mean" in refusal(model, tmp_path, images="p", preprocess={}, input="yy")
    data = verify(model, tmp_path, images="p", preprocess={"scale": 1}, input="y")
    (batch,) = data.verification.batches()
    assert batch.feeds["y"][0, 0, 0, 0] == 9
    assert {name: x.shape for name, x in batch.feeds.items()} == {"x": (1, 3, 4, 6), "y": (1, 3, 4, 6), "s": (1, 2)}
    assert any("synthetic value feeds x, s" in note for note in data.notes)
