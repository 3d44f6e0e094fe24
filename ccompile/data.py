"""Calibration and verification inputs: npz files, ONNX test data sets, image folders, synthetic; streamed, with labels.

A source is opened into a _Stream (its headers checked against the model, its samples counted), a window of it is taken,
samples that calibration has seen are dropped from verification, and what is left is cut into batches while it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import lzma
import math
import re
import tokenize
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
from pydantic import Field, model_validator

from ccompile import graph, images
from ccompile.core import Declaration
from ccompile.errors import DataError, nearest
from ccompile.images import Preprocess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from ccompile.core import Array

__all__ = ["Batch", "Data", "DataSet", "DataSource", "DataSpec", "Preprocess", "Synthetic", "open_data"]

Role = Literal["calibration", "verification"]
Kind = Literal["tensor", "sequence", "optional", "sparse"]
Dims = tuple[int | str | None, ...]
PathText = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]
Dimension = Annotated[int, Field(ge=1, le=2**31 - 1)]
Integer = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
BATCH, SYNTHETIC_BATCH, SYNTHETIC_SAMPLES = 32, 8, 16  # samples, where the spec and the model leave it open
_CHUNK = 1 << 20  # bytes per read
_UNUSED_KEYS = frozenset({"label", "labels"})  # often saved beside the inputs; no mistake when nobody asks for them

# ---------------------------------------------------------------------------------------------- what a spec says


class Synthetic(Declaration):
    """Seeded random inputs, for models without data at hand."""

    distribution: Literal["normal", "uniform"] = Field(
        default="normal", description="of float inputs; normal is N(0, 1)"
    )
    low: images.Finite = Field(default=0.0, description="least value of `uniform`")
    high: images.Finite = Field(default=1.0, description="upper end of `uniform`, excluded")
    integers: tuple[Integer, Integer] = Field(
        default=(0, 2), description="[low, high) of integer inputs; the default holds indices that most models accept"
    )

    @model_validator(mode="after")
    def _spans(self) -> Synthetic:
        if not self.low < self.high:
            raise ValueError(f"`low` {self.low:g} must be less than `high` {self.high:g}")
        if not self.integers[0] < self.integers[1]:
            raise ValueError(f"`integers` {list(self.integers)} holds no integer: the upper end is excluded")
        return self


class DataSource(Declaration):
    """Where samples come from: exactly one of `npz`, `test_data`, `images`, `synthetic`."""

    npz: PathText | None = Field(default=None, description="file with one array per graph input; axis 0 counts samples")
    test_data: PathText | None = Field(
        default=None, description="folder that holds test_data_set_* folders with input_N.pb, or one of them"
    )
    images: PathText | None = Field(
        default=None, description="folder of images, read with its subfolders in sorted order"
    )
    synthetic: Synthetic | None = Field(default=None, description="seeded random inputs", examples=[{}])
    samples: int | None = Field(
        default=None, ge=1, le=10_000_000, description="samples to use, from the first; default: all"
    )
    batch: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description=f"samples per inference; default: the model's, or {BATCH} ({SYNTHETIC_BATCH} when synthetic)",
    )
    labels: PathText | None = Field(
        default=None,
        description="npz: the key of the labels; images: `folders`, or a text file with one integer per line",
    )
    preprocess: Preprocess | None = Field(default=None, description="how an image becomes an input; `images` need it")
    shapes: dict[str, tuple[Dimension, ...]] = Field(
        {}, description="shapes, in elements, of inputs with open axes", examples=[{"x": [1, 3, 224, 224]}]
    )
    seed: int = Field(default=0, ge=0, description="seed of synthetic values")
    input: str | None = Field(
        default=None, description="the graph input that images feed, when the model takes several"
    )

    @model_validator(mode="after")
    def _one_source(self) -> DataSource:
        given = [name for name in _OPENERS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(_OPENERS)}; given: {', '.join(given) or 'none'}")
        if self.images is not None and self.preprocess is None:
            raise ValueError("images need `preprocess`, for example `preprocess: {resize: 256, crop: 224}`")
        for name, kinds in _ONLY_FOR.items():
            if getattr(self, name) is not None and given[0] not in kinds:
                raise ValueError(f"`{name}` is for {' and '.join(kinds)}, not for {given[0]}")
        return self

    @property
    def kind(self) -> str:
        """Return which of the four sources is given."""
        return next(name for name in _OPENERS if getattr(self, name) is not None)


_ONLY_FOR = {
    "labels": ("npz", "images"),
    "preprocess": ("images",),
    "input": ("images",),
    "batch": ("npz", "images", "synthetic"),
}


class DataSpec(Declaration):
    """The inputs that statistics are taken on, and those that every step is compared on."""

    calibration: DataSource | None = Field(
        default=None, description="inputs for the statistics that lossy passes fit to"
    )
    verification: DataSource | None = Field(
        default=None,
        description="inputs that every step is compared on, never those of calibration; default: synthetic",
    )


# ---------------------------------------------------------------------------------------------- what callers get


@dataclass(frozen=True)
class Batch:
    """Inputs of one inference.

    feeds: by input name an array, a list of arrays (sequence inputs), or None (an optional input left out).
    labels[n], when there are any. expected: outputs by name, from output_N.pb.
    """

    feeds: dict[str, Any]
    labels: Array | None
    samples: int
    expected: dict[str, Any] | None = None


class DataSet:
    """Samples that fit the model; `batches` may be called again and again and always gives the same."""

    samples: int
    source: str
    digest: str
    notes: tuple[str, ...]
    has_labels: bool

    def batches(self) -> Iterator[Batch]:
        """Yield all samples, in order, holding about one batch at a time; raises DataError on damaged files."""
        raise NotImplementedError


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
        note = "no data given: seeded synthetic inputs" if first is None else _NO_VERIFICATION
    inputs, outputs = ([_input(value) for value in values] for values in (model.graph.inputs, model.graph.outputs))
    judged = _Request(second, "verification", tuple(inputs), tuple(outputs), base, 0, seed)
    seen: _Stream | None = None
    calibration: _Stored | None = None
    if first is not None:
        fitted = replace(judged, source=first, role="calibration")
        judged = replace(judged, start=_shared_samples(fitted, judged))
        seen = _open(fitted)
        calibration = _stored(seen, None, fitted)
    stream = _open(judged)
    keep = None
    if seen and first and "synthetic" not in (first.kind, second.kind):
        keep = _unseen(stream, seen)
    verification = _stored(replace(stream, notes=((note,) if note else ()) + stream.notes), keep, judged)
    notes = [f"calibration: {text}" for text in calibration.notes] if calibration else []
    return Data(calibration, verification, (*notes, *(f"verification: {text}" for text in verification.notes)))


_NO_VERIFICATION = "no verification data given: seeded synthetic inputs, because calibration data must not judge itself"


# ---------------------------------------------------------------------------------------------- streams to batches


@dataclass(frozen=True)
class _Input:
    """A graph input or output as declared; `shape` is None when even the rank is open."""

    name: str
    dtype: ir.DataType | None
    shape: Dims | None
    kind: Kind

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(np.float32) if self.dtype is None else self.dtype.numpy()

    @property
    def type_name(self) -> str:
        return "str" if self.dtype == ir.DataType.STRING else self.numpy.name

    def __str__(self) -> str:
        dims = "any shape" if self.shape is None else "[" + ", ".join(str(d or "?") for d in self.shape) + "]"
        return f"{self.name}: {self.type_name} {dims}"


@dataclass(frozen=True)
class _Request:
    """One source to open: for whom, for which model, from which sample on."""

    source: DataSource
    role: Role
    inputs: tuple[_Input, ...]
    outputs: tuple[_Input, ...]
    base: Path
    start: int
    seed: int

    @property
    def text(self) -> str:
        named = getattr(self.source, self.source.kind)
        return named if isinstance(named, str) else named.distribution

    @property
    def where(self) -> str:
        return f"data.{self.role}: {self.source.kind if self.source.synthetic else self.text}"

    @property
    def path(self) -> Path:
        return self.base / self.text

    @property
    def shapes(self) -> str:
        return "It takes " + "; ".join(map(str, self.inputs)) + "." if self.inputs else "It takes no input."

    def refuse(self, message: str, hint: str = "") -> DataError:
        return DataError(message, self.where, hint)


@dataclass(frozen=True)
class _Stream:
    """An opened source: `pieces` reads its `count` samples anew, in order.

    size: samples per batch, pieces then stack samples on axis 0 and hold at most `size`; 0: each piece is a batch as it
    is. whole: a batch that is not full cannot be run. constants: feeds that are the same for all samples.
    """

    count: int
    pieces: Callable[[], Iterator[Batch]]
    content: str
    size: int = 0
    whole: bool = False
    constants: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    has_labels: bool = False


@dataclass(frozen=True, eq=False)
class _Stored(DataSet):
    samples: int
    source: str
    digest: str
    notes: tuple[str, ...]
    has_labels: bool
    stream: _Stream = field(repr=False)
    keep: Array | None = field(repr=False)

    def batches(self) -> Iterator[Batch]:
        stream = self.stream
        pieces = stream.pieces()
        if self.keep is not None:
            pieces = _kept(pieces, self.keep, stacked=bool(stream.size))
        if stream.size:
            pieces = _regrouped(pieces, stream.size, stream.whole)
        for batch in pieces:
            yield replace(batch, feeds={**batch.feeds, **stream.constants})


def _stored(stream: _Stream, keep: Array | None, request: _Request) -> _Stored:
    """Return the data set of a stream without the samples that `keep[n]` leaves out."""
    count = stream.count if keep is None else int(keep.sum())
    notes = list(stream.notes)
    if count < stream.count:
        notes.append(f"{stream.count - count} of {stream.count} dropped: calibration holds them as well")
    samples = count - count % stream.size if stream.whole else count
    if not samples and not count:
        raise request.refuse("every sample also occurs in the calibration data", "Verify on other samples.")
    if not samples:
        raise request.refuse(f"{count} samples do not fill the model's batch of {stream.size}", "Give more samples.")
    if samples < count:
        notes.append(f"the last {count - samples} dropped: they do not fill the model's batch of {stream.size}")
    digest = hashlib.sha256(f"{stream.content} {stream.size} {stream.whole} {stream.count}".encode())
    digest.update(b"" if keep is None else keep.tobytes())
    unit = "sets" if request.source.test_data else "samples"
    source = f"{request.source.kind} {request.text}, {samples} {unit if samples > 1 else unit[:-1]}"
    return _Stored(samples, source, digest.hexdigest(), tuple(notes), stream.has_labels, stream, keep)


def _kept(pieces: Iterable[Batch], keep: Array, *, stacked: bool) -> Iterator[Batch]:
    at = 0
    for piece in pieces:
        chosen = keep[at : at + piece.samples]
        at += piece.samples
        if chosen.all():
            yield piece
        elif chosen.any() and stacked:
            labels = None if piece.labels is None else piece.labels[chosen]
            yield Batch({name: x[chosen] for name, x in piece.feeds.items()}, labels, int(chosen.sum()))


def _regrouped(pieces: Iterable[Batch], size: int, whole: bool) -> Iterator[Batch]:
    """Yield batches of `size` samples from pieces that hold at most as many; the last one may be smaller."""
    held: Batch | None = None
    for piece in pieces:
        held = piece if held is None else _joined(held, piece)
        if held.samples >= size:
            rest = _cut(held, size, held.samples)
            yield _cut(held, 0, size)
            held = rest if rest.samples else None
    if held is not None and not whole:
        yield held


def _joined(a: Batch, b: Batch) -> Batch:
    feeds = {name: np.concatenate([x, b.feeds[name]]) for name, x in a.feeds.items()}
    labels = None if a.labels is None or b.labels is None else np.concatenate([a.labels, b.labels])
    return Batch(feeds, labels, a.samples + b.samples)


def _cut(batch: Batch, start: int, stop: int) -> Batch:
    labels = None if batch.labels is None else batch.labels[start:stop]
    return Batch({name: x[start:stop] for name, x in batch.feeds.items()}, labels, stop - start)


# ---------------------------------------------------------------------------------------------- verification apart


def _shared_samples(calibration: _Request, verification: _Request) -> int:
    """Return how many samples calibration takes from the source that verification names as well, or 0."""
    kind = calibration.source.kind
    if kind != verification.source.kind or kind == "synthetic" or _real(calibration) != _real(verification):
        return 0
    if calibration.source.samples is None:
        raise calibration.refuse(
            "verification names the same source, and calibration takes all of it",
            "Give calibration a number, for example `samples: 256`; verification then takes what follows.",
        )
    return calibration.source.samples


def _real(request: _Request) -> Path:
    try:
        return request.path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise request.refuse(f"cannot read it: {error}") from error


def _unseen(stream: _Stream, seen: _Stream) -> Array | None:
    """Return keep[n]: False where sample n of `stream` also occurs in `seen`; None when none does."""
    known = set(_fingerprints(seen))
    keep = np.fromiter((mark not in known for mark in _fingerprints(stream)), dtype=np.bool_, count=stream.count)
    return None if keep.all() else keep


def _fingerprints(stream: _Stream) -> Iterator[bytes]:
    """Yield 16 bytes per sample that stand for all its inputs."""
    for piece in stream.pieces():
        if not stream.size:
            yield _fingerprint(piece.feeds)
            continue
        for row in range(piece.samples):
            yield _fingerprint({**{name: x[row] for name, x in piece.feeds.items()}, **stream.constants})


def _fingerprint(feeds: Mapping[str, Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(feeds):
        values = feeds[name] if isinstance(feeds[name], list) else [feeds[name]]
        for value in values:
            content = b"" if value is None else _bytes_of(value)
            digest.update(f"{name} {value is None} {len(content)} ".encode())
            digest.update(content)
    return digest.digest()


def _bytes_of(value: object) -> bytes:
    if isinstance(value, list):
        return b"".join(_bytes_of(part) for part in value)
    array = np.asarray(value)
    return json.dumps(array.tolist(), default=repr).encode() if array.dtype.hasobject else array.tobytes()


# ---------------------------------------------------------------------------------------------- against the model


def _input(value: ir.Value) -> _Input:
    kinds: dict[type, Kind] = {
        ir.SequenceType: "sequence",
        ir.OptionalType: "optional",
        ir.SparseTensorType: "sparse",
    }
    kind = kinds.get(type(value.type), "tensor")
    shape = graph.declared_shape(value) if kind == "tensor" else None
    return _Input(str(value.name), value.dtype, shape, kind)


def _check_fit(port: _Input, dtype: np.dtype[Any], shape: Sequence[int], where: str, *, rows: bool) -> None:
    """Raise DataError unless an array fits an input; with `rows`, axis 0 counts samples and may have any length."""
    want, given = port.numpy, dtype.newbyteorder("=")
    as_stored = want.kind == "V" and given.kind == "V" and want.itemsize == given.itemsize  # numpy saves bfloat16 so
    as_text = port.dtype == ir.DataType.STRING and given.kind == "U"
    if port.dtype is not None and given != want and not as_stored and not as_text:
        name = f"np.{port.type_name}" if hasattr(np, port.type_name) else port.type_name
        message = f"`{port.name}` is {given.name}, the model takes {port.type_name}"
        raise DataError(message, where, f"Convert it: {port.name}.astype({name}).")
    if port.shape is None:
        return
    if len(shape) != len(port.shape):
        message = f"`{port.name}` has rank {len(shape)} {list(shape)}, the model takes rank {len(port.shape)}"
        raise DataError(message, where, f"{port}.")
    for axis, (got, dim) in enumerate(zip(shape, port.shape, strict=True)):
        if isinstance(dim, int) and got != dim and not (rows and axis == 0):
            raise DataError(f"`{port.name}`: axis {axis} has {got}, the model takes {dim}", where, f"{port}.")


def _batch_size(ports: Iterable[_Input], request: _Request) -> tuple[int, bool]:
    """Return the samples per batch, and whether the model fixes them."""
    fixed = {port.shape[0]: port.name for port in ports if port.shape and isinstance(port.shape[0], int)}
    sizes = [int(size) for size in fixed if isinstance(size, int)]
    if len(sizes) > 1:
        raise request.refuse(
            f"the inputs {', '.join(fixed.values())} have different fixed first axes: {sizes}",
            "Use `test_data`, where each set is one batch as it is.",
        )
    if not sizes:
        return request.source.batch or BATCH, False
    if sizes[0] < 1:
        raise request.refuse(f"`{fixed[sizes[0]]}` has no room for a sample: its first axis is 0")
    _check_batch(sizes[0], "the model fixes", request)
    return sizes[0], True


def _check_batch(size: int, who: str, request: _Request) -> None:
    if request.source.batch not in (None, size):
        raise request.refuse(f"`batch` is {request.source.batch}, {who} {size}", "Leave `batch` out.")


def _window(total: int, request: _Request) -> tuple[int, tuple[str, ...]]:
    """Return how many of `total` samples are used from request.start on, and notes."""
    start, wanted = request.start, request.source.samples
    left = total - start
    if total < 1:
        raise request.refuse("there is no sample in it")
    if left < 1:
        raise request.refuse(
            f"nothing is left: calibration takes {start}, there are {total}",
            "Lower `samples` of data.calibration, or name another source.",
        )
    notes = [f"same source as calibration: the first {start} are left to it"] if start else []
    if wanted is not None and wanted > left:
        notes.append(f"{wanted} samples wanted, {left} there: all are used")
    return min(left, wanted or left), tuple(notes)


def _known(name: str, names: Iterable[str], what: str, request: _Request) -> None:
    if name not in (known := list(names)):
        raise request.refuse(f"`{name}` is no {what}", nearest(name, known))


def _content(*parts: object) -> str:
    """Return the SHA-256 of file digests and parameters."""
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()


def _file_digests(paths: Iterable[Path], request: _Request) -> str:
    """Return the SHA-256 of the files' SHA-256s, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with _reading(request, path.name), path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- npz


