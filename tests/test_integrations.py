"""The integrations, run: Make, CMake, and the steps of CI jobs, on their own examples."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from runs import ROOT, TIDY, Run, command, environment

from ccompile import depfile, metrics
from ccompile.request import Request
from ccompile.spec import load

INTEGRATIONS = ROOT / "integrations"


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip, with the reason, where a program is missing; `.ci/run` installs them all."""
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)} (Debian: {' '.join(missing)})")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the integrations and of the example that they compile, with `ccompile` in `bin`."""
    for name in ("integrations", "examples/01_digits"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("build"))
    write_program(
        tmp_path / "bin" / "ccompile", f'echo ran >> "{tmp_path}/ran"\nexec {sys.executable} -m ccompile "$@"\n'
    )
    return tmp_path


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def call(tree: Path, folder: Path, *arguments: object, code: int = 0, **more: str) -> tuple[str, int]:
    """Run a program; return what it printed, and how often it ran ccompile."""
    (tree / "ran").unlink(missing_ok=True)
    path = f"{tree / 'bin'}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=folder,
        env=environment(PATH=path, OMP_NUM_THREADS="1", **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert ended.returncode == code, ended.stdout
    ran = (tree / "ran").read_text().count("ran") if (tree / "ran").exists() else 0
    return ended.stdout, ran


def change_model(path: Path) -> None:
    model = onnx.load(path)
    model.doc_string = "changed"
    onnx.save(model, path)


def change_data(path: Path) -> None:
    with np.load(path) as held:
        np.savez(path, **{name: held[name][::-1] for name in held})


def change_spec(path: Path) -> None:
    path.write_text(path.read_text().replace("samples: 32", "samples: 16"))


# ---------------------------------------------------------------------------------------------- make


@needs("make")
def test_make_compiles_once_and_again_when_model_spec_or_data_change(tree: Path) -> None:
    folder, digits = tree / "integrations/make/example", tree / "examples/01_digits"
    assert call(tree, folder, "make")[1] == 1
    assert call(tree, folder, "make")[1] == 0
    assert (folder / "build/digits.onnx").stat().st_size > 0
    change_model(digits / "digits.onnx")
    assert call(tree, folder, "make")[1] == 1
    change_spec(folder / "specs/digits.yaml")
    assert call(tree, folder, "make")[1] == 1
    change_data(digits / "verification.npz")
    assert call(tree, folder, "make")[1] == 1
    assert call(tree, folder, "make")[1] == 0


@needs("make")
def test_make_stops_at_a_broken_gate_and_keeps_the_previous_model(tree: Path) -> None:
    folder = tree / "integrations/make/example"
    call(tree, folder, "make")
    before = (folder / "build/digits.onnx").read_bytes()
    spec = folder / "specs/digits.yaml"
    spec.write_text(spec.read_text() + "gates: {macs: 0.1}\n")
    said, _ = call(tree, folder, "make", code=2)
    assert "gate macs" in said
    assert (folder / "build/digits.onnx").read_bytes() == before
    call(tree, folder, "make", code=2)  # and stops again: nothing took the failure for a success


@needs("make")
def test_make_goes_on_when_a_file_of_the_data_is_gone_that_the_spec_names_no_more(tree: Path) -> None:
    folder, digits = tree / "integrations/make/example", tree / "examples/01_digits"
    call(tree, folder, "make")
    (digits / "verification.npz").rename(digits / "other.npz")
    spec = folder / "specs/digits.yaml"
    spec.write_text(spec.read_text().replace("verification.npz", "other.npz"))
    assert call(tree, folder, "make")[1] == 1


# ---------------------------------------------------------------------------------------------- cmake


@pytest.mark.parametrize(
    "generator",
    [
        pytest.param("Ninja", marks=needs("cmake", "ninja")),
        pytest.param("Unix Makefiles", marks=needs("cmake", "make")),
    ],
)
def test_cmake_compiles_once_and_again_when_model_spec_or_data_change(tree: Path, generator: str) -> None:
    folder, digits = tree / "integrations/cmake/example", tree / "examples/01_digits"
    call(tree, folder, "cmake", "-B", "build", "-G", generator)
    build = ["cmake", "--build", "build", "--parallel", "2"]
    assert call(tree, folder, *build)[1] == 2
    assert call(tree, folder, *build)[1] == 0
    assert {path.name for path in (folder / "build").glob("small*")} >= {"small.onnx", "small.html"}
    change_spec(folder / "small.yaml")
    assert call(tree, folder, *build)[1] == 1
    if generator != "Ninja":
        return  # the rest is the same module
    change_data(digits / "verification.npz")
    assert call(tree, folder, *build)[1] == 2
    change_model(digits / "digits.onnx")
    assert call(tree, folder, *build)[1] == 2
    assert call(tree, folder, *build)[1] == 0
    call(tree, folder, "cmake", "--install", "build", "--prefix", folder / "installed")
    assert (folder / "installed/share/models/small.onnx").exists()


@needs("cmake", "ninja")
def test_cmake_stops_at_a_broken_gate(tree: Path) -> None:
    folder = tree / "integrations/cmake/example"
    (folder / "small.yaml").write_text((folder / "small.yaml").read_text() + "gates: {macs: 0.1}\n")
    call(tree, folder, "cmake", "-B", "build", "-G", "Ninja")
    said, _ = call(tree, folder, "cmake", "--build", "build", "--target", "small", code=1)
    assert "gate macs" in said
    assert not (folder / "build/small.onnx").exists()


@needs("cmake", "ninja")
def test_cmake_holds_a_model_to_its_lock(tree: Path) -> None:
    folder = tree / "integrations/cmake/example"
    digits = "../../../examples/01_digits/digits.onnx"
    call(
        tree,
        folder,
        "ccompile",
        digits,
        "-s",
        "folded.yaml",
        "-o",
        "folded.onnx",
        "-q",
        "--lock",
        "--lock-file",
        "lock",
    )
    text = (folder / "CMakeLists.txt").read_text().replace("folded.yaml", "folded.yaml LOCK lock")
    (folder / "CMakeLists.txt").write_text(text)
    call(tree, folder, "cmake", "-B", "build", "-G", "Ninja")
    call(tree, folder, "cmake", "--build", "build", "--target", "folded")
    change_spec(folder / "folded.yaml")
    said, _ = call(tree, folder, "cmake", "--build", "build", "--target", "folded", code=1)
    assert "the spec has moved" in said


@needs("cmake", "ninja")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ccompile_add_model(a SPEC folded.yaml)", "SOURCE is missing"),
        ("ccompile_add_model(a SOURCE a.onnx SPEC folded.yaml SPECK b)", "unknown arguments: "),
    ],
)
def test_cmake_refuses_wrong_arguments(tree: Path, line: str, said: str) -> None:
    folder = tree / "integrations/cmake/example"
    with (folder / "CMakeLists.txt").open("a") as out:
        out.write(line + "\n")
    assert said in call(tree, folder, "cmake", "-B", "build", "-G", "Ninja", code=1)[0]


