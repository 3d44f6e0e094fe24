"""Excerpts: cut out, priced and timed on the shapes and values that a compile really has."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import builders
import driver
import numpy as np
import onnx_ir as ir
import pytest
from test_lowering import CHAIN, ByTwice

from ccompile import onnx_io, runtime, timing
from ccompile.decisions import Decisions
from ccompile.lowering import around
from ccompile.prices import cut_out

if TYPE_CHECKING:
    from collections.abc import Sequence

OPEN = """agraph (float[N,3,H,8] x) => (float[N,4,M,L] y) <float[4,3,3,3] W, float[4,4,1,1] V> {
    [first] a = Conv <pads = [1,1,1,1]> (x, W)
    [sizes] s = Shape (a)
    [act] b = Relu (a)
    [scale] c = Mul (b, b)
    [same] d = Reshape (c, s)
    [last] y = Conv (d, V)
}"""


def prices_of(text: str) -> tuple[driver.Bench, ir.Model]:
    model, _ = driver.model_of(text)
    return driver.bench(model), model


def names_of(part: ir.Model) -> tuple[list[str], list[str], list[str]]:
    values = ([str(value.name) for value in side] for side in (part.graph.inputs, part.graph.outputs))
    inputs, outputs = values
    return [str(node.name) for node in part.graph], inputs, outputs


def test_an_excerpt_reads_and_gives_what_crosses_its_border() -> None:
    _, model = prices_of(OPEN)
    assert names_of(cut_out(model, ["act", "scale"])) == (["act", "scale"], ["a"], ["c"])
    assert names_of(cut_out(model, ["first"])) == (["first"], ["x"], ["a"])
    assert names_of(cut_out(model, ["same", "last"])) == (["same", "last"], ["c", "s"], ["y"])


def test_an_excerpt_has_the_shapes_of_one_sample() -> None:
    run, model = prices_of(OPEN)
    part = run._prices().excerpt(model, ["same", "last"])
    assert {str(v.name): (str(v.dtype), str(v.shape)) for v in part.graph.inputs} == {
        "c": ("FLOAT", "[1,4,8,8]"),
        "s": ("INT64", "[4]"),
    }


def test_an_excerpt_shares_its_tensors() -> None:
    _, model = prices_of(OPEN)
    part = cut_out(model, ["last"])
    mine, whole = (m.graph.initializers["V"].const_value for m in (part, model))
    assert mine is not None
    assert whole is not None
    assert np.shares_memory(np.asarray(mine.numpy()), np.asarray(whole.numpy()))


def test_weights_behind_other_ops_come_with_them() -> None:
    model, _ = driver.model_of(
        """agraph (float[2,4] x) => (float[2,3] y)
        <int8[4,3] Q = {1,2,3,4,5,6,7,8,9,10,11,12}, float scale = {0.5}> {
        [decode] W = DequantizeLinear (Q, scale)
        [fc] y = MatMul (x, W)
    }"""
    )
    assert names_of(cut_out(model, ["fc"])) == (["decode", "fc"], ["x"], ["y"])


def test_an_excerpt_of_everything_costs_what_the_graph_costs() -> None:
    run, model = prices_of(OPEN)
    prices = run._prices()
    whole = prices.nodes(model)
    part = prices.weigh(prices.excerpt(model, [str(node.name) for node in model.graph]))
    assert part == pytest.approx({name: seconds for name, (_, seconds) in whole.items()})
    assert all(math.isfinite(seconds) for seconds in part.values())


def test_a_shape_that_nothing_tells_costs_infinitely_much() -> None:
    run, model = prices_of(OPEN)
    prices = run._prices()
    part = prices.excerpt(model, ["same", "last"])
    assert math.isfinite(prices.weigh(part)["last"])
    part.graph.node(0).outputs[0].name = "fresh"  # no observed shape stands for that
    assert prices.weigh(part)["last"] == math.inf


def test_excerpts_are_timed_on_the_values_that_reach_them() -> None:
    seen: list[tuple[bool, list[object]]] = []

    def timer(runs: Sequence[timing.Run], alone: bool) -> list[float]:
        seen.append((alone, [run() for run in runs]))
        return [float(len(runs)), 2.0]

    run, model = prices_of(OPEN)
    prices = run._prices()
    prices.timer = timer
    parts = [prices.excerpt(model, names) for names in (["act", "scale"], ["same", "last"])]
    assert prices.timed(model, parts) == [2.0, 2.0]
    ((alone, found),) = seen
    assert alone
    real = runtime.Session(model, run.settings, ["c", "y"]).run(run.single, ["c", "y"])
    for outputs, name in zip(found, ("c", "y"), strict=True):
        assert isinstance(outputs, dict)
        np.testing.assert_allclose(outputs[name], real[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("net", ["residual", "grouped"])
def test_an_excerpt_computes_what_the_graph_does(net: str) -> None:
    model = builders.ZOO[net](3)
    run = driver.bench(model)
    made = [str(value.name) for node in model.graph for value in node.outputs]
    real = run.single | runtime.Session(model, run.settings, made).run(run.single, made)
    for node in model.graph:
        part = run._prices().excerpt(model, around(node))
        found = runtime.Session(part, run.settings).run({str(v.name): real[str(v.name)] for v in part.graph.inputs})
        assert found
        for name, array in found.items():
            np.testing.assert_array_equal(array, real[name])


def test_interleaved_runs_take_turns_and_give_the_first_quartile() -> None:
    calls: list[str] = []
    found = timing.interleaved([lambda: calls.append("a"), lambda: calls.append("b")], True, budget=0.0, turns=4)
    assert len(found) == 2
    assert all(seconds > 0 for seconds in found)
    blocks = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert blocks == ["a", "b"] * 5  # finding the counts, then four turns


# ---------------------------------------------------------------------------------------------- in a compile


def compiled(
    decisions: Decisions, step: ByTwice, timer: timing.Timer = timing.interleaved
) -> tuple[driver.Bench, list[str]]:
    """A compile of one step, and the ops of its result."""
    model, _ = driver.model_of(CHAIN)
    run = driver.bench(model)
    run.decisions, run.timer = decisions, timer
    run.step(0, step)
    return run, [node.op_type for node in run.model.graph]


def test_a_compile_repeats_what_was_decided() -> None:
    first = Decisions()
    run, ops = compiled(first, ByTwice(select="always"))
    assert run.record.verdict == "kept", run.record.reason
    assert set(first.made) == {"01-test-lowering/b", "01-test-lowering/c"}
    again = Decisions(first.made)
    _, same = compiled(again, ByTwice())  # which, by the target, would take none
    assert same == ops != ["Relu", "Neg", "Neg", "Relu"]
    assert again.made == first.made


def test_a_compile_prices_by_its_target() -> None:
    run, ops = compiled(Decisions(), ByTwice())
    assert ops == ["Relu", "Neg", "Neg", "Relu"]
    reasons = [skip.reason for skip in run.record.skipped]
    assert len(reasons) == 2
    assert all(reason.startswith("no formulation pays: ") for reason in reasons)
    assert {c.technique for c in run.record.skipped[0].candidates} == {"as is", "subtract", "multiply"}


def test_times_on_this_machine_decide_in_a_compile() -> None:
    def timer(runs: Sequence[timing.Run], alone: bool) -> list[float]:
        assert all(run() for run in runs)
        return [3e-6, 2e-6, 1e-6]  # as it is, subtract, multiply

    decisions = Decisions()
    run, ops = compiled(decisions, ByTwice(select="measured"), timer)
    assert run.record.verdict == "kept", run.record.reason
    assert ops == ["Relu", "Mul", "Mul", "Relu"]
    assert set(decisions.made.values()) == {"multiply"}


def test_names_of_formulations_stay_unique() -> None:
    run, _ = compiled(Decisions(), ByTwice(select="always"))
    names = [str(node.name) for node in run.model.graph]
    assert len(set(names)) == len(names)
    assert onnx_io.check(run.model) == ""
