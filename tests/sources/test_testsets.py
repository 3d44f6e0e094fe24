from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
from onnx import helper, numpy_helper
from samples import FLOAT, INT64, OPEN, ROWS, both, joined, model_of, refusal, tensor, verify

from ccompile import onnx_io

if TYPE_CHECKING:
    from ccompile.core import Array


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
    session = ort.InferenceSession(
        onnx_io.to_proto(sequence)[0].SerializeToString(), providers=["CPUExecutionProvider"]
    )
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
