"""Moves of codes as a convolution: the same codes, where it is faster, and what is left as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import builders
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantize_activations import deployed_ops, quantise

from ccompile import code_moves, graph, runtime
from ccompile.analysis.shapes import shapes
from ccompile.runtime import Settings

Build = Callable[[builders.Net, ir.Value], ir.Value]
MOVES = ("Slice", "Gather", "Pad")
ZERO = 131


def ints(net: builders.Net, *numbers: int) -> ir.Value:
    return net.constant(np.array(numbers, np.int64))


def cut(net: builders.Net, x: ir.Value, axis: int, first: int, last: int, step: int) -> ir.Value:
    return net.node("Slice", x, *(ints(net, number) for number in (first, last, axis, step)))


def pad(net: builders.Net, x: ir.Value, pads: list[int], fill: int = ZERO) -> ir.Value:
    return net.node("Pad", x, ints(net, *pads), net.constant(np.array(fill, np.uint8)))


def halve(net: builders.Net, x: ir.Value) -> ir.Value:
    return cut(net, cut(net, x, 2, 0, 2**63 - 1, 2), 3, 0, 2**63 - 1, 2)


def moved(build: Build, shape: tuple[int | str, ...] = ("N", 4, 9, 8)) -> ir.Model:
    """Return a net of codes: x, quantised, moved, and dequantised."""
    net = builders.Net(0)
    grid = net.constant(np.array(0.037, np.float32), "scale"), net.constant(np.array(ZERO, np.uint8), "zero")
    codes = build(net, net.node("QuantizeLinear", net.input("x", shape), *grid))
    return net.model(net.node("DequantizeLinear", codes, *grid))


def fast(*ops: str) -> Callable[[ir.Model], Mapping[str, tuple[int, float]]]:
    """Return prices by which these ops take no time and all others a second."""
    return lambda model: {str(node.name): (0, float(node.op_type not in ops)) for node in model.graph}


CONVOLUTIONS = fast("Conv", "QuantizeLinear", "DequantizeLinear")


def convolved(model: ir.Model) -> tuple[ir.Model, list[tuple[str, ...]]]:
    """Return the model with all of its moves that can be written as convolutions, and their names."""
    result = graph.copy(model)
    among = {str(node.name) for node in model.graph if node.op_type in MOVES}
    return result, code_moves.convolve(result, among, shapes(result), CONVOLUTIONS)


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@st.composite
def chains(draw: st.DrawFn) -> Build:
    """Draw channel and position moves in a row."""
    whole = st.sampled_from([2**31 - 1, 2**63 - 1])
    steps = draw(st.lists(st.sampled_from(("rows", "columns", "cut", "gather", "pad")), min_size=1, max_size=4))
    numbers = [(draw(st.integers(1, 3)), draw(st.integers(0, 2)), draw(whole)) for _ in steps]

    def build(net: builders.Net, x: ir.Value) -> ir.Value:
        for name, (step, few, end) in zip(steps, numbers, strict=True):
            if name == "gather":
                x = net.node("Gather", x, ints(net, *[-1, 0][: step + 1]), axis=1 if few else -3)
            elif name == "pad":
                x = pad(net, x, [0, few, 0, 0, 0, step, 0, 0])
            else:
                axis = {"rows": 2, "columns": 3, "cut": 1}[name]
                x = cut(net, x, axis, 0, end, step)
        return x

    return build


@settings(max_examples=40, deadline=None)
@given(chains(), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))
def test_the_codes_are_the_same(build: Build, batch: int, height: int, width: int) -> None:
    model = moved(build, ("N", 4, "H", "W"))
    result, names = convolved(model)
    assert sum(map(len, names)) == sum(ops(model)[op] for op in MOVES)
    assert [ops(result)[op] for op in ("Conv", *MOVES)] == [1, 0, 0, 0]
    x = {"x": np.random.default_rng(0).normal(0, 3, (batch, 4, height, width)).astype(np.float32)}
    for optimise in (False, True):
        found, wanted = (runtime.Session(m, Settings(1, optimise=optimise)).run(x) for m in (result, model))
        for one, other in zip(found.values(), wanted.values(), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (lambda net, x: cut(net, x, 2, 1, 2**31 - 1, 2), "begins behind the first row"),
        (lambda net, x: cut(net, x, 3, 0, 7, 2), "ends before the last column"),
        (lambda net, x: cut(net, x, 2, -1, -(2**31), -1), "goes backwards"),
        (lambda net, x: cut(net, x, 0, 0, 2**31 - 1, 2), "leaves samples out"),
        (lambda net, x: pad(net, x, [0, 0, 1, 0, 0, 0, 1, 0]), "pads rows"),
        (lambda net, x: pad(net, x, [0, -1, 0, 0, 0, 0, 0, 0]), "crops channels"),
        (lambda net, x: net.node("Gather", x, ints(net, 0, 2), axis=2), "gathers rows"),
        (lambda net, x: net.node("Gather", x, net.constant(np.array(1)), axis=1), "drops the axis"),
        (lambda net, x: cut(net, net.node("Flatten", x), 1, 0, 2**31 - 1, 2), "is no image"),
    ],
)
def test_a_move_that_no_convolution_of_one_tap_makes_stays(build: Build, what: str) -> None:
    assert convolved(moved(build))[1] == [], what


def test_what_others_read_too_is_kept() -> None:
    def build(net: builders.Net, x: ir.Value) -> ir.Value:
        rows = cut(net, x, 2, 0, 2**31 - 1, 2)
        return net.node("Concat", cut(net, rows, 3, 0, 2**31 - 1, 2), cut(net, rows, 3, 1, 2**31 - 1, 2), axis=1)

    model = moved(build)
    assert ops(convolved(model)[0])["Slice"] == 3  # what reads them is codes: their grid is not known


def test_channels_have_to_be_known() -> None:
    assert convolved(moved(halve, ("N", "C", 8, 8)))[1] == []
    assert len(convolved(moved(halve, ("N", 3, 8, 8)))[1]) == 1


def test_a_convolution_of_very_many_weights_is_not_weighed() -> None:
    assert convolved(moved(lambda net, x: pad(net, x, [0, 0, 0, 0, 0, 3, 0, 0]), ("N", 4100, 2, 2)))[1] == []


def test_only_the_named_nodes_are_replaced() -> None:
    model = moved(halve)
    first = next(str(node.name) for node in model.graph if node.op_type == "Slice")
    assert code_moves.convolve(model, {first}, shapes(model), CONVOLUTIONS) == []


def test_a_convolution_that_is_slower_is_not_written() -> None:
    model = moved(halve)
    among = {str(node.name) for node in model.graph}
    assert code_moves.convolve(model, among, shapes(model), fast(*MOVES)) == []
    assert ops(model)["Slice"] == 2


def test_a_net_with_subsampled_shortcuts_changes_its_layout_at_its_ends_only(tmp_path: Path) -> None:
    net = builders.Net(0)
    x = net.relu(net.conv(net.input("x", ["N", 16, 16, 16]), "stem", (16, 16, 3, 3), pad=1))
    y = net.conv(x, "half", (32, 16, 3, 3), stride=2, pad=1)
    y = net.conv(net.relu(y), "next", (32, 32, 3, 3), pad=1)
    short = net.node("Pad", halve(net, x), ints(net, 0, 8, 0, 0, 0, 8, 0, 0))
    y = net.conv(net.relu(net.node("Add", y, short)), "last", (32, 32, 3, 3), pad=1)
    run = quantise(net.model(net.node("GlobalAveragePool", y)))
    notes = [site.note for site in run.record.applied if "1x1 convolution" in site.note]
    assert [note.split()[0] for note in notes] == ["Slice", "Slice", "Pad"]
    found = deployed_ops(run.model, tmp_path)
    assert found["QLinearConv"] == 5
    assert found["Transpose"] == 2
    assert not found["Slice"] + found["Pad"]
