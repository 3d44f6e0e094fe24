"""What passes share that leave a weight few values: where, how strong, what is lost, and the file that comes out."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import driver
import numpy as np
import onnx_ir as ir
import pytest
from builders import Net
from calibrated import calibration, error, feeds, layers, outputs, set_weight, skips, weight

from ccompile import fitting, graph, runtime
from ccompile.coding import Coding, sliced
from ccompile.core import Choice, Site, Skip, View
from ccompile.decoding import Sliced
from ccompile.errors import PassError
from ccompile.executor import executor
from ccompile.passes.binarize_weights import BinarizeWeights
from ccompile.passes.cluster_vectors import ClusterVectors
from ccompile.passes.cluster_weights import ClusterWeights
from ccompile.passes.prune_weights import PruneWeights
from ccompile.passes.quantize_weights import QuantizeWeights
from ccompile.target import load_target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibrated import Feeds

    from ccompile.core import Array
    from ccompile.moments import Layer

KINDS: dict[str, type[Coding]] = {
    "cluster": ClusterWeights,
    "quantize": QuantizeWeights,
    "binarize": BinarizeWeights,
    "prune": PruneWeights,
    "vectors": ClusterVectors,
}
STRONG: dict[str, dict[str, Any]] = {
    "cluster": {"bits": 2},
    "quantize": {"bits": 2},
    "binarize": {"values": "ternary"},
    "vectors": {"bits": 6},
}
PLAIN: dict[str, Any] = {"statistics": "weights"}


def code(
    kind: str, model: ir.Model, batches: Sequence[Feeds] | None = None, target: str = "", jobs: int = 1, **options: Any
) -> driver.Bench:
    """Run a pass, calibrated on `batches` (none when empty), with a tolerance that always holds."""
    given = feeds(model) if batches is None else batches
    run = driver.bench(model, feeds(model, seed=6))
    run.statistics = calibration(model, given) if given else None
    if target:
        run.request = replace(run.request, spec=replace(run.request.spec, target=load_target(target, Path())))
        run.origin = run.state = run._state(model, run.state.outputs)
    with executor(jobs) as run.executor:
        run.step(0, KINDS[kind].model_validate({"tolerance": {"relative_l2": 1e9}, **options}))
    return run


def made(run: driver.Bench) -> dict[str, str]:
    return {site.nodes[0]: site.note for site in run.record.applied}


def lost(run: driver.Bench, name: str) -> float:
    """The share of a layer's power that its note tells."""
    found = re.search(r"([\d.e+-]+) of the (?:output|weight)'s power lost", made(run)[name])
    assert found is not None
    return float(found.group(1))


def stored_bytes(run: driver.Bench) -> int:
    return int(run.price(run.model).report.stored_bytes)


def bytes_of(model: ir.Model) -> bytes:
    found: bytes = driver.proto_of(model).SerializeToString(deterministic=True)
    return found


def shape_of(model: ir.Model, name: str) -> tuple[int, ...]:
    return weight(model, name).shape


def wide(seed: int = 0, bias: bool = True) -> ir.Model:
    """x[N, 64] -> 64 -> 48 -> 10, with or without biases."""
    net = Net(seed)
    h, sizes = net.input("x", ["N", 64]), (64, 64, 48, 10)
    for index, (ins, outs) in enumerate(itertools.pairwise(sizes)):
        bias_of = [net.weight(f"b{index}", (outs,))] if bias else []
        h = net.node("Gemm", h, net.weight(f"w{index}", (ins, outs)), *bias_of, name=f"fc{index}")
        h = net.relu(h) if index < 2 else h
    return net.model(h)


