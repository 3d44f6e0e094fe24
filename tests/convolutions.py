"""One convolution, and what a split makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import driver
import numpy as np
from builders import Net
from calibrated import calibration, feeds, layers

from ccompile import graph
from ccompile.analysis import linear

if TYPE_CHECKING:
    import onnx_ir as ir

    from ccompile.core import Array
    from ccompile.moments import Layer
    from ccompile.splitting import Split


def conv(
    shape: tuple[int, ...] = (8, 6, 3, 5), size: tuple[int, ...] = (9, 11), W: Array | None = None, **attributes: Any
) -> ir.Model:
    """x[N, c, *size] through the node `conv`, with the weight W[o, c, ...] or one drawn in that shape."""
    net = Net(0)
    x = net.input("x", ["N", shape[1], *size])
    w = net.weight("w", shape) if W is None else net.constant(W.astype(np.float32), "w")
    return net.model(net.node("Conv", x, w, name="conv", **attributes))


def form_of(model: ir.Model) -> tuple[Array, Layer]:
    """The matrix W[o, d] of the node `conv`, which has one group, and its form."""
    form = layers(model)["conv"]
    return linear.matrix(graph.node_named(model.graph, "conv"), form)[0], form


def gram(d: int) -> Array:
    """The Gram matrix of correlated inputs."""
    rng = np.random.default_rng(1)
    X = rng.standard_normal((6 * d, d)) @ (rng.standard_normal((d, d)) * np.arange(1, d + 1) ** -0.5)
    H: Array = X.T @ X / len(X)
    return H


def split(kind: type[Split], model: ir.Model, **options: object) -> driver.Bench:
    """Run a split that keeps its contract."""
    run = driver.bench(model, feeds(model, seed=6))
    run.statistics = calibration(model, feeds(model))
    run.step(0, kind.model_validate(options))
    assert run.record.verdict == "kept"
    return run


def assert_no_worse_with_data(step: Split, model: ir.Model, rank: int) -> None:
    """A fit in a metric loses no more in it than the fit without data does."""
    W, form = form_of(model)
    H = gram(form.columns)
    with_data, without = (step.fit(W, given, form, rank) for given in (H, None))
    moved = without.composed - W
    assert not with_data.note
    assert with_data.loss <= float(((moved @ H) * moved).sum()) * (1 + 1e-9) + 1e-9


def assert_budget_met(kind: type[Split], what: str, widths: tuple[int, int] = (8, 12), least: float = 0.3) -> None:
    """Of two convolutions in a row, more than `least` and at most 0.6 is left."""
    net, (first, second) = Net(0), widths
    x = net.relu(net.conv(net.input("x", ["N", 4, 8, 8]), "one", (first, 4, 3, 3), pad=1))
    model = net.model(net.conv(x, "two", (second, first, 3, 3), pad=1, stride=2))
    run = split(kind, model, keep={what: 0.6}, tolerance={"relative_l2": 1e9})
    now, source = run.price(run.model).report, run.origin.cost.report
    assert run.record.applied
    assert least * getattr(source, what) < getattr(now, what) <= 0.6 * getattr(source, what)
