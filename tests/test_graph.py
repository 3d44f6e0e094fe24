"""Functions on graphs: what survives load and save, what is refused, constants behind ops, and rewiring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Net, mlp
from onnx import helper, numpy_helper

from ccompile import graph, onnx_io, runtime
from ccompile.core import Array
from ccompile.errors import ModelError

SETTINGS = runtime.Settings(threads=1)


def text(source: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(source)


def loaded(source: str | onnx.ModelProto) -> ir.Model:
    return onnx_io.from_proto(text(source) if isinstance(source, str) else source)[0]


def refusal(source: str | onnx.ModelProto) -> str:
    with pytest.raises(ModelError) as caught:
        loaded(source)
    return str(caught.value)


HEAD = '<ir_version: 8, opset_import: ["" : 17]>\n'


# ------------------------------------------------------------------------------------------------ what survives


IF = (
    HEAD
    + """
g (float[N] x, bool c) => (float[N] y) {
  k = Constant<value = float[1] {2.0}> ()
  y = If (c) <then_branch = t () => (float[N] a) { a = Mul (x, k) }, else_branch = e () => (float[N] b) { b = Neg (x) }>
}"""
)
LOOP = (
    HEAD
    + """
g (float[2] x, int64 n) => (float[2] y, float[K, 2] all) {
  t = Constant<value = bool {1}> ()
  y, all = Loop (n, t, x) <body = b (int64 i, bool c, float[2] s) => (bool d, float[2] u, float[2] v) {
    d = Identity (c)
    u = Add (s, x)
    v = Identity (u)
  }>
}"""
)
SCAN = (
    HEAD
    + """
g (float[2] x, float[K, 2] xs) => (float[2] y, float[K, 2] all) {
  y, all = Scan <num_scan_inputs = 1, body = b (float[2] s, float[2] e) => (float[2] u, float[2] v) {
    u = Add (s, e)
    v = Identity (u)
  }> (x, xs)
}"""
)
FUNCTION = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
g (float[N] x) => (float[N] y) { y = local.Scale <by = 3.0> (x) }
<domain: "local", opset_import: ["" : 17]>
Scale <by> (x) => (y) { k = Constant<value_float : float = @by> () y = Mul (x, k) }
"""
OPTIONAL = (
    HEAD
    + """
g (optional(float[N]) x) => (bool y) { y = OptionalHasElement (x) }"""
)
SEQUENCE = (
    HEAD
    + """
g (seq(float[N]) x, int64 at) => (float[N] y, seq(float[N]) z) { y = SequenceAt (x, at)  z = SequenceErase (x, at) }"""
)
STRINGS = (
    HEAD
    + """
g (string[N] x) => (string[M] y) <string[2] w = {"a", "bc"}> { y = Concat<axis = 0> (x, w) }"""
)
CUSTOM = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1, "unknown.domain" : 3]>
g (float[N] x) => (float[N] y) { z = com.microsoft.Gelu (x)  y = unknown.domain.Thing<a = 1, b = "c"> (z) }"""
BARE = (
    HEAD
    + """
