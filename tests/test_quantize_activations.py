"""Known answers on integers, what the runtime really runs, what stays in float and why, and what options do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import builders
import calibrated
import driver
import numpy as np
import onnx
import pytest

from ccompile import equalising, graph, older_opsets, onnx_io, quantising, runtime
from ccompile.analysis.shapes import shapes
from ccompile.errors import PassError
from ccompile.passes.quantize_activations import QuantizeActivations
from ccompile.quantising import Prices
from ccompile.runtime import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

    from ccompile.core import Array


def quantise(model: ir.Model, batches: Sequence[Mapping[str, Any]] | None = None, **options: Any) -> driver.Bench:
    """Run the step everywhere, calibrated and verified on `batches` or on drawn ones."""
    given = calibrated.feeds(model, (16, 16, 16, 16)) if batches is None else batches
    run = driver.bench(model, given, calibration=given)
    run.step(0, QuantizeActivations.model_validate({"where": "everywhere", **options}))
    assert run.record.verdict == "kept", run.record.reason
    return run


def reasons(run: driver.Bench) -> dict[str, str]:
    assert run.result is not None
    return {skip.node: skip.reason for skip in run.result.skipped}


def deployed_ops(model: ir.Model, folder: Path) -> Counter[str]:
    """Return the ops that ONNX Runtime runs once it has optimised the model."""
    import onnxruntime as ort

    onnx_io.save(model, folder / "model.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def dense(W: Array, b: Array) -> ir.Model:
    net = builders.Net()
    x = net.input("x", ["N", W.shape[1]])
    return net.model(
        net.node("Gemm", x, net.constant(W.astype(np.float32)), net.constant(b.astype(np.float32)), name="fc", transB=1)
    )


# ---------------------------------------------------------------------------------------------- known answers


def test_integer_weights_on_integer_inputs_are_exact() -> None:
    rng = np.random.default_rng(0)
    W = rng.integers(-127, 128, (6, 20)).astype(float)
    W[:, 3] = 127
    x = rng.integers(0, 256, (40, 20)).astype(np.float32)
    x[0, :2] = 0, 255
    model = dense(W, rng.integers(-1000, 1000, 6))
    run = quantise(model, [{"x": x}])
    found, wanted = (calibrated.outputs(m, {"x": x}) for m in (run.model, model))
    assert wanted
    for name, reference in wanted.items():
        assert (found[name] == reference).all()


def test_an_input_off_the_grid_loses_no_more_than_half_a_step_of_each() -> None:
    rng = np.random.default_rng(1)
    W = rng.integers(-127, 128, (5, 16)).astype(float)
    W[:, 0] = 127
    model = dense(W, np.zeros(5))
    x = rng.uniform(-1, 1, (64, 16)).astype(np.float32)
    run = quantise(model, [{"x": x}])
    (found,), (wanted,) = (list(calibrated.outputs(m, {"x": x}).values()) for m in (run.model, model))
    bound = 0.5 * (x.max() - x.min()) / 255 * np.abs(W).sum(1)
    assert (np.abs(found - wanted) <= bound * 1.01).all()
    assert np.abs(found - wanted).max() > 0.1 * bound.min()


def test_the_bias_makes_up_for_what_rounding_does_to_the_mean() -> None:
    rng = np.random.default_rng(2)
    model = dense(rng.standard_normal((8, 40)), np.zeros(8))
    x = (3 + 0.1 * rng.standard_normal((256, 40))).astype(np.float32)

    def shift(**options: Any) -> float:
        found = calibrated.outputs(quantise(model, [{"x": x}], **options).model, {"x": x})
        return max(float(np.abs((found[n] - y).mean(0)).max()) for n, y in calibrated.outputs(model, {"x": x}).items())

    assert shift() < 0.3 * shift(refit="none")


def test_a_padded_border_stays_zero() -> None:
    net = builders.Net(0)
    x = net.input("x", ["N", 1, 4, 4])
    model = net.model(net.node("Conv", x, net.constant(np.ones((1, 1, 3, 3), np.float32)), pads=[1] * 4, name="conv"))
    feeds = {"x": np.full((2, 1, 4, 4), 7.0, np.float32)}
    (found,) = calibrated.outputs(quantise(model, [feeds]).model, feeds).values()
    assert np.allclose(found[0, 0, [0, 0, 1], [0, 1, 1]], [28.0, 42.0, 63.0], atol=0.3)


# ---------------------------------------------------------------------------------------------- what runs


def test_a_residual_net_runs_integer_kernels_only(tmp_path: Path) -> None:
    ops = deployed_ops(quantise(builders.residual_net(3)).model, tmp_path)
    assert ops["QLinearConv"] == 6
    assert ops["QLinearAdd"] == 2
    assert ops["QGemm"] == 1
    assert not {"Conv", "Add", "Relu", "Gemm", "GlobalAveragePool"} & ops.keys()
    assert ops["QuantizeLinear"] == 1
    assert ops["DequantizeLinear"] == 0


def test_products_and_scores_of_a_transformer_run_integer_kernels(tmp_path: Path) -> None:
    ops = deployed_ops(quantise(builders.transformer_block(3)).model, tmp_path)
    assert not ops["MatMul"]
    assert ops["QLinearMatMul"] + ops["MatMulIntegerToFloat"] >= 8


@pytest.mark.parametrize("net", ["residual", "conv_bn", "grouped", "mlp", "open", "transformer"])
def test_the_deployed_form_computes_what_was_verified(net: str) -> None:
    model = builders.ZOO[net](3)
    run = quantise(model)
    for batch in calibrated.feeds(model, (6,), seed=9):
        plain = runtime.Session(run.model, Settings(1)).run(batch)
        fused = runtime.Session(run.model, Settings(1, optimise=True)).run(batch)
        for name, wanted in plain.items():
            assert wanted.size
            assert np.linalg.norm(fused[name] - wanted) <= 0.03 * np.linalg.norm(wanted)


def test_values_move_on_codes(tmp_path: Path) -> None:
    net = builders.Net(1)
    x = net.pool(net.conv(net.input("x", ["N", 3, 16, 16]), "one", (8, 3, 3, 3), pad=1), 2, 2)
    x = net.node("Slice", x, *(net.constant(np.array([v], np.int64)) for v in (0, 4, 2)))
    pads = net.constant(np.array([0, 2, 0, 0, 0, 2, 0, 0]))
    x = net.node("Pad", x, pads)
    x = net.node("Transpose", x, perm=[0, 1, 3, 2])
    run = quantise(net.model(net.conv(x, "two", (4, 12, 1, 1))))
    ops = Counter(node.op_type for node in run.model.graph)
    assert ops["QuantizeLinear"] == 3
    assert ops["DequantizeLinear"] == 2 + 4 + 1  # two data inputs, weights and biases, the output
    moved = [node for node in run.model.graph if node.op_type in ("MaxPool", "Slice", "Pad", "Transpose")]
    assert [str(node.outputs[0].dtype) for node in moved] == ["UINT8"] * 4
    assert deployed_ops(run.model, tmp_path)["QLinearConv"] == 2


def test_codes_are_pooled_behind_a_convolution_only() -> None:
    net = builders.Net(1)
    x = net.node("Transpose", net.conv(net.input("x", ["N", 3, 8, 8]), "one", (8, 3, 3, 3)), perm=[0, 1, 3, 2])
    run = quantise(net.model(net.conv(net.pool(x, 2, 2), "two", (4, 8, 1, 1))))
    assert reasons(run) == {"maxpool2": "the runtime pools codes fast behind a convolution only"}


def test_a_product_and_its_bias_become_one_kernel(tmp_path: Path) -> None:
    net = builders.Net(1)
    x = net.node("MatMul", net.input("x", ["N", 8]), net.weight("w", (8, 5)), name="fc")
    run = quantise(net.model(net.node("Add", x, net.weight("b", (5,)), name="add")))
    assert [site.nodes for site in run.record.applied] == [("fc",)]
    assert deployed_ops(run.model, tmp_path) == {"QuantizeLinear": 1, "QGemm": 1}


@pytest.mark.parametrize(("op", "op_type"), [("Gemm", "QGemm"), ("MatMul", "QLinearMatMul")])
def test_a_product_that_floats_read_behind_a_relu_runs_on_integers(op: str, op_type: str, tmp_path: Path) -> None:
    net = builders.Net(1)
    x = net.relu(net.node(op, net.input("x", ["N", 8]), net.weight("w", (8, 5)), name="fc"))
    run = quantise(net.model(net.node("Exp", x)))
    assert deployed_ops(run.model, tmp_path) == {"QuantizeLinear": 1, op_type: 1, "DequantizeLinear": 1, "Exp": 1}


def test_a_product_that_floats_read_right_away_writes_float(tmp_path: Path) -> None:
    net = builders.Net(1)
    x = net.node("Gemm", net.input("x", ["N", 8]), net.weight("w", (8, 5)), name="fc")
    run = quantise(net.model(net.node("Exp", x)))
    assert deployed_ops(run.model, tmp_path) == {"QuantizeLinear": 1, "QGemm": 1, "Exp": 1}


def test_a_bias_per_row_is_no_bias() -> None:
    net = builders.Net(1)
    x = net.node("MatMul", net.input("x", [4, 8]), net.weight("w", (8, 5)), name="fc")
    run = quantise(net.model(net.node("Add", x, net.weight("b", (4, 1)), name="add")))
    assert [node.op_type for node in run.model.graph].count("Gemm") == 0


def test_a_weight_read_twice_is_stored_once() -> None:
    run = quantise(builders.shared_weights_net(3))
    codes = [t for t in run.model.graph.initializers.values() if t.const_value is not None]
    assert (
        sum(t.const_value.dtype.name == "INT8" and len(t.const_value.shape) == 4 for t in codes if t.const_value) == 1
    )


def test_what_an_if_reads_is_float_again() -> None:
    run = quantise(builders.capturing_net(3))
    assert run.record.applied
    assert reasons(run)["choose"] == "the runtime has no integer kernel for If"


def test_a_quantised_graph_is_left_alone() -> None:
    first = quantise(builders.mlp(3)).model
    again = quantise(first)
    assert not again.record.applied
    assert set(reasons(again).values()) == {"it is quantised already"}


# ---------------------------------------------------------------------------------------------- options


def test_ranges_without_outliers_keep_the_rest_finer() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((400, 16)).astype(np.float32)
    x[7, 3] = 300.0
    model = dense(rng.standard_normal((4, 16)), np.zeros(4))
    clean = {"x": x[:7]}

    def error(**options: Any) -> float:
        run = quantise(model, [{"x": x}], tolerance={"relative_l2": 10.0}, fallback=False, refit="bias", **options)
        return calibrated.error(run.model, model, [clean])

    whole = error(ranges="minmax")
    assert error(ranges="percentile", percentile=99.9) < 0.2 * whole
    assert error(ranges="entropy") < 0.6 * whole
    assert error(ranges="mse") <= whole


@pytest.mark.parametrize("rounding", ["feedback", "descent"])
def test_rounding_in_the_metric_of_the_inputs_loses_less(rounding: str) -> None:
    rng = np.random.default_rng(5)
    model = dense(rng.standard_normal((8, 24)), np.zeros(8))
    mix = rng.standard_normal((4, 24))
    batches = [{"x": (rng.standard_normal((100, 4)) @ mix).astype(np.float32)} for _ in range(4)]
    plain, better = (quantise(model, batches, reduce_range=True, rounding=how) for how in ("nearest", rounding))
    assert calibrated.error(better.model, model, batches) < 0.9 * calibrated.error(plain.model, model, batches)


def dense_chain(depth: int = 5) -> ir.Model:
    net = builders.Net(7)
    x = net.input("x", ["N", 24])
    for index in range(depth):
        x = net.relu(net.dense(x, f"fc{index}", 24, 24))
    return net.model(x)


def test_layers_fitted_on_codes_make_up_for_what_clipped_values_lose() -> None:
    model, rng = dense_chain(3), np.random.default_rng(1)
    mix = rng.standard_normal((3, 24))
    batches = [{"x": (rng.standard_normal((200, 3)) @ mix).astype(np.float32)} for _ in range(6)]
    lost = {}
    for refit in ("none", "bias", "layers"):
        run = quantise(
            model, batches[:4], ranges="percentile", percentile=99, refit=refit, tolerance={"relative_l2": 9.0}
        )
        lost[refit] = calibrated.error(run.model, model, batches[4:])
    assert lost["layers"] < 0.8 * min(lost["none"], lost["bias"])


def test_a_fit_that_follows_an_outlier_is_not_taken() -> None:
    model = dense(np.random.default_rng(4).standard_normal((4, 16)), np.zeros(4))
    batches = calibrated.feeds(model, (50,) * 4)
    batches[0]["x"][7, 3] = 300.0
    plain, fitted = (
        quantise(model, batches, ranges="entropy", refit=refit, tolerance={"relative_l2": 9.0}).model
        for refit in ("bias", "layers")
    )
    assert calibrated.error(fitted, model, batches[3:]) <= calibrated.error(plain, model, batches[3:])


def test_a_weight_that_two_layers_read_is_rounded_as_it_is() -> None:
    net = builders.Net(3)
    w = net.weight("w", (8, 8))
    x = net.node("MatMul", net.input("x", ["N", 8]), w, name="one")
    model = net.model(net.node("MatMul", net.relu(x), w, name="two"))
    plain, fitted = (quantise(model, refit=refit).model for refit in ("bias", "layers"))
    codes = [{n: v.const_value.numpy() for n, v in m.graph.initializers.items()} for m in (plain, fitted)]  # type: ignore[union-attr]
    assert any(n.endswith("_codes") for n in codes[0])
    assert all(np.array_equal(codes[0][name], codes[1][name]) for name in codes[0])


def test_the_best_ranges_are_those_that_lose_least_on_held_out_batches() -> None:
    model = dense(np.random.default_rng(4).standard_normal((4, 16)), np.zeros(4))
    batches = calibrated.feeds(model, (50,) * 4)
    batches[0]["x"][7, 3] = 300.0
    lost = {}
    for ranges in ("best", "minmax", "percentile", "mse", "entropy"):
        run = quantise(model, batches, ranges=ranges, refit="bias", tolerance={"relative_l2": 9.0})
        lost[ranges] = calibrated.error(run.model, model, batches[3:])
    assert lost["best"] == min(lost.values()) < 0.8 * lost["minmax"]


def test_equalised_layers_have_equal_ranges_and_compute_the_same() -> None:
    model = builders.mlp(3)
    rng = np.random.default_rng(0)
    for name in ("fc1.w", "fc1.b"):
        array = np.array(model.graph.initializers[name].const_value.numpy())  # type: ignore[union-attr]
        scale = 10.0 ** rng.uniform(-2, 2, (24, 1) if array.ndim == 2 else 24)
        calibrated.set_weight(model, "fc1", array * scale, 1 if array.ndim == 2 else 2)
    twin = graph.copy(model)
    assert ("fc1", "fc2") in equalising.equalise(twin.graph)
    assert calibrated.error(twin, model, calibrated.feeds(model)) < 1e-5
    first, second = calibrated.weight(twin, "fc1"), calibrated.weight(twin, "fc2")
    assert np.allclose(np.abs(first).max(1), np.abs(second).max(0), rtol=0.02)


def test_nothing_is_equalised_through_what_does_not_scale() -> None:
    net = builders.Net(0)
    x = net.node("Sigmoid", net.dense(net.input("x", ["N", 4]), "one", 4, 6))
    assert equalising.equalise(net.model(net.dense(x, "two", 6, 2)).graph) == []


def test_equalising_helps_one_scale_per_weight() -> None:
    model = builders.mlp(3)
    spread = np.logspace(0, 3, 24)
    calibrated.set_weight(model, "fc1", calibrated.weight(model, "fc1") * spread[:, None])
    calibrated.set_weight(model, "fc1", calibrated.weight(model, "fc1", 2) * spread, 2)
    calibrated.set_weight(model, "fc2", calibrated.weight(model, "fc2") / spread)
    batches = calibrated.feeds(model, (64,))
    plain, even = (quantise(model, batches, weights="tensor", equalize=flag) for flag in (False, True))
    assert calibrated.error(even.model, model, batches) < 0.3 * calibrated.error(plain.model, model, batches)


def test_the_most_sensitive_layer_stays_in_float_until_the_tolerance_holds() -> None:
    rng = np.random.default_rng(6)
    net = builders.Net(6)
    x = net.input("x", ["N", 16])
    hidden = net.relu(net.dense(x, "fine", 16, 32))
    rough = net.constant((rng.standard_normal((32, 4)) * np.logspace(-4, 0, 32)[:, None]).astype(np.float32))
    scaled = net.node("Mul", hidden, net.constant(np.logspace(4, 0, 32).astype(np.float32)), name="wide")
    model = net.model(net.node("MatMul", scaled, rough, name="rough"))
    batches = calibrated.feeds(model, (32, 32, 32, 32))
    run = quantise(model, batches, tolerance={"relative_l2": 0.02})
    kept = {name for name, reason in reasons(run).items() if reason == "in float for the tolerance"}
    assert kept & {"rough", "wide"}
    assert any(site.nodes == ("fine",) for site in run.record.applied)
    assert calibrated.error(run.model, model, batches) <= 0.02


def test_a_tolerance_that_nothing_holds_keeps_all_in_float() -> None:
    run = quantise(builders.mlp(3), tolerance={"relative_l2": 1e-9})
    assert not run.record.applied


def test_integers_that_do_not_pay_stay_in_float() -> None:
    run = quantise(builders.mlp(3), where="faster")
    assert not run.record.applied
    assert set(reasons(run).values()) == {"the target is not faster on integers here"}


def test_large_layers_pay_for_their_passages() -> None:
    net = builders.Net(0)
    x = net.relu(net.conv(net.input("x", ["N", 32, 28, 28]), "one", (64, 32, 3, 3), pad=1))
    model = net.model(net.conv(x, "two", (64, 64, 3, 3), pad=1))
    run = quantise(model, calibrated.feeds(model, (1,)), where="faster")
    assert [site.nodes for site in run.record.applied] == [("one",), ("two",)]
    assert run.record.cost is not None
    assert run.record.cost.seconds < run.origin.cost.report.seconds


def test_without_calibration_data_there_are_no_ranges() -> None:
    run = driver.bench(builders.mlp(3))
    run.statistics = None
    with pytest.raises(PassError, match="needs calibration data"):
        run.step(0, QuantizeActivations())


# ---------------------------------------------------------------------------------------------- opsets


def test_an_opset_that_is_too_old_is_named() -> None:
    model = builders.mlp(3)
    model.opset_imports[""] = 9
    assert older_opsets.refusal(model, {}).startswith("it needs opset 13, and only models of opset 11")


def test_a_new_opset_is_left_alone() -> None:
    model = builders.mlp(3)
    assert older_opsets.refusal(model, {}) == ""
    older_opsets.upgrade(model)
    assert model.opset_imports[""] == builders.OPSET


# ---------------------------------------------------------------------------------------------- where it pays


def chosen(model: ir.Model, floats: dict[str, float], codes: dict[str, float]) -> set[str]:
    """Return the units that are worth it at these prices, passages at 0.1."""
    units = quantising.survey(model.graph, shapes(model), lambda node: None).units
    values = {str(value.name) for unit in units for value in (*unit.inputs, *unit.outputs)}
    return set(quantising.worthwhile(units, Prices(floats, codes, dict.fromkeys(values, 0.1))))


def test_pooling_stays_with_its_convolution() -> None:
    net = builders.Net(1)
    x = net.pool(net.conv(net.input("x", ["N", 3, 8, 8]), "one", (8, 3, 3, 3)), 2, 2)
    model = net.model(net.conv(x, "two", (4, 8, 1, 1)))
    floats = {"one": 1.0, "maxpool1": 0.1, "two": 9.0}
    assert chosen(model, floats, {"one": 1.5, "maxpool1": 0.1, "two": 1.0}) == {"one", "maxpool1", "two"}
    assert chosen(model, floats, {"one": 5.0, "maxpool1": 0.1, "two": 1.0}) == {"two"}


def test_a_dense_layer_that_feeds_floats_pays_no_passage_back() -> None:
    model = dense(np.ones((4, 4)), np.ones(4))
    assert chosen(model, {"fc": 1.0}, {"fc": 0.7}) == {"fc"}
    assert chosen(model, {"fc": 1.0}, {"fc": 0.95}) == set()


def test_a_dense_layer_that_feeds_floats_behind_a_relu_pays_the_passage_back() -> None:
    net = builders.Net(1)
    x = net.relu(net.node("Gemm", net.input("x", ["N", 8]), net.weight("w", (8, 5)), name="fc"))
    model = net.model(net.node("Exp", x))
    assert chosen(model, {"fc": 1.0}, {"fc": 0.6}) == {"fc"}
    assert chosen(model, {"fc": 1.0}, {"fc": 0.7}) == set()


def test_a_gain_that_estimates_cannot_tell_is_not_taken() -> None:
    model = dense(np.ones((4, 4)), np.ones(4))
    assert chosen(model, {"fc": 1.0}, {"fc": 0.8}) == set()


def kept_by(losses: dict[str, float], limit: float, saved: dict[str, float] | None = None) -> set[str]:
    """Return what of five dense layers stays on integers when their losses may add up to `limit`."""
    model = dense_chain()
    units = quantising.survey(model.graph, shapes(model), lambda node: None).units
    known = quantising.even(units)
    floats = {name: (saved or {}).get(name, 1.0) for name in known.floats}
    known = Prices(floats, known.codes, known.passages, 0.0)
    return set(quantising.fall_back(units, known, losses, lambda some: sum(losses[name] for name in some) <= limit))


def test_the_layers_that_lose_most_stay_in_float() -> None:
    losses = {"fc0": 0.1, "fc1": 5.0, "fc2": 0.2, "fc3": 3.0, "fc4": 0.3}
    assert kept_by(losses, 0.7) == {"fc0", "fc2", "fc4"}
    assert kept_by(losses, 4.0) == {"fc0", "fc2", "fc3", "fc4"}


def test_of_layers_that_lose_the_same_the_slowest_in_float_stays_on_integers() -> None:
    losses = dict.fromkeys(("fc0", "fc1", "fc2", "fc3", "fc4"), 1.0)
    assert kept_by(losses, 1.0, {"fc2": 3.0}) == {"fc2"}


def test_where_nothing_holds_all_stay_in_float() -> None:
    losses = dict.fromkeys(("fc0", "fc1", "fc2", "fc3", "fc4"), 1.0)
    assert kept_by(losses, 0.5) == set()
    assert kept_by(dict.fromkeys(losses, 0.0), -1.0) == set()
