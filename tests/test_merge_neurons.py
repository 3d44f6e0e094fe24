"""Merging neurons in graphs: exact on planted copies, refused where what stands between does not allow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import builders
import driver
import numpy as np
import onnx_ir as ir
import pytest
from builders import Net
from pydantic import ValidationError

from ccompile import graph, onnx_io
from ccompile.core import Array
from ccompile.errors import PassError
from ccompile.passes.merge_neurons import MergeNeurons

N = 6  # neurons before copies are planted
Between = Callable[[Net, ir.Value], ir.Value]
EXACT = 1e-5


def op(name: str, *constants: Array, **attributes: int | list[int]) -> Between:
    return lambda net, x: net.node(
        name, x, *(net.constant(c) for c in constants), name="act", **dict[str, Any](attributes)
    )


def copies(scales: Array, seed: int, n: int = N) -> tuple[Array, Array]:
    """Return (parent, scale) of n neurons and a copy per entry of `scales`, shuffled."""
    rng = np.random.default_rng(seed)
    parent = np.append(np.arange(n), rng.integers(0, n, len(scales)))
    order = rng.permutation(len(parent))
    return parent[order], np.append(np.ones(n), scales)[order]


def drawn(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def dense(between: Between, scales: Array, seed: int = 0, shift: float = 0.0) -> ir.Model:
    """x[N, 9] -> Gemm with planted copies -> between -> Gemm; biases differ by `shift` on top."""
    parent, scale = copies(np.asarray(scales, np.float32), seed)
    rng, n = np.random.default_rng(seed + 1), len(parent)
    w, b = drawn(rng, N, 9)[parent] * scale[:, None], drawn(rng, N)[parent] * scale
    net = Net()
    x = net.input("x", ["N", 9])
    operands = (
        net.constant(w.astype(np.float32), "w"),
        net.constant((b + shift * np.arange(n)).astype(np.float32), "b"),
    )
    x = between(net, net.node("Gemm", x, *operands, name="fc1", transB=1))
    return net.model(net.node("Gemm", x, net.constant(drawn(rng, n, 4), "w2"), name="fc2"))


def convolution(between: Between, scales: Array, seed: int = 0) -> ir.Model:
    """x[N, 3, 8, 8] -> Conv with planted copies -> between -> padded Conv."""
    parent, scale = copies(np.asarray(scales, np.float32), seed)
    rng, n = np.random.default_rng(seed + 1), len(parent)
    w, b = drawn(rng, N, 3, 3, 3)[parent] * scale[:, None, None, None], drawn(rng, N)[parent] * scale
    net = Net()
    x = net.input("x", ["N", 3, 8, 8])
    operands = (net.constant(w.astype(np.float32), "w"), net.constant(b.astype(np.float32), "b"))
    x = between(net, net.node("Conv", x, *operands, name="conv1", pads=[1] * 4))
    return net.model(net.node("Conv", x, net.constant(drawn(rng, 4, n, 3, 3), "w2"), name="conv2", pads=[1] * 4))


def flattened(between: Between, scales: Array, seed: int = 0) -> ir.Model:
    """The same Conv -> between -> Flatten -> Gemm."""
    base = convolution(between, scales, seed)
    main = base.graph
    old = graph.node_named(main, "conv2")
    n = (graph.static_shape(old.inputs[1]) or ())[1]
    x = old.inputs[0]
    flat = graph.add_node("Flatten", [x], before=old, base="flat")
    w = graph.add_constant(main, "w3", drawn(np.random.default_rng(seed), n * 64, 4))
    last = graph.add_node("Gemm", [flat.outputs[0], w], before=old, base="fc")
    graph.replace_node(old, last)
    main.outputs[0].shape = ir.Shape(["N", 4])
    graph.remove_dead(main)
    return base


def merged(model: ir.Model, **options: object) -> driver.Bench:
    run = driver.run_step(MergeNeurons.model_validate(options), model, seed=3)
    assert run.record.verdict == "kept", run.record.reason
    assert onnx_io.check(run.model) == ""
    return run


def change(run: driver.Bench) -> float:
    assert run.record.against_previous is not None
    assert all(output.elements for output in run.record.against_previous.outputs)
    return max(output.relative_l2 or 0.0 for output in run.record.against_previous.outputs)


def left(run: driver.Bench, name: str) -> int:
    """Return the output channels of a layer."""
    return int(graph.facts(graph.node_named(run.model.graph, name))["out_channels"])


def reasons(run: driver.Bench) -> str:
    assert run.result is not None
    return "; ".join(f"{skip.node}: {skip.reason}" for skip in run.result.skipped)


def notes(run: driver.Bench) -> str:
    assert run.result is not None
    return "; ".join(site.note for site in run.result.applied)


NETS = {"dense": (dense, "fc1"), "convolution": (convolution, "conv1"), "flattened": (flattened, "conv1")}
COPIES, MULTIPLES = np.ones(4), np.array([0.5, 2.0, 3.0, 0.1])
SMOOTH = ["Sigmoid", "Tanh", "Softplus", "Elu", "Selu", "HardSigmoid", "HardSwish", "Erf", "Softsign"]
HOMOGENEOUS = ["Relu", "LeakyRelu", "Identity", "Abs", "Neg", "Dropout"]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("activation", SMOOTH + HOMOGENEOUS)
def test_planted_copies_go_without_a_trace(net: str, activation: str) -> None:
    build, name = NETS[net]
    run = merged(build(op(activation), COPIES))
    assert left(run, name) == N
    assert change(run) < EXACT


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("activation", HOMOGENEOUS)
@pytest.mark.parametrize("seed", range(2))
def test_planted_multiples_go_without_a_trace_through_homogeneous_ops(net: str, activation: str, seed: int) -> None:
    build, name = NETS[net]
    run = merged(build(op(activation), MULTIPLES, seed))
    assert left(run, name) == N
    assert change(run) < EXACT


@pytest.mark.parametrize("activation", SMOOTH)
def test_multiples_stay_behind_other_activations_and_copies_still_go(activation: str) -> None:
    run = merged(dense(op(activation), np.append(COPIES, MULTIPLES)))
    assert left(run, "fc1") == N + len(MULTIPLES)
    assert change(run) < EXACT
    assert f"equal ones only: `act` ({activation}) lets no factor through" in notes(run)


@pytest.mark.parametrize("activation", SMOOTH)
def test_only_multiples_are_refused_with_the_op(activation: str) -> None:
    run = merged(dense(op(activation), MULTIPLES))
    assert left(run, "fc1") == N + 4
    assert f"`act` ({activation}) lets no factor through" in reasons(run)


def test_multiples_stay_when_scaled_is_off() -> None:
    run = merged(dense(op("Relu"), np.append(COPIES, MULTIPLES)), scaled=False)
    assert left(run, "fc1") == N + 4
    assert "lets no factor through" not in notes(run)


@pytest.mark.parametrize("activation", ["Relu", "Identity", "Tanh"])
def test_opposite_neurons_stay(activation: str) -> None:
    run = merged(dense(op(activation), np.array([-1.0, -2.0])))
    assert left(run, "fc1") == N + 2
    assert run.record.applied == ()


def test_neurons_that_differ_in_bias_alone_stay() -> None:
    run = merged(dense(op("Relu"), COPIES, shift=1.0))
    assert left(run, "fc1") == N + 4


LOW, HIGH = np.array(0, np.float32), np.array(6, np.float32)
SCALING: dict[str, tuple[Between, bool]] = {
    "Clip to zero and above": (op("Clip", LOW), True),
    "Clip to zero and six": (op("Clip", LOW, HIGH), False),
    "PRelu with one slope": (op("PRelu", np.array([0.2], np.float32)), True),
    "PRelu with equal slopes": (op("PRelu", np.full(N + 4, 0.2, np.float32)), True),
    "times a number": (op("Mul", np.array(3, np.float32)), True),
    "a number divided": (op("Div", np.array(3, np.float32)), True),
    "a number added": (op("Add", np.array(3, np.float32)), False),
    "zeros added": (op("Add", np.zeros(N + 4, np.float32)), True),
    "at least zero": (op("Max", LOW), True),
    "at most six": (op("Min", HIGH), False),
    "itself times its sigmoid": (lambda net, x: net.node("Mul", x, net.node("Sigmoid", x)), False),
    "itself plus its relu": (lambda net, x: net.node("Add", x, net.relu(x)), True),
    "squared": (lambda net, x: net.node("Mul", x, x), False),
}


@pytest.mark.parametrize("case", SCALING)
def test_a_scale_passes_where_it_should_and_only_there(case: str) -> None:
    between, passes = SCALING[case]
    run = merged(dense(between, MULTIPLES))
    assert left(run, "fc1") == (N if passes else N + 4)
    assert change(run) < EXACT
    assert left(merged(dense(between, COPIES)), "fc1") == N


POOLS: dict[str, Between] = {
    "MaxPool": op("MaxPool", kernel_shape=[3, 3], pads=[1] * 4),
    "AveragePool": op("AveragePool", kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1),
    "GlobalAveragePool": op("GlobalAveragePool"),
    "ReduceMean": op("ReduceMean", np.array([2, 3]), keepdims=1),
    "Pad": op("Pad", np.array([0, 0, 1, 1, 0, 0, 1, 1])),
}


@pytest.mark.parametrize("case", POOLS)
def test_multiples_go_through_pooling(case: str) -> None:
    run = merged(convolution(POOLS[case], MULTIPLES))
    assert left(run, "conv1") == N
    assert change(run) < EXACT


def test_slopes_per_channel_are_refused() -> None:
    run = merged(dense(op("PRelu", np.linspace(0.1, 0.9, N + 4).astype(np.float32)), COPIES))
    assert left(run, "fc1") == N + 4
    assert "fc1: `act` (PRelu) has other constants for every unit" in reasons(run)


def normalised(equal: bool) -> Between:
    parent, _ = copies(COPIES, 0)
    draw = np.random.default_rng(4).uniform(0.5, 1.5, (4, N + 4)).astype(np.float32)
    if equal:
        draw = draw[:, parent]
    return op("BatchNormalization", *draw)


def test_copies_merge_where_their_normalisation_is_the_same() -> None:
    run = merged(convolution(normalised(equal=True), COPIES))
    assert left(run, "conv1") == N
    assert change(run) < EXACT


def test_normalisation_of_each_channel_by_its_own_constants_is_refused() -> None:
    run = merged(convolution(normalised(equal=False), COPIES))
    assert left(run, "conv1") == N + 4
    assert "`act` (BatchNormalization) has other constants for every unit" in reasons(run)


def test_units_of_different_slopes_stay_apart_while_equal_ones_merge() -> None:
    parent, _ = copies(COPIES, 0)
    slopes = np.full(N + 4, 0.2, np.float32)
    first = int(np.flatnonzero(np.bincount(parent)[parent] > 1)[0])
    slopes[first] = 0.7
    run = merged(dense(op("PRelu", slopes), COPIES))
    assert left(run, "fc1") == N + 1
    assert change(run) < EXACT


@pytest.mark.parametrize(("activation", "scales"), [("Relu", MULTIPLES), ("Gelu", COPIES)])
def test_a_bias_added_after_a_matmul_counts_as_the_layers_own(activation: str, scales: Array) -> None:
    parent, scale = copies(scales.astype(np.float32), 2)
    rng = np.random.default_rng(5)
    w, b = drawn(rng, 9, N)[:, parent] * scale, drawn(rng, N)[parent] * scale
    net = Net()
    x = net.node("MatMul", net.input("x", ["N", 5, 9]), net.constant(w.astype(np.float32)), name="up")
    x = net.node("Add", net.constant(b.astype(np.float32)), x)
    x = net.node(activation, x) if activation == "Relu" else net.node("Mul", x, net.node("Sigmoid", x))
    run = merged(net.model(net.node("MatMul", x, net.constant(drawn(rng, N + 4, 4)), name="down")))
    assert left(run, "up") == N
    assert change(run) < EXACT


def test_permuting_the_neurons_permutes_the_answer() -> None:
    model = builders.mlp(2)
    order = np.random.default_rng(0).permutation(24)
    shuffled = builders.mlp(2)
    for name, axis in (("fc1.w", 0), ("fc1.b", 0), ("fc2.w", 1)):
        value = shuffled.graph.initializers[name]
        array = graph.constant(value)
        assert array is not None
        use = next(iter(value.uses()))
        graph.replace_constant(use.node, use.idx, np.take(array, order, axis))
    rows = []
    for net in (model, shuffled):
        found = graph.constant(graph.node_named(merged(net, amount=0.4, only=["fc1"]).model.graph, "fc2").inputs[1])
        assert found is not None
        rows.append(found[:, np.lexsort(found)])
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_widening_and_merging_gives_the_original_back(seed: int) -> None:
    """Net2Wider (Chen et al. 2015, arXiv:1511.05641): copies share their readers' columns."""
    small, wide = builders.mlp(seed), builders.mlp(seed)
    for first, second in (("fc1", "fc2"), ("fc2", "fc3")):
        rng = np.random.default_rng(seed)
        a, b = (graph.node_named(wide.graph, name) for name in (first, second))
        w, bias, W = (graph.constant(v) for v in (a.inputs[1], a.inputs[2], b.inputs[1]))
        assert w is not None
        assert bias is not None
        assert W is not None
        parent = np.append(np.arange(len(w)), rng.integers(0, len(w), 7))
        graph.replace_constant(a, 1, w[parent])
        graph.replace_constant(a, 2, bias[parent])
        graph.replace_constant(b, 1, (W / np.bincount(parent))[:, parent].astype(np.float32))
    run = merged(wide, cosine=0.99999)
    assert change(run) < EXACT
    for name in ("fc1", "fc2", "fc3"):
        layer, was = (graph.node_named(m.graph, name) for m in (run.model, small))
        for mine, its in zip(layer.inputs[1:], was.inputs[1:], strict=True):
            found, wanted = graph.constant(mine), graph.constant(its)
            assert found is not None
            assert wanted is not None
            assert found.shape == wanted.shape
            assert np.allclose(np.sort(found, None), np.sort(wanted, None), atol=1e-5)


