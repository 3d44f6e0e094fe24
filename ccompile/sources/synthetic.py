"""Seeded random inputs: their shapes from the spec, the model and dimensions of one name, and their values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ccompile.sources.options import SYNTHETIC_BATCH, SYNTHETIC_SAMPLES, Synthetic
from ccompile.sources.ports import check_fit
from ccompile.sources.stream import Batch, Stream, content_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ccompile.core import Array
    from ccompile.sources.ports import Port
    from ccompile.sources.request import Request

Dims = tuple[int | None, ...]  # None: the samples of the batch


def open_synthetic(request: Request) -> Stream:
    """Return seeded random inputs; raises DataError for an input whose type or shape cannot be drawn."""
    settings = request.source.synthetic or Synthetic()
    for port in request.inputs:
        check_drawable(port, settings, request)
    shapes = shapes_of(request.inputs, request)
    count, size = _amount(shapes, request)
    seed = [request.seed, request.source.seed, 0 if request.role == "calibration" else 1]

    def pieces() -> Iterator[Batch]:
        for index, at in enumerate(range(0, count, size)):
            rng = np.random.default_rng([*seed, index])
            taken = min(size, count - at)
            feeds = {}
            for port in request.inputs:
                dims = tuple(taken if dim is None else dim for dim in shapes[port.name])
                feeds[port.name] = draw(port, dims, settings, rng)
            yield Batch(feeds, None, taken)

    types = [(port.name, port.type_name, shapes[port.name]) for port in request.inputs]
    content = content_of("synthetic", settings.model_dump(mode="json"), seed, types, size)
    wanted = request.source.samples or SYNTHETIC_SAMPLES
    notes = (f"{count} samples instead of {wanted}: a batch of the model holds {size}",) if count > wanted else ()
    return Stream(count, pieces, content, notes=notes)


def check_drawable(port: Port, settings: Synthetic, request: Request) -> None:
    """Raise DataError when an input is of a type that has no random values, or one too small for `integers`."""
    if port.kind != "tensor" or port.dtype == ir.DataType.STRING:
        what = "holds strings" if port.kind == "tensor" else f"is of {port.kind} type"
        raise request.refuse(f"`{port.name}` {what}, which cannot be synthetic", "Use `test_data`.")
    if port.dtype is not None and port.dtype.is_integer():
        low, high = settings.integers
        ends = np.array([low, high - 1])
        if (ends.astype(port.numpy).astype(np.int64) != ends).any():
            raise request.refuse(f"`{port.name}` is {port.type_name}, it cannot hold `integers` {[low, high]}")


def shapes_of(ports: Sequence[Port], request: Request) -> dict[str, Dims]:
    """Return each input's shape, None standing for the batch: from `shapes`, the model, and dimensions of one name.

    Raises DataError: `shapes` contradicts the model, an axis other than the batch is open.
    """
    given = request.source.shapes
    named: dict[str, int | None] = {}
    batch: set[int] = set()  # what `shapes` says about axes that hold the batch
    for port in ports:
        if port.shape and isinstance(port.shape[0], str):
            named[port.shape[0]] = None
    for port in ports:
        if port.name not in given or port.shape is None:
            continue
        check_fit(port, port.numpy, given[port.name], request.where, rows=False)
        named |= {dim: n for dim, n in zip(port.shape, given[port.name], strict=True) if isinstance(dim, str)}
        if port.shape and not isinstance(port.shape[0], int):
            batch.add(given[port.name][0])
    size = batch.pop() if len(batch) == 1 else None
    shapes = {port.name: given[port.name] if port.name in given else _declared(port, named, request) for port in ports}
    return {name: tuple(size if dim is None else dim for dim in dims) for name, dims in shapes.items()}


def draw(port: Port, shape: tuple[int, ...], settings: Synthetic, rng: np.random.Generator) -> Array:
    """Return random values of the type of an input that `check_drawable` accepts."""
    if port.dtype == ir.DataType.BOOL:
        return np.asarray(rng.integers(0, 2, shape, dtype=np.int8)).astype(np.bool_)
    if port.dtype is not None and port.dtype.is_integer():
        low, high = settings.integers
        return np.asarray(rng.integers(low, high, shape, dtype=np.int64)).astype(port.numpy)
    kind: type[np.float32] | type[np.float64] = np.float64 if port.dtype == ir.DataType.DOUBLE else np.float32
    if settings.distribution == "normal":
        return np.asarray(rng.standard_normal(shape, dtype=kind)).astype(port.numpy)
    unit = np.asarray(rng.random(shape, dtype=kind))
    return np.asarray(settings.low + np.multiply(unit, settings.high - settings.low)).astype(port.numpy)


def _amount(shapes: Mapping[str, Dims], request: Request) -> tuple[int, int]:
    """Return the samples, and those per batch: the spec's, or what the first axis has where the shapes fix it."""
    wanted = request.source.samples or SYNTHETIC_SAMPLES
    if any(None in dims for dims in shapes.values()):
        return wanted, min(request.source.batch or SYNTHETIC_BATCH, wanted)
    leading = {dims[0] or 1 for dims in shapes.values() if dims}
    size = leading.pop() if len(leading) == 1 else 1
    request.check_batch(size, "the shapes fix")
    return math.ceil(wanted / size) * size, size


def _declared(port: Port, named: Mapping[str, int | None], request: Request) -> Dims:
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
