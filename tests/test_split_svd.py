"""What strengths mean to split-svd, and that the bound it states holds, and is reached."""

from __future__ import annotations

import driver
import numpy as np
import onnx_ir as ir
import pytest
from builders import Net
from pydantic import ValidationError

from ccompile.core import Array, Choice, Site
from ccompile.passes.split_svd import SplitSvd
from ccompile.runtime import Settings
from ccompile.sites import site_errors

SPECTRUM = np.array([8.0, 4.0, 2.0, 1.0, 0.5, 0.25])
SITE = Site(("fc",))


def curve(o: int = 40, i: int = 30) -> list[Choice]:
    """Return the choices of a matrix with SPECTRUM and zeros behind it: the whole, then the ranks that cost less."""
    squares = np.square(np.concatenate([SPECTRUM, np.zeros(min(o, i) - len(SPECTRUM))]))
    lost = [float(squares[r:].sum() / squares.sum()) for r in range(min(o, i) + 1)]
    paying = range((o * i - 1) // (o + i), 0, -1)
    return [Choice(0, 0.0, o * i, o * i), *(Choice(r, lost[r], r * (o + i), r * (o + i)) for r in paying)]


def weights(**options: float) -> SplitSvd:
    """Return a step that needs no data."""
    return SplitSvd.model_validate({"statistics": "weights", **options})


def layer(W: Array, op: str = "MatMul") -> ir.Model:
    """Return y = x W as a model."""
    net = Net()
    x = net.input("x", ["N", len(W)], ir.DataType.from_numpy(W.dtype))
    return net.model(net.node(op, x, net.constant(W, "w"), name="fc"))


def planted(spectrum: Array, o: int = 12, i: int = 10, seed: int = 0) -> tuple[Array, Array, Array]:
    """Return W[i, o] = left diag(spectrum) right with its orthonormal left[i, k] and right[k, o]."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((i, i)))[0][:, : len(spectrum)]
    right = np.linalg.qr(rng.standard_normal((o, o)))[0][: len(spectrum)]
    return left * spectrum @ right, left, right


@pytest.mark.parametrize(("rank", "picked"), [(1, 1), (3, 3), (17, 17)])
def test_a_rank_is_taken_as_it_is(rank: int, picked: int) -> None:
    chosen = SplitSvd(rank=rank).pick(SITE, curve())
    assert isinstance(chosen, Choice)
    assert chosen.strength == picked


@pytest.mark.parametrize(("energy", "picked"), [(0.5, 1), (0.8, 2), (0.95, 3), (0.99, 4), (0.999, 5), (1.0, 6)])
def test_an_energy_is_a_share_of_the_squared_spectrum(energy: float, picked: int) -> None:
    squares = np.square(SPECTRUM)
    assert squares[:picked].sum() >= energy * squares.sum()
    assert picked == 1 or squares[: picked - 1].sum() < energy * squares.sum()
    chosen = SplitSvd(energy=energy).pick(SITE, curve())
    assert isinstance(chosen, Choice)
    assert chosen.strength == picked


@pytest.mark.parametrize(("error", "picked"), [(0.9, 1), (0.25, 1), (0.0625, 2), (0.0144, 4), (0.0, 6)])
def test_an_error_is_a_share_of_the_power(error: float, picked: int) -> None:
    chosen = SplitSvd(error=error).pick(SITE, curve())
    assert isinstance(chosen, Choice)
    assert chosen.strength == picked
    assert chosen.error <= error


def test_energy_and_error_agree() -> None:
    for share in (0.1, 0.3, 0.6, 0.9, 0.99, 0.9999):
        assert SplitSvd(energy=share).pick(SITE, curve()) == SplitSvd(error=1 - share).pick(SITE, curve())


@pytest.mark.parametrize(("o", "i"), [(40, 30), (30, 40), (8, 6), (64, 2), (7, 7), (4, 4), (12, 6)])
def test_what_saves_nothing_is_refused_from_break_even_on(o: int, i: int) -> None:
    W = np.random.default_rng(0).standard_normal((i, o)).astype(np.float32)
    for rank in range(1, min(o, i) + 1):
        run = driver.run_step(weights(rank=rank), layer(W))
        assert run.result is not None
        assert bool(run.result.applied) == (rank * (o + i) < o * i)
        for skip in run.result.skipped:
            assert f"rank {rank} would cost more than the layer does" in skip.reason
            assert skip.reason.endswith(f"it pays up to rank {(o * i - 1) // (o + i)}")


@pytest.mark.parametrize(
    "options", [{}, {"rank": 2, "energy": 0.5}, {"keep": 0.5, "rank": 2}, {"rank": 2, "energy": 0.5, "error": 0.1}]
)
def test_exactly_one_strength_is_asked_for(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="exactly one"):
        SplitSvd.model_validate(options)


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"energy": 0.0}, {"energy": 1.5}, {"error": -0.1}, {"error": 1.0}, {"keep": 0}]
)
def test_a_strength_out_of_range_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        SplitSvd.model_validate(options)


@pytest.mark.parametrize("statistics", ["weights", "calibration"])
@pytest.mark.parametrize("strength", [{"error": 1e-9}, {"energy": 1 - 1e-9}])
def test_a_planted_rank_is_found_in_the_model(statistics: str, strength: dict[str, float]) -> None:
    W, _, _ = planted(SPECTRUM[:3], 200, 180)
    step = SplitSvd.model_validate({"statistics": statistics, **strength})
    record = driver.run_step(step, layer(W.astype(np.float32))).record
    assert record.verdict == "kept"
    assert [site.note.split(",")[0] for site in record.applied] == ["rank 3 of 180"]
    assert record.against_previous is not None
    assert record.against_previous.outputs[0].relative_l2 == pytest.approx(0, abs=1e-6)


# y of a layer whose weight W[i, o] has rank two: every form must come out the same, not only near.
FORMS = {
    "plain": "g (float[N,8] x) => (float[N,7] y) <float[8,7] w> { [fc] y = Gemm (x, w) }",
    "scaled": "g (float[N,8] x) => (float[N,7] y) <float[8,7] w, float[7] b> "
    "{ [fc] y = Gemm <alpha: float = 3.0, beta: float = 0.5> (x, w, b) }",
    "transposed": "g (float[N,8] x) => (float[N,7] y) <float[7,8] w, float b = {2}> "
    "{ [fc] y = Gemm <alpha: float = -0.5, transB: int = 1> (x, w, b) }",
    "right": "g (float[N,3,8] x) => (float[N,3,7] y) <float[8,7] w> { [fc] y = MatMul (x, w) }",
    "left": "g (float[8,N] x) => (float[7,N] y) <float[7,8] w> { [fc] y = MatMul (w, x) }",
    "stack": "g (float[N,8,3] x) => (float[N,7,3] y) <float[7,8] w> { [fc] y = MatMul (w, x) }",
    "conv": "g (float[N,8,H,W] x) => (float[N,7,A,B] y) <float[7,8,1,1] w, float[7] b> "
    "{ [fc] y = Conv <strides: ints = [2, 3], pads: ints = [1, 0, 2, 1]> (x, w, b) }",
    "conv1d": "g (float[N,8,H] x) => (float[N,7,A] y) <float[7,8,1] w> { [fc] y = Conv (x, w) }",
}


@pytest.mark.parametrize("statistics", ["weights", "calibration"])
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_of_low_rank_computes_what_it_did(form: str, statistics: str) -> None:
    model, _ = driver.model_of(FORMS[form])
    weight = model.graph.initializers["w"]
    assert weight.const_value is not None
    shape = weight.const_value.numpy().shape
    W = planted(SPECTRUM[:2], shape[1], shape[0])[0].astype(np.float32).reshape(shape)
    weight.const_value = ir.Tensor(W, name="w")
    record = driver.run_step(SplitSvd.model_validate({"rank": 2, "statistics": statistics}), model).record
    assert record.verdict == "kept", record.reason
    assert len(record.applied) == 1
    assert (record.applied[0].measured is None) == (statistics == "calibration")
    assert record.against_previous is not None
    assert record.against_previous.outputs[0].elements
    assert record.against_previous.outputs[0].relative_l2 == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_bound_holds_on_any_input_and_is_reached_on_the_worst(rank: int) -> None:
    W, left, _ = planted(SPECTRUM)
    model = layer(W.astype(np.float32))
    drawn = np.random.default_rng(1).standard_normal((7, 10)).astype(np.float32)
    run = driver.run_step(weights(rank=rank), model)
    assert run.result is not None
    (site,) = run.result.applied
    assert site.bound == pytest.approx(SPECTRUM[rank], rel=1e-4)
    for x in (drawn, *(left.T[:, None].astype(np.float32))):
        (found,), _ = site_errors(model, run.model, [site], {"x": x}, Settings(1))
        assert found.holds
    worst = 5 * left[:, rank : rank + 1].T.astype(np.float32)
    (found,), _ = site_errors(model, run.model, [site], {"x": worst}, Settings(1))
    assert found.gain == pytest.approx(SPECTRUM[rank], rel=1e-4)
    assert found.relative == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("size", [12, 120])
def test_rounding_alone_does_not_break_the_bound(dtype: type, scale: float, size: int) -> None:
    W, _, _ = planted(scale * SPECTRUM[:3], size, size)
    record = driver.run_step(weights(rank=3), layer(W.astype(dtype))).record
    assert record.verdict == "kept", record.reason
    (site,) = record.applied
    assert site.bound is not None
    assert site.measured is not None
    assert site.bound <= 9 * float(np.finfo(dtype).eps) * scale * float(np.linalg.norm(SPECTRUM)) * np.sqrt(size)


def test_a_bound_is_stated_only_without_data_and_of_dense_layers() -> None:
    W, _, _ = planted(SPECTRUM)
    fitted = driver.run_step(SplitSvd(rank=2), layer(W.astype(np.float32))).record
    assert [site.bound for site in fitted.applied] == [None]
    text = "g (float[N,4,H,W] x) => (float[N,6,A,B] y) <float[6,4,3,3] w> { [conv] y = Conv (x, w) }"
    convolved = driver.run_step(weights(rank=2), driver.model_of(text)[0]).record
    assert [site.bound for site in convolved.applied] == [None]


def test_a_wrong_bound_is_noticed() -> None:
    W, left, _ = planted(SPECTRUM)
    model = layer(W.astype(np.float32))
    run = driver.run_step(weights(rank=1), model)
    assert run.result is not None
    (site,) = run.result.applied
    lie = Site(site.nodes, site.note, site.input, site.output, SPECTRUM[1] / 2)
    worst = left[:, 1:2].T.astype(np.float32)
    found, _ = site_errors(model, run.model, [site, lie], {"x": worst}, Settings(1))
    assert [error.holds for error in found] == [True, False]