def mixed(seed: int = 0) -> list[Feeds]:
    """Inputs of `wide` that are correlated and off zero."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(9).standard_normal((64, 64)) * np.geomspace(1, 0.05, 64)
    return [{"x": (rng.standard_normal((96, 64)) @ mix.T + 0.5).astype(np.float32)} for _ in range(2)]


# ---------------------------------------------------------------------------------------------- what is lost


@pytest.mark.parametrize(
    ("kind", "strength"),
    [("cluster", {"bits": bits}) for bits in range(1, 7)]
    + [("quantize", {"bits": bits}) for bits in (2, 3, 4, 5, 6, 8)]
    + [("binarize", {"values": values}) for values in ("binary", "ternary", "powers-3")]
    + [("vectors", {"bits": bits, "size": 4}) for bits in (2, 5, 8)],
)
def test_data_lose_no_more_than_none_on_the_layer_that_they_are_of(kind: str, strength: dict[str, Any]) -> None:
    model, batches = wide(), mixed()
    options = {**strength, "only": ["fc0"], "refit": False}
    found = []
    for run in (code(kind, model, batches, **options), code(kind, model, **options, **PLAIN)):
        assert made(run).keys() == {"fc0"}
        pairs = [
            [outputs(m, batch, "fc0_out")["fc0_out"].astype(np.float64) for batch in batches]
            for m in (run.model, model)
        ]
        found.append(
            sum(float(np.square(np.maximum(a, 0) - np.maximum(b, 0)).sum()) for a, b in zip(*pairs, strict=True))
        )
    assert found[0] <= found[1]


@pytest.mark.parametrize("kind", ["cluster", "quantize", "vectors"])
def test_what_is_told_is_what_is_lost(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "SIGHTS", 0)  # towards the outputs themselves
    model, batches = wide(), mixed()
    run = code(kind, model, batches, **STRONG[kind], only=["fc1"], refit=False, ridge=1e-9)
    pairs = [
        [outputs(m, batch, "fc1_out")["fc1_out"].astype(np.float64) for batch in batches] for m in (run.model, model)
    ]
    now, was = (np.concatenate(part) for part in pairs)
    told = float(np.square(now - was).sum() / np.square(was - was.mean(0)).sum())
    assert lost(run, "fc1") == pytest.approx(told, rel=0.01)


@pytest.mark.parametrize("kind", STRONG)
def test_without_data_the_weights_loss_is_told(kind: str) -> None:
    model = wide()
    run = code(kind, model, [], **STRONG[kind], **PLAIN)
    for name in layers(model):
        W, What = weight(model, name), weight(run.model, name)
        assert lost(run, name) == pytest.approx(float(np.square(What - W).sum() / np.square(W).sum()), rel=0.1)


@pytest.mark.parametrize("kind", STRONG)
def test_the_mean_goes_into_the_bias(kind: str) -> None:
    model, batches = wide(), mixed()
    run = code(kind, model, batches, **STRONG[kind], only=["fc2"], refit=False)
    pairs = [np.concatenate([outputs(m, batch)["fc2_out"] for batch in batches]) for m in (run.model, model)]
    np.testing.assert_allclose(pairs[0].mean(0), pairs[1].mean(0), atol=2e-4 * np.abs(pairs[1]).max())


def test_layers_behind_make_up_for_what_is_lost() -> None:
    model, batches = wide(), mixed()
    options: dict[str, Any] = {"bits": 2, "only": ["fc0"]}
    repaired, bare = (code("cluster", model, batches, **options, refit=refit) for refit in (True, False))
    assert error(repaired.model, model, batches) < error(bare.model, model, batches)
    assert np.array_equal(weight(bare.model, "fc2"), weight(model, "fc2"))
    assert not np.array_equal(weight(repaired.model, "fc2"), weight(model, "fc2"))


@pytest.mark.parametrize("kind", ["cluster", "quantize", "vectors"])
def test_choices_begin_with_the_whole_layer_and_store_less_and_lose_more(kind: str) -> None:
    model = wide()
    step = KINDS[kind].model_validate({"error": 0.1, **PLAIN})
    view = view_of(step, model)
    sites = [site for site in step.sites(view) if isinstance(site, Site)]
    assert len(sites) == 3
    for site in sites:
        whole, *rest = step.choices(site, view)
        W = weight(model, site.nodes[0])
        assert whole == Choice(0.0, 0.0, W.size, whole.macs, stored_bytes=float(W.nbytes))
        assert len(rest) > (2 if W.size > 1000 else 0)  # of a small weight the forms' own bytes are most
        assert all(b.stored_bytes < a.stored_bytes for a, b in itertools.pairwise((whole, *rest)))
        assert all(b.error >= a.error * (1 - 1e-6) for a, b in itertools.pairwise(rest))


def view_of(step: Coding, model: ir.Model) -> View:
    """Return a view without statistics and prices, as `inspect` makes one."""
    target = load_target("generic-cpu", Path())
    evaluate = lambda values: runtime.evaluate(values, runtime.Settings(1))  # noqa: E731
    return View(graph.copy(model), target, np.random.default_rng(0), step, graph.facts, evaluate)


# ---------------------------------------------------------------------------------------------- how strong


@pytest.mark.parametrize("kind", ["cluster", "quantize", "binarize"])
def test_an_error_is_a_bound_on_what_each_layer_loses(kind: str) -> None:
    options: dict[str, Any] = {"binarize": {"values": "powers-3", "error": 0.1}}.get(kind, {"error": 0.02})
    run = code(kind, wide(), [], **options, **PLAIN)
    assert made(run)
    for name in made(run):
        assert lost(run, name) <= options["error"]
    stricter = code(kind, wide(), [], **{**options, "error": 1e-9}, **PLAIN)
    assert not made(stricter)
    assert all(re.search("the mildest, loses|no form is smaller", reason) for reason in skips(stricter).values())


def test_a_layer_may_have_bits_of_its_own() -> None:
    run = code("cluster", wide(), [], bits=4, layers={"fc1": 2, "nothing*": 1}, **PLAIN)
    counts = {name: len(np.unique(weight(run.model, name))) for name in made(run)}
    assert counts == {"fc0": 16, "fc1": 4, "fc2": 16}
    run = code("quantize", wide(), [], error=0.3, scope="tensor", layers={"fc0": 8}, **PLAIN)
    assert "8 bits" in made(run)["fc0"]
    assert "8 bits" not in made(run)["fc1"]


def test_bits_that_would_store_no_less_are_refused() -> None:
    net = Net(0)
    model = net.model(net.dense(net.input("x", ["N", 10]), "fc", 10, 10))
    assert skips(code("quantize", model, [], bits=16, **PLAIN)) == {"fc": "16 bits would store no less"}


@pytest.mark.parametrize("statistics", ["calibration", "weights"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "options", "share"),
    [
        ("cluster", {}, 0.2),
        ("cluster", {}, 0.12),
        ("cluster", {"scope": "channel"}, 0.25),
        ("quantize", {}, 0.2),
        ("quantize", {"scope": "group", "columns": 16}, 0.25),
        ("binarize", {}, 0.5),
        ("binarize", {"values": "ternary", "scope": "tensor"}, 0.3),
        ("vectors", {"size": 2}, 0.2),
    ],
)
def test_a_budget_is_met(kind: str, options: dict[str, Any], share: float, bias: bool, statistics: str) -> None:
    model = wide(bias=bias)
    run = code(kind, model, keep={"stored_bytes": share}, sensitivity=False, statistics=statistics, **options)
    assert made(run)
    assert stored_bytes(run) <= share * run.origin.cost.report.stored_bytes
    if kind != "binarize":  # which has two forms of each layer
        assert stored_bytes(run) > 0.6 * share * run.origin.cost.report.stored_bytes


def test_a_budget_goes_to_the_layer_that_moves_the_outputs() -> None:
    net = Net(0)
    x = net.input("x", ["N", 48])
    quiet = net.node("Mul", net.dense(x, "quiet", 48, 48), net.constant(np.float32(1e-3).reshape(1), "scale"))
    model = net.model(net.node("Add", net.dense(x, "loud", 48, 48), quiet))
    run = code("cluster", model, keep={"stored_bytes": 0.6}, refit=False)
    assert made(run).keys() == {"quiet"}
    assert skips(run) == {"loud": "the budget leaves it whole"}


def test_a_layer_with_bits_of_its_own_has_them_under_a_budget_too() -> None:
    run = code("cluster", wide(), [], keep={"stored_bytes": 0.9}, layers={"fc0": 2}, sensitivity=False, **PLAIN)
    assert "4 levels" in made(run)["fc0"]


def test_a_budget_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(PassError, match="the budget cannot be met"):
        code("cluster", wide(), [], keep={"stored_bytes": 0.01}, **PLAIN)


@pytest.mark.parametrize("options", [{"bits": 1}, {"keep": {"stored_bytes": 0.1}, "sensitivity": False}])
def test_what_breaks_goes_back_until_it_holds(options: dict[str, Any]) -> None:
    given = {"tolerance": {"relative_l2": 0.2}, **options, **PLAIN}
    assert code("cluster", wide(), [], on_violation="fail", **given).record.verdict == "failed"
    run = code("cluster", wide(), [], on_violation="weaken", **given)
    assert run.record.verdict == "weakened"
    assert made(run)
    assert stored_bytes(run) < run.origin.cost.report.stored_bytes


# ---------------------------------------------------------------------------------------------- where


def gemm(alpha: float = 1.0, beta: float = 1.0, turned: bool = False) -> ir.Model:
    net = Net(0)
    w = net.weight("w", (24, 32) if turned else (32, 24))
    operands = [net.input("x", ["N", 32]), w, net.weight("b", (24,))]
    return net.model(net.node("Gemm", *operands, name="layer", alpha=alpha, beta=beta, transB=int(turned)))


def matmul(left: bool) -> ir.Model:
    net = Net(0)
    x, w = net.input("x", ["N", 32, 7] if left else ["N", 7, 32]), net.weight("w", (24, 32) if left else (32, 24))
    return net.model(net.node("MatMul", *((w, x) if left else (x, w)), name="layer"))


def convolution(groups: int, transposed: bool = False) -> ir.Model:
    net = Net(0)
    x, w = net.input("x", ["N", 16, 6, 6]), net.weight("w", (16, 16 // groups, 3, 3))
    op = "ConvTranspose" if transposed else "Conv"
    return net.model(net.node(op, x, w, net.weight("b", (16,)), name="layer", group=groups, pads=[1] * 4))


LAYERS = {
    "gemm": lambda: gemm(),
    "scaled": lambda: gemm(0.5, 2.0),
    "turned": lambda: gemm(-2.0, 0.5, turned=True),
    "right": lambda: matmul(left=False),
    "left": lambda: matmul(left=True),
    "conv": lambda: convolution(1),
    "grouped": lambda: convolution(4),
    "depthwise": lambda: convolution(16),
    "transposed": lambda: convolution(1, transposed=True),
    "transposed-grouped": lambda: convolution(4, transposed=True),
}
TENSOR: dict[str, dict[str, Any]] = {
    "cluster": {"bits": 6},
    "quantize": {"bits": 6, "scope": "tensor"},
    "binarize": {"values": "powers-4", "scope": "tensor"},
}


@pytest.mark.parametrize("kind", TENSOR)
@pytest.mark.parametrize("net", LAYERS)
@pytest.mark.parametrize("statistics", ["calibration", "weights"])
def test_every_kind_of_layer_is_coded(kind: str, net: str, statistics: str) -> None:
    model = LAYERS[net]()
    batches = feeds(model, (24, 24))
    small = weight(model, "layer", 0 if net == "left" else 1).size < 200
    options = {"bits": 3, "scope": "tensor"} if small and kind != "binarize" else TENSOR[kind]
    run = code(kind, model, batches, **options, statistics=statistics)
    if small and not made(run):
        assert "would store no less" in skips(run)["layer"]
        return
    assert made(run).keys() == {"layer"}
    now, was = (weight(m, "layer", 0 if net == "left" else 1) for m in (run.model, model))
    assert now.shape == was.shape
    assert len(np.unique(now)) <= 64
    assert error(run.model, model, batches) < (0.3 if small or kind == "binarize" else 0.1)


@pytest.mark.parametrize("kind", ["cluster", "quantize"])
@pytest.mark.parametrize("net", ["gemm", "turned", "right", "left", "conv", "grouped"])
@pytest.mark.parametrize(("scope", "columns"), [("channel", 0), ("group", 12), ("group", 16)])
def test_rows_and_blocks_have_tables_or_scales_of_their_own(kind: str, net: str, scope: str, columns: int) -> None:
    model = LAYERS[net]()
    form = layers(model)["layer"]
    given: dict[str, Any] = {"scope": scope, **({"columns": columns} if columns else {})}
    run = code(kind, model, feeds(model, (24,)), bits=2, **given)
    if columns and form.columns % columns:
        assert skips(run) == {"layer": f"its rows of {form.columns} weights do not fall into groups of {columns}"}
        return
    if not made(run):
        assert "would store no less" in skips(run)["layer"]
        return
    rows = matrix_of(run.model, "layer").reshape(form.groups * form.out, -1, columns or form.columns)
    assert max(len(np.unique(block)) for row in rows for block in row) <= 4
    assert len(np.unique(rows)) > 8
    assert error(run.model, model, feeds(model, (24,))) < 0.6


@pytest.mark.parametrize("net", ["gemm", "scaled", "turned", "right", "left", "conv", "grouped"])
@pytest.mark.parametrize("statistics", ["calibration", "weights"])
def test_blocks_of_rows_are_few_vectors(net: str, statistics: str) -> None:
    model = LAYERS[net]()
    batches = feeds(model, (24, 24))
    run = code("vectors", model, batches, bits=5, size=4, statistics=statistics)
    assert "32 vectors of 4" in made(run)["layer"]
    assert "blocks of 4, codebook" in made(run)["layer"]
    assert len(np.unique(matrix_of(run.model, "layer").reshape(-1, 4), axis=0)) <= 32
    assert error(run.model, model, batches) < 0.6
    assert stored_bytes(run) < run.origin.cost.report.stored_bytes


@pytest.mark.parametrize("net", ["gemm", "turned", "conv", "grouped", "transposed"])
@pytest.mark.parametrize("statistics", ["calibration", "weights"])
def test_outliers_keep_values_of_their_own(net: str, statistics: str) -> None:
    model = LAYERS[net]()
    batches = feeds(model, (24, 24))
    run = code("cluster", model, batches, bits=2, outliers=0.02, statistics=statistics)
    bare = code("cluster", model, batches, bits=2, statistics=statistics)
    W = weight(run.model, "layer")
    if W.size > 1000:  # of a small one another form is smaller
        assert f"{round(0.02 * W.size)} outliers" in made(run)["layer"]
    assert 4 + round(0.01 * W.size) < len(np.unique(W)) <= 4 + round(0.02 * W.size)
    assert error(run.model, model, batches) < error(bare.model, model, batches)
    assert stored_bytes(run) < run.origin.cost.report.stored_bytes


@pytest.mark.parametrize("net", ["gemm", "turned", "right", "left", "conv", "grouped", "transposed"])
@pytest.mark.parametrize("statistics", ["calibration", "weights"])
def test_signs_of_inputs_are_what_a_layer_reads(net: str, statistics: str) -> None:
    model = LAYERS[net]()
    (batch, *_) = batches = feeds(model, (24, 24))
    run = code("binarize", model, batches, inputs="sign", scope="tensor", statistics=statistics)
    node = graph.node_named(run.model.graph, "layer")
    read = node.inputs[1 if net == "left" else 0]
    assert read is not None
    x = batch["x"]
    axis = {"conv": 1, "grouped": 1, "transposed": 1, "left": -2}.get(net, -1)
    wanted = np.sign(x) * np.abs(x).mean(axis, keepdims=True)
    np.testing.assert_allclose(outputs(run.model, batch, str(read.name))[str(read.name)], wanted, rtol=1e-5)
    if statistics == "calibration" and net in ("gemm", "conv"):
        assert error(run.model, model, batches) < error(
            code("binarize", model, batches, inputs="sign", scope="tensor", **PLAIN).model, model, batches
        )


def test_signs_of_inputs_take_no_limit() -> None:
    with pytest.raises(ValueError, match="give neither `error` nor `keep`"):
        BinarizeWeights(inputs="sign", error=0.1)


def test_outliers_beside_zeros_that_stay() -> None:
    model = wide()
    for name in layers(model):
        W = weight(model, name).copy()
        W[np.abs(W) < np.median(np.abs(W))] = 0
        set_weight(model, name, W)
    run = code("cluster", model, mixed(), bits=3, outliers=0.01)
    for name in made(run):
        assert np.array_equal(weight(run.model, name) == 0, weight(model, name) == 0)


def test_outliers_go_with_one_table() -> None:
    with pytest.raises(ValueError, match="`outliers` go with one table"):
        ClusterWeights(bits=2, outliers=0.01, scope="channel")


def test_rows_that_do_not_fall_into_blocks_say_so() -> None:
    assert skips(code("vectors", LAYERS["conv"](), [], bits=5, size=5, **PLAIN)) == {
        "layer": "its rows of 144 weights do not fall into blocks of 5"
    }
    assert "do not lie together" in skips(code("vectors", LAYERS["transposed"](), [], bits=5, **PLAIN))["layer"]


def matrix_of(model: ir.Model, name: str) -> Array:
    from ccompile.analysis import linear

    node = graph.node_named(model.graph, name)
    form = linear.layer(node)
    assert not isinstance(form, str)
    return linear.matrix(node, form)


def test_rows_of_a_transposed_convolution_do_not_lie_together() -> None:
    for scope in ("channel", "group"):
        run = code("cluster", LAYERS["transposed"](), [], bits=2, scope=scope, **PLAIN)
        assert "`scope: tensor` codes it" in skips(run)["layer"]


def test_slices_of_a_stored_weight() -> None:
    def form(net: str) -> Layer:
        return layers(LAYERS[net]())["layer"]

    assert sliced(form("conv"), "tensor") == Sliced(1, 16 * 144, 1)
    assert sliced(form("conv"), "channel") == Sliced(16, 144, 1)
    assert sliced(form("grouped"), "group", 12) == Sliced(48, 12, 1)
    assert sliced(form("gemm"), "channel") == Sliced(1, 32, 24)
    assert sliced(form("gemm"), "group", 8) == Sliced(4, 8, 24)
    assert sliced(form("turned"), "group", 8) == Sliced(96, 8, 1)
    assert sliced(form("left"), "channel") == Sliced(24, 32, 1)
    assert isinstance(sliced(form("transposed"), "channel"), str)


@pytest.mark.parametrize("kind", ["cluster", "quantize", "vectors"])
@pytest.mark.parametrize("statistics", ["calibration", "weights"])
def test_half_precision_stays_half_precision(kind: str, statistics: str) -> None:
    net, draw = Net(0), np.random.default_rng(0)
    x = net.input("x", ["N", 48], ir.DataType.FLOAT16)
    w, b = draw.standard_normal((48, 40)).astype(np.float16), draw.standard_normal(40).astype(np.float16)
    model = net.model(net.node("Gemm", x, net.constant(w, "w"), net.constant(b, "b"), name="fc"))
    options: dict[str, Any] = {"size": 2, "bits": 7} if kind == "vectors" else {"bits": 4}
    run = code(kind, model, **options, statistics=statistics)
    assert made(run)
    assert weight(run.model, "fc").dtype == np.float16
    assert stored_bytes(run) < 0.4 * run.origin.cost.report.stored_bytes
    assert error(run.model, model, feeds(model)) < 0.2


def test_layers_left_alone_say_why() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 18]>
    g (float[N,16] x, float[16,16] open) => (float[N,16] y)
    <float[16,16] w0, float[16,16] s> {
        [named] a = MatMul (x, w0)
        [free] b = MatMul (a, open)
        [one] d = MatMul (b, s)
        [two] y = MatMul (d, s)
    }
    """
    model, _ = driver.model_of(text)
    run = code("cluster", model, [], bits=2, skip=["named"], **PLAIN)
    assert skips(run) == {
        "named": "named by `skip`: named",
        "free": "its weight is not constant",
        "one": "its weight is shared",
        "two": "its weight is shared",
    }


