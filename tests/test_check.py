"""`ccompile check --evidence`: each way in which a build may have moved is caught by name, and nothing else is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import builders
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from runs import Ended, Run

from ccompile import graph, onnx_io

SPEC = """
version: 1
data: {verification: {npz: verify.npz, samples: 12, labels: label}}
passes:
  - tidy-graph
  - split-svd: {only: ["fc2"], rank: 4, statistics: weights, tolerance: {relative_l2: 0.9}}
gates: {stored_bytes: 2, relative_l2: 0.9}
"""


def save_data(path: Path, change: Callable[[Any], Any] = lambda x: x, seed: int = 0) -> None:
    """Write 20 images of three channels that differ, and labels."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((20, 3, 12, 12)) * [[[[1.0]], [[0.5]], [[0.8]]]] + [[[[0.4]], [[0.1]], [[-0.3]]]]
    np.savez(path, x=change(x).astype(np.float32), label=np.arange(20) % 4)


def small_net() -> ir.Model:
    net = builders.Net(3)
    x = net.input("x", ["n", 3, 12, 12])
    y = net.relu(net.conv(x, "conv", (6, 3, 3, 3), stride=2))
    y = net.node("GlobalAveragePool", y, name="pool")
    y = net.node("Flatten", y, name="flat")
    y = net.relu(net.dense(y, "fc1", 6, 32))
    y = net.relu(net.dense(y, "fc2", 32, 32))
    y = net.dense(y, "fc3", 32, 4)
    y.name = "y"
    return net.model(y)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, a spec, data, and what a compile made of them."""
    from ccompile import pipeline, spec
    from ccompile.request import Request

    folder = tmp_path_factory.mktemp("built")
    onnx_io.save(small_net(), folder / "source.onnx")
    save_data(folder / "verify.npz")
    (folder / "spec.yaml").write_text(SPEC)
    request = Request(folder / "source.onnx", spec.load(folder / "spec.yaml"), folder / "out.onnx", threads=1)
    assert pipeline.compile_model(request).verdict == "ok"
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `built`, which is also the working folder."""
    shutil.copytree(built, tmp_path / "built")
    monkeypatch.chdir(tmp_path / "built")
    return tmp_path / "built"


def check(run: Run, *arguments: object, evidence: str = "out.onnx.evidence.json") -> Ended:
    threads = () if "--rejudge" in arguments else ("--threads", 1)
    return run("check", "out.onnx", "--evidence", evidence, *threads, *arguments)


def broken(run: Run, *arguments: object) -> dict[str, str]:
    """Return the cases that broke, with what was found; the exit code must say the same."""
    ended = check(run, "--json", *arguments)
    found = json.loads(ended.out)
    cases = {
        f"{case['group']} {case['name']}": case["detail"] for case in found["cases"] if case["verdict"] == "broken"
    }
    assert (ended.code, found["holds"]) == ((1, False) if cases else (0, True))
    assert [line.split(":")[0] for line in ended.err.splitlines() if line.startswith("out")] == ["out.onnx"] * len(
        cases
    )
    return cases


def verdicts(run: Run, *arguments: object) -> dict[str, str]:
    cases = json.loads(check(run, "--json", *arguments).out)["cases"]
    return {f"{case['group']} {case['name']}": case["verdict"] for case in cases}


