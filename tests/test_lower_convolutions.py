"""lower-winograd and lower-fft in whole graphs: what is around a site stays, and what is never taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

import driver
import numpy as np
import onnx_ir as ir
import pytest
from builders import Net
from lowered import conv, drawn

from ccompile.core import Site, Skip
from ccompile.numerics import dft
from ccompile.passes.lower_fft import LowerFft
from ccompile.passes.lower_winograd import LowerWinograd

if TYPE_CHECKING:
    from ccompile.core import Array, Pass

ALWAYS = {"select": "always"}


def lowered(step: Pass, model: ir.Model) -> driver.Bench:
    """Run a step that keeps its contract, on batches of several sizes."""
    run = driver.run_step(step, model)
    assert run.record.verdict == "kept", run.record.reason
    return run


def reasons(run: driver.Bench) -> list[str]:
    assert run.result is not None
    return [skip.reason for skip in run.result.skipped]


def test_what_follows_a_convolution_stays() -> None:
    net = Net(0)
    x = net.input("x", ["N", 8, 9, 9])
    y = net.node("Add", net.relu(net.conv(x, "conv", (8, 8, 3, 3), pad=1)), x)
    run = lowered(LowerWinograd.model_validate(ALWAYS), net.model(net.node("HardSwish", y)))
    ops = [node.op_type for node in run.model.graph]
    assert ops[-3:] == ["Relu", "Add", "HardSwish"]
    assert len(run.record.applied) == 1


def test_a_shared_weight_serves_both_its_readers() -> None:
    net = Net(0)
    x, w = net.input("x", ["N", 4, 8, 8]), net.weight("w", (4, 4, 3, 3))
    one = net.node("Conv", x, w, name="one", pads=[1] * 4)
    two = net.node("Conv", net.relu(one), w, name="two", pads=[1] * 4)
    model = net.model(two)
    run = lowered(LowerWinograd.model_validate(ALWAYS | {"only": ["one"]}), model)
    assert [site.nodes for site in run.record.applied] == [("one",)]
    assert "w" in run.model.graph.initializers
    both = lowered(LowerWinograd.model_validate(ALWAYS), model)
    assert len(both.record.applied) == 2
    assert "w" not in both.model.graph.initializers


def test_a_tight_tolerance_takes_smaller_tiles() -> None:
    model = conv(drawn((8, 8, 3, 3)), (8, 8), pads=[1] * 4)
    step = LowerWinograd.model_validate(ALWAYS | {"tiles": ["2x1", "4x4"], "tolerance": {"relative_l2": 1e-6}})
    run = lowered(step, model)
    assert run.record.applied[0].note.startswith("F(2x1)")
    none = LowerWinograd.model_validate(ALWAYS | {"tiles": ["4x4"], "tolerance": {"relative_l2": 1e-8}})
    assert "`F(4x4)` may err by" in reasons(driver.run_step(none, model))[0]


def test_tiles_turn_with_a_kernel_of_one_row() -> None:
    run = lowered(LowerWinograd(select="always", tiles=("4x1",)), conv(drawn((4, 4, 1, 3)), (5, 9)))
    assert run.record.applied[0].note.startswith("F(1x4)")


@pytest.mark.parametrize("tiles", [["7x1"], ["4"], []])
def test_tiles_that_are_none_are_refused(tiles: list[str]) -> None:
    with pytest.raises(ValueError, match="tiles"):
        LowerWinograd.model_validate({"tiles": tiles})


def test_signals_that_are_longer_than_kernels_may_go_in_blocks() -> None:
    found = labels(LowerFft(), conv(drawn((2, 1, 40)), (400,), pads=[39, 0], group=2))
    assert found == ["four steps", "four steps in blocks of 64", "four steps in blocks of 128"]


def test_rows_may_go_in_tiles() -> None:
    found = labels(LowerFft(), conv(drawn((4, 4, 5, 5)), (16, 16), pads=[2] * 4))
    assert found == ["spectra of rows", "spectra of rows in 2 tiles", "spectra of rows in 4 tiles"]


def labels(step: LowerFft, model: ir.Model) -> list[str]:
    """What the pass offers for the node `conv`."""
    run = driver.run_step(step, model)
    assert run.result is not None
    decided: list[Site | Skip] = [*run.result.applied, *run.result.skipped]
    (site,) = decided
    return [c.technique for c in sorted(site.candidates, key=lambda c: c.strength)][1:]


@pytest.mark.parametrize("shape", [(3, 16), (1, 16), (2, 3, 16), (16,)])
def test_a_circulant_matrix_takes_any_leading_axes(shape: tuple[int, ...]) -> None:
    net, c = Net(0), drawn((1, 1, 16))
    x = net.input("x", shape)
    model = net.model(net.node("MatMul", x, net.constant(np.ascontiguousarray(dft.circulant(c).T), "w"), name="fc"))
    run = lowered(LowerFft.model_validate(ALWAYS), model)
    assert run.record.applied[0].note.startswith("circulant, 8 x 2")


def test_a_circulant_matrix_of_prime_size_is_one_block() -> None:
    net, c = Net(0), drawn((1, 1, 13))
    w = net.constant(np.ascontiguousarray(dft.circulant(c).T), "w")
    model = net.model(net.node("MatMul", net.input("x", ["N", 13]), w, name="fc"))
    run = lowered(LowerFft.model_validate(ALWAYS), model)
    assert run.record.applied[0].note.startswith("circulant blocks of 13")


@pytest.mark.parametrize("W", [np.eye(16) + 1e-3 * drawn((16, 16)), np.arange(6.0).reshape(2, 3)])
def test_a_matrix_that_is_not_circulant_is_left_alone(W: Array) -> None:
    net = Net(0)
    x = net.input("x", ["N", len(W)])
    run = lowered(LowerFft.model_validate(ALWAYS), net.model(net.node("MatMul", x, net.constant(W.astype(np.float32)))))
    assert reasons(run) == ["its weight is not circulant"]
