"""Small nets, one per way in which channels get coupled. Each is named after its pattern."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from builders import Net

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def ints(net: Net, *numbers: int) -> ir.Value:
    return net.constant(np.array(numbers, np.int64))


def vector(net: Net, *shape: int) -> ir.Value:
    assert net.rng is not None
    return net.constant(np.asarray(net.rng.uniform(0.5, 1.5, shape), np.float32))


def split(net: Net, x: ir.Value, count: int, axis: int, sizes: Sequence[int] = ()) -> list[ir.Value]:
    name = f"split{len(net.nodes)}"
    attributes = {"axis": axis} if sizes else {"axis": axis, "num_outputs": count}
    node = ir.node("Split", [x, *([ints(net, *sizes)] if sizes else [])], attributes, num_outputs=count, name=name)
    for k, output in enumerate(node.outputs):
        output.name = f"{name}_out{k}"
    net.nodes.append(node)
    return list(node.outputs)


def head(net: Net, x: ir.Value, channels: int) -> ir.Model:
    """Average over positions, then a dense layer to 3."""
    return net.model(net.dense(net.node("Flatten", net.node("GlobalAveragePool", x)), "fc", channels, 3))


def start(size: int = 6, channels: int = 3) -> tuple[Net, ir.Value]:
    net = Net(7)
    return net, net.input("x", ["N", channels, size, size])


def chain() -> ir.Model:
    net, x = start()
    x = net.relu(net.conv(x, "a", (8, 3, 3, 3), pad=1))
    return head(net, net.relu(net.conv(x, "b", (6, 8, 3, 3))), 6)


def residual() -> ir.Model:
    net, x = start()
    x = net.relu(net.conv(x, "stem", (8, 3, 3, 3), pad=1))
    for name in ("a", "b"):
        y = net.conv(net.relu(net.conv(x, f"{name}1", (5, 8, 3, 3), pad=1)), f"{name}2", (8, 5, 3, 3), pad=1)
        x = net.relu(net.node("Add", y, x))
    return head(net, x, 8)


def padded_shortcut() -> ir.Model:
    """ResNet's option A: every second position, zeros around the channels."""
    net, x = start(8)
    x = net.relu(net.conv(x, "stem", (4, 3, 3, 3), pad=1))
    for stage, width in enumerate((8, 16)):
        y = net.relu(net.conv(x, f"s{stage}a", (width, width // 2, 3, 3), stride=2, pad=1))
        y = net.conv(y, f"s{stage}b", (width, width, 3, 3), pad=1)
        every = [ints(net, 0, 0), ints(net, 99, 99), ints(net, 2, 3), ints(net, 2, 2)]
        short = net.node("Slice", x, *every)
        around = ints(net, 0, width // 4, 0, 0, 0, width // 4, 0, 0)
        x = net.relu(net.node("Add", y, net.node("Pad", short, around)))
    return head(net, x, 16)


def dense_block() -> ir.Model:
    net, x = start()
    x = net.conv(x, "stem", (4, 3, 3, 3), pad=1)
    channels = 4
    for name in ("a", "b", "c"):
        y = net.relu(net.batchnorm(x, f"{name}.bn", channels))
        y = net.conv(y, name, (3, channels, 3, 3), pad=1)
        x = net.node("Concat", x, y, axis=1)
        channels += 3
    return head(net, net.relu(x), channels)


def joins_input() -> ir.Model:
    net, x = start()
    y = net.relu(net.conv(x, "a", (4, 3, 3, 3), pad=1))
    return head(net, net.conv(net.node("Concat", x, y, axis=1), "b", (5, 7, 1, 1)), 5)


def halves() -> ir.Model:
    """Two unequal parts, one through a layer of its own, joined again."""
    net, x = start()
    x = net.relu(net.conv(x, "a", (8, 3, 3, 3), pad=1))
    left, right = split(net, x, 2, 1, (3, 5))
    right = net.relu(net.conv(right, "b", (4, 5, 3, 3), pad=1))
    return head(net, net.node("Concat", left, right, axis=1), 7)


def equal_halves() -> ir.Model:
    """A gate: the first half times the sigmoid of the second, split without sizes."""
    net, x = start()
    x = net.conv(x, "a", (8, 3, 3, 3), pad=1)
    left, right = split(net, x, 2, 1)
    return head(net, net.node("Mul", left, net.node("Sigmoid", right)), 4)


def shuffled(groups: int = 2) -> ir.Model:
    """ShuffleNet v1's unit: grouped, shuffled, depthwise, grouped."""
    net, x = start()
    x = net.relu(net.conv(x, "stem", (8, 3, 1, 1)))
    y = net.relu(net.conv(x, "g1", (16, 8 // groups, 1, 1), groups=groups))
    y = net.node("Reshape", y, ints(net, 0, groups, 16 // groups, 6, 6))
    y = net.node("Transpose", y, perm=[0, 2, 1, 3, 4])
    y = net.node("Reshape", y, ints(net, 0, 16, 6, 6))
    y = net.conv(y, "dw", (16, 1, 3, 3), pad=1, groups=16)
    y = net.conv(y, "g2", (8, 16 // groups, 1, 1), groups=groups)
    return head(net, net.node("Add", x, y), 8)


def split_shuffled() -> ir.Model:
    """ShuffleNet v2's unit, its shuffle written with an inferred size."""
    net, x = start()
    x = net.relu(net.conv(x, "stem", (8, 3, 1, 1)))
    left, right = split(net, x, 2, 1, (4, 4))
    right = net.relu(net.conv(right, "a", (4, 4, 1, 1)))
    y = net.node("Reshape", net.node("Concat", left, right, axis=1), ints(net, -1, 2, 4, 6, 6))
    y = net.node("Reshape", net.node("Transpose", y, perm=[0, 2, 1, 3, 4]), ints(net, 0, -1, 6, 6))
    return head(net, net.relu(net.conv(y, "b", (5, 8, 1, 1))), 5)


def separable(multiplier: int = 1) -> ir.Model:
    net, x = start()
    x = net.relu(net.batchnorm(net.conv(x, "a", (6, 3, 1, 1), bias=False), "bn", 6))
    x = net.relu(net.conv(x, "dw", (6 * multiplier, 1, 3, 3), pad=1, groups=6))
    return head(net, net.conv(x, "pw", (4, 6 * multiplier, 1, 1)), 4)


def grouped() -> ir.Model:
    net, x = start()
    x = net.relu(net.conv(x, "a", (12, 3, 1, 1)))
    x = net.relu(net.conv(x, "g", (9, 4, 3, 3), groups=3))
    return head(net, net.conv(x, "b", (4, 9, 1, 1)), 4)


def transposed() -> ir.Model:
    """ConvTranspose plain, grouped and depthwise."""
    net, x = start()
    x = net.relu(net.conv(x, "a", (8, 3, 1, 1)))
    for name, shape, groups, outs in (("t", (8, 6, 2, 2), 1, 6), ("g", (6, 4, 2, 2), 2, 8), ("d", (8, 1, 2, 2), 8, 8)):
        operands = (net.weight(f"{name}.w", shape), net.weight(f"{name}.b", (outs,)))
        x = net.node("ConvTranspose", x, *operands, name=name, group=groups)
    return head(net, x, 8)


def squeeze_excite() -> ir.Model:
    net, x = start()
    x = net.relu(net.conv(x, "a", (8, 3, 3, 3), pad=1))
    s = net.node("ReduceMean", x, ints(net, 2, 3), keepdims=1)
    s = net.conv(net.relu(net.conv(s, "se1", (3, 8, 1, 1))), "se2", (8, 3, 1, 1))
    return head(net, net.conv(net.node("Mul", x, net.node("HardSigmoid", s)), "b", (5, 8, 1, 1)), 5)


def flattened(op: str = "Flatten") -> ir.Model:
    net, x = start(4)
    x = net.relu(net.conv(x, "a", (5, 3, 3, 3)))
    x = net.node("Flatten", x) if op == "Flatten" else net.node("Reshape", x, ints(net, -1, 20))
    return net.model(net.dense(net.relu(net.dense(x, "fc1", 20, 7)), "fc2", 7, 3))


def normalised() -> ir.Model:
    """BatchNormalization, PRelu, InstanceNormalization: a constant per channel each."""
    net, x = start()
    x = net.batchnorm(net.conv(x, "a", (6, 3, 3, 3), bias=False), "bn", 6)
    x = net.node("PRelu", x, vector(net, 6, 1, 1))
    x = net.node("InstanceNormalization", x, vector(net, 6), vector(net, 6))
    return head(net, net.conv(x, "b", (4, 6, 1, 1)), 4)


def broadcast() -> ir.Model:
    """Constants of many shapes meet the channels."""
    net, x = start()
    x = net.conv(x, "a", (6, 3, 3, 3))
    for op, shape in (("Mul", (6, 1, 1)), ("Add", (1, 6, 1, 1)), ("Sub", ()), ("Div", (4,)), ("Max", (1, 6, 4, 4))):
        x = net.node(op, x, vector(net, *shape))
    x = net.node("Clip", x, net.constant(np.array(0, np.float32)), net.constant(np.array(6, np.float32)))
    return head(net, net.conv(x, "b", (4, 6, 1, 1)), 4)


def attention(fused: bool = False) -> ir.Model:
    """Four heads of three; queries, keys and values from three layers or from one."""
    net = Net(7)
    x = net.input("x", ["N", 5, 12])
    if fused:
        y = net.node("MatMul", x, net.weight("qkv.w", (12, 36)), name="qkv")
        y = net.node("Reshape", net.node("Add", y, vector(net, 36)), ints(net, 0, 5, 3, 4, 3))
        y = net.node("Transpose", y, perm=[2, 0, 3, 1, 4])
        q, k, v = (net.node("Gather", y, net.constant(np.array(i, np.int64)), axis=0) for i in range(3))
        k = net.node("Transpose", k, perm=[0, 1, 3, 2])
    else:
        parts = [net.node("MatMul", x, net.weight(f"{n}.w", (12, 12)), name=n) for n in "qkv"]
        parts = [net.node("Reshape", p, ints(net, 0, 0, 4, 3)) for p in parts]
        perms = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        q, k, v = (net.node("Transpose", p, perm=perm) for p, perm in zip(parts, perms, strict=True))
    scores = net.node("Softmax", net.node("Div", net.node("MatMul", q, k), net.constant(np.array(1.7, np.float32))))
    y = net.node("Transpose", net.node("MatMul", scores, v), perm=[0, 2, 1, 3])
    y = net.node("MatMul", net.node("Reshape", y, ints(net, 0, 5, 12)), net.weight("o.w", (12, 12)), name="o")
    return net.model(net.node("Add", x, y))


def single_head() -> ir.Model:
    net = Net(7)
    x = net.input("x", ["N", 5, 6])
    q, k, v = (net.node("MatMul", x, net.weight(f"{n}.w", (6, 4)), name=n) for n in "qkv")
    scores = net.node("Softmax", net.node("MatMul", q, net.node("Transpose", k, perm=[0, 2, 1])))
    return net.model(net.node("MatMul", net.node("MatMul", scores, v), net.weight("o.w", (4, 6)), name="o"))


def shared_key() -> ir.Model:
    """Four heads of queries on one key, their scores read by a layer."""
    net = Net(7)
    x = net.input("x", ["N", 5, 8])
    q = net.node("MatMul", x, net.weight("q.w", (8, 12)), name="q")
    q = net.node("Transpose", net.node("Reshape", q, ints(net, 0, 5, 4, 3)), perm=[0, 2, 1, 3])
    k = net.node("Unsqueeze", net.node("MatMul", x, net.weight("k.w", (8, 3)), name="k"), ints(net, 1))
    scores = net.node("MatMul", q, net.node("Transpose", k, perm=[0, 1, 3, 2]), name="scores")
    y = net.node("Reshape", net.node("Transpose", scores, perm=[0, 2, 1, 3]), ints(net, 0, 5, 20))
    return net.model(net.node("MatMul", y, net.weight("o.w", (20, 2)), name="o"))


def embedded() -> ir.Model:
    """Word and position tables, summed, into a two-layer block."""
    net = Net(7)
    words = net.input("words", ["N", 5], ir.DataType.INT64)
    x = net.node("Gather", net.weight("table", (4, 8)), words, name="embed")
    x = net.node("Add", x, net.weight("positions", (5, 8)))
    y = net.node("MatMul", x, net.weight("up", (8, 12)), name="up")
    y = net.node("MatMul", net.node("Gelu", y), net.weight("down", (12, 8)), name="down")
    return net.model(net.node("MatMul", net.node("Add", x, y), net.weight("out", (8, 3)), name="out"), opsets={"": 20})


def layer_normalised() -> ir.Model:
    net = Net(7)
    x = net.node("MatMul", net.input("x", ["N", 5, 6]), net.weight("in", (6, 8)), name="in")
    y = net.node("LayerNormalization", x, vector(net, 8), vector(net, 8), name="ln")
    y = net.relu(net.node("MatMul", y, net.weight("up", (8, 12)), name="up"))
    y = net.node("MatMul", y, net.weight("down", (12, 8)), name="down")
    return net.model(net.node("MatMul", net.node("Add", x, y), net.weight("out", (8, 3)), name="out"))


def group_normalised() -> ir.Model:
    net, x = start()
    x = net.conv(x, "a", (8, 3, 3, 3))
    x = net.node("GroupNormalization", x, vector(net, 8), vector(net, 8), num_groups=4)
    y = net.node("Flatten", net.node("GlobalAveragePool", net.relu(x)))
    model = net.model(net.dense(y, "fc", 8, 3), opsets={"": 21})
    model.graph.outputs[0].shape = ir.Shape(["N", 3])  # ONNX infers none through GroupNormalization
    return model


def resized() -> ir.Model:
    """Upsampled by scales and by sizes computed from Shape, and joined."""
    net, x = start(4)
    x = net.relu(net.conv(x, "a", (6, 3, 1, 1)))
    scales = net.constant(np.array([1, 1, 2, 2], np.float32))
    y = net.node("Resize", x, None, scales, mode="nearest")
    sizes = net.node("Concat", net.node("Shape", x, start=0, end=2), ints(net, 8, 8), axis=0)
    z = net.node("Resize", x, None, None, sizes, mode="nearest")
    w = net.node("Resize", x, None, None, ints(net, 2, 6, 8, 8), mode="nearest")
    return head(net, net.conv(net.node("Concat", y, z, w, axis=1), "b", (4, 18, 1, 1)), 4)


def spread() -> ir.Model:
    """DepthToSpace both ways and SpaceToDepth."""
    net, x = start(4)
    x = net.relu(net.conv(x, "a", (8, 3, 1, 1)))
    x = net.conv(net.node("DepthToSpace", x, blocksize=2, mode="CRD"), "b", (12, 2, 1, 1))
    x = net.conv(net.node("DepthToSpace", x, blocksize=2), "c", (5, 3, 1, 1))
    return head(net, net.conv(net.node("SpaceToDepth", x, blocksize=4), "d", (4, 80, 1, 1)), 4)


def chosen() -> ir.Model:
    """Slices and gathers of channels, a tile, an expand of positions."""
    net, x = start()
    x = net.relu(net.conv(x, "a", (8, 3, 1, 1)))
    front = net.node("Slice", x, ints(net, 1), ints(net, -2), ints(net, 1))
    picked = net.node("Gather", x, ints(net, 0, 7, -2, 3), axis=1)
    pooled = net.node("Expand", net.node("GlobalMaxPool", x), ints(net, 1, 8, 6, 6))
    tiled = net.node("Tile", picked, ints(net, 1, 2, 1, 1))
    return head(net, net.conv(net.node("Concat", front, tiled, pooled, axis=1), "b", (4, 21, 1, 1)), 4)


def old_opset() -> ir.Model:
    """Opset 9, where sizes are attributes."""
    net, x = start()
    x = net.relu(net.conv(x, "a", (8, 3, 1, 1)))
    node = ir.node("Split", [x], {"axis": 1, "split": [5, 3]}, num_outputs=2, name="split")
    for k, output in enumerate(node.outputs):
        output.name = f"part{k}"
    net.nodes.append(node)
    left = net.node("Slice", node.outputs[0], starts=[1, 0], ends=[4, 9], axes=[1, 2])
    right = net.node("Pad", node.outputs[1], pads=[0, 1, 0, 0, 0, 2, 0, 0])
    y = net.node("Concat", left, right, axis=1)
    y = net.node("Upsample", y, net.constant(np.array([1, 1, 2, 2], np.float32)))
    y = net.node("Squeeze", net.node("Unsqueeze", y, axes=[2]), axes=[2])
    y = net.node("Flatten", net.node("GlobalAveragePool", net.conv(y, "b", (4, 9, 1, 1))))
    return net.model(net.dense(y, "fc", 4, 3), opsets={"": 9})


def spatial() -> ir.Model:
    """A dense layer whose rows become channels and positions, as generators have it."""
    net = Net(7)
    x = net.dense(net.input("x", ["N", 5]), "fc1", 5, 6 * 4 * 4)
    x = net.relu(net.node("Reshape", x, ints(net, -1, 6, 4, 4)))
    return head(net, net.conv(x, "a", (4, 6, 3, 3)), 4)


def computed_shape() -> ir.Model:
    """Flattened to a shape that is computed from the input's, as exporters write it."""
    net, x = start(4)
    y = net.relu(net.conv(x, "a", (5, 3, 3, 3)))
    batch = net.node("Gather", net.node("Shape", x), ints(net, 0), axis=0)
    y = net.node("Reshape", y, net.node("Concat", batch, ints(net, 20), axis=0), name="flat")
    return net.model(net.dense(y, "fc", 20, 3))


def hidden_weights() -> ir.Model:
    """Weights behind Transpose, Reshape and ConstantOfShape."""
    net = Net(7)
    x = net.input("x", ["N", 6])
    x = net.relu(net.node("MatMul", x, net.node("Transpose", net.weight("w1", (8, 6)), perm=[1, 0]), name="a"))
    x = net.node("Mul", x, net.node("Reshape", vector(net, 4, 2), ints(net, 8)))
    two = ir.tensor(np.array([2], np.float32))
    x = net.node("Add", x, net.node("ConstantOfShape", ints(net, 8), value=two))
    return net.model(net.node("MatMul", x, net.weight("w2", (8, 3)), name="b"))


def twins() -> ir.Model:
    """One weight read by two layers that see two different inputs."""
    net, x = start()
    weight, bias = net.weight("w", (6, 4, 1, 1)), net.weight("b", (6,))
    sides = []
    for name in ("a", "b"):
        y = net.relu(net.conv(x, f"{name}0", (4, 3, 1, 1)))
        sides.append(net.node("Conv", y, weight, bias, name=name, kernel_shape=[1, 1]))
    return head(net, net.conv(net.node("Concat", *sides, axis=1), "c", (4, 12, 1, 1)), 4)


NETS: dict[str, Callable[[], ir.Model]] = {
    f.__name__: f
    for f in (
        chain, residual, padded_shortcut, dense_block, joins_input, halves, equal_halves, shuffled, split_shuffled,
        separable, grouped, transposed, squeeze_excite, flattened, normalised, broadcast, attention, single_head,
        embedded, layer_normalised, group_normalised, resized, spread, chosen, spatial, computed_shape, old_opset,
        hidden_weights, twins, shared_key,
    )
} | {
    "shuffled_4": lambda: shuffled(4),
    "separable_2": lambda: separable(2),
    "flattened_reshape": lambda: flattened("Reshape"),
    "attention_fused": lambda: attention(True),
}  # fmt: skip
