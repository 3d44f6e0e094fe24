from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import builders
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

from ccompile import graph, onnx_io, registry, runtime, spec
from ccompile.core import Kind, PassResult, Rewrite, Site, View
from ccompile.errors import CcompileError, ContractError, DataError, ModelError, PassError, SpecError
from ccompile.evidence import Evidence
from ccompile.pipeline import compile_model
from ccompile.request import Request
from ccompile.runtime import Settings, Timing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ccompile.core import Array

SMALL: dict[str, Any] = {"verification": {"synthetic": {}, "samples": 8}}


def request_for(
    folder: Path, model: ir.Model | onnx.ModelProto, passes: list[Any], data: Any = None, **more: Any
) -> Request:
    """Write model.onnx and spec.yaml; `more` are other keys of the spec, or options of Request."""
    options = {key: more.pop(key) for key in ("dump", "seed") if key in more}
    if isinstance(model, ir.Model):
        onnx_io.save(model, folder / "model.onnx")
    else:
        onnx.save(model, folder / "model.onnx")
    text = yaml.safe_dump({"version": 1, "passes": passes, "data": data or SMALL, **more})
    (folder / "spec.yaml").write_text(text)
    return Request(folder / "model.onnx", spec.load(folder / "spec.yaml"), folder / "out.onnx", threads=1, **options)


def run(folder: Path, model: ir.Model | onnx.ModelProto, passes: list[Any], data: Any = None, **more: Any) -> Evidence:
    return compile_model(request_for(folder, model, passes, data, **more))


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"model.onnx", "spec.yaml"}


def failed_without_output(evidence: Evidence, folder: Path) -> bool:
    assert evidence.verdict == "failed"
    assert evidence.output is None
    return written(folder) == {"out.onnx.evidence.json"}


def plant(
    monkeypatch: pytest.MonkeyPatch,
    edit: Callable[[View], PassResult | None],
    kind: Kind = "exact",
    name: str = "planted",
) -> None:
    """Register a pass that does `edit`; without a result of its own it claims to have acted on every node."""

    class Planted(Rewrite):
        @classmethod
        def pass_name(cls) -> str:
            return name

        def run(self, view: View) -> PassResult:
            sites = tuple(Site((str(n.name),), output=str(n.outputs[0].name)) for n in view.graph)
            return edit(view) or PassResult(sites)

    promised: Kind = kind
    Planted.kind = promised
    known = {**registry.passes(), name: Planted}
    monkeypatch.setattr(registry, "passes", lambda: known)


def shift_bias(view: View, name: str, amount: float) -> None:
    node = graph.node_named(view.graph, name)
    bias = graph.constant(node.inputs[2])
    assert bias is not None
    graph.replace_constant(node, 2, (bias + np.float32(amount)).astype(np.float32))


def labelled(folder: Path, model: ir.Model, samples: int = 64) -> dict[str, Any]:
    """Write inputs whose labels are the model's own answers, so that the source scores 1."""
    x = np.random.default_rng(3).standard_normal((samples, 12)).astype(np.float32)
    y = runtime.Session(model, Settings(1)).run({"x": x})["fc3_out"]
    np.savez(folder / "data.npz", x=x, label=y.argmax(1))
    return {"verification": {"npz": "data.npz", "labels": "label"}}


def svd(**options: Any) -> dict[str, dict[str, Any]]:
    """A step that changes outputs and needs no calibration data."""
    return {"split-svd": {"statistics": "weights", **options}}


# ---------------------------------------------------------------------------------------------- contracts


@pytest.mark.parametrize(
    "tolerance", [{"relative_l2": 1e-9}, {"atol": 1e-9}, {"cosine": 1}, {"rtol": 0.01}, {"atol": 0, "cosine": 0.999999}]
)
def test_a_broken_contract_writes_nothing_and_its_advice_passes(tmp_path: Path, tolerance: dict[str, float]) -> None:
    step: dict[str, Any] = {"statistics": "weights", "rank": 3, "only": ["fc1"], "tolerance": tolerance}
    evidence = run(tmp_path, builders.mlp(0), [{"split-svd": step}])
    assert failed_without_output(evidence, tmp_path)
    assert "output `fc3_out` left its tolerance" in evidence.reason
    assert "First site to leave it: fc1/V, fc1/U" in evidence.reason
    advice = re.search(r"Give the step `tolerance: (\{.*\})`", evidence.reason)
    assert advice is not None
    step["tolerance"] = yaml.safe_load(advice.group(1))
    assert step["tolerance"].keys() >= tolerance.keys()
    assert run(tmp_path, builders.mlp(0), [{"split-svd": step}]).verdict == "ok"


