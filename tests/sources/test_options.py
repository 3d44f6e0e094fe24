from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from samples import source

from ccompile.data import DataSource, DataSpec, Preprocess, Synthetic


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


def test_one_number_stands_for_all_channels() -> None:
    given = Preprocess.model_validate({"mean": 0.5, "std": 2})
    assert (given.mean, given.std) == ((0.5,), (2.0,))
    with pytest.raises(ValidationError, match="divisor"):
        Preprocess.model_validate({"std": 0})
