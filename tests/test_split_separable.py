"""What split-separable makes of a kernel: planted terms, kernels of any dimension, and what data change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import driver
import numpy as np
import pytest
from calibrated import error, feeds, weight
from convolutions import assert_no_worse_with_data, conv, form_of, split

from ccompile.passes.split_separable import SplitSeparable

if TYPE_CHECKING:
    from ccompile.core import Array


def planted(terms: int, shape: tuple[int, ...]) -> Array:
    rng = np.random.default_rng(4)
    P, D = rng.standard_normal((shape[0], shape[1], terms)), rng.standard_normal((terms, *shape[1:]))
    W: Array = np.einsum("ocm,mc...->oc...", P, D)
    return W


@pytest.mark.parametrize("statistics", ["calibration", "weights"])
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("kernel", [(3, 5), (1, 7), (5,), (2, 3, 2)])
def test_planted_terms_lose_nothing(kernel: tuple[int, ...], terms: int, statistics: str) -> None:
    shape = (16, 6, *kernel)
    size = {1: (48,), 2: (14, 15), 3: (5, 7, 6)}[len(kernel)]
    model = conv(shape, size, planted(terms, shape), strides=[2] * len(kernel), pads=[1] * 2 * len(kernel))
    run = split(SplitSeparable, model, rank=terms, statistics=statistics)
    (site,) = run.record.applied
    assert site.note.startswith(f"rank {terms} of {np.prod(kernel)}")
    assert weight(run.model, "conv/D").shape == (6 * terms, 1, *kernel)
    assert error(run.model, model, feeds(model, seed=9)) < 1e-5


@pytest.mark.parametrize("terms", [1, 2])
def test_the_least_number_of_terms_within_an_error_is_taken(terms: int) -> None:
    shape = (48, 32, 3, 3)
    model = conv(shape, (32, 32), planted(terms, shape))
    run = split(SplitSeparable, model, error=1e-9, statistics="weights")
    (site,) = run.record.applied
    assert site.note.startswith(f"rank {terms} of 9")
    assert error(run.model, model, feeds(model, (1,), seed=9)) < 1e-5


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_data_never_make_it_lose_more(rank: int) -> None:
    assert_no_worse_with_data(SplitSeparable(keep=0.5), conv(), rank)


def test_without_data_each_channel_loses_its_discarded_spectrum() -> None:
    W, form = form_of(conv())
    lost = SplitSeparable(keep=0.5).losses(W, None, form, range(1, 9))
    s = np.linalg.svd(W.reshape(8, 6, 15).transpose(1, 0, 2), compute_uv=False)
    np.testing.assert_allclose(lost, [np.square(s[:, rank:]).sum() for rank in range(1, 9)], atol=1e-12)


def test_all_numbers_of_terms_are_tried() -> None:
    run = split(SplitSeparable, conv((16, 8, 3, 3), (8, 8)), rank=5)
    (site,) = run.record.applied
    assert site.note.startswith("rank 5 of 9")


def test_equal_input_gives_equal_bytes() -> None:
    first, second = (
        driver.proto_of(split(SplitSeparable, conv(), keep=0.5).model).SerializeToString() for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("statistics", ["calibration", "weights"])
@pytest.mark.parametrize("kernel", [(3, 5), (2, 3)])
def test_planted_separable_kernels_lose_nothing(kernel: tuple[int, int], statistics: str) -> None:
    rng = np.random.default_rng(4)
    W = np.einsum(
        "oc,ci,cj->ocij", *(rng.standard_normal(shape) for shape in ((16, 6), (6, kernel[0]), (6, kernel[1])))
    )
    model = conv((16, 6, *kernel), (14, 15), W, strides=[2, 1], pads=[1, 0, 2, 1])
    run = split(SplitSeparable, model, rank=1, statistics=statistics, kernels="separable")
    (site,) = run.record.applied
    assert site.note.startswith(f"rank 1 of {np.prod(kernel)}")
    assert [weight(run.model, f"conv/{part}").shape for part in "VUP"] == [
        (6, 1, kernel[0], 1),
        (6, 1, 1, kernel[1]),
        (16, 6, 1, 1),
    ]
    assert error(run.model, model, feeds(model, seed=9)) < 1e-5


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_data_never_make_separable_kernels_lose_more(rank: int) -> None:
    assert_no_worse_with_data(SplitSeparable(keep=0.5, kernels="separable"), conv(), rank)


@pytest.mark.parametrize(
    ("kernel", "why"), [((1, 7), "kernel 1x7: it has not two axes to part"), ((5,), "not 2"), ((2, 3, 2), "not 2")]
)
def test_a_kernel_without_two_axes_is_not_made_of_separable_ones(kernel: tuple[int, ...], why: str) -> None:
    size = {1: (48,), 2: (14, 15), 3: (5, 7, 6)}[len(kernel)]
    run = split(SplitSeparable, conv((16, 6, *kernel), size), rank=1, statistics="weights", kernels="separable")
    assert not run.record.applied
    (skip,) = run.record.skipped
    assert why in skip.reason
