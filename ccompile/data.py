"""Calibration and verification inputs: npz files, ONNX test data sets, image folders, synthetic; streamed, with labels.

A source is opened into a stream (its headers checked against the model, its samples counted), a window of it is taken,
samples that calibration has seen are dropped from verification, and what is left is cut into batches while it is read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ccompile.sources.images import open_images
from ccompile.sources.npz import open_npz
from ccompile.sources.options import SYNTHETIC_SAMPLES, DataSource, DataSpec, Preprocess, SourceKind, Synthetic
from ccompile.sources.overlap import shared_samples, unseen
from ccompile.sources.ports import port_of
from ccompile.sources.request import Request
from ccompile.sources.stream import Batch, Stream
from ccompile.sources.synthetic import open_synthetic
from ccompile.sources.testsets import open_testsets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import onnx_ir as ir

    from ccompile.core import Array

__all__ = ["Batch", "Data", "DataSet", "DataSource", "DataSpec", "Preprocess", "Synthetic", "open_data"]

_OPENERS: dict[SourceKind, Callable[[Request], Stream]] = {
    "npz": open_npz,
    "test_data": open_testsets,
    "images": open_images,
    "synthetic": open_synthetic,
}
_NO_DATA = "no data given: seeded synthetic inputs"
_RANDOM = "seeded random inputs: layers are fitted to noise, not to data"
_NO_VERIFICATION = "no verification data given: seeded synthetic inputs, because calibration data must not judge itself"


@dataclass(frozen=True, eq=False)
class DataSet:
    """Samples that fit the model; `batches` may be called again and again and always gives the same."""

    samples: int
    source: str
    digest: str
    notes: tuple[str, ...]
    has_labels: bool
    stream: Stream = field(repr=False)
    keep: Array | None = field(repr=False)
    given: Mapping[str, Any] = field(default_factory=dict)  # the options of its DataSource, as plain data

    def batches(self) -> Iterator[Batch]:
        """Yield all samples, in order, holding about one batch at a time; raises DataError on damaged files."""
        return self.stream.batches(self.keep)


@dataclass
class Data:
    """The opened data of a compile; `notes` repeats the notes of both sets, each behind its role."""

    calibration: DataSet | None
    verification: DataSet
    notes: tuple[str, ...] = ()


def open_data(spec: DataSpec | None, model: ir.Model, base: Path, seed: int) -> Data:
    """Open the inputs that a spec names; paths are relative to `base`, `seed` (>= 0) drives synthetic values.

    Files are checked against the model here and read again while `batches` runs. No verification sample occurs in the
    calibration set. Raises DataError: what is missing, damaged, empty, or does not fit the model.
    """
    spec = spec or DataSpec()
    first, second, note = spec.calibration, spec.verification, ""
    if second is None:
        shapes = first.shapes if first else {}
        second = DataSource(synthetic=Synthetic(), samples=SYNTHETIC_SAMPLES, shapes=shapes)
        note = _NO_VERIFICATION if first else _NO_DATA
    inputs, outputs = (tuple(map(port_of, values)) for values in (model.graph.inputs, model.graph.outputs))
    judged = Request(second, "verification", inputs, outputs, base, 0, seed)
    seen: Stream | None = None
    calibration: DataSet | None = None
    if first is not None:
        fitted = replace(judged, source=first, role="calibration")
        judged = replace(judged, start=shared_samples(fitted, judged))
        seen = _open(fitted)
        seen = replace(seen, notes=((_RANDOM,) if first.synthetic else ()) + seen.notes)
        calibration = _data_set(seen, None, fitted)
    stream = _open(judged)
    keep = None
    if seen and first and "synthetic" not in (first.kind, second.kind):
        keep = unseen(stream, seen)
    verification = _data_set(replace(stream, notes=((note,) if note else ()) + stream.notes), keep, judged)
    notes = [f"calibration: {text}" for text in calibration.notes] if calibration else []
    return Data(calibration, verification, (*notes, *(f"verification: {text}" for text in verification.notes)))


def _open(request: Request) -> Stream:
    for name in request.source.shapes:
        request.check_known(name, [port.name for port in request.inputs], "input of the model, but `shapes` names it")
    return _OPENERS[request.source.kind](request)


def _data_set(stream: Stream, keep: Array | None, request: Request) -> DataSet:
    """Return the data set of a stream without the samples that `keep[n]` leaves out."""
    count = stream.count if keep is None else int(keep.sum())
    notes = list(stream.notes)
    if count < stream.count:
        notes.append(f"{stream.count - count} of {stream.count} dropped: calibration holds them as well")
    samples = count - count % stream.size if stream.whole else count
    if not count:
        raise request.refuse("every sample also occurs in the calibration data", "Verify on other samples.")
    if not samples:
        raise request.refuse(f"{count} samples do not fill the model's batch of {stream.size}", "Give more samples.")
    if samples < count:
        notes.append(f"the last {count - samples} dropped: they do not fill the model's batch of {stream.size}")
    digest = hashlib.sha256(f"{stream.content} {stream.size} {stream.whole} {stream.count}".encode())
    digest.update(b"" if keep is None else keep.tobytes())
    unit = "sets" if request.source.test_data else "samples"
    source = f"{request.source.kind} {request.text}, {samples} {unit if samples > 1 else unit[:-1]}"
    given = request.source.model_dump(mode="json", exclude_unset=True)
    return DataSet(samples, source, digest.hexdigest(), tuple(notes), stream.has_labels, stream, keep, given)
