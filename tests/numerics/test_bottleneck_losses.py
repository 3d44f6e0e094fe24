"""What a chain tells of all pairs of ranks: planted pairs, order, and what a fit makes of it."""

from __future__ import annotations

import numpy as np
import pytest
from layers import F, layer

from ccompile.numerics import bottleneck, bottleneck_losses, weighted


def sampled(seed: int, o: int = 10, n: int = 8, t: int = 9) -> tuple[F, F]:
    """A weight W[o, n, t] and the Gram matrix of its inputs."""
    found = layer(seed, o, n, 3, t // 3)
    return found.W.reshape(o, n, t), found.H


def planted(rank: int, output_rank: int) -> F:
    rng = np.random.default_rng(1)
    A, core = rng.standard_normal((10, output_rank)), rng.standard_normal((output_rank, rank, 9))
    W: F = np.einsum("os,srt,rn->ont", A, core, rng.standard_normal((rank, 8)))
    return W


@pytest.mark.parametrize("with_data", [True, False])
def test_a_planted_pair_is_the_least_that_loses_nothing(with_data: bool) -> None:
    W, H = planted(3, 5), sampled(0)[1] if with_data else None
    chain = bottleneck_losses.chain(W, H, range(8, 0, -1))
    free = chain.losses < 1e-9 * chain.losses[0, 0]
    assert [(rank, int(row.argmax())) for rank, row in zip(chain.ranks, free, strict=True) if row.any()] == [
        (rank, 5) for rank in (8, 7, 6, 5, 4, 3)
    ]


@pytest.mark.parametrize("with_data", [True, False])
def test_more_of_either_rank_never_loses_more(with_data: bool) -> None:
    W, H = sampled(1)
    losses = bottleneck_losses.chain(W, H if with_data else None, (8, 6, 4, 2, 1)).losses
    assert losses.shape == (5, 11)
    assert (np.diff(losses, axis=1) <= 1e-12 * losses[0, 0]).all()
    assert (np.diff(losses, axis=0) >= -1e-12 * losses[0, 0]).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_pair_is_told_within_a_quarter_of_its_fit_and_closer_once_refined(seed: int) -> None:
    W, H = sampled(seed, 12, 10)
    chain = bottleneck_losses.chain(W, H, range(10, 0, -1))
    for rank, output in ((7, 10), (5, 7), (3, 6)):
        fitted = weighted.loss(H, W, bottleneck.fit(W, H, rank, output).compose())
        told, refined = chain.losses[10 - rank, output], chain.refined(rank, output)
        assert refined < told <= 1.25 * fitted
        assert refined <= 1.15 * fitted


def test_a_wide_layer_goes_on_inside_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = sampled(4, 8, 12, 3)
    ranks = (12, 9, 6, 3, 2, 1)
    whole = bottleneck_losses.chain(W, H, ranks)
    monkeypatch.setattr(bottleneck_losses, "WIDE", 8)
    inside = bottleneck_losses.chain(W, H, ranks)
    assert [link.problem.n for link in inside.links] == [12, 12, 12, 6, 6, 6]
    for index, rank in enumerate(ranks):
        for output in (1, 4, 8):
            if output <= rank * 3:
                assert inside.losses[index, output] <= 1.2 * whole.losses[index, output] + 1e-12 * whole.losses[0, 0]
                assert inside.refined(rank, output) <= 1.2 * whole.refined(rank, output)


def test_equal_input_gives_equal_numbers() -> None:
    W, H = sampled(5)
    first, again = (bottleneck_losses.chain(W.copy(), H.copy(), (8, 4, 2)) for _ in range(2))
    assert first.losses.tobytes() == again.losses.tobytes()
    assert first.refined(4, 5) == again.refined(4, 5)


@pytest.mark.parametrize("ranks", [(), (9, 1), (2, 3), (2, 2), (1, 0)])
def test_ranks_that_do_not_descend_within_the_layer_are_refused(ranks: tuple[int, ...]) -> None:
    W, H = sampled(6)
    with pytest.raises(ValueError, match="must descend within 8"):
        bottleneck_losses.chain(W, H, ranks)
