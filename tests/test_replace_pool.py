"""replace-pool: exact where the model is, fitted where it is not, and never worse for the fit on calibration data."""

from __future__ import annotations

from typing import Any

import driver
import numpy as np
import onnx_ir as ir
import pytest
from builders import Net

from ccompile import registry, runtime
from ccompile.core import Array
from ccompile.runtime import Settings


def replaced(model: ir.Model, feeds: list[dict[str, Array]], **options: Any) -> driver.Bench:
    """Run the step, fitted to the very feeds that it is judged on."""
    step = registry.find("replace-pool").model_validate({"tolerance": {"relative_l2": 10.0}, **options})
    run = driver.bench(model, feeds, calibration=feeds)
    run.step(0, step)
    assert run.record.verdict == "kept", run.record.reason
    return run


def lost(run: driver.Bench) -> float:
    assert run.record.against_previous is not None
    found = run.record.against_previous.outputs[0].relative_l2
    assert found is not None
    return found


def drawn(*shape: int, count: int = 4) -> list[dict[str, Array]]:
    rng = np.random.default_rng(7)
    return [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def head(W: Array) -> ir.Model:
    """W[o, c, h, w]."""
    net = Net(0)
    x = net.node("Flatten", net.input("x", ["N", *W.shape[1:]]))
    return net.model(net.node("Gemm", x, net.constant(W.reshape(len(W), -1), "w"), name="fc", transB=1))


def test_a_dense_layer_that_is_the_same_everywhere_is_pooled_before_exactly() -> None:
    rng = np.random.default_rng(0)
    W = np.broadcast_to(rng.standard_normal((5, 6, 1, 1)), (5, 6, 4, 4)).astype(np.float32)
    run = replaced(head(W), drawn(64, 6, 4, 4))
    assert [node.op_type for node in run.model.graph] == ["GlobalAveragePool", "Flatten", "Gemm"]
    assert lost(run) < 1e-5


def test_a_dense_layer_that_is_not_is_fitted_by_least_squares() -> None:
    rng = np.random.default_rng(0)
    W = rng.standard_normal((5, 6, 2, 2)).astype(np.float32)
    feeds = drawn(64, 6, 2, 2)
    run = replaced(head(W), feeds, ridge=0.0)
    x = np.concatenate([feed["x"] for feed in feeds]).astype(np.float64)
    y, pooled = x.reshape(len(x), -1) @ W.reshape(5, -1).T, np.c_[x.mean((2, 3)), np.ones(len(x))]
    best = y - pooled @ np.linalg.lstsq(pooled, y, rcond=None)[0]
    assert lost(run) == pytest.approx(np.linalg.norm(best) / np.linalg.norm(y), rel=0.05)


def pooled_net(act: str = "") -> ir.Model:
    net = Net(3)
    y = net.conv(net.input("x", ["N", 3, 8, 8]), "conv", (8, 3, 3, 3), pad=1)
    y = net.node(act, y) if act else y
    return net.model(net.conv(net.pool(y, 2, 2), "last", (4, 8, 1, 1)))


@pytest.mark.parametrize("act", ["", "Relu", "Sigmoid"])
def test_strides_are_fitted_to_what_the_maximum_gave(act: str) -> None:
    feeds = drawn(8, 3, 8, 8)
    run, stiff = (replaced(pooled_net(act), feeds, ridge=ridge) for ridge in (0.0, 1.0))
    assert "MaxPool" not in [node.op_type for node in run.model.graph]
    assert lost(run) < lost(stiff) < 0.6


def test_a_mean_is_made_up_for_by_what_reads_it() -> None:
    feeds = drawn(8, 3, 8, 8)
    run = replaced(pooled_net("Relu"), feeds, max_pool="average")
    assert [node.op_type for node in run.model.graph] == ["Conv", "Relu", "AveragePool", "Conv"]
    assert lost(run) < 0.5


def test_maxima_of_what_is_the_same_in_each_window_are_kept_exactly() -> None:
    net = Net(3)
    y = net.conv(net.input("x", ["N", 3, 4, 4]), "conv", (8, 3, 1, 1))
    model = net.model(net.conv(net.pool(y, 2, 2), "last", (4, 8, 1, 1)))
    feeds = [{"x": feed["x"].repeat(2, 2).repeat(2, 3)} for feed in drawn(8, 3, 2, 2)]
    assert lost(replaced(model, feeds)) < 1e-4


def test_without_a_pooling_nothing_is_fitted() -> None:
    net = Net(3)
    model = net.model(net.conv(net.input("x", ["N", 3, 8, 8]), "conv", (8, 3, 3, 3)))
    run = replaced(model, drawn(8, 3, 8, 8))
    assert not run.record.applied
    assert lost(run) == 0


@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1), (3, 3, 0), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("size", [7, 8, 9])
def test_means_of_maxima_fill_the_map_that_they_replace(window: tuple[int, int, int], size: int) -> None:
    net = Net(3)
    model = net.model(net.pool(net.input("x", ["N", 3, size, size]), *window))
    feeds = drawn(2, 3, size, size)
    run = replaced(model, feeds, max_pool="s3")
    k, s, p = window
    x = np.pad(feeds[0]["x"], ((0, 0), (0, 0), (p, p), (p, p)), constant_values=-np.inf)
    most = np.lib.stride_tricks.sliding_window_view(x, (k, k), (2, 3)).max((4, 5))
    found = np.asarray(runtime.Session(run.model, Settings(1)).run(feeds[0])["maxpool0_out"])
    wanted = [[most[..., i : i + s, j : j + s].mean((2, 3)) for j in range(0, most.shape[3], s)] for i in at(most, s)]
    np.testing.assert_allclose(found.transpose(2, 3, 0, 1), wanted, rtol=1e-5)


def at(maps: Array, step: int) -> range:
    return range(0, maps.shape[2], step)


def test_equal_elements_are_their_weighted_mean() -> None:
    net = Net(3)
    model = net.model(net.pool(net.input("x", ["N", 3, 6, 6]), 2, 2))
    feeds = drawn(8, 3, 6, 6)
    run = replaced(model, feeds, max_pool="detail-preserving")
    assert [node.op_type for node in run.model.graph][-1] == "Div"
    same = {"x": np.broadcast_to(np.float32(1.5), (1, 3, 6, 6))}
    (found,) = runtime.Session(run.model, Settings(1)).run(same).values()
    np.testing.assert_allclose(found, 1.5, rtol=1e-6)
    assert lost(run) < 0.5 * lost(replaced(model, feeds, max_pool="average"))


def test_large_means_stay_finite_in_a_weighted_mean() -> None:
    net = Net(3)
    model = net.model(net.pool(net.input("x", ["N", 3, 6, 6]), 2, 2))
    feeds = [{"x": feed["x"] * np.float32(1e12)} for feed in drawn(8, 3, 6, 6)]
    assert lost(replaced(model, feeds, max_pool="detail-preserving")) < 0.3