def test_a_held_contract_writes_the_model(tmp_path: Path) -> None:
    evidence = run(tmp_path, builders.mlp(0), [svd(rank=3, tolerance={"relative_l2": 10})])
    assert evidence.verdict == "ok"
    assert written(tmp_path) == {"out.onnx", "out.onnx.evidence.json"}
    assert [step.verdict for step in evidence.steps] == ["kept"]


def test_an_output_that_is_empty_on_every_sample_cannot_be_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = builders.Net(0)
    x = net.input("x", ["N", 6])
    found = net.node("NonZero", net.node("Mul", x, net.constant(np.zeros(6, np.float32)), name="mask"), name="where")
    model = net.model(net.dense(x, "fc", 6, 3), found)
    plant(monkeypatch, lambda view: None)
    evidence = run(tmp_path, model, ["planted"])
    assert failed_without_output(evidence, tmp_path)
    said = "output `where_out` cannot be judged: it is empty on all 8 samples; real verification data may fill it"
    assert said in evidence.reason
    assert "First site" not in evidence.reason


@pytest.mark.parametrize("seed", [{}, {"seed": 1.0}])
def test_a_source_that_is_random_is_refused_by_node(tmp_path: Path, seed: dict[str, Any]) -> None:
    net = builders.Net(0)
    x = net.input("x", ["N", 6])
    noise = net.node("RandomNormalLike", x, name="noise", **seed)
    model = net.model(net.dense(net.node("Add", x, noise, name="add"), "fc", 6, 3))
    with pytest.raises(ModelError, match="differs from run to run") as caught:
        run(tmp_path, model, ["fold-batchnorm"])
    assert "`noise` (RandomNormalLike)" in str(caught.value)
    assert written(tmp_path) == set()


def test_an_output_that_the_inputs_do_not_reach_is_noted(tmp_path: Path) -> None:
    net = builders.Net(0)
    x = net.input("x", ["N", 6])
    silent = net.node("Mul", x, net.constant(np.zeros(6, np.float32)), name="silent")
    evidence = run(tmp_path, net.model(net.dense(x, "fc", 6, 3), silent), ["fold-batchnorm"])
    assert evidence.verdict == "ok"
    assert [note for note in evidence.notes if "proves little" in note] == [
        "output `silent_out` is the same on all samples: it proves little"
    ]


def test_outputs_that_are_nan_on_every_sample_cannot_be_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = builders.Net(0)
    broken = net.node("Mul", net.input("x", ["N", 6]), net.constant(np.full(6, np.nan, np.float32)), name="broken")
    model = net.model(net.dense(broken, "fc", 6, 3))
    plant(monkeypatch, lambda view: shift_bias(view, "fc", 1))
    evidence = run(tmp_path, model, ["planted"])
    assert failed_without_output(evidence, tmp_path)
    assert "output `fc_out` cannot be judged: nothing finite was compared" in evidence.reason


def test_steps_after_a_failure_do_not_run(tmp_path: Path) -> None:
    step = svd(rank=1, tolerance={"relative_l2": 1e-9})
    assert len(run(tmp_path, builders.mlp(0), [step, "tidy-graph"]).steps) == 1


def test_a_reverted_step_leaves_the_graph_and_the_rest_goes_on(tmp_path: Path) -> None:
    bad = svd(rank=1, tolerance={"relative_l2": 1e-9}, on_violation="revert")
    good = svd(rank=4, only=["fc2"], tolerance={"relative_l2": 10})
    evidence = run(tmp_path, builders.mlp(0), [bad, good])
    assert evidence.verdict == "ok"
    assert [step.verdict for step in evidence.steps] == ["reverted", "kept"]
    names = [node.name for node in onnx.load(tmp_path / "out.onnx").graph.node]
    assert names == ["fc1", "relu1", "fc2/V", "fc2/U", "relu3", "fc3"]


def test_a_bug_in_an_exact_pass_is_caught_and_blamed_on_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, lambda view: shift_bias(view, "fc2", 0.05))
    evidence = run(tmp_path, builders.mlp(0), ["planted"])
    assert failed_without_output(evidence, tmp_path)
    assert "is more than float reordering away" in evidence.reason
    assert "First site to leave it: fc2 (" in evidence.reason
    assert "Give the step" not in evidence.reason


def test_an_exact_pass_that_reorders_floats_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda view: shift_bias(view, "fc2", 1e-7))
    assert run(tmp_path, builders.mlp(0), ["planted"]).verdict == "ok"


