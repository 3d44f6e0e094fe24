"""Small models that each run one kind of kernel at one size: what `ccompile target measure` times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from onnx import TensorProto

from ccompile.probes import Built, Net, Probe, Series, Sizes, numbers

COPIES = 2  # of a node in its model, each with weights of its own
_CHANNELS = 64  # of the images that elementwise ops read


# ---------------------------------------------------------------------------------------------- linear ops


def conv(
    taps: Sequence[int], inputs: int, outputs: int, image: Sequence[int], groups: int = 1, is_integer: bool = False
) -> Probe:
    """Convolutions that keep the size of an image[...], beside one another on the same input."""
    weight = (outputs, inputs // groups, *taps)
    pads = [tap // 2 for tap in taps] + [tap - 1 - tap // 2 for tap in taps]

    def build() -> Built:
        net = Net()
        x = net.input(numbers(1, inputs, *image))
        x = net.encoded(x) if is_integer else x
        for _ in range(COPIES):
            W = net.integers(*weight) if is_integer else net.constant(numbers(*weight, scale=0.05))
            y = net.node("Conv", x, W, group=groups, pads=pads, kernel_shape=list(taps))
            if is_integer:
                net.encoded(net.node("Relu", y), 0)
            else:
                net.node("Relu", y)
        return net.model()

    work = math.prod(image) * math.prod(weight)
    positions = math.prod(image)
    sizes = (inputs, positions) if groups == inputs and groups > 1 else (inputs, outputs, positions)
    return Probe(sizes, work, ("QLinearConv",) if is_integer else ("Conv", "FusedConv"), build)


def product(rows: int, inputs: int, outputs: int, is_integer: bool = False) -> Probe:
    """Matrix products with constant weights, beside one another on the same input."""

    def build(copies: int) -> tuple[Net, list[str]]:
        net = Net()
        x = net.input(numbers(rows, inputs))
        x = net.encoded(x) if is_integer else x
        found = []
        for _ in range(copies):
            W = net.integers(inputs, outputs) if is_integer else net.constant(numbers(inputs, outputs, scale=0.05))
            y = net.node("MatMul", x, W)
            found.append(net.codes(y) if is_integer else y)
        return net, found

    def joined(copies: int) -> Built:
        net, found = build(copies)
        net.node("Concat", *found, axis=1)  # outputs of their own would take longer than small products
        return net.model()

    names = ("QLinearMatMul",) if is_integer else ("MatMul", "Gemm", "FusedMatMul")
    return Probe(
        (rows, inputs, outputs), rows * inputs * outputs, names, lambda: build(COPIES)[0].model(), times=joined
    )


def _square(positions: int) -> tuple[int, int]:
    side = math.isqrt(positions)
    return side, side


def _image_conv(sizes: Sizes, k: int, is_integer: bool = False) -> Probe:
    return conv((k, k), sizes[0], sizes[1], _square(sizes[2]), is_integer=is_integer)


def _row_conv(sizes: Sizes) -> Probe:
    return conv((1, 3), sizes[0], sizes[1], _square(sizes[2]))


def _line_conv(sizes: Sizes, k: int) -> Probe:
    return conv((k,), sizes[0], sizes[1], sizes[2:])


def _product(sizes: Sizes, is_integer: bool = False) -> Probe:
    rows, inputs, outputs = sizes
    return product(rows, inputs, outputs, is_integer)


def dense_series() -> Iterator[Series]:
    """Yield dense convolutions, in blocks and not, and matrix products."""
    wide, large = (16, 64, 256), (1, 4, 16, 49, 196, 784, 3136, 12544)
    grids: dict[int, tuple[Sizes, ...]] = {
        1: ((16, 64, 256, 1024), (16, 64, 256, 1024), large),
        3: ((4, *wide), wide, large),
        5: ((4, *wide), wide, (49, 784, 3136)),
        7: ((4, 16, 64), (16, 64), (49, 784, 12544)),
        11: ((4, 64), (64,), (196, 3136)),
    }
    for k, axes in grids.items():
        yield Series("conv", "float32", axes, partial(_image_conv, k=k), kernel=k * k)
    yield Series("conv", "float32", ((4, *wide), wide, (49, 784, 3136)), _row_conv, kernel=3)
    for k in (1, 3, 7):
        axes = ((1, *wide), wide, (4, 49, 784, 3136))
        yield Series("conv", "int8", axes, partial(_image_conv, k=k, is_integer=True), kernel=k * k)
    for k in (1, 3, 9):
        yield Series("plain", "float32", ((8, 64), (8, 64), (64, 1024)), partial(_line_conv, k=k), kernel=k)
    rows, few = (1, 4, 16, 128, 1024), (64, 512, 4096)
    yield Series("gemm", "float32", (rows, (64, 256, 1024, 4096), (16, 64, 256, 1024, 4096)), _product)
    yield Series("gemm", "int8", ((1, 16, 256), few, (16, *few)), partial(_product, is_integer=True))


def _image_depthwise(sizes: Sizes, k: int, is_integer: bool = False) -> Probe:
    return conv((k, k), sizes[0], sizes[0], _square(sizes[1]), sizes[0], is_integer)


def _line_depthwise(sizes: Sizes, k: int) -> Probe:
    return conv((k,), sizes[0], sizes[0], sizes[1:], sizes[0])


def depthwise_series() -> Iterator[Series]:
    """Yield depthwise convolutions, in blocks and not."""
    axes, few = ((16, 64, 256), (49, 784, 12544)), ((24, 120), (49, 784))
    for k in (3, 5, 7, 15, 31):
        yield Series("depthwise", "float32", axes, partial(_image_depthwise, k=k), kernel=k * k)
    for k in (3, 5):
        yield Series("depthwise", "int8", axes, partial(_image_depthwise, k=k, is_integer=True), kernel=k * k)
        yield Series("ragged", "int8", few, partial(_image_depthwise, k=k, is_integer=True), kernel=k * k)
        yield Series("ragged", "float32", ((18, 90), (49, 784)), partial(_image_depthwise, k=k), kernel=k * k)
    for k in (3, 31, 255):
        yield Series("ragged", "float32", ((16, 128), (64, 1024)), partial(_line_depthwise, k=k), kernel=k)


# ---------------------------------------------------------------------------------------------- other ops

_AXES = np.array([2, 3], np.int64)
_HALF = ([0, 0], [_CHANNELS // 2, 1 << 30], [1, 2])


def _ints(net: Net, *lists: Sequence[int]) -> list[str]:
    return [net.constant(np.array(numbers_, np.int64)) for numbers_ in lists]


def _per_channel(net: Net) -> str:
    return net.constant(np.abs(numbers(_CHANNELS, 1, 1)))


def _alone(op: str) -> Callable[[Net, str, str], str]:
    return lambda net, x, z: net.node(op, x)


def _with_another(op: str) -> Callable[[Net, str, str], str]:
    return lambda net, x, z: net.node(op, x, z)


# op -> how it is put on x[1, c, s, s] and z of the same shape
_OPS: Mapping[str, Callable[[Net, str, str], str]] = {
    **{
        op: _alone(op)
        for op in (
            *("Relu", "Sigmoid", "Tanh", "Exp", "Erf", "HardSigmoid", "HardSwish", "LeakyRelu", "Elu", "Softplus"),
            *("Neg", "Abs", "Gelu", "GlobalAveragePool"),
        )
    },
    **{op: _with_another(op) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min")},
    "Sqrt": lambda net, x, z: net.node("Sqrt", x),
    "Pow": lambda net, x, z: net.node("Pow", x, net.constant(np.array(2, np.float32))),
    "Clip": lambda net, x, z: net.node("Clip", x, *(net.constant(np.array(v, np.float32)) for v in (0, 6))),
    "PRelu": lambda net, x, z: net.node("PRelu", x, _per_channel(net)),
    "Softmax": lambda net, x, z: net.node("Softmax", x, axis=-1),
    "Cast": lambda net, x, z: net.node("Cast", x, to=TensorProto.INT32),
    "QuantizeLinear": lambda net, x, z: net.node(
        "QuantizeLinear", x, net.constant(np.array(0.1, np.float32)), net.constant(np.array(128, np.uint8))
    ),
    "DequantizeLinear": lambda net, x, z: net.node(
        "DequantizeLinear",
        net.input(np.zeros(net.feeds[x].shape, np.uint8)),
        net.constant(np.array(0.1, np.float32)),
        net.constant(np.array(128, np.uint8)),
    ),
    "BatchNormalization": lambda net, x, z: net.node(
        "BatchNormalization", x, *(net.constant(np.abs(numbers(_CHANNELS)) + 0.5) for _ in range(4))
    ),
    "InstanceNormalization": lambda net, x, z: net.node(
        "InstanceNormalization", x, *(net.constant(numbers(_CHANNELS)) for _ in range(2))
    ),
    "LayerNormalization": lambda net, x, z: net.node(
        "LayerNormalization", x, net.constant(numbers(net.feeds[x].shape[-1])), axis=-1
    ),
    "LRN": lambda net, x, z: net.node("LRN", x, size=5),
    "ReduceMean": lambda net, x, z: net.node("ReduceMean", x, net.constant(_AXES)),
    "ReduceSum": lambda net, x, z: net.node("ReduceSum", x, net.constant(_AXES)),
    "Concat": lambda net, x, z: net.node("Concat", x, z, axis=1),
    "Slice": lambda net, x, z: net.node("Slice", x, *_ints(net, *_HALF)),
    "Split": lambda net, x, z: net.node("Split", x, outputs=2, axis=1, num_outputs=2),
    "Pad": lambda net, x, z: net.node("Pad", x, *_ints(net, [0, 0, 1, 1, 0, 0, 1, 1])),
    "Gather": lambda net, x, z: net.node("Gather", x, *_ints(net, range(_CHANNELS)[::2]), axis=1),
    "DepthToSpace": lambda net, x, z: net.node("DepthToSpace", x, blocksize=2),
    "Resize": lambda net, x, z: net.node(
        "Resize", x, "", net.constant(np.array([1, 1, 2, 2], np.float32)), mode="nearest"
    ),
}
_INTEGER_OPS = {"Add": "QLinearAdd", "Mul": "QLinearMul", "Sigmoid": "QLinearSigmoid"}
_RUNS_AS = {"HardSwish": ("HardSigmoid", "Mul")}
_POSITIVE = ("Sqrt", "Div")


def on_image(op: str, elements: int, is_integer: bool = False) -> Probe:
    """An op on an image of so many elements: the larger of what it reads and writes."""
    side = max(math.isqrt(elements // _CHANNELS), 1)
    if op == "Resize":
        side //= 2
    channels = _CHANNELS // 2 if op == "Concat" else _CHANNELS

    def build() -> Built:
        net = Net()
        first, second = (net.input(numbers(1, channels, side, side)) for _ in range(2))
        if op in _POSITIVE:
            net.feeds = {name: np.abs(array) + np.float32(0.1) for name, array in net.feeds.items()}
        if is_integer:
            first, second = net.encoded(first), net.encoded(second)
        for _ in range(COPIES):
            y = _OPS[op](net, first, second)
            if is_integer:
                net.encoded(y)
        return net.model()

    runs_as = (_INTEGER_OPS[op],) if is_integer else _RUNS_AS.get(op, (op,))
    return Probe((elements,), float(elements), runs_as, build, len(runs_as))


def pooling(k: int, elements: int) -> Probe:
    """Max pooling, k x k with a stride of 2, to so many elements."""
    side = math.isqrt(elements // _CHANNELS)

    def build() -> Built:
        net = Net()
        x = net.input(numbers(1, _CHANNELS, 2 * side + k - 2, 2 * side + k - 2))
        net.node("MaxPool", x, kernel_shape=[k, k], strides=[2, 2])
        return net.model()

    return Probe((elements,), float(elements * k * k), ("MaxPool",), build)


def transposing(run: int, elements: int) -> Probe:
    """A Transpose of x[a, b, run] to [b, a, run]."""
    side = math.isqrt(elements // run)

    def build() -> Built:
        net = Net()
        x = net.input(numbers(side, side, run))
        for perm in ([1, 0, 2], [1, 0, 2]):
            net.node("Transpose", net.node("Neg", x), perm=perm)
        return net.model()

    return Probe((run, elements), float(side * side * run), ("Transpose",), build)


def reordering(elements: int) -> Probe:
    """Into the blocked layout and out of it, around a pooling that works on blocks."""
    side = math.isqrt(elements // _CHANNELS)

    def build() -> Built:
        net = Net()
        x = net.node("Neg", net.input(numbers(1, _CHANNELS, side, side)))
        net.node("Neg", net.node("MaxPool", x, kernel_shape=[1, 1]))
        return net.model()

    return Probe((elements,), float(elements), ("ReorderInput", "ReorderOutput"), build)


def other_series() -> Iterator[Series]:
    """Yield what is not a linear op."""
    sizes = tuple(_CHANNELS * side * side for side in (16, 64, 176))
    for op in sorted(_OPS):
        dtype = "int8" if op == "QuantizeLinear" else "float32"  # what it writes
        yield Series("ops", dtype, (sizes,), partial(_op, op=op), op=op)
    for op in sorted(_INTEGER_OPS):
        yield Series("ops", "int8", (sizes,), partial(_op, op=op, is_integer=True), op=op)
    for op in _ABSORBED:
        yield Series("fused", "float32", (sizes[:2],), partial(_absorbed, op=op), op=op)
    for k in (2, 3):
        yield Series("pool", "float32", (sizes,), partial(_pooling, k=k), kernel=k * k)
    yield Series("transpose", "float32", ((1, 16, 256), sizes), _transposing)
    yield Series("reorder", "float32", (sizes,), _reordering)


_ABSORBED = ("Add", "Clip", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Sigmoid", "Tanh")


def _absorbed(sizes: Sizes, op: str) -> Probe:
    """What an op adds to the convolution that absorbs it."""
    side = math.isqrt(sizes[0] // _CHANNELS)

    def build(op: str | None) -> Built:
        net = Net()
        x, z = net.input(numbers(1, 16, side, side)), net.input(numbers(1, _CHANNELS, side, side))
        for _ in range(COPIES):
            W = net.constant(numbers(_CHANNELS, 16, 1, 1))
            y, other = net.node("Conv", x, W), net.node("MaxPool", z, kernel_shape=[1, 1])
            y = y if op is None else _OPS[op](net, y, other)
            net.node("MaxPool", y, kernel_shape=[1, 1])
        return net.model()

    return Probe(sizes, float(sizes[0]), ("Conv",), partial(build, op), without=partial(build, None))


def _op(sizes: Sizes, op: str, is_integer: bool = False) -> Probe:
    return on_image(op, sizes[0], is_integer)


def _pooling(sizes: Sizes, k: int) -> Probe:
    return pooling(k, sizes[0])


def _transposing(sizes: Sizes) -> Probe:
    return transposing(*sizes)


def _reordering(sizes: Sizes) -> Probe:
    return reordering(sizes[0])


def all_series() -> list[Series]:
    """Return everything that is measured."""
    return [*dense_series(), *depthwise_series(), *other_series()]


# ---------------------------------------------------------------------------------------------- structure

CARRIED = (
    *("Add", "Sum", "Sub", "Mul", "Max", "Concat", "Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "Tanh"),
    *("HardSwish", "Gelu", "PRelu", "BatchNormalization", "Neg", "Elu"),
)
_FACTORS = ("Add", "Sub", "Mul")  # behind a convolution, with a constant per channel


def between(op: str) -> Built:
    """Return an op between convolutions in blocks that cannot absorb it."""
    net = Net()
    x = net.input(numbers(1, _CHANNELS, 8, 8))
    first, second = (net.node("MaxPool", x, kernel_shape=[k, k], pads=[0, 0, k - 1, k - 1]) for k in (2, 3))
    y = net.node("Sum", first, second) if op == "Sum" else _OPS[op](net, first, second)
    net.node("MaxPool", y, kernel_shape=[3, 3])
    if op in _POSITIVE:
        net.feeds = {name: np.abs(array) for name, array in net.feeds.items()}
    return net.model()


def behind_conv(op: str | None) -> Built:
    """Return an op, or none, between two convolutions; one of two operands with a constant per channel."""
    net = Net()
    x = net.input(numbers(1, _CHANNELS, 8, 8))
    W = numbers(_CHANNELS, _CHANNELS, 1, 1)
    y = net.node("Conv", x, net.constant(W))
    if op in _FACTORS:
        y = net.node(op, y, _per_channel(net))
    elif op is not None:
        z = net.input(numbers(1, _CHANNELS, 8, 8))
        y = net.node("Sum", y, z) if op == "Sum" else _OPS[op](net, y, z)
    channels = 2 * _CHANNELS if op == "Concat" else _CHANNELS
    net.node("Conv", y, net.constant(numbers(_CHANNELS, channels, 1, 1)))
    return net.model()


def small_chain(nodes: int) -> Built:
    """Return a chain of nodes that do next to nothing and that nothing merges."""
    net = Net()
    x = net.input(numbers(1, 4))
    for index in range(nodes):
        x = net.node("Softsign" if index % 2 else "Abs", x)
    return net.model()
