"""Planted damage is repaired to known answers; nothing gets worse on calibration data; the rest has its reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import builders
import driver
import numpy as np
import pytest
from builders import Net

from ccompile import graph, onnx_io, runtime
from ccompile.errors import PassError
from ccompile.passes.repair import Repair
from ccompile.recording import Recording
from ccompile.stats import Calibration

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

    from ccompile.core import Array


def rows(model: ir.Model, count: int, seed: int = 1) -> list[dict[str, Array]]:
    """Return `count` drawn samples for a model with an open batch and otherwise fixed inputs, in two batches."""
    rng = np.random.default_rng(seed)
    found = []
    for size in (count - count // 3, count // 3):
        shapes = {str(v.name): (graph.declared_shape(v) or ())[1:] for v in model.graph.inputs}
        drawn = {name: rng.standard_normal([size, *map(int, dims)]) for name, dims in shapes.items()}  # type: ignore[arg-type]
        found.append({name: array.astype(np.float32) for name, array in drawn.items()})
    return found


def with_weights(model: ir.Model, **changes: Array) -> ir.Model:
    """Return a copy with other constants; `_` stands for a dot in names."""
    twin = graph.copy(model)
    for key, array in changes.items():
        name = key.replace("_", ".")
        for use in list(twin.graph.initializers[name].uses()):
            graph.replace_constant(use.node, use.idx, array.astype(np.float32))
    return twin


def weight(model: ir.Model, node: str, index: int) -> Array:
    array = graph.constant(graph.node_named(model.graph, node).inputs[index])
    assert array is not None
    return array


def after(
    source: ir.Model, now: ir.Model, calibration: Sequence[Mapping[str, Any]] | None = None, **options: Any
) -> driver.Bench:
    """Run repair on `now` in a compile of `source`, verified as in a compile; nothing may be worse than before."""
    run = driver.bench(source, calibration=calibration)
    outputs = Recording()
    for produced in runtime.outputs_of(now, driver.draw_feeds(source), run.settings):
        outputs.append(produced)
    run.state = run._state(now, outputs)
    run.step(0, Repair(**options))
    assert run.record.verdict == "kept", run.record.reason
    assert run.statistics is not None
    assert run.statistics.impact(run.model) <= run.statistics.impact(now)
    assert graph.signature(run.model) == graph.signature(source)
    assert onnx_io.check(run.model) == ""
    return run


def relative_l2(run: driver.Bench) -> float:
    assert run.record.against_source is not None
    measured = [output.relative_l2 for output in run.record.against_source.outputs]
    assert measured
    return max(np.inf if value is None else value for value in measured)


def reasons(run: driver.Bench) -> dict[str, str]:
    return {skip.node: skip.reason for skip in run.record.skipped}


def notes(run: driver.Bench) -> dict[str, str]:
    return {site.nodes[0]: site.note for site in run.record.applied}


def two_dense(hidden: int = 6, between: bool = True, seed: int = 3) -> ir.Model:
    net = Net(seed)
    x = net.dense(net.input("x", ["N", 8]), "fc1", 8, hidden)
    return net.model(net.dense(net.relu(x) if between else x, "fc2", hidden, 4))


# ---------------------------------------------------------------------------------------------- known answers


@pytest.mark.parametrize("methods", [["bias"], ["affine"], ["refit"], ["bias", "affine", "batchnorm", "refit"]])
def test_a_shifted_bias_comes_back(methods: list[str]) -> None:
    source = two_dense()
    old = weight(source, "fc1", 2)
    run = after(source, with_weights(source, fc1_b=old + np.arange(6)), rows(source, 60), methods=methods)
    np.testing.assert_allclose(weight(run.model, "fc1", 2), old, atol=1e-5)
    assert relative_l2(run) < 1e-5
    assert reasons(run) == {"fc2": "nothing to repair: its output is the source's"}
    assert notes(run)["fc1"].startswith(methods[0])


def test_a_scaled_channel_comes_back() -> None:
    source = two_dense()
    scale = np.linspace(0.2, 3, 6)
    W, b = weight(source, "fc1", 1), weight(source, "fc1", 2)
    now = with_weights(source, fc1_w=W * scale[:, None], fc1_b=b * scale)
    run = after(source, now, rows(source, 60), methods=["affine"])
    np.testing.assert_allclose(weight(run.model, "fc1", 1), W, atol=1e-5)
    assert relative_l2(run) < 1e-5
    assert [site.nodes for site in run.record.applied] == [("fc1",)]


@pytest.mark.parametrize("shrink", [0.0, 0.5, 1.0])
def test_shrink_takes_a_share_of_the_slope(shrink: float) -> None:
    source = two_dense()
    W = weight(source, "fc1", 1)
    now = with_weights(source, fc1_w=W / 2, fc1_b=weight(source, "fc1", 2) + 1)
    run = after(source, now, rows(source, 60), methods=["affine"], shrink=shrink, only=["fc1"])
    np.testing.assert_allclose(weight(run.model, "fc1", 1), W / 2 * (1 + shrink), rtol=1e-5)


def test_wrong_statistics_of_a_normalisation_come_back() -> None:
    source = builders.conv_bn_net(3)
    norm = next(node for node in source.graph if node.op_type == "BatchNormalization")
    name = str(norm.name)
    mean, variance = weight(source, name, 3), weight(source, name, 4)
    now = graph.copy(source)
    for index, array in ((3, mean + 1), (4, variance * 9)):
        graph.replace_constant(graph.node_named(now.graph, name), index, array)
    run = after(source, now, rows(source, 12), methods=["batchnorm"])
    np.testing.assert_allclose(weight(run.model, name, 3), mean, atol=1e-4)
    np.testing.assert_allclose(weight(run.model, name, 4), variance, rtol=1e-3)
    assert relative_l2(run) < 1e-4
    assert [site.nodes for site in run.record.applied] == [(name,)]


@pytest.mark.parametrize(("rank", "exact"), [(4, True), (3, False)])
def test_a_linear_net_is_refitted_exactly_while_its_rank_allows(rank: int, exact: bool) -> None:
    source = two_dense(between=False)
    A = np.random.default_rng(0).standard_normal((6, rank))
    kept = (weight(source, "fc2", 1) @ weight(source, "fc1", 1))[:rank]
    now = with_weights(source, fc1_w=A @ kept)
    run = after(source, now, rows(source, 60), skip=["fc1"], ridge=0.0)
    assert (relative_l2(run) < 1e-5) == exact
    assert notes(run).keys() == {"fc2"}
    assert "fc1" in reasons(run)


def test_a_lost_layer_is_refitted_to_the_source() -> None:
    source = two_dense()
    rng = np.random.default_rng(0)
    now = with_weights(source, fc1_w=rng.standard_normal((6, 8)), fc2_w=rng.standard_normal((4, 6)))
    run = after(source, now, rows(source, 90), ridge=0.0)
    assert relative_l2(run) < 1e-5
    np.testing.assert_allclose(weight(run.model, "fc1", 1), weight(source, "fc1", 1), atol=1e-4)


@pytest.mark.parametrize("methods", [["affine"], ["refit"]])
def test_a_grouped_convolution_is_repaired(methods: list[str]) -> None:
    net = Net(5)
    source = net.model(net.conv(net.input("x", ["N", 8, 6, 6]), "conv", (12, 4, 3, 3), pad=1, groups=2))
    scale = np.linspace(0.5, 2, 12).reshape(12, 1, 1, 1)
    W, b = weight(source, "conv", 1), weight(source, "conv", 2)
    now = with_weights(source, conv_w=W * scale, conv_b=b * scale.ravel())
    run = after(source, now, rows(source, 9), methods=methods, ridge=0.0)
    np.testing.assert_allclose(weight(run.model, "conv", 1), W, atol=1e-4)
    assert relative_l2(run) < 1e-4


@pytest.mark.parametrize("methods", [["affine"], ["refit"]])
def test_a_product_without_a_bias_is_scaled_through_the_origin(methods: list[str]) -> None:
    net = Net(5)
    source = net.model(net.node("MatMul", net.input("x", ["N", 5, 8]), net.weight("fc.w", (8, 6)), name="fc"))
    W = weight(source, "fc", 1)
    now = with_weights(source, fc_w=W * np.linspace(0.5, 2, 6))
    run = after(source, now, rows(source, 30), methods=methods, ridge=0.0)
    np.testing.assert_allclose(weight(run.model, "fc", 1), W, atol=1e-5)
    assert len(graph.node_named(run.model.graph, "fc").inputs) == 2
    untouched = after(source, now, rows(source, 30), methods=["bias"])
    assert reasons(untouched) == {"fc": "it has nothing that bias could change"}
    assert not untouched.record.applied


def test_a_layer_without_a_bias_gets_one_that_it_needs() -> None:
    net = Net(5)
    x = net.relu(net.conv(net.input("x", ["N", 3, 6, 6]), "first", (6, 3, 1, 1)))
    source = net.model(net.conv(x, "second", (4, 6, 1, 1), bias=False))
    now = with_weights(source, first_w=weight(source, "first", 1) * 0.5)
    run = after(source, now, rows(source, 9), methods=["bias"], skip=["first"])
    assert weight(run.model, "second", 2).any()


def test_a_layer_before_a_residual_sum_makes_up_for_the_other_path() -> None:
    net = Net(5)
    x = net.input("x", ["N", 6])
    other, main = net.dense(x, "other", 6, 4), net.dense(x, "main", 6, 4)
    source = net.model(net.node("Add", main, other, name="sum"))
    loss = np.random.default_rng(0).standard_normal((4, 6))
    now = with_weights(source, other_w=weight(source, "other", 1) - loss)
    run = after(source, now, rows(source, 60), skip=["other"], ridge=0.0)
    np.testing.assert_allclose(weight(run.model, "main", 1), weight(source, "main", 1) + loss, atol=1e-4)
    assert relative_l2(run) < 1e-5


def test_a_layer_with_more_columns_than_rows_meets_all_its_rows() -> None:
    net = Net(5)
    source = net.model(net.dense(net.input("x", ["N", 20]), "fc", 20, 4))
    calibration = rows(source, 9)
    now = with_weights(source, fc_w=np.random.default_rng(0).standard_normal((4, 20)))
    run = after(source, now, calibration, methods=["refit"], ridge=0.0)
    assert run.statistics is not None
    assert run.statistics.impact(now) > 0.1
    assert run.statistics.impact(run.model) < 1e-9


# ---------------------------------------------------------------------------------------------- never worse


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("net", builders.ZOO)
def test_noise_in_all_weights_is_never_made_worse(net: str, seed: int) -> None:
    source = builders.ZOO[net](3)
    now = graph.copy(source)
    rng = np.random.default_rng(seed)
    for node in list(now.graph):
        for index, value in enumerate(node.inputs):
            if value is None or not value.is_initializer() or node.op_type == "DequantizeLinear":
                continue
            array = graph.constant(value)
            if array is not None and array.dtype.kind == "f" and array.ndim:
                noise = 1 + 0.2 * rng.standard_normal(array.shape)
                graph.replace_constant(node, index, (array * noise).astype(array.dtype))
    run = after(source, now)
    assert run.record.applied
    assert all(" -> " in site.note for site in run.record.applied)


def test_all_is_undone_when_the_outputs_got_worse() -> None:
    class Worse(Calibration):
        found = 0.0

        def impact(self, model: ir.Model, base: ir.Model | None = None) -> float:
            self.found += 1.0
            return self.found

    source = two_dense()
    now = with_weights(source, fc1_b=weight(source, "fc1", 2) + 1)
    run = driver.bench(source)
    run.state = run._state(now, run.state.outputs)
    run.statistics = Worse(source, lambda: driver.draw_feeds(source, 1), run.settings)
    run.step(0, Repair())
    assert not run.record.applied
    assert reasons(run)["fc1"] == "undone: all repairs together took the outputs from 1 to 2 off the source's"
    assert driver.proto_of(run.model) == driver.proto_of(now)


# ---------------------------------------------------------------------------------------------- left alone


def test_it_is_refused_without_calibration_data() -> None:
    run = driver.bench(two_dense())
    run.statistics = None
    with pytest.raises(PassError, match="calibration") as caught:
        run.step(0, Repair())
    assert "data.calibration" in str(caught.value)


def test_a_shared_weight_stays_and_biases_move() -> None:
    source = builders.shared_weights_net(3)
    now = with_weights(source, b=weight(source, "one", 2) + 1)
    run = after(source, now)
    for name in ("one", "two"):
        assert notes(run)[name].endswith("; its weight is shared")
        np.testing.assert_allclose(weight(run.model, name, 2), weight(source, name, 2), atol=1e-5)
    assert graph.node_named(run.model.graph, "one").inputs[1] is graph.node_named(run.model.graph, "two").inputs[1]
    untouched = after(source, now, methods=["affine", "refit"])
    assert reasons(untouched)["one"] == reasons(untouched)["two"] == "its weight is shared"


def test_an_encoded_weight_stays_and_the_bias_moves() -> None:
    source = builders.ZOO["quantised"](3)
    layers = [node for node in source.graph if node.op_type == "Gemm"]
    now = graph.copy(source)
    first = graph.node_named(now.graph, str(layers[0].name))
    graph.replace_constant(first, 2, weight(source, str(first.name), 2) + np.float32(0.5))
    run = after(source, now)
    assert notes(run)[str(first.name)].startswith("bias:")
    np.testing.assert_allclose(weight(run.model, str(first.name), 2), weight(source, str(first.name), 2), atol=1e-4)


def test_a_layer_with_other_channels_is_left_and_its_reader_fitted() -> None:
    source, now = two_dense(6), two_dense(5)
    run = after(source, now, rows(source, 60))
    assert reasons(run)["fc1"].startswith("`fc1_out` had another shape in the source")
    assert notes(run).keys() == {"fc2"}


def test_a_layer_whose_output_the_source_lacks_is_left() -> None:
    source = two_dense()
    now = with_weights(source, fc1_b=weight(source, "fc1", 2) + 1)
    graph.node_named(now.graph, "fc1").outputs[0].name = "new"
    run = after(source, now, rows(source, 60))
    assert reasons(run) == {"fc1": "the source has no value `new` to fit to"}


def test_a_bias_that_differs_between_rows_is_left() -> None:
    net = Net(5)
    x = net.input("x", [3, 6])
    source = net.model(net.node("Gemm", x, net.weight("fc.w", (6, 4)), net.weight("fc.b", (3, 4)), name="fc"))
    now = with_weights(source, fc_w=weight(source, "fc", 1) * 2)
    assert reasons(after(source, now)) == {"fc": "its bias is not one constant per channel"}


def test_a_normalisation_without_the_method_is_left() -> None:
    source = builders.conv_bn_net(3)
    now = graph.copy(source)
    norm = next(node for node in now.graph if node.op_type == "BatchNormalization")
    graph.replace_constant(norm, 3, weight(now, str(norm.name), 3) + np.float32(1))
    run = after(source, now, rows(source, 6), methods=["refit"])
    assert reasons(run)[str(norm.name)] == "`methods` has no batchnorm"


@pytest.mark.parametrize("given", [{"methods": []}, {"methods": ["finetune"]}, {"shrink": 1.5}, {"ridge": -1}])
def test_wrong_options_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        Repair(**given)
