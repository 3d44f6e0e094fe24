"""Smaller forms of a weight: the same values in fewer bytes of the file, decoded by nodes that fold.

The runtime computes the nodes once, when it opens a session, and then runs at full speed; only the file shrinks.

form       stored                                                 decoded by
codebook   ascending levels[k] and a code per weight              Gather
codebooks  levels[a, k, c] of the slices [a, :, c] of [a, b, c]   GatherElements
blocks     vectors[k, v] and a code per block of v weights        Gather
grid       integers and a scale per slice                         Cast, Mul
outliers   a codebook's array, gaps between the others, values    CumSum, ScatterElements
bitmask    one bit per weight, and the weights that are not zero  CumSum, Gather
sparse     index and value of the weights that are not zero       (a sparse initializer)

Codes of 1, 2 and 4 bits lie side by side in bytes (BitShift, Mod), of 4 bits in UINT4 where the model's opset has it,
others as bit planes. `smallest` picks the form of fewest bytes that gives back every bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.core import Array
from ccompile.decoding import OLDEST, Form, Means, Place, Sliced
from ccompile.forms import Bitmask, Blocks, Codebook, Outliers, Plain, Sparse

LEVELS = 256  # most values of one codebook


def codebook(array: Array, means: Means, sliced: Sliced | None = None) -> Codebook | None:
    """Return an array as codes into its distinct values, of the whole or of each slice; None if they are too many."""
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        return None
    bits = _bits(array)
    if sliced is None:
        levels, codes = np.unique(bits, return_inverse=True)
        if len(levels) > LEVELS:
            return None
        found = levels.view(array.dtype)
        return Codebook(found, codes.reshape(array.shape).astype(np.uint8), array.shape, means)
    cube = bits.reshape(sliced.shape)
    order = np.argsort(cube, axis=1, kind="stable")
    ranked = np.take_along_axis(cube, order, 1)
    step = np.concatenate([np.zeros((sliced.a, 1, sliced.c), bool), ranked[:, 1:] != ranked[:, :-1]], axis=1)
    rank = np.cumsum(step, axis=1)
    most = int(rank.max()) + 1
    if most > LEVELS:
        return None
    tables = np.zeros((sliced.a, most, sliced.c), bits.dtype)
    np.put_along_axis(tables, rank, ranked, 1)
    cells = np.empty_like(rank)
    np.put_along_axis(cells, order, rank, 1)
    return Codebook(tables.view(array.dtype), cells.astype(np.uint8), array.shape, means)


def blocks(array: Array, means: Means, size: int, turned: bool = False) -> Blocks | None:
    """Return an array as codes into the distinct blocks of `size` weights of its rows, or of its columns if `turned`.

    None if they are too many.
    """
    rows = np.ascontiguousarray(array.T if turned else array.reshape(len(array), -1))
    bits = _bits(rows).reshape(-1, size)
    _, first, codes = np.unique(bits, axis=0, return_index=True, return_inverse=True)
    if len(first) > LEVELS:
        return None
    vectors = rows.reshape(-1, size)[first]
    return Blocks(vectors, codes.reshape(len(rows), -1).astype(np.uint8), array.shape, turned, means)


def outliers(array: Array, means: Means, count: int) -> Outliers | None:
    """Return an array as codes into its `count` most frequent values and the others by place; None if none is left."""
    bits = _bits(array).ravel()
    values, inverse, often = np.unique(bits, return_inverse=True, return_counts=True)
    frequent = np.argsort(-often, kind="stable")[: min(count, LEVELS)]
    where = np.flatnonzero(~np.isin(inverse, frequent))
    if not where.size:
        return None
    filled = bits.copy()
    filled[where] = values[frequent[0]]
    table = codebook(filled.view(array.dtype).reshape(array.shape), means)
    assert table is not None
    return Outliers(table, where, array.ravel()[where])


def bitmask(array: Array, means: Means) -> Bitmask | None:
    """Return an array as a mask and its values; None when no value is +0."""
    mask = _bits(array) != 0
    if mask.all():
        return None
    values = np.concatenate([np.zeros(1, array.dtype), array[mask]])
    return Bitmask(mask, min_form([Plain(values), codebook(values, means)]))


def sparse(array: Array) -> Sparse | None:
    """Return an array as a sparse initializer; None when it has a -0, which that would lose, or is of another type."""
    if array.dtype not in (np.float32, np.float64) or (_bits(array)[array == 0] != 0).any() or not array.any():
        return None
    return Sparse(array)


def smallest(array: Array, means: Means, sliced: Sequence[Sliced] = (), more: Sequence[Form] = ()) -> Form:
    """Return the form of fewest bytes that gives an array back bit by bit; `more`: others that do."""
    if means.opset < OLDEST or array.dtype.name not in ("float16", "float32", "float64"):
        return min_form([Plain(array), *more])
    tables = [codebook(array, means, each) for each in (None, *sliced)]
    forms = [*tables, bitmask(array, means), sparse(array), *more]
    return min_form([Plain(array), *(form for form in forms if form is not None and all(map(means.runs, form.ops)))])


def min_form(forms: Sequence[Form | None]) -> Form:
    """Return the form of fewest bytes, of equals the first."""
    return min((form for form in forms if form is not None), key=lambda form: form.nbytes)


def _bits(array: Array) -> Array:
    """Return the bits of floats as unsigned integers: -0 and 0 differ."""
    return np.ascontiguousarray(array).view(f"u{array.itemsize}").reshape(array.shape)


def replace_weight(node: ir.Node, index: int, form: Form, means: Means) -> ir.Value:
    """Let a node read a weight in another form, under the weight's name; what only held the old one goes."""
    old = node.inputs[index]
    assert old is not None
    held = graph.constant(old)
    assert held is not None
    if isinstance(form, Plain):
        return old
    found = form.put(Place(node, means))
    found.shape, found.type = ir.Shape(held.shape), ir.TensorType(ir.DataType.from_numpy(held.dtype))
    node.replace_input_with(index, found)
    main, name = node.graph, str(old.name)
    assert isinstance(main, ir.Graph)
    if old.is_initializer() and not list(old.uses()) and not old.is_graph_output():
        main.initializers.pop(name)
        if not found.is_initializer():
            found.name = name
    return found


