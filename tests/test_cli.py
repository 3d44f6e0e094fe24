"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from blocks import same
from runs import ROOT, Ended, Run, command, environment, spawn

from ccompile import registry

HEAVY = ("numpy", "onnx", "onnxruntime", "onnx_ir", "pydantic", "rich", "scipy", "yaml")
EXAMPLES = sorted(path.parent for path in (ROOT / "examples").glob("*/README.md"))
COMMANDS = "bisect cache check compare compile diff inspect lint pack passes report schema target unpack".split()


def compile_to(run: Run, folder: Path, *extra: object, spec: str = "tidy.yaml") -> Ended:
    return run(folder / "digits.onnx", "-s", folder / spec, "-o", folder / "out.onnx", "--threads", 1, *extra)


# ---------------------------------------------------------------------------------------------- help


def test_help_imports_nothing_heavy() -> None:
    program = f"import sys, ccompile.cli; print([name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_lists_every_command(run: Run, option: str) -> None:
    ended = run(option)
    assert (ended.code, ended.err) == (0, "")
    assert "ccompile MODEL -s SPEC -o OUT" in ended.out
    assert re.findall(r"^  (\w+)  ", ended.out, re.MULTILINE) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(run: Run, name: str) -> None:
    assert run(name, "--help").code == 0


@pytest.mark.parametrize(
    "arguments", [["--nope"], ["m.onnx"], ["compile"], ["check", "a.onnx"], ["diff"], ["a", "--seed", "x"]]
)
def test_wrong_command_line_exits_2(run: Run, arguments: list[str]) -> None:
    ended = run(*arguments)
    assert (ended.code, "Traceback" in ended.err) == (2, False)


def test_no_arguments_show_the_help(run: Run) -> None:
    assert "ccompile MODEL -s SPEC -o OUT" in "".join(vars(run()).get(name, "") for name in ("out", "err"))


# ---------------------------------------------------------------------------------------------- compile


def test_compile_is_the_default_command(digits: Path, run: Run) -> None:
    ended = run("compile", digits / "digits.onnx", "-s", digits / "tidy.yaml", "-o", digits / "named.onnx")
    assert ended.code == compile_to(run, digits).code == 0
    assert (digits / "named.onnx").read_bytes() == (digits / "out.onnx").read_bytes()


def test_options_may_come_first(digits: Path, run: Run) -> None:
    assert run("-s", digits / "tidy.yaml", "-o", digits / "out.onnx", digits / "digits.onnx").code == 0


def test_quiet_prints_nothing_when_all_holds(digits: Path, run: Run) -> None:
    assert compile_to(run, digits, "-q") == Ended(0, "", "")


def test_quiet_packing_prints_nothing(digits: Path, run: Run) -> None:
    packed = digits / "digits.ccz"
    assert run("pack", digits / "digits.onnx", "-o", packed, "-q") == Ended(0, "", "")
    assert run("unpack", packed, "-o", digits / "again.onnx", "-q") == Ended(0, "", "")
    assert (digits / "again.onnx").read_bytes() == (digits / "digits.onnx").read_bytes()


def test_quiet_still_tells_what_broke(digits: Path, run: Run) -> None:
    ended = compile_to(run, digits, "-q", "--set", "gates.stored_bytes=0.1")
    assert (ended.code, ended.out) == (1, "")
    assert "gate stored_bytes" in ended.err


def test_success_prints_the_table_to_stdout_and_nothing_to_stderr(digits: Path, run: Run) -> None:
    ended = compile_to(run, digits)
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"^1 tidy-graph +kept", ended.out, re.MULTILINE)


def test_verbose_lists_every_site_and_every_skip_with_its_reason(digits: Path, run: Run) -> None:
    out = compile_to(run, digits, "-v", spec="spec.yaml").out
    steps = json.loads((digits / "out.onnx.evidence.json").read_text())["steps"]
    skips = [(step["index"], step["name"], skip) for step in steps for skip in step["skipped"]]
    assert len(skips) > 3
    for index, name, skip in skips:
        assert skip["reason"]
        assert f"step {index} {name}: left alone {skip['node']}: {skip['reason']}" in out
    assert "step 3 split-svd: /head/hidden/V, /head/hidden/U: rank 10 of 64" in out


