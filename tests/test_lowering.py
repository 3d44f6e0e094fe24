"""Which formulation of a site a lowering takes: by synthetic prices, in context, within its tolerance, as locked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import driver
import numpy as np
import onnx_ir as ir
import pytest
from pydantic import Field

from ccompile import graph, lowering
from ccompile.core import PassResult, Skip, View
from ccompile.decisions import Decisions
from ccompile.errors import PassError
from ccompile.lowering import AS_IS, Formulation, Lowering
from ccompile.target import load_target
from ccompile.tolerance import Tolerance

if TYPE_CHECKING:
    from ccompile.core import CostReport

CHAIN = """agraph (float[N,4] x) => (float[N,4] y) {
    [a] u = Relu (x)
    [b] v = Neg (u)
    [c] w = Neg (v)
    [d] y = Relu (w)
}"""


class ByTwice(Lowering):
    """Neg as two ops that give the same, and as one that errs."""

    bound: float = Field(0.0, description="said to be the second's error")

    def formulations(self, node: ir.Node, view: View) -> Sequence[Formulation] | Skip:
        if node.op_type != "Neg":
            return ()
        if node.name == "refused":
            return Skip("refused", "is refused")
        return Formulation("subtract", 0.0, as_subtraction), Formulation("multiply", self.bound, as_product)


def as_subtraction(main: ir.Graph, node: ir.Node) -> Sequence[ir.Node]:
    zero = graph.add_constant(main, f"{node.name}_zero", np.zeros((), np.float32))
    new = graph.add_node("Sub", [zero, *node.inputs], before=node, base=f"{node.name}_sub")
    graph.replace_node(node, new)
    return (new,)


def as_product(main: ir.Graph, node: ir.Node) -> Sequence[ir.Node]:
    minus = graph.add_constant(main, f"{node.name}_minus", np.array(-1, np.float32))
    new = graph.add_node("Mul", [*node.inputs, minus], before=node, base=f"{node.name}_mul")
    graph.replace_node(node, new)
    return (new,)


@dataclass
class Priced:
    """core.Costs by a table of seconds per op, and one of measured seconds."""

    by_op: Mapping[str, float]
    measured: Mapping[str, float] = field(default_factory=dict)
    parts: list[list[str]] = field(default_factory=list)

    @property
    def source(self) -> CostReport:
        raise NotImplementedError

    def report(self, model: ir.Model) -> CostReport:
        raise NotImplementedError

    def nodes(self, model: ir.Model) -> Mapping[str, tuple[int, float]]:
        raise NotImplementedError

    def coding(self, model: ir.Model, values: object) -> Mapping[str, float]:
        raise NotImplementedError

    def excerpt(self, model: ir.Model, nodes: Sequence[str]) -> ir.Model:
        self.parts.append(list(nodes))
        return graph.copy(model)

    def weigh(self, part: ir.Model) -> Mapping[str, float]:
        return {str(node.name): self.by_op.get(node.op_type, 1.0) for node in part.graph}

    def timed(self, model: ir.Model, parts: Sequence[ir.Model]) -> Sequence[float]:
        return [sum(self.measured.get(node.op_type, 1.0) for node in part.graph) for part in parts]


def view_of(step: Lowering, costs: Priced | None, text: str = CHAIN, decisions: Decisions | None = None) -> View:
    model, _ = driver.model_of(text)
    view = View(model, load_target("generic-cpu", Path()), np.random.default_rng(0), step, graph.facts, lambda _: [])
    view.costs = costs
    if decisions is not None:
        view.decide = lambda site, compute: decisions.decide("01-by-twice", site, compute)
    return view


def ops_after(step: Lowering, costs: Priced | None, decisions: Decisions | None = None) -> tuple[list[str], PassResult]:
    view = view_of(step, costs, decisions=decisions)
    result = step.run(view)
    return [node.op_type for node in view.graph], result


@pytest.mark.parametrize(
    ("sub", "mul", "expected"), [(0.5, 0.8, "Sub"), (0.8, 0.5, "Mul"), (1.2, 1.1, "Neg"), (1.0, 1.0, "Neg")]
)
def test_the_fastest_by_the_target_is_taken(sub: float, mul: float, expected: str) -> None:
    found, result = ops_after(ByTwice(), Priced({"Sub": sub, "Mul": mul}))
    assert found == ["Relu", expected, expected, "Relu"]
    assert len(result.applied) == (0 if expected == "Neg" else 2)
    assert len(result.skipped) == (2 if expected == "Neg" else 0)


def test_a_site_left_alone_says_both_times() -> None:
    _, result = ops_after(ByTwice(), Priced({"Sub": 2.0, "Mul": 1.5}))
    assert result.skipped[0].reason == "no formulation pays: multiply takes 1500000.0 us for 1000000.0 us"
    assert [(c.technique, c.cost, c.chosen) for c in result.skipped[0].candidates] == [
        (AS_IS, 1.0, True),
        ("multiply", 1.5, False),
        ("subtract", 2.0, False),
    ]


def test_what_was_weighed_stands_at_the_site() -> None:
    _, result = ops_after(ByTwice(), Priced({"Sub": 0.5, "Mul": 0.75}))
    site = result.applied[0]
    assert (site.nodes, site.input, site.output) == (("b",), "u", "v")
    assert site.note == "subtract, 500000.0 us for 1000000.0 us"
    assert [(c.technique, c.strength, c.chosen) for c in site.candidates] == [
        ("subtract", 1.0, True),
        ("multiply", 2.0, False),
        (AS_IS, 0.0, False),
    ]


@pytest.mark.parametrize(("margin", "taken"), [(0.09, True), (0.11, False)])
def test_the_margin_is_a_share_of_the_sites_own_time(margin: float, taken: bool) -> None:
    costs = Priced({"Relu": 100.0, "Sub": 0.9, "Mul": 2.0})
    found, _ = ops_after(ByTwice(margin=margin), costs)
    assert ("Sub" in found) == taken


def test_measured_times_decide_where_asked_for() -> None:
    costs = Priced({"Sub": 0.5, "Mul": 2.0}, {"Sub": 2.0, "Mul": 0.5})
    assert ops_after(ByTwice(), costs)[0][1] == "Sub"
    assert ops_after(ByTwice(select="measured"), costs)[0][1] == "Mul"


def test_always_takes_the_fastest_other_formulation_though_slower() -> None:
    found, result = ops_after(ByTwice(select="always"), Priced({"Sub": 3.0, "Mul": 2.0}))
    assert found[1:3] == ["Mul", "Mul"]
    assert "2000000.0 us for 1000000.0 us" in result.applied[0].note


@pytest.mark.parametrize(("tolerance", "expected"), [(None, "Mul"), (1e-5, "Mul"), (1e-7, "Sub")])
def test_an_error_bound_must_fit_the_steps_tolerance(tolerance: float | None, expected: str) -> None:
    given = None if tolerance is None else Tolerance(relative_l2=tolerance)
    step = ByTwice(bound=1e-6, tolerance=given)
    assert ops_after(step, Priced({"Sub": 0.8, "Mul": 0.5}))[0][1] == expected


def test_an_exact_step_takes_nothing_beyond_float_reordering() -> None:
    assert ops_after(ByTwice(bound=1e-2), Priced({"Sub": 0.8, "Mul": 0.5}))[0][1] == "Sub"


def test_a_site_is_skipped_where_all_formulations_err_too_much() -> None:
    class Erring(ByTwice):
        def formulations(self, node: ir.Node, view: View) -> Sequence[Formulation] | Skip:
            return [Formulation("multiply", 0.5, as_product)] if node.op_type == "Neg" else ()

    _, result = ops_after(Erring(), Priced({"Mul": 0.1}))
    assert [skip.reason for skip in result.skipped] == 2 * ["`multiply` may err by 0.5, more than the 0.0001 allowed"]


def test_only_and_skip_hold() -> None:
    step = ByTwice.model_validate({"only": ["b"]})
    found, result = ops_after(step, Priced({"Sub": 0.5}))
    assert found == ["Relu", "Sub", "Neg", "Relu"]
    assert [(skip.node, skip.reason) for skip in result.skipped] == [("c", "not named by `only`")]


def test_a_pass_may_refuse_a_node() -> None:
    text = CHAIN.replace("[b]", "[refused]")
    view = view_of(ByTwice(), Priced({"Sub": 0.5}), text)
    assert Skip("refused", "is refused") in ByTwice().run(view).skipped


def test_without_prices_nothing_changes_and_sites_are_told() -> None:
    found, result = ops_after(ByTwice(), None)
    assert found == ["Relu", "Neg", "Neg", "Relu"]
    assert [(site.nodes, site.note) for site in result.applied] == [
        (("b",), "could be subtract, multiply"),
        (("c",), "could be subtract, multiply"),
    ]


def test_the_neighbourhood_ends_at_linear_ops() -> None:
    model, _ = driver.model_of(
        """agraph (float[4,4] x) => (float[4,4] y) <float[4,4] W> {
        [far] a = MatMul (x, W)
        [near] b = MatMul (a, W)
        [act] c = Relu (b)
        [site] d = Neg (c)
        [next] e = MatMul (d, W)
        [last] y = Relu (e)
    }"""
    )
    assert lowering.around(graph.node_named(model.graph, "site")) == ["near", "act", "site", "next"]


def test_the_neighbourhood_is_at_most_four_nodes_far() -> None:
    lines = "\n".join(f"[n{i}] v{i + 1} = Relu (v{i})" for i in range(11))
    model, _ = driver.model_of(f"agraph (float[4] v0) => (float[4] v11) {{ {lines} }}")
    assert lowering.around(graph.node_named(model.graph, "n5")) == [f"n{i}" for i in range(1, 10)]


def test_later_sites_are_decided_on_the_graph_as_it_then_is() -> None:
    costs = Priced({"Sub": 0.5})
    ops_after(ByTwice(), costs)
    assert costs.parts == [["a", "b", "c", "d"], ["a", "b_sub", "c", "d"]]


# ---------------------------------------------------------------------------------------------- decisions


def test_decisions_are_kept_by_step_and_site() -> None:
    decisions = Decisions()
    ops_after(ByTwice(), Priced({"Sub": 0.5}), decisions)
    assert decisions.made == {"01-by-twice/b": "subtract", "01-by-twice/c": "subtract"}


def test_locked_decisions_are_repeated_without_a_price() -> None:
    decisions = Decisions({"01-by-twice/b": "multiply", "01-by-twice/c": AS_IS})
    costs = Priced({"Sub": 0.5})
    found, result = ops_after(ByTwice(), costs, decisions)
    assert found == ["Relu", "Mul", "Neg", "Relu"]
    assert costs.parts == []
    assert (result.applied[0].note, result.skipped[0].reason) == ("multiply, as locked", "left alone, as locked")
    decisions.finish()


def test_a_site_that_the_lock_does_not_know_is_refused() -> None:
    with pytest.raises(PassError, match="no decision for `01-by-twice/b`"):
        ops_after(ByTwice(), Priced({}), Decisions({"01-by-twice/c": AS_IS}))


def test_a_locked_formulation_that_does_not_fit_is_refused() -> None:
    with pytest.raises(PassError, match="the decision `divide` is none that fits node `b`"):
        ops_after(ByTwice(), Priced({}), Decisions({"01-by-twice/b": "divide"}))


def test_a_lock_of_more_than_the_compile_asks_for_is_refused() -> None:
    decisions = Decisions({"01-by-twice/z": "multiply"})
    with pytest.raises(PassError, match="the lock decides `01-by-twice/z`, which this compile does not ask for"):
        decisions.finish()
