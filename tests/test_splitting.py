"""What all splits share: known answers, what each loses on data, budgets, the sequential fit, and refusals."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import builders
import driver
import numpy as np
import onnx_ir as ir
import pytest
from builders import Net
from calibrated import calibration, dense_chain, error, feeds, layers, outputs, skips, weight

from ccompile import fitting, graph, runtime, split_prices
from ccompile.analysis import linear
from ccompile.core import Choice, Site, Skip, View
from ccompile.errors import PassError
from ccompile.executor import executor
from ccompile.numerics import atoms
from ccompile.passes.split_basis import SplitBasis
from ccompile.passes.split_cp import SplitCp
from ccompile.passes.split_separable import SplitSeparable
from ccompile.passes.split_spatial import TURNED, SplitSpatial
from ccompile.passes.split_svd import SplitSvd
from ccompile.passes.split_tucker import PAIR, SplitTucker
from ccompile.splitting import Factors, Split, cost_of
from ccompile.target import load_target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibrated import Feeds

    from ccompile.core import Array
    from ccompile.moments import Layer

KINDS: dict[str, type[Split]] = {
    "svd": SplitSvd,
    "spatial": SplitSpatial,
    "tucker": SplitTucker,
    "cp": SplitCp,
    "separable": SplitSeparable,
    "basis": SplitBasis,
}
QUICK = [kind for kind in KINDS if kind != "cp"]  # what takes CP minutes is in tests/test_split_cp.py, with less to fit


def split(kind: str, model: ir.Model, batches: Sequence[Feeds] | None = None, **options: Any) -> driver.Bench:
    """Run a split, calibrated on `batches` (none when empty), with a tolerance that always holds."""
    given = feeds(model) if batches is None else batches
    run = driver.bench(model, feeds(model, seed=6))
    run.statistics = calibration(model, given) if given else None
    run.step(0, KINDS[kind].model_validate({"tolerance": {"relative_l2": 1e9}, **options}))
    return run


def made(run: driver.Bench) -> dict[str, tuple[int, float]]:
    """Return the rank (as its choice has it) and the noted loss of each layer that was split, by its old name."""
    found = {}
    for site in run.record.applied:
        noted = re.match(r"ranks? (\d+)(?: and (\d+))? of \d+(?: and \d+)?, (\S+) of the", site.note)
        rank, output, loss = noted.groups()  # type: ignore[union-attr]
        coded = int(rank) + PAIR * int(output or 0) + TURNED * ("1 x k first" in site.note)
        found[site.nodes[0].rpartition("/")[0]] = (coded, float(loss))
    return found


def moved(run: driver.Bench, model: ir.Model, name: str, batches: Sequence[Feeds]) -> tuple[float, float]:
    """Return the summed squared change of a layer's output over all batches, and the variance of what it was."""
    value = layers(model)[name].output
    pairs = [[outputs(m, batch, value)[value].astype(np.float64) for batch in batches] for m in (run.model, model)]
    found, wanted = (np.concatenate([y.reshape(*y.shape[:2], -1) for y in part]) for part in pairs)
    assert wanted.size
    centred = wanted - wanted.mean((0, 2), keepdims=True)
    return float(np.square(found - wanted).sum()), float(np.square(centred).sum())


# ---------------------------------------------------------------------------------------------- what is lost

SITES = [
    ("svd", "residual", "b1"),
    ("svd", "residual", "short"),
    ("svd", "mlp", "fc2"),
    ("svd", "grouped", "conv2"),
    ("spatial", "residual", "b1"),
    ("spatial", "grouped", "conv2"),
    ("tucker", "residual", "b1"),
    ("tucker", "residual", "b2"),
    ("cp", "residual", "b1"),
    ("separable", "residual", "b1"),
    ("separable", "grouped", "conv1"),
    ("basis", "residual", "b2"),
]