# ---------------------------------------------------------------------------------------------- dependency files


def request(folder: Path, text: str) -> Request:
    (folder / "spec.yaml").write_text(text)
    return Request(folder / "model.onnx", load(folder / "spec.yaml"), folder / "out.onnx")


def test_a_depfile_names_everything_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("images/a b.png", "labels.csv", "mine.py", "other.py", "machine.yaml"):
        (tmp_path / name).write_text("")
    target = yaml.safe_load((ROOT / "specs/targets/generic-cpu.yaml").read_text())
    (tmp_path / "machine.yaml").write_text(yaml.safe_dump(target))
    asked = request(
        tmp_path,
        "{version: 1, target: machine.yaml, passes: [tidy-graph], gates: {metric: {'mine:f': {drop: 1}}}, data: {"
        "verification: {images: images, labels: labels.csv, preprocess: {}}, calibration: {npz: calibration.npz}}}",
    )
    found = depfile.text(asked, [tmp_path / "model.data"])
    rule = found.partition(":")[2].partition("\n\n")[0]
    for (
        name
    ) in "model.onnx model.data spec.yaml machine.yaml images calibration.npz labels.csv mine.py other.py".split():
        assert f"{tmp_path / name}" in rule
    assert rf"{tmp_path}/images/a\ b.png" in rule
    assert found.startswith(f"{tmp_path / 'out.onnx'}: ")
    assert metrics.files_of("mine:f", tmp_path) == [tmp_path / "mine.py", tmp_path / "other.py"]


