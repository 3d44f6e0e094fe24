"""What price counts, against published totals, brute force and sums by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import builders
import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Net
from hypothesis import given, settings
from hypothesis import strategies as st

from ccompile import cost, graph, onnx_io
from ccompile.analysis import shapes
from ccompile.core import CostReport
from ccompile.errors import DataError
from ccompile.target import Target, load_target

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ccompile.core import Array

KINDS = ("conv", "conv1x1", "depthwise", "gemm", "gemv", "recurrent", "elementwise")
PLAIN: dict[str, Any] = {
    "name": "plain",
    "opset": {"min": 1, "max": 99},
    "dtypes": ["float32"],
    "rates": {kind: {"float32": 1.0} for kind in KINDS},
    "bandwidth_gb_s": 1e6,
    "node_overhead_us": 0,
}


def target(**changed: object) -> Target:
    return load_target({**PLAIN, **changed}, Path())


def price(
    model: ir.Model, on: Target | None = None, given: Mapping[str, tuple[int, ...]] | None = None
) -> cost.ModelCost:
    assert onnx_io.check(model) == ""
    found = shapes.infer(model, cost.example_shapes(model, given))
    return cost.price(model, found, on or target())


def rows(priced: cost.ModelCost) -> dict[str, cost.NodeCost]:
    return {row.name: row for row in priced.nodes}


def floats(*shape: int, seed: int = 0) -> Array:
    found: Array = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return found


# ------------------------------------------------------------------------------------------ known answers


@pytest.mark.parametrize(
    ("build", "params", "macs"),
    [
        (builders.lenet_300_100, 266_610, 266_200),
        (builders.lenet5_caffe, 431_080, 2_293_000),
        (builders.alexnet, 61_100_840, 714_188_480),
        (builders.vgg16, 138_357_544, 15_470_264_320),
        (builders.resnet50, 25_557_032, 4_089_184_256),
    ],
)
def test_famous_nets_have_their_published_totals(build: Callable[[], ir.Model], params: int, macs: int) -> None:
    priced = price(build())
    assert (priced.report.params, priced.report.macs) == (params, macs)
    assert priced.notes == ()


def test_vgg16_has_its_parameters_in_dense_layers_and_its_macs_in_convolutions() -> None:
    priced = price(builders.vgg16())
    dense = [row for row in priced.nodes if row.op == "Gemm"]
    assert 0.89 < sum(row.params for row in dense) / priced.report.params < 0.90
    assert 0.007 < sum(row.macs for row in dense) / priced.report.macs < 0.009


def test_running_statistics_are_stored_but_are_no_parameters() -> None:
    priced = price(builders.conv_bn_net(0))
    assert priced.report.params == 8 * 4 * 9 + 12 * 8 * 9 + 12 + 2 * (8 + 12) + 3 * 12 + 3
    assert priced.report.stored_bytes == 4 * (priced.report.params + 2 * (8 + 12))


# ------------------------------------------------------------------------------------------ MACs


def conv_model(
    op: str,
    size: tuple[int, int],
    channels: tuple[int, int, int],
    kernel: tuple[int, int],
    stride: int = 1,
    dilation: int = 1,
    pad: int = 0,
) -> ir.Model:
    """channels: in per group, out per group, groups."""
    ins, outs, groups = channels
    net = Net(0)
    weight = (groups * outs, ins, *kernel) if op == "Conv" else (groups * ins, outs, *kernel)
    x = net.input("x", [1, groups * ins, *size])
    y = net.node(
        op,
        x,
        net.constant(floats(*weight), "w"),
        strides=[stride] * 2,
        dilations=[dilation] * 2,
        pads=[pad] * 4,
        group=groups,
    )
    return net.model(y)


def brute_force_conv(model: ir.Model) -> int:
    """Count by walking over every output (Conv) or input (ConvTranspose) position, group, channel pair and tap."""
    node = next(iter(model.graph))
    W = graph.static_shape(node.inputs[1])
    inferred = shapes.infer(model, {})
    walked = inferred[str(node.outputs[0].name if node.op_type == "Conv" else node.inputs[0].name)].static  # type: ignore[union-attr]
    assert W is not None
    assert walked is not None
    groups, own = int(graph.attribute(node, "group")), walked[1]
    count = 0
    for channel, *_ in itertools.product(range(own), *map(range, walked[2:])):
        group = channel // (own // groups)
        assert 0 <= group < groups
        for _ in itertools.product(range(W[1]), *map(range, W[2:])):
            count += 1
    return walked[0] * count


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize(("stride", "dilation", "pad"), [(1, 1, 0), (2, 1, 1), (1, 2, 2), (3, 2, 1)])
@pytest.mark.parametrize("channels", [(3, 2, 1), (2, 3, 2), (1, 1, 4), (1, 2, 3)])
def test_convolution_macs_equal_brute_force(
    op: str, stride: int, dilation: int, pad: int, channels: tuple[int, int, int]
) -> None:
    model = conv_model(op, (7, 8), channels, (3, 2), stride, dilation, pad)
    assert price(model).report.macs == brute_force_conv(model) > 0


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["Conv", "ConvTranspose"]),
    st.tuples(st.integers(5, 8), st.integers(5, 8)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(0, 1),
)
def test_convolution_macs_equal_brute_force_everywhere(
    op: str,
    size: tuple[int, int],
    channels: tuple[int, int, int],
    kernel: tuple[int, int],
    stride: int,
    dilation: int,
    pad: int,
) -> None:
    if op == "ConvTranspose" and min(kernel) == 1:
        pad = 0
    model = conv_model(op, size, channels, kernel, stride, dilation, pad)
    assert price(model).report.macs == brute_force_conv(model) > 0


def test_a_transposed_convolution_does_the_work_of_the_convolution_that_it_transposes() -> None:
    down = price(conv_model("Conv", (9, 9), (4, 6, 1), (3, 3), stride=2)).report.macs
    up = price(conv_model("ConvTranspose", (4, 4), (6, 4, 1), (3, 3), stride=2)).report.macs
    assert up == down == 4 * 4 * 6 * 4 * 9


@pytest.mark.parametrize(
    ("a", "b", "macs"),
    [
        ((2, 3, 4), (4, 5), 2 * 3 * 4 * 5),
        ((2, 3, 4), (2, 4, 5), 2 * 3 * 4 * 5),
        ((2, 1, 3, 4), (7, 4, 5), 2 * 7 * 3 * 4 * 5),
        ((3, 4), (4,), 12),
        ((4,), (4, 5), 20),
        ((4,), (4,), 4),
        ((1, 0), (0, 5), 0),
    ],
)
def test_matmul_macs_follow_numpy_rules(a: tuple[int, ...], b: tuple[int, ...], macs: int) -> None:
    net = Net()
    model = net.model(net.node("MatMul", net.input("a", a), net.input("b", b)))
    found = cost.price(model, shapes.infer(model, {}), target())
    assert found.report.macs == macs
    assert found.notes == ()


@pytest.mark.parametrize(
    ("equation", "a", "b", "macs"),
    [
        ("ij,jk->ik", (2, 3), (3, 4), 24),
        ("bij,bjk->bik", (5, 2, 3), (5, 3, 4), 120),
        ("...ij,jk->...ik", (5, 2, 3), (3, 4), 120),
        ("i,j->ij", (3,), (4,), 12),
        ("ij,ij->", (3, 4), (3, 4), 12),
    ],
)
def test_einsum_macs_of_two_operands(equation: str, a: tuple[int, ...], b: tuple[int, ...], macs: int) -> None:
    net = Net()
    model = net.model(net.node("Einsum", net.input("a", a), net.input("b", b), equation=equation))
    found = shapes.infer(model, {})
    if found["einsum0_out"].static is None:  # older inference does not know the ellipsis
        found["einsum0_out"] = shapes.ValueType(ir.DataType.FLOAT, (5, 2, 4))
    assert cost.price(model, found, target()).report.macs == macs


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_macs(op: str, gates: int) -> None:
    net = Net(0)
    x = net.input("x", [6, 2, 5])
    operands = [net.weight("w", (2, gates * 7, 5)), net.weight("r", (2, gates * 7, 7))]
    y = net.node(op, x, *operands, hidden_size=7, direction="bidirectional")
    model = net.model(y)
    report = cost.price(model, shapes.infer(model, {}), target()).report
    assert report.macs == 6 * 2 * 2 * gates * 7 * (5 + 7)
    assert report.params == 2 * gates * 7 * (5 + 7)


def test_attention_macs() -> None:
    net = Net()
    q, k, v = net.input("q", [2, 4, 5, 8]), net.input("k", [2, 4, 6, 8]), net.input("v", [2, 4, 6, 3])
    model = net.model(net.node("Attention", q, k, v), opsets={"": 23})
    assert cost.price(model, shapes.infer(model, {}), target()).report.macs == 2 * 4 * 5 * 6 * (8 + 3)


def test_integer_products_count_like_float_ones() -> None:
    net = Net()
    x = net.input("x", [1, 4, 6, 6], ir.DataType.UINT8)
    y = net.node("ConvInteger", x, net.constant(np.arange(-54, 54, dtype=np.int8).reshape(3, 4, 3, 3), "w"))
    report = price(net.model(y)).report
    assert (report.macs, report.params, report.nonzero, report.stored_bytes) == (3 * 16 * 36, 108, 107, 108)


def test_packed_weights_of_matmul_nbits_count_unpacked() -> None:
    net = Net()
    x, packed = net.input("x", [2, 64]), net.constant(np.zeros((48, 2, 16), np.uint8), "w")
    scales = net.constant(np.ones(96, np.float32), "s")
    y = net.node("MatMulNBits", x, packed, scales, domain="com.microsoft", K=64, N=48, bits=4, block_size=32)
    model = net.model(y, opsets={"com.microsoft": 1})
    found = shapes.infer(model, {}) | {"matmulnbits0_out": shapes.ValueType(ir.DataType.FLOAT, (2, 48))}
    report = cost.price(model, found, target()).report
    assert (report.macs, report.params) == (2 * 64 * 48, 64 * 48)
    assert report.stored_bytes == 48 * 32 + 96 * 4


def test_multiplications_are_macs_and_elementwise_products() -> None:
    net = Net(0)
    x = net.dense(net.input("x", [1, 6]), "fc", 6, 4)
    y = net.node("Mul", x, net.constant(floats(4)))
    report = price(net.model(net.relu(y))).report
    assert (report.macs, report.multiplications) == (24, 24 + 4)


# ------------------------------------------------------------------------------------------ weights


def test_a_shared_weight_counts_once() -> None:
    net = Net(0)
    w, x = net.weight("w", (6, 6)), net.input("x", [1, 6])
    priced = price(net.model(net.node("MatMul", net.node("MatMul", x, w, name="a"), w, name="b")))
    assert (priced.report.params, priced.report.macs, priced.report.resident_bytes) == (36, 72, 144)
    assert [(row.params, row.stored_bytes) for row in priced.nodes] == [(36, 144), (0, 0)]


def test_a_weight_tied_through_transpose_counts_once() -> None:
    net = Net(0)
    w, x = net.weight("w", (5, 6)), net.input("x", [1, 5])
    y = net.node("MatMul", net.node("MatMul", x, w), net.node("Transpose", w, perm=[1, 0], name="t"))
    priced = price(net.model(y))
    assert (priced.report.params, priced.report.stored_bytes, priced.report.resident_bytes) == (30, 120, 240)
    assert rows(priced)["t"].seconds == 0


def test_a_cast_weight_is_stored_narrow_and_held_wide() -> None:
    net = Net()
    half = net.constant(floats(6, 4).astype(np.float16), "w")
    y = net.node("MatMul", net.input("x", [1, 6]), net.node("Cast", half, to=1))
    report = price(net.model(y)).report
    assert (report.params, report.stored_bytes, report.resident_bytes) == (24, 48, 96)


def quantised(dtype: str = "int8", zero: int = 3, fused: tuple[str, ...] = ()) -> cost.ModelCost:
    net = Net()
    values = (np.arange(6 * 5).reshape(6, 5) % 8).astype(np.int8)
    if dtype == "int4":
        q = net.stored(ir.tensor((values - 4).astype(ml_dtypes.int4), name="q"), "q")
        zero_point = net.stored(ir.tensor(np.array(zero, ml_dtypes.int4), name="z"), "z")
    else:
        q, zero_point = net.constant(values, "q"), net.constant(np.array(zero, np.int8), "z")
    w = net.node("DequantizeLinear", q, net.constant(np.array(0.5, np.float32), "s"), zero_point, name="dq")
    model = net.model(net.node("MatMul", net.input("x", [1, 6]), w, name="fc"), opsets={"": 21})
    return price(model, target(fused=fused))


def test_a_dequantised_weight_stays_integer_and_zero_means_its_zero_point() -> None:
    report = quantised().report
    assert (report.params, report.nonzero) == (30, 30 - 4)
    assert report.stored_bytes == report.resident_bytes == 30 + 4 + 1
    assert quantised(fused=("DequantizeLinear",)).report.moved_bytes == 30 + 4 * (6 + 5)
    assert report.moved_bytes > 2 * 4 * 30


def test_int4_weights_are_stored_packed() -> None:
    report = quantised("int4", zero=0).report
    assert (report.params, report.nonzero, report.stored_bytes) == (30, 30 - 4, 15 + 4 + 1)


def test_zero_points_by_channel_are_subtracted_by_channel() -> None:
    net = Net()
    q = net.constant(np.array([[1, 2, 3], [1, 2, 3]], np.int8), "q")
    scale, zero = net.constant(np.ones(3, np.float32), "s"), net.constant(np.array([1, 2, 9], np.int8), "z")
    w = net.node("DequantizeLinear", q, scale, zero, axis=1)
    report = price(net.model(net.node("MatMul", net.input("x", [1, 2]), w))).report
    assert (report.params, report.nonzero) == (6, 2)


def test_one_integer_tensor_behind_two_dequantise_nodes_counts_once() -> None:
    net = Net()
    q, scale = net.constant(np.ones((4, 4), np.int8), "q"), net.constant(np.array(1, np.float32), "s")
    x = net.input("x", [1, 4])
    for _ in range(2):
        x = net.node("MatMul", x, net.node("DequantizeLinear", q, scale))
    assert price(net.model(x)).report.params == 16


def test_generated_weights_count_by_shape_and_are_never_built() -> None:
    net = Net()
    shape = net.constant(np.array([100_000, 100_000], np.int64), "shape")
    one = ir.tensor(np.ones(1, np.float32), name="one")
    w = net.node("ConstantOfShape", shape, value=one)
    report = price(net.model(net.node("MatMul", net.input("x", [1, 100_000]), w))).report
    assert report.params == report.nonzero == report.macs == 10**10
    assert (report.stored_bytes, report.resident_bytes) == (16 + 4, 4 * 10**10)


def test_a_codebook_and_its_indices_are_what_is_stored() -> None:
    net = Net()
    indices = net.constant(np.arange(6 * 4, dtype=np.int32).reshape(6, 4) % 3, "i")
    w = net.node("Gather", net.constant(np.array([0, 1, 2], np.float32), "book"), indices)
    report = price(net.model(net.node("MatMul", net.input("x", [1, 6]), w))).report
    assert (report.params, report.stored_bytes, report.resident_bytes) == (24 + 3, 4 * (24 + 3), 4 * 24)


def test_bit_packed_weights_count_unpacked() -> None:
    net = Net()
    packed = net.constant(np.arange(12, dtype=np.uint8).reshape(12, 1), "packed")
    shifts = net.constant(np.array([0, 4], np.uint8), "shifts")
    mask = net.constant(np.array([15], np.uint8), "mask")
    nibbles = net.node("BitwiseAnd", net.node("BitShift", packed, shifts, direction="RIGHT"), mask)
    w = net.node("Reshape", net.node("Cast", nibbles, to=1), net.constant(np.array([6, 4], np.int64), "shape"))
    report = price(net.model(net.node("MatMul", net.input("x", [1, 6]), w))).report
    assert (report.params, report.resident_bytes) == (24, 96)


def test_shapes_axes_and_bounds_are_no_parameters() -> None:
    net = Net()
    x = net.input("x", [1, 4, 4])
    y = net.node("Reshape", x, net.constant(np.array([4, 4], np.int64), "shape"))
    y = net.node("Clip", y, net.constant(np.array(0, np.float32), "lo"), net.constant(np.array(6, np.float32), "hi"))
    y = net.node("ReduceSum", y, net.constant(np.array([0], np.int64), "axes"))
    report = price(net.model(y)).report
    assert (report.params, report.stored_bytes) == (0, 16 + 8 + 8)


def test_zeros_are_parameters_that_are_not_nonzero() -> None:
    net = Net()
    w = floats(6, 4)
    w[1:4] = 0
    report = price(net.model(net.node("MatMul", net.input("x", [1, 6]), net.constant(w)))).report
    assert (report.params, report.nonzero) == (24, 12)


def test_a_sparse_weight_counts_dense_and_is_stored_sparse() -> None:
    net = Net()
    proto = onnx.helper.make_sparse_tensor(
        onnx.helper.make_tensor("w", 1, [2], [1.0, 2.0]), onnx.helper.make_tensor("i", 7, [2], [0, 7]), [4, 5]
    )
    y = net.node("MatMul", net.input("x", [1, 4]), net.stored(onnx_io.SparseTensor(proto), "w"))
    known = {
        "x": shapes.ValueType(ir.DataType.FLOAT, (1, 4)),
        "matmul0_out": shapes.ValueType(ir.DataType.FLOAT, (1, 5)),
    }
    report = cost.price(net.model(y), known, target()).report
    assert (report.params, report.nonzero, report.stored_bytes, report.resident_bytes) == (20, 2, 2 * (4 + 8), 80)


# ------------------------------------------------------------------------------------------ activations


def test_peak_of_a_diamond_by_hand() -> None:
    net = Net()
    x = net.input("x", [1, 100])  # 400 B
    left = net.node("Concat", x, x, x, axis=1, name="left")  # 1200 B
    right = net.node("Neg", x, name="right")  # 400 B, x still lives: 400 + 1200 + 400
    wide = net.node("Concat", right, right, right, axis=1, name="wide")  # 1200 + 400 + 1200
    priced = price(net.model(net.node("Add", left, wide, name="join")))  # 1200 + 1200 + 1200
    assert (priced.report.peak_activation_bytes, priced.peak_node) == (3600, "join")


@pytest.mark.parametrize("build", [builders.residual_net, builders.mlp, builders.conv_bn_net])
def test_peak_equals_a_sum_over_live_values_at_every_node(build: Callable[[int], ir.Model]) -> None:
    model = build(0)
    found, nodes = shapes.infer(model, cost.example_shapes(model)), list(model.graph)
    birth = dict.fromkeys(model.graph.inputs, 0) | {node.outputs[0]: at for at, node in enumerate(nodes)}
    death = {value: at for at, node in enumerate(nodes) for value in node.inputs if value in birth}
    death |= dict.fromkeys(model.graph.outputs, len(nodes))
    live = [
        (sum(found[str(v.name)].nbytes or 0 for v in birth if birth[v] <= at <= death[v]), str(node.name))
        for at, node in enumerate(nodes)
    ]
    priced = price(model)
    assert (priced.report.peak_activation_bytes, priced.peak_node) == max(live, key=lambda entry: entry[0])


def test_outputs_live_to_the_end_and_views_cost_nothing() -> None:
    net = Net()
    x = net.input("x", [1, 100])
    early = net.node("Neg", x, name="early")
    y = net.node("Reshape", early, net.constant(np.array([10, 10], np.int64)))
    z = net.node("Abs", net.node("Exp", y), name="last")
    priced = price(net.model(early, z))
    assert priced.report.peak_activation_bytes == 3 * 400
    assert priced.report.moved_bytes == 3 * 800


def test_a_fused_epilogue_costs_nothing_where_the_target_says_so() -> None:
    model = builders.lenet_300_100(0)
    apart, fused = price(model), price(model, target(fused=["Relu"]))
    assert fused.report.seconds < apart.report.seconds
    assert apart.report.moved_bytes - fused.report.moved_bytes == 2 * 4 * (300 + 100)
    assert all(row.seconds == 0 for row in fused.nodes if row.op == "Relu")


def test_a_fused_sum_of_two_linear_ops_keeps_the_first_result() -> None:
    net = Net(0)
    x = net.input("x", [1, 6])
    y = net.node("Add", net.dense(x, "a", 6, 40), net.dense(x, "b", 6, 40), name="sum")
    priced = price(net.model(y), target(fused=["Add"]))
    found = rows(priced)
    assert found["sum"].note == "vanishes into its neighbour"
    assert (priced.report.peak_activation_bytes, priced.peak_node) == (24 + 160 + 160, "b")
    assert found["a"].moved_bytes == found["b"].moved_bytes == 4 * (6 + 40 * 6 + 40 + 40)


def test_a_sum_with_a_folded_product_is_not_fused_into_it() -> None:
    net = Net(0)
    factors = net.node("MatMul", net.weight("u", (4, 2)), net.weight("v", (2, 4)), name="uv")
    priced = price(net.model(net.node("Add", net.input("x", [4, 4]), factors, name="sum")), target(fused=["Add"]))
    assert rows(priced)["sum"].seconds > 0
    assert priced.report.macs == 0


def test_a_shared_output_is_not_fused() -> None:
    net = Net(0)
    x = net.dense(net.input("x", [1, 6]), "fc", 6, 4)
    priced = price(net.model(net.node("Add", net.node("Relu", x, name="relu"), x)), target(fused=["Relu"]))
    assert rows(priced)["relu"].seconds > 0


# ------------------------------------------------------------------------------------------ seconds


def conv_seconds(channels: int, on: Target) -> float:
    return price(conv_model("Conv", (8, 8), (16, channels, 1), (3, 3)), on).report.seconds


def test_49_channels_cost_what_64_cost() -> None:
    steps = target(align={"float32": {"in_channels": 4, "out_channels": 16}})
    assert conv_seconds(48, steps) < conv_seconds(49, steps) == conv_seconds(64, steps) < conv_seconds(65, steps)
    assert conv_seconds(49, target()) < conv_seconds(64, target())


def test_one_row_waits_for_memory_and_many_rows_for_arithmetic() -> None:
    on = load_target("rated.yaml", Path(__file__).parent)

    def seconds(count: int) -> tuple[float, float, int]:
        net = Net()
        y = net.node("MatMul", net.input("x", [count, 4096]), net.weight("w", (4096, 4096)), name="fc")
        priced = cost.price(model := net.model(y), shapes.infer(model, {}), on)
        row = priced.nodes[0]
        return row.seconds - 0.3e-6, on.seconds_to_move(row.moved_bytes), row.macs

    one, moved, _ = seconds(1)
    assert one == pytest.approx(moved)
    many, moved, macs = seconds(512)
    assert many == pytest.approx(macs / on.rate("gemm", "float32"))
    assert many > moved
    assert 67.1e6 / one / 1e9 == pytest.approx(35, abs=1)  # GB/s, as measured at 67 MB


@pytest.mark.parametrize(("layers", "share"), [(1, 0), (2, 0), (3, 0.5), (4, 1), (8, 1)])
def test_weights_beyond_half_of_the_cache_are_cold_where_tables_were_warm(layers: int, share: float) -> None:
    table = {"axes": {"rows": [1], "inputs": [1], "outputs": [1]}, "rates": [10]}
    on = target(
        tables={"gemm": {"float32": [table]}},
        cache={"mib": 1, "bandwidth_gb_s": 10},
        bandwidth_gb_s=1,
        node_overhead_us=0,
    )
    net = Net()
    y = net.input("x", [1, 256])
    for number in range(layers):
        y = net.node("MatMul", y, net.weight(f"w{number}", (256, 256)))
    seconds = price(net.model(y), on).report.seconds
    assert seconds == pytest.approx(layers * 256 * 256 * (1 / 10e9 + share * 4 / 1e9))


def quantised_conv() -> ir.Model:
    net = Net()
    one, zero = net.constant(np.array(0.1, np.float32), "s"), net.constant(np.array(0, np.uint8), "z")
    x = net.node("QuantizeLinear", net.input("x", [1, 64, 16, 16]), one, zero, name="q_in")
    x = net.node("DequantizeLinear", x, one, zero, name="dq_x")
    w = net.node("DequantizeLinear", net.constant(np.ones((64, 64, 3, 3), np.int8), "w"), one, name="dq_w")
    y = net.node("Relu", net.node("Conv", x, w, name="conv", pads=[1] * 4), name="relu")
    y = net.node("DequantizeLinear", net.node("QuantizeLinear", y, one, zero, name="q_out"), one, zero, name="dq_out")
    return net.model(y)


def test_a_quantised_convolution_runs_at_the_integer_rate() -> None:
    on = load_target("rated.yaml", Path(__file__).parent)
    found = rows(price(quantised_conv(), on))
    assert found["conv"].seconds == pytest.approx(
        64 * 64 * 9 * 256 / on.rate("conv", "int8") + 64 * 256 / (2 * on.rate("elementwise", "int8")) + 0.3e-6
    )
    assert found["conv"].moved_bytes == 64 * 64 * 9 + 2 * 64 * 256
    assert all(found[name].seconds == 0 for name in ("dq_x", "dq_w", "relu", "q_out"))
    assert all(found[name].seconds > 0 for name in ("q_in", "dq_out"))


@pytest.mark.parametrize(("op", "vanish"), [("Sigmoid", True), ("Tanh", False)])
def test_an_op_between_codes_is_one_on_integers_where_it_has_such_a_kernel(op: str, vanish: bool) -> None:
    on = load_target("x86-64-avx512-vnni", Path())
    net = Net()
    one, zero = net.constant(np.array(0.1, np.float32), "s"), net.constant(np.array(0, np.uint8), "z")
    x = net.node("QuantizeLinear", net.input("x", [1, 64, 16, 16]), one, zero, name="q_in")
    x = net.node(op, net.node("DequantizeLinear", x, one, zero, name="dq"), name="op")
    x = net.node("QuantizeLinear", x, one, zero, name="q_out")
    found = rows(price(net.model(net.node("DequantizeLinear", x, one, zero, name="dq_out")), on))
    assert [found[name].seconds == 0 for name in ("dq", "q_out")] == [vanish, vanish]


def test_ragged_depthwise_channels_cost_more_on_integers() -> None:
    on = load_target("rated.yaml", Path(__file__).parent)

    def seconds(channels: int) -> float:
        net = Net()
        one, zero = net.constant(np.array(0.1, np.float32), "s"), net.constant(np.array(0, np.uint8), "z")
        x = net.node("QuantizeLinear", net.input("x", [1, channels, 16, 16]), one, zero)
        x = net.node("DequantizeLinear", x, one, zero)
        w = net.node("DequantizeLinear", net.constant(np.ones((channels, 1, 3, 3), np.int8)), one)
        y = net.node("Conv", x, w, name="conv", pads=[1] * 4, group=channels)
        return rows(price(net.model(net.node("QuantizeLinear", y, one, zero)), on))["conv"].seconds

    assert seconds(95) > 2 * seconds(96)


def test_a_weight_that_is_only_stored_quantised_is_dequantised_at_every_run() -> None:
    on = load_target("rated.yaml", Path(__file__).parent)
    net = Net()
    w = net.node(
        "DequantizeLinear",
        net.constant(np.ones((64, 64, 3, 3), np.int8), "w"),
        net.constant(np.array(1, np.float32), "s"),
        name="dq",
    )
    found = rows(price(net.model(net.node("Conv", net.input("x", [1, 64, 8, 8]), w, name="conv")), on))
    assert found["dq"].seconds > 0
    assert found["conv"].seconds == pytest.approx(64 * 64 * 9 * 36 / on.rate("conv", "float32") + 0.3e-6)


def test_constant_nodes_cost_nothing_at_run_time() -> None:
    net = Net(0)
    w = net.node("Mul", net.weight("u", (6, 4)), net.weight("v", (6, 4)), name="folded")
    priced = price(net.model(net.node("MatMul", net.input("x", [1, 6]), w)), target(node_overhead_us=5))
    assert rows(priced)["folded"].seconds == 0
    assert priced.report.multiplications == priced.report.macs == 24
    assert (priced.report.params, priced.report.resident_bytes) == (48, 96)


# ------------------------------------------------------------------------------------------ subgraphs, functions, notes


def branch(name: str, size: int) -> onnx.GraphProto:
    weight = onnx.numpy_helper.from_array(floats(size, 4), f"{name}_w")
    first = onnx.numpy_helper.from_array(floats(8, size), f"{name}_v")
    nodes = [
        onnx.helper.make_node("MatMul", ["x", f"{name}_v"], [f"{name}_h"], name=f"{name}_1"),
        onnx.helper.make_node("MatMul", [f"{name}_h", f"{name}_w"], [f"{name}_y"], name=f"{name}_2"),
    ]
    return onnx.helper.make_graph(
        nodes, name, [], [onnx.helper.make_tensor_value_info(f"{name}_y", 1, None)], [weight, first]
    )


def from_nodes(nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], **more: Any) -> ir.Model:
    out = onnx.helper.make_tensor_value_info("y", 1, [1, 4])
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("own", 1)]
    initializers = more.pop("initializers", [])
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", inputs, [out], initializers), opset_imports=opsets, ir_version=10, **more
    )
    return onnx_io.from_proto(proto)[0]


X = onnx.helper.make_tensor_value_info("x", 1, ["N", 8])


def test_if_costs_its_costlier_branch_and_stores_both() -> None:
    node = onnx.helper.make_node("If", ["c"], ["y"], name="if", then_branch=branch("t", 5), else_branch=branch("e", 50))
    priced = price(from_nodes([node], [onnx.helper.make_tensor_value_info("c", 9, []), X]))
    assert priced.report.macs == 50 * (8 + 4)
    assert priced.report.params == 55 * (8 + 4) == priced.report.stored_bytes // 4
    assert priced.notes == ("1 If: the costlier branch counted: if",)
    assert priced.report.peak_activation_bytes == 1 + 32 + 200 + 16 + 16


def test_a_loop_with_a_constant_trip_count_runs_that_often() -> None:
    body = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["h", "w"], ["h2"], name="mm"),
            onnx.helper.make_node("Identity", ["go"], ["go2"]),
        ],
        "body",
        [
            onnx.helper.make_tensor_value_info("i", 7, []),
            onnx.helper.make_tensor_value_info("go", 9, []),
            onnx.helper.make_tensor_value_info("h", 1, [1, 8]),
        ],
        [onnx.helper.make_tensor_value_info("go2", 9, []), onnx.helper.make_tensor_value_info("h2", 1, [1, 8])],
        [onnx.numpy_helper.from_array(floats(8, 8), "w")],
    )
    nodes = [onnx.helper.make_node("Loop", ["n", "", "x"], ["y"], name="loop", body=body)]
    trips = onnx.numpy_helper.from_array(np.array(7, np.int64), "n")
    known = price(from_nodes(nodes, [X], initializers=[trips]))
    assert (known.report.macs, known.report.params) == (7 * 64, 64)
    free = price(from_nodes(nodes, [onnx.helper.make_tensor_value_info("n", 7, []), X]))
    assert free.report.macs == 64
    assert free.notes == ("1 Loop: body counted once: loop",)


def test_local_functions_are_priced_at_every_call() -> None:
    function = onnx.helper.make_function(
        "own",
        "Dense",
        ["a", "w"],
        ["b"],
        [onnx.helper.make_node("MatMul", ["a", "w"], ["h"]), onnx.helper.make_node("Relu", ["h"], ["b"])],
        [onnx.helper.make_opsetid("", 18)],
    )
    nodes = [
        onnx.helper.make_node("Dense", ["x", "w"], ["h"], domain="own", name="f1"),
        onnx.helper.make_node("Dense", ["h", "v"], ["y"], domain="own", name="f2"),
    ]
    weights = [onnx.numpy_helper.from_array(floats(8, 6), "w"), onnx.numpy_helper.from_array(floats(6, 4), "v")]
    priced = price(from_nodes(nodes, [X], initializers=weights, functions=[function]))
    assert (priced.report.macs, priced.report.params, priced.notes) == (8 * 6 + 6 * 4, 8 * 6 + 6 * 4, ())


def test_nodes_of_unknown_shape_are_named_and_not_counted() -> None:
    net = Net(0)
    x = net.input("x", [1, 8])
    y = net.node("Compress", x, net.input("c", [8], ir.DataType.BOOL), axis=1, name="pick")
    model = net.model(net.node("MatMul", y, net.weight("w", (8, 4)), name="fc"))
    priced = cost.price(model, shapes.infer(model, {}), target())
    assert (priced.report.macs, priced.report.params) == (0, 32)
    assert priced.notes == ("2 nodes of unknown shape not counted: pick, fc",)
    observed = shapes.infer(model, {}) | {
        "pick_out": shapes.ValueType(ir.DataType.FLOAT, (1, 8)),
        "fc_out": shapes.ValueType(ir.DataType.FLOAT, (1, 4)),
    }
    assert cost.price(model, observed, target()).report.macs == 32


def test_rows_add_up_to_the_report() -> None:
    priced = price(builders.residual_net(0), load_target("generic-cpu", Path()))
    for name in ("params", "macs", "multiplications", "stored_bytes", "moved_bytes"):
        assert sum(getattr(row, name) for row in priced.nodes) == getattr(priced.report, name), name
    assert math.fsum(row.seconds for row in priced.nodes) == pytest.approx(priced.report.seconds)


# ------------------------------------------------------------------------------------------ inputs, metrics


def test_example_shapes_are_one_sample() -> None:
    net = Net()
    x, fixed = net.input("x", ["N", 3, "H", 5]), net.input("fixed", [4, 2])
    model = net.model(net.relu(x), net.relu(fixed))
    assert cost.example_shapes(model) == {"x": (1, 3, 1, 5), "fixed": (4, 2)}
    assert cost.example_shapes(model, {"x": (8, 3, 7, 5)}) == {"x": (1, 3, 7, 5), "fixed": (4, 2)}
    assert cost.guessed_axes(model) == ("input `x`: axis 2 taken as 1",)
    assert cost.guessed_axes(model, {"x": (8, 3, 7, 5)}) == ()


@pytest.mark.parametrize(
    ("given_shapes", "said"),
    [({"xx": (1, 12)}, "Did you mean `x`?"), ({"x": (1, 13)}, r"\[1, 13\]"), ({"x": (1,)}, "x")],
)
def test_example_shapes_that_do_not_fit_are_refused(given_shapes: dict[str, tuple[int, ...]], said: str) -> None:
    with pytest.raises(DataError, match=said):
        cost.example_shapes(builders.mlp(0), given_shapes)


def report(params: int, macs: int, stored: int, seconds: float) -> CostReport:
    return CostReport(params, params, macs, macs, stored, stored, stored, 0, seconds)


def test_survey_metrics_by_hand() -> None:
    found = cost.survey_metrics(report(1000, 600, 4000, 3.0), report(250, 600, 500, 1.5))
    assert found == {
        "compression_rate.params": 4,
        "space_saving.params": 0.75,
        "compression_rate.macs": 1,
        "space_saving.macs": 0,
        "compression_rate.stored_bytes": 8,
        "space_saving.stored_bytes": 0.875,
        "speed_up": 2,
    }


def test_survey_metrics_of_nothing_are_defined() -> None:
    empty, full = report(0, 0, 0, 0.0), report(1, 1, 1, 1.0)
    assert cost.survey_metrics(empty, empty)["compression_rate.params"] == 1
    assert cost.survey_metrics(full, empty)["compression_rate.params"] == math.inf
    assert cost.survey_metrics(empty, empty)["space_saving.params"] == 0
