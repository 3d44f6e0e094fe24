"""Layers that are computed in another shape: what goes along behind them, and the way back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ccompile import graph

# Ops on one value that do the same whatever its rank; BatchNormalization's channels are axis 1 in any.
ELEMENTWISE = frozenset(
    "Abs BatchNormalization Celu Clip Elu Erf Exp Gelu HardSigmoid HardSwish LeakyRelu Log Mish Neg Relu Selu Sigmoid "
    "Softplus Softsign Sqrt Swish Tanh ThresholdedRelu".split()
)


def followers(node: ir.Node) -> list[ir.Node]:
    """Return the elementwise ops that alone read the node's output, one behind the other."""
    found: list[ir.Node] = []
    while (reader := graph.only_use((found or [node])[-1].outputs[0])) is not None:
        moving = [value for value in reader.inputs if value is not None and not graph.is_constant(value)]
        if reader.op_type not in ELEMENTWISE or reader.domain not in ("", "ai.onnx") or len(moving) != 1:
            return found
        if moving[0] is not reader.inputs[0] or len(reader.outputs) != 1:
            return found
        found.append(reader)
    return found


def turned_back(chain: Sequence[ir.Node], shape: list[int], base: str) -> ir.Node:
    """Let what read the end of a chain read it reshaped; the chain's values are of another shape from now on.

    The value behind the Reshape has the name and type that the chain's end had. Returns the Reshape.
    """
    last, main = chain[-1], chain[-1].graph
    assert isinstance(main, ir.Graph)
    old, name = last.outputs[0], str(last.outputs[0].name)
    leave = reshape(main, old, shape, f"{base}_back", after=last)
    new = leave.outputs[0]
    new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    leave.replace_input_with(0, old)
    old.name, new.name = graph.fresh_name(main, f"{name}_row"), name
    for other in chain:
        other.outputs[0].shape = None
    return leave


def reshape(
    main: ir.Graph,
    value: ir.Value,
    shape: list[int],
    base: str,
    *,
    before: ir.Node | None = None,
    after: ir.Node | None = None,
) -> ir.Node:
    """Add a Reshape before or after a node."""
    dims = graph.add_constant(main, f"{base}_shape", np.array(shape, np.int64))
    return graph.add_node("Reshape", [value, dims], before=before, after=after, base=base)
