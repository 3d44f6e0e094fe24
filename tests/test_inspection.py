"""What `inspect` prices where shapes are open, or cannot be inferred."""

from __future__ import annotations

from pathlib import Path

import builders
import numpy as np
import onnx_ir as ir
import pytest
from runs import Run

from ccompile import graph
from ccompile.inspection import Inspection, inspect_model
from ccompile.target import load_target


def inspected(model: ir.Model, folder: Path, **shapes: tuple[int, ...]) -> Inspection:
    graph.save(model, folder / "m.onnx")
    return inspect_model(folder / "m.onnx", load_target("generic-cpu", Path()), shapes)


def hidden_shape(rows: float = 1) -> ir.Model:
    """A layer behind a Reshape to a computed shape, which inference does not follow."""
    net = builders.Net(0)
    x = net.input("x", ["N", 8])
    cells = net.node("Cast", net.node("ReduceSum", net.node("Exp", x), keepdims=1), to=int(ir.DataType.INT64))
    one = net.node("Div", net.node("Reshape", cells, net.constant(np.array([1]))), net.constant(np.array([8])))
    one = net.node("Mul", one, net.constant(np.array([int(rows)])))
    shape = net.node("Concat", one, net.constant(np.array([8])), axis=0)
    y = net.node("Reshape", x, shape)
    return net.model(net.node("MatMul", y, net.weight("w", (8, 5)), name="fc"))


def test_shapes_that_cannot_be_inferred_are_observed(tmp_path: Path) -> None:
    found = inspected(hidden_shape(), tmp_path)
    assert found.cost.report.macs == 8 * 5
    assert found.notes == ()


def test_a_model_that_refuses_the_sample_keeps_what_is_known_with_a_note(tmp_path: Path) -> None:
    found = inspected(hidden_shape(rows=7), tmp_path)
    (note,) = found.notes
    assert "observing it failed" in note


def test_guessed_axes_are_noted(tmp_path: Path, run: Run) -> None:
    found = inspected(builders.open_net(0), tmp_path)
    assert found.notes == ("input `x`: axis 2, 3 taken as 1",)
    assert "note: input `x`: axis 2, 3 taken as 1" in run("inspect", tmp_path / "m.onnx").out


@pytest.mark.parametrize(("batch", "noted"), [(1, False), (4, True)])
def test_a_batch_that_is_given_is_priced_as_one_with_a_note(tmp_path: Path, batch: int, noted: bool) -> None:
    found = inspected(builders.open_net(0), tmp_path, x=(batch, 3, 32, 32))
    assert (found.notes == ("input `x`: costs are of one sample, not of the 4 given",)) is noted
    assert (found.notes == ()) is not noted