@dataclass(frozen=True)
class _Member:
    """One array of an npz: its place, type and shape."""

    entry: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@contextlib.contextmanager
def _reading(request: _Request, what: str = "the file") -> Iterator[None]:
    """Turn what damaged files raise into DataError."""
    try:
        yield
    except FileNotFoundError as error:
        raise request.refuse(f"no such file: {error.filename}", "Paths are relative to the spec's folder.") from error
    except OSError as error:
        raise request.refuse(f"cannot read {what}: {error.strerror or error}") from error
    except _DAMAGE as error:
        raise request.refuse(f"{what} is damaged: {str(error) or type(error).__name__}", "Write it again.") from error


_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tokenize.TokenError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    SyntaxError,
    RuntimeError,
    OverflowError,
)


def _open_npz(request: _Request) -> _Stream:
    with _reading(request), request.path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise request.refuse("not an npz file, or a truncated one", "Write it with np.savez(path, x=...).")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with _reading(request), zipfile.ZipFile(request.path) as archive:
        members = _members(archive, request)
        ports = {port.name: port for port in request.inputs if port.name in members}
        constants: dict[str, Any] = {port.name: None for port in request.inputs if port.name not in members}
        for name, port in ports.items():
            member = members[name]
            _check_fit(port, member.dtype, member.shape, request.where, rows=bool(member.shape))
            if not member.shape:
                with archive.open(member.entry) as stream:
                    _header(stream)
                    constants[name] = _as_fed(_filled(stream, (), member.dtype), port)
    rows = {name: port for name, port in ports.items() if members[name].shape}
    label = members[request.source.labels] if request.source.labels is not None else None
    count, notes = _window(_length({name: members[name] for name in rows}, label, request), request)
    size, whole = _batch_size(rows.values(), request) if rows else (1, False)

    def pieces() -> Iterator[Batch]:
        with _reading(request), zipfile.ZipFile(request.path) as archive, contextlib.ExitStack() as stack:
            readers = {name: _Rows(stack, archive, members[name], request.start) for name in rows}
            labels = _Rows(stack, archive, label, request.start) if label else None
            for at in range(0, count, size):
                taken = min(size, count - at)
                feeds = {name: _as_fed(reader.take(taken), rows[name]) for name, reader in readers.items()}
                yield Batch(feeds, labels.take(taken) if labels else None, taken)

    content = _content("npz", digest, request.start, request.source.labels)
    return _Stream(count, pieces, content, size, whole, constants, notes, label is not None)


