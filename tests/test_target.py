"""Targets load, say what is wrong with them, and say why a model does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import builders
import numpy as np
import onnx_ir as ir
import pytest
import yaml
from builders import Net

from ccompile import cost
from ccompile.analysis import shapes
from ccompile.errors import SpecError
from ccompile.target import RateKind, Target, check, load_target, target_names

if TYPE_CHECKING:
    from ccompile.core import Machine
    from ccompile.errors import Problem

SHIPPED = ("arm-cortex-a76", "generic-cpu", "mcu-cortex-m7", "nvidia-t4", "x86-64-avx512-vnni")


def raw(name: str = "generic-cpu", **changed: object) -> dict[str, Any]:
    found = load_target(name, Path()).model_dump(mode="json", by_alias=True)
    return {**found, **changed}


def problems(model: ir.Model, target: Target) -> tuple[Problem, ...]:
    found = shapes.infer(model, cost.example_shapes(model))
    priced = cost.price(model, found, target)
    return check(model, target, priced.report, priced.peak_node, found)


def test_the_shipped_targets_are_these() -> None:
    assert target_names() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_target_has_every_rate_for_every_type_it_computes(name: str) -> None:
    target = load_target(name, Path("/nowhere"))
    assert target.name == name
    assert target.description
    kinds: tuple[RateKind, ...] = get_args(RateKind)
    tables = {kind: set(getattr(target.rates, kind)) for kind in kinds if kind != "ragged"}
    computed = tables["conv"]
    assert {"float32", "int8"} <= computed <= set(target.dtypes)
    assert all(found == computed for found in tables.values()), tables
    assert all(target.rate(kind, dtype) > 0 for kind in kinds for dtype in target.dtypes)
    dense = [kind for kind in kinds if kind not in ("ragged", "depthwise", "elementwise")]  # may be slower
    assert all(target.rate(kind, "float32") <= target.rate(kind, "int8") for kind in dense)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_target_says_where_its_numbers_come_from(name: str) -> None:
    from ccompile import specs

    text = (Path(str(specs.__file__)).parent / "targets" / f"{name}.yaml").read_text()
    header = text.split("name:")[0]
    assert header.startswith("# ")
    assert "stimate" in header


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_target_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    target = load_target(name, Path())
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(raw(name), sort_keys=False))
    assert load_target("own.yaml", tmp_path) == target == load_target(raw(name), tmp_path)


def test_a_target_is_a_machine_that_rounds_channels_up() -> None:
    machine: Machine = load_target("x86-64-avx512-vnni", Path())
    assert [machine.align(channels) for channels in (1, 16, 49, 64)] == [16, 16, 64, 64]
    assert machine.runs("Conv")
    assert machine.runs("MatMulNBits", "com.microsoft")
    assert not machine.runs("Conv", "elsewhere")


def test_an_op_list_and_a_list_of_gaps() -> None:
    mcu, t4 = load_target("mcu-cortex-m7", Path()), load_target("nvidia-t4", Path())
    assert mcu.runs("Conv")
    assert not mcu.runs("Einsum")
    assert t4.runs("Einsum")
    assert not t4.runs("DFT")


def test_missing_rates_fall_back_to_what_the_type_runs_as() -> None:
    cpu = load_target("generic-cpu", Path())
    assert cpu.rate("conv", "float16") == cpu.rate("conv", "float32")
    assert cpu.rate("conv", "uint8") == cpu.rate("conv", "int8") == 64e9
    assert cpu.step("uint8") == cpu.step("int8")


def test_bytes_beyond_the_cache_come_slowly() -> None:
    target = load_target(raw(cache={"mib": 1, "bandwidth_gb_s": 10}, bandwidth_gb_s=1), Path())
    assert target.seconds_to_move(2**20) == pytest.approx(2**20 / 1e10)
    assert target.seconds_to_move(3 * 2**20) == pytest.approx(2**20 / 1e10 + 2 * 2**20 / 1e9)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(SpecError, match="no target `nvidia-t5`") as caught:
        load_target("nvidia-t5", Path())
    assert "Did you mean `nvidia-t4`?" in str(caught.value)


def test_every_problem_of_a_target_is_reported_at_once() -> None:
    wrong = raw(bandwith_gb_s=3, bandwidth_gb_s=-1, opset={"min": 9})
    with pytest.raises(SpecError) as caught:
        load_target(wrong, Path())
    found = {problem.where: problem for problem in caught.value.problems}
    assert set(found) == {"target: bandwith_gb_s", "target: bandwidth_gb_s", "target: opset.max"}
    assert "Did you mean `bandwidth_gb_s`?" in found["target: bandwith_gb_s"].hint
    assert "missing" in found["target: opset.max"].message


def test_an_unknown_nested_key_suggests_the_nearest() -> None:
    with pytest.raises(SpecError, match="Did you mean `recurrent`"):
        load_target(raw(rates={**raw()["rates"], "recurent": {"float32": 1}}), Path())
    with pytest.raises(SpecError, match="Did you mean `in_channels`"):
        load_target(raw(align={"float32": {"in_channel": 1}}), Path())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dtypes": ["float23"]}, "Did you mean `float32`?"),
        ({"ops": ["Conv"], "lacks": ["Gemm"]}, "lacks"),
        ({"opset": {"min": 9, "max": 8}}, "min 9 is above max 8"),
    ],
)
def test_inconsistent_targets_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said.replace("?", r"\?")):
        load_target(raw(**changed), Path())


@pytest.mark.parametrize(("text", "said"), [("a: [", "not YAML"), ("- a", "mapping"), (None, "cannot read")])
def test_files_that_hold_no_target_are_refused(text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(SpecError, match=said) as caught:
        load_target("t.yaml", tmp_path)
    assert str(tmp_path / "t.yaml") in str(caught.value)


# ------------------------------------------------------------------------------------------ check


def test_a_model_that_fits_has_no_problems() -> None:
    for name in SHIPPED:
        assert problems(builders.residual_net(0), load_target(name, Path())) == ()


def test_missing_ops_are_named_once_with_their_first_node_and_count() -> None:
    net = Net()
    x = net.node("Mish", net.node("Erf", net.node("Erf", net.input("x", [1, 4]), name="one"), name="two"), name="three")
    found = problems(net.model(x), load_target("mcu-cortex-m7", Path()))
    assert [(problem.where, problem.message) for problem in found] == [
        ("node `one`", "target `mcu-cortex-m7` has no `Erf` (2 nodes)"),
        ("node `three`", "target `mcu-cortex-m7` has no `Mish` (1 node)"),
    ]


def test_a_foreign_domain_is_named() -> None:
    net = Net()
    y = net.node("Gelu", net.input("x", [1, 4]), name="gelu", domain="com.microsoft")
    (problem,) = problems(net.model(y, opsets={"com.microsoft": 1}), load_target("mcu-cortex-m7", Path()))
    assert "com.microsoft.Gelu" in problem.message
    assert problem.where == "node `gelu`"


def test_ops_in_subgraphs_are_found() -> None:
    def branch(name: str) -> ir.Graph:
        inner = ir.node("Erf", [x], name=f"{name}_erf")
        inner.outputs[0].name = f"{name}_y"
        return ir.Graph([], inner.outputs, nodes=[inner], name=name)

    net = Net()
    x, condition = net.input("x", [1, 4]), net.input("c", [], ir.DataType.BOOL)
    y = net.node("If", condition, then_branch=branch("t"), else_branch=branch("e"), name="if")
    (problem,) = problems(net.model(y), load_target("mcu-cortex-m7", Path()))
    assert problem.where == "node `t_erf`"
    assert "(2 nodes)" in problem.message


def test_missing_element_types_are_named() -> None:
    net = Net()
    y = net.node("Cast", net.node("Cast", net.input("x", [1, 4]), to=11, name="up"), to=1, name="down")
    (problem,) = problems(net.model(y), load_target("mcu-cortex-m7", Path()))
    assert problem.where == "node `up`"
    assert "float64 (2 nodes)" in problem.message


def test_an_opset_outside_the_range_is_named() -> None:
    (problem,) = problems(builders.mlp(0), load_target(raw(opset={"min": 7, "max": 17}), Path()))
    assert "opset 18 is outside 7 to 17" in problem.message
    assert "node `fc1`" in problem.where


@pytest.mark.parametrize(
    ("memory", "needed", "node"),
    [
        ({"weights_mib": 1}, 1_066_440, "fc1"),
        ({"activations_mib": 0.004}, 4336, "fc1"),
        ({"total_mib": 1.02}, 1_066_440 + 4336, "fc1"),
    ],
)
def test_memory_limits_name_the_node_the_need_and_the_limit(memory: dict[str, float], needed: int, node: str) -> None:
    (problem,) = problems(builders.lenet_300_100(), load_target(raw(memory=memory), Path()))
    limit = int(next(iter(memory.values())) * 2**20)
    assert f"{needed} bytes exceed the {limit} bytes" in problem.message
    assert problem.where == f"node `{node}`"


def test_the_heaviest_node_is_where_the_weights_are() -> None:
    net = Net()
    x = net.node("MatMul", net.input("x", [1, 8]), net.constant(np.zeros((8, 512), np.float32)), name="small")
    x = net.node("MatMul", x, net.constant(np.zeros((512, 512), np.float32)), name="big")
    (problem,) = problems(net.model(x), load_target(raw(memory={"weights_mib": 1}), Path()))
    assert problem.where == "node `big`"


def test_a_graph_without_nodes_can_be_too_heavy() -> None:
    net = Net(0)
    w = net.weight("w", (1000, 1000))
    (problem,) = problems(net.model(w), load_target(raw(memory={"weights_mib": 1}), Path()))
    assert problem.where == "the graph, which has no nodes"


def test_ragged_depthwise_channels_run_at_their_own_rate_where_one_is_given() -> None:
    on = load_target("rated.yaml", Path(__file__).parent)
    assert on.rate("ragged", "int8") < on.rate("depthwise", "int8")
    assert on.rate("ragged", "float32") == on.rate("depthwise", "float32")
    plain = load_target("arm-cortex-a76", Path("/nowhere"))
    assert plain.rate("ragged", "int8") == plain.rate("depthwise", "int8")