def edit_evidence(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "out.onnx.evidence.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# ---------------------------------------------------------------------------------------------- nothing moved


@pytest.mark.parametrize("extra", [[], ["-s", "spec.yaml"], ["--against", "source.onnx"], ["--data", "verify.npz"]])
def test_an_unchanged_build_holds(folder: Path, run: Run, extra: list[str]) -> None:
    found = verdicts(run, *extra)
    assert {"artifact weights", "build spec", "data x", "output y", "cost macs", "contract 2 split-svd"} <= found.keys()
    assert "broken" not in found.values()
    assert (found["gate relative_l2"] == "holds") is ("--against" in extra)
    assert (check(run, *extra).code, broken(run, *extra)) == (0, {})


def test_gates_that_cannot_be_judged_say_why(folder: Path, run: Run) -> None:
    assert re.search(r"^gate relative_l2 +not judged  give --against SOURCE$", check(run).out, re.MULTILINE)


def test_quiet_prints_nothing_when_all_holds_and_errors_only_when_not(folder: Path, run: Run) -> None:
    assert check(run, "-q") == Ended(0, "", "")
    save_data(folder / "verify.npz", seed=1)
    ended = check(run, "-q")
    assert (ended.code, ended.out) == (1, "")
    assert "data x" in ended.err


# ---------------------------------------------------------------------------------------------- the artifact


def flip(path: Path, name: str, bit: int, largest: bool = True) -> None:
    """Flip one bit of the largest (or smallest) element of a float weight."""
    model = onnx.load(path)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    array = numpy_helper.to_array(tensor).copy()
    flat = array.reshape(-1)
    at = int(np.abs(flat).argmax() if largest else np.abs(flat).argmin())
    flat.view(np.uint32)[at] ^= np.uint32(1 << bit)
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, path)


def first_weight(folder: Path) -> str:
    return str(onnx.load(folder / "out.onnx").graph.initializer[0].name)


@pytest.mark.parametrize("bit", [30, 29, 28, 27, 22])
def test_a_flipped_bit_names_its_weight(folder: Path, run: Run, bit: int) -> None:
    name = first_weight(folder)
    flip(folder / "out.onnx", name, bit)
    found = broken(run)
    assert set(found) >= {"artifact file", "artifact weights"}
    assert found["artifact weights"].startswith(f"`{name}`")
    assert "artifact nodes" not in found
    assert "output y" in found


def test_a_weight_that_a_flipped_bit_made_infinite_is_named_as_well(folder: Path, run: Run) -> None:
    model = onnx.load(folder / "out.onnx")
    name = first_weight(folder)
    tensor = model.graph.initializer[0]
    array = numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[0] = np.inf
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, folder / "out.onnx")
    assert broken(run)["artifact weights"].startswith(f"`{name}`")


def test_a_changed_attribute_is_a_changed_node(folder: Path, run: Run) -> None:
    model = onnx.load(folder / "out.onnx")
    (conv,) = [node for node in model.graph.node if node.op_type == "Conv"]
    next(a for a in conv.attribute if a.name == "strides").ints[:] = [3, 3]
    onnx.save(model, folder / "out.onnx")
    found = broken(run)
    assert {"artifact nodes", "artifact file", "output y"} <= found.keys()
    assert "artifact weights" not in found


def test_a_model_that_no_longer_runs_is_a_broken_case(folder: Path, run: Run) -> None:
    model = onnx.load(folder / "out.onnx")
    (pool,) = [node for node in model.graph.node if node.op_type == "GlobalAveragePool"]
    pool.op_type, pool.domain = "Missing", "nowhere"
    model.opset_import.append(onnx.helper.make_opsetid("nowhere", 1))
    onnx.save(model, folder / "out.onnx")
    assert {"artifact runs", "artifact nodes"} <= broken(run).keys()


# ---------------------------------------------------------------------------------------------- spec and source


def test_a_model_built_from_another_spec_is_named(folder: Path, run: Run) -> None:
    (folder / "other.yaml").write_text(SPEC.replace("rank: 4", "rank: 3"))
    assert run("source.onnx", "-s", "other.yaml", "-o", "out.onnx", "--evidence", "new.json", "-q").code == 0
    found = broken(run)
    assert found["build spec"].startswith("the model says that its spec was ")
    assert "artifact weights" in found


def test_a_spec_that_is_not_the_builds_is_named(folder: Path, run: Run) -> None:
    assert "the spec given is" in broken(run, "-s", "spec.yaml", "--set", "gates.stored_bytes=0.9")["build spec"]


def test_a_source_that_is_not_the_builds_is_named(folder: Path, run: Run) -> None:
    model = small_net()
    weight = model.graph.initializers["fc1.w"]
    array = graph.constant(weight)
    assert array is not None
    weight.const_value = ir.Tensor(array * 2, name="fc1.w")
    onnx_io.save(model, folder / "source.onnx")
    found = broken(run, "--against", "source.onnx")
    assert {"build source", "source y"} <= found.keys()


