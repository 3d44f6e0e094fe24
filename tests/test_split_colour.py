"""Monochromatic filters and biclusters: planted groups come back exactly, whatever the order of the channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import driver
import numpy as np
import pytest
from builders import Net
from calibrated import outputs

from ccompile import split_prices
from ccompile.analysis import linear
from ccompile.moments import Layer
from ccompile.passes.split_biclusters import SplitBiclusters
from ccompile.passes.split_colour import SplitColour
from ccompile.split_prices import LayerPrice
from ccompile.tolerance import Tolerance

if TYPE_CHECKING:
    import onnx_ir as ir

    from ccompile.core import Array, Compression

LOOSE = Tolerance(relative_l2=10.0)


def conv(W: Array, bias: bool = True, **attributes: object) -> ir.Model:
    """Return one convolution as a model."""
    net = Net(1)
    x = net.input("x", ["N", W.shape[1], 9, 8])
    operands = [net.constant(W.astype(np.float32), "w")]
    operands += [net.constant(np.linspace(-2, 2, len(W), dtype=np.float32), "b")] if bias else []
    return net.model(net.node("Conv", x, *operands, name="c", **attributes))  # type: ignore[arg-type]


def monochrome(colours: int = 3, filters: int = 12, channels: int = 5) -> Array:
    rng = np.random.default_rng(4)
    group = rng.permutation(np.arange(filters) % colours)
    p, s = rng.standard_normal((colours, channels)), rng.standard_normal((filters, 3, 5))
    planted: Array = np.einsum("oc,oij->ocij", p[group], s)
    return planted


def blocks(o: int = 12, c: int = 8, kernel: tuple[int, int] = (3, 2)) -> Array:
    """Two groups of filters by two of channels, in an order of their own, rank one between each pair."""
    rng = np.random.default_rng(5)
    W = np.zeros((o, c, *kernel))
    outputs, inputs = rng.permutation(o).reshape(2, -1), rng.permutation(c).reshape(2, -1)
    for mine in outputs:
        for read in inputs:
            left, right = rng.standard_normal((o // 2, 1)), rng.standard_normal((1, c // 2 * kernel[0] * kernel[1]))
            W[np.ix_(mine, read)] = (left @ right).reshape(o // 2, c // 2, *kernel)
    return W


GEOMETRIES = [{}, {"strides": [2, 3]}, {"pads": [1, 0, 2, 1]}, {"dilations": [2, 1], "strides": [1, 2]}]
SCHEMES = {
    "colour": (SplitColour(rank=3, tolerance=LOOSE), monochrome()),
    "biclusters": (SplitBiclusters(rank=1, tolerance=LOOSE), blocks()),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("statistics", ["calibration", "weights"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_planted_groups_are_found_and_cost_nothing(
    scheme: str, statistics: str, bias: bool, geometry: dict[str, list[int]]
) -> None:
    step, W = SCHEMES[scheme]
    record = driver.run_step(with_statistics(step, statistics), conv(W, bias, **geometry)).record
    assert len(record.applied) == 1
    assert record.against_previous is not None
    assert record.against_previous.outputs[0].elements
    assert record.against_previous.outputs[0].relative_l2 == pytest.approx(0, abs=2e-6)


def with_statistics(step: Compression, statistics: str) -> Compression:
    return step.model_copy(update={"statistics": statistics})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_noted_as_lost_is_what_is_lost(scheme: str) -> None:
    step, W = SCHEMES[scheme]
    noisy = W + 0.3 * np.random.default_rng(6).standard_normal(W.shape)
    run = driver.run_step(with_statistics(step, "weights"), conv(noisy, pads=[1, 1, 1, 1]))
    (site,) = run.record.applied
    noted = float(site.note.split(", ")[1].split()[0])
    rng = np.random.default_rng(7)
    x = {"x": rng.standard_normal((600, W.shape[1], 9, 8)).astype(np.float32)}
    y, was = (np.asarray(outputs(model, x)["c_out"]) for model in (run.model, run.source.model))
    inside = (slice(None), slice(None), slice(2, -2), slice(2, -2))  # beyond the padding, where inputs are white
    was = was - np.linspace(-2, 2, len(W))[:, None, None]
    y = y - np.linspace(-2, 2, len(W))[:, None, None]
    measured = np.square(y[inside] - was[inside]).sum() / np.square(was[inside]).sum()
    assert measured == pytest.approx(noted, rel=0.05)


@pytest.mark.parametrize(
    ("step", "shape", "words"),
    [
        (SplitColour(rank=2, tolerance=LOOSE), (8, 4, 1, 1), "one tap"),
        (SplitColour(rank=5, tolerance=LOOSE), (8, 4, 3, 3), "rank 5"),
        (SplitBiclusters(rank=1, tolerance=LOOSE), (9, 4, 3, 3), "do not divide its 9 x 4 channels"),
        (SplitBiclusters(rank=20, tolerance=LOOSE), (8, 4, 3, 3), "it pays up to rank"),
    ],
)
def test_what_does_not_divide_or_pay_is_refused_with_the_reason(
    step: Compression, shape: tuple[int, ...], words: str
) -> None:
    record = driver.run_step(step, conv(np.random.default_rng(0).standard_normal(shape))).record
    assert not record.applied
    assert words in record.skipped[0].reason


@pytest.mark.parametrize(("share", "rank"), [(0.04, 0), (0.05, 1), (0.07, 2), (0.12, 5), (0.95, 10)])
def test_only_numbers_of_colours_that_divide_are_priced(share: float, rank: int) -> None:
    form = linear.layer(conv(np.ones((10, 30, 3, 3))).graph.node(0))
    assert isinstance(form, Layer)
    price = LayerPrice(form.out * form.columns, 0.0, (1.0, 1.0))
    assert split_prices.rank_of(SplitColour(keep=0.5), share, form, price) == rank


def test_a_grouped_layer_is_left_alone() -> None:
    W = np.random.default_rng(0).standard_normal((8, 2, 3, 3))
    net = Net(1)
    x = net.input("x", ["N", 4, 9, 8])
    model = net.model(net.node("Conv", x, net.constant(W.astype(np.float32), "w"), name="c", group=2))
    for step, _ in SCHEMES.values():
        assert driver.run_step(step, model).record.skipped[0].reason == "it has 2 groups"
