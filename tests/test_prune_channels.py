"""Channel pruning: planted redundancy goes first and costs nothing, strengths and budgets mean what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import builders
import coupled
import driver
import numpy as np
import onnx_ir as ir
import pytest
from builders import Net
from calibrated import applied, dense_chain, error, feeds, prune, set_weight, skips, weight
from pydantic import ValidationError

from ccompile import graph, onnx_io, runtime
from ccompile.analysis.channels import channels
from ccompile.errors import PassError
from ccompile.numerics import obs
from ccompile.passes.prune_channels import PruneChannels

if TYPE_CHECKING:
    from ccompile.core import Array

EXACT = 2e-5


def sizes(model: ir.Model) -> dict[str, int]:
    return {group.name: group.size for group in channels(model).free}


def dead(model: ir.Model, name: str, *rows: int) -> ir.Model:
    """Silence output channels of a layer."""
    for index in (1, 2):
        array = weight(model, name, index)
        array[list(rows)] = 0
        set_weight(model, name, array, index)
    return model


def duplicate(model: ir.Model, name: str, source: int, *rows: int) -> ir.Model:
    """Make output channels of a layer copies of one."""
    for index in (1, 2):
        array = weight(model, name, index)
        array[list(rows)] = array[source]
        set_weight(model, name, array, index)
    return model


def linear_mlp(seed: int = 3) -> ir.Model:
    """x[N, 5] -> 9 -> 4, nothing between: nine channels of rank five."""
    net = Net(seed)
    return net.model(net.dense(net.dense(net.input("x", ["N", 5]), "a", 5, 9), "b", 9, 4))


def share(run: driver.Bench, what: str) -> float:
    """What the result costs, priced anew, of what the source does."""
    now, source = run.price(run.model).report, run.price(run.source.model).report
    return float(getattr(now, what) / getattr(source, what))


# ---------------------------------------------------------------------------------------------- redundancy


def test_dead_channels_go_first_and_cost_nothing() -> None:
    model = dead(coupled.chain(), "a", 1, 4, 6)
    run = prune(model, keep=1.0, layers={"a": 5})
    assert sizes(run.model) == {"a": 5, "b": 6}
    assert np.array_equal(weight(run.model, "a"), weight(model, "a")[[0, 2, 3, 5, 7]])
    assert error(run.model, model, feeds(model, seed=9)) < EXACT


def test_duplicated_channels_go_first_and_cost_nothing() -> None:
    model = duplicate(coupled.chain(), "a", 2, 3, 5)
    run = prune(model, keep=1.0, layers={"a": 6}, ridge=1e-9)
    assert sizes(run.model)["a"] == 6
    left = weight(run.model, "a").reshape(6, -1)
    assert len(np.unique(left, axis=0)) == 6
    assert error(run.model, model, feeds(model, seed=9)) < 1e-4


def test_dependent_channels_go_and_cost_nothing() -> None:
    model = linear_mlp()
    run = prune(model, keep=5, ridge=0)
    assert sizes(run.model) == {"a": 5}
    assert error(run.model, model, feeds(model, seed=9)) < 1e-4


def test_one_channel_beyond_redundancy_costs_something() -> None:
    model = linear_mlp()
    run = prune(model, keep=4, ridge=0)
    assert error(run.model, model, feeds(model, seed=9)) > 1e-2


def test_an_error_of_nothing_removes_what_is_dead_and_no_more() -> None:
    model = dead(coupled.chain(), "a", 0, 7)
    run = prune(model, error=1e-12)
    assert applied(run).keys() == {"a"}
    assert sizes(run.model) == {"a": 6, "b": 6}


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0.5},
        {"keep": 2},
        {"keep": 2, "swaps": 5},
        {"keep": 0.5, "criterion": "l2", "statistics": "weights"},
        {"keep": {"macs": 0.7}, "only": ["a"], "sensitivity": False},
    ],
)
def test_no_part_of_a_split_loses_its_last_channel(options: dict[str, Any]) -> None:
    """All of the left part is dead, and would go first."""
    run = prune(dead(coupled.halves(), "a", 0, 1, 2), **options)
    rows = weight(run.model, "a").reshape(-1, 27)
    assert 2 <= len(rows) < 8
    assert (~rows.any(1)).sum() == 1


def test_permuted_channels_permute_the_answer() -> None:
    model = coupled.chain()
    order = np.random.default_rng(0).permutation(8)
    twin = graph.copy(model)
    for index in (1, 2):
        set_weight(twin, "a", weight(model, "a", index)[order], index)
    set_weight(twin, "b", weight(model, "b")[:, order])
    mine, other = (prune(m, keep=0.5).model for m in (model, twin))
    rows = {tuple(row) for row in weight(mine, "a").reshape(4, -1)}
    assert rows == {tuple(row) for row in weight(other, "a").reshape(4, -1)}
    assert error(mine, other, feeds(model, seed=9)) < 1e-4


def test_a_refit_loses_less_than_none() -> None:
    model = coupled.residual()
    batches = feeds(model)
    errors = [error(prune(model, batches, keep=0.6, refit=refit).model, model, batches) for refit in ("none", "all")]
    assert errors[1] < 0.7 * errors[0]


# ---------------------------------------------------------------------------------------------- strengths


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"keep": 0.5}, {"a": 4, "b": 3}),
        ({"keep": 0.8}, {"a": 6, "b": 5}),
        ({"keep": 3}, {"a": 3, "b": 3}),
        ({"keep": 7}, {"a": 7, "b": 6}),
        ({"keep": 0.5, "layers": {"b": 0.34}}, {"a": 4, "b": 2}),
        ({"keep": 0.5, "layers": {"?": 5}}, {"a": 5, "b": 5}),
        ({"keep": 0.6, "align": 2}, {"a": 6, "b": 4}),
        ({"keep": 0.6, "align": 4}, {"a": 8, "b": 4}),
        ({"error": 0.9, "layers": {"a": 2}, "only": ["a"]}, {"a": 2, "b": 6}),
    ],
)
def test_a_strength_keeps_what_it_says(options: dict[str, Any], wanted: dict[str, int]) -> None:
    assert sizes(prune(coupled.chain(), **options).model) == wanted


def test_keeping_all_changes_nothing_and_says_so() -> None:
    run = prune(coupled.chain(), keep=1.0)
    assert applied(run) == {}
    assert skips(run)["a"] == "all 8 units stay"


def test_a_larger_error_removes_no_less() -> None:
    found = [sizes(prune(coupled.chain(), error=bound).model).get("a", 1) for bound in (0.01, 0.1, 0.5)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]


@pytest.mark.parametrize(
    "options",
    [{}, {"keep": 0.5, "error": 0.1}, {"keep": {}}, {"keep": {"macs": 0.5, "params": 0.5}}, {"keep": 0}, {"keep": 1.5}, {"error": 1}, {"keep": 0.5, "criterion": "luck"}],  # noqa: E501
)  # fmt: skip
def test_a_strength_that_says_nothing_or_too_much_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PruneChannels.model_validate(options)


# ---------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("what", ["macs", "params", "stored_bytes"])
@pytest.mark.parametrize("asked", [0.75, 0.5])
@pytest.mark.parametrize("net", ["residual", "lenet"])
def test_a_budget_holds_and_is_spent(net: str, asked: float, what: str) -> None:
    model = builders.residual_net(0) if net == "residual" else builders.mlp(0)
    run = prune(model, feeds(model, (6, 5)), keep={what: asked}, sensitivity=False)
    assert 0.8 * asked < share(run, what) <= asked


@pytest.mark.parametrize("what", ["macs", "params"])
@pytest.mark.parametrize(
    "name", ["halves", "normalised", "grouped", "separable", "shuffled", "transposed", "dense_block"]
)
def test_a_budget_holds_whatever_couples_the_channels(name: str, what: str) -> None:
    model = coupled.NETS[name]()
    run = prune(model, feeds(model, (6, 5)), keep={what: 0.7}, sensitivity=False)
    assert share(run, what) <= 0.7


def test_a_budget_of_params_counts_the_biases_that_a_refit_adds() -> None:
    run = prune(builders.conv_bn_net(0), keep={"params": 0.6})
    assert share(run, "params") <= 0.6


@pytest.mark.parametrize("share", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_added_biases_count_in_the_bytes_of_the_weights_type(share: float) -> None:
    net, rng, kinds = builders.Net(0), np.random.default_rng(0), ("params", "stored_bytes")
    x = net.input("x", ["N", 4, 6, 6], ir.DataType.FLOAT16)
    for name, shape in (("one", (12, 4, 1, 1)), ("two", (5, 12, 1, 1))):
        w = net.constant(rng.standard_normal(shape).astype(np.float16), f"{name}.w")
        x = net.relu(net.node("Conv", x, w, name=name))
    model = net.model(x)
    params, stored = (applied(prune(model, keep={what: share})) for what in kinds)
    assert params
    assert stored == params


def test_a_budget_out_of_reach_is_refused_with_a_remedy() -> None:
    with pytest.raises(PassError, match="the budget cannot be met") as caught:
        prune(coupled.chain(), keep={"macs": 0.01})
    assert "allow more groups" in str(caught.value)


def test_a_budget_leaves_overridden_layers_at_their_counts() -> None:
    run = prune(builders.mlp(0), keep={"macs": 0.7}, layers={"fc1": 24})
    assert sizes(run.model)["fc1"] == 24
    assert sizes(run.model)["fc2"] < 16


def wide_chain() -> ir.Model:
    """x[N, 16, 12, 12]: two pointwise convolutions of 48 channels, then one of 16."""
    net = Net(5)
    x = net.input("x", ["N", 16, 12, 12])
    for name, ins, outs in (("a", 16, 48), ("b", 48, 48)):
        x = net.relu(net.conv(x, name, (outs, ins, 1, 1)))
    return net.model(net.conv(x, "c", (16, 48, 1, 1)))


def test_a_budget_of_seconds_follows_the_staircase_of_the_target() -> None:
    model = wide_chain()
    batches = feeds(model, (2,))
    run = prune(model, batches, target="x86-64-avx512-vnni", keep={"seconds": 0.7}, sensitivity=False)
    assert {size % 16 for size in sizes(run.model).values()} == {0}
    assert applied(run)
    run = prune(model, batches, target="x86-64-avx512-vnni", keep={"macs": 0.7}, sensitivity=False)
    assert {size % 16 for size in sizes(run.model).values()} != {0}


# ---------------------------------------------------------------------------------------------- groups


def test_residual_spines_stay_where_coupled_channels_are_left_alone() -> None:
    run = prune(coupled.residual(), keep=0.5, coupled=False)
    assert sizes(run.model) == {"stem": 8, "a1": 2, "b1": 2}
    assert skips(run)["stem"] == "it is shared by several layers (coupled: false)"


def test_residual_spines_shrink_where_they_may() -> None:
    assert sizes(prune(coupled.residual(), keep=0.5).model) == {"stem": 4, "a1": 2, "b1": 2}


def test_output_channels_of_the_graph_stay_with_the_reason() -> None:
    run = prune(coupled.chain(), keep=0.5)
    assert skips(run)["fc"] == "group `fc`: graph output `fc_out`"
    assert weight(run.model, "fc").shape == (3, 3)


def test_what_skip_names_stays() -> None:
    run = prune(coupled.chain(), keep=0.5, skip=["b"])
    assert sizes(run.model) == {"a": 4, "b": 6}
    assert skips(run)["b"] == "named by `skip`: b"


def test_a_reader_that_cannot_be_fitted_is_named() -> None:
    net, x = coupled.start()
    x = net.relu(net.conv(x, "a", (6, 3, 1, 1)))
    up = net.node("ConvTranspose", x, net.weight("w", (6, 3, 2, 2)), name="up", strides=[2, 2], output_padding=[1, 1])
    run = prune(net.model(up), keep=0.5)
    assert applied(run) == {}
    assert skips(run)["a"] == "`up` reads its channels, and its output is padded"


NETS = [name for name in coupled.NETS if name != "resized"]  # which is of one batch size


@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_coupling_is_cut_to_a_valid_graph(name: str) -> None:
    model = coupled.NETS[name]()
    before = sizes(model)
    run = prune(model, feeds(model, (6, 5)), keep=0.6)
    assert onnx_io.check(run.model) == ""
    assert graph.signature(run.model) == graph.signature(model)
    assert applied(run)
    after = sizes(run.model)
    for group in applied(run):
        assert after.get(group, 1) < before[group]


@pytest.mark.parametrize(
    "name", ["squeeze_excite", "flattened", "separable", "separable_2", "grouped", "normalised", "transposed"]
)
def test_dead_channels_cost_nothing_whatever_reads_them(name: str) -> None:
    model = dead_units(coupled.NETS[name](), "a", 1)
    run = prune(model, feeds(model, (40, 30)), keep=1.0, layers={"a": sizes(model)["a"] - 1})
    assert sizes(run.model)["a"] == sizes(model)["a"] - 1
    assert error(run.model, model, feeds(model, (6,), seed=9)) < 1e-4


def dead_units(model: ir.Model, name: str, unit: int) -> ir.Model:
    """Silence what reads a unit: then it does not matter."""
    for member in channels(model).named(name).by_role("consumer"):
        array = weight(model, member.node, member.input)
        array[tuple([slice(None)] * member.axis + [member.unit == unit])] = 0
        set_weight(model, member.node, array, member.input)
    return model


def test_a_matmul_without_a_bias_stays_without_one() -> None:
    net = Net(3)
    x = net.relu(net.node("MatMul", net.input("x", ["N", 6]), net.weight("a.w", (6, 8)), name="a"))
    model = net.model(net.node("MatMul", x, net.weight("b.w", (8, 3)), name="b"))
    array = weight(model, "a")
    array[:, [2, 5]] = 0
    set_weight(model, "a", array)
    run = prune(model, keep=6)
    assert [node.op_type for node in run.model.graph] == ["MatMul", "Relu", "MatMul"]
    assert all(len(node.inputs) == 2 for node in run.model.graph if node.op_type == "MatMul")
    assert error(run.model, model, feeds(model, seed=9)) < EXACT


def test_a_depthwise_layer_behind_a_cut_is_fitted_to_what_is_left_of_it() -> None:
    net, x = coupled.start()
    x = net.relu(net.conv(x, "first", (8, 3, 1, 1)))
    x = net.relu(net.conv(x, "a", (6, 8, 1, 1)))
    x = net.relu(net.conv(x, "dw", (6, 1, 3, 3), pad=1, groups=6))
    model = coupled.head(net, net.conv(x, "pw", (4, 6, 1, 1)), 4)
    run = prune(dead(model, "a", 0, 3), keep=1.0, layers={"a": 4, "first": 7})
    assert weight(run.model, "dw").shape == (4, 1, 3, 3)
    assert error(run.model, model, feeds(model, seed=9)) < 0.5


def test_batch_normalisation_shrinks_with_its_channels() -> None:
    run = prune(builders.conv_bn_net(0), keep=0.5)
    assert [weight(run.model, "bn1", index).shape for index in range(1, 5)] == [(4,)] * 4


def test_pruning_twice_keeps_fitting() -> None:
    model = builders.residual_net(0)
    batches = feeds(model)
    run = prune(model, batches, keep=0.8)
    run.step(1, PruneChannels.model_validate({"keep": 0.8, "tolerance": {"relative_l2": 1e9}}))
    alone = prune(model, batches, keep=0.64)
    assert sizes(run.model).keys() == sizes(alone.model).keys()
    assert error(run.model, model, batches) < 2 * error(alone.model, model, batches)


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ({"keep": 0.75}, {2}),
        ({"keep": 5}, {3}),
        ({"keep": 0.5, "layers": {"a": 7}}, {1}),
        ({"error": 0.1}, {7}),
        ({"keep": {"macs": 0.8}}, {7}),
    ],
)
def test_a_curve_goes_no_further_than_the_options_ask(
    options: dict[str, Any], limits: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = obs.remove_units

    def counted(consumers: list[obs.Consumer], ridge: float, limit: int) -> obs.Trace:
        seen.append(limit)
        return real(consumers, ridge, limit)

    monkeypatch.setattr(obs, "remove_units", counted)
    prune(coupled.chain(), **{"only": ["a"], **options})
    assert set(seen) == limits


def nodes_run(depth: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many nodes the runtime runs, batch by batch, while a chain of dense layers is pruned and refitted."""
    ran = 0
    made, run = runtime.Session.__init__, runtime.Session.run
    sizes: dict[runtime.Session, int] = {}

    def counted_made(self: runtime.Session, model: ir.Model, *rest: Any) -> None:
        sizes[self] = len(model.graph)
        made(self, model, *rest)

    def counted_run(self: runtime.Session, *rest: Any) -> runtime.Outputs:
        nonlocal ran
        ran += sizes[self]
        return run(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(runtime.Session, "__init__", counted_made)
        patch.setattr(runtime.Session, "run", counted_run)
        assert len(applied(prune(dense_chain(depth), keep=0.75))) == depth - 1
    return ran


def test_what_is_run_grows_linearly_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    small, middle, large = (nodes_run(depth, monkeypatch) for depth in (10, 20, 40))
    assert large - middle == 2 * (middle - small) > 0


def test_layers_in_subgraphs_are_left_alone_and_told() -> None:
    net = """<float[4,3] w, float[4] b, bool flag = {1}>
    { y = If (flag) <then_branch = t () => (p) { p = Gemm<transB = 1> (x, w, b) },
                     else_branch = e () => (q) { k = Gemm<transB = 1> (x, w, b) q = Neg (k) }> }"""
    model, _ = driver.model_of("g (float[N,3] x) => (float[N,4] y)" + net)
    graph.name_nodes(model.graph)
    assert skips(prune(model, keep=0.5)) == {
        str(model.graph[0].name): "linear layers in its subgraphs are left alone: 2"
    }


# ---------------------------------------------------------------------------------------------- criteria


def order_of(model: ir.Model, criterion: str, seed: int = 0) -> list[list[float]]:
    found: Array = weight(
        prune(model, keep=1.0, layers={"a": 3}, criterion=criterion, seed=seed, refit="none").model, "a"
    )
    return found.reshape(len(found), -1).tolist()


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_a_norm_keeps_the_largest_rows(criterion: str) -> None:
    model = coupled.chain()
    rows = weight(model, "a").reshape(8, -1).astype(np.float64)
    norms = np.abs(rows).sum(1) if criterion == "l1" else np.linalg.norm(rows, axis=1)
    best = np.sort(np.argsort(-norms)[:3])
    assert order_of(model, criterion) == rows[best].tolist()


def test_the_geometric_median_keeps_the_rows_far_from_it() -> None:
    model = coupled.chain()
    rows = weight(model, "a").reshape(8, -1).astype(np.float64)
    distances = np.linalg.norm(rows[:, None] - rows[None], axis=2).sum(1)
    assert order_of(model, "geometric-median") == rows[np.sort(np.argsort(-distances)[:3])].tolist()


def test_chance_follows_the_seed() -> None:
    model = coupled.chain()
    found = [order_of(model, "random", seed) for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1]
    assert any(other != found[0] for other in found[2:])


def test_criteria_differ() -> None:
    net, x = coupled.start()
    x = net.relu(net.conv(x, "a", (16, 3, 3, 3)))
    model = coupled.head(net, net.conv(x, "b", (4, 16, 1, 1)), 4)
    criteria = ("reconstruction", "l1", "l2", "geometric-median", "random")
    kept = {str(order_of(model, criterion)) for criterion in criteria}
    assert len(kept) >= 3


def planted(scale: float, offset: float) -> ir.Model:
    """A net whose layer `a` has its unit 2 scaled and shifted."""
    model = coupled.chain()
    array, bias = weight(model, "a"), weight(model, "a", 2)
    array[2] *= scale
    bias[2] = offset
    set_weight(model, "a", array)
    set_weight(model, "a", bias, 2)
    return model


def gone_of(model: ir.Model, **options: Any) -> list[int]:
    """Which one of the units of `a` goes first."""
    left = weight(prune(model, keep=1.0, layers={"a": 7}, **options).model, "a")
    return [unit for unit, row in enumerate(weight(model, "a")) if not (left == row).all((1, 2, 3)).any()]


def test_a_silent_unit_with_large_weights_goes_first_by_activation_and_stays_by_norm() -> None:
    model = planted(scale=100, offset=-1e5)
    assert gone_of(model, criterion="activation", refit="none") == [2]
    assert gone_of(model, criterion="l1", refit="none") != [2]


def test_a_loud_but_constant_unit_goes_only_where_a_bias_makes_up_for_it() -> None:
    model = planted(scale=0.001, offset=10)
    assert gone_of(model, criterion="activation", refit="none") != [2]
    assert gone_of(model, criterion="activation", refit="all") == [2]
    assert gone_of(model, criterion="l1", refit="none") == [2]


@pytest.mark.parametrize("name", ["residual", "halves", "grouped", "separable", "flattened", "dense_block"])
def test_activations_rank_units_whatever_couples_them(name: str) -> None:
    model = coupled.NETS[name]()
    run = prune(model, feeds(model, (6, 5)), keep=0.6, criterion="activation")
    assert applied(run)


def test_activations_of_weights_alone_are_refused() -> None:
    with pytest.raises(ValidationError, match="measured on data"):
        PruneChannels.model_validate({"keep": 0.5, "criterion": "activation", "statistics": "weights"})


# ---------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("options", "needs", "remedy"),
    [
        ({}, "`criterion: reconstruction` and `refit: all`", "`statistics: weights`"),
        ({"refit": "none"}, "`criterion: reconstruction`", "`statistics: weights`"),
        ({"criterion": "l1", "refit": "readers"}, "`refit: readers`", "`refit: none`"),
        ({"criterion": "activation", "refit": "none"}, "`criterion: activation`", "`criterion: l1`"),
        (
            {"criterion": "l1", "refit": "none", "keep": {"macs": 0.7}},
            "`sensitivity: true`",
            "`sensitivity: false`",
        ),
    ],
)
def test_without_calibration_data_what_needs_it_and_the_remedy_are_named(
    options: dict[str, Any], needs: str, remedy: str
) -> None:
    with pytest.raises(PassError) as caught:
        prune(coupled.chain(), [], **{"keep": 0.5, **options})
    assert f"prune-channels needs calibration data for {needs}, and the spec gives none" in str(caught.value)
    assert f"Give `data.calibration`, or the step {remedy}." in str(caught.value)


