"""Monochromatic filters and biclusters: planted structure comes back, data never hurt."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import F, Sampled, layer, layers

from ccompile.numerics import bicluster, colour, weighted


def coloured(seed: int, o: int, colours: int, c: int = 3, kh: int = 5, kw: int = 3) -> F:
    rng = np.random.default_rng(seed)
    p, group = rng.standard_normal((colours, c)), rng.permutation(np.arange(o) % colours)
    W: F = np.einsum("oc,oij->ocij", p[group], rng.standard_normal((o, kh, kw)))
    return W


def blocky(seed: int, groups: tuple[int, int], rank: int, o: int = 12, c: int = 6, k: int = 3) -> F:
    rng = np.random.default_rng(seed)
    W = np.zeros((o, c, k, k))
    for rows in np.split(rng.permutation(o), groups[0]):
        for columns in np.split(np.arange(c), groups[1]):
            block = rng.standard_normal((len(rows), rank)) @ rng.standard_normal((rank, len(columns) * k * k))
            W[np.ix_(rows, columns)] = block.reshape(len(rows), len(columns), k, k)
    return W[:, rng.permutation(c)]


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("colours", [1, 2, 4])
def test_planted_colours_are_recovered(colours: int, balanced: bool) -> None:
    for seed in range(3):
        W, H = coloured(seed, 12, colours), layer(seed, 12, 3, 5, 3).H
        for metric in (None, H):
            found = colour.fit(W, metric, colours, balanced)
            np.testing.assert_allclose(found.compose(), W, atol=1e-6)
            assert np.bincount(found.group).tolist() == [12 // colours] * colours


def test_a_filter_for_each_colour_keeps_its_leading_colour() -> None:
    W = layer(1, 6, 3).W
    tails = np.linalg.svd(W.reshape(6, 3, 9), compute_uv=False)[:, 1:]
    found = colour.fit(W, None, 6)
    assert found.loss == pytest.approx(np.square(tails).sum())
    assert found.group.tolist() == [0, 1, 2, 3, 4, 5]
    assert found.p.size + found.s.size == sum(colour.parameters(W.shape, 6))


def test_one_input_channel_is_exact() -> None:
    sample = layer(2, 5, 1)
    for H in (None, sample.H):
        assert colour.fit(sample.W, H, 1).error < 1e-7


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layers(), st.booleans(), st.data())
def test_data_never_hurt_colours(sample: Sampled, balanced: bool, data: st.DataObject) -> None:
    colours = data.draw(st.integers(1, len(sample.W)))
    found, free = (colour.fit(sample.W, H, colours, balanced) for H in (sample.H, None))
    assert found.loss <= weighted.loss(sample.H, sample.W, free.compose()) * (1 + 1e-9) + 1e-12 * sample.energy
    assert found.loss == pytest.approx(sample.measured(found.compose()), rel=1e-6, abs=1e-12 * sample.energy)
    if balanced:
        assert np.ptp(np.bincount(found.group, minlength=colours)) <= 1


@pytest.mark.parametrize("seed", range(4))
def test_colours_descend_sweep_by_sweep(seed: int) -> None:
    sample = layer(seed, 16, 3)
    losses = [colour.fit(sample.W, sample.H, 3, sweeps=sweeps).loss for sweeps in range(5)]
    assert losses == sorted(losses, reverse=True)
    free = colour.fit(sample.W, None, 3).compose()
    assert losses[-1] < 0.9 * weighted.loss(sample.H, sample.W, free)


@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2)])
@pytest.mark.parametrize("rank", [1, 2])
def test_planted_biclusters_are_recovered(groups: tuple[int, int], rank: int) -> None:
    W, H = blocky(1, groups, rank), layer(1, 12, 6).H
    for metric in (None, H):
        found = bicluster.fit(W, metric, groups, rank)
        np.testing.assert_allclose(found.compose(), W, atol=1e-6)
        assert (found.B.size, found.A.size) == bicluster.parameters(W.shape, groups, rank)
        assert sorted(found.outputs.ravel().tolist()) == list(range(12))
        assert sorted(found.inputs.ravel().tolist()) == list(range(6))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_one_group_of_each_is_the_activation_aware_svd(rank: int) -> None:
    sample = layer(3)
    for H in (None, sample.H):
        best = float(np.square(weighted.spectrum(sample.W.reshape(6, -1), H)[rank:]).sum())
        assert bicluster.fit(sample.W, H, (1, 1), rank).loss == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_full_rank_blocks_are_exact() -> None:
    sample = layer(4, 6, 4)
    for H in (None, sample.H):
        assert bicluster.fit(sample.W, H, (2, 2), 3).error < 1e-7


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layers(), st.data())
def test_data_never_hurt_biclusters(sample: Sampled, data: st.DataObject) -> None:
    o, c, kh, kw = sample.W.shape
    G, K = (data.draw(st.sampled_from([g for g in (1, 2, 3, 4) if n % g == 0])) for n in (o, c))
    rank = data.draw(st.integers(1, min(o // G, c // K * kh * kw)))
    found, free = (bicluster.fit(sample.W, H, (G, K), rank) for H in (sample.H, None))
    assert found.loss <= weighted.loss(sample.H, sample.W, free.compose()) * (1 + 1e-9) + 1e-12 * sample.energy
    assert found.loss == pytest.approx(sample.measured(found.compose()), rel=1e-6, abs=1e-12 * sample.energy)


def test_equal_input_gives_equal_bytes() -> None:
    sample = layer(5, 8)
    first, again = (colour.fit(sample.W.copy(), sample.H.copy(), 3) for _ in range(2))
    assert first.compose().tobytes() == again.compose().tobytes()
    one, two = (bicluster.fit(sample.W.copy(), sample.H.copy(), (2, 2), 2) for _ in range(2))
    assert one.compose().tobytes() == two.compose().tobytes()


def test_what_does_not_fit_is_refused() -> None:
    sample = layer(6)
    for colours in (0, 7):
        with pytest.raises(ValueError, match=r"colours . must lie in 1 \.\. 6"):
            colour.fit(sample.W, None, colours)
    with pytest.raises(ValueError, match="do not divide 6 x 4 channels"):
        bicluster.fit(sample.W, None, (4, 2), 1)
    with pytest.raises(ValueError, match=r"rank 4 must lie in 1 \.\. 3"):
        bicluster.fit(sample.W, None, (2, 2), 4)
    with pytest.raises(ValueError, match="need"):
        colour.fit(sample.W, sample.H[:-1, :-1], 2)
