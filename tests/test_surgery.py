"""Cutting channels gives a valid graph that computes what the original does without them."""

from __future__ import annotations

import math
from pathlib import Path

import coupled
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from cuts import (
    assert_close,
    cut,
    feeds,
    keep_all_but,
    outputs,
    params,
    random_cuts,
    with_dead_units,
    with_zeroed_readers,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ccompile import graph, onnx_io, surgery
from ccompile.analysis.channels import channels
from ccompile.errors import PassError

LIGHT = sorted((Path(onnx.__file__).parent / "backend/test/data/light").glob("*.onnx"))
FREE = [name for name in coupled.NETS if name != "single_head"]


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("seed", range(4))
def test_a_random_cut_equals_zeroing_what_reads_the_channels(name: str, seed: int) -> None:
    model, rng = coupled.NETS[name](), np.random.default_rng(seed)
    cuts = random_cuts(model, rng, (0.1, 0.3, 0.5, 0.3)[seed])
    assert cuts
    small = cut(model, cuts)
    assert params(small) < params(model)
    inputs = feeds(model, rng)
    assert_close(outputs(small, inputs), outputs(with_zeroed_readers(model, cuts), inputs))


@pytest.mark.parametrize("name", FREE)
def test_one_unit_of_one_group_can_go_alone(name: str) -> None:
    model, rng = coupled.NETS[name](), np.random.default_rng(5)
    inputs = feeds(model, rng)
    for group in channels(model).free:
        for unit in {0, group.size - 1}:
            cuts = {group: keep_all_but(group, unit)}
            assert_close(outputs(cut(model, cuts), inputs), outputs(with_zeroed_readers(model, cuts), inputs))


@pytest.mark.parametrize("name", sorted(set(FREE) - {"normalised", "broadcast", "hidden_weights", "group_normalised"}))
def test_dead_channels_go_without_a_trace(name: str) -> None:
    model, rng = coupled.NETS[name](), np.random.default_rng(6)
    cuts = random_cuts(model, rng, 0.3)
    dead = with_dead_units(model, cuts)
    inputs = feeds(model, rng)
    assert_close(outputs(cut(dead, cuts), inputs), outputs(dead, inputs))


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_a_known_architecture_is_cut_consistently(path: Path) -> None:
    model, rng = onnx_io.load(path).model, np.random.default_rng(0)
    _randomise(model, rng)
    cuts = random_cuts(model, rng, 0.1)
    assert sum(group.size for group in cuts) > 200
    logits = tuple(
        str(node.inputs[0].name) for node in model.graph if node.op_type == "Softmax" and node.inputs[0] is not None
    )
    inputs = feeds(model, rng)
    wanted = outputs(with_zeroed_readers(model, cuts), inputs, logits)
    small = cut(model, cuts)
    assert_close(outputs(small, inputs, logits), wanted, 1e-4)
    assert params(small) < params(model)


def _randomise(model: ir.Model, rng: np.random.Generator) -> None:
    """Give the light models, whose weights are all the same, weights that differ."""
    for node in list(model.graph):
        if node.op_type not in ("Conv", "Gemm", "BatchNormalization", "Mul", "Add"):
            continue
        for index, value in enumerate(node.inputs):
            shape = graph.static_shape(value)
            if index == 0 or shape is None or not graph.is_constant(value):
                continue
            scale = math.sqrt(2 / math.prod(shape[1:])) if node.op_type in ("Conv", "Gemm") else 1.0
            draw = np.resize(scale * rng.standard_normal(100003, np.float32), shape).astype(np.float32)
            draw = np.abs(draw) + np.float32(0.5) if node.op_type == "BatchNormalization" else draw
            graph.replace_constant(node, index, draw)
    graph.remove_dead(model.graph)


@settings(deadline=None, max_examples=25)
@given(order=st.permutations(range(8)), gone=st.sets(st.integers(0, 7), min_size=1, max_size=7))
def test_permuted_channels_are_cut_where_they_went(order: list[int], gone: set[int]) -> None:
    net, x = coupled.start()
    x = net.relu(net.conv(x, "a", (8, 3, 1, 1)))
    x = net.node("Gather", x, coupled.ints(net, *order), axis=1)
    model = net.model(net.conv(x, "b", (4, 8, 1, 1)))
    group = channels(model).named("a")
    (reader,) = group.by_role("consumer")
    assert reader.unit.tolist() == order
    cuts = {group: keep_all_but(group, *gone)}
    inputs = feeds(model, np.random.default_rng(0))
    assert_close(outputs(cut(model, cuts), inputs), outputs(with_zeroed_readers(model, cuts), inputs))


def test_depthwise_group_counts_follow() -> None:
    model = coupled.separable()
    small = cut(model, {channels(model).named("a"): np.arange(6) < 4})
    assert graph.attribute(graph.node_named(small.graph, "dw"), "group") == 4


def test_the_original_and_its_other_copies_stay_as_they_are() -> None:
    model = coupled.residual()
    twin = graph.copy(model)
    before = {name: np.array(graph.constant(value)) for name, value in model.graph.initializers.items()}
    cut(model, random_cuts(model, np.random.default_rng(0), 0.5))
    for other in (model, twin):
        for name, array in before.items():
            np.testing.assert_array_equal(np.array(graph.constant(other.graph.initializers[name])), array)


def test_new_weights_are_read_only_and_keep_their_names() -> None:
    model = coupled.chain()
    small = cut(model, {channels(model).named("a"): np.arange(8) < 5})
    weight = graph.constant(small.graph.initializers["b.w"])
    assert weight is not None
    assert weight.shape == (6, 5, 3, 3)
    assert not weight.flags.writeable


def test_wrong_declared_shapes_do_not_survive() -> None:
    model = coupled.chain()
    for node in model.graph:
        if node.name == "a":
            node.outputs[0].shape = ir.Shape(["N", 8, 6, 6])
    small = cut(model, {channels(model).named("a"): np.arange(8) < 5})
    assert graph.node_named(small.graph, "a").outputs[0].shape is None


def test_a_pinned_group_is_refused_with_the_reason() -> None:
    model = coupled.chain()
    group = channels(model).named("fc")
    with pytest.raises(PassError, match=r"`fc` is pinned: `fc`: graph output `fc_out`"):
        surgery.remove(model, {group: np.array([True, True, False])})


def test_nothing_may_become_empty() -> None:
    model = coupled.halves()
    group = channels(model).named("a")
    before = params(model)
    with pytest.raises(PassError, match="would have no channel left"):
        surgery.remove(model, {group: np.arange(8) >= 3})
    assert params(model) == before


def test_a_keep_of_the_wrong_size_is_refused() -> None:
    model = coupled.chain()
    with pytest.raises(PassError, match="`keep` must be 8 booleans"):
        surgery.remove(model, {channels(model).named("a"): np.ones(7, bool)})


def test_nothing_removed_changes_nothing() -> None:
    model = coupled.attention()
    cuts = {group: np.ones(group.size, bool) for group in channels(model).free}
    inputs = feeds(model, np.random.default_rng(0))
    assert_close(outputs(cut(model, cuts), inputs), outputs(model, inputs), 0.0)


@pytest.mark.parametrize("name", ["twins", "hidden_weights", "chain"])
def test_weights_replaced_since_the_groups_were_found_are_cut_too(name: str) -> None:
    model, rng = coupled.NETS[name](), np.random.default_rng(8)
    cuts = random_cuts(model, rng, 0.3)
    wanted = cut(model, cuts)
    for group in cuts:
        for member in (*group.by_role("producer"), *group.by_role("consumer")):
            node = graph.node_named(model.graph, member.node)
            array = graph.constant(node.inputs[member.input])
            assert array is not None
            graph.replace_constant(node, member.input, array)
    surgery.remove(model, cuts)
    assert onnx_io.check(model) == ""
    inputs = feeds(model, rng)
    assert_close(outputs(model, inputs), outputs(wanted, inputs))