def _members(archive: zipfile.ZipFile, request: _Request) -> dict[str, _Member]:
    """Return the arrays that are used, by key, after checking that the keys are those of the model."""
    entries = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    names = [port.name for port in request.inputs]
    label = request.source.labels
    if label is not None:
        _known(label, entries, "key of the npz, but `labels` names it", request)
    for key in entries:
        if key not in _UNUSED_KEYS and key != label and key not in names:
            raise request.refuse(f"`{key}` is no input of the model", nearest(key, names))
    for port in request.inputs:
        if port.name in entries and port.kind in ("sequence", "sparse"):
            raise request.refuse(f"`{port.name}` is of {port.kind} type, an npz cannot hold it", "Use `test_data`.")
    missing = [port.name for port in request.inputs if port.name not in entries and port.kind != "optional"]
    if missing:
        raise request.refuse(f"the model also takes {', '.join(f'`{name}`' for name in missing)}", request.shapes)
    return {key: _member(archive, info, request) for key, info in entries.items() if key in names or key == label}


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, request: _Request) -> _Member:
    key = info.filename.removesuffix(".npy")
    with archive.open(info) as stream:
        shape, by_columns, dtype = _header(stream)
        start = stream.tell()
    if dtype.hasobject:
        raise request.refuse(f"`{key}` holds Python objects, which are never unpickled", f"Save {key}.astype(...).")
    if by_columns and len(shape) > 1:
        raise request.refuse(
            f"`{key}` is stored by columns, so its samples cannot be streamed", f"Save np.ascontiguousarray({key})."
        )
    if start + math.prod(shape) * dtype.itemsize != info.file_size:
        raise request.refuse(
            f"`{key}` is damaged: its size is not that of {list(shape)} {dtype.name}", "Write it again."
        )
    return _Member(info.filename, dtype, shape)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return (shape, stored by columns, dtype) of an .npy stream and leave it at the first element."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(stream)
    if any(dim < 0 for dim in shape):
        raise ValueError(f"negative dimension in {shape}")
    return shape, by_columns, dtype


