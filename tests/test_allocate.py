"""One budget over several techniques: the joint cost is the real one, the budget holds, what was weighed is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import builders
import driver
import numpy as np
import pytest
from builders import Net
from calibrated import calibration, feeds, set_weight, weight

from ccompile import graph, registry, spec
from ccompile.analysis import linear
from ccompile.core import Choice, Site, View
from ccompile.errors import PassError, SpecError
from ccompile.joint import JointCost
from ccompile.moments import Layer, Moments
from ccompile.passes.allocate import Allocate
from ccompile.splitting import Split
from ccompile.stats import Calibration
from ccompile.target import load_target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

    from ccompile.evidence import SiteRecord

ALL = ["prune-channels", "split-svd", "split-spatial", "split-tucker"]
SHARED = ["prune-channels", "split-separable", "split-basis"]  # both stages shrink with the inputs
CP = ["prune-channels", {"split-cp": {"way": 3, "only": ["c2"]}}]  # few parameters, but many before a stride
NEWER: list[Any] = [{"split-cp": {"only": ["c2"]}}, "split-separable", "split-basis", "split-svd"]
LOOSE = {"tolerance": {"relative_l2": 1e9}}


def chain(seed: int = 0) -> ir.Model:
    """x[N, 8, 9, 7] through three convolutions, the second at stride 2, and a classifier."""
    net = Net(seed)
    x = net.input("x", ["N", 8, 9, 7])
    x = net.node("Relu", net.conv(x, "c1", (12, 8, 3, 3), pad=1))
    x = net.node("Relu", net.conv(x, "c2", (16, 12, 3, 3), stride=2, pad=1))
    x = net.node("Relu", net.conv(x, "c3", (12, 16, 3, 3), pad=1))
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    return net.model(net.dense(x, "fc", 12, 5))


def bench_of(model: ir.Model) -> driver.Bench:
    run = driver.bench(model, feeds(model, seed=6))
    spec_ = replace(run.request.spec, target=load_target("generic-cpu", Path()))
    run.request = replace(run.request, spec=spec_)
    run.origin = run.state = run._state(model, run.state.outputs)
    run.statistics = calibration(model, feeds(model, (40, 40, 40, 40)))
    return run


def allocated(
    model: ir.Model, budget: dict[str, float], among: list[Any] | None = None, **options: Any
) -> driver.Bench:
    run = bench_of(model)
    run.step(0, Allocate.model_validate({"budget": budget, "among": among or ALL, **LOOSE, **options}))
    assert run.record.verdict == "kept", run.record.reason
    return run


def share(run: driver.Bench, what: str) -> float:
    now, source = run.price(run.model).report, run.origin.cost.report
    return float(getattr(now, what) / getattr(source, what))


def chosen_impact(run: driver.Bench) -> float:
    """The sum of what the chosen candidates do to the outputs."""
    weighed = {site.candidates for site in run.record.applied} | {skip.candidates for skip in run.record.skipped}
    return sum(c.impact or 0.0 for candidates in weighed for c in candidates if c.chosen)


@pytest.mark.parametrize("what", ["macs", "params", "stored_bytes", "seconds"])
def test_a_budget_holds_on_the_real_graph(what: str) -> None:
    run = allocated(chain(), {what: 0.8})
    assert 0.5 < share(run, what) <= 0.8 + 1e-9
    assert run.record.applied


def planted() -> ir.Model:
    """The chain, with half of c1's channels dead and a c3 that is a column times a row of taps."""
    model, rng = chain(), np.random.default_rng(3)
    for index in (1, 2):
        array = weight(model, "c1", index)
        array[::2] = 0
        set_weight(model, "c1", array, index)
    set_weight(model, "c3", np.einsum("orj,rci->ocij", *(rng.standard_normal(s) for s in ((12, 2, 3), (2, 16, 3)))))
    return model


def test_planted_structure_is_found_by_the_technique_that_it_fits_and_costs_nothing() -> None:
    run = allocated(planted(), {"macs": 0.45}, ["prune-channels", "split-spatial"])
    notes = {site.nodes[0].split("/")[0]: site.note for site in run.record.applied}
    assert notes["c1"].startswith("prune-channels: 6 of 12 units kept")
    assert notes["c3"].startswith("split-spatial")
    assert run.record.against_source is not None
    assert run.record.against_source.outputs[0].relative_l2 == pytest.approx(0, abs=2e-5)