def test_a_depfile_is_written_with_the_model_and_from_the_cache(digits: Path, run: Run) -> None:
    texts = []
    for _ in range(2):
        ended = run(
            digits / "digits.onnx", "-s", digits / "tidy.yaml", "-o", digits / "o.onnx", "--depfile", digits / "o.d"
        )
        assert ended.code == 0
        texts.append((digits / "o.d").read_text())
        (digits / "o.d").unlink()
    assert texts[0] == texts[1]
    assert str(digits / "verification.npz") in texts[0]


def test_a_failed_compile_writes_no_depfile(digits: Path, run: Run) -> None:
    (digits / "tidy.yaml").write_text((digits / "tidy.yaml").read_text() + "gates: {macs: 0.1}\n")
    given = (digits / "digits.onnx", "-s", digits / "tidy.yaml", "-o", digits / "o.onnx", "--depfile", digits / "o.d")
    assert run(*given).code == 1
    assert not (digits / "o.d").exists()


# ---------------------------------------------------------------------------------------------- GitHub, GitLab


class Action:
    """The action's steps, run in a folder as a workflow would: what uses other actions is left out."""

    def __init__(self, tree: Path, folder: Path, **given: str) -> None:
        self.tree, self.folder = tree, folder
        self.action = yaml.safe_load((INTEGRATIONS / "github/action.yml").read_text())
        known = self.action["inputs"]
        assert given.keys() <= known.keys()
        missing = [name for name, entry in known.items() if entry.get("required") and name not in given]
        assert not missing
        self.values = {f"inputs.{name}": str(entry.get("default", "")) for name, entry in known.items()}
        self.values |= {f"inputs.{name}": value for name, value in given.items()}
        self.values |= {"github.event.pull_request.number": "7", "github.repository": "me/mine"}

    def expanded(self, text: str) -> str:
        return re.sub(r"\$\{\{ *([\w.-]+) *\}\}", lambda found: self.values.get(found[1], "token"), text)

    def run(self, name: str, code: int = 0) -> str:
        (step,) = (step for step in self.action["runs"]["steps"] if step["name"] == name)
        assert step["shell"] == "bash"
        changes = {key: self.expanded(value) for key, value in step["env"].items()}
        files = {"GITHUB_OUTPUT": str(self.folder / "output"), "GITHUB_STEP_SUMMARY": str(self.folder / "summary")}
        script = ("bash", "-e", "-o", "pipefail", "-c", step["run"])
        return call(self.tree, self.folder, *script, code=code, **changes, **files)[0]


def test_the_actions_steps_compile_compare_and_comment(tree: Path) -> None:
    folder = tree / "examples/01_digits"
    write_program(tree / "bin" / "gh", f'echo "$@" > {tree}/gh\n')
    text = (tree / "integrations/cmake/example/small.yaml").read_text()
    (folder / "a.yaml").write_text(text.replace("../../../examples/01_digits/", ""))
    (folder / "b.yaml").write_text((folder / "a.yaml").read_text().replace("rank: 10", "rank: 8"))
    call(tree, folder, "ccompile", "digits.onnx", "-s", "a.yaml", "-o", "base.onnx", "-q")
    given = {"model": "digits.onnx", "spec": "b.yaml", "output": "out.onnx", "baseline": "base.onnx.evidence.json"}
    action = Action(tree, folder, **given, options="--threads 1")
    action.run("Compile")
    assert (folder / "output").read_text() == "evidence=out.onnx.evidence.json\n"
    action.run("Compare")
    action.run("Comment")
    text = (folder / "out.onnx.comparison.md").read_text()
    assert "|" in text
    assert text in (folder / "summary").read_text()
    assert (tree / "gh").read_text() == "pr comment 7 --body-file out.onnx.comparison.md\n"
    upload = action.action["runs"]["steps"][-1]
    for name in action.expanded(upload["with"]["path"]).split():
        assert (folder / name).exists(), name
    strict = Action(tree, folder, **given, **{"fail-on": "choices"})
    strict.run("Compare", code=1)


