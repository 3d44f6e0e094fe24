"""Convolutions in tiles are the convolutions: every tile, pad, size, batch and group; exact on small integers."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowered import assert_same, both, conv, drawn, known, put

from ccompile import winograd_form
from ccompile.numerics import winograd

if TYPE_CHECKING:
    import onnx_ir as ir
    from lowered import Build

    from ccompile.convolution import Convolution
    from ccompile.emitting import Emitter
    from ccompile.numerics.winograd import Pair


def tiles(*tile: int) -> Build:
    m = (tile[0], tile[1])

    def build(to: Emitter, found: Convolution) -> ir.Value:
        assert not winograd_form.refusal(found, m)
        return winograd_form.emit(to, found, m)

    return build


@pytest.mark.parametrize("m", [(2, 1), (1, 2), (2, 2)])
def test_two_outputs_per_tile_are_exact_on_small_integers(m: Pair) -> None:
    draw = np.random.default_rng(0)
    W, x = draw.integers(-4, 5, (5, 3, 3, 3)), draw.integers(-20, 21, (2, 3, 7, 10)).astype(np.float32)
    found, wanted = both(conv(W, (7, 10), draw.integers(-9, 9, 5), pads=[1] * 4), tiles(*m), x)
    np.testing.assert_array_equal(found, wanted)


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6)).filter(lambda m: max(m) > 1),
    st.tuples(st.integers(2, 5), st.integers(2, 5)),
    st.tuples(*[st.integers(0, 3)] * 4),
    st.tuples(st.integers(5, 11), st.integers(5, 11)),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
)
def test_every_tile_is_the_convolution(
    m: Pair, kernel: Pair, pads: tuple[int, ...], size: Pair, batch: int, groups: int, biased: bool
) -> None:
    if any(a + b - 1 > 8 for a, b in zip(m, kernel, strict=True)):
        kernel = 2, 2
    W, bias = drawn((2 * groups, 3, *kernel)), drawn((2 * groups,)) if biased else None
    model = conv(W, size, bias, pads=list(pads), group=groups)
    assert_same(model, tiles(*m), drawn((batch, 3 * groups, *size), 2), 2e-6 * winograd.growth(m, kernel))


@pytest.mark.parametrize("pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_pads_are_worked_out(pad: str) -> None:
    assert_same(conv(drawn((4, 3, 4, 3)), (9, 8), auto_pad=pad), tiles(4, 4), drawn((2, 3, 9, 8)))


@pytest.mark.parametrize("m", [(4, 1), (2, 2)])
def test_a_delta_shifts(m: Pair) -> None:
    W = np.zeros((1, 1, 3, 3))
    W[0, 0, 0, 2] = 1
    x = drawn((1, 1, 6, 6))
    found, _ = both(conv(W, (6, 6), pads=[1] * 4), tiles(*m), x)
    np.testing.assert_allclose(found[..., 1:, :-1], x[..., :-1, 1:], atol=1e-5)
    assert np.abs(found[..., 0, :]).max() < 1e-5


@pytest.mark.parametrize("m", [(1, 4), (1, 2)])
def test_one_axis_runs_along_the_last(m: Pair) -> None:
    assert_same(conv(drawn((4, 3, 5)), (13,), drawn((4,)), pads=[2, 1]), tiles(*m), drawn((2, 3, 13)))


@pytest.mark.parametrize(("m", "size"), [((4, 1), (9, "W")), ((1, 4), ("H", 9))])
def test_an_axis_without_tiles_may_be_open(m: Pair, size: tuple[int | str, ...]) -> None:
    model = conv(drawn((4, 3, 3, 3)), size, drawn((4,)), pads=[1] * 4)
    for other in (6, 7):
        shape = [other if isinstance(dim, str) else dim for dim in size]
        assert_same(model, tiles(*m), drawn((2, 3, *shape)))


@pytest.mark.parametrize(
    ("m", "shape", "size", "groups", "reason"),
    [
        ((4, 1), (4, 3, 3, 3), ("H", 9), 1, "open"),
        ((4, 4), (4, 1, 3, 3), (9, 9), 4, "one channel per group"),
        ((6, 1), (4, 3, 7, 7), (9, 9), 1, "F\\(6, 7\\)"),
        ((1, 2), (4, 3, 3, 1), (9, 9), 1, "F\\(2, 1\\)"),
        ((1, 1), (4, 3, 3, 3), (9, 9), 1, "no axis"),
        ((2, 2), (4, 3, 3, 3, 3), (9, 9, 9), 1, "3 axes"),
    ],
)
def test_what_has_no_tiles_is_refused(
    m: Pair, shape: tuple[int, ...], size: tuple[int | str, ...], groups: int, reason: str
) -> None:
    found = known(conv(drawn(shape), size, group=groups))
    assert re.search(reason, winograd_form.refusal(found, m))


@pytest.mark.parametrize("opset", [8, 12, 21])
def test_all_opsets_are_spoken(opset: int) -> None:
    assert_same(conv(drawn((4, 3, 3, 3)), (7, 6), opset=opset), tiles(4, 4), drawn((1, 3, 7, 6)))


def test_a_filter_beyond_float32_is_an_error() -> None:
    with pytest.raises(FloatingPointError, match="`conv` is not finite"):
        put(conv(np.full((1, 1, 3, 3), 3e38), (6, 6)), partial(winograd_form.emit, m=(4, 4)))