@pytest.mark.parametrize("criterion", ["l1", "l2", "geometric-median", "random"])
@pytest.mark.parametrize("options", [{"keep": 0.5}, {"keep": {"macs": 0.7}, "sensitivity": False}])
def test_weight_only_criteria_without_a_refit_need_no_data(criterion: str, options: dict[str, Any]) -> None:
    model = coupled.chain()
    run = prune(model, [], criterion=criterion, refit="none", **options)
    assert applied(run)
    assert all(f"share of {criterion} lost" in note for note in applied(run).values())
    assert serialised(run.model) == serialised(prune(model, criterion=criterion, refit="none", **options).model)


def test_data_that_is_given_refits_what_a_weight_only_criterion_cut() -> None:
    model = coupled.chain()
    batches = feeds(model)
    fitted, plain = (prune(model, batches, keep=0.5, criterion="l1", refit=refit).model for refit in ("all", "none"))
    assert error(fitted, model, batches) < 0.8 * error(plain, model, batches)


def test_weights_alone_do_without_calibration_data_and_say_so() -> None:
    run = prune(coupled.chain(), [], keep=0.5, statistics="weights")
    assert sizes(run.model) == {"a": 4, "b": 3}
    assert all("in the metric of the weights alone" in note for note in applied(run).values())
    with_data = prune(coupled.chain(), keep=0.5)
    assert not any("weights alone" in note for note in applied(with_data).values())