# ---------------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x[:, ::-1], "the channels are in reverse order"),
        (lambda x: x * 255, "255 times the recorded ones plus"),
        (lambda x: (x - 0.5) / 0.5, "2 times the recorded ones plus -1"),
        (lambda x: x[:, ::-1] / 255, "and the channels in reverse order"),
        (lambda x: x + [[[[3.0]], [[0.0]], [[0.0]]]], "channel 0 has mean"),
    ],
    ids=["bgr", "scale", "mean and std", "bgr and scale", "one channel"],
)
def test_a_swapped_preprocessing_is_named(folder: Path, run: Run, change: Callable[[Any], Any], said: str) -> None:
    save_data(folder / "swapped.npz", change)
    for extra in ([], ["--other-data"]):
        found = broken(run, "--data", "swapped.npz", *extra)
        assert "preprocessed otherwise" in found["data x"]
        assert said in found["data x"]
        assert "output y" not in found


def test_other_samples_of_the_kind_break_unless_they_are_wanted(folder: Path, run: Run) -> None:
    save_data(folder / "others.npz", seed=1)
    assert "other samples" in broken(run, "--data", "others.npz")["data x"]
    found = verdicts(run, "--data", "others.npz", "--other-data")
    assert (found["data x"], found["output y"]) == ("holds", "not judged")


def test_labels_that_moved_break_the_metric(folder: Path, run: Run) -> None:
    data = dict(np.load(folder / "verify.npz"))
    np.savez(folder / "verify.npz", x=data["x"], label=(data["label"] + 1) % 4)
    then = json.loads((folder / "out.onnx.evidence.json").read_text())["steps"][-1]["metrics"]["top1"]
    found = broken(run)
    assert 0 < then < 1
    assert set(found) <= {"metric top1"}


# ---------------------------------------------------------------------------------------------- the runtime