def test_a_stricter_tolerance_on_an_exact_pass_is_named_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, lambda view: shift_bias(view, "fc2", 1e-6))
    evidence = run(tmp_path, builders.mlp(0), [{"planted": {"tolerance": {"atol": 1e-9}}}])
    assert "output `fc3_out` left its tolerance" in evidence.reason
    assert "First site to leave it: fc2 (" in evidence.reason


def test_sites_that_name_values_of_one_graph_only_do_not_stop_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edit(view: View) -> PassResult:
        shift_bias(view, "fc2", 1)
        return PassResult((Site(("fc1",), input="gone", output="gone_too", bound=1), Site(("fc2",), output="fc2_out")))

    plant(monkeypatch, edit)
    assert "First site to leave it: fc2 (" in run(tmp_path, builders.mlp(0), ["planted"]).reason


@pytest.mark.parametrize(("bound", "verdict"), [(10.0, "ok"), (1e-3, "failed")])
def test_a_bounded_pass_is_held_to_its_own_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: float, verdict: str
) -> None:
    def edit(view: View) -> PassResult:
        shift_bias(view, "fc2", 0.5)
        return PassResult((Site(("fc2",), input="relu1_out", output="fc2_out", bound=bound),))

    plant(monkeypatch, edit, "bounded")
    evidence = run(tmp_path, builders.mlp(0), ["planted"])
    assert evidence.verdict == verdict
    assert ("site fc2 broke its own bound" in evidence.reason) == (verdict == "failed")
    assert evidence.steps[0].applied[0].measured == pytest.approx(0.5 * math.sqrt(16) / 5, rel=0.9)


def test_a_bound_that_could_not_be_measured_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def edit(view: View) -> PassResult:
        seen = Site(("fc1",), input="x", output="fc1_out", bound=1)
        return PassResult((seen, Site(("fc2",), "halved", input="gone", output="fc2_out", bound=1)))

    plant(monkeypatch, edit, "lossy")
    evidence = run(tmp_path, builders.mlp(0), [{"planted": {"tolerance": {"atol": 1}}}])
    assert evidence.verdict == "ok"
    reason = "the graph before the step has no value `gone`"
    assert [site.note for site in evidence.steps[0].applied] == ["", f"halved; bound not measured: {reason}"]
    assert f"step 1 planted: bound not measured at 1 of 2 sites, first fc2: {reason}" in evidence.notes


@pytest.mark.parametrize(
    ("site", "said"),
    [
        (Site(("fc2",), input="relu1_out", output="fc2_out"), "site fc2 states no bound"),
        (
            Site(("fc2",), input="gone", output="fc2_out", bound=1),
            "the bound of site fc2 could not be measured: the gr",
        ),
    ],
)
def test_a_bounded_pass_owes_a_measured_bound_at_every_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: Site, said: str
) -> None:
    plant(monkeypatch, lambda view: PassResult((site,)), "bounded")
    evidence = run(tmp_path, builders.mlp(0), ["planted"])
    assert failed_without_output(evidence, tmp_path)
    assert said in evidence.reason


def test_a_bound_is_measured_on_all_samples_of_the_first_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def edit(view: View) -> PassResult:
        shift_bias(view, "fc1", 1)
        return PassResult((Site(("fc1",), input="x", output="fc1_out", bound=10),))

    x = np.ones((4, 12), np.float32) * np.array([[10], [0], [0], [0]], np.float32)
    np.savez(tmp_path / "v.npz", x=x)
    plant(monkeypatch, edit, "bounded")
    (site,) = run(tmp_path, builders.mlp(0), ["planted"], {"verification": {"npz": "v.npz"}}).steps[0].applied
    assert site.measured == pytest.approx(math.sqrt(4 * 24) / math.sqrt(12 * 100), rel=1e-5)


# ---------------------------------------------------------------------------------------------- broken graphs


def change_output(view: View) -> None:
    view.graph.outputs[0].name = "renamed"


def bogus_attribute(view: View) -> None:
    graph.node_named(view.graph, "fc1").attributes["bogus"] = ir.AttrInt64("bogus", 1)


def dangling_value(view: View) -> None:
    view.graph.remove(graph.node_named(view.graph, "relu1"))


def unknown_op(view: View) -> None:
    node = graph.node_named(view.graph, "relu1")
    node.op_type, node.domain = "Wonder", "com.acme"
    view.graph.opset_imports["com.acme"] = 1


def make_nan(view: View) -> None:
    shift_bias(view, "fc2", math.nan)


def other_shape(view: View) -> None:
    node = graph.node_named(view.graph, "fc1")
    W = graph.constant(node.inputs[1])
    assert W is not None
    graph.replace_constant(node, 1, W[:-1])


