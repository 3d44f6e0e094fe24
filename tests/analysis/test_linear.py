"""Linear layers in one form: rows x weight + bias is what ONNX Runtime computes, and weights go back as they came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from builders import Net

from ccompile import graph, onnx_io, runtime
from ccompile.analysis import linear
from ccompile.moments import Layer
from ccompile.runtime import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ccompile.core import Array

SEED = 3


def single(
    op: str, x: Sequence[int], weight: tuple[int, ...], bias: tuple[int, ...] = (), *, left: bool = False, **more: Any
) -> tuple[ir.Model, ir.Node]:
    """One linear node `op0` on x; `left` puts a MatMul's weight first."""
    net = Net(SEED)
    operands = [net.input("x", x), net.weight("w", weight)]
    if bias:
        operands.append(net.weight("b", bias))
    model = net.model(net.node(op, *(operands[::-1] if left else operands), name="op0", **more))
    return model, graph.node_named(model.graph, "op0")


def form_of(node: ir.Node) -> Layer:
    found = linear.layer(node)
    assert isinstance(found, Layer), found
    return found


def run(model: ir.Model, x: Array) -> Array:
    (found,) = runtime.Session(model, Settings(1)).run({"x": x}).values()
    return np.asarray(found)


def drawn(*shape: int) -> Array:
    return np.random.default_rng(SEED).standard_normal(shape).astype(np.float32)


def product(node: ir.Node, form: Layer, x: Array, y: Array, picks: Array) -> Array:
    """Rows x weight + bias, as [groups, rows, out]."""
    b = linear.bias(node, form)
    assert b is not None
    rows = linear.input_rows(form, x, y.shape, picks)
    found: Array = np.einsum("grd,god->gro", rows, linear.matrix(node, form)) + b[:, None]
    return found


