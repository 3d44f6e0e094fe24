"""Which step and which site breaks: planted culprits are found, alone or together, with few trials."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import builders
import numpy as np
import onnx_ir as ir
import pytest
from runs import Ended, Run

from ccompile import onnx_io

SPEC = """
version: 1
data: {{verification: {{npz: verify.npz, labels: label}}}}
passes:
{steps}
gates: {{relative_l2: 0.9}}
"""
SPLIT = "  - split-svd: {rank: 3, statistics: weights, tolerance: {relative_l2: 5}}\n"


def deep_net(spoilt: int | None = None, layers: int = 9, noise: float = 0.0) -> ir.Model:
    """Layers fc0, fc1, ... of 8 x 8 and rank 3 up to `noise`; `spoilt` is of full rank: a split of rank 3 breaks it."""
    rng = np.random.default_rng(5)
    net = builders.Net(0)
    y = net.input("x", ["n", 8])
    for index in range(layers):
        w = rng.standard_normal((8, 3)) @ rng.standard_normal((3, 8)) + noise * rng.standard_normal((8, 8))
        if index == spoilt:
            w = np.linalg.qr(rng.standard_normal((8, 8)))[0]
        weight = net.constant((w / np.linalg.norm(w, 2)).astype(np.float32), f"fc{index}.w")
        y = net.node("Gemm", y, weight, name=f"fc{index}", transB=1)
        y = net.node("Tanh", y, name=f"tanh{index}")
    return net.model(y)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    np.savez("verify.npz", x=rng.standard_normal((32, 8)).astype(np.float32), label=np.arange(32) % 8)
    return tmp_path


def write(model: ir.Model, *steps: str) -> None:
    onnx_io.save(model, "model.onnx")
    Path("spec.yaml").write_text(SPEC.format(steps="".join(steps).rstrip()))


def bisect(run: Run, *arguments: object) -> Ended:
    return run("bisect", "model.onnx", "-s", "spec.yaml", "--threads", 1, *arguments)


def found(run: Run, *arguments: object) -> dict[str, Any]:
    ended = bisect(run, "--json", *arguments)
    data: dict[str, Any] = json.loads(ended.out)
    assert ended.code == (0 if data["holds"] else 1), ended.err
    return data


@pytest.mark.parametrize("spoilt", [0, 4, 8])
def test_the_one_site_that_breaks_a_limit_is_found(folder: Path, run: Run, spoilt: int) -> None:
    write(deep_net(spoilt), "  - tidy-graph\n", SPLIT)
    result = found(run, "--relative-l2", 1e-4)
    assert (result["step"], result["name"]) == (2, "split-svd")
    guilt = result["guilt"]
    assert (guilt["nodes"], guilt["alone"], guilt["place"], guilt["sites"]) == ([f"fc{spoilt}"], True, spoilt + 1, 9)
    assert guilt["tried"] <= 2 + math.ceil(math.log2(9))


def test_a_broken_contract_is_found_with_its_site(folder: Path, run: Run) -> None:
    write(deep_net(3), SPLIT.replace("relative_l2: 5", "relative_l2: 1e-4"))
    result = found(run)
    assert result["guilt"]["nodes"] == ["fc3"]
    assert "left its tolerance" in result["reason"]
    assert "which would have passed" in result["reason"]


def test_sites_that_only_break_together_are_told_from_one_alone(folder: Path, run: Run) -> None:
    write(deep_net(noise=0.02), SPLIT)

    def error(*arguments: object) -> float:
        reason = found(run, "--relative-l2", 1e-6, *arguments)["reason"]
        return float(reason.split("relative_l2 ")[1].split(" >")[0])

    errors = [error("--set", f"passes.split-svd.only=[fc{index}]") for index in range(9)]
    total = error()
    limit = (max(errors) + total) / 2
    assert max(errors) < limit < total
    guilt = found(run, "--relative-l2", limit)["guilt"]
    assert not guilt["alone"]
    assert guilt["place"] > 1
    assert "tips it over together with" in bisect(run, "--relative-l2", limit).err


def test_a_rewrite_is_taken_apart_by_its_nodes(folder: Path, run: Run) -> None:
    model = builders.conv_bn_net(0)
    write(model, "  - fold-batchnorm\n")
    x = np.random.default_rng(0).standard_normal((8, 4, 10, 10)).astype(np.float32)
    np.savez("verify.npz", x=x, label=np.arange(8) % 3)
    result = found(run, "--atol", 0)
    assert result["name"] == "fold-batchnorm"
    assert result["guilt"]["nodes"] in (["bn1"], ["bn2"])


def test_the_earlier_of_two_steps_is_found(folder: Path, run: Run) -> None:
    only = "  - split-svd: {{rank: 3, only: [fc{}], statistics: weights, tolerance: {{relative_l2: 5}}}}\n"
    write(deep_net(2), only.format(1), only.format(2), only.format(5))
    assert found(run, "--relative-l2", 1e-4)["step"] == 2


def test_a_step_that_an_other_mends_is_noted_only(folder: Path, run: Run) -> None:
    from ccompile import bisecting

    class Mended(bisecting._Search):
        def _left(self, state: Any) -> str:
            return "broken" if len(self.steps) == 1 else ""

    write(deep_net(), "  - tidy-graph\n", SPLIT)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(bisecting, "_Search", Mended)
    result = found(run)
    monkey.undo()
    assert result["holds"]
    assert result["notes"] == ["step 1 breaks it too, and step 2 mends that"]


def test_a_metric_is_a_limit_as_well(folder: Path, run: Run) -> None:
    write(deep_net(4), SPLIT.replace("rank: 3", "rank: 1"))
    result = found(run, "--metric-drop", "top1=0")
    assert result["step"] in (0, 1)
    assert found(run, "--metric-drop", "top1=1")["holds"]


def test_what_holds_exits_0_and_writes_nothing(folder: Path, run: Run) -> None:
    write(deep_net(), "  - tidy-graph\n", SPLIT)
    ended = bisect(run)
    assert (ended.code, ended.err) == (0, "")
    assert "every step keeps its contract" in ended.out
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "spec.yaml", "verify.npz"]


def test_quiet_says_only_what_broke(folder: Path, run: Run) -> None:
    write(deep_net(), SPLIT)
    assert bisect(run, "-q") == Ended(0, "", "")
    write(deep_net(4), SPLIT)
    ended = bisect(run, "-q", "--relative-l2", 1e-4)
    assert (ended.code, ended.out) == (1, "")
    assert "site 5 of 9, fc4, breaks it alone" in ended.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--relative-l2", "-1"],
        ["--metric-drop", "top1"],
        ["--metric-drop", "top1=-1"],
        ["--metric-drop", "top9=0.1"],
        ["--set", "passes.split-svd.rnk=2"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_searched_is_refused(folder: Path, run: Run, arguments: list[str]) -> None:
    write(deep_net(), SPLIT)
    ended = bisect(run, *arguments)
    assert (ended.code, ended.out, "Traceback" in ended.err) == (2, "", False), ended.err
