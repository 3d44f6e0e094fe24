"""Products of spectra are the convolutions and the matrices: every pad, size, tile, block, batch and group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from builders import Net
from calibrated import outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered import assert_same, both, conv, drawn, known

from ccompile import fourier_forms, graph, onnx_io
from ccompile.emitting import Emitter
from ccompile.numerics import dft

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir
    from lowered import Build

    from ccompile.convolution import Convolution
    from ccompile.core import Array

CLOSE = 3e-6


def rows(tiles: int) -> Build:
    def build(to: Emitter, found: Convolution) -> ir.Value:
        assert not fourier_forms.refusal_rows(found, tiles)
        return fourier_forms.rows(to, found, tiles)

    return build


def line(block: int | None = None) -> Build:
    def build(to: Emitter, found: Convolution) -> ir.Value:
        assert not fourier_forms.refusal_1d(found, block)
        return fourier_forms.long_1d(to, found, block)

    return build


def plane(to: Emitter, found: Convolution) -> ir.Value:
    assert not fourier_forms.refusal_2d(found)
    return fourier_forms.planes_2d(to, found)


# -------------------------------------------------------------------------------------------- depthwise, two axes

PADS = st.integers(0, 4)


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.tuples(PADS, PADS, PADS, PADS),
    st.tuples(st.integers(7, 12), st.integers(7, 12)),
    st.integers(1, 3),
    st.booleans(),
)
def test_spectra_along_both_axes_are_the_convolution(
    kernel: tuple[int, int], pads: tuple[int, ...], size: tuple[int, int], batch: int, biased: bool
) -> None:
    model = conv(drawn((3, 1, *kernel)), size, drawn((3,)) if biased else None, pads=list(pads), group=3)
    assert_same(model, plane, drawn((batch, 3, *size), 2), CLOSE)


def test_a_kernel_wider_than_its_input() -> None:
    model = conv(drawn((2, 1, 13, 13)), (5, 5), pads=[6] * 4, group=2)
    assert_same(model, plane, drawn((2, 2, 5, 5)), CLOSE)


def test_a_delta_shifts() -> None:
    W = np.zeros((1, 1, 5, 5))
    W[0, 0, 0, 4] = 1
    x = drawn((1, 1, 8, 8))
    found, _ = both(conv(W, (8, 8), pads=[2] * 4), plane, x)
    np.testing.assert_allclose(found[..., 2:, :-2], x[..., :-2, 2:], atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "size", "groups", "reason"),
    [
        ((4, 1, 5, 5), ("H", 9), 4, "open"),
        ((4, 4, 5, 5), (9, 9), 1, "depthwise"),
        ((8, 1, 5, 5), (9, 9), 4, "depthwise"),
        ((4, 1, 5), (9,), 4, "two axes"),
    ],
)
def test_what_is_not_depthwise_along_two_axes_is_refused(
    shape: tuple[int, ...], size: tuple[int | str, ...], groups: int, reason: str
) -> None:
    assert reason in fourier_forms.refusal_2d(known(conv(drawn(shape), size, group=groups)))


# -------------------------------------------------------------------------------------------- rows


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4),
    st.tuples(st.integers(2, 7), st.integers(1, 4)),
    st.tuples(PADS, PADS, PADS, PADS),
    st.tuples(st.integers(10, 13), st.integers(7, 9)),
    st.integers(1, 2),
    st.integers(1, 2),
    st.booleans(),
)
def test_spectra_of_rows_are_the_convolution(
    tiles: int,
    kernel: tuple[int, int],
    pads: tuple[int, ...],
    size: tuple[int, int],
    batch: int,
    groups: int,
    biased: bool,
) -> None:
    bias = drawn((2 * groups,)) if biased else None
    model = conv(drawn((2 * groups, 3, *kernel)), size, bias, pads=list(pads), group=groups)
    assert_same(model, rows(tiles), drawn((batch, 3 * groups, *size), 2), CLOSE)


@pytest.mark.parametrize("tiles", [1, 3])
def test_columns_may_be_open(tiles: int) -> None:
    model = conv(drawn((4, 3, 5, 3)), (9, "W"), drawn((4,)), pads=[2, 1, 2, 1])
    for width in (4, 7):
        assert_same(model, rows(tiles), drawn((2, 3, 9, width)), CLOSE)


def test_a_tall_kernel_on_few_rows() -> None:
    assert_same(conv(drawn((2, 3, 11, 3)), (4, 6), pads=[5, 1, 5, 1]), rows(1), drawn((1, 3, 4, 6)), CLOSE)


@pytest.mark.parametrize(
    ("shape", "size", "groups", "tiles", "reason"),
    [
        ((4, 3, 5, 5), ("H", 9), 1, 1, "open"),
        ((4, 1, 5, 5), (9, 9), 4, 1, "one channel per group"),
        ((4, 3, 1, 5), (9, 9), 1, 1, "no rows"),
        ((4, 3, 5, 5), (9, 9), 1, 6, "fewer than 6"),
    ],
)
def test_what_has_no_spectra_of_rows_is_refused(
    shape: tuple[int, ...], size: tuple[int | str, ...], groups: int, tiles: int, reason: str
) -> None:
    assert reason in fourier_forms.refusal_rows(known(conv(drawn(shape), size, group=groups)), tiles)


# -------------------------------------------------------------------------------------------- one axis


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(0, 45),
    st.integers(0, 45),
    st.integers(40, 90),
    st.sampled_from([None, 8, 24, 200]),
    st.booleans(),
)
def test_long_kernels_in_one_piece_or_in_blocks(
    taps: int, before: int, after: int, size: int, block: int | None, biased: bool
) -> None:
    if block is not None:
        before, after = min(before, taps - 1), min(after, taps - 1)
    model = conv(drawn((3, 1, taps)), (size,), drawn((3,)) if biased else None, pads=[before, after], group=3)
    assert_same(model, line(block), drawn((2, 3, size)), CLOSE)


@pytest.mark.parametrize("size", [63, 64, 65, 128, 129])
def test_sizes_at_the_border_of_blocks(size: int) -> None:
    assert_same(conv(drawn((2, 1, 17)), (size,), pads=[16, 0], group=2), line(64), drawn((1, 2, size)), CLOSE)


def test_a_kernel_longer_than_its_signal() -> None:
    assert_same(conv(drawn((2, 1, 50)), (20,), pads=[49, 0], group=2), line(), drawn((1, 2, 20)), CLOSE)


@pytest.mark.parametrize(
    ("shape", "size", "pads", "block", "reason"),
    [
        ((4, 1, 5), ("L",), [0, 0], None, "open"),
        ((4, 1, 5), (30,), [5, 0], 8, "as wide as its kernel"),
        ((4, 1, 5, 5), (9, 9), [0] * 4, None, "one axis"),
    ],
)
def test_what_is_no_long_signal_is_refused(
    shape: tuple[int, ...], size: tuple[int | str, ...], pads: list[int], block: int | None, reason: str
) -> None:
    assert reason in fourier_forms.refusal_1d(known(conv(drawn(shape), size, group=4, pads=pads)), block)


# -------------------------------------------------------------------------------------------- matrices


def through(W: Array, x: Array, build: Callable[[Emitter, ir.Value], ir.Value]) -> Array:
    """What a form in the place of x W^T makes of x[rows, n]."""
    net = Net(0)
    turned = net.constant(np.ascontiguousarray(W.T, np.float32), "w")
    model = net.model(net.node("MatMul", net.input("x", ["N", W.shape[1]]), turned, name="dense"))
    node = graph.node_named(model.graph, "dense")
    to, data = Emitter(node), node.inputs[0]
    assert data is not None
    to.done(build(to, data))
    graph.remove_dead(model.graph)
    assert not onnx_io.check(model)
    (found,) = outputs(model, {"x": x}).values()
    return np.asarray(found)


@pytest.mark.parametrize(("n", "n1"), [(24, 6), (24, 3), (35, 5), (64, 16)])
@pytest.mark.parametrize("count", [1, 3])
def test_a_circulant_matrix(n: int, n1: int, count: int) -> None:
    c, x = drawn((n,)), drawn((count, n), 2)
    W = dft.circulant(c[None, None])
    found = through(W, x, lambda to, data: fourier_forms.circulant(to, data, c, n1, count == 1))
    np.testing.assert_allclose(found, x @ W.T, atol=2e-5)


@pytest.mark.parametrize(("p", "q", "b"), [(2, 3, 8), (1, 1, 5), (3, 1, 6)])
def test_a_matrix_of_circulant_blocks(p: int, q: int, b: int) -> None:
    C, x = drawn((p, q, b)), drawn((3, q * b), 2)
    W = dft.circulant(C)
    found = through(W, x, lambda to, data: fourier_forms.blocks(to, data, C))
    np.testing.assert_allclose(found, x @ W.T, atol=2e-5)