@pytest.fixture
def quantised(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build with an int8 weight that the runtime multiplies in integers when it may optimise."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    net = builders.Net(0)
    x = net.input("x", ["n", 64])
    weight = net.constant(rng.integers(-127, 128, (64, 32)).astype(np.int8), "W")
    scale, zero = net.constant(np.full(32, 0.01, np.float32), "s"), net.constant(np.zeros(32, np.int8), "z")
    decoded = net.node("DequantizeLinear", weight, scale, zero, name="decode", axis=1)
    y = net.node("MatMul", x, decoded, name="multiply")
    y.name = "y"
    onnx_io.save(net.model(y), tmp_path / "source.onnx")
    np.savez(tmp_path / "verify.npz", x=rng.standard_normal((16, 64)).astype(np.float32))
    (tmp_path / "spec.yaml").write_text("version: 1\ndata: {verification: {npz: verify.npz}}\npasses: [tidy-graph]\n")
    assert run("source.onnx", "-s", "spec.yaml", "-o", "out.onnx", "-q").code == 0
    return tmp_path


@pytest.mark.parametrize(("level", "moves"), [("none", False), ("basic", False), ("extended", True), ("all", True)])
def test_an_optimisation_level_that_moves_outputs_is_caught(quantised: Path, run: Run, level: str, moves: bool) -> None:
    found = broken(run, "--optimisation", level)
    assert set(found) == ({"output y"} if moves else set())


def test_the_limit_that_is_said_to_pass_passes(quantised: Path, run: Run) -> None:
    ended = check(run, "--optimisation", "all", "-q")
    limit = ended.err.split("--relative-l2 ")[1].split()[0]
    assert 1e-3 < float(limit) < 1e-2
    assert check(run, "--optimisation", "all", "--relative-l2", limit, "-q") == Ended(0, "", "")
    assert check(run, "--optimisation", "all", "--relative-l2", float(limit) * 0.98, "-q").code == 1
    assert check(run, "--optimisation", "all", "--argmax", 0.5, "-q").code == 0


def test_another_runtime_version_is_noted(folder: Path, run: Run) -> None:
    edit_evidence(folder, lambda data: data["versions"].update(onnxruntime="1.0"))
    assert "onnxruntime is " in check(run).out
    assert ", 1.0 at the compile" in check(run).out


# ---------------------------------------------------------------------------------------------- cost, gates, time


def test_a_cost_above_the_recorded_breaks_and_one_below_holds(folder: Path, run: Run) -> None:
    edit_evidence(folder, lambda data: data["steps"][-1]["cost"].update(macs=10, params=10**9))
    assert set(broken(run)) == {"cost macs"}


def test_gates_of_the_spec_are_judged_on_what_is_measured_today(folder: Path, run: Run) -> None:
    found = broken(run, "-s", "spec.yaml", "--set", "gates.relative_l2=1e-9", "--against", "source.onnx")
    assert set(found) == {"build spec", "gate relative_l2"}
    assert set(broken(run, "-s", "spec.yaml", "--set", "gates.stored_bytes=0.01")) == {
        "build spec",
        "gate stored_bytes",
    }


def raced(ratio: float, seconds: float) -> dict[str, Any]:
    low_high = {"ratio": ratio, "low": ratio, "high": ratio, "rounds": 9, "threads": 1}
    return {"measured": {"seconds": seconds, "reference_seconds": seconds * ratio, **low_high}}


@pytest.mark.parametrize(("against", "case"), [(["--against", "source.onnx"], "ratio"), ([], "seconds")])
@pytest.mark.parametrize("slow", [True, False])
def test_a_slower_artifact_is_caught_with_timing(
    folder: Path, run: Run, against: list[str], case: str, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ccompile import runtime

    timing = runtime.Timing(2.0, 2.0, 1.0, 0.9, 1.1, 9)
    monkeypatch.setattr(runtime, "race", lambda *arguments, **options: timing)
    edit_evidence(folder, lambda data: data["timing"].update(raced(2.0, 1.0) if slow else raced(1.0, 2.0)))
    assert set(broken(run, "--timing", *against)) == ({f"timing {case}"} if slow else set())
    if slow:
        needed = check(run, "--timing", *against, "-q").err.split("--slower ")[1].split()[0]
        assert check(run, "--timing", *against, "--slower", needed, "-q").code == 0


def test_timing_really_races(folder: Path, run: Run) -> None:
    edit_evidence(folder, lambda data: data["timing"].update(raced(1e4, 1e-9)))
    assert set(broken(run, "--timing", "--against", "source.onnx")) == {"timing ratio"}
    assert set(broken(run, "--timing")) == {"timing seconds"}


def test_compile_with_measure_records_what_timing_is_held_against(folder: Path, run: Run) -> None:
    assert run("source.onnx", "-s", "spec.yaml", "-o", "out.onnx", "--measure", "--threads", 1, "-q").code == 0
    assert verdicts(run, "--timing", "--slower", 100)["timing seconds"] == "holds"


# ---------------------------------------------------------------------------------------------- reports


def test_junit_has_a_case_per_thing_judged(folder: Path, run: Run) -> None:
    flip(folder / "out.onnx", first_weight(folder), 30)
    assert check(run, "--junit", "junit.xml").code == 1
    suite = ElementTree.parse(folder / "junit.xml").getroot()
    failed = {f"{case.get('classname')} {case.get('name')}" for case in suite if case.find("failure") is not None}
    assert failed == set(broken(run))
    assert {"contract", "gate", "output", "data"} <= {case.get("classname") for case in suite}


# ---------------------------------------------------------------------------------------------- rejudging


def test_rejudging_needs_no_model_and_no_data(folder: Path, run: Run) -> None:
    for name in ("out.onnx", "source.onnx", "verify.npz"):
        (folder / name).unlink()
    assert broken(run, "--rejudge") == {}
    assert set(broken(run, "--rejudge", "--relative-l2", 1e-6)) == {"gate relative_l2"}


def test_rejudging_takes_tolerances_and_gates_of_a_spec(folder: Path, run: Run) -> None:
    (folder / "strict.yaml").write_text(SPEC.replace("tolerance: {relative_l2: 0.9}", "tolerance: {relative_l2: 1e-5}"))
    assert set(broken(run, "--rejudge", "-s", "strict.yaml")) == {"contract 2 split-svd"}
    said = check(run, "--rejudge", "-s", "strict.yaml", "-q").err
    assert "would pass" in said
    limit = said.split("relative_l2: ")[-1].split("}")[0]
    (folder / "loose.yaml").write_text(SPEC.replace("{relative_l2: 0.9}", f"{{relative_l2: {limit}}}", 1))
    assert broken(run, "--rejudge", "-s", "loose.yaml") == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-s", "other.yaml"], "compiled with other options"),
        (["-s", "short.yaml"], "the compile ran tidy-graph, split-svd"),
        (["--relative-l2", "-1"], "--relative-l2"),
        (["--timing"], "--timing means nothing when nothing is run"),
    ],
)
def test_what_cannot_be_judged_anew_is_refused(folder: Path, run: Run, arguments: list[str], said: str) -> None:
    (folder / "other.yaml").write_text(SPEC.replace("rank: 4", "rank: 3"))
    (folder / "short.yaml").write_text(SPEC.replace("  - tidy-graph\n", ""))
    ended = check(run, "--rejudge", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err


# ---------------------------------------------------------------------------------------------- refused


def spoil(folder: Path, how: str) -> None:
    path = folder / "out.onnx.evidence.json"
    text = path.read_text()
    if how == "missing":
        path.unlink()
    elif how == "other schema":
        path.write_text(text.replace('"evidence_schema": 1', '"evidence_schema": 2'))
    elif how == "sketch":
        edit_evidence(folder, lambda data: data["fingerprint"]["outputs"][0].update(values="AAAA", digest=""))
    elif how == "no fingerprint":
        edit_evidence(folder, lambda data: data.update(fingerprint=None))
    else:
        path.write_text({"corrupt": text[:-40], "foreign": '{"a": 1}', "no JSON": "version: 1"}[how])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "cannot read the evidence"),
        ("corrupt", "damaged"),
        ("no JSON", "damaged"),
        ("foreign", "JSON of something else"),
        ("other schema", "which ccompile"),
        ("sketch", "the sketch of output `y`"),
        ("no fingerprint", "older ccompile"),
    ],
)
def test_evidence_that_is_none_is_refused(folder: Path, run: Run, how: str, said: str) -> None:
    spoil(folder, how)
    ended = check(run)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err


