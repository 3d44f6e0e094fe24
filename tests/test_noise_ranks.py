"""Ranks that splits take from the noise in weights: planted ones are found, and refused where they are of no use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import builders
import driver
import numpy as np
import pytest
from builders import Net
from calibrated import calibration, feeds, skips, weight
from convolutions import conv, split

from ccompile import spec
from ccompile.errors import SpecError
from ccompile.passes.split_svd import SplitSvd
from ccompile.passes.split_tucker import SplitTucker

if TYPE_CHECKING:
    import onnx_ir as ir

    from ccompile.core import Array

ANY = {"tolerance": {"relative_l2": 1e9}}
SPEC = "version: 1\npasses:\n- split-%s: {rank: %s, tolerance: {argmax: 0.9}}\n"


def noisy(o: int, c: int, s: int, r: int, noise: float = 0.1) -> Array:
    """A kernel W[o, c, 3, 3] of output rank s and input rank r, of unit variance, with noise."""
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((o, s)), rng.standard_normal((s, r, 3, 3)), rng.standard_normal((r, c))
    low: Array = np.einsum("os,srij,rc->ocij", *factors) / np.sqrt(s * r)
    return low + noise * rng.standard_normal(low.shape)


@pytest.mark.parametrize("statistics", ["calibration", "weights"])
@pytest.mark.parametrize(("s", "r"), [(3, 6), (7, 4)])
def test_planted_tucker_ranks_are_kept_one_a_side(s: int, r: int, statistics: str) -> None:
    model = conv((32, 24, 3, 3), (6, 6), noisy(32, 24, s, r))
    run = split(SplitTucker, model, rank="evbmf", statistics=statistics, **ANY)
    assert weight(run.model, "conv/G").shape == (s, r, 3, 3)
    assert run.record.applied[0].note.startswith(f"ranks {r} and {s} of 24 and 32, ")


def test_the_input_side_alone_keeps_its_planted_rank() -> None:
    run = split(SplitTucker, conv((32, 24, 3, 3), (6, 6), noisy(32, 24, 7, 4)), rank="evbmf", sides="input", **ANY)
    assert weight(run.model, "conv/G").shape == (32, 4, 3, 3)


def dense(W: Array) -> ir.Model:
    """y = W x with W[o, d]."""
    net = Net(0)
    w = net.constant(W.astype(np.float32), "w")
    return net.model(net.node("Gemm", net.input("x", ["N", W.shape[1]]), w, name="fc", transB=1))


@pytest.mark.parametrize("statistics", ["calibration", "weights"])
def test_a_planted_rank_of_a_dense_layer_is_kept(statistics: str) -> None:
    rng = np.random.default_rng(0)
    low = rng.standard_normal((40, 5)) @ rng.standard_normal((5, 30))
    model = dense(low + 0.1 * rng.standard_normal(low.shape))
    run = split(SplitSvd, model, rank="evbmf", statistics=statistics, **ANY)
    assert weight(run.model, "fc/U").shape == (40, 5)


def test_a_rank_that_would_cost_more_than_the_layer_is_refused() -> None:
    W = np.zeros((40, 40))  # EVBMF finds the rank of what has no noise, and less than break-even in any other
    W[:24] = np.random.default_rng(0).standard_normal((24, 40))
    run = split(SplitSvd, dense(W), rank="evbmf")
    assert skips(run) == {"fc": "rank 24, which EVBMF finds, would cost no less than the layer does"}


@pytest.mark.parametrize("kind", [SplitSvd, SplitTucker])
def test_a_weight_of_noise_alone_is_left_alone(kind: type[SplitSvd] | type[SplitTucker]) -> None:
    run = split(kind, conv((32, 24, 3, 3), (6, 6), noisy(32, 24, 1, 1, 1e6)), rank="evbmf")
    assert skips(run) == {"conv": "EVBMF finds nothing in its weight that stands out of the noise"}


def test_multiply_adds_before_the_stride_count_too() -> None:
    W, options = noisy(32, 24, 9, 20, 0.01), {"strides": [6, 6]}
    run = split(SplitTucker, conv((32, 24, 3, 3), (12, 12), W, **options), rank="evbmf")
    assert skips(run) == {"conv": "the rank that EVBMF finds would cost more multiply-adds than the layer does"}
    assert split(SplitTucker, conv((32, 24, 3, 3), (12, 12), W), rank="evbmf", **ANY).record.applied


def test_a_layer_may_keep_a_share_instead() -> None:
    model = builders.residual_net(0)
    run = split(SplitSvd, model, rank="evbmf", layers={"b1": 0.4}, **ANY)
    assert [site.nodes[0] for site in run.record.applied] == ["b1/V"]


def test_a_step_may_go_back_from_what_the_noise_says() -> None:
    model = conv((32, 24, 3, 3), (6, 6), noisy(32, 24, 3, 4, 0.3))
    options = {"rank": "evbmf", "tolerance": {"relative_l2": 0.25}, "on_violation": "weaken"}
    run = driver.bench(model, feeds(model, seed=6))
    run.statistics = calibration(model, feeds(model))
    run.step(0, SplitTucker.model_validate(options))
    assert run.record.verdict == "weakened"
    s, r, *_ = weight(run.model, "conv/G").shape
    assert s * r > 3 * 4


@pytest.mark.parametrize(("kind", "rank"), [("spatial", "evbmf"), ("svd", "vbmf"), ("tucker", "0")])
def test_a_rank_that_no_one_knows_is_refused(kind: str, rank: str) -> None:
    with pytest.raises(SpecError, match=f"split-{kind}.rank"):
        spec.parse(SPEC % (kind, rank))
    assert spec.parse(SPEC % ("svd", "evbmf")).passes == (
        SplitSvd.model_validate({"rank": "evbmf", "tolerance": {"argmax": 0.9}}),
    )