def test_a_cut_says_what_its_error_is_a_share_of() -> None:
    run = allocated(chain(), {"macs": 0.5}, [{"prune-channels": {"criterion": "l1"}}])
    notes = [site.note for site in run.record.applied]
    assert notes
    assert all(note.startswith("prune-channels: ") and "units kept, share of l1 lost" in note for note in notes)


def test_newer_splits_share_a_budget() -> None:
    run = allocated(chain(), {"macs": 0.6}, NEWER)
    assert 0.4 < share(run, "macs") <= 0.6
    assert {site.note.split(":")[0] for site in run.record.applied} <= {"split-cp", *NEWER[1:]}
    weighed = {c.technique for site in run.record.applied for c in site.candidates}
    assert {"split-cp", "split-separable"} <= weighed


def test_planted_structure_is_found_by_the_newer_split_that_it_fits() -> None:
    model, rng = chain(), np.random.default_rng(3)
    factors = (rng.standard_normal(shape) for shape in ((16, 2), (2, 12), (2, 3), (2, 3)))
    set_weight(model, "c2", np.einsum("or,rc,ri,rj->ocij", *factors))
    factors = (rng.standard_normal(shape) for shape in ((12, 16), (16, 3, 3)))
    set_weight(model, "c3", np.einsum("oc,cij->ocij", *factors))
    run = allocated(model, {"macs": 0.53}, NEWER, skip=["c1"])
    notes = {site.nodes[0].split("/")[0]: site.note for site in run.record.applied}
    assert notes["c2"].startswith("split-cp: rank 2")
    assert notes["c3"].startswith("split-separable: rank 1")


def test_a_split_whose_ranks_a_cut_leaves_no_use_for_leaves_the_layer_whole() -> None:
    among = ["prune-channels", "split-colour", {"split-biclusters": {"inputs": 2, "outputs": 2}}]
    run = bench_of(chain())
    step = Allocate.model_validate({"budget": {"macs": 0.5}, "among": among, **LOOSE})
    view = view_of(run, step)
    for site in (site for site in step.sites(view) if isinstance(site, Site)):
        member, own = step._member(site, view)
        if not isinstance(member, Split):
            continue
        was = linear.layer(graph.node_named(view.graph, site.nodes[0]))
        assert isinstance(was, Layer)
        for odd in (1, 3, 7):
            trial = graph.copy(view.model)
            node = graph.node_named(trial.graph, site.nodes[0])
            W = np.zeros((odd, odd, *was.kernel), np.float32)
            graph.replace_constant(node, 1, W)
            form = linear.layer(node)
            assert isinstance(form, Layer)
            for choice in member.choices(site, own)[1:]:
                rank = member.rank_left(choice, was, node, own)
                assert not rank or (member.has(form, rank) and not member.unfit(form))


@pytest.mark.parametrize("among", [ALL, SHARED, CP], ids=["all", "shared", "cp"])
@pytest.mark.parametrize("what", ["macs", "params"])
def test_the_joint_cost_is_that_of_the_graph_cut_and_split_so(what: str, among: list[Any]) -> None:
    run = bench_of(chain())
    step = Allocate.model_validate({"budget": {what: 0.5}, "among": among, **LOOSE})
    view = view_of(run, step)
    sites = [site for site in step.sites(view) if isinstance(site, Site)]
    curves: list[tuple[Site, Sequence[Choice]]] = [(site, step.choices(site, view)) for site in sites]
    slots = step._slots(curves, what, view)
    cost, rng = JointCost(slots, what, view), np.random.default_rng(0)
    rows = np.stack([rng.integers(0, len(slot.options), 60) for slot in slots], axis=1)
    rows[:, rng.random(len(slots)) < 0.3] = 0
    checked = 0
    for row, predicted in zip(rows, cost(rows), strict=True):
        chosen = [slot.options[index] for slot, index in zip(slots, row, strict=True)]
        real = step._priced(slots, chosen, what, view)
        # less where a cut leaves fewer channels than the rank asked for; a least Tucker split has a second rank
        least = any(option.technique == "split-tucker" and option.choice.strength == 1 for option in chosen)
        assert real <= predicted * (1.05 if least else 1 + 1e-9)
        checked += real == pytest.approx(predicted, rel=1e-6)
    assert checked >= 3