def test_weights_alone_drop_what_is_read_least() -> None:
    model = coupled.chain()
    run = prune(model, [], keep=1.0, layers={"a": 5}, statistics="weights")
    norms = np.square(weight(model, "b")).sum((0, 2, 3))
    assert np.array_equal(weight(run.model, "a"), weight(model, "a")[np.sort(np.argsort(-norms)[:5])])


def test_the_error_of_weights_alone_is_a_share() -> None:
    run = prune(coupled.chain(), [], error=0.3, statistics="weights")
    after = sizes(run.model)
    assert 1 < after["a"] < 8
    scaled = coupled.chain()
    set_weight(scaled, "b", 10 * weight(scaled, "b"))
    assert sizes(prune(scaled, [], error=0.3, statistics="weights").model) == after


# ---------------------------------------------------------------------------------------------- promises


def serialised(model: ir.Model) -> bytes:
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data


@pytest.mark.parametrize("options", [{"keep": 0.5}, {"keep": {"macs": 0.6}}, {"keep": 0.5, "criterion": "random"}])
def test_the_same_seed_gives_the_same_bytes(options: dict[str, Any]) -> None:
    model = builders.residual_net(0)
    one, other = (serialised(prune(model, feeds(model, (6, 5)), **options).model) for _ in range(2))
    assert one == other


def test_the_source_is_not_touched() -> None:
    model = builders.residual_net(0)
    before = serialised(model)
    run = prune(model, keep={"macs": 0.6})
    assert applied(run)
    assert serialised(model) == before


@pytest.mark.parametrize(("seed", "share_left"), [(1, 0.7), (3, 0.5), (4, 0.7), (7, 0.6), (0, 1.0)])
def test_swaps_find_units_that_together_lose_less(seed: int, share_left: float) -> None:
    model = linear_mlp(seed)
    plain, better = (prune(model, keep=0.4, refit="readers", ridge=1e-6, swaps=swaps) for swaps in (0, 100))
    assert sizes(plain.model) == sizes(better.model)
    lost = [error(run.model, model, feeds(model)) for run in (plain, better)]
    assert lost[1] <= share_left * lost[0] * (1 + 1e-9)


def test_swaps_better_one_criterion_only() -> None:
    with pytest.raises(ValueError, match="`swaps` better what"):
        PruneChannels(keep=0.5, criterion="l1", swaps=3)
