from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import builders
import numpy as np
import onnx_ir as ir
import pytest

from ccompile import graph, runtime
from ccompile.core import Site
from ccompile.runtime import Settings
from ccompile.sites import SiteError, blame, site_errors
from ccompile.tolerance import OutputComparison, Tolerance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ccompile.core import Array

ONE = Settings(threads=1)


def chain(layers: int, width: int = 6, seed: int = 0) -> ir.Model:
    net = builders.Net(seed)
    x = net.input("x", ["N", width])
    for index in range(layers):
        x = net.node("Tanh", net.dense(x, f"fc{index}", width, width), name=f"act{index}")
    return net.model(x)


def shifted(model: ir.Model, layer: int, amount: float) -> ir.Model:
    twin = graph.copy(model)
    node = graph.node_named(twin.graph, f"fc{layer}")
    bias = graph.constant(node.inputs[2])
    assert bias is not None
    graph.replace_constant(node, 2, (bias + np.float32(amount)).astype(np.float32))
    return twin


SITES = [Site((f"act{index}",), output=f"act{index}_out") for index in range(8)]
FEEDS: list[dict[str, Any]] = [
    {"x": np.random.default_rng(seed).standard_normal((4, 6)).astype(np.float32)} for seed in range(2)
]


def far(output: OutputComparison) -> bool:
    return bool(output.violations(Tolerance(relative_l2=1e-4)))


@pytest.mark.parametrize("guilty", range(8))
def test_blame_finds_the_first_layer_that_moves(guilty: int) -> None:
    model = chain(8)
    found = blame(model, shifted(model, guilty, 0.5), SITES[::-1], lambda: FEEDS, far, ONE)
    assert found is not None
    assert found.site.nodes == (f"act{guilty}",)
    assert found.searched == guilty + 1


def test_blame_finds_nobody_where_nothing_moved() -> None:
    model = chain(8)
    assert blame(model, graph.copy(model), SITES, lambda: FEEDS, far, ONE) is None


def test_blame_without_inputs_finds_nobody() -> None:
    model = chain(8)
    assert blame(model, shifted(model, 0, 0.5), SITES, lambda: [], far, ONE) is None


def test_blame_sees_a_fault_in_a_later_batch() -> None:
    model = chain(8)
    quiet = {"x": np.full((4, 6), np.nan, np.float32)}
    found = blame(model, shifted(model, 3, 0.5), SITES, lambda: [quiet, FEEDS[0]], far, ONE)
    assert found is not None
    assert found.site.nodes == ("act3",)


def test_blame_holds_a_bounded_group_at_a_time_and_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    model, opened = chain(8), []

    class Counted(runtime.Session):
        def __init__(self, model: ir.Model, settings: Settings, observed: Sequence[str] = ()) -> None:
            opened.append(list(observed))
            super().__init__(model, settings, observed)

    monkeypatch.setattr(runtime, "Session", Counted)
    monkeypatch.setattr("ccompile.sites.HELD_BYTES", 2 * 4 * 6 * 4)
    found = blame(model, shifted(model, 3, 0.5), SITES, lambda: FEEDS, far, ONE)
    assert found is not None
    assert found.searched == 4
    groups = [names for names in opened if names]
    assert groups == [["act0_out", "act1_out"]] * 2 + [["act2_out", "act3_out"]] * 2


def test_blame_passes_over_values_that_one_graph_lacks() -> None:
    model = chain(3)
    sites = [Site(("gone",), output="gone_out"), Site(("act1",), output="act1_out")]
    found = blame(model, shifted(model, 0, 0.5), sites, lambda: FEEDS, far, ONE)
    assert found is not None
    assert found.site.nodes == ("act1",)


def bfloat16_inside() -> ir.Model:
    net = builders.Net(0)
    x = net.node("Cast", net.input("x", ["N", 6]), name="narrow", to=ir.DataType.BFLOAT16)
    return net.model(net.node("Cast", x, name="wide", to=ir.DataType.FLOAT))


def test_blame_passes_over_values_that_numpy_cannot_hold() -> None:
    model = bfloat16_inside()
    sites = [Site(("narrow",), output="narrow_out"), Site(("wide",), output="wide_out")]
    found = blame(model, model, sites, lambda: FEEDS, lambda output: True, ONE)
    assert found is not None
    assert found.site.nodes == ("wide",)


def gemm_site(amount: float, bound: float) -> SiteError:
    """fc1 of two layers, its bias shifted: |dy| = amount * sqrt(elements)."""
    model = chain(2)
    site = Site(("fc1",), input="act0_out", output="fc1_out", bound=bound)
    (found,), _ = site_errors(model, shifted(model, 1, amount), [site], FEEDS[0], ONE)
    return found