def view_of(run: driver.Bench, step: Allocate) -> View:
    made: list[View] = []
    real = Allocate.plan

    def keep(self: Allocate, curves: Any, view: View) -> Any:
        made.append(view)
        return real(self, curves, view)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Allocate, "plan", keep)
        run._attempt(0, step, 0.0, {})
    view = made[0]
    view.model = graph.copy(run.state.model)
    view.changed()
    return view


@pytest.mark.parametrize("single", ALL)
def test_no_technique_alone_is_expected_to_lose_less(single: str) -> None:
    together, alone = allocated(chain(), {"macs": 0.6}), allocated(chain(), {"macs": 0.6}, [single])
    assert chosen_impact(together) <= chosen_impact(alone) * (1 + 1e-9)


def test_the_evidence_tells_what_was_weighed_and_what_was_taken() -> None:
    run = allocated(chain(), {"macs": 0.6})
    for site in run.record.applied:
        assert one_taken(site)
    left = [skip for skip in run.record.skipped if skip.candidates]
    assert all(sum(c.chosen for c in skip.candidates) == 1 for skip in left)


def one_taken(site: SiteRecord) -> bool:
    (taken,) = [candidate for candidate in site.candidates if candidate.chosen]
    costs = [candidate.cost for candidate in site.candidates]
    return site.note.startswith(taken.technique) and costs == sorted(costs)


def test_splits_lose_less_than_the_cheaper_ones_on_the_frontier() -> None:
    run = allocated(chain(), {"macs": 0.6}, ["split-svd", "split-spatial", "split-tucker"])
    for site in run.record.applied:
        impacts = [candidate.impact or 0.0 for candidate in site.candidates]
        assert impacts == sorted(impacts, reverse=True)


def test_an_insensitive_layer_pays_first() -> None:
    net = Net(1)
    x = net.input("x", ["N", 16])
    loud, quiet = net.dense(x, "loud", 16, 16), net.dense(x, "quiet", 16, 16)
    small = net.node("Mul", quiet, net.constant(np.full(1, 1e-3, np.float32), "scale"))
    run = allocated(net.model(net.node("Add", loud, small)), {"macs": 0.8}, ["split-svd"])
    assert [site.nodes[0] for site in run.record.applied] == ["quiet/V"]


@pytest.mark.parametrize(
    ("among", "words"),
    [
        (["tidy-graph"], "cannot share a budget"),
        (["split-svt"], "there is no pass `split-svt`"),
        ([{"split-svd": {"keep": 0.5}}], "takes no `keep`"),
        ([{"split-svd": {"rnak": 5}}], "rnak"),
        ([{"split-svd": {"layers": {"a": 0.5}}}], "takes no `layers`"),
        (["split-svd", "split-svd"], "twice"),
    ],
)
def test_what_cannot_be_allocated_is_refused_when_the_spec_is_read(among: list[Any], words: str) -> None:
    text = f"version: 1\npasses:\n  - allocate: {{budget: {{macs: 0.5}}, among: {among}, tolerance: {{argmax: 0.5}}}}\n"
    with pytest.raises(SpecError, match=r"spec\.yaml:3") as caught:
        spec.parse(text, "spec.yaml")
    assert words in str(caught.value)


def test_options_of_a_technique_are_its_own() -> None:
    run = allocated(chain(), {"macs": 0.7}, [{"split-svd": {"only": ["c3"]}}, "split-spatial"])
    svd = [site for site in run.record.applied if site.note.startswith("split-svd")]
    assert {site.nodes[0].split("/")[0] for site in svd} <= {"c3"}


def test_only_and_skip_hold_for_all_techniques() -> None:
    run = allocated(chain(), {"macs": 0.8}, None, skip=["c2"])
    assert not any(name.startswith("c2") for site in run.record.applied for name in site.nodes)


def test_without_calibration_data_the_remedy_is_named() -> None:
    run = bench_of(chain())
    run.statistics = None
    with pytest.raises(PassError, match="calibration"):
        run.step(0, Allocate.model_validate({"budget": {"macs": 0.5}, "among": ALL, **LOOSE}))