@pytest.mark.parametrize(("kind", "net", "name"), SITES)
@pytest.mark.parametrize("rank", [1, 2])
def test_on_calibration_data_no_more_is_lost_than_without_and_what_is_noted(
    kind: str, net: str, name: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "SIGHTS", 0)  # towards the outputs themselves
    model = builders.ZOO[net](1)
    batches = feeds(model)
    for batch in batches:
        batch["x"] = batch["x"] * np.linspace(0.1, 2, batch["x"].shape[-1], dtype=np.float32) + np.float32(0.5)
    options = {"rank": rank, "only": [name], "refit": False}
    fitted = split(kind, model, batches, ridge=1e-9, **options)
    plain = split(kind, model, batches, statistics="weights", **options)
    assert made(fitted).keys() == made(plain).keys() == {name}
    (lost, power), (more, _) = (moved(run, model, name, batches) for run in (fitted, plain))
    assert 0 < lost <= more * (1 + 1e-6)
    assert made(fitted)[name][1] == pytest.approx(lost / power, rel=0.01)


def test_behind_an_activation_no_more_is_lost_than_by_a_fit_to_what_it_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(0)
    hidden = net.relu(net.dense(net.input("x", ["N", 20]), "fc", 20, 16))
    model = net.model(net.dense(hidden, "out", 16, 4))
    batches, value = feeds(model, (200, 200)), hidden.name
    lost = []
    for sights in (0, 2):
        monkeypatch.setattr(fitting, "SIGHTS", sights)
        run = split("svd", model, batches, rank=4, only=["fc"], refit=False, ridge=1e-9)
        lost.append(sum(float(np.square(seen(run.model, b, value) - seen(model, b, value)).sum()) for b in batches))
    assert lost[1] < 0.99 * lost[0]


def seen(model: ir.Model, batch: Feeds, name: str | None) -> Array:
    found: Array = outputs(model, batch, str(name))[str(name)].astype(np.float64)
    return found


def test_the_mean_goes_into_the_bias() -> None:
    net = Net(0)
    model = net.model(net.dense(net.input("x", ["N", 20]), "fc", 20, 16))
    batches = [{"x": batch["x"] + np.float32(10)} for batch in feeds(model, (64, 64))]
    run = split("svd", model, batches, rank=2)
    found, wanted = (np.concatenate([outputs(m, b)["fc_out"] for b in batches]) for m in (run.model, model))
    np.testing.assert_allclose(found.mean(0), wanted.mean(0), atol=1e-4 * np.abs(wanted).max())
    lost, power = moved(run, model, "fc", batches)
    assert lost < power
    without, _ = moved(split("svd", model, batches, rank=2, statistics="weights"), model, "fc", batches)
    assert without > 10 * lost


def test_a_layer_whose_columns_outnumber_its_rows_is_fitted() -> None:
    net = Net(0)
    model = net.model(net.dense(net.input("x", ["N", 300]), "fc", 300, 40))
    batches = feeds(model, (12, 12))
    run = split("svd", model, batches, rank=20)
    assert made(run).keys() == {"fc"}
    plain = split("svd", model, batches, rank=20, statistics="weights")
    assert error(run.model, model, batches) < 0.9 * error(plain.model, model, batches)


@pytest.mark.parametrize("kind", QUICK)
def test_full_rank_loses_nothing_and_no_rank_more_than_all_with_few_samples(kind: str) -> None:
    model = builders.residual_net(0)
    form, node = layers(model)["b1"], graph.node_named(model.graph, "b1")
    step = KINDS[kind].model_validate({"keep": 0.5})
    (moments,) = calibration(model, feeds(model, (1,))).moments(model, [form]).values()
    assert moments.rows < form.columns
    metrics = fitting.metrics(moments, linear.matrix(node, form), None)
    ranks = range(1, step.most(form) + 1)
    lost = step.shares_lost((metrics, form, ranks))
    assert lost[-1] == pytest.approx(0, abs=1e-9)
    assert 0.2 < lost[0] < 1
    assert all(b <= a * 1.02 + 1e-9 for a, b in itertools.pairwise(lost))


