"""Wrong models, data, outputs and promises: the exit code is right, the message helps, and nothing is half written."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import yaml
from builders import mlp
from runs import ROOT, TIDY, Run, command, environment, scratch_files, spawn

from ccompile import onnx_io, spec
from ccompile.errors import CcompileError

OLD = b"the previous output"
SVD = {"split-svd": {"statistics": "weights", "only": ["/head/hidden"], "rank": 2, "tolerance": {"argmax": 0.999}}}


def compiled(run: Run, folder: Path, code: int, said: str, *extra: object, spec_name: str = "tidy.yaml") -> str:
    """Compile over a previous output; check the code, the message and, when it fails, that nothing was touched."""
    out = folder / "out.onnx"
    if not out.exists():
        out.write_bytes(OLD)
    ended = run(folder / "digits.onnx", "-s", folder / spec_name, "-o", out, "--threads", 1, *extra)
    assert (ended.code, "Traceback" in ended.err) == (code, False), ended.err
    assert said in ended.err
    assert (out.read_bytes() == OLD) is (code != 0)
    assert scratch_files(folder) == []
    return ended.err


def write_spec(folder: Path, changes: dict[str, object]) -> str:
    """Write a spec with real data; return its name."""
    base = {"version": 1, "data": {"verification": {"npz": "verification.npz", "samples": 64, "labels": "label"}}}
    (folder / "changed.yaml").write_text(yaml.safe_dump({**base, "passes": ["tidy-graph"], **changes}))
    return "changed.yaml"


def edited(path: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


def evidence(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "out.onnx.evidence.json").read_text())
    return found


# ---------------------------------------------------------------------------------------------- the model file


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b"GIF89a" + bytes(100), "not an ONNX model"),
        (b"\x08\x08", "the model has no graph"),
        (b"not a model at all, but a text\n" * 9, "not an ONNX model"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "not an ONNX model"),
    ],
)
def test_file_of_another_kind_is_refused(digits: Path, run: Run, content: bytes, said: str) -> None:
    (digits / "digits.onnx").write_bytes(content)
    compiled(run, digits, 2, said)


def test_missing_model_is_refused(digits: Path, run: Run) -> None:
    (digits / "digits.onnx").unlink()
    compiled(run, digits, 2, "cannot read the model: No such file or directory")


def test_folder_as_model_is_refused(digits: Path, run: Run) -> None:
    (digits / "digits.onnx").unlink()
    (digits / "digits.onnx").mkdir()
    compiled(run, digits, 2, "cannot read the model: Is a directory")


def test_truncated_model_is_refused(digits: Path, run: Run) -> None:
    os.truncate(digits / "digits.onnx", 100_000)
    compiled(run, digits, 2, "past the end of the file")


def test_whole_model_is_accepted(digits: Path, run: Run) -> None:
    compiled(run, digits, 0, "")


def test_name_that_is_no_text_is_refused(digits: Path, run: Run) -> None:
    path = digits / "digits.onnx"
    path.write_bytes(path.read_bytes().replace(b"stem.norm.bias", b"stem.norm\xffbias"))
    compiled(run, digits, 2, "is not UTF-8")


def test_input_that_nothing_produces_is_refused_by_node_and_name(digits: Path, run: Run) -> None:
    edited(digits / "digits.onnx", lambda model: model.graph.node[3].input.__setitem__(0, "nowhere"))
    err = compiled(run, digits, 2, "reads `nowhere`, which nothing defines")
    assert "digits.onnx: node `/" in err


def test_attribute_without_a_type_is_refused(digits: Path, run: Run) -> None:
    def change(model: onnx.ModelProto) -> None:
        conv = next(node for node in model.graph.node if node.op_type == "Conv")
        conv.attribute[0].ClearField("type")

    edited(digits / "digits.onnx", change)
    compiled(run, digits, 2, "the graph cannot be represented")


def test_op_that_the_runtime_lacks_is_named_with_its_node(digits: Path, run: Run) -> None:
    def change(model: onnx.ModelProto) -> None:
        relu = next(node for node in model.graph.node if node.op_type == "Relu")
        relu.op_type, relu.name = "Frobnicate", "/stem/odd"

    edited(digits / "digits.onnx", change)
    err = compiled(run, digits, 2, "ONNX Runtime refuses the model")
    assert "Frobnicate" in err


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weight_that_is_not_finite_is_named(digits: Path, run: Run, value: float) -> None:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
        weight = onnx.numpy_helper.to_array(tensor).copy()
        weight.flat[5] = value
        tensor.CopyFrom(onnx.numpy_helper.from_array(weight, tensor.name))

    edited(digits / "digits.onnx", change)
    compiled(run, digits, 2, "has NaN or infinity")


def external(folder: Path) -> Path:
    model = onnx.load(folder / "digits.onnx")
    onnx.save(model, folder / "digits.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    return folder / "weights.bin"


def test_external_data_is_read(digits: Path, run: Run) -> None:
    external(digits)
    compiled(run, digits, 0, "")


def test_missing_external_data_is_refused(digits: Path, run: Run) -> None:
    external(digits).unlink()
    compiled(run, digits, 2, "external data `weights.bin`: No such file")


def test_short_external_data_is_refused(digits: Path, run: Run) -> None:
    os.truncate(external(digits), 1000)
    compiled(run, digits, 2, "external data `weights.bin` is too short")


@pytest.mark.parametrize("place", ["../weights.bin", "/etc/passwd", "a/../../weights.bin", ""])
def test_external_data_outside_the_folder_is_refused(digits: Path, run: Run, place: str) -> None:
    external(digits)
    model = onnx.load(digits / "digits.onnx", load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = place if entry.key == "location" else entry.value
    onnx.save(model, digits / "digits.onnx")
    compiled(run, digits, 2, "lies outside the model's folder")


# ---------------------------------------------------------------------------------------------- the data


def rewritten(folder: Path, **arrays: object) -> None:
    kept = dict(np.load(folder / "verification.npz"))
    changed = {**kept, **arrays}
    np.savez(folder / "verification.npz", **{name: x for name, x in changed.items() if x is not None})


IMAGE = np.zeros((8, 1, 8, 8), np.float32)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"image": None, "img": IMAGE, "label": None}, "`img` is no input of the model"),
        ({"image": None}, "the model also takes `image`"),
        ({"image": IMAGE.astype(np.float64), "label": None}, "`image` is float64, the model takes float32"),
        ({"image": IMAGE[:, :, :7], "label": None}, "axis 2 has 7, the model takes 8"),
        ({"image": IMAGE[:, 0], "label": None}, "has rank 3"),
        ({"image": IMAGE[:0], "label": None}, "there is no sample in it"),
    ],
)
def test_data_that_does_not_fit_is_refused(digits: Path, run: Run, arrays: dict[str, object], said: str) -> None:
    rewritten(digits, **arrays)
    assert "verification.npz" in compiled(run, digits, 2, said)


def test_missing_data_is_refused(digits: Path, run: Run) -> None:
    (digits / "verification.npz").unlink()
    compiled(run, digits, 2, "no such file")


def test_data_that_is_no_archive_is_refused(digits: Path, run: Run) -> None:
    (digits / "verification.npz").write_bytes(b"x" * 1000)
    compiled(run, digits, 2, "not an npz file")


def test_data_damaged_inside_is_refused(digits: Path, run: Run) -> None:
    path = digits / "verification.npz"
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("image.npy").header_offset + 300
    damaged = bytearray(path.read_bytes())
    damaged[at : at + 64] = bytes(64)
    path.write_bytes(damaged)
    compiled(run, digits, 2, "is damaged")


def test_inputs_that_are_not_finite_do_not_crash(digits: Path, run: Run) -> None:
    rewritten(digits, image=np.full((8, 1, 8, 8), np.nan, np.float32), label=None)
    ended = run(digits / "digits.onnx", "-s", digits / "tidy.yaml", "-o", digits / "out.onnx")
    assert ended.code in (0, 1, 2)


# ---------------------------------------------------------------------------------------------- the output


@pytest.mark.parametrize("victim", ["digits.onnx", "tidy.yaml"])
@pytest.mark.parametrize("way", ["same", "relative", "link"])
def test_output_never_overwrites_an_input(digits: Path, run: Run, victim: str, way: str) -> None:
    before = (digits / victim).read_bytes()
    (digits / "sub").mkdir()
    (digits / "link").symlink_to(digits / victim)
    out = {"same": digits / victim, "relative": digits / "sub" / ".." / victim, "link": digits / "link"}[way]
    ended = run(digits / "digits.onnx", "-s", digits / "tidy.yaml", "-o", out)
    assert ended.code == 2
    assert "the output would overwrite" in ended.err
    assert (digits / victim).read_bytes() == before


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("none/out.onnx", "does not exist"),
        ("sub", "is a folder"),
        ("/proc/out.onnx", "cannot write"),
        ("pipe", "regular"),
    ],
)
def test_output_that_cannot_be_written_is_refused(digits: Path, run: Run, place: str, said: str) -> None:
    (digits / "sub").mkdir()
    os.mkfifo(digits / "pipe")
    ended = run(digits / "digits.onnx", "-s", digits / "tidy.yaml", "-o", digits / place)
    assert (ended.code, "Traceback" in ended.err) == (2, False)
    assert said in ended.err
    assert (digits / "pipe").is_fifo()


def full_disk(folder: Path, kib: int, model: str) -> str:
    """Compile over a previous output where files end at `kib` KiB; return what was said after nothing was changed."""
    (folder / "out.onnx").write_bytes(OLD)
    arguments = command(model, "-s", "tidy.yaml", "-o", "out.onnx", "--threads", 1)
    limited = f"ulimit -f {kib}; trap '' XFSZ; exec " + " ".join(arguments)
    ended = subprocess.run(
        ["bash", "-c", limited], cwd=folder, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False), ended.stderr
    assert (folder / "out.onnx").read_bytes() == OLD
    assert scratch_files(folder) == []
    assert not (folder / "out.onnx.evidence.json").exists()
    return ended.stderr


def test_full_disk_leaves_the_previous_output_whole(digits: Path) -> None:
    assert "out.onnx: cannot write: File too large" in full_disk(digits, 100, "digits.onnx")


def test_disk_that_is_full_for_the_evidence_only_leaves_the_previous_output_too(tmp_path: Path) -> None:
    onnx_io.save(mlp(0), tmp_path / "small.onnx")
    steps = ", ".join(["tidy-graph"] * 9)
    data = "data: {verification: {synthetic: {}, samples: 2}}"
    (tmp_path / "tidy.yaml").write_text(f"version: 1\n{data}\npasses: [{steps}]\n")
    assert "out.onnx.evidence.json: cannot write: File too large" in full_disk(tmp_path, 8, "small.onnx")


@pytest.mark.parametrize(
    ("option", "place", "said"),
    [
        ("--evidence", "out.onnx", "would be one file"),
        ("--evidence", "digits.onnx", "the evidence would overwrite the model"),
        ("--evidence", "verification.npz", "the evidence would overwrite the data"),
        ("--evidence", "/proc/e.json", "cannot write"),
        ("--dump", "digits.onnx", "cannot write: "),
        ("--dump", "/proc/steps", "cannot write: "),
        ("--dump", "link", "a dumped model would overwrite the model"),
    ],
)
def test_other_files_that_cannot_be_written_are_refused_before_any_work(
    digits: Path, run: Run, option: str, place: str, said: str
) -> None:
    (digits / "link").mkdir()
    (digits / "link" / "01-tidy-graph.onnx").symlink_to(digits / "digits.onnx")
    compiled(run, digits, 2, said, option, digits / place)
    onnx.checker.check_model(onnx.load(digits / "digits.onnx"))


def test_external_data_that_is_a_link_out_of_the_folder_says_so(digits: Path, run: Run) -> None:
    data = external(digits)
    data.rename(digits.parent / "elsewhere.bin")
    data.symlink_to(digits.parent / "elsewhere.bin")
    compiled(run, digits, 2, f"is a symlink to {(digits.parent / 'elsewhere.bin').resolve()}")


@pytest.mark.parametrize("option", ["-o", "--evidence"])
def test_outputs_never_overwrite_external_data(digits: Path, run: Run, option: str) -> None:
    data = external(digits)
    before = data.read_bytes()
    outputs = ["-o", data] if option == "-o" else ["-o", digits / "out.onnx", "--evidence", data]
    ended = run(digits / "digits.onnx", "-s", digits / "tidy.yaml", *outputs)
    assert ended.code == 2
    assert "would overwrite the model's external data `weights.bin`" in ended.err
    assert data.read_bytes() == before


def test_external_data_with_the_name_of_an_earlier_build_is_not_cleared_away(digits: Path, run: Run) -> None:
    model = onnx.load(digits / "digits.onnx")
    data = digits / "out.onnx.0123456789ab.data"
    onnx.save(model, digits / "digits.onnx", save_as_external_data=True, location=data.name, size_threshold=0)
    compiled(run, digits, 2, "would overwrite the model's external data")
    assert data.exists()


def test_evidence_never_overwrites_the_target(digits: Path, run: Run) -> None:
    text = (ROOT / "specs" / "targets" / "generic-cpu.yaml").read_text()
    (digits / "mine.yaml").write_text(text)
    (digits / "tidy.yaml").write_text(f"target: mine.yaml\n{(digits / 'tidy.yaml').read_text()}")
    compiled(run, digits, 2, "the evidence would overwrite the target", "--evidence", digits / "mine.yaml")
    assert (digits / "mine.yaml").read_text() == text


def test_output_never_overwrites_the_data(digits: Path, run: Run) -> None:
    before = (digits / "verification.npz").read_bytes()
    ended = run(digits / "digits.onnx", "-s", digits / "tidy.yaml", "-o", digits / "verification.npz")
    assert (ended.code, (digits / "verification.npz").read_bytes() == before) == (2, True)


def test_name_that_is_too_long_is_refused(digits: Path, run: Run) -> None:
    ended = run(digits / "digits.onnx", "-s", digits / "tidy.yaml", "-o", digits / ("a" * 250 + ".onnx"))
    assert (ended.code, "Traceback" in ended.err) == (2, False)
    assert "File name too long" in ended.err


# ---------------------------------------------------------------------------------------------- metrics and promises


def test_metric_gate_without_labels_is_refused(digits: Path, run: Run) -> None:
    changes = {"gates": {"metric": {"top1": {"drop": 0}}}, "data": {"verification": {"npz": "verification.npz"}}}
    compiled(run, digits, 2, "a metric needs labels", spec_name=write_spec(digits, changes))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("top2", "unknown metric `top2`"),
        ("nowhere:f", "No module named 'nowhere'"),
        ("metrics:none", "has no attribute 'none'"),
        ("metrics:NUMBER", "is not a function"),
        ("metrics:fails", "fails: ValueError: no"),
        ("metrics:asserts", "fails: AssertionError"),
        ("metrics:leaves", "fails: SystemExit"),
        ("metrics:text", "fails:"),
        ("broken:f", "metric `broken:f`"),
    ],
)
def test_metric_that_cannot_be_measured_is_refused(digits: Path, run: Run, name: str, said: str) -> None:
    (digits / "metrics.py").write_text(
        "NUMBER = 1\n\n\ndef fails(outputs, labels):\n    raise ValueError('no')\n\n\n"
        "def asserts(outputs, labels):\n    assert False\n\n\ndef text(outputs, labels):\n    return 'x'\n"
        "\n\ndef leaves(outputs, labels):\n    raise SystemExit(0)\n"
    )
    (digits / "broken.py").write_text("def f(:\n")
    changes: dict[str, object] = {"gates": {"metric": {name: {"min": 0}}}}
    compiled(run, digits, 2, said, spec_name=write_spec(digits, changes))


def test_metric_of_ones_own_is_measured(digits: Path, run: Run) -> None:
    (digits / "mine.py").write_text(
        "def share(outputs, labels):\n    return float((outputs['logits'].argmax(1) == labels).mean())\n"
    )
    changes: dict[str, object] = {"gates": {"metric": {"mine:share": {"min": 0.9}}}}
    compiled(run, digits, 0, "", spec_name=write_spec(digits, changes))


def test_broken_contract_tells_the_tolerance_that_passes(digits: Path, run: Run) -> None:
    name = write_spec(digits, {"passes": [SVD]})
    err = compiled(run, digits, 1, "left its tolerance", spec_name=name)
    found = evidence(digits)
    assert (found["verdict"], found["output"]) == ("failed", None)
    advised = re.search(r"`tolerance: (\{.*?\})`, which would have passed", err)
    assert advised is not None
    changed = {"split-svd": {**SVD["split-svd"], "tolerance": yaml.safe_load(advised[1])}}
    compiled(run, digits, 0, "", spec_name=write_spec(digits, {"passes": [changed]}))


@pytest.mark.parametrize("asked", ["atol", "rtol", "relative_l2", "cosine"])
def test_advised_tolerance_passes_for_every_kind_of_limit(digits: Path, run: Run, asked: str) -> None:
    strict = {"split-svd": {**SVD["split-svd"], "tolerance": {asked: 1 - 1e-9 if asked == "cosine" else 1e-9}}}
    err = compiled(run, digits, 1, "left its tolerance", spec_name=write_spec(digits, {"passes": [strict]}))
    advised = re.search(r"`tolerance: (\{.*?\})`, which would have passed", err)
    assert advised is not None
    changed = {"split-svd": {**SVD["split-svd"], "tolerance": yaml.safe_load(advised[1])}}
    compiled(run, digits, 0, "", spec_name=write_spec(digits, {"passes": [changed]}))


def test_broken_gate_is_named_in_the_evidence(digits: Path, run: Run) -> None:
    compiled(run, digits, 1, "gate stored_bytes: ", spec_name=write_spec(digits, {"gates": {"stored_bytes": 0.5}}))
    gates = evidence(digits)["gates"]
    assert isinstance(gates, list)
    assert [(gate["name"], gate["holds"]) for gate in gates] == [("stored_bytes", False)]


def test_broken_step_is_reverted_where_the_spec_says_so(digits: Path, run: Run) -> None:
    step = {"split-svd": {**SVD["split-svd"], "on_violation": "revert"}}
    compiled(run, digits, 0, "", spec_name=write_spec(digits, {"passes": ["tidy-graph", step]}))
    steps = evidence(digits)["steps"]
    assert isinstance(steps, list)
    assert [step["verdict"] for step in steps] == ["kept", "reverted"]
    assert "left its tolerance" in steps[1]["reason"]


def test_selector_that_names_no_node_is_refused(digits: Path, run: Run) -> None:
    step = {"split-svd": {**SVD["split-svd"], "only": ["/nowhere"]}}
    compiled(run, digits, 2, "`only: /nowhere` names no node", spec_name=write_spec(digits, {"passes": [step]}))


# ---------------------------------------------------------------------------------------------- damage by chance


def damaged(draw: random.Random, content: bytes) -> bytes:
    """Flip bits, cut, insert, zero a range, or hit the headers."""
    found, way = bytearray(content), draw.randrange(5)
    at = draw.randrange(len(found))
    if way == 0:
        for _ in range(draw.choice([1, 1, 3, 20])):
            found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
    elif way == 1:
        del found[at:]
    elif way == 2:
        found[at:at] = draw.randbytes(draw.randrange(1, 64))
    elif way == 3:
        count = min(draw.randrange(1, 4096), len(found) - at)
        found[at : at + count] = bytes(count)
    else:
        start = draw.choice([0, max(0, len(found) - 8000)])
        for _ in range(draw.choice([1, 2, 5])):
            found[min(start + draw.randrange(8000), len(found) - 1)] = draw.randrange(256)
    return bytes(found)


def loads(path: Path) -> bool:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001  (any refusal counts)
        return False
    return True


def test_damaged_models_are_refused_or_still_run(digits: Path, run: Run) -> None:
    content = (digits / "digits.onnx").read_bytes()
    model, out = digits / "damaged.onnx", digits / "out.onnx"
    codes = set()
    for seed in range(200):
        model.write_bytes(damaged(random.Random(seed), content))
        start = time.perf_counter()
        ended = run(model, "-s", digits / "tidy.yaml", "-o", out, "--threads", 1)
        assert time.perf_counter() - start < 20, seed
        assert ended.code in (0, 1, 2), (seed, ended.err)
        assert "Traceback" not in ended.err, (seed, ended.err)
        assert out.exists() is (ended.code == 0), seed
        assert ended.code != 0 or loads(model), seed
        assert scratch_files(digits) == [], seed
        out.unlink(missing_ok=True)
        codes.add(ended.code)
    assert codes >= {0, 2}


def test_small_models_with_damaged_fields_are_refused_or_still_run(tmp_path: Path, run: Run) -> None:
    content = ir.to_proto(mlp(0)).SerializeToString()
    (tmp_path / "s.yaml").write_text(
        "version: 1\ndata: {verification: {synthetic: {}, samples: 2}}\npasses: [tidy-graph]\n"
    )
    model, out = tmp_path / "damaged.onnx", tmp_path / "out.onnx"
    heads = [at for at in range(len(content)) if at < 40 or at > len(content) - 600]
    for seed in range(200):
        draw = random.Random(seed)
        found = bytearray(content)
        for _ in range(draw.choice([1, 1, 2])):
            found[draw.choice(heads)] = draw.choice([0, 1, 2, 7, 16, 127, 128, 255, draw.randrange(256)])
        model.write_bytes(found)
        ended = run(model, "-s", tmp_path / "s.yaml", "-o", out, "--threads", 1)
        assert ended.code in (0, 1, 2), (seed, ended.err)
        assert "Traceback" not in ended.err, (seed, ended.err)
        assert out.exists() is (ended.code == 0), seed
        out.unlink(missing_ok=True)


VALUES = "null -1 0 1e309 .nan .inf [] {} true '' x [1] 2 0.5 / ~ *x 2001-01-01".split() + ["9" * 400, "{a: b}"]
VALUES += ['"\\0"', '"\\ud800"', "!!int 3", "!!python/object:os.system x"]
SIGNS = list("{}[]:,-&*!|>#'\"%@`\t \x00é0aZ.~?\u2028\x85<=")


def mutated(draw: random.Random, text: str) -> str:
    """Delete, repeat or swap lines, change characters or values."""
    for _ in range(draw.choice([1, 1, 2, 4])):
        lines = text.splitlines()
        i, j, way = draw.randrange(len(lines)), draw.randrange(len(lines)), draw.randrange(5)
        if way == 0 and len(lines) > 1:
            del lines[i]
        elif way == 1:
            lines.insert(j, lines[i])
        elif way == 2:
            lines[i], lines[j] = lines[j], lines[i]
        elif way == 3 and lines[i]:
            at = draw.randrange(len(lines[i]))
            lines[i] = lines[i][:at] + draw.choice(SIGNS) + lines[i][at + draw.randrange(2) :]
        elif words := list(re.finditer(r"[^\s{}\[\],:#]+", lines[i])):
            word = draw.choice(words)
            lines[i] = lines[i][: word.start()] + draw.choice(VALUES) + lines[i][word.end() :]
        text = "\n".join(lines) + "\n"
    return text


def test_mutated_specs_are_refused_or_still_valid(digits: Path, run: Run) -> None:
    text, out = (digits / "spec.yaml").read_text().replace("samples: 512", "samples: 16"), digits / "out.onnx"
    path = digits / "mutated.yaml"
    codes = set()
    for seed in range(200):
        path.write_text(mutated(random.Random(seed), text), encoding="utf-8", newline="")
        start = time.perf_counter()
        ended = run(digits / "digits.onnx", "-s", path, "-o", out, "--threads", 1)
        assert time.perf_counter() - start < 20, seed
        assert ended.code in (0, 1, 2), (seed, ended.err)
        assert "Traceback" not in ended.err, (seed, ended.err)
        assert out.exists() is (ended.code == 0), seed
        try:
            spec.load(path)
        except CcompileError:
            assert ended.code == 2, seed
        out.unlink(missing_ok=True)
        codes.add(ended.code)
    assert codes >= {0, 2}


# ---------------------------------------------------------------------------------------------- as a process


@pytest.mark.parametrize(
    ("content", "code"), [(TIDY, 0), (TIDY + "gates: {stored_bytes: 0.1}\n", 1), (TIDY + "gate: {}\n", 2)]
)
def test_exit_code_of_the_process(digits: Path, content: str, code: int) -> None:
    (digits / "tidy.yaml").write_text(content)
    ended = spawn("digits.onnx", "-s", "tidy.yaml", "-o", "out.onnx", cwd=digits)
    assert (ended.code, (digits / "out.onnx").exists()) == (code, code == 0), ended.err