def test_weights_that_cannot_be_coded_say_why() -> None:
    net = Net(0)
    x = net.input("x", ["N", 64])
    infinite = np.ones((64, 64), np.float32)
    infinite[3, 3] = np.inf
    h = net.node("MatMul", x, net.constant(infinite, "w0"), name="infinite")
    step = ClusterWeights(bits=2, statistics="weights")
    found = {site.node: site.reason for site in step.sites(view_of(step, net.model(h))) if isinstance(site, Skip)}
    assert found == {"infinite": "its weight is not finite"}


def test_old_opsets_are_refused() -> None:
    model = wide()
    model.graph.opset_imports[""] = 10
    assert set(skips(code("cluster", model, [], bits=2, **PLAIN)).values()) == {
        "codes need opset 11, and the model has 10"
    }


def test_a_layer_too_wide_to_fit_says_what_codes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "WIDEST", 50)
    run = code("cluster", wide(), bits=2)
    assert made(run).keys() == {"fc2"}
    reason = "it has more than 50 columns per group: `statistics: weights` codes it"
    assert skips(run) == {"fc0": reason, "fc1": reason}


def test_without_calibration_data_the_remedy_is_told() -> None:
    with pytest.raises(PassError, match=r"(?s)the spec gives none.*`statistics: weights`"):
        code("cluster", wide(), [], bits=2)