g (x, y) => (z, y) { z = Add (x, y) }"""
)


@pytest.mark.parametrize(
    "source",
    [IF, LOOP, SCAN, FUNCTION, OPTIONAL, SEQUENCE, STRINGS, CUSTOM],
    ids=["if", "loop", "scan", "function", "optional", "sequence", "strings", "custom"],
)
def test_every_kind_of_graph_survives_load_and_save(source: str, tmp_path: Path) -> None:
    proto = text(source)
    for index, node in enumerate(proto.graph.node):
        node.name = f"n{index}"
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.doc_string = "what it is"
    proto.doc_string, proto.graph.doc_string, proto.domain, proto.model_version = "model", "graph", "d", 7
    proto.producer_name, proto.producer_version = "someone", "2"
    proto.metadata_props.add(key="author", value="me")
    proto.graph.node[0].doc_string = "node"
    proto.graph.node[0].metadata_props.add(key="k", value="v")
    (tmp_path / "in.onnx").write_bytes(proto.SerializeToString())
    onnx_io.save(onnx_io.load(tmp_path / "in.onnx").model, tmp_path / "out.onnx")
    back = onnx.load(tmp_path / "out.onnx")
    del back.graph.value_info[:]
    _sort(back)
    _sort(proto)
    assert back == proto


def _sort(proto: onnx.ModelProto) -> None:
    """Attributes and opset imports have no order; an empty domain is none."""

    def nodes(found: Any) -> None:
        for node in found:
            attributes = sorted(node.attribute, key=lambda a: a.name)
            del node.attribute[:]
            node.attribute.extend(attributes)
            if not node.domain:
                node.ClearField("domain")
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    nodes(attribute.g.node)

    nodes(proto.graph.node)
    for function in proto.functions:
        nodes(function.node)
    imports = sorted(proto.opset_import, key=lambda entry: entry.domain)
    del proto.opset_import[:]
    proto.opset_import.extend(imports)


@pytest.mark.parametrize(
    "dtype",
    "bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz int4 uint4 float4_e2m1fn".split(),
)
@pytest.mark.parametrize("size", [3, 5001])
def test_weights_of_types_that_numpy_lacks_survive(dtype: str, size: int, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 7, size).astype(getattr(ml_dtypes, dtype))
    tensor = numpy_helper.from_array(array, "w")
    x = helper.make_tensor_value_info("x", tensor.data_type, [size])
    proto = helper.make_model(
        helper.make_graph([helper.make_node("Concat", ["x", "w"], ["y"], name="n", axis=0)], "g", [x], [x], [tensor]),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=11,
    )
    proto.graph.output[0].name = "y"
    (tmp_path / "in.onnx").write_bytes(proto.SerializeToString())
    onnx_io.save(onnx_io.load(tmp_path / "in.onnx").model, tmp_path / "out.onnx")
    (back,) = onnx.load(tmp_path / "out.onnx").graph.initializer
    assert back.data_type == tensor.data_type
    np.testing.assert_array_equal(numpy_helper.to_array(back).astype(np.float32), array.astype(np.float32))


def test_a_sparse_initializer_passes_through(tmp_path: Path) -> None:
    values = numpy_helper.from_array(np.array([1.0, 2.0], np.float32), "w")
    indices = numpy_helper.from_array(np.array([1, 4], np.int64), "w_indices")
    proto = text(HEAD + "g (float[2, 3] x) => (float[2, 3] y) { y = Add (x, w) }")
    proto.graph.sparse_initializer.add(values=values, indices=indices, dims=[2, 3])
    (tmp_path / "in.onnx").write_bytes(proto.SerializeToString())
    model = onnx_io.load(tmp_path / "in.onnx").model
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), [[0, 1, 0], [0, 2, 0]])
    onnx_io.save(graph.copy(model), tmp_path / "out.onnx")
    assert list(onnx.load(tmp_path / "out.onnx").graph.sparse_initializer) == list(
        onnx.load(tmp_path / "in.onnx").graph.sparse_initializer
    )
    x = np.ones((2, 3), np.float32)
    for path in ("in.onnx", "out.onnx"):
        np.testing.assert_array_equal(
            runtime.run_file(tmp_path / path, {"x": x}, SETTINGS)["y"], [[1, 2, 1], [1, 3, 1]]
        )


def test_names_and_order_of_inputs_and_outputs_stay() -> None:
    model = loaded(HEAD + "g (float[N] b, int64[2, M] a) => (int64[2, M] z, float[N] y) { z = Neg(a) y = Abs(b) }")
    assert graph.signature(model) == (
        ("b", "FLOAT", "[N]"),
        ("a", "INT64", "[2,M]"),
        ("z", "INT64", "[2,M]"),
        ("y", "FLOAT", "[N]"),
    )
    assert graph.signature(graph.copy(model)) == graph.signature(model)


def test_initializers_listed_as_inputs_become_constants_with_a_note() -> None:
    proto = text(
        "<ir_version: 3, opset_import: ['' : 9]>".replace("'", '"')
        + """
