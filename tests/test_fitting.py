"""Sequential refits: what a linear net can recover it recovers, a planted loss is made up for, nothing gets worse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from builders import Net, residual_net
from calibrated import calibration, error, feeds, layers, outputs, set_weight, weight
from hypothesis import given, settings
from hypothesis import strategies as st

from ccompile import fitting, graph
from ccompile.fitting import Refitted
from ccompile.moments import Layer, Moments

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from calibrated import Feeds

    from ccompile.core import Array


def refit(
    source: ir.Model,
    current: ir.Model,
    batches: Sequence[Feeds],
    wanted: Iterable[str] | None = None,
    ridge: float = 0.0,
) -> list[Refitted]:
    """Refit layers (all) of `current` to the source."""
    names = layers(current) if wanted is None else wanted
    return fitting.refit(current, names, fitting.forms(source), calibration(source, batches).chain(current), ridge)


def linear_net(bias: bool = True, conv: bool = False) -> ir.Model:
    """Three linear layers with nothing between, so that any loss of full rank can be undone."""
    net = Net(6)
    if conv:
        x = net.input("x", ["N", 3, 5, 5])
        x = net.conv(x, "a", (6, 3, 3, 3), bias=bias)
        x = net.conv(x, "b", (5, 6, 1, 1), bias=bias)
        return net.model(net.conv(x, "c", (2, 5, 1, 1), bias=bias))
    x = net.input("x", ["N", 6])
    for name, ins, outs in (("a", 6, 8), ("b", 8, 7), ("c", 7, 3)):
        x = (
            net.dense(x, name, ins, outs)
            if bias
            else net.node("MatMul", x, net.weight(f"{name}.w", (ins, outs)), name=name)
        )
    return net.model(x)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_refit_of_any_changed_layer_of_a_linear_net_restores_the_source(name: str, conv: bool) -> None:
    source = linear_net(conv=conv)
    current, batches = graph.copy(source), feeds(source, (40, 40))
    rng = np.random.default_rng(0)
    set_weight(current, name, weight(current, name) + 0.5 * rng.standard_normal(weight(current, name).shape))
    set_weight(current, name, weight(current, name, 2) + 1, 2)
    assert error(current, source, batches) > 0.1
    found = refit(source, current, batches)
    assert error(current, source, feeds(source, seed=9)) < 1e-5
    assert [fit.name for fit in found] == ["a", "b", "c"]
    assert max(fit.after for fit in found) < 1e-9


def test_a_refit_reads_nothing_into_a_channel_that_hardly_varies() -> None:
    net = Net(8)
    hidden = net.relu(net.dense(net.input("x", ["N", 6]), "a", 6, 8))
    source = net.model(net.dense(hidden, "b", 8, 3))
    faint = np.ones((8, 1))
    faint[5] = 1e-8
    set_weight(source, "a", weight(source, "a") * faint)
    set_weight(source, "a", weight(source, "a", 2) * faint[:, 0], 2)
    current, batches = graph.copy(source), feeds(source, (40, 40))
    W = weight(source, "a")
    set_weight(current, "a", W + 0.5 * faint * np.random.default_rng(0).standard_normal(W.shape))
    (found,) = refit(source, current, batches, ["b"], ridge=1e-3)
    assert found.after < found.before
    assert np.abs(weight(current, "b")).max() < 1000 * np.abs(weight(source, "b")).max()


def test_a_refit_of_later_layers_makes_up_for_an_earlier_one_while_rank_allows() -> None:
    source = linear_net()
    current, batches = graph.copy(source), feeds(source, (60,))
    W = weight(current, "a")
    W[6:] = 0  # two of eight rows go: the six left still carry all six inputs
    set_weight(current, "a", W)
    refit(source, current, batches, ["b"])
    assert error(current, source, feeds(source, seed=9)) < 1e-5


def test_a_refit_cannot_restore_lost_rank() -> None:
    source = linear_net()
    current, batches = graph.copy(source), feeds(source, (60,))
    W = weight(current, "a")
    W[2:] = 0
    set_weight(current, "a", W)
    set_weight(current, "a", np.zeros(8), 2)
    before = error(current, source, batches)
    (found,) = refit(source, current, batches, ["c"])
    assert 0.01 < found.after < found.before
    assert 0.01 < error(current, source, batches) < before


def test_a_matmul_is_refitted_without_a_bias() -> None:
    source = linear_net(bias=False)
    current, batches = graph.copy(source), feeds(source, (40,))
    set_weight(current, "b", 1.5 * weight(current, "b"))
    refit(source, current, batches, ["b"])
    assert error(current, source, feeds(source, seed=9)) < 1e-5
    assert len(graph.node_named(current.graph, "b").inputs) == 2


def test_a_layer_wider_than_its_rows_is_refitted_from_them() -> None:
    net = Net(1)
    source = net.model(net.dense(net.input("x", ["N", 50]), "fc", 50, 4))
    current, batches = graph.copy(source), feeds(source, (12, 8))
    set_weight(current, "fc", 0.5 * weight(current, "fc"))
    (found,) = refit(source, current, batches)
    assert found.before > 0.1
    assert found.after < 1e-9
    assert error(current, source, batches) < 1e-5


def test_only_the_named_layers_change() -> None:
    source = linear_net()
    current, batches = graph.copy(source), feeds(source, (40,))
    set_weight(current, "a", 1.1 * weight(current, "a"))
    found = refit(source, current, batches, ["b"])
    assert [fit.name for fit in found] == ["b"]
    assert np.array_equal(weight(current, "c"), weight(source, "c"))
    assert not np.array_equal(weight(current, "b"), weight(source, "b"))


def test_a_shared_weight_is_passed_by() -> None:
    net = Net(1)
    shared = net.weight("w", (4, 4))
    y = net.node("MatMul", net.input("x", ["N", 4]), shared, name="one")
    source = net.model(net.node("MatMul", net.relu(y), shared, name="two"))
    current, batches = graph.copy(source), feeds(source)
    assert refit(source, current, batches) == []
    assert np.array_equal(weight(current, "one"), weight(source, "one"))


def test_a_layer_that_is_too_wide_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    source = linear_net()
    current = graph.copy(source)
    monkeypatch.setattr(fitting, "WIDEST", 7)
    assert [fit.name for fit in refit(source, current, feeds(source))] == ["a", "c"]


def test_an_unchanged_graph_stays_what_it_computes() -> None:
    source = residual_net(0)
    current, batches = graph.copy(source), feeds(source, (8,))
    found = refit(source, current, batches, ridge=1e-4)
    assert len(found) == len(layers(source))
    assert max(fit.before for fit in found) < 1e-8
    assert error(current, source, feeds(source, (8,), seed=9)) < 1e-4


# ---------------------------------------------------------------------------------------------- residual paths


def joined(order: str) -> ir.Model:
    """x[N, 6]: a skip path `skip` and a branch `branch` (in that order, or the other), added, then Relu."""
    net = Net(2)
    x = net.input("x", ["N", 6])
    made = {name: net.dense(x, name, 6, 6) for name in order.split()}
    return net.model(net.relu(net.node("Add", made["branch"], made["skip"], name="add")))


def test_the_layer_before_an_add_makes_up_for_a_loss_on_the_skip_path() -> None:
    source = joined("skip branch")
    current, batches = graph.copy(source), feeds(source, (40,))
    set_weight(current, "skip", 0.3 * weight(current, "skip"))
    before = error(current, source, batches)
    refit(source, current, batches, ["branch"])
    assert before > 0.1
    assert error(current, source, feeds(source, seed=9)) < 1e-5


def test_the_path_that_comes_first_is_fitted_to_itself() -> None:
    source = joined("branch skip")
    current, batches = graph.copy(source), feeds(source, (40,))
    set_weight(current, "skip", 0.3 * weight(current, "skip"))
    (found,) = refit(source, current, batches, ["branch"])
    assert found.before < 1e-9
    assert np.allclose(weight(current, "branch"), weight(source, "branch"), atol=1e-5)


def test_a_residual_net_with_a_damaged_stem_comes_closer() -> None:
    source = residual_net(0)
    current, batches = graph.copy(source), feeds(source, (16, 16))
    set_weight(current, "stem", 0.8 * weight(current, "stem"))
    before = error(current, source, batches)
    found = refit(source, current, batches, ["a2", "b1", "b2", "short", "fc"], 1e-4)
    assert all(fit.after <= fit.before for fit in found)
    assert error(current, source, batches) < 0.5 * before


# ---------------------------------------------------------------------------------------------- never worse


def squared_error(current: ir.Model, source: ir.Model, batches: Sequence[Feeds]) -> float:
    return sum(
        float(np.square(outputs(current, batch)["fc_out"] - outputs(source, batch)["fc_out"].astype(np.float64)).sum())
        for batch in batches
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    columns=st.integers(1, 12),
    rows=st.integers(1, 20),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    noise=st.sampled_from([0.0, 1e-6, 1e-2, 10.0]),
    ridge=st.sampled_from([0.0, 1e-4, 1.0]),
)
def test_a_refit_is_never_worse_on_its_rows(
    seed: int, columns: int, rows: int, scale: float, noise: float, ridge: float
) -> None:
    net = Net(seed)
    source = net.model(net.dense(net.input("x", ["N", columns]), "fc", columns, 3))
    current = graph.copy(source)
    batches = [{"x": (scale * batch["x"]).astype(np.float32)} for batch in feeds(source, (rows, 2), seed)]
    rng = np.random.default_rng(seed)
    set_weight(current, "fc", weight(current, "fc") + noise * rng.standard_normal((3, columns)))
    before = squared_error(current, source, batches)
    (found,) = refit(source, current, batches, ridge=ridge)
    assert 0 <= found.after <= found.before
    power = sum(float(np.square(outputs(source, batch)["fc_out"]).sum()) for batch in batches)
    assert squared_error(current, source, batches) <= before * (1 + 1e-6) + 1e-10 * power


# ---------------------------------------------------------------------------------------------- ridges


def noisy(rows: int, noise: float, wide: bool, seed: int = 0) -> Moments:
    """Moments of y = W x + noise with 24 columns, a quarter of the rows held."""
    rng = np.random.default_rng(seed)
    form = Layer("fc", "Gemm", "x", "y", 1, 1, 3, 24, 1)
    W, mixing = rng.standard_normal((3, 24)), np.linalg.qr(rng.standard_normal((24, 24)))[0]
    mixing *= 0.6 ** np.arange(24)[:, None]
    found, found.held = Moments(form), Moments(form)
    for index in range(4):
        x = rng.standard_normal((1, rows // 4, 24)) @ mixing
        y = x @ W.T + noise * rng.standard_normal((1, rows // 4, 3))
        if index == 3:
            found.held.add(x, y, rows // 4, wide)
            found.spans.append((found.rows, found.rows + rows // 4))
        found.add(x, y, rows // 4, wide)
    return found


def zero_fit(moments: Moments, ridge: float) -> tuple[Array, Array]:
    return fitting.solve(moments, np.zeros((1, 3, 24)), np.zeros((1, 3)), ridge)


@pytest.mark.parametrize("wide", [True, False])
def test_what_is_not_held_and_what_is_make_up_all_rows(wide: bool) -> None:
    moments = noisy(80, 1.0, wide)
    others, held = moments.others(), moments.held
    assert held is not None
    assert others.rows + held.rows == moments.rows
    for mine, theirs, whole in zip(others.centred(), held.centred(), moments.centred(), strict=True):
        assert mine.shape == theirs.shape == whole.shape
    np.testing.assert_allclose(others.sx + held.sx, moments.sx)
    again = noisy(80, 1.0, not wide).others()
    np.testing.assert_allclose(others.centred()[0], again.centred()[0], atol=1e-9)


@pytest.mark.parametrize("wide", [True, False])
def test_a_noisy_target_asks_for_a_larger_ridge_than_an_exact_one(wide: bool) -> None:
    exact, loud = (fitting.tried_ridge(noisy(48, noise, wide), None, zero_fit) for noise in (0.0, 20.0))
    assert exact is not None
    assert loud is not None
    assert loud > 3 * exact


def test_the_ridge_that_is_taken_loses_least_on_held_rows() -> None:
    moments = noisy(48, 5.0, False)
    taken = fitting.tried_ridge(moments, None, zero_fit)
    assert taken is not None
    assert moments.held is not None
    others = moments.others()
    tried = [fitting._asked(others, 0) * factor for factor in fitting.FACTORS]
    losses = [fitting.lost(moments.held, *zero_fit(others, ridge)) for ridge in tried]
    assert taken == tried[int(np.argmin(losses))]
    assert min(losses) < 0.999 * max(losses)


def test_a_ridge_that_is_given_is_kept_and_many_rows_hold_none() -> None:
    assert fitting.tried_ridge(noisy(48, 1.0, False), 0.125, zero_fit) == 0.125
    moments = noisy(48, 1.0, False)
    moments.held = None
    assert fitting.tried_ridge(moments, None, zero_fit) is None