def test_evidence_of_a_failed_compile_is_refused(folder: Path, run: Run) -> None:
    ended = run("source.onnx", "-s", "spec.yaml", "-o", "new.onnx", "--set", "gates.stored_bytes=0.01", "-q")
    assert ended.code == 1
    assert check(run, evidence="new.onnx.evidence.json").code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data", "missing.npz"],
        ["--data", "spec.yaml"],
        ["--against", "other.onnx"],
        ["--atol", "1"],
        ["--seed", "3"],
        ["--samples", "3"],
        ["--timing"],
        ["--junit", "out.onnx"],
        ["--optimisation", "most"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_checked_is_refused(folder: Path, run: Run, arguments: list[str]) -> None:
    onnx_io.save(builders.mlp(0), folder / "other.onnx")
    ended = check(run, *arguments)
    assert (ended.code, ended.out, "Traceback" in ended.err) == (2, "", False), ended.err


def test_another_model_is_refused(folder: Path, run: Run) -> None:
    onnx_io.save(builders.mlp(0), folder / "out.onnx")
    ended = check(run)
    assert ended.code == 2
    assert "Is it the evidence of this model?" in ended.err


def test_data_that_are_not_beside_the_evidence_are_asked_for(folder: Path, run: Run) -> None:
    (folder / "elsewhere").mkdir()
    shutil.move(folder / "out.onnx.evidence.json", folder / "elsewhere" / "e.json")
    ended = check(run, evidence="elsewhere/e.json")
    assert ended.code == 2
    assert "--spec SPEC" in ended.err
    assert check(run, "-s", "spec.yaml", evidence="elsewhere/e.json").code == 0
    assert check(run, "--data", "verify.npz", evidence="elsewhere/e.json").code == 0


@pytest.mark.parametrize("option", [["--timing"], ["--rejudge"], ["-s", "spec.yaml"], ["--junit", "j.xml"]])
def test_options_that_need_evidence_are_refused_without(folder: Path, run: Run, option: list[str]) -> None:
    ended = run("check", "out.onnx", "--against", "source.onnx", *option)
    assert (ended.code, "means nothing without --evidence" in ended.err) == (2, True)
