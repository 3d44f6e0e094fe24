"""What split-tucker makes of a kernel: its sides, its ranks, kernels of one and three axes, and its cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from calibrated import error, feeds, layers, outputs, skips, weight
from convolutions import conv, split

from ccompile import split_prices
from ccompile.passes.split_tucker import PAIR, SplitTucker

if TYPE_CHECKING:
    from ccompile.core import Array


def planted(o: int, c: int, s: int, r: int) -> Array:
    """A kernel W[o, c, 3, 3] with input rank r and output rank s."""
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((o, s)), rng.standard_normal((s, r, 3, 3)), rng.standard_normal((r, c))
    W: Array = np.einsum("os,srij,rc->ocij", *factors)
    return W


@pytest.mark.parametrize("statistics", ["calibration", "weights"])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 7), (5,), (2, 3, 2)])
def test_planted_ranks_lose_nothing(kernel: tuple[int, ...], statistics: str) -> None:
    rng = np.random.default_rng(0)
    A, G, B = rng.standard_normal((16, 4)), rng.standard_normal((4, 2, *kernel)), rng.standard_normal((2, 8))
    W = np.moveaxis(np.tensordot(np.tensordot(A, G, (1, 0)), B, (1, 0)), -1, 1)
    model = conv((16, 8, *kernel), tuple(k + 3 for k in kernel), W)
    run = split(SplitTucker, model, rank=2, statistics=statistics)
    assert [node.op_type for node in run.model.graph] == ["Conv"] * 3
    assert weight(run.model, "conv/G").shape == (4, 2, *kernel)
    assert error(run.model, model, feeds(model, seed=9)) < 1e-5


def test_the_input_side_alone_loses_less_at_the_same_rank_and_costs_more() -> None:
    model = conv((16, 8, 3, 3), (8, 8))
    both, one = (split(SplitTucker, model, rank=3, sides=sides) for sides in ("both", "input"))
    assert [len(list(run.model.graph)) for run in (both, one)] == [3, 2]
    batches = feeds(model)
    assert error(one.model, model, batches) < error(both.model, model, batches)
    assert one.price(one.model).report.macs > both.price(both.model).report.macs


def test_the_output_rank_is_in_proportion() -> None:
    form = layers(conv((16, 8, 3, 3), (8, 8)))["conv"]
    step = SplitTucker(keep=0.5)
    assert [step.shapes(form, rank)[1][:2] for rank in (1, 3, 8)] == [(2, 1), (6, 3), (16, 8)]


@pytest.mark.parametrize("statistics", ["calibration", "weights"])
@pytest.mark.parametrize(("s", "r"), [(12, 3), (3, 8)])
def test_a_share_goes_to_the_planted_pair_of_ranks(s: int, r: int, statistics: str) -> None:
    """An equal share of both sides, 8 of 16 and 5 of 10, would lose a lot."""
    model = conv((16, 10, 3, 3), (8, 8), planted(16, 10, s, r))
    run = split(SplitTucker, model, keep=0.4, statistics=statistics, tolerance={"relative_l2": 1e9})
    (site,) = run.record.applied
    output, rank, *_ = weight(run.model, "conv/G").shape
    assert output >= s
    assert rank >= r
    assert site.note.startswith(f"ranks {rank} and {output} of 10 and 16")
    assert error(run.model, model, feeds(model, seed=9)) < 1e-5


@pytest.mark.parametrize("keep", [0.7, 0.5, 0.3])
def test_a_share_loses_no_more_than_ranks_in_proportion_and_is_used(keep: float) -> None:
    model = conv((16, 12, 3, 3), (8, 8), strides=[2, 2])
    run = split(SplitTucker, model, keep=keep, tolerance={"relative_l2": 1e9})
    step, form = SplitTucker(keep=keep), layers(model)["conv"]
    positions = tuple(node.macs / np.prod(weight(run.model, node.name).shape) for node in run.price(run.model).nodes)
    price = split_prices.LayerPrice(next(iter(run.origin.cost.nodes)).macs, 0.0, positions)
    rank = split_prices.rank_of(step, keep, form, price)
    even = split(SplitTucker, model, rank=rank, tolerance={"relative_l2": 1e9})
    losses = [float(r.record.applied[0].note.split(", ")[1].split(" ")[0]) for r in (run, even)]
    assert losses[0] <= losses[1] * (1 + 1e-3)
    now = run.price(run.model).report.macs
    assert even.price(even.model).report.macs <= keep * price.macs
    assert 0.93 * keep * price.macs < now <= keep * price.macs


def test_a_pair_keeps_its_proportion_where_a_cut_has_shrunk_the_layer() -> None:
    step, form = SplitTucker(keep=0.5), layers(conv((6, 8, 3, 3), (8, 8)))["conv"]
    ranks = [step.ranks_of(form, code) for code in step.like(4 + PAIR * 8, form)]
    assert ranks == [(8, 6), (7, 6), (6, 6), (5, 6), (4, 6), (3, 6), (2, 4), (1, 2)]
    assert all(len(step.shapes(form, code)) == 3 for code in step.like(4 + PAIR * 8, form))


def test_the_first_factor_runs_before_the_stride() -> None:
    run = split(SplitTucker, conv((16, 8, 3, 3), (8, 8), strides=[2, 2], pads=[1] * 4), rank=2)
    macs = {node.name: node.macs for node in run.price(run.model).nodes}
    assert macs == {"conv/B": 2 * 8 * 64, "conv/G": 4 * 2 * 9 * 16, "conv/A": 16 * 4 * 16}


@pytest.mark.parametrize(("shape", "size"), [((12, 8, 5), (9,)), ((12, 8, 2, 3, 2), (4, 5, 4))])
def test_kernels_of_one_and_three_axes_lose_what_is_noted(shape: tuple[int, ...], size: tuple[int, ...]) -> None:
    model = conv(shape, size)
    run = split(SplitTucker, model, rank=4, ridge=1e-9)
    (site,) = run.record.applied
    found, wanted = (
        np.concatenate([np.moveaxis(outputs(m, b)["conv_out"], 1, -1).reshape(-1, 12) for b in feeds(model)])
        for m in (run.model, model)
    )
    lost = np.square(found - wanted).sum() / np.square(wanted - wanted.mean(0)).sum()
    assert lost > 0.01
    assert f"{lost:.2g}" == f"{float(site.note.split(', ')[1].split(' ')[0]):.2g}"


def test_a_kernel_of_one_tap_is_left_to_split_svd() -> None:
    run = split(SplitTucker, conv((16, 8, 1, 1), (8, 8)), rank=2)
    assert skips(run) == {"conv": "its kernel has one tap: split-svd splits it"}