g (float[N] x, float[1] w) => (float[N] y) <float[1] w = {2.0}> { y = Mul (x, w) }"""
    )
    model, notes = onnx_io.from_proto(proto)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert list(model.graph.initializers) == ["w"]
    assert notes == ("1 initializers listed as graph inputs are now constants",)
    assert not onnx_io.check(model)
    assert onnx_io.from_proto(text(IF))[1] == ()


def test_missing_and_duplicate_node_names_become_unique_and_others_stay() -> None:
    proto = text(HEAD + "g (float[N] x) => (float[N] e) { a = Neg(x) b = Abs(a) c = Exp(b) d = Neg(c) e = Abs(d) }")
    for node, name in zip(proto.graph.node, ["same", "same", "", "Exp_c", "same_1"], strict=True):
        node.name = name
    assert [node.name for node in loaded(proto).graph] == ["same", "same_2", "Exp_c_1", "Exp_c", "same_1"]


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("version", [6, 7, 17, onnx.defs.onnx_opset_version(), onnx.defs.onnx_opset_version() + 1])
def test_opsets_older_than_7_or_newer_than_onnx_are_refused(version: int) -> None:
    proto = text(HEAD + "g (float[N] x) => (float[N] y) { y = Relu (x) }")
    proto.opset_import[0].version = version
    if 7 <= version <= onnx.defs.onnx_opset_version():
        loaded(proto)
    else:
        assert f"opset {version} is outside" in refusal(proto)


def test_a_model_without_opset_is_refused_if_it_needs_one() -> None:
    proto = text(HEAD + "g (float[N] x) => (float[N] y) { y = Relu (x) }")
    del proto.opset_import[:]
    assert "does not say which opset" in refusal(proto)
    proto.opset_import.add(domain="ai.onnx", version=17)
    loaded(proto)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("{ y = Neg (x) y = Abs (x) }", "y"),
        ("{ x = Neg (x) y = Abs (x) }", "x"),
        ("<float[1] w = {1.0}> { w = Neg (x) y = Abs (w) }", "w"),
        ("<float[1] w = {1.0}, float[1] w = {2.0}> { y = Mul (x, w) }", "w"),
    ],
)
def test_a_name_defined_twice_is_refused(body: str, name: str) -> None:
    assert f"`{name}` is defined more than once" in refusal(HEAD + f"g (float[N] x) => (float[N] y) {body}")


def test_an_output_that_nothing_produces_is_refused() -> None:
    assert "`y` is produced by no node" in refusal(HEAD + "g (float[N] x) => (float[N] y) { z = Neg (x) }")


_BRANCHES = (
    "{ y = If (c) <then_branch = t () => (%s) { %s = Neg (x) }, else_branch = e () => (b) { b = Abs (ghost) }> }"
)


@pytest.mark.parametrize(
    ("body", "node"),
    [("{ y = Add (x, ghost) }", "Add"), (_BRANCHES % ("a", "a"), "Abs"), (_BRANCHES % ("ghost", "ghost"), "Abs")],
    ids=["main", "subgraph", "the other branch defines it"],
)
def test_an_input_that_nothing_defines_is_refused_with_its_node(body: str, node: str) -> None:
    source = HEAD + "g (float[N] x, bool c) => (float[N] y) " + body
    assert f"node `{node}` reads `ghost`, which nothing defines" in refusal(source)
    loaded(source.replace("Abs (ghost)", "Abs (x)").replace("Add (x, ghost)", "Add (x, x)"))


def test_names_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    whole = text(HEAD + "g (float[N] x) => (float[N] y) { aaaa = Neg (x) y = Abs (aaaa) }").SerializeToString()
    (tmp_path / "m.onnx").write_bytes(whole.replace(b"aaaa", b"aa\xb1a"))
    with pytest.raises(ModelError):
        onnx_io.load(tmp_path / "m.onnx")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [4, 40])
def test_a_weight_that_is_not_finite_is_refused_with_its_node(bad: float, size: int, tmp_path: Path) -> None:
    net = Net(0)
    W = np.ones((size, size), np.float32)
    W[1, 2] = bad
    y = net.node("MatMul", net.input("x", ["N", size]), net.constant(W, "w"), name="/fc1")
    (tmp_path / "m.onnx").write_bytes(ir.to_proto(net.model(y)).SerializeToString())
    with pytest.raises(ModelError, match=r"weight `w` of node `/fc1` has NaN or infinity"):
        onnx_io.load(tmp_path / "m.onnx")


@pytest.mark.parametrize("behind", [False, True])
def test_a_weight_in_a_constant_node_that_is_not_finite_is_refused(behind: bool, tmp_path: Path) -> None:
    net = Net(0)
    W = ir.tensor(np.full((4, 4), np.nan, np.float32))
    w = net.node("Constant", value=W, name="w")
    w = net.node("Transpose", w, perm=[1, 0], name="t") if behind else w
    y = net.node("MatMul", net.input("x", ["N", 4]), w, name="/fc1")
    (tmp_path / "m.onnx").write_bytes(ir.to_proto(net.model(y)).SerializeToString())
    with pytest.raises(ModelError, match=r"of node `/fc1` has NaN or infinity"):
        onnx_io.load(tmp_path / "m.onnx")


def test_infinity_outside_weights_is_no_reason_to_refuse(tmp_path: Path) -> None:
    net = Net(0)
    y = net.node("Add", net.input("x", ["N", 2]), net.constant(np.array([0, -np.inf], np.float32), "mask"))
    (tmp_path / "m.onnx").write_bytes(ir.to_proto(net.model(y)).SerializeToString())
    onnx_io.load(tmp_path / "m.onnx")


# ------------------------------------------------------------------------------------------------ constants


CONSTANTS = {
    "identity": "w = Identity (q)",
    "cast": "w = Cast<to = 10> (q)",
    "cast_rounds_to_bfloat16": "h = Cast<to = 16> (q) w = Cast<to = 1> (h)",
    "cast_to_int_truncates": "t = Constant<value = float {100.4}>() s = Mul (q, t) w = Cast<to = 6> (s)",
    "transpose": "w = Transpose (q)",
    "transpose_perm": "w = Transpose<perm = [1, 0]> (q)",
    "reshape": "s = Constant<value = int64[2] {3, -1}>() w = Reshape (q, s)",
    "reshape_zero": "s = Constant<value = int64[3] {0, 2, -1}>() w = Reshape (q, s)",
    "squeeze": "a = Constant<value = int64[1] {1}>() s = Constant<value = int64[3] {4, 1, 6}>() "
    "r = Reshape (q, s) w = Squeeze (r, a)",
    "squeeze_all": "s = Constant<value = int64[4] {1, 4, 1, 6}>() r = Reshape (q, s) w = Squeeze (r)",
    "unsqueeze": "a = Constant<value = int64[2] {0, -1}>() w = Unsqueeze (q, a)",
    "filled": "s = Constant<value = int64[2] {2, 3}>() w = ConstantOfShape<value = float[1] {1.5}> (s)",
    "filled_by_default": "s = Constant<value_ints = [2, 3]>() w = ConstantOfShape (s)",
    "per_tensor": "s = Constant<value = float {0.1}>() z = Constant<value = uint8 {3}>() "
    "w = DequantizeLinear (u, s, z)",
    "per_tensor_without_zero": "s = Constant<value_float = 0.1>() w = DequantizeLinear (u, s)",
    "per_tensor_of_one": "s = Constant<value = float[1] {0.1}>() w = DequantizeLinear (u, s)",
    "per_axis": "s = Constant<value = float[4] {0.1, 0.2, 0.3, 7.0}>() z = Constant<value = uint8[4] {0, 1, 2, 255}>() "
    "w = DequantizeLinear<axis = 0> (u, s, z)",
    "per_last_axis": "s = Constant<value_floats = [0.1, 0.2, 0.3, 7.0, 1.0, 2.0]>() "
    "w = DequantizeLinear<axis = -1> (u, s)",
    "per_axis_by_default": "s = Constant<value_floats = [0.1, 0.2, 0.3, 7.0, 1.0, 2.0]>() w = DequantizeLinear (u, s)",
    "blocked": "s = Constant<value = float[4, 2] {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8}>() "
    "z = Constant<value = uint8[4, 2] {1, 2, 3, 4, 5, 6, 7, 8}>() "
    "w = DequantizeLinear<axis = 1, block_size = 3> (u, s, z)",
    "blocked_first_axis": "s = Constant<value = float[2, 6] "
    "{0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 3.0}>() "
    "w = DequantizeLinear<axis = 0, block_size = 2> (u, s)",
    "int32": "s = Constant<value = float {0.5}>() w = DequantizeLinear (i, s)",
    "chain": "s = Constant<value_float = 0.1>() d = DequantizeLinear (u, s) t = Transpose (d) w = Identity (t)",
}


@pytest.mark.parametrize("body", CONSTANTS.values(), ids=CONSTANTS)
def test_a_constant_behind_ops_is_what_the_runtime_computes(body: str) -> None:
    proto = text('<ir_version: 10, opset_import: ["" : 21]> g () => (w) {' + body + "}")
    rng = np.random.default_rng(0)
    arrays: dict[str, Array] = {
        "q": rng.standard_normal((4, 6)).astype(np.float32),
        "u": rng.integers(0, 256, (4, 6)).astype(np.uint8),
        "i": rng.integers(-1000, 1000, (4, 6)).astype(np.int32),
    }
    for name, array in arrays.items():
        if any(name in node.input for node in proto.graph.node):
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
    model = loaded(proto)
    (value,) = model.graph.outputs
    (expected,) = runtime.evaluate([value], SETTINGS)
    found = graph.constant(value)
    assert found is not None
    assert graph.is_constant(value)
    assert found.dtype == expected.dtype
    assert graph.static_shape(value) == expected.shape
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="read-only"):
        found[...] = 0


@pytest.mark.parametrize("bits", ["int4", "uint4"])
def test_a_4_bit_weight_behind_dequantize_is_what_the_runtime_computes(bits: str) -> None:
    array = np.arange(24).reshape(4, 6) % 8
    proto = text('<ir_version: 10, opset_import: ["" : 21]> g () => (w) { s = Constant<value = float[4, 3] '
                 "{0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1., 2., 3.}>() "
                 "w = DequantizeLinear<axis = 1, block_size = 2> (q, s) }")  # fmt: skip
    proto.graph.initializer.append(numpy_helper.from_array(array.astype(getattr(ml_dtypes, bits)), "q"))
    (value,) = loaded(proto).graph.outputs
    np.testing.assert_array_equal(graph.constant(value), runtime.evaluate([value], SETTINGS)[0])


def test_what_depends_on_an_input_or_is_text_is_no_constant() -> None:
    model = loaded(HEAD + 'g (float[N] x) => (float[N] y, z) { y = Identity (x) z = Constant<value_string = "a"> () }')
    assert [graph.constant(value) for value in model.graph.outputs] == [None, None]
    assert graph.constant(model.graph.inputs[0]) is None
    assert graph.constant(None) is None


def weight_of(body: str, outputs: str = "float[4, 4] y") -> ir.Value:
    model = loaded(HEAD + f"g (float[4, 4] x) => ({outputs}) <float[4, 4] w, int8[4, 4] q> {{ {body} }}".replace(
        "<float[4, 4] w, int8[4, 4] q>",
        "<float[4, 4] w = {" + ", ".join(["1.0"] * 16) + "}, int8[4, 4] q = {" + ", ".join(["1"] * 16) + "}>",
    ))  # fmt: skip
    value = graph.node_named(model.graph, "MatMul_y").inputs[1]
    assert value is not None
    return value


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = MatMul (x, w)", ""),
        ("t = Transpose (w) y = MatMul (x, t)", ""),
        ("s = Constant<value_ints = [4, 4]>() t = ConstantOfShape (s) y = MatMul (x, t)", ""),
        ("y = MatMul (x, x)", "its weight is not constant"),
        ("t = Neg (w) y = MatMul (x, t)", "its weight is not constant"),
        ("z = Add (x, w) y = MatMul (z, w)", "its weight is shared"),
        ("t = Transpose (w) z = Add (x, t) y = MatMul (z, t)", "its weight is shared"),
        ("t = Transpose (w) z = Add (x, w) y = MatMul (z, t)", "its weight is shared"),
        ("t = Cast<to = 1> (q) y = MatMul (x, t)", "its weight is stored in a smaller form, behind Cast"),
        ("s = Constant<value_float = 0.5>() d = DequantizeLinear (q, s) t = Transpose (d) y = MatMul (x, t)",
         "its weight is stored in a smaller form, behind DequantizeLinear"),
    ],
)  # fmt: skip
def test_a_weight_that_must_stay_says_why(body: str, reason: str) -> None:
    assert graph.weight_refusal(weight_of(body)) == reason


def test_a_weight_that_is_an_output_is_shared() -> None:
    assert graph.weight_refusal(weight_of("t = Transpose (w) y = MatMul (x, t)", "float[4, 4] y, t")) == (
        "its weight is shared"
    )
    assert graph.weight_refusal(None) == "its weight is not constant"


def test_a_weight_that_a_subgraph_reads_is_shared() -> None:
    body = "c = Constant<value = bool {1}> () y = MatMul (x, w) z = If (c) <then_branch = t () => (a) { a = Neg (w) }, "
    value = weight_of(body + "else_branch = e () => (b) { b = Abs (x) }>", "float[4, 4] y, z")
    assert graph.weight_refusal(value) == "its weight is shared"


# ------------------------------------------------------------------------------------------------ rewiring


def run(model: ir.Model, **feeds: Array) -> runtime.Outputs:
    assert not onnx_io.check(model)
    return runtime.Session(model, SETTINGS).run(feeds)


X = np.array([1.0, -2.0], np.float32)


def chain() -> ir.Model:
    return loaded(HEAD + "g (float[N] x) => (float[N] y) { a = Neg (x) b = Identity (a) y = Identity (b) }")


def test_bypass_moves_the_readers() -> None:
    model = chain()
    node = graph.node_named(model.graph, "Identity_b")
    assert node.inputs[0] is not None
    assert graph.bypass(node, node.inputs[0])
    assert len(model.graph) == 2
    np.testing.assert_array_equal(run(model, x=X)["y"], -X)


def test_bypass_of_the_last_node_keeps_the_outputs_name() -> None:
    model = chain()
    before = graph.signature(model)
    for name in ("Identity_y", "Identity_b"):
        node = graph.node_named(model.graph, name)
        assert node.inputs[0] is not None
        assert graph.bypass(node, node.inputs[0])
    assert graph.signature(model) == before
    np.testing.assert_array_equal(run(model, x=X)["y"], -X)


@pytest.mark.parametrize(
    "body",
    [
        "(float[N] x) => (float[N] y) { y = Identity (x) }",
        "(float[N] x) => (float[N] a, float[N] y) { a = Neg (x) y = Identity (a) }",
        "(float[N] x) => (float[2] y, float[N] z) <float[2] w = {1.0, 2.0}> { y = Identity (w) z = Neg (x) }",
    ],
    ids=["input", "output", "initializer"],
)
def test_bypass_refuses_what_would_merge_two_ends_of_the_interface(body: str) -> None:
    model = loaded(HEAD + "g " + body)
    node = graph.node_named(model.graph, "Identity_y")
    assert node.inputs[0] is not None
    before = onnx_io.to_proto(model)[0]
    assert not graph.bypass(node, node.inputs[0])
    assert onnx_io.to_proto(model)[0] == before


def test_bypass_of_an_output_that_a_subgraph_and_a_node_read_too() -> None:
    model = loaded(
        HEAD
        + """
