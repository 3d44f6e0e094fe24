"""What `inspect` prices where shapes are open, or cannot be inferred."""

from __future__ import annotations

import json
from pathlib import Path

import builders
import coupled
import numpy as np
import onnx_ir as ir
import pytest
from runs import Run
from test_report import lines_of, shown

from ccompile import onnx_io, report
from ccompile.inspection import Coupling, GroupFacts, Inspection, inspect_groups, inspect_model
from ccompile.target import load_target


def inspected(model: ir.Model, folder: Path, **shapes: tuple[int, ...]) -> Inspection:
    onnx_io.save(model, folder / "m.onnx")
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


# ---------------------------------------------------------------------------------------------- groups


def coupling(model: ir.Model, folder: Path) -> Coupling:
    onnx_io.save(model, folder / "m.onnx")
    return inspect_groups(folder / "m.onnx")


def test_groups_name_what_makes_reads_and_pins_them(tmp_path: Path) -> None:
    found = {group.name: group for group in coupling(coupled.residual(), tmp_path).groups}
    assert found["stem"] == GroupFacts("stem", 8, ("stem", "a2", "b2"), (), ("a1", "b1", "fc"), ())
    assert found["a1"] == GroupFacts("a1", 5, ("a1",), (), ("a2",), ())
    assert found["fc"].pinned == (("fc", "graph output `fc_out`"),)


def test_groups_name_what_their_channels_pass_through(tmp_path: Path) -> None:
    found = coupling(builders.conv_bn_net(0), tmp_path).groups[0]
    assert found.through[0] == "bn1"


def test_groups_are_printed_as_a_table_and_as_data(tmp_path: Path, run: Run) -> None:
    onnx_io.save(coupled.residual(), tmp_path / "m.onnx")
    text, data = (run("inspect", tmp_path / "m.onnx", "--groups", *more) for more in ((), ("--json",)))
    assert (text.code, data.code) == (0, 0)
    assert lines_of(text.out, "a1")[0].split() == ["a1", "a1", "a2", "5"]
    assert "groups: 4, of them free: 3, with 18 units" in text.out
    groups = json.loads(data.out)["groups"]
    assert [group["name"] for group in groups] == ["stem", "a1", "b1", "fc"]
    assert groups[0]["readers"] == ["a1", "b1", "fc"]


def test_long_lists_end_in_a_count_but_not_as_data(tmp_path: Path, run: Run) -> None:
    net, x = coupled.start()
    x = net.relu(net.conv(x, "a", (8, 3, 3, 3)))
    readers = [net.node("ReduceMean", net.conv(x, f"b{index}", (4, 8, 1, 1)), name=f"m{index}") for index in range(9)]
    onnx_io.save(net.model(*readers), tmp_path / "m.onnx")
    assert "b0, b1 and 7 more" in run("inspect", tmp_path / "m.onnx", "--groups").out
    assert len(json.loads(run("inspect", tmp_path / "m.onnx", "--groups", "--json").out)["groups"][0]["readers"]) == 9


@pytest.mark.parametrize("width", [60, 80, 120, 240])
def test_a_table_of_groups_keeps_name_pin_and_units_at_every_width(tmp_path: Path, width: int) -> None:
    text = shown(report.groups_table(coupling(coupled.residual(), tmp_path)), width)
    assert lines_of(text, "fc")[0].split()[0] == "fc"
    assert "graph output `fc_out`" in text
    assert lines_of(text, "stem")[0].split()[-1] == "8"
    assert all(len(line.rstrip()) <= width for line in text.splitlines())


def test_a_model_without_groups_says_where_they_may_be(tmp_path: Path, run: Run) -> None:
    onnx_io.save(builders.ZOO["capturing"](3), tmp_path / "m.onnx")
    out = run("inspect", tmp_path / "m.onnx", "--groups").out
    assert "are not looked at" in out