# ---------------------------------------------------------------------------------------------- the sequential fit


def bypassed(seed: int = 0) -> ir.Model:
    """y = W2 [W1 x; x]: of rank 3 in x, although W2 is of full rank."""
    rng = np.random.default_rng(seed)
    net = Net(seed)
    x = net.input("x", ["N", 10])
    W1, read = rng.standard_normal((12, 10)), rng.standard_normal((8, 12))
    total = rng.standard_normal((8, 3)) @ rng.standard_normal((3, 10))
    W2 = np.concatenate([read, total - read @ W1], 1)
    h = net.node("Gemm", x, net.constant(W1.astype(np.float32), "w1"), name="fc1", transB=1)
    both = net.node("Concat", h, x, axis=1)
    return net.model(net.node("Gemm", both, net.constant(W2.astype(np.float32), "w2"), name="fc2", transB=1))


def test_a_layer_is_fitted_to_what_the_split_before_it_really_makes() -> None:
    model = bypassed()
    batches = feeds(model, (64, 64))
    run = split("svd", model, batches, rank=3, ridge=1e-12)
    assert made(run)["fc1"][1] > 0.1
    assert made(run).keys() == {"fc1", "fc2"}
    assert error(run.model, model, batches) < 1e-3
    plain = split("svd", model, batches, rank=3, statistics="weights")
    assert error(plain.model, model, batches) > 0.1


def test_layers_behind_a_split_make_up_for_it() -> None:
    model = bypassed()
    batches = feeds(model, (64, 64))
    options = {"rank": 3, "only": ["fc1"], "ridge": 1e-12}
    assert error(split("svd", model, batches, **options).model, model, batches) < 1e-3
    assert error(split("svd", model, batches, refit=False, **options).model, model, batches) > 0.1


@pytest.mark.parametrize("refit", [True, False])
def test_refit_says_whether_layers_that_are_not_split_change(refit: bool) -> None:
    model = builders.mlp(0)
    run = split("svd", model, rank=3, only=["fc2"], refit=refit)
    assert made(run).keys() == {"fc2"}
    assert np.array_equal(weight(run.model, "fc1"), weight(model, "fc1"))
    assert np.array_equal(weight(run.model, "fc3"), weight(model, "fc3")) is not refit


def test_the_sum_of_a_residual_path_is_what_its_last_layer_is_fitted_to() -> None:
    net = Net(0)
    x = net.input("x", ["N", 10])
    short, main = net.dense(x, "short", 10, 12), net.dense(x, "main", 10, 12)
    model = net.model(net.node("Add", main, short, name="add"))
    batches = feeds(model, (64, 64))
    options = {"rank": 2, "only": ["short"], "ridge": 1e-12}
    assert error(split("svd", model, batches, **options).model, model, batches) < 1e-3
    assert error(split("svd", model, batches, refit=False, **options).model, model, batches) > 0.1


# ---------------------------------------------------------------------------------------------- strengths


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0.5, 0.3])
def test_a_share_is_never_exceeded_and_one_more_rank_would(kind: str, keep: float) -> None:
    model = builders.residual_net(0)
    run = split(kind, model, keep=keep, statistics="weights")
    step = KINDS[kind].model_validate({"keep": keep})
    whole = {node.name: node.macs for node in run.origin.cost.nodes}
    now = {node.name: node.macs for node in run.price(run.model).nodes}
    assert len(made(run)) > 2
    for site in run.record.applied:
        name = site.nodes[0].rpartition("/")[0]
        form, (rank, _) = layers(model)[name], made(run)[name]
        parts = [now[part] for part in site.nodes]
        shapes, larger = step.shapes(form, rank), step.shapes(form, rank + (PAIR if kind == "tucker" else 1))
        assert sum(parts) <= keep * whole[name]
        more = [part * math.prod(b) / math.prod(a) for part, a, b in zip(parts, shapes, larger, strict=True)]
        assert sum(more) > keep * whole[name]


