"""Write units of a graph on integer codes: (De)QuantizeLinear around kernels, other ops on codes themselves.

Activations are uint8 with one scale, weights int8 with a scale per channel or one, biases int32 with the product of the
scales. A runtime that knows the pattern runs QLinearConv and the like; any other computes the same in float.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ccompile import graph
from ccompile.analysis import integers, linear
from ccompile.analysis.integers import Unit
from ccompile.analysis.shapes import Shapes
from ccompile.core import Array
from ccompile.moments import Layer
from ccompile.numerics.ranges import Grid, grid


@dataclass(frozen=True, eq=False)
class Weights:
    """A layer's weight on its grid: codes[g, o, d] in int8, scale[g, o] and bias[g, o] in float64.

    `whole`: the weight has one scale, not one per channel.
    """

    form: Layer
    codes: Array
    scale: Array
    bias: Array
    whole: bool = False

    @property
    def values(self) -> Array:
        """Return what the codes stand for [g, o, d]."""
        product: Array = self.codes * self.scale[:, :, None]
        return product


@dataclass(frozen=True, eq=False)
class Plan:
    """What to write: the units by name, a grid for each value that may become codes, the layers' weights.

    A layer of no weights keeps its own, in float. `apart`: what no unit absorbs (see integers.units).
    """

    chosen: frozenset[str]
    grids: Mapping[str, Grid]
    weights: Mapping[str, Weights]
    apart: frozenset[str] = frozenset()


def raw_grid(unit: Unit, result: Grid) -> Grid | None:
    """Return the grid of r where scale r + shift has the grid `result`; None where its zero is none of the codes."""
    scale = float(np.float32(result.scale / unit.scale))
    zero = result.zero + round(unit.shift / result.scale)
    return Grid(scale, zero, result.levels) if 0 <= zero < result.levels else None


def encode(model: ir.Model, plan: Plan, types: Shapes) -> dict[str, str]:
    """Rewrite the chosen units in place; return, by unit, the value that holds its result in float, or nothing."""
    found = [unit for unit in integers.units(model.graph, types, plan.apart) if isinstance(unit, Unit)]
    return _Writer(model.graph, plan).write([unit for unit in found if unit.name in plan.chosen])


@dataclass
class _Writer:
    main: ir.Graph
    plan: Plan
    codes: dict[ir.Value, tuple[ir.Value, Grid]] = field(default_factory=dict)
    constants: dict[tuple[float, int], tuple[ir.Value, ir.Value]] = field(default_factory=dict)
    stored: dict[tuple[str, bytes], ir.Value] = field(default_factory=dict)
    encoded: list[ir.Value] = field(default_factory=list)  # what is codes where it was float
    integer: set[ir.Node] = field(default_factory=set)  # what reads codes, or makes them of a kernel's result

    def write(self, units: list[Unit]) -> dict[str, str]:
        readers = {value for unit in units for value in unit.inputs}
        raws = {unit.name: unit.node.outputs[0] for unit in units}
        for unit in units:
            if unit.kind == "move":
                self._move(unit)
                continue
            self._decode_inputs(unit)
            if not unit.writes_float or readers & set(unit.outputs):
                self._encode_output(unit)
        self._finish()
        graph.remove_dead(self.main)
        return {name: str(raw.name) if raw.graph is self.main else "" for name, raw in raws.items()}

    # ------------------------------------------------------------------------------------------ units

    def _move(self, unit: Unit) -> None:
        source = unit.node.inputs[0]
        assert source is not None
        code, at = self._code(source)
        unit.node.replace_input_with(0, code)
        if unit.node.op_type == "Pad":
            graph.replace_constant(unit.node, 2, np.array(at.zero, np.uint8))
        self.integer.add(unit.node)
        for output in unit.outputs:
            self.codes[output] = output, at
            self.encoded.append(output)
            output.type = ir.TensorType(ir.DataType.UINT8)

    def _decode_inputs(self, unit: Unit) -> None:
        node = unit.node
        for at in unit.data:
            value = node.inputs[at]
            assert value is not None
            constant = graph.constant(value)
            if constant is None:
                code, where = self._code(value)
            else:
                where = grid(float(constant.min(initial=0)), float(constant.max(initial=0)))
                code = graph.add_constant(self.main, f"{value.name}_codes", where.encode(constant))
            node.replace_input_with(at, self._decoder(node, code, where).outputs[0])
            if unit.name in self.plan.weights:
                self._encode_layer(unit, where)

    def _encode_layer(self, unit: Unit, source: Grid) -> None:
        """Give a layer its weight and bias in integers; alpha and beta of a Gemm go into them."""
        node, known = unit.node, self.plan.weights[unit.name]
        form, weight = known.form, node.inputs[known.form.weight]
        assert weight is not None
        scale = known.scale.reshape(-1)[:1].reshape(()) if known.whole else known.scale.reshape(-1)
        axis = {} if known.whole else {"axis": 0 if form.op == "Conv" or form.wide else 1}
        codes = self._constant(str(weight.name), linear.arranged(form, known.codes).astype(np.int8))
        step = graph.add_constant(self.main, f"{node.name}_scale", scale.astype(np.float32))
        inputs = [codes, step, self._constant("zeros", np.zeros(scale.shape, np.int8))]  # QGemm asks for zeros
        wide = graph.add_node("DequantizeLinear", inputs, axis, before=node, base=f"{node.name}_weight")
        node.replace_input_with(form.weight, wide.outputs[0])
        node.attributes.pop("alpha", None)
        node.attributes.pop("beta", None)
        if form.op != "MatMul" and (known.bias.any() or len(node.inputs) > 2):
            self._encode_bias(node, known, scale.astype(np.float32).astype(np.float64) * source.scale)

    def _encode_bias(self, node: ir.Node, known: Weights, scale: Array) -> None:
        step = scale.astype(np.float32)
        codes = np.rint(known.bias.reshape(-1) / step.astype(np.float64)).astype(np.int32)
        inputs = [
            graph.add_constant(self.main, f"{node.name}_bias_codes", codes),
            graph.add_constant(self.main, f"{node.name}_bias_scale", step),
        ]
        axis = {"axis": 0} if step.ndim else {}
        bias = graph.add_node("DequantizeLinear", inputs, axis, before=node, base=f"{node.name}_bias")
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, bias.outputs[0])

    def _encode_output(self, unit: Unit) -> None:
        (result,) = unit.outputs
        at = self.plan.grids[str(result.name)]
        raw = raw_grid(unit, at)
        assert raw is not None
        coder = self._after(unit.node, "QuantizeLinear", [unit.node.outputs[0], *self._grid(raw)], unit.name)
        self.codes[result] = coder.outputs[0], at
        self.encoded.append(result)
        self.integer.add(coder)

    # ------------------------------------------------------------------------------------------ values

    def _code(self, value: ir.Value) -> tuple[ir.Value, Grid]:
        """Return the codes of a value, made where the value is made if they are not there yet."""
        if value not in self.codes:
            at, producer = self.plan.grids[str(value.name)], value.producer()
            inputs, base = [value, *self._grid(at)], str(value.name)
            if producer is None:
                first = next(iter(self.main))
                coder = graph.add_node("QuantizeLinear", inputs, before=first, base=f"{base}_quantize")
            else:
                coder = self._after(producer, "QuantizeLinear", inputs, base)
            self.codes[value] = coder.outputs[0], at
        return self.codes[value]

    def _decoder(self, before: ir.Node, code: ir.Value, at: Grid) -> ir.Node:
        inputs = [code, *self._grid(at)]
        decoder = graph.add_node("DequantizeLinear", inputs, before=before, base=f"{before.name}_dequantize")
        self.integer.add(decoder)
        return decoder

    def _finish(self) -> None:
        """Let what still reads a value that has become codes read them through one DequantizeLinear."""
        for value in self.encoded:
            code, at = self.codes[value]
            floats = [use for use in value.uses() if use.node not in self.integer or use.idx]
            if not floats and not value.is_graph_output():
                continue
            coder = code.producer()
            assert coder is not None
            decoder = self._after(coder, "DequantizeLinear", [code, *self._grid(at)], str(value.name))
            for use in floats:
                use.node.replace_input_with(use.idx, decoder.outputs[0])
            if value.is_graph_output():
                _hand_over(value, decoder.outputs[0], self.main)

    def _after(self, node: ir.Node, op: str, inputs: list[ir.Value], base: str) -> ir.Node:
        word = "quantize" if op == "QuantizeLinear" else "dequantize"
        return graph.add_node(op, inputs, after=node, base=f"{base}_{word}")

    def _grid(self, at: Grid) -> tuple[ir.Value, ir.Value]:
        """Return the constants of a grid: those of equal grids are shared."""
        key = at.scale, at.zero
        if key not in self.constants:
            scale = graph.add_constant(self.main, "scale", np.array(at.scale, np.float32))
            self.constants[key] = scale, graph.add_constant(self.main, "zero", np.array(at.zero, np.uint8))
        return self.constants[key]

    def _constant(self, name: str, codes: Array) -> ir.Value:
        """Return the codes of a weight, or zeros of a shape: stored once, however many layers read them."""
        key = f"{name}{codes.shape}", codes.tobytes()
        if key not in self.stored:
            self.stored[key] = graph.add_constant(self.main, f"{name}_codes", codes)
        return self.stored[key]


def _hand_over(old: ir.Value, new: ir.Value, main: ir.Graph) -> None:
    """Let `new` be the graph output that `old` was, under its name."""
    name, new.type, new.shape = str(old.name), ir.TensorType(ir.DataType.FLOAT), old.shape
    for index, value in enumerate(main.outputs):
        if value is old:
            main.outputs[index] = new
    old.name = graph.fresh_name(main, f"{name}_inner")
    new.name = name