@pytest.mark.parametrize("amount", [0.1, 0.3, 0.5])
def test_an_amount_is_a_share_of_every_groups_units(amount: float) -> None:
    run = merged(builders.mlp(0), amount=amount)
    assert [left(run, name) for name in ("fc1", "fc2", "fc3")] == [24 - round(24 * amount), 16 - round(16 * amount), 5]


def test_predicted_error_rises_with_the_amount() -> None:
    errors = [float(notes(merged(builders.mlp(0), amount=a, only=["fc1"])).split()[-1]) for a in (0.1, 0.3, 0.5)]
    assert errors == sorted(errors)
    assert errors[0] > 0


def test_all_readers_make_up_for_what_goes() -> None:
    rng = np.random.default_rng(1)
    parent, scale = copies(MULTIPLES.astype(np.float32), 1)
    w = drawn(rng, N, 3, 1, 1)[parent] * scale[:, None, None, None]
    net = Net()
    x = net.relu(net.node("Conv", net.input("x", ["N", 3, 6, 6]), net.constant(w.astype(np.float32)), name="conv1"))
    y = [
        net.node("Conv", x, net.constant(drawn(rng, 4, N + 4, k, k)), name=f"read{k}", pads=[k // 2] * 4)
        for k in (1, 3)
    ]
    run = merged(net.model(*y))
    assert left(run, "conv1") == N
    assert change(run) < EXACT


@pytest.mark.parametrize("hidden", ["Transpose", "Constant"])
def test_a_readers_weight_behind_an_op_is_rewritten(hidden: str) -> None:
    model = dense(op("Relu"), MULTIPLES)
    node = graph.node_named(model.graph, "fc2")
    W = graph.constant(node.inputs[1])
    assert W is not None
    if hidden == "Transpose":
        stored = graph.add_constant(model.graph, "stored", W.T)
        found = graph.add_node("Transpose", [stored], {"perm": [1, 0]}, before=node, base="hide")
    else:
        found = ir.node("Constant", [], {"value": ir.tensor(W)}, name="hide")
        found.outputs[0].name = "hide_out"
        model.graph.insert_before(node, found)
    node.replace_input_with(1, found.outputs[0])
    graph.remove_dead(model.graph)
    run = merged(model)
    assert left(run, "fc1") == N
    assert change(run) < EXACT


def test_a_column_that_its_type_cannot_hold_is_an_error_with_a_way_out() -> None:
    net = Net()
    w, w2 = (net.constant(np.array(a, np.float16)) for a in ([[1000, 0.001]], [[60], [60000]]))
    x = net.node("MatMul", net.input("x", ["N", 1], ir.DataType.FLOAT16), w, name="up")
    model = net.model(net.node("MatMul", net.relu(x), w2, name="down"))
    with pytest.raises(PassError, match=r"(?s)weight of `down` is not finite.*scaled: false"):
        merged(model)
    assert left(merged(model, scaled=False), "up") == 2


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"amount": 0.5, "cosine": 0.9}, "not both"),
        ({"amount": 0}, "amount"),
        ({"amount": 1}, "amount"),
        ({"cosine": -0.5}, "cosine"),
        ({"cosine": 1.5}, "cosine"),
        ({"cosine": True}, "cosine"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], wrong: str) -> None:
    with pytest.raises(ValidationError, match=wrong):
        MergeNeurons.model_validate(options)
