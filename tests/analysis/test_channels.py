"""Which channels live and die together: known answers, one kind of coupling each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import coupled
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Net
from coupled import ints, start, vector

from ccompile import onnx_io
from ccompile.analysis.channel_flow import compressed
from ccompile.analysis.channel_reshape import segments_of
from ccompile.analysis.channels import Group, channels

if TYPE_CHECKING:
    from collections.abc import Sequence

# net -> free groups, in topological order: name, units
KNOWN: dict[str, list[tuple[str, int]]] = {
    "chain": [("a", 8), ("b", 6)],
    "old_opset": [("a", 8), ("b", 4)],
    "residual": [("stem", 8), ("a1", 5), ("b1", 5)],
    "padded_shortcut": [("stem", 16), ("s0a", 8), ("s1a", 16)],
    "dense_block": [("stem", 4), ("a", 3), ("b", 3), ("c", 3)],
    "joins_input": [("a", 4), ("b", 5)],
    "halves": [("a", 8), ("b", 4)],
    "equal_halves": [("a", 4)],
    "shuffled": [("stem", 4), ("g1", 4)],
    "shuffled_4": [("stem", 2)],
    "split_shuffled": [("stem", 8), ("b", 5)],
    "separable": [("a", 6), ("pw", 4)],
    "separable_2": [("a", 6), ("pw", 4)],
    "grouped": [("a", 4), ("g", 3), ("b", 4)],
    "transposed": [("a", 8), ("t", 3), ("g", 4)],
    "squeeze_excite": [("a", 8), ("se1", 3), ("b", 5)],
    "flattened": [("a", 5), ("fc1", 7)],
    "flattened_reshape": [("a", 5), ("fc1", 7)],
    "normalised": [("a", 6), ("b", 4)],
    "broadcast": [("a", 6), ("b", 4)],
    "attention": [("q", 4)],
    "attention_fused": [("qkv", 4)],
    "single_head": [("v", 4)],
    "shared_key": [("q", 4)],
    "embedded": [("embed", 8), ("up", 12)],
    "layer_normalised": [("up", 12)],
    "group_normalised": [("a", 4)],
    "resized": [("a", 6), ("b", 4)],
    "spread": [("a", 2), ("b", 3), ("c", 5), ("d", 4)],
    "chosen": [("a", 8), ("b", 4)],
    "spatial": [("fc1", 6), ("a", 4)],
    "computed_shape": [("a", 5)],
    "hidden_weights": [("a", 8)],
    "twins": [("a0", 4), ("a", 6), ("c", 4)],
}


@pytest.mark.parametrize("name", coupled.NETS)
def test_a_known_net_has_its_known_groups(name: str) -> None:
    assert [(group.name, group.size) for group in channels(coupled.NETS[name]()).free] == KNOWN[name]


def units(group: Group, node: str, index: int = 1) -> list[int]:
    """The units along the one axis of that constant."""
    (found,) = [m for m in group.members if m.node == node and m.input == index]
    return [int(unit) for unit in found.unit]


def test_a_plain_layer_has_a_unit_per_channel() -> None:
    group = channels(coupled.chain()).named("a")
    roles = {(m.node, m.input, m.axis, m.role) for m in group.members}
    assert roles == {("a", 1, 0, "producer"), ("a", 2, 0, "producer"), ("b", 1, 1, "consumer")}
    assert units(group, "a") == units(group, "a", 2) == units(group, "b") == list(range(8))


def test_padding_puts_units_in_the_middle_and_adds_units_that_nothing_makes() -> None:
    group = channels(coupled.padded_shortcut()).named("stem")
    stem, first, second = (units(group, node) for node in ("stem", "s0b", "s1b"))
    assert first[2:6] == stem
    assert second[4:12] == first
    assert sorted(second) == list(range(16))


def test_a_concatenation_keeps_its_parts_apart() -> None:
    found = channels(coupled.dense_block())
    assert units(found.named("stem"), "c") == [0, 1, 2, 3, *[-1] * 6]
    assert units(found.named("a"), "c") == [*[-1] * 4, 0, 1, 2, *[-1] * 3]


def test_both_halves_of_a_gate_share_units() -> None:
    assert units(channels(coupled.equal_halves()).named("a"), "a") == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_shuffle_moves_units() -> None:
    found = channels(coupled.split_shuffled())
    group = found.named("stem")
    reader, maker = (next(m.unit for m in group.by_role(role) if m.node == "a") for role in ("consumer", "producer"))
    stem = units(group, "stem")
    assert reader.tolist() == stem[4:]
    assert units(group, "b") == [int(unit) for pair in zip(stem[:4], maker, strict=True) for unit in pair]


def test_groups_of_a_convolution_stay_equal() -> None:
    found = channels(coupled.grouped())
    assert units(found.named("a"), "a") == [0, 1, 2, 3] * 3
    assert units(found.named("a"), "g") == [0, 1, 2, 3]
    assert units(found.named("g"), "g") == [0, 1, 2] * 3


def test_a_channel_multiplier_takes_its_block_along() -> None:
    assert units(channels(coupled.separable(2)).named("a"), "pw") == [k // 2 for k in range(12)]


def test_a_squeeze_is_coupled_with_what_it_scales() -> None:
    group = channels(coupled.squeeze_excite()).named("a")
    assert {m.node for m in group.by_role("producer")} == {"a", "se2"}
    assert {m.node for m in group.by_role("consumer")} == {"se1", "b"}


@pytest.mark.parametrize("op", ["Flatten", "Reshape"])
def test_a_flattened_channel_is_a_block_of_columns(op: str) -> None:
    assert units(channels(coupled.flattened(op)).named("a"), "fc1") == [k // 4 for k in range(20)]


def test_constants_follow_where_they_run_along_the_channels() -> None:
    group = channels(coupled.broadcast()).named("a")
    axes = [(m.node, m.axis) for m in group.by_role("through")]
    assert axes == [("mul1", 0), ("add2", 1), ("max5", 1)]


@pytest.mark.parametrize("fused", [False, True])
def test_a_head_is_a_unit(fused: bool) -> None:
    (group,) = channels(coupled.attention(fused)).free
    heads = [k // 3 for k in range(12)]
    assert units(group, "o") == heads
    for name in ["qkv"] if fused else ["q", "k", "v"]:
        assert units(group, name) == heads * (3 if fused else 1)


def test_columns_of_a_table_are_channels() -> None:
    group = channels(coupled.embedded()).named("embed")
    assert [(m.axis, m.role) for m in group.members if m.node == "embed"] == [(1, "producer")]
    assert {m.node for m in group.by_role("producer")} == {"embed", "down"}


def test_readers_of_one_weight_agree() -> None:
    found = channels(coupled.twins())
    assert {m.node for m in found.named("a0").by_role("producer")} == {"a0", "b0"}
    assert units(found.named("a"), "c") == [0, 1, 2, 3, 4, 5] * 2


def reasons(model: ir.Model, name: str) -> list[str]:
    return [f"{skip.node}: {skip.reason}" for skip in channels(model).named(name).pinned]


def ending(x: ir.Value, net: Net, width: int = 6) -> ir.Model:
    return net.model(net.conv(x, "b", (4, width, 1, 1)))


def begun() -> tuple[Net, ir.Value]:
    net, x = start()
    return net, net.conv(x, "a", (6, 3, 1, 1))


def test_graph_outputs_are_pinned() -> None:
    assert reasons(coupled.chain(), "fc") == ["fc: graph output `fc_out`"]


def test_an_output_in_the_middle_is_pinned() -> None:
    net, x = begun()
    y = net.relu(x)
    model = net.model(net.conv(y, "b", (4, 6, 1, 1)), x)
    assert reasons(model, "a") == ["a: graph output `a_out`"]


def test_an_unknown_op_pins() -> None:
    net, x = begun()
    assert reasons(ending(net.node("Foo", x, name="foo", domain="bar"), net), "a") == ["foo: unknown op bar::Foo"]


def test_an_op_of_onnx_without_a_row_pins() -> None:
    net, x = begun()
    assert reasons(ending(net.node("Det", x, name="foo"), net), "a") == ["foo: unknown op Det"]


def test_meeting_a_graph_input_pins() -> None:
    net, x = begun()
    other = net.input("other", ["N", 6, 6, 6])
    assert reasons(ending(net.node("Add", x, other, name="add"), net), "a") == ["add: it meets the graph input `other`"]


def test_meeting_a_graph_input_that_broadcasts_does_not_pin() -> None:
    net, x = begun()
    assert not reasons(ending(net.node("Add", x, net.input("other", ["N", 1, 6, 6]), name="add"), net), "a")


@pytest.mark.parametrize(
    ("op", "attributes", "reason"),
    [
        ("Softmax", {"axis": 1}, "it normalises over them"),
        ("LRN", {"size": 3}, "it mixes neighbouring channels"),
        ("LpNormalization", {"axis": 1}, "it normalises over them"),
        ("ReduceSum", {}, "it reduces over them"),
        ("ArgMax", {"axis": 1}, "it reduces over them"),
        ("Squeeze", {}, "it drops whatever axis has size 1"),
    ],
)
def test_what_mixes_channels_pins(op: str, attributes: dict[str, int], reason: str) -> None:
    net, x = begun()
    y = net.node(op, x, name="mix", **attributes)  # type: ignore[arg-type]
    model = net.model(net.conv(x, "b", (4, 6, 1, 1)), y)
    assert reasons(model, "a")[0] == f"mix: {reason}"


def test_softmax_over_positions_does_not_pin() -> None:
    net, x = begun()
    assert not reasons(ending(net.node("Softmax", x, axis=3), net), "a")


def test_layer_normalisation_over_channels_pins() -> None:
    assert reasons(coupled.layer_normalised(), "in") == ["ln: it normalises over them"]


def test_channels_contracted_without_a_weight_are_pinned() -> None:
    assert reasons(coupled.single_head(), "q") == ["matmul4: it contracts them without a weight"]


def test_channels_that_nothing_reads_are_pinned() -> None:
    net, x = begun()
    net.relu(x)
    assert reasons(net.model(net.relu(net.inputs[0])), "a") == ["a: no linear layer reads its channels"]


def test_channels_that_nothing_makes_are_pinned() -> None:
    net, x = start()
    padded = net.node("Pad", net.node("Concat", x, x, axis=1), ints(net, 0, 2, 0, 0, 0, 0, 0, 0), name="pad")
    assert not channels(ending(net.relu(padded), net, 8)).free


def test_a_shared_weight_with_another_reader_pins() -> None:
    net, x = begun()
    weight = net.weight("w", (6, 6, 1, 1))
    y = net.node("Conv", net.relu(x), weight, name="c")
    z = net.node("ReduceSum", weight, keepdims=1)
    found = channels(ending(net.node("Add", y, z), net))
    for name in ("a", "c"):
        assert found.named(name).pinned[0].reason == "`w` is shared with a reader that needs all of it"


def test_a_weight_in_a_smaller_form_pins_both_sides() -> None:
    net, x = begun()
    stored = net.constant(np.ones((6, 6, 1, 1), np.int8), "w")
    weight = net.node("DequantizeLinear", stored, net.constant(np.array(0.1, np.float32)))
    found = channels(ending(net.node("Conv", net.relu(x), weight, name="c"), net))
    for name in ("a", "c"):
        assert found.named(name).pinned[0].reason.endswith("is stored in a smaller form, behind DequantizeLinear")


def test_a_weight_that_is_computed_pins() -> None:
    net, x = begun()
    weight = net.node("Sin", net.weight("w", (4, 6, 1, 1)))
    assert reasons(net.model(net.node("Conv", x, weight, name="c")), "a") == ["c: its weight is not constant"]


def test_a_bias_that_is_computed_pins_its_layer() -> None:
    net, x = begun()
    bias = net.node("Sin", net.weight("bias", (5,)))
    y = net.node("Conv", x, net.weight("w", (5, 6, 1, 1)), bias, name="c")
    found = channels(ending(y, net, 5))
    assert not found.named("a").pinned
    assert [skip.node for skip in found.named("c").pinned] == ["c"]


def test_a_subgraph_that_reads_them_pins() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 18]>
        net (float[N, 3] x, bool flag) => (float[N, 2] y)
        <float[3, 4] w1 = {1,2,3,4,5,6,7,8,9,10,11,12}, float[4, 2] w2 = {1,2,3,4,5,6,7,8}>
        {
            h = MatMul (x, w1)
            y = If (flag) <
                then_branch = yes () => (float[N, 2] a) { a = MatMul (h, w2) },
                else_branch = no () => (float[N, 2] b) { r = Relu (h)  b = MatMul (r, w2) }
            >
        }
    """
    model, _ = onnx_io.from_proto(onnx.parser.parse_model(text))
    (group,) = channels(model).groups
    assert [skip.reason for skip in group.pinned] == ["a subgraph reads `h`"]


