from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from samples import STRING, UINT8, both, joined, model_of, refusal, tensor, verify


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
    assert "pip install pillow" in text


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