def replace_value(value: ir.Value, form: Form, means: Means) -> ir.Value:
    """Let all readers of an initializer of the main graph read it in another form, under its name."""
    held, name, main = graph.constant(value), str(value.name), value.graph
    assert held is not None
    assert isinstance(main, ir.Graph)
    readers = {use.node for use in value.uses()}
    first = next(node for node in main if node in readers)
    found = form.put(Place(first, means))
    found.shape, found.type = ir.Shape(held.shape), ir.TensorType(ir.DataType.from_numpy(held.dtype))
    value.replace_all_uses_with(found)
    main.initializers.pop(name)
    if not found.is_initializer():
        found.name = name
    return found


def is_lossless(value: ir.Value | None) -> bool:
    """Return whether a weight that one node reads stands in a form that gives back every bit, as those here."""
    chain = graph.stored_chain(value)
    if value is None or not chain or len(list(value.uses())) > 1 or value.is_graph_output():
        return False
    return all(node.op_type in _DECODERS for node in chain)


_DECODERS = frozenset(
    {
        "BitShift",
        "Mod",
        "Cast",
        "Reshape",
        "Slice",
        "Mul",
        "MatMulInteger",
        "Gather",
        "GatherElements",
        "ScatterElements",
        "CumSum",
        "Range",
        "Add",
        "Transpose",
    }
)


def stored_bytes(value: ir.Value | None) -> int:
    """Return the bytes of all that a constant value is made of."""
    leaves: dict[ir.Value, int] = {}
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if each is None or each in leaves:
            continue
        tensor = graph.stored(each)
        if tensor is not None:
            leaves[each] = int(tensor.nbytes)
        elif (node := each.producer()) is not None:
            waiting += list(node.inputs)
    return sum(leaves.values())
