"""Small and famous nets as onnx_ir models. Weights are seeded, or zeros that take no memory when there is no seed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ccompile.analysis import shapes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ccompile.core import Array

OPSET = 18
FLOAT = ir.TensorType(ir.DataType.FLOAT)


class Net:
    """Adds nodes one after the other; every method returns the value that it makes."""

    def __init__(self, seed: int | None = None) -> None:
        self.rng = None if seed is None else np.random.default_rng(seed)
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.initializers: list[ir.Value] = []

    def input(self, name: str, shape: Sequence[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def constant(self, array: Array, name: str = "") -> ir.Value:
        name = name or f"c{len(self.initializers)}"
        view = array.view()
        view.flags.writeable = False
        return self.stored(ir.Tensor(view, name=name), name)

    def stored(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype))
        value.shape = ir.Shape(tuple(dim for dim in tensor.shape if isinstance(dim, int)))
        self.initializers.append(value)
        return value

    def weight(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        """He-initialised, or a zero-stride array of zeros."""
        if self.rng is None:
            return self.constant(np.broadcast_to(np.float32(0), shape), name)
        scale = math.sqrt(2 / max(math.prod(shape[1:]), 1))
        return self.constant((scale * self.rng.standard_normal(shape)).astype(np.float32), name)

    def node(
        self, op: str, *inputs: ir.Value | None, name: str = "", domain: str = "", **attributes: object
    ) -> ir.Value:
        name = name or f"{op.lower()}{len(self.nodes)}"
        node = ir.node(op, inputs, attributes or None, domain=domain, name=name)  # type: ignore[arg-type]
        node.outputs[0].name = f"{name}_out"
        self.nodes.append(node)
        return node.outputs[0]

    def conv(
        self,
        x: ir.Value,
        name: str,
        weight: tuple[int, ...],
        *,
        stride: int = 1,
        pad: int = 0,
        groups: int = 1,
        bias: bool = True,
    ) -> ir.Value:
        """weight: (o, c / groups, kh, kw)."""
        operands = [x, self.weight(f"{name}.w", weight)]
        if bias:
            operands.append(self.weight(f"{name}.b", weight[:1]))
        return self.node(
            "Conv", *operands, name=name, strides=[stride] * 2, pads=[pad] * 4, group=groups, kernel_shape=weight[2:]
        )

    def batchnorm(self, x: ir.Value, name: str, channels: int) -> ir.Value:
        draw = self.rng or np.random.default_rng(0)
        gamma, variance = (draw.uniform(0.5, 1.5, channels).astype(np.float32) for _ in range(2))
        beta, mean = (draw.standard_normal(channels).astype(np.float32) for _ in range(2))
        arrays = {"gamma": gamma, "beta": beta, "mean": mean, "var": variance}
        return self.node(
            "BatchNormalization", x, *(self.constant(a, f"{name}.{k}") for k, a in arrays.items()), name=name
        )

    def relu(self, x: ir.Value) -> ir.Value:
        return self.node("Relu", x)

    def pool(self, x: ir.Value, kernel: int, stride: int, pad: int = 0) -> ir.Value:
        return self.node("MaxPool", x, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4)

    def dense(self, x: ir.Value, name: str, ins: int, outs: int) -> ir.Value:
        return self.node(
            "Gemm", x, self.weight(f"{name}.w", (outs, ins)), self.weight(f"{name}.b", (outs,)), name=name, transB=1
        )

    def model(self, *outputs: ir.Value, opsets: Mapping[str, int] | None = None) -> ir.Model:
        graph = ir.Graph(
            self.inputs,
            outputs,
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports={"": OPSET, **(opsets or {})},
            name="net",
        )
        model = ir.Model(graph, ir_version=10)
        inferred = shapes.shapes(model)
        for value in outputs:
            known = inferred.get(str(value.name), shapes.UNKNOWN)
            value.type = ir.TensorType(known.dtype) if known.dtype else FLOAT
            value.shape = None if known.shape is None else ir.Shape(known.shape)
        return model


def lenet_300_100(seed: int | None = None) -> ir.Model:
    net = Net(seed)
    x = net.input("x", ["N", 784])
    x = net.relu(net.dense(x, "fc1", 784, 300))
    x = net.relu(net.dense(x, "fc2", 300, 100))
    return net.model(net.dense(x, "fc3", 100, 10))


def lenet5_caffe(seed: int | None = None) -> ir.Model:
    net = Net(seed)
    x = net.input("x", ["N", 1, 28, 28])
    x = net.pool(net.conv(x, "conv1", (20, 1, 5, 5)), 2, 2)
    x = net.pool(net.conv(x, "conv2", (50, 20, 5, 5)), 2, 2)
    x = net.relu(net.dense(net.node("Flatten", x), "fc1", 800, 500))
    return net.model(net.dense(x, "fc2", 500, 10))


def alexnet(seed: int | None = None) -> ir.Model:
    """One column, as in torchvision (Krizhevsky 2014, arXiv:1404.5997)."""
    net = Net(seed)
    x = net.input("x", ["N", 3, 224, 224])
    x = net.pool(net.relu(net.conv(x, "conv1", (64, 3, 11, 11), stride=4, pad=2)), 3, 2)
    x = net.pool(net.relu(net.conv(x, "conv2", (192, 64, 5, 5), pad=2)), 3, 2)
    for number, (ins, outs) in enumerate([(192, 384), (384, 256), (256, 256)], start=3):
        x = net.relu(net.conv(x, f"conv{number}", (outs, ins, 3, 3), pad=1))
    x = net.node("Flatten", net.pool(x, 3, 2))
    x = net.relu(net.dense(x, "fc6", 9216, 4096))
    x = net.relu(net.dense(x, "fc7", 4096, 4096))
    return net.model(net.dense(x, "fc8", 4096, 1000))


def vgg16(seed: int | None = None) -> ir.Model:
    """Configuration D (Simonyan & Zisserman 2014, arXiv:1409.1556)."""
    net = Net(seed)
    x, ins = net.input("x", ["N", 3, 224, 224]), 3
    for block, (outs, layers) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)], start=1):
        for layer in range(1, layers + 1):
            x, ins = net.relu(net.conv(x, f"conv{block}_{layer}", (outs, ins, 3, 3), pad=1)), outs
        x = net.pool(x, 2, 2)
    x = net.relu(net.dense(net.node("Flatten", x), "fc6", 25088, 4096))
    x = net.relu(net.dense(x, "fc7", 4096, 4096))
    return net.model(net.dense(x, "fc8", 4096, 1000))


def resnet50(bn: bool = True, seed: int | None = None) -> ir.Model:
    """v1.5: the stride is in the 3x3 convolution (He et al. 2015, arXiv:1512.03385, as in torchvision)."""
    net = Net(seed)

    def conv(x: ir.Value, name: str, weight: tuple[int, ...], stride: int = 1) -> ir.Value:
        x = net.conv(x, name, weight, stride=stride, pad=weight[2] // 2, bias=not bn)
        return net.batchnorm(x, f"{name}.bn", weight[0]) if bn else x

    x = net.input("x", ["N", 3, 224, 224])
    x, ins = net.pool(net.relu(conv(x, "conv1", (64, 3, 7, 7), 2)), 3, 2, 1), 64
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=1):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = net.relu(conv(x, f"{name}.conv1", (width, ins, 1, 1)))
            y = net.relu(conv(y, f"{name}.conv2", (width, width, 3, 3), stride))
            y = conv(y, f"{name}.conv3", (4 * width, width, 1, 1))
            if block == 0:
                x = conv(x, f"{name}.down", (4 * width, ins, 1, 1), stride)
            x, ins = net.relu(net.node("Add", y, x, name=f"{name}.add")), 4 * width
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    return net.model(net.dense(x, "fc", 2048, 1000))


def mlp(seed: int) -> ir.Model:
    """x[N, 12] -> 24 -> 16 -> 5."""
    net = Net(seed)
    x = net.input("x", ["N", 12])
    x = net.relu(net.dense(x, "fc1", 12, 24))
    x = net.relu(net.dense(x, "fc2", 24, 16))
    return net.model(net.dense(x, "fc3", 16, 5))


def conv_bn_net(seed: int, groups: int = 1) -> ir.Model:
    """x[N, 4, 10, 10]: conv-bn-relu twice (the second with `groups`), average, dense to 3."""
    net = Net(seed)
    x = net.input("x", ["N", 4, 10, 10])
    x = net.relu(net.batchnorm(net.conv(x, "conv1", (8, 4, 3, 3), pad=1, bias=False), "bn1", 8))
    x = net.conv(x, "conv2", (12 if 12 % groups == 0 else groups, 8 // groups, 3, 3), stride=2, pad=1, groups=groups)
    outs = 12 if 12 % groups == 0 else groups
    x = net.relu(net.batchnorm(x, "bn2", outs))
    return net.model(net.dense(net.node("Flatten", net.node("GlobalAveragePool", x)), "fc", outs, 3))


def residual_net(seed: int) -> ir.Model:
    """x[N, 3, 8, 8]: a stem, one block with an identity shortcut, one with a strided 1x1 shortcut, dense to 4."""
    net = Net(seed)
    x = net.relu(net.conv(net.input("x", ["N", 3, 8, 8]), "stem", (8, 3, 3, 3), pad=1))
    y = net.conv(net.relu(net.conv(x, "a1", (8, 8, 3, 3), pad=1)), "a2", (8, 8, 3, 3), pad=1)
    x = net.relu(net.node("Add", y, x, name="add_a"))
    y = net.conv(net.relu(net.conv(x, "b1", (16, 8, 3, 3), stride=2, pad=1)), "b2", (16, 16, 3, 3), pad=1)
    x = net.relu(net.node("Add", y, net.conv(x, "short", (16, 8, 1, 1), stride=2), name="add_b"))
    return net.model(net.dense(net.node("Flatten", net.node("GlobalAveragePool", x)), "fc", 16, 4))


def open_net(seed: int) -> ir.Model:
    """x[N, 3, H, W], batch and image open: pointwise, padded and strided convolutions, average, dense to 4."""
    net = Net(seed)
    x = net.conv(net.input("x", ["N", 3, "H", "W"]), "stem", (8, 3, 3, 3), stride=2, pad=1, bias=False)
    x = net.relu(net.batchnorm(x, "stem.bn", 8))
    x = net.node("Identity", net.relu(net.conv(x, "point", (12, 8, 1, 1))))
    return net.model(net.dense(net.node("Flatten", net.node("GlobalAveragePool", x)), "fc", 12, 4))


def capturing_net(seed: int) -> ir.Model:
    """x[N, 4, 6, 6], flag: a convolution whose output, and a weight, are read inside an If."""
    net = Net(seed)
    x, flag = net.input("x", ["N", 4, 6, 6]), net.input("flag", [], ir.DataType.BOOL)
    y = net.conv(x, "conv", (8, 4, 1, 1), bias=False)
    scale = net.constant(np.full((8, 1, 1), 2, np.float32), "scale")

    def branch(op: str) -> ir.Graph:
        node = ir.node(op, [y, scale], name=f"inner_{op}")
        out = node.outputs[0]
        out.name, out.type, out.shape = f"{op}_out", FLOAT, ir.Shape(["N", 8, 6, 6])
        return ir.Graph([], [out], nodes=[node], opset_imports={"": OPSET}, name=op)

    z = net.node("If", flag, name="choose", then_branch=branch("Mul"), else_branch=branch("Add"))
    return net.model(net.relu(net.batchnorm(y, "bn", 8)), z)


def shared_weights_net(seed: int) -> ir.Model:
    """x[N, 4, 6, 6]: one weight and one bias read by two convolutions, each with its own batch normalisation."""
    net = Net(seed)
    x = net.input("x", ["N", 4, 6, 6])
    w, b = net.weight("w", (8, 4, 1, 1)), net.weight("b", (8,))
    first = net.batchnorm(net.node("Conv", x, w, b, name="one"), "bn1", 8)
    second = net.batchnorm(net.node("Conv", net.relu(x), w, b, name="two"), "bn2", 8)
    return net.model(net.node("Add", first, second))


def transformer_block(seed: int, width: int = 16, heads: int = 2, length: int = 5) -> ir.Model:
    """tokens[N, 5], of 20: tied embedding, attention, normalised residuals, a gated feed-forward layer, scores."""
    net = Net(seed)
    embedding = net.weight("embedding", (20, width))
    x = net.node("Gather", embedding, net.input("tokens", ["N", length], ir.DataType.INT64), name="embed")

    def norm(x: ir.Value, name: str) -> ir.Value:
        gain, shift = np.full(width, 1.1, np.float32), np.full(width, 0.1, np.float32)
        return net.node("LayerNormalization", x, net.constant(gain), net.constant(shift), name=name)

    def project(x: ir.Value, name: str, ins: int, outs: int) -> ir.Value:
        y = net.node("MatMul", x, net.weight(f"{name}.w", (ins, outs)), name=name)
        return net.node("Add", y, net.weight(f"{name}.b", (outs,)), name=f"{name}.add")

    def split(x: ir.Value, perm: list[int]) -> ir.Value:
        shape = net.constant(np.array([0, length, heads, width // heads]))
        return net.node("Transpose", net.node("Reshape", x, shape), perm=perm)

    y = norm(x, "norm1")
    q, v = (split(project(y, name, width, width), [0, 2, 1, 3]) for name in "qv")
    k = split(project(y, "k", width, width), [0, 2, 3, 1])
    scale = net.constant(np.array(math.sqrt(heads / width), np.float32))
    scores = net.node("Softmax", net.node("Mul", net.node("MatMul", q, k), scale), axis=-1)
    y = net.node("Transpose", net.node("MatMul", scores, v), perm=[0, 2, 1, 3])
    y = net.node("Reshape", y, net.constant(np.array([0, length, width])))
    x = net.node("Add", x, project(y, "mix", width, width))
    y = norm(x, "norm2")
    y = net.node("Mul", project(y, "up", width, 32), net.node("Sigmoid", project(y, "gate", width, 32)))
    x = net.node("Add", x, project(y, "down", 32, width))
    return net.model(net.node("MatMul", x, net.node("Transpose", embedding, perm=[1, 0]), name="scores"))


def upsampling_net(seed: int, groups: int = 2) -> ir.Model:
    """x[N, 4, 5, 5]: a transposed convolution in groups, batch normalisation, a plain one with a bias, a scale."""
    net = Net(seed)
    x = net.input("x", ["N", 4, 5, 5])
    x = net.node("ConvTranspose", x, net.weight("up.w", (4, 3, 3, 3)), name="up", group=groups, strides=[2, 2])
    x = net.relu(net.batchnorm(x, "bn", 3 * groups))
    x = net.node("ConvTranspose", x, net.weight("out.w", (3 * groups, 2, 2, 2)), net.weight("out.b", (2,)), name="out")
    return net.model(net.node("Mul", x, net.constant(np.array([[[2.0]], [[3.0]]], np.float32), "scale"), name="mul"))


def half_net(seed: int) -> ir.Model:
    """x[N, 4, 6, 6], all in half precision: conv-bn-relu, average, dense to 5."""
    net = Net(seed)
    half, draw = ir.DataType.FLOAT16, np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> ir.Value:
        return net.constant((draw.uniform(0.1, 1, shape) * draw.choice([-1, 1], shape)).astype(np.float16), name)

    x = net.node("Conv", net.input("x", ["N", 4, 6, 6], half), weight("conv.w", 12, 4, 1, 1), name="conv")
    variance = net.constant(np.linspace(0.5, 2, 12).astype(np.float16), "var")
    norm = [weight("gamma", 12), weight("beta", 12), weight("mean", 12), variance]
    x = net.relu(net.node("BatchNormalization", x, *norm, name="bn"))
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    return net.model(net.node("Gemm", x, weight("fc.w", 12, 5), weight("fc.b", 5), name="fc"))


def quantised_net(seed: int) -> ir.Model:
    """x[N, 8], quantised: a dense layer with int8 weights, a scale per channel, and a plain one."""
    net = Net(seed)
    draw = np.random.default_rng(seed)
    step, zero = net.constant(np.array(0.05, np.float32), "step"), net.constant(np.array(3, np.int8), "zero")
    x = net.input("x", ["N", 8])
    x = net.node("DequantizeLinear", net.node("QuantizeLinear", x, step, zero, name="q"), step, zero, name="dq")
    integers = net.constant(draw.integers(-127, 128, (12, 8)).astype(np.int8), "fc.w")
    scales = net.constant(draw.uniform(0.001, 0.01, 12).astype(np.float32), "fc.scales")
    w = net.node("DequantizeLinear", integers, scales, name="dqw", axis=0)
    x = net.relu(net.node("Gemm", x, w, net.weight("fc.b", (12,)), name="fc", transB=1))
    return net.model(net.dense(x, "out", 12, 6))


# Small enough to run every pass on; between them, what a pass may meet.
ZOO = {
    "mlp": mlp,
    "conv_bn": conv_bn_net,
    "grouped": lambda seed: conv_bn_net(seed, groups=4),
    "residual": residual_net,
    "open": open_net,
    "capturing": capturing_net,
    "shared_weights": shared_weights_net,
    "transformer": transformer_block,
    "upsampling": upsampling_net,
    "half": half_net,
    "quantised": quantised_net,
}