@pytest.mark.parametrize("kind", ["exact", "lossy"])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change_output, "inputs or outputs are not what they were"),
        (bogus_attribute, "ONNX's checker refuses the graph"),
        (dangling_value, "ONNX's checker refuses the graph"),
        (unknown_op, "ONNX Runtime refuses the model"),
        (make_nan, "NaN or infinity on one side only"),
        (other_shape, "ONNX Runtime|checker"),
    ],
)
def test_what_breaks_the_graph_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: Callable[[View], None], message: str, kind: Kind
) -> None:
    plant(monkeypatch, lambda view: edit(view), kind)
    evidence = run(tmp_path, builders.mlp(0), [{"planted": {"tolerance": {"atol": 1e9}}}])
    assert failed_without_output(evidence, tmp_path)
    assert re.search(message, evidence.reason)


@pytest.mark.parametrize("edit", [change_output, unknown_op, make_nan])
def test_a_step_that_breaks_the_graph_can_be_reverted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: Callable[[View], None]
) -> None:
    plant(monkeypatch, lambda view: edit(view))
    evidence = run(tmp_path, builders.mlp(0), [{"planted": {"on_violation": "revert"}}, "tidy-graph"])
    assert [step.verdict for step in evidence.steps] == ["reverted", "kept"]
    assert evidence.verdict == "ok"


@pytest.mark.parametrize("read", [graph.constant, lambda value: value.const_value.numpy()])
def test_a_pass_that_writes_into_a_weight_is_a_bug_and_never_a_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Any], Array]
) -> None:
    def edit(view: View) -> None:
        read(graph.node_named(view.graph, "fc1").inputs[1])[...] = 0

    plant(monkeypatch, edit)
    with pytest.raises(ValueError, match="read-only"):
        run(tmp_path, builders.mlp(0), ["planted"])
    assert written(tmp_path) == set()


def test_a_step_that_applies_nothing_is_kept_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    evidence = run(tmp_path, builders.mlp(0), ["fold-batchnorm"])
    (step,) = evidence.steps
    assert (step.verdict, step.applied) == ("kept", ())
    before, after = onnx.load(tmp_path / "model.onnx"), onnx.load(tmp_path / "out.onnx")
    assert len(after.metadata_props) > 0
    del after.metadata_props[:]
    for proto in (before, after):  # its order follows that of the initializers in the file
        proto.graph.value_info.sort(key=lambda value: value.name)
    assert after.SerializeToString(deterministic=True) == before.SerializeToString(deterministic=True)


# ---------------------------------------------------------------------------------------------- gates

COSTS = "params nonzero macs multiplications stored_bytes resident_bytes moved_bytes peak_activation_bytes seconds"


@pytest.mark.parametrize("name", COSTS.split())
def test_each_cost_gate_holds_at_its_limit_and_breaks_below(tmp_path: Path, name: str) -> None:
    assert run(tmp_path, builders.mlp(0), ["fold-batchnorm"], gates={name: 1}).verdict == "ok"
    (tmp_path / "out.onnx").unlink()
    evidence = run(tmp_path, builders.mlp(0), ["fold-batchnorm"], gates={name: 0.999})
    assert failed_without_output(evidence, tmp_path)
    assert f"gate {name}: 1 of the source's, at most 0.999 asked" in evidence.reason


ACCURACY = [("atol", 100, 1e-9), ("rtol", 1e6, 1e-9), ("relative_l2", 100, 1e-9), ("cosine", -1, 1), ("argmax", 0, 1)]


@pytest.mark.parametrize(("name", "loose", "strict"), ACCURACY)
def test_each_accuracy_gate_holds_and_breaks(tmp_path: Path, name: str, loose: float, strict: float) -> None:
    step, data = svd(rank=1), {"verification": {"synthetic": {}, "samples": 64}}
    for limit, verdict in ((loose, "ok"), (strict, "failed")):
        evidence = run(tmp_path, builders.mlp(0), [step], data, gates={name: limit})
        assert evidence.verdict == verdict, evidence.reason
        (record,) = evidence.gates
        assert (record.name, record.limit, record.holds) == (name, limit, verdict == "ok")


def test_an_argmax_gate_on_an_output_without_classes_breaks(tmp_path: Path) -> None:
    net = builders.Net(0)
    model = net.model(net.dense(net.input("x", ["N", 12]), "fc", 12, 1))
    evidence = run(tmp_path, model, ["fold-batchnorm"], gates={"argmax": 0.5})
    assert failed_without_output(evidence, tmp_path)
    assert "no class axis" in evidence.reason


def deciding(also_scores: bool = False) -> ir.Model:
    net = builders.Net(0)
    scores = net.dense(net.input("x", ["N", 12]), "fc", 12, 9)
    decided = net.node("ArgMax", scores, name="decide", axis=1)
    return net.model(decided, *([scores] if also_scores else []))


