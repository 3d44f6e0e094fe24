"""What Python programs call: compile a model, compare two. The command line's own defaults and errors."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml

from ccompile import diff, pipeline
from ccompile import spec as specs
from ccompile.caching import Cache, open_store
from ccompile.core import Array
from ccompile.data import DataSpec
from ccompile.errors import ContractError, DataError
from ccompile.evidence import Evidence
from ccompile.request import Request
from ccompile.spec import Spec
from ccompile.tolerance import Tolerance
from ccompile.validation import from_options

Model = onnx.ModelProto | Path | str
Arrays = Mapping[str, Array]
Source = Arrays | Mapping[str, Any] | Path | str
_ROLES = ("calibration", "verification")


@dataclass(frozen=True)
class Result:
    """What a compile led to. path: where the model was written, None when it failed or was not asked to be written."""

    evidence: Evidence
    path: Path | None
    held: onnx.ModelProto | None = None
    is_cached: bool = False

    @property
    def ok(self) -> bool:
        """Return whether every contract and gate held."""
        return self.evidence.verdict == "ok"

    @property
    def reason(self) -> str:
        """Return what broke, by how much, and what would have passed; nothing when all held."""
        return self.evidence.reason

    @functools.cached_property
    def model(self) -> onnx.ModelProto:
        """Return the compiled model. Raises ContractError when a contract or gate broke: then there is none."""
        if not self.ok:
            raise ContractError(self.reason)
        return self.held if self.held is not None else onnx.load(str(self.path))


def compile_model(
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
    """Compile a model; see `ccompile.compile`."""
    with tempfile.TemporaryDirectory(prefix="ccompile-") as name:
        folder = Path(name)
        output = folder / "out.onnx" if out is None else Path(out)
        given = _spec(spec, sets, data, folder)
        held_to = output.with_name(output.name + ".lock.yaml") if locked and lock is None else lock
        request = Request(
            _file(model, folder / "model.onnx"),
            given,
            output,
            None if evidence is None else Path(evidence),
            seed=seed,
            threads=threads,
            measure=measure,
            jobs=jobs,
            lock=None if held_to is None else Path(held_to),
            is_held=locked,
        )
        kept = Cache(None if cache is False else open_store(None if cache is True else Path(cache)))
        tell = progress or (lambda text, done, total: None)
        found = pipeline.compile_model(request, lambda text, done, total: tell(text, done, total), kept)
        written = output if found.verdict == "ok" else None
        held = onnx.load(str(output)) if written is not None and out is None else None
        return Result(found, None if out is None else written, held, kept.is_repeated)


def assert_onnx_close(
    candidate: Model,
    reference: Model,
    data: Source | None,
    limits: Mapping[str, float | None],
    *,
    samples: int | None,
    seed: int,
    threads: int,
) -> None:
    """Raise AssertionError when outputs differ; see `ccompile.assert_onnx_close`. limits: the fields of a Tolerance."""
    asked = {name: limit for name, limit in limits.items() if limit is not None}
    tolerance = from_options(Tolerance, asked) if asked else None
    with tempfile.TemporaryDirectory(prefix="ccompile-") as name:
        folder = Path(name)
        path = _samples(data, folder / "data.npz") if isinstance(data, Mapping) else data
        given = diff.Given(None if path is None else Path(path), samples, seed, {}, threads)
        models = _file(candidate, folder / "candidate.onnx"), _file(reference, folder / "reference.onnx")
        comparison, source = diff.compare_files(*models, given, tolerance)
    broken = comparison.exact_violations() if tolerance is None else comparison.violations(tolerance)
    if broken:
        told = [f"output `{name}`: {'; '.join(found)}" for name, found in broken.items()]
        needed = f"Limits that would each have passed: {comparison.needed}"
        raise AssertionError("\n".join([*told, needed, f"compared on {source if data is None else 'the data given'}"]))


def _spec(
    given: Mapping[str, Any] | Path | str, sets: Sequence[str], data: Mapping[str, Source] | None, folder: Path
) -> Spec:
    """Return the spec, its data replaced. Arrays go to files in `folder`, where relative names of data then start."""
    base = Path() if isinstance(given, Mapping) else Path(given).parent
    if unknown := sorted(set(data or ()) - set(_ROLES)):
        raise DataError(f"there is no `{unknown[0]}` data", "data", f"It takes: {', '.join(_ROLES)}.")
    plain = {role: _options(role, source, base.resolve(), folder) for role, source in (data or {}).items()}
    if isinstance(given, Mapping):
        whole = dict(given) if data is None else {**given, "data": plain}
        spec = specs.parse(yaml.safe_dump(whole), "<spec>", Path(), sets)
    else:
        spec = specs.load(given, sets)
    return spec if data is None else replace(spec, data=from_options(DataSpec, plain), data_base=folder)


def _options(role: str, source: Source, base: Path, folder: Path) -> dict[str, Any]:
    """Return the options of a data source; relative names start at `base`."""
    if not isinstance(source, Mapping):
        path = base / source
        return {"test_data" if path.is_dir() else "npz": str(path)}
    options: dict[str, Any] = {"npz": dict(source)} if _is_arrays(source) else dict(source)
    if isinstance(options.get("npz"), Mapping):
        options["npz"] = _samples(options["npz"], folder / f"{role}.npz").name
        return options
    if "images" in options and options.get("labels") not in (None, "folders"):
        options["labels"] = str(base / options["labels"])
    return options | {kind: str(base / options[kind]) for kind in ("npz", "test_data", "images") if kind in options}


def _is_arrays(source: Mapping[str, Any]) -> bool:
    return bool(source) and all(isinstance(value, np.ndarray) for value in source.values())


def _samples(arrays: Mapping[str, Any], path: Path) -> Path:
    np.savez(path, **arrays)
    return path


def _file(model: Model, path: Path) -> Path:
    """Return the file of a model, at `path` when it is in memory."""
    if not isinstance(model, onnx.ModelProto):
        return Path(model)
    onnx.save(model, str(path))
    return path
