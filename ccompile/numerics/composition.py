"""Convolutions as linear maps that can be put one behind the other, or side by side, into one.

A kernel computes  y[o, p] = b[o] + sum over i, t of W[o, i, t] x[i, strides p + dilations t - begins],  with x zero
outside. Behind each other: offsets add, those of the second in steps of the first's stride. Side by side: the taps of
both on one grid. Source: Ding et al. 2021, arXiv:2101.03697 (side by side), arXiv:2103.13425 (behind).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Ints = tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """W[out, in / groups, *kernel] and b[out] in float64; the rest one number per spatial axis."""

    W: Array
    b: Array
    groups: int
    strides: Ints
    dilations: Ints
    begins: Ints
    ends: Ints

    @property
    def taps(self) -> Ints:
        """Return the kernel's size."""
        return tuple(self.W.shape[2:])

    @property
    def ins(self) -> int:
        """Return the number of input channels."""
        return int(self.W.shape[1]) * self.groups

    @property
    def outs(self) -> int:
        """Return the number of output channels."""
        return int(self.W.shape[0])

    @property
    def is_point(self) -> bool:
        """Return whether each output position reads one input position, its own: 1 x 1, stride 1, no pads."""
        return math.prod(self.taps) == 1 and set(self.strides) <= {1} and not self.is_padded

    @property
    def is_padded(self) -> bool:
        """Return whether anything outside the input is read."""
        return any(self.begins) or any(self.ends)

    @property
    def slack(self) -> Ints:
        """Return, per axis, how much the padding exceeds the reach: equal slacks and strides give equal sizes."""
        axes = zip(self.begins, self.ends, self.dilations, self.taps, strict=True)
        return tuple(begin + end - d * (k - 1) for begin, end, d, k in axes)


def identity(channels: int, axes: int) -> Kernel:
    """Return the kernel that gives its input, on `channels` channels and `axes` spatial axes."""
    ones, none = (1,) * axes, (0,) * axes
    return Kernel(np.ones((channels, 1, *ones)), np.zeros(channels), channels, ones, ones, none, none)


def mean(channels: int, size: Ints, strides: Ints, dilations: Ints, begins: Ints, ends: Ints) -> Kernel:
    """Return the kernel of an average pooling that counts its padding."""
    W = np.full((channels, 1, *size), 1 / math.prod(size))
    return Kernel(W, np.zeros(channels), channels, strides, dilations, begins, ends)


def why_not_cascade(first: Kernel, second: Kernel) -> str:
    """Return why `second` behind `first` is no kernel, or nothing.

    Where `second` pads, it reads zeros; one kernel would read what `first` gives outside: zero only for one tap
    without a bias, because there the tap reads the zeros around x, too.
    """
    if not second.is_padded:
        return ""
    if math.prod(first.taps) > 1:
        return "the second pads with zeros where the first, with more than one tap, would give none"
    return "the second pads with zeros where the first would give its bias" if first.b.any() else ""


