"""What split-basis makes of a kernel: planted atoms of each basis, Parseval, its cost and its budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import driver
import numpy as np
import onnx_ir as ir
import pytest
from builders import Net
from calibrated import calibration, error, feeds, layers, skips, weight
from pydantic import ValidationError

from ccompile import graph
from ccompile.analysis import linear
from ccompile.numerics import atoms
from ccompile.passes.split_basis import SplitBasis

if TYPE_CHECKING:
    from ccompile.core import Array

FIXED = {"dct": atoms.dct_atoms, "haar": atoms.haar_atoms}


def conv(
    shape: tuple[int, ...] = (8, 6, 3, 5), size: tuple[int, ...] = (9, 11), W: Array | None = None, **attributes: Any
) -> ir.Model:
    net = Net(0)
    x = net.input("x", ["N", shape[1], *size])
    w = net.weight("w", shape) if W is None else net.constant(W.astype(np.float32), "w")
    return net.model(net.node("Conv", x, w, name="conv", **attributes))


def mixed(kernels: Array, o: int = 8, c: int = 6) -> Array:
    W: Array = np.tensordot(np.random.default_rng(4).standard_normal((o, c, len(kernels))), kernels, 1)
    return W


def learned(count: int, kh: int = 3, kw: int = 5) -> Array:
    """Outer products of random columns and rows: of no fixed basis."""
    rng = np.random.default_rng(5)
    kernels: Array = rng.standard_normal((count, kh, 1)) * rng.standard_normal((count, 1, kw))
    return kernels


def run_of(model: ir.Model, **options: object) -> driver.Bench:
    run = driver.bench(model, feeds(model, seed=6))
    run.statistics = calibration(model, feeds(model))
    run.step(0, SplitBasis.model_validate(options))
    assert run.record.verdict == "kept"
    return run


def form_of(model: ir.Model) -> tuple[Array, Any]:
    form = layers(model)["conv"]
    return linear.matrix(graph.node_named(model.graph, "conv"), form)[0], form


def gram(d: int) -> Array:
    rng = np.random.default_rng(1)
    X = rng.standard_normal((6 * d, d)) @ (rng.standard_normal((d, d)) * np.arange(1, d + 1) ** -0.5)
    H: Array = X.T @ X / len(X)
    return H


PLANTED = {
    "dct": atoms.dct_atoms(3, 5)[[0, 3]],
    "haar": atoms.haar_atoms(3, 5)[[1, 4]],
    "learned": learned(2),
}


@pytest.mark.parametrize("statistics", ["calibration", "weights"])
@pytest.mark.parametrize("basis", PLANTED)
def test_planted_atoms_lose_nothing(basis: str, statistics: str) -> None:
    model = conv(W=mixed(PLANTED[basis]), strides=[2, 1], pads=[1, 2, 0, 1])
    run = run_of(model, rank=2, basis=basis, statistics=statistics)
    (site,) = run.record.applied
    assert site.note.startswith("rank 2 of 15")
    assert error(run.model, model, feeds(model, seed=9)) < 1e-5
    if basis != "learned":
        np.testing.assert_allclose(weight(run.model, "conv/D")[:2, 0], PLANTED[basis], atol=1e-6)


@pytest.mark.parametrize("basis", PLANTED)
def test_the_least_number_of_atoms_within_an_error_is_taken(basis: str) -> None:
    model = conv((48, 32, 3, 5), (32, 32), mixed(PLANTED[basis], 48, 32))
    run = run_of(model, error=1e-9, basis=basis, statistics="weights")
    (site,) = run.record.applied
    assert site.note.startswith("rank 2 of 15")
    assert error(run.model, model, feeds(model, (1,), seed=9)) < 1e-5


def test_kernels_that_average_are_one_atom_of_low_frequency() -> None:
    model = conv(W=mixed(np.ones((1, 3, 5))))
    for basis in FIXED:
        run = run_of(model, rank=1, basis=basis)
        np.testing.assert_allclose(weight(run.model, "conv/D"), 15**-0.5, rtol=1e-6)
        assert error(run.model, model, feeds(model, seed=9)) < 1e-5


def test_all_channels_share_the_kernels() -> None:
    for basis in ("dct", "haar", "learned"):
        D = weight(run_of(conv(), rank=3, basis=basis).model, "conv/D")
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
    W, form = form_of(conv())
    step, H = SplitBasis.model_validate({"keep": 0.5, "basis": basis}), gram(90)
    with_data, without = (step.fit(W, given, form, rank) for given in (H, None))
    moved = without.composed - W
    assert with_data.loss <= float(((moved @ H) * moved).sum()) * (1 + 1e-9)


def test_learned_kernels_lose_no_more_than_fixed_ones_of_separable_weights() -> None:
    W, form = form_of(conv(W=mixed(learned(3))))
    lost = {
        basis: SplitBasis.model_validate({"keep": 0.5, "basis": basis}).losses(W, None, form, [3])[0]
        for basis in ("dct", "haar", "learned")
    }
    assert lost["learned"] < 1e-9 < min(lost["dct"], lost["haar"])


def test_all_stages_run_behind_the_stride() -> None:
    run = run_of(conv((16, 8, 3, 3), (8, 8), strides=[2, 2], pads=[1] * 4), rank=2)
    macs = {node.name: node.macs for node in run.price(run.model).nodes}
    assert macs == {"conv/D": 2 * 8 * 9 * 16, "conv/P": 16 * 2 * 8 * 16}


@pytest.mark.parametrize("what", ["macs", "params"])
def test_a_budget_is_met(what: str) -> None:
    net = Net(0)
    x = net.relu(net.conv(net.input("x", ["N", 4, 8, 8]), "one", (8, 4, 3, 3), pad=1))
    model = net.model(net.conv(x, "two", (12, 8, 3, 3), pad=1, stride=2))
    run = run_of(model, keep={what: 0.6}, tolerance={"relative_l2": 1e9})
    now, source = run.price(run.model).report, run.origin.cost.report
    assert run.record.applied
    assert 0.3 * getattr(source, what) < getattr(now, what) <= 0.6 * getattr(source, what)


@pytest.mark.parametrize("basis", ["dct", "haar", "learned"])
def test_equal_input_gives_equal_bytes(basis: str) -> None:
    runs = [run_of(conv(), rank=3, basis=basis) for _ in range(2)]
    first, second = (driver.proto_of(run.model).SerializeToString() for run in runs)
    assert first == second


def test_a_basis_of_another_name_is_refused() -> None:
    with pytest.raises(ValidationError, match="haar"):
        SplitBasis.model_validate({"rank": 1, "basis": "fourier"})


@pytest.mark.parametrize(("shape", "size"), [((6, 4, 5), (9,)), ((6, 4, 2, 3, 2), (4, 5, 4))])
def test_a_kernel_that_has_not_two_axes_is_left_alone(shape: tuple[int, ...], size: tuple[int, ...]) -> None:
    kernel = "x".join(map(str, shape[2:]))
    reason = f"kernel {kernel}: it has {len(shape) - 2} axes, not 2"
    assert skips(run_of(conv(shape, size), rank=1)) == {"conv": reason}


def test_dense_layers_are_no_sites_and_pointwise_ones_are_left_to_split_svd() -> None:
    net = Net(0)
    x = net.conv(net.input("x", ["N", 6, 1, 1]), "point", (12, 6, 1, 1))
    model = net.model(net.dense(net.node("Flatten", x), "fc", 12, 12))
    run = run_of(model, rank=1)
    assert not run.record.applied
    assert skips(run) == {"point": "its kernel has one tap: split-svd splits it"}
