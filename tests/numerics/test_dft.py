"""Fourier transforms as matrices against numpy's, and circulant matrices planted and recovered."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccompile.numerics import dft


@pytest.mark.parametrize("n", [1, 2, 7, 8, 71])
def test_matrices_are_the_transform_and_its_inverse(n: int) -> None:
    x = np.random.default_rng(n).standard_normal(n)
    planes = dft.forward(n, n) @ x
    np.testing.assert_allclose(planes, np.concatenate([np.fft.rfft(x).real, np.fft.rfft(x).imag]), atol=1e-12)
    np.testing.assert_allclose(dft.inverse(n, n) @ planes, x, atol=1e-12)


@pytest.mark.parametrize("n", [8, 9])
def test_parseval(n: int) -> None:
    x = np.random.default_rng(n).standard_normal(n)
    power = np.square(dft.forward(n, n) @ x).reshape(2, -1).sum(0)
    assert dft.doubled(n) @ power / n == pytest.approx(x @ x)


def test_roots_of_high_powers_keep_their_digits() -> None:
    assert abs(dft.roots(500, 500, 498)[-1, -1] - np.exp(-2j * np.pi / 498)) < 1e-15  # 499^2 is 1 mod 498


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 9), st.integers(0, 9), st.integers(0, 9), st.integers(1, 12), st.integers(0, 4), st.integers(0, 99)
)
def test_circular_correlation_of_that_length_is_the_padded_one(
    size: int, before: int, after: int, taps: int, more: int, seed: int
) -> None:
    if size + before + after < taps:
        return
    draw = np.random.default_rng(seed)
    x, w = draw.standard_normal(size), draw.standard_normal(taps)
    n = dft.length(size, before, after, taps) + more
    found = np.fft.irfft(np.fft.rfft(x, n) * np.fft.rfft(dft.placed(w, before, n)), n)
    wanted = np.correlate(np.pad(x, (before, after)), w, "valid")
    np.testing.assert_allclose(found[: len(wanted)], wanted, atol=1e-9)


@pytest.mark.parametrize(("n", "taps"), [(6, 3), (7, 7), (24, 11)])
def test_three_real_products_make_a_correlation(n: int, taps: int) -> None:
    draw = np.random.default_rng(n)
    g, d = draw.standard_normal(taps), draw.standard_normal(n)
    form = dft.bilinear(n, taps)
    assert len(form.B) == (3 * n - 2) // 2 if n % 2 == 0 else (3 * n - 1) // 2
    wanted = [sum(g[k] * d[(i + k) % n] for k in range(taps)) for i in range(n)]
    np.testing.assert_allclose(form.A @ ((form.G @ g) * (form.B @ d)), wanted, atol=1e-9)


def test_all_outputs_weigh_frequency_zero_alike() -> None:
    assert np.ptp(dft.bilinear(10, 3).A[:, 0]) < 1e-12


@pytest.mark.parametrize("plan", [dft.FourStep(6, 8, 6), dft.FourStep(7, 5, 7), dft.four_step(100, 60)])
def test_four_steps_are_the_transform(plan: dft.FourStep) -> None:
    x = np.zeros(plan.n)
    x[: plan.rows * plan.n2] = np.random.default_rng(0).standard_normal(plan.rows * plan.n2)
    inner = (dft.forward(plan.n1, plan.n1) @ x.reshape(plan.n1, plan.n2)).reshape(2, plan.h, plan.n2)
    found = ((inner[0] + 1j * inner[1]) * plan.twiddles) @ dft.roots(plan.n2, plan.n2, plan.n2)
    np.testing.assert_allclose(found, plan.spectrum(x), atol=1e-9)


@pytest.mark.parametrize(("p", "q", "b"), [(1, 1, 12), (2, 3, 4), (3, 1, 5)])
def test_a_planted_circulant_is_recovered(p: int, q: int, b: int) -> None:
    C = np.random.default_rng(b).standard_normal((p, q, b)).astype(np.float32)
    W = dft.circulant(C)
    assert dft.circulant_block(W) == b
    np.testing.assert_array_equal(dft.first_columns(W, b), C)


def test_a_circulant_is_a_convolution() -> None:
    c, x = np.random.default_rng(0).standard_normal((2, 6))
    wanted = [sum(c[(i - j) % 6] * x[j] for j in range(6)) for i in range(6)]
    np.testing.assert_allclose(dft.circulant(c[None, None]) @ x, wanted)


def test_one_entry_off_is_not_circulant() -> None:
    W = dft.circulant(np.random.default_rng(0).standard_normal((1, 1, 8)))
    W[3, 5] += 1e-7
    assert dft.circulant_block(W) is None


def test_toeplitz_is_not_circulant() -> None:
    assert dft.circulant_block(np.subtract.outer(np.arange(6), np.arange(6))) is None


@pytest.mark.parametrize(("n", "n1"), [(12, 4), (12, 3), (15, 5), (16, 8)])
def test_a_circulant_along_a_factor(n: int, n1: int) -> None:
    c, x = np.random.default_rng(n).standard_normal((2, n))
    spectra = np.fft.rfft(x.reshape(n1, -1), axis=0)
    mixed = np.einsum("fpq,fq->fp", dft.polyphase(c, n1), spectra)
    found = np.fft.irfft(mixed, n1, axis=0).reshape(-1)
    np.testing.assert_allclose(found, dft.circulant(c[None, None]) @ x, atol=1e-12)
