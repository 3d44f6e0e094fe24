"""Image folders: which files in which order, their classes, and what the model's other inputs get."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ccompile.sources.options import Synthetic
from ccompile.sources.pixels import decode
from ccompile.sources.ports import check_fit
from ccompile.sources.stream import Batch, Stream, content_of
from ccompile.sources.synthetic import check_drawable, draw, shapes_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ccompile.core import Array
    from ccompile.sources.ports import Port
    from ccompile.sources.request import Request

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm"})


def open_images(request: Request) -> Stream:
    """Return the images of a folder; raises DataError when there is none, or the first does not fit the model."""
    preprocess = request.source.preprocess
    assert preprocess is not None  # DataSource requires it
    port = _fed_port(request)
    found = _find(request)
    count, notes = request.window(len(found))
    used = slice(request.start, request.start + count)
    labels, coverage = _labels(found, used, request)
    files = found[used]
    size, whole = request.batch_size([port])
    shape = decode(files[0], preprocess, port.numpy, request.where).shape
    check_fit(port, port.numpy, (size, *shape), request.where, rows=True)
    rows, constants, filled = _other_values(port, request)

    def read(path: Path) -> Array:
        x = decode(path, preprocess, port.numpy, request.where)
        if x.shape == shape:
            return x
        if size > 1:
            raise request.refuse(
                f"{path.name} becomes {list(x.shape)}, {files[0].name} {list(shape)}: one batch needs one size",
                "Give `crop`, `resize: [height, width]`, or `batch: 1`.",
            )
        check_fit(port, x.dtype, (1, *x.shape), request.where, rows=True)
        return x

    def pieces() -> Iterator[Batch]:
        for at in range(0, count, size):
            images = np.stack([read(path) for path in files[at : at + size]])
            others = {name: np.repeat(row[None], len(images), axis=0) for name, row in rows.items()}
            yield Batch({port.name: images, **others}, None if labels is None else labels[at : at + size], len(images))

    settings, seeds = preprocess.model_dump(mode="json"), [request.seed, request.source.seed]
    listed = [] if labels is None else labels.tolist()
    content = content_of("images", request.digest(files), listed, settings, port.name, seeds)
    return Stream(count, pieces, content, size, whole, constants, notes + coverage + filled, labels is not None)


def _fed_port(request: Request) -> Port:
    """Return the graph input that images feed: the named one, the only one, or the only one of rank 4."""
    ports = {port.name: port for port in request.inputs}
    if request.source.input is not None:
        request.check_known(request.source.input, ports, "input of the model")
        port = ports[request.source.input]
    else:
        fitting = [port for port in request.inputs if port.kind == "tensor" and port.shape and len(port.shape) == 4]
        chosen = request.inputs if len(request.inputs) == 1 else fitting
        if len(chosen) != 1:
            hint = f"Give `input: NAME`. {request.takes}"
            raise request.refuse("it is not clear which input the images feed", hint)
        port = chosen[0]
    if port.kind != "tensor" or port.dtype in (ir.DataType.STRING, ir.DataType.BOOL):
        raise request.refuse(f"`{port.name}` takes no numbers, so images cannot feed it", request.takes)
    return port


def _find(request: Request) -> tuple[Path, ...]:
    """Return the image files below the folder, sorted by their path; names that start with a dot are left out."""
    folder = request.path
    if not folder.is_dir():
        raise request.refuse("no such folder", f"Looked for {folder}.")

    def refuse(error: OSError) -> None:
        raise request.refuse(f"cannot read {error.filename}: {error.strerror}") from error

    found: list[Path] = []
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        at = Path(here)
        above = (at.resolve(), *at.resolve().parents)
        folders[:] = [name for name in folders if not name.startswith(".") and (at / name).resolve() not in above]
        found += [at / n for n in names if not n.startswith(".") and Path(n).suffix.lower() in EXTENSIONS]
    if not found:
        raise request.refuse("the folder holds no image", f"Images are *{', *'.join(sorted(EXTENSIONS))}.")
    return tuple(sorted(found, key=lambda path: path.relative_to(folder).parts))


def _labels(files: tuple[Path, ...], used: slice, request: Request) -> tuple[Array | None, tuple[str, ...]]:
    """Return labels[n] of the used files, None when none are asked for, and a note when they leave classes out."""
    text = request.source.labels
    if text is None:
        return None, ()
    labels = _folder_labels(files, request) if text == "folders" else _file_labels(text, len(files), request)
    part, whole = len(np.unique(labels[used])), len(np.unique(labels))
    note = f"the {len(labels[used])} images in use cover {part} of {whole} classes"
    return labels[used], (note,) if part < whole else ()


def _folder_labels(files: tuple[Path, ...], request: Request) -> Array:
    """Return labels[n]: for each file the index of its top subfolder, subfolders sorted by name."""
    tops = [path.relative_to(request.path).parts for path in files]
    for parts in tops:
        if len(parts) < 2:
            raise request.refuse(
                f"{parts[0]} lies in no subfolder, so it has no class",
                "`labels: folders` takes one subfolder per class.",
            )
    index = {name: number for number, name in enumerate(sorted({parts[0] for parts in tops}))}
    return np.array([index[parts[0]] for parts in tops], dtype=np.int64)


def _file_labels(text: str, count: int, request: Request) -> Array:
    """Return labels[n] from a text file with one integer per line, in the order of the sorted images."""
    path = request.base / text
    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
        labels = np.array([int(line) for line in lines], dtype=np.int64)
    except OSError as error:
        raise request.refuse(
            f"cannot read the labels {path.name}: {error.strerror}",
            "`labels` of images is `folders`, or a text file with one integer per line.",
        ) from error
    except (ValueError, OverflowError) as error:
        raise request.refuse(f"the labels {path.name} are not one integer per line: {error}") from error
    if len(labels) != count:
        raise request.refuse(f"{len(labels)} labels in {path.name}, {count} images", "One line per image is needed.")
    return labels


def _other_values(port: Port, request: Request) -> tuple[dict[str, Array], dict[str, Any], tuple[str, ...]]:
    """Return seeded values for the inputs that images do not feed: one row for all samples, or constants; and notes."""
    others = [other for other in request.inputs if other is not port]
    rows: dict[str, Array] = {}
    constants: dict[str, Any] = {other.name: None for other in others if other.kind == "optional"}
    others = [other for other in others if other.kind != "optional"]
    if not others:
        return rows, constants, ()
    settings = Synthetic()
    for other in others:
        check_drawable(other, settings, request)
    rng = np.random.default_rng([request.seed, request.source.seed])
    shapes = shapes_of(others, request)
    for other in others:
        name, dims = other.name, shapes[other.name]
        if None in dims[1:]:
            raise request.refuse(f"`{name}` has the batch on a later axis, images cannot feed it", "Use `test_data`.")
        value = draw(other, tuple(dim or 1 for dim in dims), settings, rng)
        if dims[:1] == (None,):
            rows[name] = value[0]
        else:
            constants[name] = value
    names = ", ".join(other.name for other in others)
    return rows, constants, (f"images feed {port.name}; one seeded synthetic value feeds {names}",)