def test_computing_with_the_number_of_channels_pins() -> None:
    net, x = begun()
    count = net.node("Gather", net.node("Shape", x), ints(net, 1), axis=0)
    scale = net.node("Sqrt", net.node("Cast", count, to=1), name="sqrt")
    assert reasons(ending(net.node("Div", x, scale), net), "a") == ["sqrt: it computes with the size of `a_out`"]


def test_reading_the_number_of_positions_does_not_pin() -> None:
    net, x = begun()
    count = net.node("Gather", net.node("Shape", x), ints(net, 2), axis=0)
    assert not reasons(ending(net.node("Div", x, net.node("Cast", count, to=1)), net), "a")


def test_the_shape_of_channels_used_for_another_value_pins() -> None:
    net, x = begun()
    other = net.node("Reshape", net.input("other", ["N", 216]), net.node("Shape", x), name="reshape")
    model = net.model(net.conv(x, "b", (4, 6, 1, 1)), net.node("ReduceMax", other))
    assert reasons(model, "a") == ["reshape: it computes with the size of `a_out`"]


def test_the_number_of_other_channels_in_a_target_pins_them() -> None:
    net, x = begun()
    count = net.node("Gather", net.node("Shape", x), ints(net, 1), axis=0)
    y = net.relu(net.conv(net.inputs[0], "c", (6, 3, 1, 1)))
    y = net.node("Reshape", y, net.node("Concat", ints(net, 0), count, ints(net, 36), axis=0), name="reshape")
    y = net.node("Flatten", net.node("ReduceMax", y, ints(net, 2)))
    model = net.model(net.conv(x, "b", (4, 6, 1, 1)), net.dense(y, "d", 6, 2))
    assert reasons(model, "a") == ["reshape: it computes with the size of `a_out`"]
    assert not reasons(model, "c")


