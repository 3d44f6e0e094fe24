"""Which nodes compute on integers when each passage between integers and floats costs as well: a minimum cut.

Minimise, over assignments of units to integers or floats,

    sum of each unit's cost there  +  quantise[v] where a float makes v and an integer unit reads it
                                   +  dequantise[v] where an integer unit makes v and a float reads it.

Source: Picard and Ratliff 1975, doi:10.1002/net.3230050405 (quadratic pseudo-Boolean minimisation as a cut).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_UNITS = 1e6  # capacities are whole numbers: shares of this of the total
_NEVER = 1 << 30


@dataclass(frozen=True)
class Passage:
    """A value between units: who makes it and who reads it, by index; None is a float outside, for ever."""

    maker: int | None
    readers: tuple[int | None, ...]
    quantise: float
    dequantise: float


def cost(
    chosen: Sequence[bool], floats: Sequence[float], integers: Sequence[float], passages: Sequence[Passage]
) -> float:
    """Return what an assignment costs: the sum above.

    >>> cost([True, False], [5.0, 1.0], [1.0, 2.0], [Passage(0, (1,), 0.5, 0.25)])
    2.25
    """
    total = sum(integers[at] if taken else floats[at] for at, taken in enumerate(chosen))
    for passage in passages:
        made = passage.maker is not None and chosen[passage.maker]
        read = [reader is not None and chosen[reader] for reader in passage.readers]
        total += passage.dequantise if made and not all(read) else 0.0
        total += passage.quantise if not made and any(read) else 0.0
    return total


def cheapest(floats: Sequence[float], integers: Sequence[float], passages: Sequence[Passage]) -> list[bool]:
    """Return, by unit, whether integers are cheaper for the whole; costs are >= 0, in any unit, `inf` forbids.

    Of two equally cheap assignments the one with more floats.

    >>> cheapest([5.0, 1.0], [1.0, 2.0], [Passage(0, (1,), 0.5, 0.5), Passage(1, (None,), 0.5, 0.5)])
    [True, False]
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    prices = [price for passage in passages for price in (passage.quantise, passage.dequantise)]
    total = sum(cost for cost in (*floats, *integers, *prices) if np.isfinite(cost))
    count = len(floats)
    source, sink = count, count + 1  # on the source's side: integers
    edges: dict[tuple[int, int], int] = {}

    def add(start: int, end: int, cost: float) -> None:
        scaled = _NEVER if not np.isfinite(cost) else round(cost / max(total, 1e-300) * _UNITS)
        if scaled:
            edges[start, end] = min(edges.get((start, end), 0) + scaled, _NEVER)

    for unit, (in_float, in_integer) in enumerate(zip(floats, integers, strict=True)):
        add(source, unit, in_float)
        add(unit, sink, in_integer)
    size = count + 2
    for passage in passages:
        maker = sink if passage.maker is None else passage.maker
        readers = [sink if reader is None else reader for reader in passage.readers]
        if maker != sink:
            add(maker, size, passage.dequantise)
            for reader in readers:
                add(size, reader, np.inf)
        for reader in readers:
            if reader != sink:
                add(reader, size + 1, np.inf)
        add(size + 1, maker, passage.quantise)
        size += 2
    if not edges:
        return [False] * count
    rows, columns = np.array(list(edges)).T
    capacity = coo_array((np.array(list(edges.values()), np.int32), (rows, columns)), (size, size)).tocsr()
    left = capacity - maximum_flow(capacity, source, sink).flow
    left.data[left.data < 0] = 0
    left.eliminate_zeros()
    reached = set(breadth_first_order(left, source, return_predecessors=False).tolist())
    return [unit in reached for unit in range(count)]
