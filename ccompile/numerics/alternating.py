"""Fit one factor at a time: truncated conjugate gradients on normal equations, and sweeps that only ever descend.

A weight that is linear in each of its factors, What = M(f) with the others fixed, has the loss (see weighted.py)

    q(f) = <f, N f> - 2 <f, b> + constant,    N f = M*(M(f) H),    b = M*(W H),

and N is positive semidefinite. Conjugate gradients started at the present f lower q at every step, however early they
stop and however singular N is. The nearer a preconditioner comes to the inverse of N, the fewer the steps.

Source: Hestenes and Stiefel 1952; Kolda and Bader 2009, doi:10.1137/07070111X (alternating least squares).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ccompile.numerics.consumers import invert

Array = npt.NDArray[Any]
Operator = Callable[[Array], Array]
State = TypeVar("State")

# What a preconditioner adds to a singular matrix before inverting it, relative to its mean diagonal entry.
RIDGE = 1e-9


def descend(
    normal: Operator,
    rhs: Array,
    start: Array,
    steps: int = 20,
    tolerance: float = 1e-10,
    precondition: Operator | None = None,
) -> Array:
    """Return f with <f, N f> - 2 <f, rhs> no larger than at `start`, after at most `steps` conjugate gradients.

    `normal` applies N, symmetric positive semidefinite; `precondition` something like its inverse, symmetric positive
    definite. Stops early when the residual fell by `tolerance`.

    >>> descend(lambda f: 2 * f, np.array([2.0, 4.0]), np.zeros(2)).tolist()
    [1.0, 2.0]
    """
    first = rhs - normal(start)
    step, residual = np.zeros_like(start), first.copy()
    direction, before, target = np.zeros_like(start), 1.0, 0.0
    for number in range(steps):
        ready = residual if precondition is None else precondition(residual)
        now = float(np.vdot(residual, ready))
        if not now > target:
            break
        target = target if number else tolerance**2 * now
        direction = ready + (now / before if number else 0.0) * direction
        curved = normal(direction)
        curvature = float(np.vdot(direction, curved))
        if not curvature > 0:
            break
        step += now / curvature * direction
        residual -= now / curvature * curved
        before = now
    gain = float(np.vdot(step, 2 * first - normal(step)))
    return start + step if gain > 0 else start


def alternate(
    start: State,
    sweep: Callable[[State], State],
    loss: Callable[[State], float],
    sweeps: int,
    tolerance: float,
) -> State:
    """Return the state of least loss on the way start, sweep(start), ... of at most `sweeps` sweeps.

    Stops once a sweep lowers the loss by less than `tolerance` times the loss before it.

    >>> alternate(8.0, lambda x: x / 2, abs, 3, 0.1)
    1.0
    """
    best, least = start, loss(start)
    for _ in range(sweeps):
        state = sweep(best)
        now = loss(state)
        if not now < least:
            break
        done = least - now < tolerance * least
        best, least = state, now
        if done:
            break
    return best


def kronecker(left: Array, right: Array | None) -> Operator:
    """Return what maps F[r, n] to left^-1 F right^-1 for semidefinite left[r, r], right[n, n] (None: identity).

    Both get a small ridge, so that the result is a preconditioner whatever their rank.

    >>> kronecker(2 * np.eye(1), 5 * np.eye(2))(np.ones((1, 2))).round(6).tolist()
    [[0.1, 0.1]]
    """
    first = inverse(left)
    if right is None:
        return lambda F: first @ F
    second = inverse(right)
    return lambda F: first @ F @ second


def inverse(matrix: Array, ridge: float = RIDGE) -> Array:
    """Return (matrix + ridge mean(diag) I)^-1 of a semidefinite matrix; the identity where it is zero.

    >>> inverse(np.diag([4.0, 2.0])).round(6).tolist()
    [[0.25, 0.0], [0.0, 0.5]]
    """
    scale = float(matrix.diagonal().mean())
    if not scale > 0:
        return np.eye(len(matrix))
    for attempt in range(4):
        try:
            return invert(matrix + 100.0**attempt * ridge * scale * np.eye(len(matrix)))
        except np.linalg.LinAlgError:
            continue
    return np.diag(1.0 / np.maximum(matrix.diagonal(), scale))