def _length(rows: Mapping[str, _Member], label: _Member | None, request: _Request) -> int:
    """Return the common length of all sample arrays; 1 when every input is a scalar."""
    lengths = {name: member.shape[0] for name, member in rows.items()}
    if label is not None:
        if not label.shape:
            raise request.refuse(
                f"the labels `{request.source.labels}` are a scalar", "One label per sample is needed."
            )
        lengths[str(request.source.labels)] = label.shape[0]
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"`{name}` {length}" for name, length in lengths.items())
        raise request.refuse(f"the arrays differ in length: {listed}", "Axis 0 counts samples in each of them.")
    return next(iter(lengths.values()), 1)


class _Rows:
    """One array of an npz, read front to back."""

    def __init__(self, stack: contextlib.ExitStack, archive: zipfile.ZipFile, member: _Member, start: int) -> None:
        self.member = member
        self.left = member.shape[0] - start
        self.stream = stack.enter_context(archive.open(member.entry))
        _header(self.stream)
        skip = start * math.prod(member.shape[1:]) * member.dtype.itemsize
        while skip:
            got = len(self.stream.read(min(skip, _CHUNK)))
            if not got:
                raise EOFError("it ends early")
            skip -= got

    def take(self, rows: int) -> Array:
        array = _filled(self.stream, (rows, *self.member.shape[1:]), self.member.dtype)
        self.left -= rows
        if not self.left:
            self.stream.read(1)  # zipfile compares the checksum at the end of the member
        return array