# title -> (op, shape of x, shape of the weight, shape of the bias, attributes)
Case = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], dict[str, Any]]
CASES: dict[str, Case] = {
    "conv": ("Conv", (2, 3, 6, 5), (4, 3, 3, 2), (4,), {}),
    "conv without bias": ("Conv", (2, 3, 6, 5), (4, 3, 3, 2), (), {}),
    "conv strided": ("Conv", (2, 3, 7, 8), (4, 3, 3, 3), (4,), {"strides": [2, 3]}),
    "conv dilated": ("Conv", (2, 3, 9, 8), (4, 3, 3, 2), (4,), {"dilations": [2, 3], "strides": [1, 2]}),
    "conv padded unevenly": ("Conv", (2, 3, 6, 5), (4, 3, 3, 3), (4,), {"pads": [2, 0, 1, 3], "strides": [2, 1]}),
    "conv in groups": ("Conv", (2, 6, 5, 5), (4, 3, 3, 3), (4,), {"group": 2, "pads": [1, 1, 1, 1]}),
    "conv depthwise": ("Conv", (2, 5, 5, 5), (5, 1, 3, 3), (5,), {"group": 5}),
    "conv depthwise, two each": ("Conv", (2, 3, 5, 5), (6, 1, 3, 3), (6,), {"group": 3}),
    "conv same upper": ("Conv", (2, 3, 7, 6), (4, 3, 2, 3), (4,), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "conv same lower": ("Conv", (2, 3, 7, 6), (4, 3, 2, 4), (4,), {"auto_pad": "SAME_LOWER", "strides": [2, 1]}),
    "conv same, stride over kernel": ("Conv", (2, 3, 7, 6), (4, 3, 1, 1), (4,), {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),  # noqa: E501
    "conv valid": ("Conv", (2, 3, 7, 6), (4, 3, 2, 3), (4,), {"auto_pad": "VALID", "strides": [2, 2]}),
    "conv 1-d": ("Conv", (2, 3, 9), (4, 3, 3), (4,), {"strides": [2], "pads": [2, 1]}),
    "conv 3-d": ("Conv", (2, 2, 4, 5, 4), (3, 2, 2, 3, 2), (3,), {"strides": [1, 2, 1], "pads": [0, 1, 1, 1, 0, 0]}),
    "deconv": ("ConvTranspose", (2, 3, 4, 5), (3, 4, 3, 2), (4,), {}),
    "deconv without bias": ("ConvTranspose", (2, 3, 4, 5), (3, 4, 3, 2), (), {}),
    "deconv strided": ("ConvTranspose", (2, 3, 4, 5), (3, 4, 3, 3), (4,), {"strides": [2, 3]}),
    "deconv dilated": ("ConvTranspose", (2, 3, 4, 5), (3, 4, 3, 2), (4,), {"dilations": [2, 3], "strides": [1, 2]}),
    "deconv padded unevenly": ("ConvTranspose", (2, 3, 4, 5), (3, 4, 3, 3), (4,), {"pads": [1, 0, 0, 2], "strides": [2, 2]}),  # noqa: E501
    "deconv in groups": ("ConvTranspose", (2, 6, 4, 4), (6, 2, 3, 3), (4,), {"group": 2, "strides": [2, 2]}),
    "deconv depthwise": ("ConvTranspose", (2, 5, 4, 4), (5, 1, 3, 3), (5,), {"group": 5}),
    "deconv same upper": ("ConvTranspose", (2, 3, 4, 5), (3, 4, 3, 4), (4,), {"auto_pad": "SAME_UPPER", "strides": [2, 1]}),  # noqa: E501
    "deconv same lower": ("ConvTranspose", (2, 3, 4, 5), (3, 4, 3, 4), (4,), {"auto_pad": "SAME_LOWER", "strides": [2, 1]}),  # noqa: E501
    "deconv valid": ("ConvTranspose", (2, 3, 4, 5), (3, 4, 3, 2), (4,), {"auto_pad": "VALID", "strides": [2, 2]}),
    "deconv 1-d": ("ConvTranspose", (2, 3, 5), (3, 4, 3), (4,), {"strides": [2], "pads": [1, 0]}),
    "deconv 3-d": ("ConvTranspose", (2, 2, 3, 2, 3), (2, 3, 2, 3, 2), (3,), {"strides": [2, 1, 1]}),
    "gemm": ("Gemm", (7, 5), (5, 4), (4,), {}),
    "gemm without bias": ("Gemm", (7, 5), (5, 4), (), {}),
    "gemm transposed": ("Gemm", (7, 5), (4, 5), (4,), {"transB": 1}),
    "gemm scaled": ("Gemm", (7, 5), (5, 4), (4,), {"alpha": 0.3, "beta": 2.5}),
    "gemm transposed and scaled": ("Gemm", (7, 5), (4, 5), (1, 4), {"transB": 1, "alpha": -2.0, "beta": 0.5}),
    "gemm with one number": ("Gemm", (7, 5), (5, 4), (1,), {}),
    "matmul": ("MatMul", (7, 5), (5, 4), (), {}),
    "matmul with batch axes": ("MatMul", (2, 3, 7, 5), (5, 4), (), {}),
    "matmul of a vector": ("MatMul", (5,), (5, 4), (), {}),
    "matmul on the left": ("MatMul", (5, 7), (4, 5), (), {"left": True}),
    "matmul on the left with batch axes": ("MatMul", (2, 3, 5, 7), (4, 5), (), {"left": True}),
    "matmul on the left of a vector": ("MatMul", (5,), (4, 5), (), {"left": True}),
}  # fmt: skip


def case(title: str) -> tuple[ir.Model, ir.Node, Layer, Array]:
    """The model of a case, its node, what that is, and an input."""
    op, shape, weight, bias, attributes = CASES[title]
    model, node = single(op, shape, weight, bias, **attributes)
    return model, node, form_of(node), drawn(*shape)


@pytest.mark.parametrize("title", CASES)
def test_rows_times_weight_are_the_runtimes_outputs(title: str) -> None:
    model, node, form, x = case(title)
    y = run(model, x)
    picks = np.arange(linear.row_count(form, y.shape))
    wanted = linear.output_rows(form, y, picks)
    assert wanted.size == y.size
    np.testing.assert_allclose(np.sort(wanted, axis=None), np.sort(y, axis=None))
    np.testing.assert_allclose(product(node, form, x, y, picks), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("title", CASES)
def test_picked_rows_are_those_rows_of_all(title: str) -> None:
    model, _, form, x = case(title)
    y = run(model, x)
    count = linear.row_count(form, y.shape)
    picks, every = np.arange(0, count, 3), np.arange(count)
    inputs = linear.input_rows(form, x, y.shape, every)[:, picks]
    outputs = linear.output_rows(form, y, every)[:, picks]
    assert np.array_equal(linear.input_rows(form, x, y.shape, picks), inputs)
    assert np.array_equal(linear.output_rows(form, y, picks), outputs)


@pytest.mark.parametrize("title", CASES)
def test_storing_its_own_matrix_changes_nothing(title: str) -> None:
    model, node, form, x = case(title)
    before = run(model, x)
    linear.store(node, form, linear.matrix(node, form), None if form.op == "MatMul" else linear.bias(node, form))
    assert onnx_io.check(model) == ""
    np.testing.assert_allclose(run(model, x), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("title", CASES)
def test_a_new_matrix_and_bias_are_what_is_computed_afterwards(title: str) -> None:
    model, node, form, x = case(title)
    rng = np.random.default_rng(1)
    W = rng.standard_normal((form.groups, form.out, form.columns))
    b = rng.standard_normal((form.groups, form.out))
    linear.store(node, form, W, None if form.op == "MatMul" else b)
    y = run(model, x)
    picks = np.arange(linear.row_count(form, y.shape))
    wanted = np.einsum("grd,god->gro", linear.input_rows(form, x, y.shape, picks), W)
    wanted += 0 if form.op == "MatMul" else b[:, None]
    np.testing.assert_allclose(linear.output_rows(form, y, picks), wanted, rtol=1e-4, atol=1e-4)


def test_a_zero_bias_adds_no_input() -> None:
    _, node = single("Conv", (1, 3, 4, 4), (2, 3, 1, 1))
    form = form_of(node)
    linear.store(node, form, linear.matrix(node, form), np.zeros((1, 2)))
    assert len(node.inputs) == 2
    linear.store(node, form, linear.matrix(node, form), np.array([[0.0, 1.0]]))
    assert len(node.inputs) == 3


def test_a_weight_that_is_not_finite_is_refused_and_changes_nothing() -> None:
    model, node = single("Gemm", (7, 5), (5, 4), (4,))
    form, x = form_of(node), drawn(7, 5)
    before = run(model, x)
    with pytest.raises(FloatingPointError, match="`op0` is not finite"):
        linear.store(node, form, np.full((1, 4, 5), 1e300), np.zeros((1, 4)))
    with pytest.raises(FloatingPointError, match="`op0` is not finite"):
        linear.store(node, form, np.zeros((1, 4, 5)), np.full((1, 4), np.nan))
    assert np.array_equal(run(model, x), before)


def test_columns_of_a_channel_are_neighbours() -> None:
    model, node = single("Conv", (1, 3, 4, 4), (2, 3, 2, 2))
    form = form_of(node)
    assert (form.channels, form.taps) == (3, 4)
    x = drawn(1, 3, 4, 4)
    x[:, 1] = 0
    y = run(model, x)
    rows = linear.input_rows(form, x, y.shape, np.arange(9))[0].reshape(9, 3, 4)
    assert not rows[:, 1].any()
    assert rows[:, [0, 2]].all()


# ---------------------------------------------------------------------------------------------- refused


def refusal(op: str, x: Sequence[int], weight: tuple[int, ...], **attributes: Any) -> str:
    found = linear.layer(single(op, x, weight, **attributes)[1])
    assert isinstance(found, str), found
    return found


def test_a_stack_of_matrices_is_refused() -> None:
    assert refusal("MatMul", (2, 7, 5), (2, 5, 4)) == "its weight has rank 3, not 2"


def test_a_transposed_input_is_refused() -> None:
    assert refusal("Gemm", (5, 7), (5, 4), transA=1) == "its input is transposed"


@pytest.mark.parametrize("attributes", [{"output_padding": [1, 1]}, {"output_shape": [9, 9]}])
def test_a_padded_output_is_refused(attributes: dict[str, Any]) -> None:
    assert refusal("ConvTranspose", (1, 3, 4, 4), (3, 2, 2, 2), strides=[2, 2], **attributes) == "its output is padded"


def test_an_output_padding_of_nothing_is_accepted() -> None:
    assert isinstance(
        linear.layer(single("ConvTranspose", (1, 3, 4, 4), (3, 2, 2, 2), output_padding=[0, 0])[1]), Layer
    )


def test_an_op_that_is_not_linear_is_refused() -> None:
    net = Net(0)
    model = net.model(net.node("Add", net.input("x", [3]), net.weight("w", (3,)), name="add"))
    assert linear.layer(graph.node_named(model.graph, "add")) == "it is not linear"


def test_a_computed_weight_is_refused() -> None:
    net = Net(0)
    model = net.model(net.node("MatMul", net.input("x", [3, 3]), net.input("w", [3, 3]), name="m"))
    assert linear.layer(graph.node_named(model.graph, "m")) == "its weight is not constant"


def test_constant_operands_are_refused() -> None:
    net = Net(0)
    x = net.input("x", [2, 4])
    y = net.node("MatMul", net.weight("a", (2, 3)), net.weight("b", (3, 4)), name="m")
    model = net.model(net.node("Add", x, y))
    assert linear.layer(graph.node_named(model.graph, "m")) == "both operands are constant"


def test_a_bias_for_every_row_is_no_plain_bias() -> None:
    assert linear.bias(*_with_bias((7, 4))) is None
    assert linear.bias(*_with_bias((1, 4))) is not None


def _with_bias(shape: tuple[int, ...]) -> tuple[ir.Node, Layer]:
    _, node = single("Gemm", (7, 5), (5, 4), shape)
    return node, form_of(node)
