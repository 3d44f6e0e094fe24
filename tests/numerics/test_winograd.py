"""Fast convolution of short tiles: exact over the rationals, and within its bound in float32."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccompile.numerics import winograd
from ccompile.numerics.winograd import Pair

Array = npt.NDArray[Any]
SIZES = [(m, r) for r in range(2, 8) for m in range(2, 7) if m + r - 1 <= winograd.LARGEST]


def exact(m: int, r: int, g: list[Fraction], d: list[Fraction]) -> list[Fraction]:
    form = winograd.transform(m, r)
    filters = [sum((a * b for a, b in zip(row, g, strict=True)), Fraction(0)) for row in form.G]
    data = [sum((a * b for a, b in zip(row, d, strict=True)), Fraction(0)) for row in form.B]
    products = [a * b for a, b in zip(filters, data, strict=True)]
    return [sum((a * b for a, b in zip(row, products, strict=True)), Fraction(0)) for row in form.A]


@pytest.mark.parametrize(("m", "r"), SIZES)
def test_tiles_are_exact_over_the_rationals(m: int, r: int) -> None:
    draw = np.random.default_rng(m * 10 + r)
    g, d = ([Fraction(int(v), 7) for v in draw.integers(-50, 50, n)] for n in (r, m + r - 1))
    assert exact(m, r, g, d) == [sum((g[k] * d[i + k] for k in range(r)), Fraction(0)) for i in range(m)]


@pytest.mark.parametrize(("m", "r"), SIZES)
def test_only_filters_are_rounded(m: int, r: int) -> None:
    """The transforms of data and of outputs are float32 numbers."""
    form = winograd.transform(m, r)
    for part in (form.A, form.B):
        assert all(Fraction(float(np.float32(float(entry)))) == entry for row in part for entry in row)


@pytest.mark.parametrize(("m", "r"), SIZES)
def test_all_outputs_weigh_the_product_at_one_alike(m: int, r: int) -> None:
    assert len({row[winograd.ONE] for row in winograd.transform(m, r).A}) == 1


@pytest.mark.parametrize(("m", "r"), [(1, 3), (2, 1), (9, 3), (4, 8)])
def test_tiles_that_are_none_are_refused(m: int, r: int) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        winograd.transform(m, r)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(2, 5), st.integers(2, 5)),
    st.integers(0, 2**32 - 1),
)
def test_nested_tiles_are_the_correlation(m: Pair, kernel: Pair, seed: int) -> None:
    draw = np.random.default_rng(seed)
    W = draw.standard_normal((2, 3, *kernel))
    d = draw.standard_normal((3, *np.add(m, kernel) - 1))
    np.testing.assert_allclose(tile(W, d, m), correlation(W, d), atol=1e-9)


def tile(W: Array, d: Array, m: Pair, dtype: type = np.float64) -> Array:
    """One tile y[o, *m] of d[c, *(m + kernel - 1)], in a type; axes with m = 1 directly."""
    rh, rw = W.shape[2:]
    U: Array = winograd.filters(W, m).astype(dtype)
    Ah, Bh = sides(m[0], rh)
    Aw, Bw = sides(m[1], rw)
    V = np.einsum("pik,qjl,cij->pqckl", Bh.astype(dtype), Bw.astype(dtype), d.astype(dtype))
    Z = np.einsum("pqockl,pqckl->pqo", U, V)
    return np.asarray(np.einsum("ap,bq,pqo->oab", Ah.astype(dtype), Aw.astype(dtype), Z))


def sides(m: int, r: int) -> tuple[Array, Array]:
    if m == 1:
        return np.ones((1, 1)), np.eye(r)[None]
    A, _, B = winograd.transform(m, r).arrays
    return A, B[:, :, None]


def correlation(W: Array, d: Array) -> Array:
    windows = np.lib.stride_tricks.sliding_window_view(d, W.shape[2:], axis=(1, 2))
    return np.asarray(np.einsum("ocij,cabij->oab", W, windows))


@pytest.mark.parametrize(
    ("m", "kernel"), [((2, 1), 3), ((4, 1), 3), ((6, 1), 3), ((2, 2), 3), ((4, 4), 3), ((6, 6), 3), ((4, 1), 7)]
)
def test_measured_errors_grow_as_predicted(m: Pair, kernel: int) -> None:
    draw, taps = np.random.default_rng(0), (kernel, kernel)
    W = draw.standard_normal((8, 16, *taps)).astype(np.float32)
    lost = power = 0.0
    for _ in range(60):
        d = draw.standard_normal((16, m[0] + kernel - 1, m[1] + kernel - 1)).astype(np.float32)
        true = correlation(W.astype(np.float64), d.astype(np.float64))
        lost += np.square(tile(W, d, m, np.float32) - true).sum()
        power += np.square(true).sum()
    predicted = winograd.error(m, taps)
    assert 0.1 * predicted < float(np.sqrt(lost / power)) < predicted


def test_multiplications_of_known_tiles() -> None:
    assert winograd.multiplications((2, 2), (3, 3)) == 4.0  # 2.25 times fewer than 9
    assert winograd.multiplications((4, 4), (3, 3)) == 2.25
    assert winograd.multiplications((6, 1), (5, 5)) == pytest.approx(5 * 10 / 6)
