"""What split-separable makes of a kernel: planted terms, kernels of any dimension, its cost and its budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import driver
import numpy as np
import onnx_ir as ir
import pytest
from builders import Net
from calibrated import calibration, error, feeds, layers, skips, weight

from ccompile import graph
from ccompile.analysis import linear
from ccompile.passes.split_separable import SplitSeparable

if TYPE_CHECKING:
    from ccompile.core import Array


def conv(
    shape: tuple[int, ...] = (8, 6, 3, 5), size: tuple[int, ...] = (9, 11), W: Array | None = None, **attributes: Any
) -> ir.Model:
    net = Net(0)
    x = net.input("x", ["N", shape[1], *size])
    w = net.weight("w", shape) if W is None else net.constant(W.astype(np.float32), "w")
    return net.model(net.node("Conv", x, w, name="conv", **attributes))


def planted(terms: int, shape: tuple[int, ...]) -> Array:
    rng = np.random.default_rng(4)
    P, D = rng.standard_normal((shape[0], shape[1], terms)), rng.standard_normal((terms, *shape[1:]))
    W: Array = np.einsum("ocm,mc...->oc...", P, D)
    return W


def run_of(model: ir.Model, **options: object) -> driver.Bench:
    run = driver.bench(model, feeds(model, seed=6))
    run.statistics = calibration(model, feeds(model))
    run.step(0, SplitSeparable.model_validate(options))
    assert run.record.verdict == "kept"
    return run


def form_of(model: ir.Model) -> tuple[Array, Any]:
    form = layers(model)["conv"]
    return linear.matrix(graph.node_named(model.graph, "conv"), form)[0], form


def gram(d: int) -> Array:
    rng = np.random.default_rng(1)
    X = rng.standard_normal((6 * d, d)) @ (rng.standard_normal((d, d)) * np.arange(1, d + 1) ** -0.5)
    H: Array = X.T @ X / len(X)
    return H


@pytest.mark.parametrize("statistics", ["calibration", "weights"])
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("kernel", [(3, 5), (1, 7), (5,), (2, 3, 2)])
def test_planted_terms_lose_nothing(kernel: tuple[int, ...], terms: int, statistics: str) -> None:
    shape = (16, 6, *kernel)
    size = {1: (48,), 2: (14, 15), 3: (5, 7, 6)}[len(kernel)]
    model = conv(shape, size, planted(terms, shape), strides=[2] * len(kernel), pads=[1] * 2 * len(kernel))
    run = run_of(model, rank=terms, statistics=statistics)
    (site,) = run.record.applied
    assert site.note.startswith(f"rank {terms} of {np.prod(kernel)}")
    assert weight(run.model, "conv/D").shape == (6 * terms, 1, *kernel)
    assert error(run.model, model, feeds(model, seed=9)) < 1e-5


@pytest.mark.parametrize("terms", [1, 2])
def test_the_least_number_of_terms_within_an_error_is_taken(terms: int) -> None:
    shape = (48, 32, 3, 3)
    model = conv(shape, (32, 32), planted(terms, shape))
    run = run_of(model, error=1e-9, statistics="weights")
    (site,) = run.record.applied
    assert site.note.startswith(f"rank {terms} of 9")
    assert error(run.model, model, feeds(model, (1,), seed=9)) < 1e-5


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_data_never_make_it_lose_more(rank: int) -> None:
    W, form = form_of(conv())
    step, H = SplitSeparable(keep=0.5), gram(90)
    with_data, without = (step.fit(W, given, form, rank) for given in (H, None))
    moved = without.composed - W
    assert with_data.loss <= float(((moved @ H) * moved).sum()) * (1 + 1e-9) + 1e-9


def test_without_data_each_channel_loses_its_discarded_spectrum() -> None:
    W, form = form_of(conv())
    lost = SplitSeparable(keep=0.5).losses(W, None, form, range(1, 9))
    s = np.linalg.svd(W.reshape(8, 6, 15).transpose(1, 0, 2), compute_uv=False)
    np.testing.assert_allclose(lost, [np.square(s[:, rank:]).sum() for rank in range(1, 9)], atol=1e-12)


def test_all_numbers_of_terms_are_tried() -> None:
    run = run_of(conv((16, 8, 3, 3), (8, 8)), rank=5)
    (site,) = run.record.applied
    assert site.note.startswith("rank 5 of 9")


def test_all_stages_run_behind_the_stride() -> None:
    run = run_of(conv((16, 8, 3, 3), (8, 8), strides=[2, 2], pads=[1] * 4), rank=2)
    macs = {node.name: node.macs for node in run.price(run.model).nodes}
    assert macs == {"conv/D": 2 * 8 * 9 * 16, "conv/P": 16 * 2 * 8 * 16}


@pytest.mark.parametrize("what", ["macs", "params"])
def test_a_budget_is_met(what: str) -> None:
    net = Net(0)
    x = net.relu(net.conv(net.input("x", ["N", 4, 8, 8]), "one", (8, 4, 3, 3), pad=1))
    model = net.model(net.conv(x, "two", (12, 8, 3, 3), pad=1, stride=2))
    run = run_of(model, keep={what: 0.6}, tolerance={"relative_l2": 1e9})
    now, source = run.price(run.model).report, run.origin.cost.report
    assert run.record.applied
    assert 0.3 * getattr(source, what) < getattr(now, what) <= 0.6 * getattr(source, what)


def test_equal_input_gives_equal_bytes() -> None:
    first, second = (driver.proto_of(run_of(conv(), keep=0.5).model).SerializeToString() for _ in range(2))
    assert first == second


def test_dense_layers_are_no_sites_and_pointwise_ones_are_left_to_split_svd() -> None:
    net = Net(0)
    x = net.conv(net.input("x", ["N", 6, 1, 1]), "point", (12, 6, 1, 1))
    model = net.model(net.dense(net.node("Flatten", x), "fc", 12, 12))
    run = run_of(model, rank=1)
    assert not run.record.applied
    assert skips(run) == {"point": "its kernel has one tap: split-svd splits it"}
