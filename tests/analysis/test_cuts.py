"""What a cut touches: readers with the unit of each column, and costs that the cut graph really has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import builders
import coupled
import cuts as cutting
import numpy as np
import onnx_ir as ir
import pytest

from ccompile import cost, graph
from ccompile.analysis import cuts, linear
from ccompile.analysis.channels import Group, channels
from ccompile.analysis.cuts import Reader
from ccompile.analysis.shapes import infer
from ccompile.moments import Layer
from ccompile.target import load_target, round_up_to

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ccompile.core import Array


def readers(model: ir.Model, name: str) -> dict[str, Reader]:
    found = cuts.readers(model, channels(model).named(name))
    assert not isinstance(found, str), found
    return {reader.layer.name: reader for reader in found}


def test_a_convolution_reads_each_channel_with_all_its_taps() -> None:
    (reader,) = readers(coupled.chain(), "a").values()
    assert reader.unit.tolist() == [np.repeat(np.arange(8), 9).tolist()]


def test_a_flattened_channel_is_read_by_a_block_of_columns() -> None:
    (reader,) = readers(coupled.flattened(), "a").values()
    assert reader.layer.name == "fc1"
    assert reader.unit.tolist() == [np.repeat(np.arange(5), 4).tolist()]


def test_a_concatenation_leaves_columns_without_a_unit() -> None:
    reader = readers(coupled.joins_input(), "a")["b"]
    assert reader.unit.tolist() == [[-1, -1, -1, 0, 1, 2, 3]]


def test_groups_of_a_convolution_read_the_same_units() -> None:
    reader = readers(coupled.grouped(), "a")["g"]
    assert reader.unit.tolist() == [np.repeat(np.arange(4), 9).tolist()] * 3


def test_a_transposed_convolution_reads_its_rows() -> None:
    reader = readers(coupled.transposed(), "a")["t"]
    assert reader.unit.tolist() == [np.repeat(np.arange(8), 4).tolist()]


def test_a_spine_is_read_by_all_its_layers_in_order() -> None:
    assert list(readers(coupled.residual(), "stem")) == ["a1", "b1", "fc"]


@pytest.mark.parametrize("name", coupled.NETS)
def test_the_readers_columns_times_their_units_are_the_members(name: str) -> None:
    model = coupled.NETS[name]()
    for group in channels(model).free:
        found = cuts.readers(model, group)
        if isinstance(found, str):
            continue
        assert {reader.layer.name for reader in found} == {m.node for m in group.by_role("consumer")}
        for reader in found:
            assert reader.unit.shape == (reader.layer.groups, reader.layer.columns)
            assert reader.unit.min() >= -1
            assert reader.unit.max() < group.size
            assert (reader.unit >= 0).any()


def test_a_reader_that_is_no_plain_layer_is_refused_with_the_reason() -> None:
    net, x = coupled.start()
    x = net.relu(net.conv(x, "a", (6, 3, 1, 1)))
    up = net.node("ConvTranspose", x, net.weight("w", (6, 3, 2, 2)), name="up", strides=[2, 2], output_padding=[1, 1])
    model = net.model(up)
    assert cuts.readers(model, channels(model).named("a")) == "`up` reads its channels, and its output is padded"


def test_rows_of_a_transposed_convolution_repeat_over_its_groups() -> None:
    kept = np.array([True, False])
    forms = {name: linear.layer(graph.node_named(coupled.transposed().graph, name)) for name in ("t", "g", "d")}
    found = {name: cuts.rows_of(form, kept).tolist() for name, form in forms.items() if isinstance(form, Layer)}
    assert found == {"t": [True, False], "g": [True, False] * 2, "d": [True, False] * 8}


def test_rows_of_a_convolution_are_those_of_its_weight() -> None:
    form = linear.layer(graph.node_named(coupled.grouped().graph, "g"))
    assert isinstance(form, Layer)
    kept = np.arange(9) % 3 == 0
    assert cuts.rows_of(form, kept) is kept


# ---------------------------------------------------------------------------------------------- costs


def left(groups: Sequence[Group], plan: Mapping[Group, Array]) -> Array:
    """How many units of each group a plan keeps, as one row."""
    counts = {group.name: int(keep.sum()) for group, keep in plan.items()}
    return np.array([[counts.get(group.name, group.size) for group in groups]])


def orders(groups: Sequence[Group], plan: Mapping[Group, Array]) -> list[Array]:
    """An order of removal for each group that starts with what a plan removes."""
    kept = {group.name: keep for group, keep in plan.items()}
    return [np.argsort(kept.get(group.name, np.ones(group.size, bool)), kind="stable") for group in groups]


def macs(model: ir.Model) -> dict[tuple[str, int], float]:
    shapes = {str(v.name): tuple(d if isinstance(d, int) else 1 for d in v.shape or ()) for v in model.graph.inputs}
    found = cost.price(model, infer(model, shapes), load_target("generic-cpu", Path()))
    return {(row.name, 1): float(row.macs) for row in found.nodes if row.macs}


@pytest.mark.parametrize(
    "name", ["chain", "residual", "dense_block", "halves", "grouped", "separable", "transposed", "flattened", "shuffled", "squeeze_excite"]  # noqa: E501
)  # fmt: skip
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_predicted_macs_are_those_of_the_cut_graph(name: str, share: float) -> None:
    model = coupled.NETS[name]()
    groups = channels(model).free
    plan = cutting.random_cuts(model, np.random.default_rng(1), share)
    kept = left(groups, plan)
    by_node = macs(model)
    parts = cuts.terms(groups, by_node, orders(groups, plan))
    fixed = sum(by_node.values()) - sum(part.cost for part in parts)
    assert parts
    price = cuts.total_cost(parts, fixed)
    assert price(np.array([[g.size for g in groups]]))[0] == pytest.approx(sum(by_node.values()))
    small = cutting.cut(model, plan)
    assert price(kept)[0] == pytest.approx(sum(macs(small).values()))
    assert price(kept)[0] < sum(by_node.values())


@pytest.mark.parametrize("name", ["chain", "residual", "dense_block", "grouped", "separable", "flattened", "broadcast"])
def test_the_predicted_params_are_those_of_the_cut_graph(name: str) -> None:
    model = coupled.NETS[name]()
    groups = channels(model).free
    plan = cutting.random_cuts(model, np.random.default_rng(1), 0.4)
    parts = cuts.terms(groups, cuts.weight_costs(model, groups, "params"), orders(groups, plan))
    price = cuts.total_cost(parts, cutting.params(model) - sum(p.cost for p in parts))
    kept = left(groups, plan)
    assert price(kept)[0] == pytest.approx(cutting.params(cutting.cut(model, plan)))


def test_bytes_follow_the_type_of_a_weight() -> None:
    model = builders.half_net(0)
    groups = channels(model).free
    elements, nbytes = (cuts.weight_costs(model, groups, what) for what in ("params", "stored_bytes"))
    assert elements
    assert nbytes == {key: 2 * value for key, value in elements.items()}


def test_a_shared_weight_is_counted_once() -> None:
    model = coupled.twins()
    found = cuts.weight_costs(model, channels(model).free, "params")
    assert sum(value for (node, index), value in found.items() if node in ("a", "b") and index == 1) == 24


def test_a_staircase_rounds_channels_up() -> None:
    model = coupled.chain()
    groups = channels(model).free
    parts = cuts.terms(groups, {("a", 1): 100.0})
    price = cuts.total_cost(parts, 7.0, lambda count: round_up_to(count, 4))
    found = price(np.array([[8, 6], [7, 6], [5, 6], [4, 6], [3, 1], [1, 1]]))
    assert found.tolist() == [107.0, 107.0, 107.0, 57.0, 57.0, 57.0]


def test_without_a_staircase_every_channel_counts() -> None:
    model = coupled.chain()
    parts = cuts.terms(channels(model).free, {("a", 1): 100.0, ("b", 1): 10.0})
    price = cuts.total_cost(parts, 7.0)
    assert price(np.array([[8, 6], [4, 6], [4, 3]])).tolist() == [117.0, 62.0, 59.5]


def test_units_that_a_split_hands_to_one_layer_count_there_only() -> None:
    model = coupled.halves()  # of the 8 channels of `a`, `b` reads 5
    (a, *_), order = channels(model).free, np.arange(8)
    reads = [member for member in a.members if member.node == "b"]
    assert sorted(unit for unit in reads[0].unit) == [3, 4, 5, 6, 7]
    counts = {}
    for name, one in (("first", order), ("last", order[::-1])):
        price = cuts.total_cost(cuts.terms([a], {("b", 1): 5.0}, [one]), 0.0)
        counts[name] = price(np.arange(8, 0, -1)[:, None]).tolist()
    assert counts == {"first": [5, 5, 5, 5, 4, 3, 2, 1], "last": [5, 4, 3, 2, 1, 0, 0, 0]}