# ---------------------------------------------------------------------------------------------- one after the other


def test_a_weight_may_be_coded_again() -> None:
    model = wide()
    first = code("cluster", model, [], bits=4, **PLAIN)
    again = code("cluster", first.model, [], bits=2, **PLAIN)
    assert made(again).keys() == {"fc0", "fc1"}
    assert skips(again) == {"fc2": "4 levels would store no less"}  # of 480 weights
    assert all(len(np.unique(weight(again.model, name))) == 4 for name in made(again))
    assert stored_bytes(again) < stored_bytes(first)
    same = code("cluster", first.model, [], bits=4, **PLAIN)
    assert not made(same)
    assert set(skips(same).values()) == {"16 levels would store no less"}
    assert bytes_of(same.model) == bytes_of(first.model)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cluster", {"bits": 1}),
        ("cluster", {"bits": 3}),
        ("cluster", {"bits": 1, "scope": "channel"}),
        ("cluster", {"bits": 3, "scope": "channel"}),
        ("quantize", {"bits": 4}),
        ("quantize", {"bits": 3, "scope": "tensor"}),
    ],
)
def test_what_was_pruned_stays_pruned(kind: str, options: dict[str, Any]) -> None:
    model, batches = wide(), mixed()
    pruned = code("prune", model, batches, keep=0.3)
    run = code(kind, pruned.model, batches, **options)
    assert made(run).keys() >= {"fc0", "fc1"}
    for name in made(run):
        before, after = weight(pruned.model, name), weight(run.model, name)
        assert (before == 0).mean() > 0.5
        assert not after[before == 0].any()
    assert stored_bytes(run) < stored_bytes(pruned)