def test_a_layer_may_keep_another_share() -> None:
    model = dense_chain(3, 16)
    run = split("svd", model, keep=0.5, layers={"fc1": 0.25, "fc2": 1.0})
    assert {name: rank for name, (rank, _) in made(run).items()} == {"fc0": 4, "fc1": 2}
    assert skips(run) == {"fc2": "all of it stays"}


def test_a_rank_beyond_break_even_is_refused_where_multiply_adds_say_so() -> None:
    text = (
        "g (float[N,8,16,16] x) => (float[N,8,4,4] y) <float[8,8,3,3] w> "
        "{ [conv] y = Conv <strides: ints = [4, 4], pads: ints = [1, 1, 1, 1]> (x, w) }"
    )
    run = split("spatial", driver.model_of(text)[0], rank=9, statistics="weights")
    assert skips(run) == {"conv": "rank 9 would cost more than the layer does; it pays up to rank 4"}


@pytest.mark.parametrize("kind", QUICK)
def test_a_planted_rank_is_found(kind: str) -> None:
    net, rng = Net(0), np.random.default_rng(0)
    planted = {
        "svd": np.einsum("or,rcij->ocij", rng.standard_normal((32, 3)), rng.standard_normal((3, 24, 3, 3))),
        "spatial": np.einsum("orj,rci->ocij", rng.standard_normal((32, 3, 3)), rng.standard_normal((3, 24, 3))),
        "tucker": np.einsum("os,srij,rc->ocij", *(rng.standard_normal(s) for s in ((32, 3), (3, 3, 3, 3), (3, 24)))),
        "separable": np.einsum("ocm,mcij->ocij", rng.standard_normal((32, 24, 3)), rng.standard_normal((3, 24, 3, 3))),
        "basis": np.einsum("ocm,mij->ocij", rng.standard_normal((32, 24, 3)), atoms.dct_atoms(3, 3)[[0, 2, 4]]),
    }[kind]
    x = net.input("x", ["N", 24, 16, 16])
    model = net.model(net.node("Conv", x, net.constant(planted.astype(np.float32), "w"), name="conv", pads=[1] * 4))
    run = split(kind, model, feeds(model, (2, 2)), error=1e-8)
    (rank, loss), most = made(run)["conv"], 3 if kind in ("svd", "separable", "basis") else 6
    ranks = divmod(rank, PAIR) if kind == "tucker" else [rank % TURNED]
    assert all(3 <= part <= most for part in ranks)  # spatial and Tucker splits try some ranks only
    assert loss < 1e-8
    assert error(run.model, model, feeds(model, (2,), seed=8)) < 1e-3


def test_choices_begin_with_the_whole_layer_and_get_cheaper() -> None:
    model = builders.residual_net(0)
    for kind in KINDS.values():
        step = kind.model_validate({"error": 0.1, "statistics": "weights"})
        view = view_of(step, model)
        sites = [site for site in step.sites(view) if isinstance(site, Site)]
        assert sites
        for site in sites:
            whole, *rest = step.choices(site, view)
            form = layers(model)[site.nodes[0]]
            assert whole == Choice(0.0, 0.0, form.groups * form.out * form.columns, whole.macs, whole.seconds)
            assert len({c.strength for c in rest}) == len(rest)
            assert [c.macs for c in rest] == sorted((c.macs for c in rest), reverse=True)
            assert all(c.params < whole.params and c.macs < whole.macs for c in rest)
            assert all(a.error <= b.error * (1 + 1e-6) for a, b in itertools.pairwise(rest))


