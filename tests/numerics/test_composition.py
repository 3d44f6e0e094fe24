"""Kernels behind and beside each other equal what they do apart, pads included; where they do not, it is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ccompile.numerics.composition import Kernel, beside, cascade, identity, mean, why_not_beside, why_not_cascade

Array = npt.NDArray[Any]


def run(kernel: Kernel, x: Array) -> Array:
    """Convolve x[channels, length] by the definition."""
    (k,), (s,), (d,), (begin,), (end,) = kernel.taps, kernel.strides, kernel.dilations, kernel.begins, kernel.ends
    padded = np.pad(x, ((0, 0), (begin, end)))
    count = (padded.shape[1] - d * (k - 1) - 1) // s + 1
    y = np.empty((kernel.outs, count))
    ins, outs = kernel.W.shape[1], kernel.outs // kernel.groups
    for o in range(kernel.outs):
        first = o // outs * ins
        for p in range(count):
            seen = padded[first : first + ins, p * s : p * s + d * (k - 1) + 1 : d]
            y[o, p] = kernel.b[o] + (kernel.W[o] * seen).sum()
    return y


@st.composite
def kernels(draw: st.DrawFn, ins: int, outs: int, *, stride: int | None = None) -> Kernel:
    """Small integers, so that sums are exact."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    groups = draw(st.sampled_from([g for g in range(1, 5) if math.gcd(ins, outs) % g == 0]))
    k, d = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    begin, end = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    b = rng.integers(-3, 4, outs).astype(float) * draw(st.integers(0, 1))
    W = rng.integers(-4, 5, (outs, ins // groups, k)).astype(float)
    return Kernel(W, b, groups, (stride or draw(st.integers(1, 3)),), (d,), (begin,), (end,))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_one_behind_the_other(data: st.DataObject) -> None:
    first, second = data.draw(kernels(4, 8)), data.draw(kernels(8, 4))
    x = np.random.default_rng(1).integers(-5, 6, (4, 19)).astype(float)
    if why_not_cascade(first, second):
        assert second.is_padded
        return
    np.testing.assert_array_equal(run(cascade(first, second), x), run(second, run(first, x)))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_one_beside_the_other(data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, 3))
    one, other = data.draw(kernels(4, 8, stride=stride)), data.draw(kernels(4, 8, stride=stride))
    more = one.slack[0] - other.slack[0]  # the ends that make them fit
    assume(other.ends[0] + more >= 0)
    other = Kernel(other.W, other.b, other.groups, (stride,), other.dilations, other.begins, (other.ends[0] + more,))
    x = np.random.default_rng(1).integers(-5, 6, (4, 19)).astype(float)
    np.testing.assert_array_equal(run(beside(one, other), x), run(one, x) + run(other, x))


def conv(k: int, *, stride: int = 1, pads: tuple[int, int] = (0, 0), bias: float = 0.0) -> Kernel:
    W = np.arange(1.0, 1 + 4 * k).reshape(2, 2, k)
    return Kernel(W, np.full(2, bias), 1, (stride,), (1,), pads[:1], pads[1:])


def test_a_padded_mean_behind_a_bias_is_refused_and_would_be_wrong() -> None:
    pool = mean(2, (2,), (2,), (1,), (1,), (1,))
    assert why_not_cascade(conv(1), pool) == ""
    assert why_not_cascade(conv(1, bias=1), pool) == "the second pads with zeros where the first would give its bias"
    assert why_not_cascade(conv(3), pool).startswith("the second pads with zeros where the first, with more than one")


def test_a_mean_of_two_behind_three_taps_has_four() -> None:
    both = cascade(conv(3, pads=(1, 1)), mean(2, (2,), (2,), (1,), (0,), (0,)))
    assert both.W[0, 0].tolist() == [0.5, 1.5, 2.5, 1.5]
    assert (both.strides, both.begins, both.ends, both.groups) == ((2,), (1,), (1,), 1)


def test_groups_of_both_are_kept_where_they_agree() -> None:
    rng = np.random.default_rng(0)
    first = Kernel(rng.standard_normal((8, 2, 1)), np.zeros(8), 4, (1,), (1,), (0,), (0,))
    second = Kernel(rng.standard_normal((6, 4, 1)), np.zeros(6), 2, (1,), (1,), (0,), (0,))
    assert cascade(first, second).groups == 2


def test_a_dilated_kernel_beside_a_point_keeps_its_dilation() -> None:
    wide = Kernel(np.ones((2, 2, 3)), np.zeros(2), 1, (1,), (2,), (2,), (2,))
    both = beside(wide, identity(2, 1))
    assert (both.taps, both.dilations) == ((3,), (2,))
    assert both.W[0].tolist() == [[1, 2, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (conv(1, stride=2), "they have other strides"),
        (conv(3), "they have other sizes"),
        (identity(3, 1), "they have other numbers of channels"),
        (conv(3, pads=(2, 0)), ""),
    ],
)
def test_what_does_not_fit_beside_is_refused(other: Kernel, reason: str) -> None:
    assert why_not_beside(conv(1), other) == reason


def test_two_axes_are_handled_apart() -> None:
    tall = Kernel(np.ones((1, 1, 3, 1)), np.zeros(1), 1, (1, 1), (1, 1), (1, 0), (1, 0))
    wide = Kernel(np.ones((1, 1, 1, 3)), np.zeros(1), 1, (1, 1), (1, 1), (0, 1), (0, 1))
    assert beside(tall, wide).W[0, 0].tolist() == [[0, 1, 0], [1, 2, 1], [0, 1, 0]]
    assert why_not_cascade(tall, Kernel(wide.W, wide.b, 1, (1, 1), (1, 1), (0, 0), (0, 0))) == ""
    assert cascade(tall, Kernel(wide.W, wide.b, 1, (1, 1), (1, 1), (0, 0), (0, 0))).W[0, 0].tolist() == [[1] * 3] * 3