def test_zeros_may_be_given_up() -> None:
    pruned = code("prune", wide(), mixed(), keep=0.3)
    run = code("cluster", pruned.model, mixed(), bits=2, zeros=False)
    assert any(weight(run.model, name)[weight(pruned.model, name) == 0].any() for name in made(run))


def test_a_pruned_grid_is_stored_as_one() -> None:
    pruned = code("prune", wide(), mixed(), keep=0.3)
    run = code("quantize", pruned.model, mixed(), bits=4)
    assert "4-bit grid" in made(run)["fc0"]


# ---------------------------------------------------------------------------------------------- the file


def test_a_target_with_small_integers_gets_them_in_a_newer_opset() -> None:
    run = code("cluster", wide(), [], target="generic-cpu", bits=4, **PLAIN)
    has = run.request.spec.target.holds("uint4")
    kinds = {value.dtype for value in run.model.graph.initializers.values()}
    assert (ir.DataType.UINT4 in kinds) is has
    assert run.model.graph.opset_imports[""] == (21 if has else 18)


def test_a_target_without_the_ops_gets_plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        type(load_target("generic-cpu", Path())), "runs", lambda self, op, domain="": "Gather" not in op
    )
    run = code("cluster", wide(), [], bits=2, **PLAIN)
    assert all("Gather" not in node.op_type for node in run.model.graph)
    assert all(note.endswith("plain") for note in made(run).values())


@pytest.mark.parametrize("kind", STRONG)
def test_more_processes_and_a_second_run_give_the_same_bytes(kind: str) -> None:
    found = [bytes_of(code(kind, wide(), mixed(), jobs=jobs, **STRONG[kind]).model) for jobs in (1, 1, 2)]
    assert found[0] == found[1] == found[2]


def test_a_fit_beyond_the_weights_type_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = ClusterWeights.fit

    def huge(self: ClusterWeights, *given: Any, **more: Any) -> Any:
        found = fit(self, *given, **more)
        return replace(found, weight=found.weight * 1e60)

    monkeypatch.setattr(ClusterWeights, "fit", huge)
    with pytest.raises(PassError, match=r"(?s)is not finite.*`skip`"):
        code("cluster", wide(), [], bits=2, **PLAIN)
