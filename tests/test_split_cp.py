"""What split-cp makes of a kernel: planted terms, its two ways, what cancels, and its seed."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

import driver
import numpy as np
import onnx_ir as ir
import pytest
from builders import Net
from calibrated import error, feeds, skips, weight
from convolutions import assert_budget_met, assert_no_worse_with_data, conv, form_of, split

from ccompile.fitting import Metric
from ccompile.passes.split_cp import SplitCp
from ccompile.split_prices import LayerPrice

if TYPE_CHECKING:
    from ccompile.core import Array

MIDDLE = {3: ["T0"], 4: ["T0", "T1"]}


def planted(way: int, terms: int = 2, shape: tuple[int, ...] = (8, 6, 3, 5)) -> Array:
    rng = np.random.default_rng(4)
    a, b, v, h, t = (rng.standard_normal(s) for s in [*((terms, n) for n in shape), (terms, *shape[2:])])
    W: Array = np.einsum("ro,rc,ri,rj->ocij", a, b, v, h) if way == 4 else np.einsum("ro,rc,rij->ocij", a, b, t)
    return W


def border(o: int = 4, c: int = 4, k: int = 5) -> Array:
    """A kernel of rank 3 that sums of two terms approach as closely as they like, their terms growing without end."""
    rng = np.random.default_rng(0)
    (a0, a1), (b0, b1), (t0, t1) = (rng.standard_normal((2, n)) for n in (o, c, k * k))
    terms = ((a0, b0, t1), (a0, b1, t0), (a1, b0, t0))
    return np.asarray(sum(np.einsum("o,c,t->oct", *term) for term in terms)).reshape(o, c, k, k)


def note(run: driver.Bench) -> str:
    (site,) = run.record.applied
    return site.note


@pytest.mark.parametrize("statistics", ["calibration", "weights"])
@pytest.mark.parametrize("way", [3, 4])
def test_planted_terms_lose_nothing(way: int, statistics: str) -> None:
    model = conv(W=planted(way), strides=[2, 1], pads=[1, 2, 0, 1])
    run = split(SplitCp, model, rank=2, way=way, statistics=statistics)
    assert [str(node.name) for node in run.model.graph] == [f"conv/{part}" for part in ["B", *MIDDLE[way], "A"]]
    assert note(run).startswith("rank 2 of ")
    assert error(run.model, model, feeds(model, seed=9)) < 1e-5


def test_an_error_finds_the_planted_terms_among_the_ranks_it_tries() -> None:
    model = conv((16, 16, 5, 5), (48, 48), planted(4, 7, (16, 16, 5, 5)))
    ranks, lost = curve(model, statistics="weights")
    assert 7 in ranks
    assert [rank for rank, loss in zip(ranks, lost, strict=True) if loss < 1e-9][-1] == 7
    run = split(SplitCp, model, error=1e-9, statistics="weights")
    assert note(run).startswith("rank 7 of 400")
    assert error(run.model, model, feeds(model, (2,), seed=9)) < 1e-5


def curve(model: ir.Model, **options: object) -> tuple[list[int], list[float]]:
    step = SplitCp.model_validate({"error": 0.5, **options})
    W, form = form_of(model)
    price = LayerPrice(form.out * form.columns, 0.0, (1.0,) * len(step.shapes(form, 1)))
    ranks = step.ranks(form, price)
    return ranks, step.shares_lost(([Metric(W, None, float(np.square(W).sum()))], form, ranks))


def test_three_factors_lose_less_than_four_at_the_same_rank() -> None:
    model = conv((8, 6, 3, 3), (9, 9))
    W, form = form_of(model)
    three, four = (SplitCp.model_validate({"keep": 0.5, "way": way}).losses(W, None, form, [4])[0] for way in (3, 4))
    assert three < 0.95 * four


@pytest.mark.parametrize("way", [3, 4])
def test_losses_fall_with_the_rank_although_terms_cancel(way: int) -> None:
    model = conv((8, 6, 3, 3), (9, 9))
    _, lost = curve(model, way=way)
    assert len(lost) > 6
    assert all(a <= 1.05 * b for a, b in itertools.pairwise(lost)), lost


@pytest.mark.parametrize("way", [3, 4])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_data_never_make_it_lose_more(rank: int, way: int) -> None:
    step = SplitCp.model_validate({"keep": 0.5, "way": way})
    assert_no_worse_with_data(step, conv((8, 6, 3, 3), (9, 9)), rank)


def test_terms_that_cancel_give_way_to_a_tucker_split_that_costs_no_more() -> None:
    model = conv((4, 4, 5, 5), (9, 9), border(), pads=[2] * 4)
    run = split(SplitCp, model, rank=2, way=3, statistics="weights")
    assert re.search(r"; a Tucker split instead: the CP terms cancel, \S+ times the weight's power$", note(run))
    assert [str(node.name) for node in run.model.graph] == ["conv/B", "conv/G", "conv/A"]
    _, form = form_of(model)
    shapes = SplitCp(rank=2, way=3).shapes(form, 2)
    limit = sum(int(np.prod(shape)) for shape in shapes)
    assert sum(weight(run.model, f"conv/{part}").size for part in "BGA") <= limit
    assert np.abs(weight(run.model, "conv/G")).max() < 10 * np.abs(border()).max()


@pytest.mark.parametrize("way", [3, 4])
@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (2, 64, 3, 3), (8, 64, 3, 3), (64, 2, 3, 3), (6, 6, 7, 7)])
def test_the_tucker_split_costs_no_more_stage_by_stage(shape: tuple[int, ...], way: int) -> None:
    _, form = form_of(conv(shape, (9, 9)))
    step, checked = SplitCp.model_validate({"keep": 0.5, "way": way}), 0
    for rank in range(1, step.most(form) + 1):
        first, *rest = (int(np.prod(stage)) for stage in step.shapes(form, rank))
        for r, s in step._tucker_ranks(form, rank):
            assert r * shape[1] <= first
            assert s * r * form.taps + s * shape[0] <= sum(rest)
            assert r <= s * form.taps
            assert s <= r * form.taps
            checked += 1
    assert checked


def test_what_cancels_stays_where_no_tucker_split_costs_as_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SplitCp, "_tucker_ranks", lambda *_: [])
    run = split(SplitCp, conv((4, 4, 5, 5), (9, 9), border()), rank=2, way=3, statistics="weights")
    assert re.search(r"; the CP terms cancel, \S+ times the weight's power$", note(run))
    assert str(run.model.graph.node(0).name) == "conv/B"
    assert len(list(run.model.graph)) == 3


def test_at_full_rank_each_fibre_is_a_term() -> None:
    W, form = form_of(conv((4, 7, 3, 3), (9, 9)))
    for way, most in ((3, 28), (4, 36)):
        step = SplitCp.model_validate({"keep": 0.5, "way": way})
        found = step.fit(W, None, form, step.most(form))
        assert step.most(form) == most
        assert not found.note
        np.testing.assert_allclose(found.composed, W, atol=1e-12)


def test_equal_input_gives_equal_bytes_and_a_seed_only_moves_the_start() -> None:
    model = conv()
    runs = [split(SplitCp, model, rank=6, seed=seed) for seed in (0, 0, 7)]
    first, again = (driver.proto_of(run.model).SerializeToString(deterministic=True) for run in runs[:2])
    assert first == again
    assert [n.name for n in runs[2].model.graph] == [n.name for n in runs[0].model.graph]
    errors = [error(run.model, model, feeds(model, seed=9)) for run in runs]
    assert errors[2] == pytest.approx(errors[0], rel=0.1)
    exact = conv(W=planted(4))
    for seed in (0, 7):
        assert error(split(SplitCp, exact, rank=2, seed=seed).model, exact, feeds(exact, seed=9)) < 1e-5


@pytest.mark.parametrize("what", ["macs", "params"])
def test_a_budget_is_met(what: str) -> None:
    assert_budget_met(SplitCp, what, (6, 6), least=0.4)


@pytest.mark.parametrize(("shape", "size"), [((6, 4, 1, 7), (5, 9)), ((6, 4, 5), (9,)), ((6, 4, 2, 3, 2), (4, 5, 4))])
def test_four_factors_need_two_axes_and_three_do_not(shape: tuple[int, ...], size: tuple[int, ...]) -> None:
    kernel = "x".join(map(str, shape[2:]))
    refused = split(SplitCp, conv(shape, size), rank=1)
    assert skips(refused) == {"conv": f"kernel {kernel}: it has not two axes to part, `way: 3` splits it"}
    assert split(SplitCp, conv(shape, size), rank=1, way=3).record.applied


def test_dense_layers_are_no_sites() -> None:
    net = Net(0)
    model = net.model(net.dense(net.input("x", ["N", 12]), "fc", 12, 12))
    run = split(SplitCp, model, rank=1)
    assert not run.record.applied
    assert not skips(run)
