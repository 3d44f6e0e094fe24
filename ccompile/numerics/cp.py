"""CP splits: a convolution through r channels that never mix, 1 x 1, depthwise, 1 x 1.

    4-way:  What[o, c, i, j] = sum_r a[o, r] b[r, c] v[r, i] h[r, j]        (depthwise kh x 1, then 1 x kw)
    3-way:  What[o, c, i, j] = sum_r a[o, r] b[r, c] t[r, i, j]             (one depthwise kh x kw)

Alternating least squares from an algebraic start (simultaneous diagonalisation of two slices: planted factors come
back exactly) and from seeded random ones, in the metric of the inputs where their Gram matrix is known: canonical.py.
A best approximation need not exist: then rank-one terms grow and cancel, and their summed squared norms over |W|^2,
`degeneracy`, say so. `correct` looks for the least such sum at a given error (error-preserving correction).
Parameters: r (o + c + kh + kw), or r (o + c + kh kw).

Source: Lebedev et al. 2015, arXiv:1412.6553; de Silva and Lim 2008, arXiv:math/0607647 (ill-posedness); Leurgans et al.
1993 (algebraic start); Phan et al. 2020, arXiv:2008.05441 (correction).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ccompile.numerics import bottleneck, canonical, weighted
from ccompile.numerics.canonical import Correction, Factors, Problem, State

Array = npt.NDArray[Any]
Way = Literal[3, 4]

SWEEPS, STEPS, TOLERANCE = 60, 4, 1e-3
TRIAL = 6  # sweeps from each start, before the best goes on alone
TOLD = 20  # sweeps of each rank of a curve
# Orthogonal terms have degeneracy 1 - error^2, alike ones less; terms with three times the energy of W mostly cancel.
# Fits of real kernels at high rank reach it, but `correct` brings them below 1 or 2 for a percent of error.
DEGENERATE = 3.0


@dataclass(frozen=True, eq=False)
class Cp:
    """`a`[o, r], `b`[r, c], and `v`[r, kh] with `h`[r, kw], or `t`[r, kh, kw]; kernels have norm 1, |a_r| = |b_r|.

    `loss` = tr((What - W) H (What - W)^T), `error` = sqrt(loss / tr(W H W^T)), `degeneracy` = sum_r |term r|^2 / |W|^2.
    """

    a: Array
    b: Array
    taps: Factors
    shape: tuple[int, ...]
    loss: float
    error: float
    degeneracy: float

    @property
    def degenerate(self) -> bool:
        """Say whether large terms cancel: such a split is fragile in float32, under quantisation and off the data."""
        return self.degeneracy > DEGENERATE

    def compose(self) -> Array:
        """Return What[o, c, kh, kw]."""
        flat = (tap.reshape(len(tap), -1) for tap in self.taps)
        return (self.a @ canonical.rows((self.b, *flat))).reshape(self.shape)

    def kernels(self) -> tuple[Array, ...]:
        """Return the convolutions' weights in order, those in the middle in r groups."""
        r, (kh, kw) = len(self.b), self.shape[2:]
        sides = [(kh, 1), (1, kw)] if len(self.taps) == 2 else [(kh, kw)]
        middle = (kernel.reshape(r, 1, *side) for kernel, side in zip(self.taps, sides, strict=True))
        return self.b[..., None, None], *middle, self.a[..., None, None]


def fit(
    W: Array,
    H: Array | None,
    rank: int,
    way: Way = 4,
    restarts: int = 2,
    sweeps: int = SWEEPS,
    steps: int = STEPS,
    seed: int = 0,
) -> Cp:
    """Return the split of W[o, c, kh, kw] of this rank, with H[d, d] or without data.

    With data the loss is never above that of the split without (same `restarts`, the number of random starts, and
    `seed`). Raises ValueError where shapes do not fit, an entry is not finite, or the rank is not in 1 .. `rank_max`.

    >>> ones = np.ones((2, 3, 3, 3))
    >>> found = fit(ones, None, 1)
    >>> found.error < 1e-9, found.degenerate, [kernel.shape for kernel in found.kernels()]
    (True, False, [(1, 3, 1, 1), (1, 1, 3, 1), (1, 1, 1, 3), (2, 1, 1, 1)])
    """
    flat, H = weighted.checked(W, H)
    weighted.check_rank(rank, rank_max(W.shape, way))
    tensor = flat.reshape(_modes(W.shape, way))
    if rank == rank_max(W.shape, way):
        return _result(W, H, canonical.fibres(tensor))
    starts = [canonical.algebraic(tensor, rank)]
    starts += [canonical.random(tensor.shape, rank, seed + number) for number in range(restarts)]
    state = _best(Problem(tensor, None, steps), starts, sweeps)
    if H is not None:
        near = canonical.algebraic(_tucker(tensor, H, rank), rank)
        state = _best(Problem(tensor, H, steps), [state.factors, near, *starts[1:]], sweeps)
    return _result(W, H, state.factors)


