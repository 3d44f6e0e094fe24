"""Weights shared by a hash: which few values the entries of a matrix are, up to sign, and the values that fit best.

W[i] ~= xi(i) c[h(i)],   h(i) = ((a i + b) mod p) mod k,   xi(i) = 1 - 2 ((a' i + b') mod p mod 2),   p = 2^31 - 1,

i the entry's number in the stored order. Nothing is stored but c[k] and the constants. With the hash given the values
are a least-squares problem in the metric of the inputs (see levels.settle).
Source: Chen et al. 2015, arXiv:1504.04788 (HashedNets).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ccompile.numerics import levels
from ccompile.numerics.levels import Structure

Array = npt.NDArray[Any]

PRIME = 2**31 - 1


@dataclass(frozen=True)
class Hash:
    """The constants of h and xi, and k."""

    k: int
    bucket: tuple[int, int]
    sign: tuple[int, int]


def draw(k: int, seed: int) -> Hash:
    """Return a hash of k buckets."""
    numbers = [int(number) for number in np.random.default_rng(seed).integers(1, PRIME, 4)]
    return Hash(k, (numbers[0], numbers[1]), (numbers[2], numbers[3]))


def buckets(of: Hash, count: int) -> Array:
    """Return h(i) of i = 0 ... count - 1.

    >>> buckets(Hash(3, (1, 1), (1, 0)), 4).tolist()
    [1, 2, 0, 1]
    """
    return _mixed(of.bucket, count) % of.k


def signs(of: Hash, count: int) -> Array:
    """Return xi(i) of i = 0 ... count - 1.

    >>> signs(Hash(3, (1, 1), (1, 0)), 4).tolist()
    [1, -1, 1, -1]
    """
    return 1 - 2 * (_mixed(of.sign, count) % 2)


def _mixed(constants: tuple[int, int], count: int) -> Array:
    mixed: Array = (np.arange(count, dtype=np.int64) * constants[0] + constants[1]) % PRIME
    return mixed


@dataclass(frozen=True, eq=False, kw_only=True)
class Hashed(Structure):
    """A matrix whose `code` is the bucket and whose signs are given; the levels c[k] are the parameters."""

    levels: Array
    sign: Array

    @property
    def parameters(self) -> Array:
        """Return c."""
        return self.levels

    def moved(self, parameters: Array) -> Self:
        """Return other values."""
        return replace(self, levels=parameters)

    @property
    def place(self) -> Array:
        """Return the buckets."""
        return self.code

    @property
    def factor(self) -> Array:
        """Return the signs."""
        return self.sign


def fit(
    W: Sequence[Array], H: Sequence[Array | None], code: Sequence[Array], sign: Sequence[Array], k: int
) -> list[Hashed]:
    """Return the values that lose least. W[p][o, d], H[p][d, d] or None; code[p][o, d] buckets, sign[p][o, d] +-1."""
    none = np.zeros((1, 1), np.int64)
    parts = [
        Hashed(table=none, code=bucket, levels=np.zeros(k), sign=signed)
        for bucket, signed in zip(code, sign, strict=True)
    ]
    return levels.settle(parts, W, H, rounds=100)
