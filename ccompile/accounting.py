"""What a packed model is made of, in the survey's terms: bits per weight, and what indices, codebooks and zeros cost.

For a tensor of n weights with K distinct values, h of them not the commonest one:
    index      n ceil(log2 K) bits                   codebook     bytes of the values that the indices stand for
    entropy H  bits per weight of any coder of single symbols, and Huffman's L, H <= L < H + 1
    relative   (entries) (gap + ceil(log2 (K - 1))) bits: Deep Compression's sparse form, gaps of 5 or of 8 bits
Source: Cheng et al. 2017, arXiv:1710.09282, section II; Han et al. 2016, arXiv:1510.00149, sections 2 to 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir

from ccompile import views
from ccompile.numerics.huffman import average_length, entropy, relative_entries

if TYPE_CHECKING:
    from ccompile.core import Array
    from ccompile.splice import Cut

FLOAT32 = 4  # bytes of a weight that is not compressed
_GAPS = (5, 8)  # bits, in Deep Compression for dense layers and for convolutions
_MOST_SYMBOLS = 1 << 16  # beyond these an order-0 code says nothing
_SAMPLE = 1 << 17  # elements looked at to see that there are more
_INDEX_BITS = 8  # integers up to these bits stand for weights; wider ones are shapes and positions


class Symbols(NamedTuple):
    """The distinct elements of a tensor: how many, the share of the commonest, and what order-0 coders make of them."""

    distinct: int
    commonest: float
    entropy: float
    huffman: float
    relative: int


@dataclass(frozen=True)
class TensorAccount:
    """One tensor's bytes as they are, in theory and packed. Bytes of codebooks count at the tensors that index them."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    is_weight: bool
    bytes_given: int
    bytes_packed: int
    bytes_codebook: int
    form: str
    symbols: Symbols | None

    @property
    def bits(self) -> float:
        """Return the packed bits per element."""
        return 8 * self.bytes_packed / self.elements if self.elements else 0.0

    @property
    def bytes_index(self) -> int:
        """Return the bytes of indices of equal length, or 0 when there are too many values for indices."""
        return -(-self.elements * _index_bits(self.symbols.distinct) // 8) if self.symbols else 0


@dataclass(frozen=True)
class Account:
    """All of a packed model. weights: how many the model stands for; bytes_structure: nodes, names, small tensors."""

    tensors: tuple[TensorAccount, ...]
    weights: int
    bytes_model: int
    bytes_packed: int
    bytes_structure: int
    bytes_container: int

    @property
    def ratio(self) -> float:
        """Return the bytes of the weights as float32 over those of the packed file."""
        return FLOAT32 * self.weights / self.bytes_packed

    @property
    def bits(self) -> float:
        """Return the bits of the packed file for each weight."""
        return 8 * self.bytes_packed / self.weights if self.weights else 0.0

    @property
    def ratio_model(self) -> float:
        """Return the bytes of the model, external data included, over those of the packed file."""
        return self.bytes_model / self.bytes_packed


def _index_bits(distinct: int) -> int:
    return max(distinct - 1, 1).bit_length()


def symbols_of(data: Array, width: int, count: int) -> Symbols | None:
    """Return the symbols of `count` elements of `width` bits in data[n] uint8.

    None when there are too many to be told apart by indices: more than 65536, or more than every other element.
    """
    elements = views.elements_of(data, width)[:count]
    if not elements.size or np.unique(elements[:_SAMPLE]).size > _MOST_SYMBOLS:
        return None
    values, counts = np.unique(elements, return_counts=True)
    if values.size > (_MOST_SYMBOLS if width <= _INDEX_BITS else min(count // 2, _MOST_SYMBOLS)):
        return None
    other = elements != values[counts.argmax()]
    bits = _index_bits(values.size - 1)
    relative = min(-(-relative_entries(other, gap) * (gap + bits) // 8) for gap in _GAPS)
    return Symbols(int(values.size), float(counts.max() / count), entropy(counts), average_length(counts), relative)


def account_of(
    cut: Cut, packed: int, form: str, codebook: int = 0, width: int = 8, decoded: Sequence[int] = ()
) -> TensorAccount:
    """Return a tensor's account; packed: its bytes, codebook: those of the values that it indexes.

    decoded: the shape of the codes that its bytes hold, width: the bits of one where that does not tell. Few values
    that are stored as they are would have a codebook of their own.
    """
    data, count = np.frombuffer(cut.data, np.uint8), math.prod(decoded or cut.shape)
    told = 8 * data.size // count if decoded else cut.width
    width = told if told in views.WIDTHS else width
    held = data.size * 8 // width
    elements = count if (decoded or width == cut.width) and 0 <= count <= held else held
    symbols = symbols_of(data, width, elements)
    is_weight = cut.is_float or cut.dtype in _INDEX_TYPES
    if symbols is not None and cut.width > _INDEX_BITS:
        codebook = symbols.distinct * cut.width // 8
    return TensorAccount(
        cut.name, cut.dtype, cut.shape, elements, is_weight, data.size, packed, codebook, form, symbols
    )


_INDEX_TYPES = frozenset(
    kind.name
    for kind in ir.DataType
    if kind not in (ir.DataType.UNDEFINED, ir.DataType.STRING, ir.DataType.BOOL)
    and kind.is_integer()
    and kind.bitwidth <= _INDEX_BITS
)


# Where the codes are among the inputs of what decodes them, as `decoding.unpacked` writes it.
_DECODING = {"Cast": 0, "Reshape": 0, "Identity": 0, "Slice": 0, "BitShift": 0, "Mod": 0, "MatMulInteger": 1}
_LOOKUPS = ("Gather", "GatherElements")


def _origins(model: onnx.ModelProto) -> dict[str, str]:
    """Return the initializer that each value is decoded from, initializers themselves included."""
    origin = {tensor.name: tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:  # in topological order
        place = _DECODING.get(node.op_type, len(node.input))
        if place < len(node.input) and node.input[place] in origin:
            origin[node.output[0]] = origin[node.input[place]]
    return origin


def codebooks(model: onnx.ModelProto) -> Mapping[str, frozenset[str]]:
    """Return for each tensor of indices or integers the tensors that say what they stand for.

    Indices: Gather(codebook, decoded indices). Integers: DequantizeLinear's scales and zeros.
    """
    origin = _origins(model)
    found: dict[str, frozenset[str]] = {}
    for node in model.graph.node:
        known = [origin[name] for name in node.input if name in origin]
        if node.op_type in _LOOKUPS and len(known) == 2:
            found[known[1]] = frozenset(known[:1])
        elif node.op_type == "DequantizeLinear" and node.input[0] in origin:
            found[known[0]] = frozenset(known[1:])
    return found


def _tools(node: onnx.NodeProto) -> list[str]:
    """Return what decodes codes beside them: shifts, bases and powers."""
    if node.op_type not in ("BitShift", "Mod", "MatMulInteger"):
        return []
    return [name for place, name in enumerate(node.input) if place != _DECODING[node.op_type]]


def decoded_shapes(model: onnx.ModelProto) -> Mapping[str, tuple[int, ...]]:
    """Return for each tensor whose bytes may hold several codes the shape of the codes: the last Reshape's there."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    origin = _origins(model)
    found: dict[str, tuple[int, ...]] = {}
    for node in model.graph.node:
        data, shape = (*node.input, "", "")[:2]
        if node.op_type != "Reshape" or data not in origin or shape not in stored:
            continue
        if stored[origin[data]].data_type == onnx.TensorProto.UINT8 and stored[shape].HasField("raw_data"):
            found[origin[data]] = tuple(onnx.numpy_helper.to_array(stored[shape]).reshape(-1).tolist())
    return {name: shape for name, shape in found.items() if min(shape, default=0) > 0}


def weights_in(model: onnx.ModelProto) -> int:
    """Return how many weights a model's tensors stand for: floats, and integers up to 8 bits, of initializers and
    Constant nodes in all graphs and functions; codebooks, scales and zero points are not counted.
    """
    decoders = {name for node in model.graph.node for name in _tools(node)}.union(*codebooks(model).values())
    decoded = decoded_shapes(model)
    return sum(
        math.prod(decoded.get(name, tensor.dims))
        for name, tensor in _tensors(model)
        if name not in decoders and _is_weight(tensor.data_type)
    )


def _tensors(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    graphs, nodes = [model.graph], [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from ((tensor.name, tensor) for tensor in graph.initializer)
            for sparse in graph.sparse_initializer:
                yield sparse.values.name, onnx.TensorProto(dims=sparse.dims, data_type=sparse.values.data_type)
            nodes += graph.node
        for node in nodes:
            for attribute in node.attribute:
                graphs += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
                if node.op_type == "Constant" and attribute.name == "value":
                    yield node.output[0], attribute.t
        nodes = []


def _is_weight(data_type: int) -> bool:
    if data_type not in ir.DataType.__members__.values():
        return False
    kind = ir.DataType(data_type)
    return kind.name in _INDEX_TYPES or (bool(data_type) and kind.is_floating_point())


def bytes_of(names: Iterable[str], model: onnx.ModelProto) -> int:
    """Return the bytes of named initializers."""
    wanted = set(names)
    found = (tensor for tensor in model.graph.initializer if tensor.name in wanted)
    return sum(math.ceil(math.prod(tensor.dims) * _bits(tensor) / 8) for tensor in found)


def _bits(tensor: onnx.TensorProto) -> int:
    known = tensor.data_type in ir.DataType.__members__.values() and tensor.data_type != onnx.TensorProto.STRING
    return ir.DataType(tensor.data_type).bitwidth if known and tensor.data_type else 0
