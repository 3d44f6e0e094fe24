"""What an entropy coder can make of symbols: entropy, Huffman code lengths, and Deep Compression's relative indices.

Source: Huffman 1952; Han et al. 2016, arXiv:1510.00149, section 2 (relative indices, after each span of zeros a filler)
and section 4 (Huffman coding).
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def entropy(counts: Array) -> float:
    """Return the order-0 entropy, in bits per symbol, of symbols that occur counts[k] times; 0 without any.

    >>> entropy(np.array([2, 1, 1, 0]))
    1.5
    """
    present = counts[counts > 0].astype(np.float64)
    total = present.sum()
    return float((present / total) @ np.log2(total / present)) if present.size else 0.0


def code_lengths(counts: Array) -> Array:
    """Return the bits of each symbol's Huffman code for counts[k]; 0 for a symbol that does not occur.

    A single symbol takes one bit, so that the lengths always are those of a prefix code; ties are broken by order.

    >>> code_lengths(np.array([4, 2, 1, 1, 0])).tolist()
    [1, 2, 3, 3, 0]
    """
    lengths = np.zeros(counts.size, np.int64)
    present = np.flatnonzero(counts)
    if present.size < 2:
        lengths[present] = 1
        return lengths
    parents = np.zeros(2 * present.size - 1, np.int64)
    heap = [(int(counts[symbol]), node) for node, symbol in enumerate(present)]
    heapq.heapify(heap)
    for node in range(present.size, parents.size):
        (first, left), (second, right) = heapq.heappop(heap), heapq.heappop(heap)
        parents[[left, right]] = node
        heapq.heappush(heap, (first + second, node))
    depths = np.zeros_like(parents)
    for node in range(parents.size - 2, -1, -1):  # a parent has a larger number than its children
        depths[node] = depths[parents[node]] + 1
    lengths[present] = depths[: present.size]
    return lengths


def average_length(counts: Array) -> float:
    """Return the bits per symbol of a Huffman code: H <= L < H + 1, and L = H where all shares are powers of 1/2.

    >>> average_length(np.array([2, 1, 1]))
    1.5
    """
    total = counts.sum()
    return float(counts @ code_lengths(counts) / total) if total else 0.0


def relative_entries(kept: Array, gap_bits: int) -> int:
    """Return how many entries store the positions of the True elements of kept[n] as gaps of gap_bits bits.

    A gap runs from 1 to 2**gap_bits; where the next element is further away, a filler entry (a stored zero) stands at
    the largest gap.

    >>> relative_entries(np.array([True, False, False, False, True, False]), 1)
    3
    """
    gaps = np.diff(np.flatnonzero(kept), prepend=-1)
    return int((-(-gaps // (1 << gap_bits))).sum())
