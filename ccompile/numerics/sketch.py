"""Sketches: how far apart two long vectors are, told from the few numbers that were kept of each.

s[d] = sum over i with bucket(i) = d of sign(i) x[i],   E |s(x) - s(y)|^2 = |x - y|^2,

with a standard deviation of at most sqrt(2 / buckets) of it, whatever the vectors. Two sketches can be taken years
apart: bucket and sign are functions of the entry's key alone.
Source: Charikar, Chen and Farach-Colton 2002 (Count Sketch); Thorup and Zhang 2004 (its second moment); the hash is
splitmix64, Steele, Lea and Flood 2014.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BUCKETS = 256
SPREAD = math.sqrt(2 / BUCKETS) / 2  # relative standard deviation of a distance
_CHUNK = 1 << 18  # entries hashed at a time


def mixed(keys: Array) -> Array:
    """Return a 64-bit hash of each key, uint64.

    >>> [hex(int(word)) for word in mixed(np.array([0, 1], np.uint64))]
    ['0xe220a8397b1dcdaf', '0x910a2dec89025cc1']
    """
    with np.errstate(over="ignore"):
        words: Array = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        words = words ^ (words >> np.uint64(31))
    return words


def sketch(keys: Array, x: Array) -> Array:
    """Return s[buckets] of x[n] under keys[n], float64."""
    words = mixed(keys)
    signs = np.where(words & np.uint64(BUCKETS), -1.0, 1.0)
    return np.bincount((words & np.uint64(BUCKETS - 1)).astype(np.intp), signs * x, BUCKETS)


def sketch_run(start: int, x: Array) -> Array:
    """Return s[buckets] of x[n], whose entries have the keys start, start + 1, ...

    >>> x = np.array([3.0, 4.0])
    >>> bool(np.allclose(sketch_run(0, x), sketch_run(0, x[:1]) + sketch_run(1, x[1:])))
    True
    """
    flat = x.reshape(-1)
    total = np.zeros(BUCKETS)
    for at in range(0, flat.size, _CHUNK):
        part = flat[at : at + _CHUNK].astype(np.float64)
        total += sketch(np.arange(start + at, start + at + len(part), dtype=np.uint64), part)
    return total


def sketch_pairs(start: int, words: Array) -> Array:
    """Return s[buckets] of the indicator of (position, words[n]), positions being start, start + 1, ...

    Half of the squared distance of two such sketches estimates how many positions hold different words.
    """
    total = np.zeros(BUCKETS)
    for at in range(0, words.size, _CHUNK):
        part = words[at : at + _CHUNK].astype(np.uint64)
        places = mixed(np.arange(start + at, start + at + len(part), dtype=np.uint64))
        total += sketch(places ^ mixed(part), np.ones(len(part)))
    return total


def distance(a: Array, b: Array) -> float:
    """Return |x - y|, estimated from two sketches, within a few times SPREAD of it."""
    return float(np.linalg.norm(a - b))