@pytest.mark.parametrize("changes", [{}, {"NO_COLOR": "1"}, {"TERM": "xterm-256color", "COLORTERM": "truecolor"}])
def test_no_colours_without_a_terminal(digits: Path, changes: dict[str, str]) -> None:
    ended = spawn("digits.onnx", "-s", "tidy.yaml", "-o", "out.onnx", cwd=digits, **changes)
    assert ended.code == 0
    assert "\x1b" not in ended.out + ended.err


@pytest.mark.parametrize(("changes", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_terminal_has_colours_unless_told_not_to(digits: Path, changes: dict[str, str], coloured: bool) -> None:
    ours, theirs = os.openpty()
    environ = {k: v for k, v in environment(TERM="xterm-256color", COLUMNS="200").items() if k != "NO_COLOR"} | changes
    arguments = command("digits.onnx", "-s", "tidy.yaml", "-o", "out.onnx")
    process = subprocess.Popen(arguments, stdout=theirs, stderr=theirs, env=environ, cwd=digits)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal on Linux says that it was closed
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert process.wait(60) == 0
    assert b"tidy-graph" in shown
    assert bool(re.search(rb"\x1b\[[0-9;]*3[0-9]m", shown)) is coloured


@pytest.mark.parametrize(("gate", "code"), [("2", 0), ("0.1", 1)])
@pytest.mark.parametrize("where", [">&-", "2>&- >&-", "| true; exit ${PIPESTATUS[0]}"])
def test_verdict_stands_when_nobody_reads(digits: Path, gate: str, code: int, where: str) -> None:
    arguments = command("digits.onnx", "-s", "tidy.yaml", "-o", "out.onnx", "--set", f"gates.stored_bytes={gate}")
    ended = subprocess.run(
        ["bash", "-c", shlex.join(arguments) + " " + where], cwd=digits, env=environment(), check=False
    )
    assert ended.returncode == code


def test_full_standard_output_is_no_bug_of_ours(digits: Path) -> None:
    with open("/dev/full", "w") as full:
        arguments = command("passes")
        ended = subprocess.run(
            arguments, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), check=False
        )
    assert (ended.returncode, ended.stderr) == (2, "error: standard output: No space left on device\n")


def test_dump_writes_a_model_per_step(digits: Path, run: Run) -> None:
    assert compile_to(run, digits, "--dump", digits / "a" / "steps", spec="spec.yaml").code == 0
    names = [path.name for path in sorted((digits / "a" / "steps").iterdir())]
    assert names == ["01-tidy-graph.onnx", "02-fold-batchnorm.onnx", "03-split-svd.onnx"]
    for name in names:
        onnx.checker.check_model(onnx.load(digits / "a" / "steps" / name))


def test_evidence_goes_where_it_is_told_to(digits: Path, run: Run) -> None:
    assert compile_to(run, digits, "--evidence", digits / "e.json").code == 0
    assert json.loads((digits / "e.json").read_text())["verdict"] == "ok"
    assert not (digits / "out.onnx.evidence.json").exists()


def test_same_inputs_give_the_same_bytes(digits: Path, run: Run) -> None:
    models, records = [], []
    for _ in range(2):
        assert compile_to(run, digits, spec="spec.yaml").code == 0
        models.append((digits / "out.onnx").read_bytes())
        record = json.loads((digits / "out.onnx.evidence.json").read_text())
        assert record.pop("timing")
        records.append(json.dumps(record))
    assert models[0] == models[1]
    assert records[0] == records[1]


def test_seed_is_recorded(digits: Path, run: Run) -> None:
    assert compile_to(run, digits, "--seed", 7).code == 0
    assert json.loads((digits / "out.onnx.evidence.json").read_text())["seed"] == 7


def test_set_changes_the_spec(digits: Path, run: Run) -> None:
    assert compile_to(run, digits, "--set", "data.verification.samples=9").code == 0
    assert json.loads((digits / "out.onnx.evidence.json").read_text())["verification"]["samples"] == 9


# ---------------------------------------------------------------------------------------------- passes, schema


def test_passes_are_listed(run: Run) -> None:
    ended = run("passes")
    assert ended.code == 0
    assert re.findall(r"^([a-z0-9-]+) +(?:exact|bounded|lossy) ", ended.out, re.MULTILINE) == list(registry.passes())


@pytest.mark.parametrize("name", sorted(registry.passes()))
def test_page_of_a_pass_names_every_option(run: Run, name: str) -> None:
    ended = run("passes", name)
    assert ended.code == 0
    assert all(f"  {option}: " in ended.out for option in registry.find(name).model_fields)


def test_unknown_pass_suggests_the_nearest(run: Run) -> None:
    ended = run("passes", "tidy-grap")
    assert ended.code == 2
    assert "Did you mean `tidy-graph`?" in ended.err


def test_passes_and_schema_are_json(run: Run) -> None:
    assert list(json.loads(run("passes", "--json").out)) == list(registry.passes())
    assert json.loads(run("schema").out)["title"] == "ccompile spec"


def test_a_misspelt_command_names_the_nearest(digits: Path, run: Run) -> None:
    ended = run("insepct", digits / "digits.onnx")
    assert ended.code == 2
    assert "Did you mean `inspect`?" in ended.err


# ---------------------------------------------------------------------------------------------- inspect


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_example_can_be_inspected(run: Run, example: Path) -> None:
    models = sorted(example.glob("*.onnx"))
    for model in models:
        assert run("inspect", model).code == 0
        nodes = json.loads(run("inspect", model, "--json").out)["cost"]["nodes"]
        assert len(nodes) == len(onnx.load(model).graph.node)


def test_inspecting_what_is_no_model_exits_2(digits: Path, run: Run) -> None:
    assert run("inspect", digits / "spec.yaml").code == 2


def test_inspecting_for_an_unknown_target_suggests_one(digits: Path, run: Run) -> None:
    ended = run("inspect", digits / "digits.onnx", "--target", "generic-cp")
    assert ended.code == 2
    assert "Did you mean `generic-cpu`?" in ended.err


# ---------------------------------------------------------------------------------------------- diff, check


def test_limits_that_promise_nothing_are_refused_in_the_words_of_a_spec(digits: Path, run: Run) -> None:
    model = digits / "digits.onnx"
    ended = run("check", model, "--against", model, "--atol", "-1", "--relative-l2", "nan", "--cosine", "1")
    assert ended.code == 2
    assert ended.err.splitlines() == [
        "error: --atol: should be greater than or equal to 0, got `-1.0`",
        "  `atol`: largest absolute difference of an element (>= 0).",
        "--relative-l2: should be a finite number, got `.nan`",
        "  `relative_l2`: |a - b| / |b| over all elements of an output (>= 0).",
    ]


def test_diff_of_a_model_with_itself_says_equal(digits: Path, run: Run) -> None:
    ended = run("diff", digits / "digits.onnx", digits / "digits.onnx")
    assert ended.code == 0
    assert "The graphs are equal." in ended.out


def test_diff_of_models_with_other_inputs_shows_the_graphs(digits: Path, run: Run) -> None:
    model = onnx.load(digits / "digits.onnx")
    name = model.graph.input[0].name
    model.graph.input[0].name = "other"
    for node in model.graph.node:
        node.input[:] = ["other" if read == name else read for read in node.input]
    onnx.save(model, digits / "other.onnx")
    ended = run("diff", digits / "digits.onnx", digits / "other.onnx")
    assert (ended.code, ended.err) == (0, "")
    assert "interface" in ended.out
    assert "outputs cannot be compared: " in ended.out


def test_diff_is_json(digits: Path, run: Run) -> None:
    compile_to(run, digits)
    found = json.loads(run("diff", digits / "digits.onnx", digits / "out.onnx", "--json").out)
    assert {change["kind"] for change in found["changes"]} >= {"removed"}
    assert found["outputs"]["samples"] == 16


def test_check_exits_0_within_the_tolerance_and_1_outside(digits: Path, run: Run) -> None:
    compile_to(run, digits, spec="spec.yaml")
    against = (digits / "out.onnx", "--against", digits / "digits.onnx", "--data", digits / "verification.npz")
    assert run("check", *against, "--argmax", "0.98").code == 0
    strict = run("check", *against)
    assert strict.code == 1
    assert "output `logits`: relative_l2" in strict.err
    limit = re.search(r"relative_l2: ([\d.e-]+)", strict.err)
    assert limit is not None
    assert run("check", *against, "--relative-l2", limit[1]).code == 0


def test_check_is_json_whatever_the_verdict(digits: Path, run: Run) -> None:
    compile_to(run, digits, spec="spec.yaml")
    for arguments, holds in ((["--argmax", "0.5"], True), (["--atol", "0"], False)):
        ended = run("check", digits / "out.onnx", "--against", digits / "digits.onnx", "--json", *arguments)
        assert json.loads(ended.out)["holds"] is holds
        assert ended.code == (0 if holds else 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ["missing.onnx", "--against", "digits.onnx"],
        ["digits.onnx", "--against", "spec.yaml"],
        ["digits.onnx", "--against", "digits.onnx", "--data", "missing.npz"],
        ["digits.onnx", "--against", "digits.onnx", "--data", "spec.yaml"],
        ["digits.onnx", "--against", "digits.onnx", "--argmax", "2"],
        ["digits.onnx", "--against", "digits.onnx", "--atol", "nan"],
        ["digits.onnx", "--against", "digits.onnx", "--shape", "image=1,x"],
        ["digits.onnx", "--against", "digits.onnx", "--shape", "nope=1,1,8,8"],
        ["digits.onnx", "--against", "digits.onnx", "--samples", "0"],
    ],
    ids=" ".join,
)
def test_check_exits_2_when_it_cannot_compare(
    digits: Path, run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(digits)
    ended = run("check", *arguments)
    assert (ended.code, "Traceback" in ended.err) == (2, False), ended.err


# ---------------------------------------------------------------------------------------------- examples


def test_the_pruning_spec_of_the_readme_gives_the_rows_shown(digits: Path, run: Run) -> None:
    story = (ROOT / "README.md").read_text().partition("## Halve a network by channels")[2].partition("\n## ")[0]
    (spec,) = re.findall(r"```yaml\n(.*?)```", story, re.DOTALL)
    (rows,) = re.findall(r"```text\n(.*?)```", story, re.DOTALL)
    (digits / "prune.yaml").write_text(spec)
    ended = run(digits / "digits.onnx", "-s", digits / "prune.yaml", "-o", digits / "half.onnx", "-v", "--threads", 1)
    assert ended.code == 0, ended.err
    header, source, pruned = rows.strip().splitlines()
    printed = [" ".join(line.split()) for line in ended.out.splitlines()]
    assert {" ".join(header.split()), " ".join(source.split())} <= set(printed)
    assert any(same(pruned.split(), line.split()) for line in printed), printed
    assert any("calibrated on 256 samples" in line for line in printed)
    assert any(re.search(r"/stage1/block1/conv1: \d+ of 16 units kept", line) for line in printed)


# ---------------------------------------------------------------------------------------------- pack, unpack


def test_a_packed_model_comes_back(digits: Path, run: Run) -> None:
    ended = run("pack", digits / "digits.onnx", "-o", digits / "digits.ccz")
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"digits\.ccz: \S+ kB, 1\.\d+x smaller than its [\d,]+ weights as float32", ended.out)
    ended = run("unpack", digits / "digits.ccz", "-o", digits / "back.onnx")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"{digits / 'back.onnx'}: ")
    assert (digits / "back.onnx").read_bytes() == (digits / "digits.onnx").read_bytes()


