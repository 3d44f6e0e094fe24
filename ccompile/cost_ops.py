"""What each op computes: the work of linear ops, the multiplications of the others, and which operands are weights.

Work is `rows x groups x (ins x outs)` multiply-accumulates (MACs): each row of each group is one dense product.
Padding positions count (a dense convention), bias adds do not. A transposed convolution scatters every input element,
also to what `pads` crops. Recurrent gates, softmax and scales are not MACs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ccompile import graph
from ccompile.tables import TableKind
from ccompile.target import RateKind, Step, round_up_to

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnx_ir as ir

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """`rows` products of `groups` independent dense ins -> outs maps; of each output position, `taps` are rows."""

    kind: RateKind
    rows: int
    groups: int
    ins: int
    outs: int
    taps: int = 1

    @property
    def macs(self) -> int:
        """Return the multiply-accumulates."""
        return self.rows * self.groups * self.ins * self.outs

    def at(self, step: Step) -> Work:
        """Return the work as a machine with these multiples runs it: depthwise channels that are none are ragged."""
        return replace(self, kind="ragged") if self.kind == "depthwise" and self.groups % step.out_channels else self

    def table(self, step: Step, is_blocked: bool | None) -> tuple[TableKind, dict[str, float]] | None:
        """Return where measured rates of such work stand, and the sizes they go with.

        is_blocked: whether it runs in blocks, None where there are none.
        """
        positions = self.rows / self.taps
        if self.kind in ("depthwise", "ragged"):
            fits = self.kind == "depthwise" if is_blocked is None else is_blocked
            return "depthwise" if fits else "ragged", {"channels": self.groups, "positions": positions}
        ins, outs = round_up_to(self.ins, step.in_channels), round_up_to(self.outs, step.out_channels)
        if self.kind in ("conv", "conv1x1"):
            return "plain" if is_blocked is False else "conv", {"inputs": ins, "outputs": outs, "positions": positions}
        return None if self.kind == "recurrent" else ("gemm", {"rows": self.rows, "inputs": ins, "outputs": outs})

    def computed(self, step: Step) -> int:
        """Return the MACs that a machine computes which rounds channels up to multiples; depthwise ones by group.

        >>> Work("conv", 10, 1, 64, 49).computed(Step(in_channels=4, out_channels=16)) == 10 * 64 * 64
        True
        """
        if self.kind in ("depthwise", "ragged"):
            return self.rows * round_up_to(self.groups, step.out_channels) * self.ins * self.outs
        ins, outs = round_up_to(self.ins, step.in_channels), round_up_to(self.outs, step.out_channels)
        return self.rows * self.groups * ins * outs


@dataclass(frozen=True)
class Call:
    """A node with the shapes of its operands; an omitted operand has shape None."""

    node: ir.Node
    inputs: Sequence[Shape | None]
    outputs: Sequence[Shape | None]

    def attribute(self, name: str, default: int) -> int:
        """Return an integer attribute."""
        return int(graph.attribute(self.node, name, default))

    def shape(self, position: int) -> Shape:
        """Return the shape of an input; raises LookupError when it is not known."""
        found = self.inputs[position] if position < len(self.inputs) else None
        if found is None:
            raise LookupError(position)
        return found

    @property
    def output(self) -> Shape:
        """Return the shape of the first output; raises LookupError when it is not known."""
        if not self.outputs or self.outputs[0] is None:
            raise LookupError("output")
        return self.outputs[0]


def _conv(call: Call, weight: int = 1) -> Work:
    # W[o, c / g, k...]; y[n, o, p...]
    W, y = call.shape(weight), call.output
    groups, taps = call.attribute("group", 1), math.prod(W[2:])
    return Work(_conv_kind(W[1], groups, taps), y[0] * math.prod(y[2:]) * taps, groups, W[1], W[0] // groups, taps)


def _conv_transpose(call: Call) -> Work:
    # W[c, o / g, k...]; x[n, c, p...]
    x, W = call.shape(0), call.shape(1)
    groups, taps = call.attribute("group", 1), math.prod(W[2:])
    kind = _conv_kind(W[0] // groups, groups, taps)
    return Work(kind, x[0] * math.prod(x[2:]) * taps, groups, W[0] // groups, W[1], taps)


def _conv_kind(ins: int, groups: int, taps: int) -> RateKind:
    if ins == 1 and groups > 1:
        return "depthwise"
    return "conv1x1" if taps == 1 else "conv"


def _qlinear_conv(call: Call) -> Work:
    return _conv(call, 3)


def _gemm(call: Call) -> Work:
    # y[m, n] = A[m, k] B[k, n]
    A, (rows, outs) = call.shape(0), call.output
    return _product(rows, A[0] if call.attribute("transA", 0) else A[1], outs)


def _matmul(call: Call) -> Work:
    # y[..., m, n] = A[..., m, k] B[..., k, n], numpy's rules; a shared B makes one product of all rows
    A, y = call.shape(0), call.output
    ins = A[-2] if call.attribute("transA", 0) and len(A) > 1 else A[-1]
    outs = y[-1] if y and not _is_vector(call) else 1
    return _product(math.prod(y) // max(outs, 1), ins, outs)


def _is_vector(call: Call) -> bool:
    second = 3 if call.node.op_type == "QLinearMatMul" else 1
    return len(call.inputs) > second and call.inputs[second] is not None and len(call.shape(second)) == 1


def _matmul_nbits(call: Call) -> Work:
    # com.microsoft: y[..., N] = A[..., K] dequantised(B)
    return _product(math.prod(call.shape(0)[:-1]), call.attribute("K", 0), call.attribute("N", 0))


def _product(rows: int, ins: int, outs: int) -> Work:
    return Work("gemv" if rows == 1 else "gemm", rows, 1, ins, outs)


def _recurrent(call: Call) -> Work:
    # X[t, n, i] (t and n swap with layout=1), W[d, gates h, i], R[d, gates h, h]
    X, W, R = call.shape(0), call.shape(1), call.shape(2)
    return Work("recurrent", X[0] * X[1], W[0], W[2] + R[2], W[1])


def _attention(call: Call) -> Work:
    # Q[b, h, l, d] K[b, g, s, d] V[b, g, s, e], or [b, l, h d] and head counts as attributes: scores l s d, sum l s e
    if call.node.domain == "com.microsoft":  # x[b, l, c] W[c, 3 h]: projections, then scores and sums over l
        (batch, length, width), W = call.shape(0), call.shape(1)
        return Work("gemm", batch * length, 1, 3 * width + 2 * length, W[1] // 3)
    q, k, v = call.shape(0), call.shape(1), call.shape(2)
    past = call.inputs[4] if len(call.inputs) > 4 and call.inputs[4] else (0, 0, 0, 0)
    if len(q) == 4:
        return Work("gemm", q[0] * q[2], q[1], k[2] + past[2], q[3] + v[3])
    heads, shared = call.attribute("q_num_heads", 1), call.attribute("kv_num_heads", 1)
    return Work("gemm", q[0] * q[1], heads, k[1] + past[2], q[2] // heads + v[2] // shared)


def _multi_head_attention(call: Call) -> Work:
    # com.microsoft: Q[b, l, h d] K[b, s, h d] V[b, s, h e]
    q, k, v = call.shape(0), call.shape(1), call.shape(2)
    heads = call.attribute("num_heads", 1)
    return Work("gemm", q[0] * q[1], heads, k[1], (q[2] + v[2]) // heads)


def _einsum(call: Call) -> Work:
    # the contraction of two operands: each output element sums over all letters that the output lacks
    terms = str(graph.attribute(call.node, "equation", "")).replace(" ", "").split("->")[0].split(",")
    size: dict[str, int] = {}
    for position, term in enumerate(terms):
        shape = call.shape(position)
        before, _, after = term.partition("...")
        size |= dict(zip(before, shape, strict=False))
        size |= dict(zip(reversed(after), reversed(shape), strict=False))
    summed = math.prod(size[letter] for letter in size if letter not in _einsum_output(call.node))
    # without the second operand nothing is multiplied; with a third the cost depends on the order: both are not counted
    return _product(math.prod(call.output), summed if len(terms) == 2 else 0, 1)


def _einsum_output(node: ir.Node) -> str:
    left, arrow, right = str(graph.attribute(node, "equation", "")).replace(" ", "").partition("->")
    if arrow:
        return right
    letters = left.replace(",", "").replace(".", "")
    return "".join(letter for letter in letters if letters.count(letter) == 1)


@dataclass(frozen=True)
class Linear:
    """A row of the table of linear ops: its work, and the positions of its two operands."""

    work: Callable[[Call], Work]
    input: int = 0
    weight: int = 1
    quantised: bool = False  # integer operands are the weights themselves, not what an encoding hides


# Ops of multiply-accumulates. Domains: default and com.microsoft.
LINEAR: Mapping[str, Linear] = {
    "Conv": Linear(_conv),
    "FusedConv": Linear(_conv),
    "DeformConv": Linear(_conv),
    "ConvInteger": Linear(_conv, quantised=True),
    "QLinearConv": Linear(_qlinear_conv, weight=3, quantised=True),
    "ConvTranspose": Linear(_conv_transpose),
    "Gemm": Linear(_gemm),
    "FusedGemm": Linear(_gemm),
    "QGemm": Linear(_gemm, weight=3, quantised=True),
    "MatMul": Linear(_matmul),
    "FusedMatMul": Linear(_matmul),
    "MatMulInteger": Linear(_matmul, quantised=True),
    "MatMulIntegerToFloat": Linear(_matmul, quantised=True),
    "DynamicQuantizeMatMul": Linear(_matmul, quantised=True),
    "QLinearMatMul": Linear(_matmul, weight=3, quantised=True),
    "MatMulNBits": Linear(_matmul_nbits, quantised=True),
    "LSTM": Linear(_recurrent),
    "GRU": Linear(_recurrent),
    "RNN": Linear(_recurrent),
    "Attention": Linear(_attention),
    "MultiHeadAttention": Linear(_multi_head_attention),
    "Einsum": Linear(_einsum),
}

# Scalar multiplications and divisions that an op's definition spells out, beside MACs: (how many, per element of what).
# exp, log, tanh, erf, sqrt and comparisons are none. An average multiplies by 1 / n once. One row per op.
Per = Literal["input", "output"]
MULTIPLICATIONS: Mapping[str, tuple[int, Per]] = {
    "Mul": (1, "output"),
    "Div": (1, "output"),
    "Pow": (1, "output"),  # as a square
    "Reciprocal": (1, "output"),
    "LeakyRelu": (1, "output"),
    "PRelu": (1, "output"),
    "Elu": (1, "output"),
    "Celu": (2, "output"),
    "Selu": (2, "output"),
    "ThresholdedRelu": (0, "output"),
    "Sigmoid": (1, "output"),  # 1 / (1 + exp(-x))
    "HardSigmoid": (1, "output"),
    "HardSwish": (2, "output"),
    "Swish": (2, "output"),
    "Gelu": (3, "output"),
    "QuickGelu": (3, "output"),
    "Mish": (1, "output"),
    "Softmax": (1, "output"),
    "BatchNormalization": (1, "output"),  # y = a x + b
    "InstanceNormalization": (3, "output"),  # the square, 1 / sigma, the scale
    "LayerNormalization": (3, "output"),
    "GroupNormalization": (3, "output"),
    "RMSNormalization": (3, "output"),
    "SimplifiedLayerNormalization": (3, "output"),
    "SkipLayerNormalization": (3, "output"),
    "LRN": (3, "output"),
    "LpNormalization": (2, "output"),
    "AveragePool": (1, "output"),
    "GlobalAveragePool": (1, "output"),
    "Mean": (1, "output"),
    "ReduceMean": (1, "output"),
    "ReduceL2": (1, "input"),
    "ReduceSumSquare": (1, "input"),
    "ReduceProd": (1, "input"),
    "CumProd": (1, "input"),
    "QuantizeLinear": (1, "output"),
    "DequantizeLinear": (1, "output"),
    "DynamicQuantizeLinear": (1, "output"),
    "LSTM": (3, "output"),  # f c, i g, o h; per element of Y
    "GRU": (3, "output"),
}

# Ops that move no data at run time: their output is the input's memory, or a constant.
VIEWS = frozenset({"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})
FREE = VIEWS | {"Constant", "Shape", "Size"}

# Ops that are never folded into a constant at session creation. DequantizeLinear keeps the small form of its weight.
NEVER_FOLDED = frozenset(
    {
        *("DequantizeLinear", "If", "Loop", "Scan"),
        *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"),
    }
)

# Operands that are not weights whatever their type: statistics, scales, zero points, shapes, axes, sizes, masks.
NOT_WEIGHTS: Mapping[str, tuple[int, ...]] = {
    "BatchNormalization": (3, 4),
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "QGemm": (1, 2, 4, 5, 7, 8),
    "ConvInteger": (2, 3),
    "MatMulInteger": (2, 3),
    "MatMulIntegerToFloat": (2, 3, 4, 5),
    "DynamicQuantizeMatMul": (2, 3),
    "MatMulNBits": (2, 3, 4),
    "Resize": (1, 2, 3),
    "Upsample": (1,),
    "Clip": (1, 2),
    "Pad": (1, 2, 3),
    "Reshape": (1,),
    "Expand": (1,),
    "Tile": (1,),
    "Slice": (1, 2, 3, 4),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "Split": (1,),
    "CumSum": (1,),
    "TopK": (1,),
    "Where": (0,),
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    "OneHot": (1, 2),
    "Dropout": (1, 2),
    "ReduceSum": (1,),
    "ReduceMean": (1,),
    "ReduceMax": (1,),
    "ReduceMin": (1,),
}

# Where the zero point of a quantised weight operand stands.
ZERO_POINT: Mapping[str, int] = {
    "QLinearConv": 5,
    "QLinearMatMul": 5,
    "QGemm": 5,
    "ConvInteger": 3,
    "MatMulInteger": 3,
    "MatMulIntegerToFloat": 5,
    "DynamicQuantizeMatMul": 3,
}

# Ops that read of their first operand only what they write.
PARTIAL_READS = frozenset({"Gather", "GatherND", "GatherElements", "Slice"})

# Decoders of packed weights: behind one, the weight counts with the elements that it has after decoding.
UNPACKS = frozenset({"BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot"})


def multiplications(call: Call) -> int:
    """Return the scalar multiplications of a node beside its MACs; raises LookupError when a shape is not known."""
    if call.node.op_type not in MULTIPLICATIONS:
        return 0
    each, per = MULTIPLICATIONS[call.node.op_type]
    return each * math.prod(call.shape(0) if per == "input" else call.output)


def run_of(call: Call) -> int:
    """Return how many elements stay neighbours when a Transpose moves them; raises LookupError without a shape."""
    shape = call.shape(0)
    order = [int(axis) for axis in graph.attribute(call.node, "perm", list(range(len(shape)))[::-1])]
    run = 1
    for axis in range(len(shape) - 1, -1, -1):
        if order[axis] != axis:
            break
        run *= shape[axis]
    return run