ONE_RANK = svd(rank=3, only=["fc"])


@pytest.mark.parametrize(("limit", "verdict"), [(0.1, "ok"), (1.0, "failed")])
def test_an_argmax_limit_judges_a_graph_that_ends_in_argmax(tmp_path: Path, limit: float, verdict: str) -> None:
    data = {"verification": {"synthetic": {}, "samples": 64}}
    step = {"split-svd": {**ONE_RANK["split-svd"], "tolerance": {"argmax": limit}}}
    stepped = run(tmp_path, deciding(), [step], data)
    assert stepped.verdict == verdict, stepped.reason
    gated = run(tmp_path, deciding(), [ONE_RANK], data, gates={"argmax": limit})
    assert gated.verdict == verdict, gated.reason
    assert gated.final is not None
    (output,) = gated.final.outputs
    assert output.argmax is not None
    assert 0.1 < output.argmax < 1
    assert gated.gates[0].value == pytest.approx(output.argmax, abs=1e-5)
    (tmp_path / "out.onnx").unlink(missing_ok=True)


def test_integers_are_exact_where_no_argmax_limit_is_given(tmp_path: Path) -> None:
    data = {"verification": {"synthetic": {}, "samples": 64}}
    evidence = run(tmp_path, deciding(), [ONE_RANK], data, gates={"relative_l2": 100})
    assert failed_without_output(evidence, tmp_path)
    assert "exact values that differ" in evidence.reason
    assert "tolerance: {argmax: 0." in evidence.reason


def test_an_argmax_gate_judges_integers_and_the_other_gates_the_rest(tmp_path: Path) -> None:
    data, gates = {"verification": {"synthetic": {}, "samples": 64}}, {"argmax": 0.1, "relative_l2": 10, "atol": 100}
    evidence = run(tmp_path, deciding(also_scores=True), [ONE_RANK], data, gates=gates)
    assert evidence.verdict == "ok", evidence.reason
    gates["relative_l2"] = 1e-6
    evidence = run(tmp_path, deciding(also_scores=True), [ONE_RANK], data, gates=gates)
    assert [gate.holds for gate in evidence.gates if gate.name in ("relative_l2", "argmax")] == [False, True]


def test_gates_that_only_floats_can_break_hold_where_only_integers_moved(tmp_path: Path) -> None:
    data, gates = {"verification": {"synthetic": {}, "samples": 64}}, {"argmax": 0.1, "relative_l2": 0}
    evidence = run(tmp_path, deciding(), [ONE_RANK], data, gates=gates)
    assert evidence.verdict == "ok", evidence.reason
    assert "which argmax judges" in evidence.gates[0].detail or "which argmax judges" in evidence.gates[1].detail


def two_heads() -> ir.Model:
    net = builders.Net(0)
    x = net.input("x", ["N", 12])
    return net.model(net.dense(x, "classes", 12, 4), net.dense(x, "value", 12, 1))


@pytest.mark.parametrize(("gates", "verdict"), [({"argmax": 1}, "failed"), ({"argmax": 1, "atol": 0}, "ok")])
def test_an_argmax_gate_needs_company_where_one_output_has_no_classes(
    tmp_path: Path, gates: dict[str, float], verdict: str
) -> None:
    assert run(tmp_path, two_heads(), ["fold-batchnorm"], gates=gates).verdict == verdict


@pytest.mark.parametrize(
    ("gate", "verdict"), [({"drop": 1}, "ok"), ({"drop": 0}, "failed"), ({"min": 0}, "ok"), ({"min": 1}, "failed")]
)
def test_metric_gates_hold_and_break(tmp_path: Path, gate: dict[str, float], verdict: str) -> None:
    model = builders.mlp(0)
    data = labelled(tmp_path, model)
    evidence = run(tmp_path, model, [svd(rank=1)], data, gates={"metric": {"top1": gate}})
    assert evidence.source_metrics == {"top1": 1}
    assert evidence.verdict == verdict, evidence.reason
    value = evidence.steps[0].metrics["top1"]
    assert value is not None
    assert value < 1


def test_the_source_itself_loses_no_metric(tmp_path: Path) -> None:
    model = builders.mlp(0)
    data = labelled(tmp_path, model)
    gates = {"metric": {"top1": {"drop": 0, "min": 1}}}
    evidence = run(tmp_path, model, ["fold-batchnorm"], data, gates=gates)
    assert [gate.holds for gate in evidence.gates] == [True, True]


def test_a_metric_gate_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="needs labels"):
        run(tmp_path, builders.mlp(0), ["fold-batchnorm"], gates={"metric": {"top1": {"drop": 0}}})
    assert written(tmp_path) == set()