def test_channels_that_became_rows_are_pinned() -> None:
    net = Net(1)
    x = net.node("MatMul", net.input("x", [5, 4]), net.weight("w", (4, 6)), name="a")
    y = net.dense(net.node("Transpose", x, perm=[1, 0]), "rows", 5, 3)
    model = net.model(net.node("MatMul", x, net.weight("v", (6, 2)), name="b"), net.node("ReduceSum", y))
    assert reasons(model, "a")[0] == "rows: they are its rows"


def test_queries_of_heads_that_share_a_key_go_alone() -> None:
    found = channels(coupled.shared_key())
    assert [group.name for group in found.free] == ["q"]
    assert units(found.named("q"), "o") == [k // 5 for k in range(20)]


def test_channels_that_fall_together_say_why() -> None:
    found = reasons(coupled.shuffled(4), "g1")
    assert found[0] == "g1: all channels of `g1_out` stand and fall together"
    assert "g2: its 4 groups must stay equal" in found


def test_channels_on_the_axis_of_positions_are_pinned() -> None:
    net, x = start()
    x = net.node("MatMul", x, net.weight("w", (6, 5)), name="columns")
    assert reasons(net.model(net.conv(x, "b", (4, 3, 1, 1))), "columns") == ["b: it slides along the channels"]


def test_every_group_lists_each_activation_that_carries_it() -> None:
    group = channels(coupled.halves()).named("a")
    found = {carrier.value: carrier.unit.tolist() for carrier in group.carriers}
    assert found["a_out"] == list(range(8))
    assert found["split2_out1"] == [3, 4, 5, 6, 7]


def test_the_answer_is_deterministic() -> None:
    first, second = (channels(coupled.dense_block()) for _ in range(2))
    for a, b in zip(first.groups, second.groups, strict=True):
        assert (a.name, a.size, a.pinned) == (b.name, b.size, b.pinned)
        for left, right in zip(a.members, b.members, strict=True):
            assert (left.value, left.node, left.axis) == (right.value, right.node, right.axis)
            np.testing.assert_array_equal(left.unit, right.unit)


def test_the_analysis_changes_nothing() -> None:
    model = coupled.attention(fused=True)
    before = onnx_io.to_proto(model)[0].SerializeToString()
    channels(model)
    assert onnx_io.to_proto(model)[0].SerializeToString() == before


def test_a_graph_without_layers_has_no_groups() -> None:
    net = Net(0)
    assert channels(net.model(net.relu(net.input("x", ["N", 3])))).groups == ()


@pytest.mark.parametrize(
    ("before", "after", "template", "wanted"),
    [
        (("N", 6, 4), ("N", 2, 3, 4), (), [([0], [0]), ([1], [1, 2]), ([2], [3])]),
        ((None, 5, 2, 2), (None, 20), (), [([0], [0]), ([1, 2, 3], [1])]),
        (("N", 5, "H", "W"), ("N", 5, None), (), [([0], [0]), ([1], [1]), ([2, 3], [2])]),
        ((None, None, 12), (None, None, 3, 4), (0, -1, 3, 4), [([0], [0]), ([1], [1]), ([2], [2, 3])]),
        ((2, 3, 4), (4, 6), (), [([0, 1, 2], [0, 1])]),
        (("N", 8, 1, 1), ("N", 8), (), [([0], [0]), ([1], [1]), ([2, 3], [])]),
    ],
)
def test_a_change_of_shape_falls_into_independent_parts(
    before: Sequence[int | str | None],
    after: Sequence[int | str | None],
    template: tuple[int, ...],
    wanted: list[tuple[list[int], list[int]]],
) -> None:
    assert segments_of(tuple(before), tuple(after), template) == wanted


def test_ids_that_do_not_vary_are_compressed() -> None:
    assert compressed(np.array([[1, 1], [2, 2]])).shape == (2, 1)
    assert compressed(np.array([[1, 2], [1, 2]])).shape == (1, 2)
    assert compressed(np.array([[1, 2], [2, 1]])).shape == (2, 2)


def test_vectors_are_followed_where_they_meet_the_last_axis() -> None:
    net = Net(1)
    x = net.node("MatMul", net.input("x", ["N", 4]), net.weight("w", (4, 6)), name="a")
    x = net.node("Add", x, vector(net, 6))
    group = channels(net.model(net.node("MatMul", x, net.weight("v", (6, 2)), name="b"))).named("a")
    assert [(m.node, m.role) for m in group.members] == [("a", "producer"), ("add1", "through"), ("b", "consumer")]
