"""ccompile: compiles neural networks in ONNX to smaller and faster ones under a declarative, verified spec."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from onnxruntime import InferenceSession, SessionOptions

    from ccompile.api import Model, Result, Source

    Provider = str | tuple[str, Mapping[str, str]]

__version__ = "0.1.0"
__all__ = ["Result", "__version__", "assert_onnx_close", "compile", "load"]


def __getattr__(name: str) -> Any:
    """Return the types that are public; importing ccompile imports nothing heavy."""
    if name != "Result":
        raise AttributeError(f"module `ccompile` has no attribute `{name}`")
    from ccompile import api

    return api.Result


def compile(  # noqa: A001  (ccompile.compile, as re.compile)
    model: Model,
    spec: Mapping[str, Any] | Path | str,
    data: Mapping[str, Source] | None = None,
    out: Path | str | None = None,
    *,
    sets: Sequence[str] = (),
    evidence: Path | str | None = None,
    seed: int = 0,
    threads: int = 0,
    jobs: int = 1,
    measure: bool = False,
    cache: bool | Path | str = True,
    lock: Path | str | None = None,
    locked: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Result:
    """Compile an ONNX model under a spec, as `ccompile MODEL -s SPEC -o OUT` does.

    model: a path or a ModelProto. spec: the path of a YAML file, or what it would hold.
    data: replaces the spec's; for `calibration` and `verification` each a path (an .npz, or a folder of
    test_data_set_*), arrays by input name, or the options of a spec, whose `npz` may be arrays as well:
    {"npz": {...}, "labels": "label"}.
    out: where the model goes, and its evidence beside it; None keeps the result in memory.
    sets: changes of the spec, `passes.split-svd.rank=8`. seed, threads, jobs, measure: the options of the command line.
    cache: whether results are kept and found again, or the folder for that. lock: where the lock of the build goes, or,
    when `locked`, what it is held to [OUT.lock.yaml]. progress: told (what is running, steps done, steps in all).

    A broken contract or gate is no exception: Result.ok is False and Result.reason says why. Raises
    ccompile.errors.CcompileError when spec, model or data are wrong, ContractError when the lock does not hold.
    """
    from ccompile import api

    return api.compile_model(
        model,
        spec,
        data,
        out,
        sets=sets,
        evidence=evidence,
        seed=seed,
        threads=threads,
        jobs=jobs,
        measure=measure,
        cache=cache,
        lock=lock,
        locked=locked,
        progress=progress,
    )


def assert_onnx_close(
    candidate: Model,
    reference: Model,
    data: Source | None = None,
    *,
    samples: int | None = None,
    seed: int = 0,
    threads: int = 0,
    atol: float | None = None,
    rtol: float | None = None,
    relative_l2: float | None = None,
    cosine: float | None = None,
    argmax: float | None = None,
) -> None:
    """Raise AssertionError when outputs of two models differ, with the limits that would have passed.

    data: a path (an .npz, or a folder of test_data_set_*) or arrays by input name; None: `samples` seeded random ones
    [16]. Limits hold for every output: largest absolute difference of an element; largest difference relative to the
    reference element; |a - b| / |b|; least cosine similarity; least share of rows that keep their largest entry.
    Without any only float reordering is allowed. NaN equals nothing. Raises ccompile.errors.CcompileError when models
    or data are wrong.
    """
    from ccompile import api

    limits = {"atol": atol, "rtol": rtol, "relative_l2": relative_l2, "cosine": cosine, "argmax": argmax}
    api.assert_onnx_close(candidate, reference, data, limits, samples=samples, seed=seed, threads=threads)


def load(
    packed: Path | str,
    sess_options: SessionOptions | None = None,
    providers: Sequence[Provider] | None = None,
    provider_options: Sequence[Mapping[str, str]] | None = None,
    limit: int | None = None,
) -> InferenceSession:
    """Return an onnxruntime.InferenceSession of a file that `ccompile pack` made; the options are the session's own.

    limit: bytes that the model may have [1 GiB, or 1000 times the file]. Raises ccompile.errors.ModelError when the
    file is damaged, holds no model, or a larger one.
    """
    from ccompile import packing

    return packing.load(packed, sess_options, providers, provider_options, limit)