def test_a_metric_that_is_nan_on_the_result_breaks_its_gate_and_the_evidence_stays_readable(tmp_path: Path) -> None:
    model = builders.mlp(0)
    lines = ["seen = []", "def f(outputs, labels):", "    seen.append(0)", "    return float('nan') if seen[1:] else 1"]
    (tmp_path / "task.py").write_text("\n".join(lines))
    gates = {"metric": {"task:f": {"drop": 1}}}
    evidence = run(tmp_path, model, ["fold-batchnorm"], labelled(tmp_path, model), gates=gates)
    assert evidence.verdict == "failed"
    assert not (tmp_path / "out.onnx").exists()
    assert Evidence.read(tmp_path / "out.onnx.evidence.json").steps[0].metrics == {"task:f": None}


def test_a_metric_that_is_nan_on_the_source_is_refused(tmp_path: Path) -> None:
    model = builders.mlp(0)
    (tmp_path / "task.py").write_text("def f(outputs, labels):\n    return float('nan')\n")
    gates = {"metric": {"task:f": {"min": 0}, "top1": {"min": 0}}}
    with pytest.raises(DataError, match="metric `task:f` is NaN on the source model") as caught:
        run(tmp_path, model, ["fold-batchnorm"], labelled(tmp_path, model), gates=gates)
    assert len(caught.value.problems) == 1
    assert not any(path.name.startswith("out.onnx") for path in tmp_path.iterdir())


def test_the_measured_gate_runs_the_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def race(candidate: ir.Model, reference: ir.Model, feeds: Any, threads: int) -> Timing:
        asked.append(feeds["x"].shape[0])
        return Timing(2, 1, 0.5, 0.4, 0.6, 5)

    monkeypatch.setattr(runtime, "race", race)
    evidence = run(tmp_path, builders.mlp(0), ["fold-batchnorm"], gates={"measured_seconds": 1.9})
    assert failed_without_output(evidence, tmp_path)
    assert "gate measured_seconds: 2 of the source's" in evidence.reason
    assert run(tmp_path, builders.mlp(0), ["fold-batchnorm"], gates={"measured_seconds": 2}).verdict == "ok"
    assert run(tmp_path, builders.mlp(0), ["fold-batchnorm"], gates={"seconds": 1}).verdict == "ok"
    assert asked == [1, 1]


def test_the_race_runs_on_as_many_threads_as_asked_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def race(candidate: ir.Model, reference: ir.Model, feeds: Any, threads: int) -> Timing:
        asked.append(threads)
        return Timing(1, 1, 1, 1, 1, 5)

    monkeypatch.setattr(runtime, "race", race)
    for threads in (0, 2):
        request = request_for(tmp_path, builders.mlp(0), ["fold-batchnorm"])
        evidence = compile_model(replace(request, threads=threads, measure=True))
        assert evidence.timing["measured"]["threads"] == threads
    assert asked == [0, 2]


# ---------------------------------------------------------------------------------------------- target and paths


def test_an_op_that_the_target_lacks_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    net = builders.Net(0)
    model = net.model(net.node("Erf", net.input("x", ["N", 4]), name="/act/Erf"))
    with pytest.raises(ModelError, match=r"node `/act/Erf`.*Erf"):
        run(tmp_path, model, ["fold-batchnorm"], target="mcu-cortex-m7")
    assert written(tmp_path) == set()
    assert run(tmp_path, builders.mlp(0), ["fold-batchnorm"], target="mcu-cortex-m7").verdict == "ok"


def test_an_only_that_names_nothing_is_refused(tmp_path: Path) -> None:
    step = svd(rank=2, only=["/fc*"], tolerance={"relative_l2": 10})
    with pytest.raises(PassError, match="names no node") as caught:
        run(tmp_path, builders.mlp(0), [step])
    assert "fc1" in caught.value.problems[0].hint
    assert written(tmp_path) == set()


def test_a_skip_that_names_nothing_is_noted(tmp_path: Path) -> None:
    evidence = run(tmp_path, builders.mlp(0), [{"fold-batchnorm": {"skip": ["/fc*"]}}])
    assert any("`skip: /fc*` names no node" in note for note in evidence.notes)


@pytest.mark.parametrize("name", ["model.onnx", "spec.yaml", "nowhere/out.onnx", "."])
def test_an_output_that_cannot_be_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    request = request_for(tmp_path, builders.mlp(0), ["fold-batchnorm"])
    before = (tmp_path / "model.onnx").read_bytes()
    with pytest.raises(CcompileError):
        compile_model(Request(request.model, request.spec, tmp_path / name, evidence=tmp_path / "e.json"))
    assert written(tmp_path) == set()
    assert (tmp_path / "model.onnx").read_bytes() == before