def cascade(first: Kernel, second: Kernel) -> Kernel:
    """Return `second` behind `first` as one kernel; `why_not_cascade` must have nothing to say.

    >>> both = cascade(identity(2, 1), mean(2, (2,), (2,), (1,), (0,), (0,)))
    >>> both.W.tolist(), both.strides
    ([[[0.5, 0.5]], [[0.5, 0.5]]], (2,))
    """
    assert not why_not_cascade(first, second)
    steps, unit, size, groups = _behind(first, second)
    W = np.zeros((second.outs, first.ins // groups, *size))
    for taps in np.ndindex(second.taps):
        starts = [step * t // u for step, t, u in zip(steps, taps, unit, strict=True)]
        where = _where(starts, [d // u for d, u in zip(first.dilations, unit, strict=True)], first.taps)
        W[(slice(None), slice(None), *where)] += _product(second, taps, first, groups)
    total = second.W.sum(axis=tuple(range(2, second.W.ndim)))
    response = np.einsum(
        "gom,gm->go", total.reshape(second.groups, -1, total.shape[1]), first.b.reshape(second.groups, -1)
    )
    return Kernel(
        W,
        second.b + response.reshape(-1),
        groups,
        tuple(s * t for s, t in zip(first.strides, second.strides, strict=True)),
        unit,
        tuple(p + s * q for p, s, q in zip(first.begins, first.strides, second.begins, strict=True)),
        tuple(p + s * q for p, s, q in zip(first.ends, first.strides, second.ends, strict=True)),
    )


def cascade_macs(first: Kernel, second: Kernel) -> int:
    """Return the multiply-adds per output position of `second` behind `first` as one kernel.

    >>> cascade_macs(identity(4, 2), mean(4, (2, 2), (2, 2), (1, 1), (0, 0), (0, 0)))
    16
    """
    _, _, size, groups = _behind(first, second)
    return second.outs * (first.ins // groups) * math.prod(size)


def _behind(first: Kernel, second: Kernel) -> tuple[Ints, Ints, Ints, int]:
    """Return the spacing of the second's taps on the input, and dilation, size and groups of both as one."""
    steps = tuple(s * d for s, d in zip(first.strides, second.dilations, strict=True))
    axes = list(zip(steps, second.taps, first.dilations, first.taps, strict=True))
    reaches = [step * (k - 1) + d * (j - 1) for step, k, d, j in axes]
    unit, size = _grid(reaches, [[step * (k > 1), d * (j > 1)] for step, k, d, j in axes])
    return steps, unit, size, math.gcd(first.groups, second.groups)


def why_not_beside(one: Kernel, other: Kernel) -> str:
    """Return why the sum of two kernels on one input is no kernel, or nothing."""
    if (one.ins, one.outs) != (other.ins, other.outs):
        return "they have other numbers of channels"
    if one.strides != other.strides:
        return "they have other strides"
    return "they have other sizes" if one.slack != other.slack else ""


def beside(one: Kernel, other: Kernel) -> Kernel:
    """Return the sum of two kernels on one input as one kernel; `why_not_beside` must have nothing to say.

    >>> both = beside(identity(1, 1), Kernel(np.ones((1, 1, 3)), np.ones(1), 1, (1,), (1,), (1,), (1,)))
    >>> both.W.tolist(), both.begins, both.ends
    ([[[1.0, 2.0, 1.0]]], (1,), (1,))
    """
    assert not why_not_beside(one, other)
    begins, ends, unit, size, groups = _together(one, other)
    W = np.zeros((one.outs, one.ins // groups, *size))
    for kernel in (one, other):
        starts = [(b - mine) // u for b, mine, u in zip(begins, kernel.begins, unit, strict=True)]
        where = _where(starts, [d // u for d, u in zip(kernel.dilations, unit, strict=True)], kernel.taps)
        dense = regrouped(kernel.W, kernel.groups, groups)
        W[(slice(None), slice(None), *where)] += dense.reshape(one.outs, -1, *kernel.taps)
    return Kernel(W, one.b + other.b, groups, one.strides, unit, begins, ends)


def beside_macs(one: Kernel, other: Kernel) -> int:
    """Return the multiply-adds per output position of the sum of two kernels as one.

    >>> beside_macs(identity(4, 2), identity(4, 2))
    4
    """
    *_, size, groups = _together(one, other)
    return one.outs * (one.ins // groups) * math.prod(size)


def _together(one: Kernel, other: Kernel) -> tuple[Ints, Ints, Ints, Ints, int]:
    """Return pads, dilation, size and groups of two kernels as one."""
    begins, ends = (tuple(map(max, a, b)) for a, b in ((one.begins, other.begins), (one.ends, other.ends)))
    reaches = [begin + end - slack for begin, end, slack in zip(begins, ends, one.slack, strict=True)]
    spacings = [
        [a.dilations[axis] * (a.taps[axis] > 1) for a in (one, other)] + [one.begins[axis] - other.begins[axis]]
        for axis in range(len(begins))
    ]
    return begins, ends, *_grid(reaches, spacings), math.gcd(one.groups, other.groups)


def regrouped(W: Array, groups: int, fewer: int) -> Array:
    """Return a weight of `groups` groups as [fewer, out / fewer, in / fewer, *kernel], zeros between; `fewer` divides.

    >>> regrouped(np.array([[2.0], [3.0]]), 2, 1).tolist()
    [[[2.0, 0.0], [0.0, 3.0]]]
    """
    inner, outs, ins = groups // fewer, W.shape[0] // groups, W.shape[1]
    split = W.reshape(fewer, inner, outs, ins, *W.shape[2:])
    dense = np.zeros((fewer, inner, outs, inner, ins, *W.shape[2:]), W.dtype)
    for at in range(inner):
        dense[:, at, :, at] = split[:, at]
    return dense.reshape(fewer, inner * outs, inner * ins, *W.shape[2:])


def _grid(reaches: list[int], spacings: list[list[int]]) -> tuple[Ints, Ints]:
    """Return, per axis, the coarsest dilation on which all taps lie, and how many there are."""
    unit = tuple(math.gcd(*spacing) or 1 for spacing in spacings)
    return unit, tuple(reach // u + 1 for reach, u in zip(reaches, unit, strict=True))


def _where(starts: list[int], steps: list[int], counts: Ints) -> tuple[slice, ...]:
    """Return where taps lie on a grid; the step of a single one, which may be finer than the grid, says nothing."""
    axes = zip(starts, steps, counts, strict=True)
    return tuple(slice(start, start + step * (count - 1) + 1, step or 1) for start, step, count in axes)


def _product(second: Kernel, taps: Ints, first: Kernel, groups: int) -> Array:
    """Return one tap of `second` times all of `first`, [out, in / groups, *first.taps]."""
    tap: Array = second.W.reshape(*second.W.shape[:2], -1)[:, :, np.ravel_multi_index(taps, second.taps)]
    if tap.shape[1] == 1 and second.outs == second.groups:  # a factor per channel: groups are the first's
        return first.W * tap.reshape(-1, *(1,) * (first.W.ndim - 1))
    left, right = regrouped(tap, second.groups, groups), regrouped(first.W, first.groups, groups)
    product = np.matmul(left, right.reshape(*right.shape[:2], -1))
    whole: Array = product.reshape(second.outs, right.shape[2], *first.taps)
    return whole
