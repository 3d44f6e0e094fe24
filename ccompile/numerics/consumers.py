"""The layers that read a group of units, and what the loss of some units costs them after the best repair.

A *group* is a set of units (channels, neurons) that live and die together; its *consumers* are the linear layers that
read them. With H = sum x x^T of a consumer's inputs, dropping the columns R of W and refitting the others costs

    min |W X - W' X|^2  =  tr( W_R S W_R^T ),    S = ([H^-1]_RR)^-1 = H_RR - H_RK (H_KK)^-1 H_KR.

A ridge enters as H + lam mean(diag H) I: losses then include the penalty lam mean(diag H) |W - W'|^2 and bound the true
ones from above. A centred H (see `Consumer.mean`) lets the bias absorb the means.
Columns without variance cost nothing.

Source: Hassibi and Stork 1993 (OBS); He et al. 2017, arXiv:1707.06168 (the objective).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Below this relative ridge a singular H cannot be told from a regular one once inverted and downdated in float64.
FLOOR_RIDGE = 1e-10
NOT_A_GRAM = "H with its ridge is not positive definite: is it a Gram matrix?"


@dataclass(frozen=True, eq=False)
class Consumer:
    """A linear layer y = W x that reads the group's units.

    `W[o, d]`: unfolded weight. `H[d, d]` = sum of x x^T over the samples. `unit[d]`: the unit that each column belongs
    to, -1 for columns outside the group (never removed). `weight`: importance of this layer's output error.
    `mean[d]` with `count`: mean input and number of samples; H is then centred, H - count mean mean^T, and `repair`
    returns what the bias must absorb. W may be the refit to other targets: losses then count from that refit.
    """

    W: Array
    H: Array
    unit: Array
    weight: float = 1.0
    mean: Array | None = None
    count: int = 0

    def __post_init__(self) -> None:
        d = self.W.shape[-1]
        if self.W.ndim != 2 or self.H.shape != (d, d) or self.unit.shape != (d,):
            raise ValueError(
                f"shapes W{self.W.shape}, H{self.H.shape}, unit{self.unit.shape}: need [o, d], [d, d], [d]"
            )
        if self.mean is not None and (self.mean.shape != (d,) or self.count < 1):
            raise ValueError(f"mean{self.mean.shape} with count {self.count}: need [{d}] and the number of samples")
        if not (np.isfinite(self.W).all() and np.isfinite(self.H).all()):
            raise ValueError("W or H is not finite")
        if not self.weight >= 0:
            raise ValueError(f"weight {self.weight} must be >= 0")


def subset_loss(consumers: Sequence[Consumer], keep: Array, ridge: float = 0.01) -> float:
    """Return the weighted loss of keeping only the units `keep` (integers) after the best repair.

    >>> subset_loss([Consumer(np.array([[1.0, 1.0]]), np.array([[2.0, 1.0], [1.0, 2.0]]), np.arange(2))], [0], 0.0)
    1.5
    """
    return float(sum(loss_of(prepare(consumer, ridge), keep) for consumer in consumers))


def repair(consumer: Consumer, keep: Array, ridge: float = 0.01) -> tuple[Array, Array]:
    """Return W'[o, d], the best weight that reads only the units `keep` (removed columns are 0), and db[o].

    db is what the bias must gain, (W - W') mean; 0 when the consumer has no mean.
    """
    from scipy.linalg.lapack import dpotrs

    stays = np.isin(consumer.unit, unit_numbers(keep))
    system, factor = factored(replace(consumer, unit=np.where(stays, -1, consumer.unit)), ridge)
    gone = len(system.units) * system.b
    W = system.W[:, gone:]
    if len(system.H) > gone:
        right = system.H[gone:, :gone] @ system.W[:, :gone].T
        left = len(system.H) - gone
        W = W + dpotrs(factor[:left, :left], right[::-1], lower=1)[0][::-1].T
    result = np.zeros(consumer.W.shape)
    result[:, system.source[gone:]] = W
    mean = np.zeros(consumer.W.shape[1]) if consumer.mean is None else consumer.mean
    return result, (consumer.W - result) @ mean


@dataclass(frozen=True, eq=False)
class System:
    """A consumer made ready: columns unit by unit, b each, then the fixed ones; ridge added, dead columns silenced.

    `units[m]`: the unit of each block; blocks shorter than b are filled with columns of W = 0 that correlate with
    nothing. `source[D]`: the consumer's column, -1 for the filling.
    """

    units: Array
    b: int
    H: Array
    W: Array
    source: Array
    ridge: float
    weight: float

    def split(self, keep: Array) -> tuple[Array, Array]:
        """Return the column indices that stay (fixed ones last) and those that go, when the units `keep` stay."""
        stays = np.repeat(np.isin(self.units, unit_numbers(keep)), self.b)
        fixed = np.ones(len(self.source) - len(stays), bool)
        return np.flatnonzero(np.concatenate([stays, fixed])), np.flatnonzero(~stays)


def unit_numbers(keep: Array) -> Array:
    """Return `keep` unless it is a mask, which would be taken for the units 0 and 1."""
    if np.asarray(keep).dtype == bool:
        raise ValueError("`keep` lists unit numbers; got booleans (use numpy.flatnonzero)")
    return keep


def prepare(consumer: Consumer, ridge: float) -> System:
    """Return the consumer centred, sorted by unit, without dead columns, and regular.

    `ridge` is relative to the mean diagonal entry; it is raised to FLOOR_RIDGE when H alone cannot be inverted.
    """
    return factored(consumer, ridge)[0]


def factored(consumer: Consumer, ridge: float) -> tuple[System, Array]:
    """Return the consumer made ready, and the lower L with L L^T = H[::-1, ::-1].

    Turned round, the fixed columns come first: L's leading block factors theirs alone, and its trailing block what is
    left of H over the units' columns once the fixed ones have been refitted (the Schur complement).
    """
    H, W = consumer.H.astype(np.float64), consumer.W.astype(np.float64)
    diagonal = H.diagonal().copy()
    if consumer.mean is not None:
        mean = consumer.mean.astype(np.float64)
        H -= consumer.count * np.outer(mean, mean)
    # What is left of a constant input after centring is rounding.
    dead = H.diagonal() <= 1e-12 * diagonal
    scale = float(H.diagonal()[~dead].mean()) if not dead.all() else 1.0
    W[:, dead] = 0.0
    H[dead], H[:, dead] = 0.0, 0.0
    H[dead, dead] = scale
    H, W, units, b, source = _pad(H, W, np.asarray(consumer.unit), scale)
    diagonal = H.diagonal().copy()
    H[np.diag_indices_from(H)] += ridge * scale
    factor, regular = _factor(H, known=ridge >= FLOOR_RIDGE)
    if not regular and ridge < FLOOR_RIDGE:
        ridge = FLOOR_RIDGE
        H[np.diag_indices_from(H)] = diagonal + ridge * scale
        factor, regular = _factor(H, known=True)
    if not regular:
        raise np.linalg.LinAlgError(NOT_A_GRAM)
    return System(units, b, H, W, source, ridge, consumer.weight), factor


def reduced(consumer: Consumer, ridge: float) -> tuple[System, Array]:
    """Return the consumer made ready with its units' columns only, and the inverse of its H.

    The fixed columns are refitted after any removal, so all losses are those of the Schur complement
    H_uu - H_uf (H_ff)^-1 H_fu: they are paid for once, however often the rest is inverted.
    """
    system, factor = factored(consumer, ridge)
    size = len(system.units) * system.b
    tail = factor[len(factor) - size :, len(factor) - size :]
    inverse = np.ascontiguousarray(_inverse(tail)[::-1, ::-1])
    if size < len(factor):
        H = np.ascontiguousarray((tail @ tail.T)[::-1, ::-1])
        system = replace(system, H=H, W=system.W[:, :size], source=system.source[:size])
    return system, inverse


def _pad(H: Array, W: Array, unit: Array, scale: float) -> tuple[Array, Array, Array, int, Array]:
    """Sort columns by unit, fixed last, and fill short blocks; return H, W, units, b, source."""
    units, counts = np.unique(unit[unit >= 0], return_counts=True)
    b = int(counts.max()) if len(units) else 1
    grouped = np.argsort(unit, kind="stable")[np.count_nonzero(unit < 0) :]
    slots = np.repeat(np.arange(len(units)) * b - (np.cumsum(counts) - counts), counts) + np.arange(len(grouped))
    source = np.full(len(units) * b + np.count_nonzero(unit < 0), -1)
    source[slots] = grouped
    source[len(units) * b :] = np.flatnonzero(unit < 0)
    H, W = H[np.ix_(source, source)], W[:, source]
    filling = source < 0
    if filling.any():
        W[:, filling], H[filling], H[:, filling] = 0.0, 0.0, 0.0
        H[filling, filling] = scale
    return H, W, units, b, source


def _factor(H: Array, known: bool) -> tuple[Array, bool]:
    """Return L with L L^T = H[::-1, ::-1], and whether H can be inverted in float64 with digits to spare.

    known: it can if it has a factor at all, thanks to its ridge.
    """
    from scipy.linalg.lapack import dpocon, dpotrf

    factor, info = dpotrf(H[::-1, ::-1], lower=1)
    if info or known or not len(H):
        return factor, not info
    rcond, _ = dpocon(factor, np.abs(H).sum(0).max(initial=0.0), uplo="L")
    return factor, bool(rcond > 1e-12)


def invert(H: Array) -> Array:
    """Return the inverse of a symmetric positive definite H, symmetric to the last bit."""
    from scipy.linalg.lapack import dpotrf

    factor, info = dpotrf(H, lower=1)
    if info:
        raise np.linalg.LinAlgError(NOT_A_GRAM)
    return _inverse(factor)


def _inverse(factor: Array) -> Array:
    """Return the inverse of L L^T for a lower L with zeros above its diagonal, symmetric to the last bit."""
    from scipy.linalg.lapack import dpotri

    if not len(factor):
        return factor.copy()
    half, _ = dpotri(factor, lower=1)
    result: Array = half + half.T
    result[np.diag_indices_from(result)] = half.diagonal()
    return result


def subtract_product(C: Array, A: Array, B: Array) -> None:
    """Do C -= A B^T in place without a temporary of C's size; C[m, n] in C order, A[m, k], B[n, k]."""
    from scipy.linalg.blas import dgemm

    result = dgemm(-1.0, B, A.T, beta=1.0, c=C.T, overwrite_c=1)
    if not np.may_share_memory(result, C):
        C[...] = result.T


def traces(D: Array, blocks: Array) -> Array:
    """Return tr(D_u^-1 V_u V_u^T) for D[m, b, b] positive definite and blocks V[m, b, o]."""
    grams = blocks @ blocks.transpose(0, 2, 1)
    traces: Array = np.trace(np.linalg.solve(D, grams), axis1=1, axis2=2)
    return np.maximum(traces, 0.0)


def diagonal_blocks(A: Array, b: int) -> Array:
    """Return D[m, b, b], a copy of the diagonal blocks of A[m b, m b]."""
    m = len(A) // b
    blocks: Array = A.reshape(m, b, m, b)[np.arange(m), :, np.arange(m), :]
    return blocks


def repaired_columns(system: System, kept: Array, gone: Array, inverse: Array) -> Array:
    """Return the columns `kept` of W after the columns `gone` went; `inverse` is that of the kept block of H."""
    W = system.W[:, kept]
    return W + (system.W[:, gone] @ system.H[np.ix_(gone, kept)]) @ inverse if len(gone) else W


def loss_of(system: System, keep: Array) -> float:
    """Return the weighted loss of keeping only the units `keep`, from the Schur complement of the kept columns."""
    from scipy.linalg import cholesky, solve_triangular

    kept, gone = system.split(keep)
    if not len(gone):
        return 0.0
    schur, W = system.H[np.ix_(gone, gone)], system.W[:, gone]
    if len(kept):
        factor = cholesky(system.H[np.ix_(kept, kept)], lower=True, overwrite_a=True)
        root = solve_triangular(factor, system.H[np.ix_(kept, gone)], lower=True)
        schur = schur - root.T @ root
    return system.weight * max(float(((W @ schur) * W).sum()), 0.0)


def unit_count(consumers: Sequence[Consumer]) -> int:
    """Return the number of units, one more than the largest that any consumer reads."""
    if not consumers:
        raise ValueError("a group needs at least one consumer")
    return int(max(consumer.unit.max(initial=-1) for consumer in consumers)) + 1


def flat_scores(systems: Sequence[System]) -> tuple[Array, Array, list[Array]]:
    """Return all blocks' scores in one array, the unit of each, and the view of each system."""
    sizes = [len(system.units) for system in systems]
    scores = np.zeros(sum(sizes))
    owner = np.concatenate([system.units for system in systems])
    return scores, owner, np.split(scores, np.cumsum(sizes)[:-1])


def readers_of(systems: Sequence[System], n: int) -> list[list[tuple[int, int]]]:
    """Return for each unit the (system, block) pairs that read it."""
    readers: list[list[tuple[int, int]]] = [[] for _ in range(n)]
    for index, system in enumerate(systems):
        for position, unit in enumerate(system.units.tolist()):
            readers[unit].append((index, position))
    return readers