def test_the_account_of_a_packed_model_is_data(digits: Path, run: Run) -> None:
    model = digits / "digits.onnx"
    ended = run("pack", model, "-o", digits / "digits.ccz", "--against", model, "--json")
    account = json.loads(ended.out)
    assert account["bytes_packed"] == (digits / "digits.ccz").stat().st_size
    assert account["ratio"] == 4 * account["weights"] / account["bytes_packed"]
    assert {tensor["dtype"] for tensor in account["tensors"]} == {"FLOAT"}


def test_a_damaged_packed_model_exits_2_and_writes_nothing(digits: Path, run: Run) -> None:
    run("pack", digits / "digits.onnx", "-o", digits / "digits.ccz")
    data = (digits / "digits.ccz").read_bytes()
    (digits / "digits.ccz").write_bytes(data[:-1])
    ended = run("unpack", digits / "digits.ccz", "-o", digits / "back.onnx")
    assert (ended.code, ended.out) == (2, "")
    assert "digits.ccz: the packed model is damaged" in ended.err
    assert not (digits / "back.onnx").exists()


def test_a_model_beyond_the_limit_exits_2(digits: Path, run: Run) -> None:
    run("pack", digits / "digits.onnx", "-o", digits / "digits.ccz")
    ended = run("unpack", digits / "digits.ccz", "-o", digits / "back.onnx", "--limit", 1000)
    assert ended.code == 2
    assert "more than 1,000" in ended.err


@pytest.mark.parametrize("output", ["digits.onnx", "no/such/folder/digits.ccz", "."])
def test_an_impossible_output_of_pack_exits_2(digits: Path, run: Run, output: str) -> None:
    before = (digits / "digits.onnx").read_bytes()
    assert run("pack", digits / "digits.onnx", "-o", digits / output).code == 2
    assert (digits / "digits.onnx").read_bytes() == before
