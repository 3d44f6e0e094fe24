"""One node and the form that a lowering puts in its place, run side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from builders import Net
from calibrated import outputs

from ccompile import convolution, graph, onnx_io
from ccompile.analysis import shapes
from ccompile.emitting import Emitter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir

    from ccompile.convolution import Convolution
    from ccompile.core import Array

    Build = Callable[[Emitter, Convolution], ir.Value]


def conv(
    W: Array,
    size: Sequence[int | str],
    bias: Array | None = None,
    batch: int | str = "N",
    opset: int = 18,
    **attributes: Any,
) -> ir.Model:
    """x[batch, c, *size] through the node `conv` with W[o, c / groups, *kernel]."""
    net = Net(0)
    x = net.input("x", [batch, W.shape[1] * attributes.get("group", 1), *size])
    operands = [x, net.constant(W.astype(np.float32), "w")]
    if bias is not None:
        operands.append(net.constant(bias.astype(np.float32), "b"))
    return net.model(net.node("Conv", *operands, name="conv", **attributes), opsets={"": opset})


def known(model: ir.Model, name: str = "conv") -> Convolution:
    """The convolution as a lowering reads it."""
    found = convolution.read(graph.node_named(model.graph, name), shapes.shapes(model))
    assert not isinstance(found, str), found
    return found


def put(model: ir.Model, build: Build) -> ir.Model:
    """A copy of the model with the form in the place of the node `conv`; it passes ONNX's checker."""
    twin = graph.copy(model)
    to = Emitter(graph.node_named(twin.graph, "conv"))
    to.done(build(to, known(twin)))
    graph.remove_dead(twin.graph)
    assert not onnx_io.check(twin)
    assert shapes.shapes(twin)[str(twin.graph.outputs[0].name)].shape is not None
    return twin


def both(model: ir.Model, build: Build, x: Array) -> tuple[Array, Array]:
    """What the form and the node make of x."""
    (wanted,), (found,) = (list(outputs(one, {"x": x}).values()) for one in (model, put(model, build)))
    assert found.size
    return found, wanted


def drawn(shape: Sequence[int], seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_same(model: ir.Model, build: Build, x: Array, tolerance: float = 1e-5) -> None:
    """The form is the node up to rounding: relative L2."""
    found, wanted = both(model, build, x)
    assert found.shape == wanted.shape
    assert float(np.linalg.norm(found - wanted)) <= tolerance * float(np.linalg.norm(wanted))