def test_the_action_fails_with_the_gate_and_still_writes_what_is_uploaded(tree: Path) -> None:
    folder = tree / "examples/01_digits"
    (folder / "tidy.yaml").write_text(TIDY + "gates: {macs: 0.1}\n")
    action = Action(tree, folder, model="digits.onnx", spec="tidy.yaml", baseline="nowhere.json")
    assert "gate macs" in action.run("Compile", code=1)
    assert "nothing to compare" in action.run("Compare")
    assert "<failure" in (folder / "compiled.onnx.junit.xml").read_text()
    assert (folder / "compiled.onnx.html").exists()


def test_the_workflow_gives_the_action_inputs_that_it_takes() -> None:
    workflow = yaml.safe_load((INTEGRATIONS / "github/ccompile.yml").read_text())
    known = yaml.safe_load((INTEGRATIONS / "github/action.yml").read_text())["inputs"]
    (given,) = (s["with"] for s in workflow["jobs"]["compile"]["steps"] if "integrations" in s.get("uses", ""))
    assert given.keys() <= known.keys()


def test_the_gitlab_job_runs_its_script(tree: Path) -> None:
    folder = tree / "examples/01_digits"
    job = yaml.safe_load((INTEGRATIONS / "gitlab/ccompile.gitlab-ci.yml").read_text())[".ccompile"]
    mine = yaml.safe_load((INTEGRATIONS / "gitlab/example.gitlab-ci.yml").read_text())["digits"]
    assert mine["extends"] == ".ccompile"
    (folder / "spec.yaml").write_text(TIDY)
    call(tree, folder, "ccompile", "digits.onnx", "-s", "spec.yaml", "-o", "baseline", "-q")
    variables = {**job["variables"], **mine["variables"]}
    call(tree, folder, "bash", "-e", "-o", "pipefail", "-c", "\n".join(job["script"]), **variables)
    named = [*job["artifacts"]["paths"], job["artifacts"]["reports"]["junit"]]
    for name in named:
        assert (folder / name.replace("$OUTPUT", variables["OUTPUT"])).exists(), name


# ---------------------------------------------------------------------------------------------- lint, pre-commit


def hooks() -> dict[str, Any]:
    return {hook["id"]: hook for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}


def test_the_hooks_run_as_the_example_has_them(digits: Path, run: Run) -> None:
    used = yaml.safe_load((INTEGRATIONS / "pre-commit/example.yaml").read_text())["repos"][0]["hooks"]
    assert run(digits / "digits.onnx", "-s", digits / "tidy.yaml", "-o", digits / "small.onnx", "-q").code == 0
    (digits / "spec.yaml").write_text((digits / "tidy.yaml").read_text())
    for hook in used:
        entry = hooks()[hook["id"]]["entry"].split()
        assert entry[0] == "ccompile"
        files = ["spec.yaml"] if hooks()[hook["id"]].get("pass_filenames", True) else []
        line = command(*entry[1:], *hook.get("args", []), *files)
        ended = subprocess.run(line, cwd=digits, env=environment(), capture_output=True, text=True)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("name", "taken"), [("spec.yaml", True), ("a/edge.ccompile.yml", True), ("ci.yaml", False), ("myspec.yaml", False)]
)
def test_the_lint_hook_takes_specs(name: str, taken: bool) -> None:
    assert (re.search(hooks()["ccompile-lint"]["files"], name) is not None) == taken


def test_lint_tells_all_mistakes_of_all_specs(tmp_path: Path, run: Run) -> None:
    texts = {
        "good.yaml": "version: 1\npasses: [tidy-graph]\n",
        "first.yaml": "version: 1\npasses: [tidy-grap, fold-batchnom]\n",
        "second.yaml": "version: 2\npasses: [tidy-graph]\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    ended = run("lint", *(tmp_path / name for name in texts))
    assert ended.code == 2
    assert ended.out == f"{tmp_path / 'good.yaml'}: 1 step for generic-cpu\n"
    for said in ("first.yaml:2:10", "first.yaml:2:21", "second.yaml:1:10"):
        assert said in ended.err


def test_lint_is_quiet_about_specs_without_mistakes(tmp_path: Path, run: Run) -> None:
    (tmp_path / "good.yaml").write_text("version: 1\npasses: [tidy-graph]\n")
    ended = run("lint", "-q", tmp_path / "good.yaml")
    assert (ended.code, ended.out, ended.err) == (0, "", "")
