"""The Python API: models and data as files or in memory, results by name, errors as the command line's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import builders
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from runs import ROOT, Run, environment

import ccompile
from ccompile import onnx_io
from ccompile.errors import ContractError, DataError, ModelError, SpecError

TIDY: dict[str, Any] = {"version": 1, "passes": ["tidy-graph"]}
SVD: dict[str, Any] = {"split-svd": {"rank": 2, "only": ["fc2"], "statistics": "weights"}}
X = np.random.default_rng(0).standard_normal((16, 12)).astype(np.float32)
LABELLED: dict[str, Any] = {"verification": {"npz": {"x": X, "label": np.arange(16) % 5}, "labels": "label"}}


def model(seed: int = 0) -> onnx.ModelProto:
    return ir.to_proto(builders.mlp(seed))


def lossy(tolerance: float) -> dict[str, Any]:
    return {"version": 1, "passes": [{"split-svd": {**SVD["split-svd"], "tolerance": {"relative_l2": tolerance}}}]}


# ---------------------------------------------------------------------------------------------- compile


def test_a_model_in_memory_gives_a_model_in_memory() -> None:
    result = ccompile.compile(model(), lossy(99), {"verification": {"x": X}})
    assert (result.ok, result.reason, result.path) == (True, "", None)
    assert {node.name for node in result.model.graph.node} > {"fc2/V", "fc2/U"}
    assert isinstance(result, ccompile.Result)
    assert result.evidence.verification.source == "npz verification.npz, 16 samples"


def test_files_give_the_bytes_of_the_command_line(digits: Path, run: Run) -> None:
    run(digits / "digits.onnx", "-s", digits / "tidy.yaml", "-o", digits / "cli.onnx", "--threads", 1, "--no-cache")
    result = ccompile.compile(
        digits / "digits.onnx", str(digits / "tidy.yaml"), out=digits / "api.onnx", threads=1, cache=False
    )
    assert (digits / "api.onnx").read_bytes() == (digits / "cli.onnx").read_bytes()
    assert result.path == digits / "api.onnx"
    assert (digits / "api.onnx.evidence.json").exists()
    assert result.model == onnx.load(str(digits / "api.onnx"))


def test_a_broken_contract_is_a_result_without_a_model(tmp_path: Path) -> None:
    result = ccompile.compile(model(), lossy(1e-6), {"verification": {"x": X}}, tmp_path / "out.onnx")
    assert (result.ok, result.path) == (False, None)
    assert "left its tolerance" in result.reason
    assert not (tmp_path / "out.onnx").exists()
    with pytest.raises(ContractError, match="left its tolerance"):
        _ = result.model


def test_the_same_call_is_found_in_the_cache_arrays_included(tmp_path: Path) -> None:
    calls: list[tuple[Any, dict[str, Any]]] = [
        (X, {}),
        (X, {}),
        (X + 1, {}),
        (X, {"cache": False}),
        (X, {"cache": tmp_path}),
    ]
    found = [ccompile.compile(model(), TIDY, {"verification": {"x": x}}, **more) for x, more in calls]
    assert [result.is_cached for result in found] == [False, True, False, False, False]
    assert found[0].evidence.text() == found[1].evidence.text()


def test_arrays_with_labels_serve_a_metric() -> None:
    spec = {**TIDY, "gates": {"metric": {"top1": {"drop": 0.1}}}}
    result = ccompile.compile(model(), spec, LABELLED)
    assert result.evidence.source_metrics.keys() == {"top1"}


def test_data_in_files_replaces_the_specs(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    np.savez(tmp_path / "sub" / "mine.npz", x=X)
    (tmp_path / "spec.yaml").write_text("version: 1\npasses: [tidy-graph]\n")
    for given in ({"verification": "sub/mine.npz"}, {"verification": {"npz": "sub/mine.npz", "samples": 16}}):
        result = ccompile.compile(model(), tmp_path / "spec.yaml", given)
        assert result.evidence.verification.samples == 16


def test_sets_seed_and_progress_are_those_of_the_command_line() -> None:
    told: list[tuple[str, int, int]] = []
    result = ccompile.compile(
        model(),
        lossy(99),
        {"verification": {"x": X}},
        sets=["passes.split-svd.rank=3"],
        seed=7,
        progress=lambda *line: told.append(line),
    )
    assert (result.evidence.seed, result.evidence.steps[0].options["rank"]) == (7, 3)
    assert told[-1] == ("done", 3, 3)


def test_a_build_is_held_to_its_lock(tmp_path: Path) -> None:
    given: Any = (model(), TIDY, {"verification": {"x": X}}, tmp_path / "out.onnx")
    ccompile.compile(*given, lock=tmp_path / "out.onnx.lock.yaml")
    assert ccompile.compile(*given, locked=True).ok
    with pytest.raises(ContractError, match="`seed` has moved: 1, locked 0"):
        ccompile.compile(*given, locked=True, seed=1)


@pytest.mark.parametrize(
    ("spec", "data", "error", "said"),
    [
        ({"version": 1, "passes": ["tidy-grap"]}, None, SpecError, "Did you mean `tidy-graph`"),
        (TIDY, {"verify": {"x": X}}, DataError, "there is no `verify` data"),
        (TIDY, {"verification": {"y": X}}, DataError, "y"),
        (TIDY, {"verification": {"npz": "nowhere.npz"}}, DataError, "nowhere.npz"),
    ],
)
def test_what_is_wrong_raises_what_the_command_line_tells(
    spec: dict[str, Any], data: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        ccompile.compile(model(), spec, data)


def test_a_model_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match=r"nowhere\.onnx"):
        ccompile.compile("nowhere.onnx", TIDY)


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import sys, ccompile; print([n for n in ('numpy', 'onnx', 'pydantic', 'yaml') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_a_name_that_is_not_public_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute `Resul`"):
        _ = ccompile.Resul


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "ccompile.compile(" in block)
    onnx_io.save(builders.mlp(0), tmp_path / "model.onnx")
    np.savez(tmp_path / "verify.npz", x=X)
    (tmp_path / "spec.yaml").write_text("version: 1\npasses: [tidy-graph]\n")
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert (tmp_path / "out.onnx").exists()


# ---------------------------------------------------------------------------------------------- assert_onnx_close


def test_equal_models_are_close(tmp_path: Path) -> None:
    onnx_io.save(builders.mlp(0), tmp_path / "a.onnx")
    ccompile.assert_onnx_close(tmp_path / "a.onnx", model())
    ccompile.assert_onnx_close(model(), model(), {"x": X}, atol=0)


@pytest.mark.parametrize("data", [None, {"x": X}])
def test_other_models_are_not_and_the_limits_that_pass_do(data: Any) -> None:
    with pytest.raises(AssertionError, match=r"output `fc3_out`: .*\nLimits that would each have passed") as caught:
        ccompile.assert_onnx_close(model(1), model(0), data, relative_l2=1e-3)
    assert "relative_l2" in str(caught.value)
    ccompile.assert_onnx_close(model(1), model(0), data, relative_l2=1e3)
    with pytest.raises(AssertionError):
        ccompile.assert_onnx_close(model(1), model(0), data)


def test_a_limit_that_promises_nothing_is_refused() -> None:
    with pytest.raises(SpecError):
        ccompile.assert_onnx_close(model(), model(), relative_l2=-1)