# ---------------------------------------------------------------------------------------------- what is written


def test_the_output_says_where_it_comes_from(tmp_path: Path) -> None:
    evidence = run(tmp_path, builders.mlp(0), ["fold-batchnorm"])
    found = {entry.key: entry.value for entry in onnx.load(tmp_path / "out.onnx").metadata_props}
    assert found == {
        "ccompile.version": evidence.versions["ccompile"],
        "ccompile.source": evidence.source.digest,
        "ccompile.spec": evidence.spec.digest,
        "ccompile.data": evidence.verification.digest,
    }


def test_metadata_texts_and_opsets_of_the_source_stay(tmp_path: Path) -> None:
    proto = ir.to_proto(builders.mlp(0))
    proto.metadata_props.add(key="author", value="me")
    proto.metadata_props.add(key="ccompile.version", value="older")
    proto.doc_string, proto.producer_name, proto.domain, proto.model_version = "words", "tool", "org", 7
    proto.graph.doc_string, proto.graph.node[0].doc_string = "graph words", "node words"
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    run(tmp_path, proto, [svd(rank=3, only=["fc2"], tolerance={"relative_l2": 10})])
    after = onnx.load(tmp_path / "out.onnx")
    for name in ("doc_string", "producer_name", "domain", "model_version", "ir_version", "opset_import"):
        assert getattr(after, name) == getattr(proto, name), name
    assert (after.graph.doc_string, after.graph.node[0].doc_string) == ("graph words", "node words")
    metadata = {entry.key: entry.value for entry in after.metadata_props}
    assert metadata["author"] == "me"
    assert metadata["ccompile.version"] != "older"


def test_the_file_that_does_not_reproduce_what_was_verified_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def garbage(path: Path, feeds: Any, settings: Settings) -> dict[str, Array]:
        return {"fc3_out": np.zeros((8, 5), np.float32)}

    request = request_for(tmp_path, builders.mlp(0), ["fold-batchnorm"])
    request.output.write_bytes(b"the previous build")
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "run_file", garbage)
        with pytest.raises(ContractError, match="does not reproduce output `fc3_out`"):
            compile_model(request)
    assert request.output.read_bytes() == b"the previous build"
    assert written(tmp_path) == {"out.onnx"}
    assert compile_model(request).verdict == "ok"


def test_an_output_that_is_empty_in_the_first_batch_only_is_reproduced(tmp_path: Path) -> None:
    net = builders.Net(0)
    model = net.model(net.node("NonZero", net.input("x", ["N", 4]), name="where"))
    np.savez(tmp_path / "v.npz", x=np.repeat(np.arange(2, dtype=np.float32), 4)[:, None] * np.ones(4, np.float32))
    data = {"verification": {"npz": "v.npz", "batch": 4}}
    assert run(tmp_path, model, ["fold-batchnorm"], data).verdict == "ok"


def test_dumped_steps_load_and_show_each_step(tmp_path: Path) -> None:
    steps = ["fold-batchnorm", svd(rank=3, only=["fc2"], tolerance={"relative_l2": 10})]
    run(tmp_path, builders.mlp(0), steps, dump=tmp_path / "steps")
    files = sorted((tmp_path / "steps").iterdir())
    assert [path.name for path in files] == ["01-fold-batchnorm.onnx", "02-split-svd.onnx"]
    assert [len(onnx_io.load(path).model.graph) for path in files] == [5, 6]


@pytest.mark.parametrize("edit", [make_nan, unknown_op, dangling_value])
def test_a_failed_step_is_dumped_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: Callable[[View], None]
) -> None:
    plant(monkeypatch, lambda view: edit(view))
    evidence = run(tmp_path, builders.mlp(0), ["planted"], dump=tmp_path / "steps")
    assert evidence.verdict == "failed"
    assert len(onnx.load(tmp_path / "steps" / "01-planted.onnx").graph.node) > 0


# ---------------------------------------------------------------------------------------------- evidence


def test_evidence_reads_back_as_it_was_written(tmp_path: Path) -> None:
    step = svd(rank=3, tolerance={"relative_l2": 10})
    evidence = run(tmp_path, builders.mlp(0), [step], gates={"params": 1, "argmax": 0})
    path = tmp_path / "out.onnx.evidence.json"
    assert path.read_text() == evidence.text()
    assert Evidence.read(path).text() == evidence.text()