def test_a_budget_out_of_reach_is_an_error_with_a_remedy() -> None:
    run = bench_of(chain())
    with pytest.raises(PassError, match="cannot be met"):
        run.step(0, Allocate.model_validate({"budget": {"macs": 0.001}, "among": ["split-svd"], **LOOSE}))


def test_a_step_that_breaks_is_weakened() -> None:
    run = bench_of(chain())
    asked = allocated(chain(), {"macs": 0.3}).record.against_previous
    assert asked is not None
    limit = 0.7 * (asked.outputs[0].relative_l2 or 0.0)
    step = {"budget": {"macs": 0.3}, "among": ALL, "tolerance": {"relative_l2": limit}, "on_violation": "weaken"}
    run.step(0, Allocate.model_validate(step))
    assert run.record.verdict == "weakened", run.record.reason
    assert share(run, "macs") < 1


def test_equal_input_gives_equal_bytes() -> None:
    first, second = (driver.proto_of(allocated(chain(), {"macs": 0.6}).model).SerializeToString() for _ in range(2))
    assert first == second


def test_without_calibration_data_the_step_itself_says_so() -> None:
    run = bench_of(chain())
    run.statistics = None
    with pytest.raises(PassError, match=r"(?s)allocate fits to calibration data.*Give `data.calibration`\.$"):
        run.step(0, Allocate.model_validate({"budget": {"macs": 0.6}, "among": ["split-svd"], **LOOSE}))


def test_techniques_share_what_they_observe(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    observe = Calibration.moments

    def counted(self: Calibration, model: ir.Model, layers: Sequence[Layer]) -> Mapping[str, Moments]:
        seen.extend(layer.name for layer in layers)
        return observe(self, model, layers)

    monkeypatch.setattr(Calibration, "moments", counted)
    allocated(chain(), {"macs": 0.6})
    assert sorted(seen) == ["c1", "c2", "c3", "fc"]


def test_members_are_found_by_name() -> None:
    step = Allocate.model_validate({"budget": {"macs": 0.5}, "among": ALL, **LOOSE})
    assert [member.pass_name() for member in step.members(registry.find)] == ALL
    assert builders.ZOO


# ---------------------------------------------------------------------------------------------- coded weights

CODED: list[Any] = ["cluster-weights", {"quantize-weights": {"scope": "tensor"}}, {"cluster-vectors": {"size": 2}}]


@pytest.mark.parametrize("share", [0.5, 0.25, 0.15])
@pytest.mark.parametrize("among", [CODED, ["prune-channels", "cluster-weights"], ["split-svd", "cluster-weights"]])
def test_a_budget_of_bytes_is_shared_with_what_codes_weights(among: list[Any], share: float) -> None:
    run = bench_of(chain())
    run.step(0, member_of(among, {"stored_bytes": share}))
    bytes_now = run.price(run.model).report.stored_bytes
    assert bytes_now <= share * run.origin.cost.report.stored_bytes
    assert any("bit" in site.note or "levels" in site.note for site in run.record.applied)


def test_layers_get_bits_as_they_need_them() -> None:
    """A layer whose outputs hardly count is coded in fewer bits than the one that they come from."""
    net = Net(0)
    x = net.input("x", ["N", 48])
    quiet = net.node("Mul", net.dense(x, "quiet", 48, 48), net.constant(np.full(1, 1e-3, np.float32), "scale"))
    run = bench_of(net.model(net.node("Add", net.dense(x, "loud", 48, 48), quiet)))
    run.step(0, member_of(["cluster-weights"], {"stored_bytes": 0.2}))
    levels = {site.nodes[0]: int(site.note.split()[1]) for site in run.record.applied}
    assert levels["quiet"] < levels["loud"]


def member_of(among: list[Any], budget: dict[str, float]) -> Allocate:
    return Allocate.model_validate({"budget": budget, "among": among, **LOOSE})


@pytest.mark.parametrize("name", ["cluster-weights", "quantize-weights", "cluster-vectors"])
def test_codes_buy_no_multiply_adds(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` spends `stored_bytes`"):
        Allocate(budget={"macs": 0.5}, among=(name,)).members(lambda name: registry.passes()[name])