def _filled(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return the next elements of a stream, read in chunks so that no second copy of the array is held."""
    array = np.empty(shape, dtype)
    target = array.reshape(-1).view(np.uint8) if array.nbytes else np.empty(0, np.uint8)
    at = 0
    while at < target.size:
        chunk = stream.read(min(_CHUNK, target.size - at))
        if not chunk:
            raise EOFError("it ends early")
        target[at : at + len(chunk)] = np.frombuffer(chunk, np.uint8)
        at += len(chunk)
    return array


def _as_fed(array: Array, port: _Input) -> Array:
    """Return an array of an npz in the numpy type that runtimes take: native bytes, str objects, bfloat16."""
    if port.dtype is None or array.dtype == port.numpy:
        return array
    return array.view(port.numpy) if array.dtype.kind == "V" else array.astype(port.numpy)


# ---------------------------------------------------------------------------------------------- ONNX test data sets


def _open_test_data(request: _Request) -> _Stream:
    with _reading(request, "the folder"):
        folders = _set_folders(request)
    count, notes = _window(len(folders), request)
    used = folders[request.start : request.start + count]
    paths = [path for folder in used for path in sorted(folder.glob("*put_*.pb"))]
    _read_set(used[0], request)

    def pieces() -> Iterator[Batch]:
        for folder in used:
            yield _read_set(folder, request)

    return _Stream(
        count, pieces, _content("test_data", [path.name for path in paths], _file_digests(paths, request)), notes=notes
    )


def _set_folders(request: _Request) -> list[Path]:
    """Return the folders of the sets in natural order: 0, 1, 2, 10."""
    root = request.path
    if not root.is_dir():
        raise request.refuse("no such folder", f"Looked for {root}. Paths are relative to the spec's folder.")
    if any(root.glob("input_*.pb")):
        return [root]
    found = [path for path in root.glob("test_data_set_*") if path.is_dir()]
    if not found:
        raise request.refuse("the folder holds no test_data_set_* folder and no input_*.pb")
    return sorted(found, key=lambda path: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path.name)])


def _read_set(folder: Path, request: _Request) -> Batch:
    """Return one set as a batch of one sample; input_N.pb is the N-th graph input."""
    feeds: dict[str, Any] = {}
    extra = folder / f"input_{len(request.inputs)}.pb"
    if extra.exists():
        raise request.refuse(f"{folder.name} has {extra.name}, the model takes fewer inputs", request.shapes)
    for index, port in enumerate(request.inputs):
        path = folder / f"input_{index}.pb"
        if port.kind == "optional" and not path.exists():
            feeds[port.name] = None
            continue
        feeds[port.name] = _read_proto(path, port, request)
        parts = feeds[port.name] if isinstance(feeds[port.name], list) else [feeds[port.name]]
        for part in parts:
            if isinstance(part, np.ndarray):
                _check_fit(port, part.dtype, part.shape, f"{request.where}/{folder.name}/{path.name}", rows=False)
    expected = {}
    for index, port in enumerate(request.outputs):
        path = folder / f"output_{index}.pb"
        if path.exists():
            expected[port.name] = _read_proto(path, port, request)
    return Batch(feeds, None, 1, expected or None)


def _read_proto(path: Path, port: _Input, request: _Request) -> Any:
    """Return what an input_N.pb or output_N.pb holds: an array, a list of arrays, or None."""
    what = f"{path.parent.name}/{path.name}"
    if port.kind == "sparse":
        raise request.refuse(f"`{port.name}` is a sparse tensor, which is not supported")
    with _reading(request, what):
        content = path.read_bytes()
        try:
            if port.kind == "sequence":
                return onnx.numpy_helper.to_list(onnx.SequenceProto.FromString(content))
            if port.kind == "optional":
                return onnx.numpy_helper.to_optional(onnx.OptionalProto.FromString(content))
            tensor = onnx.TensorProto.FromString(content)
        except Exception as error:  # protobuf's DecodeError has no public, stable home across its implementations
            if type(error).__name__ != "DecodeError":
                raise
            raise ValueError("not a protobuf message of its type") from error
        if tensor.data_type == onnx.TensorProto.UNDEFINED or tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ValueError("it holds no tensor")
        return onnx.numpy_helper.to_array(tensor)


# ---------------------------------------------------------------------------------------------- images


def _open_images(request: _Request) -> _Stream:
    preprocess, root = request.source.preprocess, request.path
    assert preprocess is not None  # DataSource requires it
    port = _image_input(request)
    if port.kind != "tensor" or port.dtype in (ir.DataType.STRING, ir.DataType.BOOL):
        raise request.refuse(f"`{port.name}` takes no numbers, so images cannot feed it", request.shapes)
    found = images.find(root, request.where)
    labels = _image_labels(found, request)
    count, notes = _window(len(found), request)
    size, whole = _batch_size([port], request)
    used = found[request.start : request.start + count]
    if labels is not None:
        classes, labels = len(set(labels.tolist())), labels[request.start : request.start + count]
        if len(set(labels.tolist())) < classes:
            notes += (f"the {count} images in use cover {len(set(labels.tolist()))} of {classes} classes",)
    shape = images.decode(used[0], preprocess, port.numpy, request.where).shape
    _check_fit(port, port.numpy, (size, *shape), request.where, rows=True)
    rows, constants, filled = _other_values(port, request)

    def pieces() -> Iterator[Batch]:
        for at in range(0, count, size):
            group = used[at : at + size]
            decoded = [images.decode(path, preprocess, port.numpy, request.where) for path in group]
            for path, x in zip(group, decoded, strict=True):
                if size > 1 and x.shape != shape:
                    raise request.refuse(
                        f"{path.name} becomes {list(x.shape)}, {used[0].name} {list(shape)}: one batch needs one size",
                        "Give `crop`, `resize: [height, width]`, or `batch: 1`.",
                    )
                _check_fit(port, x.dtype, (1, *x.shape), request.where, rows=True)
            others = {name: np.repeat(row[None], len(group), axis=0) for name, row in rows.items()}
            picked = None if labels is None else labels[at : at + size]
            yield Batch({port.name: np.stack(decoded), **others}, picked, len(group))

    listed = [] if labels is None else labels.tolist()
    settings, seeds = preprocess.model_dump(mode="json"), [request.seed, request.source.seed]
    content = _content("images", _file_digests(used, request), listed, settings, port.name, seeds)
    return _Stream(count, pieces, content, size, whole, constants, notes + filled, labels is not None)


def _image_input(request: _Request) -> _Input:
    """Return the graph input that images feed: the named one, the only one, or the only one of rank 4."""
    ports = {port.name: port for port in request.inputs}
    if request.source.input is not None:
        _known(request.source.input, ports, "input of the model", request)
        return ports[request.source.input]
    fitting = [port for port in request.inputs if port.kind == "tensor" and port.shape and len(port.shape) == 4]
    chosen = list(request.inputs) if len(request.inputs) == 1 else fitting
    if len(chosen) != 1:
        raise request.refuse("it is not clear which input the images feed", f"Give `input: NAME`. {request.shapes}")
    return chosen[0]


def _image_labels(found: tuple[Path, ...], request: _Request) -> Array | None:
    text = request.source.labels
    if text is None:
        return None
    if text == "folders":
        return images.folder_labels(found, request.path, request.where)
    return images.file_labels(request.base / text, len(found), request.where)


def _other_values(port: _Input, request: _Request) -> tuple[dict[str, Array], dict[str, Any], tuple[str, ...]]:
    """Return seeded values for the inputs that images do not feed: one row for all samples, or constants; and notes."""
    others = tuple(other for other in request.inputs if other is not port)
    rows: dict[str, Array] = {}
    constants: dict[str, Any] = {other.name: None for other in others if other.kind == "optional"}
    others = tuple(other for other in others if other.kind != "optional")
    if not others:
        return rows, constants, ()
    rng = np.random.default_rng([request.seed, request.source.seed])
    for name, dims in _synthetic_shapes(replace(request, inputs=others)).items():
        other = next(o for o in others if o.name == name)
        stacked = dims[:1] == (None,)
        if None in dims[1:]:
            raise request.refuse(f"`{name}` has the batch on a later axis, images cannot feed it", "Use `test_data`.")
        value = _draw(other, tuple(dim or 1 for dim in dims), Synthetic(), rng, request)
        (rows if stacked else constants)[name] = value[0] if stacked else value
    names = ", ".join(other.name for other in others)
    return rows, constants, (f"images feed {port.name}; one seeded synthetic value feeds {names}",)


# ---------------------------------------------------------------------------------------------- synthetic


def _open_synthetic(request: _Request) -> _Stream:
    settings = request.source.synthetic or Synthetic()
    shapes = _synthetic_shapes(request)
    wanted = request.source.samples or SYNTHETIC_SAMPLES
    count = wanted
    notes: tuple[str, ...] = ()
    if any(None in dims for dims in shapes.values()):
        size = min(request.source.batch or SYNTHETIC_BATCH, wanted)
    else:
        leading = {dims[0] for dims in shapes.values() if dims}
        size = next(iter(leading)) or 1 if len(leading) == 1 else 1
        _check_batch(size, "the shapes fix", request)
        count = math.ceil(wanted / size) * size
    if count > wanted:
        notes = (f"{count} samples instead of {wanted}: a batch of the model holds {size}",)
    stream = 0 if request.role == "calibration" else 1
    seed = [request.seed, request.source.seed, stream]

    def pieces() -> Iterator[Batch]:
        for index, at in enumerate(range(0, count, size)):
            rng = np.random.default_rng([*seed, index])
            taken = min(size, count - at)
            feeds = {}
            for port in request.inputs:
                dims = tuple(taken if dim is None else dim for dim in shapes[port.name])
                feeds[port.name] = _draw(port, dims, settings, rng, request)
            yield Batch(feeds, None, taken)

    for port in request.inputs:  # what cannot be drawn is refused here, not in the middle of a compile
        _draw(port, (0,), settings, np.random.default_rng(0), request)
    types = [(port.name, port.type_name, shapes[port.name]) for port in request.inputs]
    content = _content("synthetic", settings.model_dump(mode="json"), seed, types, size)
    return _Stream(count, pieces, content, notes=notes)


def _synthetic_shapes(request: _Request) -> dict[str, tuple[int | None, ...]]:
    """Return each input's shape, None standing for the batch: from `shapes`, the model, and dimensions of one name."""
    given = request.source.shapes
    named: dict[str, int | None] = {}
    batch: set[int] = set()  # what `shapes` says about axes that hold the batch
    for port in request.inputs:
        if port.shape and isinstance(port.shape[0], str):
            named[port.shape[0]] = None
    for port in request.inputs:
        if port.name not in given or port.shape is None:
            continue
        _check_fit(port, port.numpy, given[port.name], request.where, rows=False)
        named |= {dim: n for dim, n in zip(port.shape, given[port.name], strict=True) if isinstance(dim, str)}
        if port.shape and not isinstance(port.shape[0], int):
            batch.add(given[port.name][0])
    size = batch.pop() if len(batch) == 1 else None
    shapes = {p.name: given[p.name] if p.name in given else _declared(p, named, request) for p in request.inputs}
    return {name: tuple(size if dim is None else dim for dim in dims) for name, dims in shapes.items()}


def _declared(port: _Input, named: Mapping[str, int | None], request: _Request) -> tuple[int | None, ...]:
    if port.kind != "tensor":
        raise request.refuse(f"`{port.name}` is of {port.kind} type, which cannot be synthetic", "Use `test_data`.")
    if port.shape is None:
        raise request.refuse(
            f"`{port.name}` declares no shape", f"Give one: `shapes: {{{port.name}: [1, 3, 224, 224]}}`."
        )
    dims: list[int | None] = []
    for axis, dim in enumerate(port.shape):
        if not isinstance(dim, int) and axis and dim not in named:
            example = [d if isinstance(d, int) else (224 if i else 1) for i, d in enumerate(port.shape)]
            raise request.refuse(
                f"`{port.name}`: axis {axis} ({dim or 'unnamed'}) is open, so its shape is not known",
                f"Give one: `shapes: {{{port.name}: {example}}}`.",
            )
        dims.append(dim if isinstance(dim, int) else named.get(dim or ""))
    return tuple(dims)


def _draw(
    port: _Input, shape: tuple[int, ...], settings: Synthetic, rng: np.random.Generator, request: _Request
) -> Array:
    """Return random values of an input's type; raises DataError for types that have none."""
    if port.kind != "tensor" or port.dtype == ir.DataType.STRING:
        what = "holds strings" if port.kind == "tensor" else f"is of {port.kind} type"
        raise request.refuse(f"`{port.name}` {what}, which cannot be synthetic", "Use `test_data`.")
    if port.dtype == ir.DataType.BOOL:
        return np.asarray(rng.integers(0, 2, shape, dtype=np.int8)).astype(np.bool_)
    if port.dtype is not None and port.dtype.is_integer():
        low, high = settings.integers
        ends = np.array([low, high - 1])
        if (ends.astype(port.numpy).astype(np.int64) != ends).any():
            raise request.refuse(f"`{port.name}` is {port.type_name}, it cannot hold `integers` {[low, high]}")
        return np.asarray(rng.integers(low, high, shape, dtype=np.int64)).astype(port.numpy)
    kind: type[np.float32] | type[np.float64] = np.float64 if port.dtype == ir.DataType.DOUBLE else np.float32
    if settings.distribution == "normal":
        return np.asarray(rng.standard_normal(shape, dtype=kind)).astype(port.numpy)
    unit = np.asarray(rng.random(shape, dtype=kind))
    return np.asarray(settings.low + np.multiply(unit, settings.high - settings.low)).astype(port.numpy)


_OPENERS: dict[str, Callable[[_Request], _Stream]] = {
    "npz": _open_npz,
    "test_data": _open_test_data,
    "images": _open_images,
    "synthetic": _open_synthetic,
}


def _open(request: _Request) -> _Stream:
    for name in request.source.shapes:
        _known(name, [port.name for port in request.inputs], "input of the model, but `shapes` names it", request)
    return _OPENERS[request.source.kind](request)
