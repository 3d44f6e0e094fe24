"""Monochromatic filters: project the channels of a first layer to few colours, of which each filter reads one.

    What[o, c, i, j] = s[o, i, j] p[g(o), c]        (1 x 1 with p, then each filter on the channel g(o))

Without data a filter loses |W_o|^2 - |p_g^T W_o|^2, so that colours are the lines of a clustering (clusters.py). With
the Gram matrix of the inputs, s, then p, then g are each exact given the others, and no step raises the loss.
Parameters: colours c + o kh kw.

Source: Denton et al. 2014, arXiv:1404.0736, section 3.2.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ccompile.numerics import clusters, weighted
from ccompile.numerics.alternating import alternate
from ccompile.numerics.least_squares import refit

Array = npt.NDArray[Any]

SWEEPS, TOLERANCE = 30, 1e-3


@dataclass(frozen=True, eq=False)
class Monochrome:
    """`p`[colours, c] of norm 1, `s`[o, kh, kw], and `group`[o], the colour that each filter reads.

    `loss` = tr((What - W) H (What - W)^T), `error` = sqrt(loss / tr(W H W^T)).
    """

    p: Array
    s: Array
    group: Array
    loss: float
    error: float

    def compose(self) -> Array:
        """Return What[o, c, kh, kw]."""
        return _compose(self.p, self.s, self.group)


def fit(
    W: Array, H: Array | None, colours: int, balanced: bool = False, seed: int = 0, sweeps: int = SWEEPS
) -> Monochrome:
    """Return filters of one colour each for W[o, c, kh, kw], with H[d, d] or without data.

    If balanced, colours are read by equally many filters, as a grouped convolution needs it (up to one, where o is no
    multiple). With data the loss is never above that without. Raises ValueError where shapes do not fit, an entry is
    not finite, or `colours` is not in 1 .. o.

    >>> red_or_blue = np.einsum("oc,ij->ocij", [[1.0, 0, 0], [0, 0, 2.0], [-3.0, 0, 0]], np.ones((3, 3)))
    >>> found = fit(red_or_blue, None, 2)
    >>> found.error < 1e-12, found.group.tolist()
    (True, [0, 1, 0])
    """
    _, H = weighted.checked(W, H)
    weighted.check_rank(colours, len(W), "colours")
    taps = W.reshape(*W.shape[:2], -1).astype(np.float64)
    items = taps.transpose(0, 2, 1)
    group = clusters.cluster(items, colours, 1, balanced, seed)
    p = _living(clusters.subspaces(items, group, colours, 1)[:, 0])
    s = np.einsum("oc,oct->ot", p[group], taps)
    if H is not None:
        problem = _Problem(taps, H, balanced)
        start = problem.solve(p, s, group)
        state = alternate(start, problem.sweep, lambda state: state.loss, sweeps, TOLERANCE)
        p, s, group = state.p, state.s, state.group
    s = s.reshape(len(s), *W.shape[2:])
    What = _compose(p, s, group)
    return Monochrome(p, s, group, weighted.loss(H, W, What), weighted.relative_error(H, W, What))


def parameters(shape: tuple[int, ...], colours: int) -> tuple[int, int]:
    """Return how many weights the projection and the filters have.

    >>> parameters((96, 3, 7, 7), 12)
    (36, 4704)
    """
    o, c, kh, kw = shape
    return colours * c, o * kh * kw


@dataclass(frozen=True, eq=False)
class _State:
    p: Array
    s: Array
    group: Array
    loss: float


class _Problem:
    def __init__(self, W: Array, H: Array, balanced: bool) -> None:
        self.W, self.H, self.balanced = W, H, balanced
        self.o, self.c, self.t = W.shape
        self.tensor = H.reshape(self.c, self.t, self.c, self.t)
        self.WH = (W.reshape(self.o, -1) @ H).reshape(W.shape)

    def solve(self, p: Array, s: Array, group: Array) -> _State:
        """Return the best s[o, t] for these colours and groups."""
        s = s.copy()
        for colour, members in self._members(group, len(p)):
            gram, cross = self._against(p[colour])
            s[members] = refit(gram, cross[members], s[members], 0.0).W
        return _State(p, s, group, weighted.loss(self.H, self.W, p[group][:, :, None] * s[:, None]))

    def sweep(self, state: _State) -> _State:
        """Improve the colours, regroup, and solve for s."""
        p = state.p.copy()
        for colour, members in self._members(state.group, len(p)):
            s = state.s[members]
            gram = np.tensordot(s.T @ s, self.tensor, ((0, 1), (1, 3)))
            cross = np.einsum("ot,oct->c", s, self.WH[members])
            p[colour] = refit((gram + gram.T) / 2, cross[None], p[colour][None], 0.0).W[0]
        norms = np.linalg.norm(p, axis=1)
        settled = self.solve(
            p / np.where(norms > 0, norms, 1.0)[:, None], state.s * norms[state.group, None], state.group
        )
        gain = np.stack([self._gain(colour) for colour in settled.p], 1)
        group = clusters.assign(gain, self.balanced)
        regrouped = self.solve(settled.p, np.einsum("oc,oct->ot", settled.p[group], self.W), group)
        return min(settled, regrouped, key=lambda state: state.loss)

    def _members(self, group: Array, colours: int) -> list[tuple[int, Array]]:
        sets = [(colour, np.flatnonzero(group == colour)) for colour in range(colours)]
        return [(colour, members) for colour, members in sets if len(members)]

    def _against(self, p: Array) -> tuple[Array, Array]:
        """Return the Gram matrix [t, t] of the channel p, and its products [o, t] with what W gives."""
        gram = np.einsum("c,ctdu,d->tu", p, self.tensor, p, optimize=True)
        return (gram + gram.T) / 2, np.einsum("oct,c->ot", self.WH, p)

    def _gain(self, p: Array) -> Array:
        """Return by how much each filter's loss falls when it reads the channel p."""
        gram, cross = self._against(p)
        s = refit(gram, cross, np.zeros_like(cross), 0.0).W
        gain: Array = (2 * s * cross - (s @ gram) * s).sum(1)
        return gain


def _compose(p: Array, s: Array, group: Array) -> Array:
    return p[group][:, :, None, None] * s[:, None]


def _living(p: Array) -> Array:
    """Return the colours with those of nothing but zeros replaced by the first channel."""
    dead = ~p.any(1)
    p[dead, 0] = 1.0
    return p
