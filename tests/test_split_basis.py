"""What split-basis makes of a kernel: planted atoms of each basis, Parseval, and what data change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import driver
import numpy as np
import pytest
from calibrated import error, feeds, skips, weight
from convolutions import assert_no_worse_with_data, conv, form_of, split
from pydantic import ValidationError

from ccompile.numerics import atoms
from ccompile.passes.split_basis import SplitBasis

if TYPE_CHECKING:
    from ccompile.core import Array

FIXED = {"dct": atoms.dct_atoms, "haar": atoms.haar_atoms}


def mixed(kernels: Array, o: int = 8, c: int = 6) -> Array:
    W: Array = np.tensordot(np.random.default_rng(4).standard_normal((o, c, len(kernels))), kernels, 1)
    return W


def learned(count: int, kh: int = 3, kw: int = 5) -> Array:
    """Outer products of random columns and rows: of no fixed basis."""
    rng = np.random.default_rng(5)
    kernels: Array = rng.standard_normal((count, kh, 1)) * rng.standard_normal((count, 1, kw))
    return kernels


PLANTED = {
    "dct": atoms.dct_atoms(3, 5)[[0, 3]],
    "haar": atoms.haar_atoms(3, 5)[[1, 4]],
    "learned": learned(2),
}


@pytest.mark.parametrize("statistics", ["calibration", "weights"])
@pytest.mark.parametrize("basis", PLANTED)
def test_planted_atoms_lose_nothing(basis: str, statistics: str) -> None:
    model = conv(W=mixed(PLANTED[basis]), strides=[2, 1], pads=[1, 2, 0, 1])
    run = split(SplitBasis, model, rank=2, basis=basis, statistics=statistics)
    (site,) = run.record.applied
    assert site.note.startswith("rank 2 of 15")
    assert error(run.model, model, feeds(model, seed=9)) < 1e-5
    if basis != "learned":
        np.testing.assert_allclose(weight(run.model, "conv/D")[:2, 0], PLANTED[basis], atol=1e-6)


@pytest.mark.parametrize("basis", PLANTED)
def test_the_least_number_of_atoms_within_an_error_is_taken(basis: str) -> None:
    model = conv((48, 32, 3, 5), (32, 32), mixed(PLANTED[basis], 48, 32))
    run = split(SplitBasis, model, error=1e-9, basis=basis, statistics="weights")
    (site,) = run.record.applied
    assert site.note.startswith("rank 2 of 15")
    assert error(run.model, model, feeds(model, (1,), seed=9)) < 1e-5


def test_kernels_that_average_are_one_atom_of_low_frequency() -> None:
    model = conv(W=mixed(np.ones((1, 3, 5))))
    for basis in FIXED:
        run = split(SplitBasis, model, rank=1, basis=basis)
        np.testing.assert_allclose(weight(run.model, "conv/D"), 15**-0.5, rtol=1e-6)
        assert error(run.model, model, feeds(model, seed=9)) < 1e-5


def test_all_channels_share_the_kernels() -> None:
    for basis in ("dct", "haar", "learned"):
        D = weight(split(SplitBasis, conv(), rank=3, basis=basis).model, "conv/D")
        assert D.shape == (18, 1, 3, 5)
        np.testing.assert_array_equal(D.reshape(6, 3, 15), np.broadcast_to(D[:3].reshape(3, 15), (6, 3, 15)))


@pytest.mark.parametrize("basis", FIXED)
def test_without_data_the_energy_of_the_other_atoms_is_lost(basis: str) -> None:
    W, form = form_of(conv())
    energy = np.square(np.tensordot(W.reshape(8, 6, 3, 5), FIXED[basis](3, 5), ((2, 3), (1, 2)))).sum((0, 1))
    lost = SplitBasis.model_validate({"keep": 0.5, "basis": basis}).losses(W, None, form, range(1, 16))
    np.testing.assert_allclose(lost, [np.sort(energy)[: 15 - rank].sum() for rank in range(1, 16)], atol=1e-12)


@pytest.mark.parametrize("basis", ["dct", "haar", "learned"])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_data_never_make_it_lose_more(rank: int, basis: str) -> None:
    assert_no_worse_with_data(SplitBasis.model_validate({"keep": 0.5, "basis": basis}), conv(), rank)


def test_learned_kernels_lose_no_more_than_fixed_ones_of_separable_weights() -> None:
    W, form = form_of(conv(W=mixed(learned(3))))
    lost = {
        basis: SplitBasis.model_validate({"keep": 0.5, "basis": basis}).losses(W, None, form, [3])[0]
        for basis in ("dct", "haar", "learned")
    }
    assert lost["learned"] < 1e-9 < min(lost["dct"], lost["haar"])


@pytest.mark.parametrize("basis", ["dct", "haar", "learned"])
def test_equal_input_gives_equal_bytes(basis: str) -> None:
    runs = [split(SplitBasis, conv(), rank=3, basis=basis) for _ in range(2)]
    first, second = (driver.proto_of(run.model).SerializeToString() for run in runs)
    assert first == second


def test_a_basis_of_another_name_is_refused() -> None:
    with pytest.raises(ValidationError, match="haar"):
        SplitBasis.model_validate({"rank": 1, "basis": "fourier"})


@pytest.mark.parametrize(("shape", "size"), [((6, 4, 5), (9,)), ((6, 4, 2, 3, 2), (4, 5, 4))])
def test_a_kernel_that_has_not_two_axes_is_left_alone(shape: tuple[int, ...], size: tuple[int, ...]) -> None:
    kernel = "x".join(map(str, shape[2:]))
    reason = f"kernel {kernel}: it has {len(shape) - 2} axes, not 2"
    assert skips(split(SplitBasis, conv(shape, size), rank=1)) == {"conv": reason}