g (float[N] x, bool c) => (float[N] y, float[N] z, float[N] u) {
  a = Neg (x)
  y = Identity (a)
  z = Abs (y)
  u = If (c) <then_branch = t () => (float[N] p) { p = Mul (y, a) }, else_branch = e () => (float[N] q) { q = Exp (y) }>
}"""
    )
    before = run(model, x=X, c=np.array(True))
    node = graph.node_named(model.graph, "Identity_y")
    assert node.inputs[0] is not None
    assert graph.bypass(node, node.inputs[0])
    after = run(model, x=X, c=np.array(True))
    assert after.keys() == before.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


def test_absorb_and_replace_node_keep_the_outputs_name_and_type() -> None:
    model = loaded(HEAD + "g (float[N] x) => (float[N] y) { a = Neg (x) b = Abs (a) y = Exp (b) }")
    before = graph.signature(model)
    a = graph.node_named(model.graph, "Neg_a").outputs[0]
    graph.absorb(graph.node_named(model.graph, "Abs_b"), a)
    np.testing.assert_allclose(run(model, x=X)["y"], np.exp(-X), rtol=1e-6)
    last = graph.node_named(model.graph, "Exp_y")
    new = graph.add_node("Neg", [last.inputs[0]], before=last, base="fresh")
    graph.replace_node(last, new)
    assert graph.signature(model) == before
    assert new.name == "fresh"
    np.testing.assert_array_equal(run(model, x=X)["y"], X)


def test_remove_dead_keeps_what_subgraphs_and_outputs_read() -> None:
    model = loaded(
        HEAD
        + """