def view_of(step: Split, model: ir.Model) -> View:
    """Return a view without statistics and prices, as `inspect` makes one."""
    target = load_target("generic-cpu", Path())
    evaluate = lambda values: runtime.evaluate(values, runtime.Settings(1))  # noqa: E731
    return View(graph.copy(model), target, np.random.default_rng(0), step, graph.facts, evaluate)


# ---------------------------------------------------------------------------------------------- budgets


def unbiased(seed: int = 0) -> ir.Model:
    """x[N, 8, 12, 12]: three convolutions without biases and a dense layer."""
    net = Net(seed)
    x = net.input("x", ["N", 8, 12, 12])
    for index in range(3):
        x = net.relu(net.conv(x, f"conv{index}", (16, 8 if not index else 16, 3, 3), pad=1, bias=False))
    return net.model(net.dense(net.node("Flatten", net.node("GlobalAveragePool", x)), "fc", 16, 10))


@pytest.mark.parametrize("kind", QUICK)
@pytest.mark.parametrize("what", ["macs", "params", "stored_bytes"])
def test_a_budget_is_met_and_spent(kind: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[Sequence[Choice]]] = []
    spend = split_prices.spend

    def spy(*given: Any) -> list[Choice]:
        asked.append(given[2])
        return spend(*given)

    monkeypatch.setattr(split_prices, "spend", spy)
    model = unbiased()
    run = split(kind, model, feeds(model, (4, 4)), keep={what: 0.5}, sensitivity=False)
    limit = 0.5 * getattr(run.origin.cost.report, what)
    now = getattr(run.price(run.model).report, what)
    assert now <= limit
    ranks = {name: rank for name, (rank, _) in made(run).items()}
    for choices, name in zip(asked[0], [*("conv0", "conv1", "conv2"), *(["fc"] if kind == "svd" else [])], strict=True):
        index = next(i for i, choice in enumerate(choices) if choice.strength == ranks.get(name, 0))
        if index:
            step = cost_of(choices[index - 1], what) - cost_of(choices[index], what)
            biases = (3 * 16) * (4 if what == "stored_bytes" else 1)  # kept free for what fits add
            assert now + step > limit - biases * (what != "macs")


def test_a_budget_of_seconds_is_met_as_the_graph_is_priced() -> None:
    model = dense_chain(3, 160)
    run = split("svd", model, keep={"seconds": 0.5}, sensitivity=False)
    before, after = run.origin.cost.report.seconds, run.price(run.model).report.seconds
    assert 0.4 * before < after <= 0.5 * before


@pytest.mark.parametrize("what", ["params", "stored_bytes"])
def test_a_budget_counts_half_precision_as_it_is_stored(what: str) -> None:
    model = builders.half_net(0)
    run = split("svd", model, keep={what: 0.8}, statistics="weights", sensitivity=False)
    assert made(run)
    assert getattr(run.price(run.model).report, what) <= 0.8 * getattr(run.origin.cost.report, what)
    assert weight(run.model, f"{next(iter(made(run)))}/V").dtype == np.float16


def test_a_budget_goes_to_the_layer_that_moves_the_outputs() -> None:
    net = Net(0)
    x = net.input("x", ["N", 16])
    quiet = net.node("Mul", net.dense(x, "quiet", 16, 16), net.constant(np.float32(1e-3).reshape(1), "scale"))
    model = net.model(net.node("Add", net.dense(x, "loud", 16, 16), quiet))
    run = split("svd", model, keep={"macs": 0.7}, refit=False)
    assert made(run).keys() == {"quiet"}
    assert skips(run) == {"loud": "the budget leaves it whole"}


def test_a_budget_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(PassError, match="the budget cannot be met"):
        split("svd", builders.mlp(0), keep={"macs": 0.01}, statistics="weights")


# ---------------------------------------------------------------------------------------------- refusals