def test_the_error_of_a_site_is_what_the_hand_computes() -> None:
    model = chain(2)
    seen = runtime.Session(model, ONE, ["act0_out", "fc1_out"]).run(FEEDS[0])
    found = gemm_site(0.5, 1)
    assert found.gain == pytest.approx(0.5 * math.sqrt(24) / np.linalg.norm(seen["act0_out"]), rel=1e-4)
    assert found.relative == pytest.approx(0.5 * math.sqrt(24) / np.linalg.norm(seen["fc1_out"]), rel=1e-4)


def test_a_site_is_measured_on_the_previous_input() -> None:
    model = chain(2)
    both = shifted(shifted(model, 0, 3.0), 1, 0.5)
    site = Site(("fc1",), input="act0_out", output="fc1_out", bound=1)
    (found,), _ = site_errors(model, both, [site], FEEDS[0], ONE)
    assert found.gain == pytest.approx(gemm_site(0.5, 1).gain, rel=1e-6)


def test_a_bound_that_is_too_small_is_broken() -> None:
    gain = gemm_site(0.5, 1).gain
    assert gemm_site(0.5, 1.01 * gain).holds
    assert not gemm_site(0.5, 0.99 * gain).holds


def test_an_unchanged_site_holds_a_bound_of_zero() -> None:
    assert gemm_site(0.0, 0.0).holds


def test_rounding_of_large_weights_is_no_broken_bound() -> None:
    large = SiteError(Site(("a",), bound=0.0), gain=1e-3, relative=2e-7)
    assert large.holds
    assert not replace(large, relative=1e-3).holds


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_low_rank_layer_in_two_factors_holds_its_bound_at_any_scale(scale: float) -> None:
    rng = np.random.default_rng(0)
    A, B = (rng.standard_normal(shape).astype(np.float32) for shape in ((32, 2), (2, 32)))
    A *= np.float32(scale)

    def product(*factors: Array) -> ir.Model:
        net = builders.Net()
        y = net.input("x", ["N", 32])
        for index, factor in enumerate(factors, start=3 - len(factors)):
            y = net.node("MatMul", y, net.constant(factor), name=f"m{index}")
        return net.model(y)

    feeds = {"x": rng.standard_normal((4, 32)).astype(np.float32)}
    site = Site(("m1", "m2"), input="x", output="m2_out", bound=0.0)
    (found,), _ = site_errors(product(A @ B), product(A, B), [site], feeds, ONE)
    assert found.gain > 0
    assert found.holds


def test_something_out_of_nothing_is_infinitely_far() -> None:
    model = chain(2)
    site = Site(("fc0",), input="x", output="fc0_out", bound=5.0)
    silent = {"x": np.zeros((4, 6), np.float32)}
    (found,), _ = site_errors(model, shifted(model, 0, 0.5), [site], silent, ONE)
    assert found.gain == math.inf
    assert not found.holds


def test_sites_that_cannot_be_measured_say_why() -> None:
    net = builders.Net(0)
    x = net.input("x", ["N", 6])
    a, b = net.node("Relu", x, name="a"), net.node("Neg", x, name="b")
    model = net.model(net.node("Add", a, b, name="sum"))
    measured = [Site(("b",), input="x", output="b_out")]
    left_out = {
        Site(("sum",), input="a_out", output="sum_out"): "its nodes read `b_out` as well",
        Site(("a",), output="a_out"): "the site names no input",
        Site(("a",), input="x"): "the site names no output",
        Site(("a",), input="elsewhere", output="a_out"): "the graph before the step has no value `elsewhere`",
        Site(("gone",), input="x", output="a_out"): "its nodes do not make `a_out`",
    }
    found, missing = site_errors(model, model, [*left_out, *measured], FEEDS[0], ONE)
    assert [error.site for error in found] == measured
    assert missing == left_out


def test_a_site_of_a_type_that_numpy_lacks_says_so() -> None:
    model = bfloat16_inside()
    site = Site(("wide",), input="narrow_out", output="wide_out", bound=0.0)
    assert site_errors(model, model, [site], FEEDS[0], ONE) == (
        [],
        {site: "numpy lacks the type of its input or output"},
    )


def test_sites_are_measured_group_by_group(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(4)
    sites = [Site((f"act{k}",), input=f"fc{k}_out", output=f"act{k}_out", bound=0.0) for k in range(4)]
    monkeypatch.setattr("ccompile.sites.HELD_BYTES", 1)
    found, missing = site_errors(model, model, sites, FEEDS[0], ONE)
    assert missing == {}
    assert [error.site for error in found] == sites
    assert all(error.holds for error in found)