def losses(W: Array, H: Array | None, ranks: Sequence[int], way: Way = 4, steps: int = STEPS) -> list[float]:
    """Return about what `fit` loses of W[o, c, kh, kw] at each rank, or a little more: each starts from one above it.

    Raises ValueError as `fit` does.

    >>> [round(loss, 6) for loss in losses(np.eye(2)[:, :, None, None], None, [1, 2])]
    [1.0, 0.0]
    """
    flat, H = weighted.checked(W, H)
    for rank in ranks:
        weighted.check_rank(rank, rank_max(W.shape, way))
    tensor = flat.reshape(_modes(W.shape, way))
    problem, state, found = Problem(tensor, H, steps), None, {}
    for rank in sorted(set(ranks), reverse=True):
        if rank == rank_max(W.shape, way):
            found[rank] = 0.0
            continue
        near = tensor if H is None else _tucker(tensor, H, rank)
        starts = [canonical.algebraic(near, rank)]
        if state is not None:
            strong = np.sort(np.argsort(-np.square(state.factors[0]).sum(0), kind="stable")[:rank])
            starts.append((state.factors[0][:, strong], *(factor[strong] for factor in state.factors[1:])))
        first = min((problem.solve(start) for start in starts), key=lambda one: one.loss)
        state = problem.run(first, TOLD, TOLERANCE)
        found[rank] = state.loss
    return [found[rank] for rank in ranks]


def correct(found: Cp, W: Array, H: Array | None, error: float, sweeps: int = 30, steps: int = STEPS) -> Cp:
    """Return a split of the same rank with an error of at most `error`, and the least degeneracy found under that.

    Raises ValueError where shapes do not fit, an entry is not finite, or `error` is below that of the split.

    >>> ones = np.ones((2, 3, 3, 3))
    >>> correct(fit(ones, None, 1), ones, None, 0.1).degeneracy < 1
    True
    """
    flat, H = weighted.checked(W, H)
    if not error >= found.error or found.shape != W.shape:
        raise ValueError(
            f"error {error} must be >= {found.error}, and W{W.shape} the weight of the split {found.shape}"
        )
    most = error**2 * weighted.loss(H, W, np.zeros_like(W))
    problem = Correction(flat.reshape(_modes(W.shape, 4 if len(found.taps) == 2 else 3)), H, steps)
    start = (found.a, found.b, *(tap.reshape(len(tap), -1) for tap in found.taps))
    least = _result(W, H, problem.shrink(start, most, sweeps, TOLERANCE))
    return least if least.error <= error * (1 + 1e-9) and least.degeneracy < found.degeneracy else found


def rank_max(shape: tuple[int, ...], way: Way = 4) -> int:
    """Return the rank at which the split of a weight [o, c, kh, kw] is exact for sure.

    >>> rank_max((64, 32, 3, 3)), rank_max((64, 32, 3, 3), 3)
    (288, 288)
    """
    modes = _modes(shape, way)
    return int(np.prod(modes)) // max(modes)


def parameters(shape: tuple[int, ...], rank: int, way: Way = 4) -> tuple[int, ...]:
    """Return how many weights the convolutions have, in order.

    >>> parameters((64, 32, 3, 3), 10), parameters((64, 32, 3, 3), 10, 3)
    ((320, 30, 30, 640), (320, 90, 640))
    """
    o, *others = _modes(shape, way)
    return *(rank * n for n in others), rank * o


def _modes(shape: tuple[int, ...], way: Way) -> tuple[int, ...]:
    o, c, kh, kw = shape
    return (o, c, kh, kw) if way == 4 else (o, c, kh * kw)


def _best(problem: Problem, starts: list[Factors], sweeps: int) -> State:
    """Return what the most promising start leads to."""
    states = [problem.run(problem.solve(start), min(sweeps, TRIAL), TOLERANCE) for start in starts]
    return problem.run(min(states, key=lambda state: state.loss), max(0, sweeps - TRIAL), TOLERANCE)


def _tucker(W: Array, H: Array, rank: int) -> Array:
    """Return the weight near W[o, c, ...] in this metric whose inputs and outputs span at most `rank` dimensions."""
    cube = W.reshape(*W.shape[:2], -1)
    o, c, t = cube.shape
    inputs, outputs = min(rank, c, o * t), min(rank, o, c * t)
    inputs, outputs = min(inputs, outputs * t), min(outputs, inputs * t)
    return bottleneck.fit(cube, H, inputs, outputs, 3).compose().reshape(W.shape)


def _result(W: Array, H: Array | None, factors: Factors) -> Cp:
    a, b, *taps = canonical.balanced(factors)
    What = (a @ canonical.rows((b, *taps))).reshape(W.shape)
    terms = float((np.square(a).sum(0) * np.square(b).sum(1)).sum())
    energy = float(np.square(W).sum())
    if len(taps) == 1:
        taps = [taps[0].reshape(len(b), *W.shape[2:])]
    return Cp(
        a,
        b,
        tuple(taps),
        W.shape,
        weighted.loss(H, W, What),
        weighted.relative_error(H, W, What),
        terms / energy if energy > 0 else 0.0,
    )
