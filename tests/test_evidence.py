from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ccompile.comparison import compare
from ccompile.core import CostReport
from ccompile.errors import DataError
from ccompile.evidence import ComparisonRecord, CostRecord, DataRecord, Evidence, FileRecord, GateRecord, StepRecord
from ccompile.tolerance import Tolerance

if TYPE_CHECKING:
    from pathlib import Path

    from ccompile.tolerance import Comparison

FILE = FileRecord(name="f", digest="00", bytes=1)
COST = CostRecord.of(CostReport(1, 1, 1, 1, 1, 1, 1, 1, 0.5))


def comparison() -> Comparison:
    """Against zeros: relative L2 and SQNR are infinite."""
    return compare([{"y": np.ones(2, np.float32)}], [{"y": np.zeros(2, np.float32)}], 2)


def evidence(**changes: Any) -> Evidence:
    step = StepRecord(
        index=1,
        name="split-svd",
        options={"rank": 2},
        contract="lossy",
        tolerance=Tolerance(atol=1),
        verdict="kept",
        reason="",
        applied=(),
        skipped=(),
        against_previous=ComparisonRecord.of(comparison()),
        against_source=None,
        metrics={"top1": math.nan},
        cost=COST,
        nodes=1,
        ops={"Relu": 1},
    )
    fields: dict[str, Any] = {
        "verdict": "ok",
        "source": FILE,
        "output": FILE,
        "spec": FILE,
        "target": "t",
        "seed": 0,
        "versions": {},
        "notes": (),
        "calibration": None,
        "verification": DataRecord(source="s", digest="0", samples=2),
        "source_cost": COST,
        "source_metrics": {"top1": 1.0},
        "steps": (step,),
        "final": ComparisonRecord.of(comparison()),
        "survey": {"speed_up": math.inf},
        "gates": (GateRecord(name="atol", limit=1, value=math.nan, holds=False),),
        "timing": {"total": 1.0},
    }
    return Evidence(**fields | changes)


def test_infinities_and_nan_become_null() -> None:
    data = json.loads(evidence().text())
    output = data["steps"][0]["against_previous"]["outputs"][0]
    assert (output["max_abs"], output["relative_l2"], output["sqnr_db"]) == (1, None, None)
    assert data["steps"][0]["metrics"] == {"top1": None}
    assert data["survey"] == {"speed_up": None}
    assert data["gates"][0]["value"] is None


def test_the_text_reads_back_to_the_same_text(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text(evidence().text())
    found = Evidence.read(path)
    assert found.text() == evidence().text()
    assert found.steps[0].against_previous == ComparisonRecord.of(comparison())
    assert found.steps[0].tolerance == Tolerance(atol=1)


def test_the_text_ends_in_one_newline() -> None:
    assert evidence().text().endswith("}\n")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"evidence_schema": 1', '"evidence_schema": 2'),
        lambda text: text.replace('"verdict": "ok"', '"verdict": "fine"'),
        lambda text: text.replace('"seed": 0', '"seed": 0, "extra": 1'),
        lambda text: text.replace('"seed": 0,', ""),
        lambda text: "",
        lambda text: "[]",
    ],
)
def test_a_damaged_file_or_one_of_another_schema_is_a_data_error(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "e.json"
    path.write_text(damage(evidence().text()))
    assert path.read_text() != evidence().text()
    with pytest.raises(DataError, match="not an evidence file of schema 1"):
        Evidence.read(path)


def test_bytes_that_are_no_text_are_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match="not an evidence file"):
        Evidence.read(tmp_path / "e.json")


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_a_file_that_cannot_be_read_is_a_data_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot read the evidence"):
        Evidence.read(tmp_path / name)
