"""Random layers with correlated inputs, for the tests of fits in the metric of a layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

F = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sampled:
    """A weight W[o, c, kh, kw], its centred inputs X[n, d] and their Gram matrix H[d, d]."""

    W: F
    X: F

    @property
    def H(self) -> F:
        gram: F = self.X.T @ self.X
        return gram

    @property
    def energy(self) -> float:
        return self.measured(np.zeros_like(self.W))

    def measured(self, What: F) -> float:
        """Return |What X - W X|^2, summed over the samples."""
        return float(np.square(self.X @ (What - self.W).reshape(len(self.W), -1).T).sum())


def layer(
    seed: int, o: int = 6, c: int = 4, kh: int = 3, kw: int = 3, n: int | None = None, dead: tuple[int, ...] = ()
) -> Sampled:
    """Return a layer with neighbouring taps and channels correlated; `n` < d samples make H singular.

    The columns `dead` are never fed.
    """
    rng = np.random.default_rng(seed)
    d = c * kh * kw
    n = 3 * d + 10 if n is None else n
    maps = rng.standard_normal((n, c, kh + 2, kw + 2))
    smooth = maps[:, :, 1:-1, 1:-1] + 0.7 * maps[:, :, 2:, 1:-1] + 0.7 * maps[:, :, 1:-1, 2:]
    mix = rng.standard_normal((c, c)) * np.arange(1, c + 1) ** -0.7
    X = np.einsum("nckl,cb->nbkl", smooth, mix).reshape(n, d) * rng.uniform(0.3, 2, d)
    X -= X.mean(0)
    X[:, list(dead)] = 0.0
    W = rng.standard_normal((o, d)) @ np.diag(rng.uniform(0.2, 1, d))
    return Sampled(W.reshape(o, c, kh, kw), X)


SHAPES: list[tuple[int, int, int, int]] = [
    (6, 4, 3, 3),
    (3, 4, 3, 5),
    (12, 3, 1, 7),
    (4, 6, 7, 1),
    (9, 5, 1, 1),
    (5, 9, 1, 1),
    (40, 2, 2, 3),
]


@st.composite
def layers(draw: st.DrawFn) -> Sampled:
    """Draw a small layer of any shape; H is singular in half of them, and some have dead columns."""
    o, c = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    kh, kw = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (2, 3), (3, 1), (3, 5)]))
    d = c * kh * kw
    n = draw(st.sampled_from([None, max(2, d // 2)]))
    dead = draw(st.sampled_from([(), (0,), (d - 1,)]))
    return layer(draw(st.integers(0, 10**6)), o, c, kh, kw, n, dead)
