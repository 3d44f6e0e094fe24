from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from samples import FLOAT, INT64, OPEN, STRING, both, joined, model_of, refusal, tensor, verify

from ccompile.data import open_data


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