def test_without_calibration_data_the_remedy_is_told() -> None:
    with pytest.raises(PassError, match=r"(?s)the spec gives none.*`statistics: weights`"):
        split("svd", builders.mlp(0), [], rank=2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_metric_of_the_weights_needs_no_data(kind: str) -> None:
    run = split(kind, builders.residual_net(0), [], keep=0.5, statistics="weights")
    assert made(run)
    assert all("of the weight's power lost" in site.note for site in run.record.applied)


def test_a_layer_too_wide_to_fit_says_what_splits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "WIDEST", 20)
    run = split("svd", builders.mlp(0), rank=2)
    assert made(run).keys() == {"fc1", "fc3"}
    assert skips(run) == {"fc2": "it has more than 20 columns per group: `statistics: weights` splits it"}
    assert made(split("svd", builders.mlp(0), rank=2, statistics="weights")).keys() == {"fc1", "fc2", "fc3"}


def test_a_split_that_is_slower_on_the_target_is_refused_for_an_error() -> None:
    step, site = SplitSvd(error=0.1), Site(("fc",))
    choices = [Choice(0, 0.0, 100, 100, 2e-6), Choice(2, 0.05, 60, 60, 2.5e-6), Choice(1, 0.2, 30, 30, 1e-6)]
    refused = step.pick(site, choices)
    assert isinstance(refused, Skip)
    assert refused.reason == "rank 2 would take 2.5 us for 2 on the target"
    assert SplitSvd(error=0.2).pick(site, choices) == choices[2]
    assert SplitSvd(rank=2).pick(site, choices) == choices[1]


def test_a_fit_beyond_the_weights_type_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = SplitSvd.fit

    def huge(self: SplitSvd, W: Array, H: Array | None, form: Layer, rank: int) -> Factors:
        return fit(self, 1e10 * W, H, form, rank)

    monkeypatch.setattr(SplitSvd, "fit", huge)
    with pytest.raises(PassError, match=r"(?s)`conv` is not finite in float16.*`skip`"):
        split("svd", builders.half_net(0), rank=1, statistics="weights")


@pytest.mark.parametrize("keep", [0.25, {"macs": 0.3}])
def test_a_split_that_breaks_goes_back_until_it_holds(keep: object) -> None:
    model = builders.residual_net(0)
    options: dict[str, Any] = {"keep": keep, "tolerance": {"relative_l2": 0.012}, "sensitivity": False}
    assert split("spatial", model, on_violation="fail", **options).record.verdict == "failed"
    run = split("spatial", model, on_violation="weaken", **options)
    assert run.record.verdict == "weakened"
    whole = {node.name: node.macs for node in run.origin.cost.nodes}
    now = {node.name: node.macs for node in run.price(run.model).nodes}
    assert made(run)
    for site in run.record.applied:
        assert sum(now[part] for part in site.nodes) < whole[site.nodes[0].rpartition("/")[0]]


# ---------------------------------------------------------------------------------------------- determinism


def bytes_of(model: ir.Model) -> bytes:
    found: bytes = driver.proto_of(model).SerializeToString(deterministic=True)
    return found


def test_more_processes_give_the_same_bytes() -> None:
    model = builders.residual_net(0)
    step = SplitSpatial.model_validate({"keep": {"macs": 0.6}, "sensitivity": False})
    found = []
    for jobs in (1, 2):
        run = driver.bench(model, feeds(model, seed=6))
        run.statistics = calibration(model, feeds(model))
        with executor(jobs) as run.executor:
            run.step(0, step)
        assert run.record.applied
        found.append(bytes_of(run.model))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_an_open_batch_and_image_stay_open(kind: str) -> None:
    model = builders.open_net(0)
    run = split(kind, model, rank=1)
    assert made(run)
    assert graph.signature(run.model) == graph.signature(model)
    batches: list[Array] = [np.ones((n, 3, h, w), np.float32) for n, h, w in ((1, 9, 7), (3, 12, 16))]
    for batch in batches:
        (y,) = outputs(run.model, {"x": batch}).values()
        assert y.shape == (len(batch), 4)