g (float[N] x, bool c, float[N] unused) => (float[N] y) <float[1] k = {2.0}, float[1] dead = {3.0}> {
  captured = Neg (x)
  gone = Abs (x)
  gone_too = Mul (gone, dead)
  y = If (c) <then_branch = t () => (float[N] p) { p = Mul (captured, k) }, else_branch = e () => (float[N] q) {
    q = If (c) <then_branch = t2 () => (float[N] r) { r = Identity (captured) },
                else_branch = e2 () => (float[N] s) { s = Neg (captured) }> }>
}"""
    )
    assert [node.name for node in graph.remove_dead(model.graph)] == ["Mul_gone_too", "Abs_gone"]
    assert list(model.graph.initializers) == ["k"]
    assert [value.name for value in model.graph.inputs] == ["x", "c", "unused"]
    np.testing.assert_array_equal(run(model, x=X, c=np.array(True), unused=X)["y"], -2 * X)


def test_a_fresh_name_is_in_no_subgraph_either() -> None:
    model = loaded(IF)
    taken = graph.names(model.graph)
    assert {"x", "c", "y", "k", "a", "b", "If_y"} <= taken
    for base in sorted(taken):
        assert graph.fresh_name(model.graph, base) not in taken
    assert graph.fresh_name(model.graph, "free") == "free"
    assert graph.fresh_name(model.graph, "free") == "free_1"


def test_a_fresh_name_is_in_no_subgraphs_inputs_or_initializers() -> None:
    model = loaded(
        LOOP.replace("(bool d, float[2] u, float[2] v) {", "(bool d, float[2] u, float[2] v) <float[1] m = {1.0}> {")
    )
    assert {"i", "s", "d", "u", "v", "m"} <= graph.names(model.graph)
    assert graph.fresh_name(model.graph, "m") == "m_1"


def test_two_copies_give_the_same_fresh_names() -> None:
    model = loaded(IF)
    assert graph.fresh_name(model.graph, "n") == "n"
    assert [graph.fresh_name(graph.copy(model).graph, "n") for _ in range(2)] == ["n", "n"]


def test_a_constant_added_cannot_be_written_and_is_apart_from_its_array() -> None:
    model, array = mlp(0), np.ones(3, np.float32)
    value = graph.add_constant(model.graph, "k", array)
    array[0] = 5
    assert value.const_value is not None
    np.testing.assert_array_equal(value.const_value.numpy(), [1, 1, 1])
    with pytest.raises(ValueError, match="read-only"):
        value.const_value.numpy()[0] = 2


def test_replacing_a_constant_keeps_its_name_when_nothing_else_reads_it() -> None:
    model = loaded(HEAD + "g (float[N] x) => (float[N] y) <float[1] w = {2.0}> { y = Mul (x, w) }")
    graph.replace_constant(graph.node_named(model.graph, "Mul_y"), 1, np.array([3], np.float32))
    assert list(model.graph.initializers) == ["w"]
    np.testing.assert_array_equal(run(model, x=X)["y"], 3 * X)


def test_replacing_a_shared_constant_leaves_the_other_reader_alone() -> None:
    model = loaded(HEAD + "g (float[N] x) => (float[N] y) <float[1] w = {2.0}> { a = Mul (x, w) y = Add (a, w) }")
    graph.replace_constant(graph.node_named(model.graph, "Mul_a"), 1, np.array([3], np.float32))
    np.testing.assert_array_equal(run(model, x=X)["y"], 3 * X + 2)


def test_what_happens_to_a_copy_leaves_the_original_alone() -> None:
    model = loaded(IF)
    before = onnx_io.to_proto(model)[0].SerializeToString(deterministic=True)
    twin = graph.copy(model)
    for node in [*twin.graph]:
        node.name = f"{node.name}_x"
        for output in node.outputs:
            output.name = f"{output.name}_x"
    for value in twin.graph.inputs:
        value.name = f"{value.name}_x"
    assert onnx_io.to_proto(model)[0].SerializeToString(deterministic=True) == before


def test_renaming_an_initializer_of_a_copy_leaves_the_original_alone() -> None:
    model = loaded(STRINGS)
    other = mlp(0)
    for each in (model, other):
        before = onnx_io.to_proto(each)[0].SerializeToString(deterministic=True)
        twin = graph.copy(each)
        for value in [*twin.graph.initializers.values()]:
            value.name = f"{value.name}_x"
        assert onnx_io.to_proto(each)[0].SerializeToString(deterministic=True) == before
        a, b = (next(iter(m.graph.initializers.values())).const_value for m in (each, twin))
        assert a is not None
        assert b is not None
        assert a.dtype == ir.DataType.STRING or np.shares_memory(a.numpy(), b.numpy())


def test_weights_are_shared_between_copies_and_small_ones_cannot_be_written_either() -> None:
    model = loaded(HEAD + "g (float[N] x) => (float[N] y) <float[1] w = {2.0}> { y = Mul (x, w) }")
    for each in (model, graph.copy(model)):
        tensor = each.graph.initializers["w"].const_value
        assert tensor is not None
        with pytest.raises(ValueError, match="read-only"):
            tensor.numpy()[0] = 3


def test_signatures_tell_types_apart() -> None:
    kinds = ["float[N]", "int64[N]", "seq(float[N])", "seq(int64[N])", "optional(float[N])", "string[N]", "float[M]"]
    bodies = [HEAD + f"g ({kind} x) => ({kind} y) {{ y = Identity (x) }}" for kind in kinds]
    assert len({graph.signature(loaded(body)) for body in bodies}) == len(kinds)


def test_nodes_out_of_order_are_sorted_with_a_note() -> None:
    proto = text(HEAD + "g (float[N] x) => (float[N] y) { a = Neg (x) b = Abs (a) y = Exp (b) }")
    nodes = [proto.graph.node[i] for i in (2, 0, 1)]
    shuffled = onnx.ModelProto()
    shuffled.CopyFrom(proto)
    del shuffled.graph.node[:]
    shuffled.graph.node.extend(nodes)
    model, notes = onnx_io.from_proto(shuffled)
    assert [node.op_type for node in graph.copy(model).graph] == ["Neg", "Abs", "Exp"]
    assert notes == ("nodes were not in topological order: they are now",)
    assert onnx_io.from_proto(proto)[1] == ()


def test_a_cycle_is_refused() -> None:
    assert "cycle" in refusal(HEAD + "g (float[N] x) => (float[N] y) { a = Add (x, b) b = Abs (a) y = Exp (b) }")