def test_equal_inputs_give_equal_bytes_but_for_the_timing(tmp_path: Path) -> None:
    step = svd(rank=3, tolerance={"relative_l2": 10})
    texts, models = [], []
    for _ in range(2):
        evidence = run(tmp_path, builders.mlp(0), [step])
        texts.append(evidence.model_copy(update={"timing": {}}).text())
        models.append((tmp_path / "out.onnx").read_bytes())
    assert texts[0] == texts[1]
    assert models[0] == models[1]


def test_another_seed_gives_other_inputs_and_says_so(tmp_path: Path) -> None:
    found = [run(tmp_path, builders.mlp(0), ["fold-batchnorm"], seed=seed) for seed in (0, 1)]
    assert [evidence.seed for evidence in found] == [0, 1]
    assert found[0].verification.digest != found[1].verification.digest


def test_synthetic_inputs_are_noted(tmp_path: Path) -> None:
    evidence = run(tmp_path, builders.mlp(0), ["fold-batchnorm"], {"verification": None})
    assert any("synthetic" in note for note in evidence.notes)
    assert "synthetic" in evidence.verification.source


def test_the_calibration_data_is_recorded(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((12, 12)).astype(np.float32)
    np.savez(tmp_path / "c.npz", x=x[:8])
    np.savez(tmp_path / "v.npz", x=x)
    data = {"calibration": {"npz": "c.npz"}, "verification": {"npz": "v.npz"}}
    evidence = run(tmp_path, builders.mlp(0), ["fold-batchnorm"], data)
    assert evidence.calibration is not None
    assert (evidence.calibration.samples, evidence.verification.samples) == (8, 4)
    assert run(tmp_path, builders.mlp(0), ["fold-batchnorm"]).calibration is None


def recurrent() -> onnx.ModelProto:
    """y[T, N, 4] of x[T, N, 3]: the batch is on axis 1."""
    rng = np.random.default_rng(0)
    arrays = {"W": (3, 8), "b": (8,)}
    constants = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in arrays.items()]
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["m"], name="mm"),
        helper.make_node("Add", ["m", "b"], ["y"], name="add"),
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [5, "N", k]) for n, k in (("x", 3), ("y", 8))]
    body = helper.make_graph(nodes, "g", ports[:1], ports[1:], constants)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def write_sets(folder: Path, proto: onnx.ModelProto, wrong: float = 0.0) -> dict[str, Any]:
    model = onnx_io.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))[0]
    for number in range(3):
        path = folder / "sets" / f"test_data_set_{number}"
        path.mkdir(parents=True)
        x = np.random.default_rng(number).standard_normal((5, 2, 3)).astype(np.float32)
        y = runtime.Session(model, Settings(1)).run({"x": x})["y"] + np.float32(wrong)
        for name, array in (("input_0", x), ("output_0", y)):
            (path / f"{name}.pb").write_bytes(numpy_helper.from_array(array).SerializeToString())
    return {"verification": {"test_data": "sets"}}


@pytest.mark.parametrize(
    ("wrong", "note"), [(0.0, "expected outputs within relative L2 0$"), (1.0, r"within relative L2 0\.\d+$")]
)
def test_test_data_sets_with_the_batch_on_axis_one_are_compared_and_their_outputs_checked(
    tmp_path: Path, wrong: float, note: str
) -> None:
    proto = recurrent()
    evidence = run(tmp_path, proto, ["fold-batchnorm"], write_sets(tmp_path, proto, wrong))
    assert evidence.verdict == "ok"
    assert evidence.verification.samples == 3
    assert evidence.final is not None
    assert evidence.final.outputs[0].elements == 3 * 5 * 2 * 8
    assert any(re.search(note, text) for text in evidence.notes)


def test_expected_outputs_of_another_shape_are_noted(tmp_path: Path) -> None:
    proto = recurrent()
    data = write_sets(tmp_path, proto)
    proto.graph.node[1].input[0] = "m2"
    proto.graph.node.insert(1, helper.make_node("Identity", ["m"], ["m2"], name="same"))
    for path in (tmp_path / "sets").rglob("output_0.pb"):
        path.write_bytes(numpy_helper.from_array(np.full((5, 2, 8), np.nan, np.float32)).SerializeToString())
    notes = run(tmp_path, proto, ["fold-batchnorm"], data).notes
    assert any("NOT at all" in note for note in notes)


def test_costs_are_of_one_sample_whatever_the_batch(tmp_path: Path) -> None:
    model = builders.mlp(0)
    costs = [
        run(
            tmp_path, model, ["fold-batchnorm"], {"verification": {"synthetic": {}, "samples": 8, "batch": n}}
        ).source_cost
        for n in (1, 8)
    ]
    assert costs[0] == costs[1]
    assert costs[0].macs == 12 * 24 + 24 * 16 + 16 * 5
