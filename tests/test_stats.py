"""Calibration statistics: what moments hold, that one sweep is one sweep, and how far outputs are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import calibrated
import coupled
import numpy as np
import onnx_ir as ir
import pytest
from builders import Net, conv_bn_net, mlp, residual_net
from calibrated import calibration, dense_chain, feeds, layers, outputs, set_weight, weight

from ccompile import graph, runtime, stats
from ccompile.analysis import linear
from ccompile.errors import PassError
from ccompile.moments import Layer, Moments
from ccompile.stats import divergence
from ccompile.walking import first_change

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ccompile.core import Array


def same(one: Moments, other: Moments) -> None:
    """All that two moments say agrees."""
    assert (one.rows, one.seen) == (other.rows, other.seen)
    assert one.rows
    for left, right in (
        (one.sx, other.sx),
        (one.sy, other.sy),
        (one.yy, other.yy),
        *zip(one.centred(), other.centred(), strict=True),
    ):
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------- moments


def filled(layer: Layer, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], parts: int, wide: bool) -> Moments:
    found = Moments(layer)
    for a, b in zip(np.array_split(x, parts), np.array_split(y, parts), strict=True):
        found.add(a[None], b[None], len(a), wide)
    return found


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_moments_are_those_of_all_rows_however_they_come(parts: int, wide: bool) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, 3)) + 5, rng.standard_normal((20, 2)) - 1
    found = filled(layers(mlp(0))["fc1"], x, y, parts, wide)
    assert found.rows == found.seen == 20
    np.testing.assert_allclose(found.mean_x[0], x.mean(0))
    np.testing.assert_allclose(found.mean_y[0], y.mean(0))
    np.testing.assert_allclose(found.variance_y[0], y.var(0))
    np.testing.assert_allclose(found.power[0], 20 * y.var(0))
    H, C = found.centred()
    np.testing.assert_allclose(H[0], 20 * np.cov(x.T, bias=True), atol=1e-9)
    np.testing.assert_allclose(C[0], (y - y.mean(0)).T @ (x - x.mean(0)), atol=1e-9)
    assert (found.x is None) != wide
    assert (found.xx is None) == wide


# ---------------------------------------------------------------------------------------------- one graph


def test_moments_of_a_dense_layer_are_those_of_its_input_and_output() -> None:
    model = mlp(0)
    batches = feeds(model)
    found = calibration(model, batches).moments(model, list(layers(model).values()))["fc2"]
    read = [outputs(model, batch, "relu1_out", "fc2_out") for batch in batches]
    x, y = (np.concatenate([b[name] for b in read]).astype(np.float64) for name in ("relu1_out", "fc2_out"))
    assert found.rows == 32
    np.testing.assert_allclose(found.mean_x[0], x.mean(0))
    np.testing.assert_allclose(found.mean_y[0], y.mean(0))
    assert found.xx is not None
    assert found.yx is not None
    np.testing.assert_allclose(found.xx[0], x.T @ x)
    np.testing.assert_allclose(found.yx[0], y.T @ x)


def test_statistics_of_a_convolution_are_those_of_its_gemm() -> None:
    net = Net(1)
    conv = net.model(net.conv(net.input("x", ["N", 3, 6, 5]), "conv", (4, 3, 3, 2), stride=2, pad=1))
    (form,) = layers(conv).values()
    batches = feeds(conv, (3, 2))
    rows = []
    for batch in batches:
        y = outputs(conv, batch)["conv_out"]
        rows.append(linear.input_rows(form, batch["x"], y.shape, np.arange(linear.row_count(form, y.shape)))[0])
    net = Net(1)
    flat = net.model(net.dense(net.input("x", ["N", 18]), "gemm", 18, 4))
    set_weight(flat, "gemm", weight(conv, "conv").reshape(4, 18))
    set_weight(flat, "gemm", weight(conv, "conv", 2), 2)
    unfolded = [{"x": r.astype(np.float32)} for r in rows]
    gemm = layers(flat)["gemm"]
    same(
        calibration(conv, batches).moments(conv, [form])["conv"],
        calibration(flat, unfolded).moments(flat, [gemm])["gemm"],
    )


def test_rows_are_capped_per_batch_and_counted() -> None:
    net = Net(1)
    model = net.model(net.conv(net.input("x", ["N", 3, 8, 8]), "conv", (4, 3, 1, 1)))
    (form,) = layers(model).values()
    batches = feeds(model, (2, 2, 2))
    assert calibration(model, batches).moments(model, [form])["conv"].rows == 3 * 128
    found = calibration(model, batches, cap=30).moments(model, [form])["conv"]
    assert (found.rows, found.seen) == (30, 3 * 128)


def test_the_sample_of_rows_follows_the_seed() -> None:
    net = Net(1)
    model = net.model(net.conv(net.input("x", ["N", 3, 8, 8]), "conv", (4, 3, 1, 1)))
    (form,) = layers(model).values()
    batches = feeds(model)
    one, again, other = (
        calibration(model, batches, seed=seed, cap=30).moments(model, [form])["conv"] for seed in (0, 0, 1)
    )
    assert np.array_equal(one.sx, again.sx)
    assert not np.array_equal(one.sx, other.sx)


def wide_net(width: int = 40) -> ir.Model:
    net = Net(4)
    return net.model(net.dense(net.input("x", ["N", width]), "fc", width, 3))


def test_a_layer_wider_than_its_rows_keeps_the_rows() -> None:
    model = wide_net()
    found = calibration(model, feeds(model, (16, 16))).moments(model, list(layers(model).values()))["fc"]
    assert found.xx is None
    assert found.x is not None
    assert found.x.shape == (1, 32, 40)
    found = calibration(model, feeds(model, (16, 24))).moments(model, list(layers(model).values()))["fc"]
    assert found.x is not None


def test_a_layer_no_wider_than_its_rows_keeps_its_gram_matrix() -> None:
    model = wide_net()
    found = calibration(model, feeds(model, (20, 20))).moments(model, list(layers(model).values()))["fc"]
    assert found.x is None
    assert found.xx is not None


@pytest.mark.parametrize("sizes", [(30, 4), (4, 30)])
def test_a_last_batch_of_another_size_does_not_change_what_is_kept(sizes: tuple[int, int]) -> None:
    model = wide_net()
    batches = feeds(model, sizes)
    found = calibration(model, batches).moments(model, list(layers(model).values()))["fc"]
    x = np.concatenate([batch["x"] for batch in batches]).astype(np.float64)
    H, _ = found.centred()
    np.testing.assert_allclose(H[0], 34 * np.cov(x.T, bias=True), atol=1e-6)


def test_tensors_beyond_the_limit_take_several_inferences_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = conv_bn_net(0)
    wanted, batches = list(layers(model).values()), feeds(model)
    whole = calibration(model, batches).moments(model, wanted)
    monkeypatch.setattr(stats, "HELD_BYTES", 1)
    parts = calibration(model, batches).moments(model, wanted)
    assert whole.keys() == parts.keys() == {"conv1", "conv2", "fc"}
    for name in whole:
        same(whole[name], parts[name])


def test_an_empty_calibration_set_is_refused() -> None:
    with pytest.raises(PassError, match="the calibration data is empty"):
        calibration(mlp(0), [])


# ---------------------------------------------------------------------------------------------- chains


@pytest.mark.parametrize("name", ["chain", "grouped", "transposed", "squeeze_excite", "flattened", "dense_block"])
@pytest.mark.parametrize("cap", [stats.ROWS, 20])
def test_a_chain_through_an_unchanged_copy_finds_the_graphs_own_moments(name: str, cap: int) -> None:
    model = coupled.NETS[name]()
    found = calibration(model, feeds(model, (4, 3)), cap=cap)
    whole = found.moments(model, list(layers(model).values()))
    chain = found.chain(graph.copy(model))
    assert len(whole) > 1
    for form in layers(model).values():
        same(chain.moments(form), whole[form.name])


def test_a_chain_can_spare_the_batches_that_are_held_out() -> None:
    model = mlp(0)
    batches = feeds(model, (4,) * 8)
    found = calibration(model, batches).chain(graph.copy(model), spare=True).moments(layers(model)["fc1"])
    kept = np.concatenate([batch["x"] for index, batch in enumerate(batches) if index not in (3, 7)])
    assert found.rows == len(kept)
    np.testing.assert_allclose(found.sx[0], kept.sum(0), rtol=1e-5)


def test_a_chain_targets_the_source_from_the_inputs_of_the_graph_under_work() -> None:
    source = mlp(0)
    current = graph.copy(source)
    set_weight(current, "fc1", 2 * weight(current, "fc1"))
    batches = feeds(source, (40,))
    found = calibration(source, batches).chain(current).moments(layers(current)["fc2"])
    x, y = outputs(current, batches[0], "relu1_out")["relu1_out"], outputs(source, batches[0], "fc2_out")["fc2_out"]
    np.testing.assert_allclose(found.sx[0], x.sum(0), rtol=1e-5)
    np.testing.assert_allclose(found.sy[0], y.sum(0), rtol=1e-4, atol=1e-5)
    assert found.yx is not None
    np.testing.assert_allclose(found.yx[0], y.T.astype(np.float64) @ x, rtol=1e-4, atol=1e-4)


def test_targets_may_be_some_of_the_sources_channels() -> None:
    source = mlp(0)
    current = graph.copy(source)
    kept = np.arange(16) % 3 == 0
    set_weight(current, "fc2", weight(current, "fc2")[kept])
    set_weight(current, "fc2", weight(current, "fc2", 2)[kept], 2)
    set_weight(current, "fc3", weight(current, "fc3")[:, kept])
    batches = feeds(source)
    found = calibration(source, batches).chain(current).moments(layers(current)["fc2"], layers(source)["fc2"], kept)
    whole = calibration(source, batches).moments(source, [layers(source)["fc2"]])["fc2"]
    np.testing.assert_allclose(found.sy, whole.sy[:, kept], rtol=1e-6)
    np.testing.assert_allclose(found.sx, whole.sx, rtol=1e-6)


def test_a_layer_that_the_source_does_not_have_is_refused() -> None:
    source, current = dense_chain(2), dense_chain(3)
    chain = calibration(source, feeds(source)).chain(current)
    chain.moments(layers(current)["fc1"])
    with pytest.raises(PassError, match="the source has no value `fc2_out` to fit to"):
        chain.moments(layers(current)["fc2"])


def executed(model: ir.Model, monkeypatch: pytest.MonkeyPatch, wanted: Sequence[str] = ()) -> list[str]:
    """The nodes that a chain over `wanted` (all) layers of a copy ran, in both graphs."""
    ran: list[str] = []
    real = runtime.part_of

    def counted(of: ir.Model, nodes: Sequence[ir.Node], *rest: Any) -> ir.Model:
        ran.extend(str(node.name) for node in nodes)
        return real(of, nodes, *rest)

    monkeypatch.setattr(runtime, "part_of", counted)
    chain = calibration(model, feeds(model, (2,))).chain(graph.copy(model))
    for name, form in layers(model).items():
        if not wanted or name in wanted:
            chain.moments(form)
    return ran


@pytest.mark.parametrize("depth", [10, 20, 40])
def test_a_chain_runs_each_node_of_each_graph_once(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense_chain(depth)
    ran = executed(model, monkeypatch)
    # the source up to its last dense layer, the copy up to what that layer reads
    assert len(ran) == (2 * depth - 1) + (2 * depth - 2)
    assert max(ran.count(name) for name in ran) == 2


def test_a_chain_runs_what_lies_between_wanted_layers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = executed(dense_chain(10), monkeypatch, ["fc3", "fc8"])
    assert len(ran) == 17 + 16
    assert max(ran.count(name) for name in ran) == 2


def test_only_live_tensors_are_held() -> None:
    model = dense_chain(6)
    chain = calibration(model, feeds(model, (2,))).chain(graph.copy(model))
    for form in layers(model).values():
        chain.moments(form)
        assert [set(batch) for batch in chain.current.live] == [{form.input}]
        assert [set(batch) for batch in chain.source.live] == [{form.output}]


# ---------------------------------------------------------------------------------------------- residual paths


def test_the_target_before_an_add_is_what_the_other_path_leaves_to_do() -> None:
    source = residual_net(0)
    current = graph.copy(source)
    batches = feeds(source, (3,))
    set_weight(current, "stem", 0.5 * weight(current, "stem"))
    found = calibration(source, batches).chain(current).moments(layers(current)["a2"])
    total = outputs(source, batches[0], "add_a_out")["add_a_out"].astype(np.float64)
    skip = outputs(current, batches[0], "relu1_out")["relu1_out"].astype(np.float64)
    np.testing.assert_allclose(found.sy[0], (total - skip).sum((0, 2, 3)), rtol=1e-4, atol=1e-3)


def test_the_target_is_the_layers_own_output_while_the_other_path_is_still_to_come() -> None:
    source = residual_net(0)
    current = graph.copy(source)
    batches = feeds(source, (3,))
    set_weight(current, "a1", 0.5 * weight(current, "a1"))
    found = calibration(source, batches).chain(current).moments(layers(current)["b2"])
    own = outputs(source, batches[0], "b2_out")["b2_out"].astype(np.float64)
    np.testing.assert_allclose(found.sy[0], own.sum((0, 2, 3)), rtol=1e-4, atol=1e-3)


def test_rows_that_are_held_are_sampled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[int] = []
    take = linear.input_rows

    def counted(form: Layer, x: Array, shape: tuple[int, ...], picks: Array) -> Array:
        sampled.append(len(picks))
        return take(form, x, shape, picks)

    monkeypatch.setattr(linear, "input_rows", counted)
    model = dense_chain(2, width=8)
    form = layers(model)["fc1"]
    found = calibration(model, feeds(model, (5, 5, 5, 5))).chain(graph.copy(model)).moments(form)
    assert found.held is not None
    assert (found.rows, found.held.rows) == (20, 5)
    assert sampled == [5, 5, 5, 5]


# ---------------------------------------------------------------------------------------------- impact, divergence


def test_the_impact_of_nothing_is_nothing() -> None:
    model = conv_bn_net(0)
    found = calibration(model, feeds(model))
    assert found.impact(graph.copy(model)) == 0.0


def test_the_impact_grows_with_the_change() -> None:
    model = conv_bn_net(0)
    found = calibration(model, feeds(model))
    impacts = []
    for factor in (1.01, 1.1, 1.5):
        changed = graph.copy(model)
        set_weight(changed, "fc", factor * weight(changed, "fc"))
        impacts.append(found.impact(changed))
    assert 0 < impacts[0] < impacts[1] < impacts[2]


def test_the_impact_of_later_and_later_changes_is_that_of_whole_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    base = coupled.NETS["residual"]()
    batches = feeds(base, (3, 2, 2, 2, 3, 2, 2, 2))
    found, whole = calibration(base, batches), calibration(base, batches)
    parts: list[int] = []
    real = runtime.part_of

    def counted(model: ir.Model, nodes: Sequence[ir.Node], *rest: Any) -> ir.Model:
        parts.append(len(nodes))
        return real(model, nodes, *rest)

    monkeypatch.setattr(runtime, "part_of", counted)
    order = [name for name in layers(base) if name != "stem"]
    for name in (*order, order[0]):  # the last lies behind: it takes a whole run
        changed = graph.copy(base)
        set_weight(changed, name, 1.5 * weight(changed, name))
        assert found.impact(changed, base) == whole.impact(changed) > 0
    assert len(parts) == 2 * len(order), "each step of the common beginning, and each rest, is one session"
    assert sum(parts[::2]) < len(base.graph)
    assert found.impact(graph.copy(base), base) == 0


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_first_change_is_a_node_with_another_name_constant_or_attribute(place: int) -> None:
    base = conv_bn_net(0)
    assert first_change(base, graph.copy(base)) == len(base.graph)
    changed = graph.copy(base)
    node = graph.node_named(changed.graph, "conv2")
    if place == 0:
        node.name = "other"
    elif place == 1:
        set_weight(changed, "conv2", weight(changed, "conv2"))
    else:
        node.attributes["strides"] = ir.AttrInt64s("strides", [3, 3])
    assert first_change(base, changed) == [str(n.name) for n in base.graph].index("conv2")


def test_divergence_of_scores_is_that_of_their_softmax() -> None:
    scores, reference = np.array([[0.0, np.log(3.0)]], np.float32), np.array([[0.0, 0.0]], np.float32)
    wanted = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert divergence({"y": scores}, {"y": reference}) == pytest.approx(wanted, rel=1e-6)


def test_divergence_of_scores_ignores_a_common_shift() -> None:
    reference = np.array([[1.0, 2.0, -1.0]], np.float32)
    assert divergence({"y": reference + 100}, {"y": reference}) == pytest.approx(0, abs=1e-6)


def test_divergence_of_probabilities_takes_them_as_they_are() -> None:
    p, q = np.array([[0.5, 0.5]], np.float32), np.array([[0.25, 0.75]], np.float32)
    wanted = 0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)
    assert divergence({"y": q}, {"y": p}) == pytest.approx(wanted, rel=1e-6)


def test_divergence_without_classes_is_the_relative_squared_error() -> None:
    assert divergence({"y": np.array([1.0, 3.0])}, {"y": np.array([1.0, 2.0])}) == pytest.approx(1 / 5)


def test_divergence_sums_outputs_and_leaves_integers_out() -> None:
    one = {"y": np.array([1.0, 3.0]), "z": np.array([2.0]), "k": np.array([7])}
    other = {"y": np.array([1.0, 2.0]), "z": np.array([1.0]), "k": np.array([8])}
    assert divergence(one, other) == pytest.approx(1 / 5 + 1)


def test_divergence_is_the_mean_over_rows() -> None:
    reference = np.zeros((2, 2), np.float32)
    scores = np.array([[0.0, np.log(3.0)], [0.0, 0.0]], np.float32)
    alone = divergence({"y": scores[:1]}, {"y": reference[:1]})
    assert divergence({"y": scores}, {"y": reference}) == pytest.approx(alone / 2)


def test_the_helpers_observe_something() -> None:
    assert calibrated.error(mlp(0), mlp(1), feeds(mlp(0))) > 0.1
