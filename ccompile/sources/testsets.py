"""ONNX test data sets: folders test_data_set_N of input_N.pb and output_N.pb, each one batch as it is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from ccompile.sources.ports import check_fit
from ccompile.sources.stream import Batch, Stream, content_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ccompile.sources.ports import Port
    from ccompile.sources.request import Request


def open_testsets(request: Request) -> Stream:
    """Return the sets of a folder, one sample each; raises DataError when the first is damaged or does not fit."""
    with request.reading("the folder"):
        folders = _folders(request)
    count, notes = request.window(len(folders))
    used = folders[request.start : request.start + count]
    paths = [path for folder in used for path in sorted(folder.glob("*put_*.pb"))]
    _read_set(used[0], request)

    def pieces() -> Iterator[Batch]:
        for folder in used:
            yield _read_set(folder, request)

    content = content_of("test_data", [path.name for path in paths], request.digest(paths))
    return Stream(count, pieces, content, notes=notes)


def _folders(request: Request) -> list[Path]:
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


def _read_set(folder: Path, request: Request) -> Batch:
    """Return one set as a batch of one sample; input_N.pb is the N-th graph input."""
    feeds: dict[str, Any] = {}
    extra = folder / f"input_{len(request.inputs)}.pb"
    if extra.exists():
        raise request.refuse(f"{folder.name} has {extra.name}, the model takes fewer inputs", request.takes)
    for index, port in enumerate(request.inputs):
        path = folder / f"input_{index}.pb"
        if port.kind == "optional" and not path.exists():
            feeds[port.name] = None
            continue
        feeds[port.name] = _read_proto(path, port, request)
        parts = feeds[port.name] if isinstance(feeds[port.name], list) else [feeds[port.name]]
        for part in parts:
            if isinstance(part, np.ndarray):
                check_fit(port, part.dtype, part.shape, f"{request.where}/{folder.name}/{path.name}", rows=False)
    expected = {}
    for index, port in enumerate(request.outputs):
        path = folder / f"output_{index}.pb"
        if path.exists():
            expected[port.name] = _read_proto(path, port, request)
    return Batch(feeds, None, 1, expected or None)


def _read_proto(path: Path, port: Port, request: Request) -> Any:
    """Return what an input_N.pb or output_N.pb holds: an array, a list of arrays, or None."""
    if port.kind == "sparse":
        raise request.refuse(f"`{port.name}` is a sparse tensor, which is not supported")
    with request.reading(f"{path.parent.name}/{path.name}"):
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
