"""Moments add up batch by batch, whatever the batches' sizes."""

from __future__ import annotations

import numpy as np
import pytest

from ccompile.moments import ChannelMoments, Layer, Moments

LAYER = Layer("fc", "Gemm", "x", "y", 1, 1, 2, 3, 1)


@pytest.mark.parametrize("wide", [(False, True), (True, False)])
def test_rows_are_kept_of_all_batches_or_of_none(wide: tuple[bool, bool]) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((1, 9, 3)), rng.standard_normal((1, 9, 2))
    found = Moments(LAYER)
    for part, keep in zip((slice(0, 7), slice(7, 9)), wide, strict=True):
        found.add(x[:, part], y[:, part], 9, keep)
    H, C = found.centred()
    centred_x, centred_y = x[0] - x[0].mean(0), y[0] - y[0].mean(0)
    np.testing.assert_allclose(H[0], centred_x.T @ centred_x, atol=1e-12)
    np.testing.assert_allclose(C[0], centred_y.T @ centred_x, atol=1e-12)
    np.testing.assert_allclose(found.square_x[0], np.square(x[0]).mean(0))
    assert (found.x is not None) == wide[0]


def test_channel_moments_are_those_of_all_batches_together() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 5, 3, 4, 4)).astype(np.float32)
    found = ChannelMoments()
    found.add(x[:2], y[:2])
    found.add(x[2:], y[2:])
    a, b = (np.moveaxis(value, 1, 0).reshape(3, -1).astype(np.float64) for value in (x, y))
    np.testing.assert_allclose(found.means, (a.mean(1), b.mean(1)), atol=1e-12)
    np.testing.assert_allclose(found.spread[:2], (a.var(1), b.var(1)), atol=1e-12)
    np.testing.assert_allclose(found.spread[2], [np.cov(p, q, bias=True)[0, 1] for p, q in zip(a, b, strict=True)])
