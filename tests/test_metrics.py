from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ccompile import metrics
from ccompile.errors import DataError, SpecError

if TYPE_CHECKING:
    from pathlib import Path

    from ccompile.core import Array


def f32(*values: Any) -> Array:
    return np.array(values, np.float32)


def test_top1_and_top5_by_hand() -> None:
    scores = {"y": np.array([[9, 8, 7, 6, 5, 4], [4, 5, 6, 7, 8, 9]], np.float32)}
    assert metrics.top1(scores, np.array([0, 0])) == 0.5
    assert metrics.top5(scores, np.array([4, 0])) == 0.5


def test_top5_of_three_classes_is_always_right() -> None:
    assert metrics.top5({"y": f32([1, 2, 3])}, np.array([0])) == 1


def test_top1_reads_the_first_output_that_has_scores() -> None:
    outputs = {"features": np.zeros((2, 3, 4, 4), np.float32), "y": f32([0, 1], [1, 0])}
    assert metrics.top1(outputs, np.array([1, 0])) == 1


def test_top1_without_scores_is_refused() -> None:
    with pytest.raises(DataError, match="samples, classes"):
        metrics.top1({"y": f32(1, 2)}, np.array([0, 1]))


def test_labels_that_are_not_one_class_per_sample_are_refused() -> None:
    with pytest.raises(DataError, match=r"labels of shape \[2, 1\]"):
        metrics.top1({"y": f32([0, 1], [1, 0])}, np.array([[1], [0]]))


def test_a_metric_beside_the_spec_is_found(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("def error(outputs, labels):\n    return -abs(outputs['y'] - labels).mean()\n")
    metric = metrics.find_metric("task:error", tmp_path)
    batches = [{"y": f32(1, 2)}, {"y": f32(5)}]
    assert metrics.measure({"e": metric}, batches, [f32(1, 1), f32(3)]) == {"e": -1.0}


def test_each_spec_folder_has_its_own_metric_of_a_name(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "task.py").write_text(f"def f(outputs, labels):\n    return {number}\n")
    found = [metrics.find_metric("task:f", tmp_path / str(number))({}, f32()) for number in (1, 2)]
    assert found == [1, 2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("top2", "Did you mean `top1`|Did you mean `top5`"),
        ("nowhere_to_be_found:f", "No module named"),
        ("task:g", "has no attribute 'g'"),
        ("task:number", "not a function"),
        ("broken:f", "invalid syntax"),
        ("raises:f", "boom"),
        (":f", "unknown metric"),
        ("task:", "unknown metric"),
    ],
)
def test_a_wrong_metric_is_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "task.py").write_text("number = 1\ndef f(outputs, labels): return 1\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("raise RuntimeError('boom')\n")
    with pytest.raises(SpecError, match=message):
        metrics.find_metric(name, tmp_path)
    assert metrics.find_metric("task:f", tmp_path)


@pytest.mark.parametrize("body", ["return None", "return 'high'", "return outputs['z']", "assert False", "return x.y"])
def test_a_metric_that_fails_is_named(tmp_path: Path, body: str) -> None:
    (tmp_path / "task.py").write_text(f"def f(outputs, labels):\n    {body}\n")
    with pytest.raises(DataError, match="metric `mine` fails"):
        metrics.measure({"mine": metrics.find_metric("task:f", tmp_path)}, [{"y": f32(1)}], [f32(1)])


def test_an_output_whose_batches_do_not_stack_does_not_stop_a_metric() -> None:
    batches = [{"y": f32([0, 1]), "t": np.zeros((1, n), np.float32), "s": [f32(1)]} for n in (2, 3)]
    assert metrics.measure({"top1": metrics.top1}, batches, [np.array([1]), np.array([0])]) == {"top1": 0.5}
