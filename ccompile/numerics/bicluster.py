"""Biclusters: groups of output and of input channels, and a weight of low rank between each pair of groups.

    What[O_g, C_k] = A[g, k] B[g, k],    A[g, k] of shape [o / G, r],  B[g, k] of shape [r, (c / K) kh kw]

Groups have equal sizes. Without data: outputs and inputs first go near common subspaces (clusters.py), then where the
blocks' singular vectors catch most of them, in turns; no turn raises the loss. With the Gram matrix of the inputs: the
blocks in its metric, and all A of an output group together by least squares. One group of each is weighted.py.
Parameters: r (K o + G c kh kw).

Source: Denton et al. 2014, arXiv:1404.0736, section 3.2.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ccompile.numerics import clusters, weighted
from ccompile.numerics.least_squares import refit

Array = npt.NDArray[Any]

Partition = tuple[Array, Array]

SWEEPS = 20


@dataclass(frozen=True, eq=False)
class Biclusters:
    """`outputs`[G, o / G] and `inputs`[K, c / K], the channels of each group, ascending; `A` and `B` of each pair.

    `A`[G, K, o / G, r] and `B`[G, K, r, c / K, kh, kw]. `loss` = tr((What - W) H (What - W)^T), `error` =
    sqrt(loss / tr(W H W^T)).
    """

    outputs: Array
    inputs: Array
    A: Array
    B: Array
    loss: float
    error: float

    def compose(self) -> Array:
        """Return What[o, c, kh, kw]."""
        What = np.zeros((self.outputs.size, self.inputs.size, *self.B.shape[-2:]))
        for g, outputs in enumerate(self.outputs):
            for k, inputs in enumerate(self.inputs):
                What[np.ix_(outputs, inputs)] = np.tensordot(self.A[g, k], self.B[g, k], 1)
        return What


def fit(W: Array, H: Array | None, groups: tuple[int, int], rank: int, seed: int = 0) -> Biclusters:
    """Return blocks of this rank for W[o, c, kh, kw] between `groups` = (output groups, input groups).

    With H[d, d] or without data; with data the loss is never above that without. Raises ValueError where shapes do not
    fit, an entry is not finite, the groups do not divide the channels or the rank is not that of a block.

    >>> fit(np.kron(np.eye(2), np.ones((3, 2)))[:, :, None, None], None, (2, 2), 1).error < 1e-12
    True
    """
    _, H = weighted.checked(W, H)
    (o, c, kh, kw), (G, K) = W.shape, groups
    if min(groups) < 1 or o % G or c % K:
        raise ValueError(f"{G} x {K} groups do not divide {o} x {c} channels")
    weighted.check_rank(rank, min(o // G, c // K * kh * kw))
    taps = W.reshape(o, c, -1).astype(np.float64)
    free = _partition(taps, groups, rank, seed)
    if H is None:
        return _result(W, None, free, _blocks(taps, None, free, rank))
    scale = np.sqrt(np.maximum(H.diagonal(), 0.0)).reshape(c, -1)
    weighed = _partition(taps * scale, groups, rank, seed)
    metrics = [(free, None), (free, H), (weighed, H)]
    found = [_result(W, H, at, _refitted(taps, H, at, _blocks(taps, metric, at, rank))) for at, metric in metrics]
    return min(found, key=lambda result: result.loss)


def parameters(shape: tuple[int, ...], groups: tuple[int, int], rank: int) -> tuple[int, int]:
    """Return how many weights all B and all A have.

    >>> parameters((64, 32, 3, 3), (2, 4), 5)
    (2880, 1280)
    """
    o, c, kh, kw = shape
    return groups[0] * rank * c * kh * kw, groups[1] * rank * o


def _partition(W: Array, groups: tuple[int, int], rank: int, seed: int) -> Partition:
    """Return the output groups[G, o / G] and input groups[K, c / K] for W[o, c, t]."""
    (o, c, t), (G, K) = W.shape, groups
    rows, columns = W.reshape(o, 1, -1), W.transpose(1, 2, 0)
    at = best = (
        _members(clusters.cluster(rows, G, min(K * rank, o // G), True, seed), G),
        _members(clusters.cluster(columns, K, min(G * rank, c // K * t), True, seed), K),
    )
    most = -np.inf
    for _ in range(SWEEPS):
        A, B = _blocks(W, None, at, rank)
        caught = float(np.square(B).sum())
        if not caught > most * (1 + 1e-9):
            break
        best, most = at, caught
        at = (_members(clusters.assign(_output_gains(W, B, at[1]), True), G), at[1])
        A, B = _blocks(W, None, at, rank)
        at = (at[0], _members(clusters.assign(_input_gains(W, A, at[0]), True), K))
    return best


def _output_gains(W: Array, B: Array, inputs: Array) -> Array:
    """Return gain[o, G]: what each output keeps of its energy with the readers of each output group."""
    norms = np.linalg.norm(B, axis=3, keepdims=True)
    B = B / np.where(norms > 0, norms, 1.0)
    gain = np.zeros((len(W), len(B)))
    for k, part in enumerate(inputs):
        flat = W[:, part].reshape(len(W), -1)
        for g in range(len(B)):
            gain[:, g] += np.square(flat @ B[g, k].T).sum(1)
    return gain


def _input_gains(W: Array, A: Array, outputs: Array) -> Array:
    """Return gain[c, K]: what each input keeps of its energy with the writers of each input group."""
    gain = np.zeros((W.shape[1], A.shape[1]))
    for g, part in enumerate(outputs):
        for k in range(A.shape[1]):
            gain[:, k] += np.square(np.tensordot(W[part], A[g, k], (0, 0))).sum((1, 2))
    return gain


def _blocks(W: Array, H: Array | None, at: Partition, rank: int) -> tuple[Array, Array]:
    """Return A[G, K, o / G, r], orthonormal, and B[G, K, r, c / K t] of every block, the best in the metric of H."""
    outputs, inputs = at
    A = np.zeros((len(outputs), len(inputs), outputs.shape[1], rank))
    B = np.zeros((len(outputs), len(inputs), rank, inputs.shape[1] * W.shape[2]))
    for k, part in enumerate(inputs):
        metric = None if H is None else H[np.ix_(_columns(part, W.shape[2]), _columns(part, W.shape[2]))]
        for g, members in enumerate(outputs):
            block = W[np.ix_(members, part)].reshape(len(members), -1)
            A[g, k], B[g, k] = weighted.truncate(block, metric, rank)
    return A, B


def _refitted(W: Array, H: Array, at: Partition, blocks: tuple[Array, Array]) -> tuple[Array, Array]:
    """Return the blocks with the best A for their B, all of an output group together."""
    (A, B), (outputs, inputs), rank = (blocks[0].copy(), blocks[1]), at, blocks[0].shape[3]
    WH = W.reshape(len(W), -1) @ H
    for g, members in enumerate(outputs):
        T = np.zeros((len(inputs) * rank, len(H)))
        for k, part in enumerate(inputs):
            T[k * rank : (k + 1) * rank, _columns(part, W.shape[2])] = B[g, k]
        gram = T @ H @ T.T
        start = A[g].transpose(1, 0, 2).reshape(len(members), -1)
        found = refit((gram + gram.T) / 2, WH[members] @ T.T, start, 0.0).W
        A[g] = found.reshape(len(members), len(inputs), rank).transpose(1, 0, 2)
    return A, B


def _result(W: Array, H: Array | None, at: Partition, blocks: tuple[Array, Array]) -> Biclusters:
    A, B = blocks
    B = B.reshape(*B.shape[:3], -1, *W.shape[2:])
    What = Biclusters(*at, A, B, 0.0, 0.0).compose()
    return Biclusters(*at, A, B, weighted.loss(H, W, What), weighted.relative_error(H, W, What))


def _members(labels: Array, groups: int) -> Array:
    """Return the members[groups, n / groups] of groups of equal sizes, ascending."""
    return np.argsort(labels, kind="stable").reshape(groups, -1)


def _columns(channels: Array, t: int) -> Array:
    """Return the unfolded columns of these channels."""
    columns: Array = (channels[:, None] * t + np.arange(t)).ravel()
    return columns
