"""The fingerprint in the evidence: what a later `ccompile check` holds a model file and a run of it against."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from ccompile.core import Array
from ccompile.errors import DataError
from ccompile.fingerprint import InputPrint, Inputs, OutputPrint
from ccompile.identity import describe_weight, structure, weight_digest
from ccompile.numerics.sketch import BUCKETS
from ccompile.record import Record, finite


class InputRecord(Record):
    """fingerprint.InputPrint: what one graph input was fed; statistics per channel, none where it held no numbers."""

    name: str
    dtype: str
    samples: int
    digest: str
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()

    @classmethod
    def of(cls, found: InputPrint) -> InputRecord:
        """Return the record of what an input was fed."""
        plain: dict[str, Any] = {}
        if found.has_statistics:
            plain = {name: getattr(found, name).tolist() for name in ("low", "high", "mean", "std", "spread")}
            plain = finite(plain) if all(math.isfinite(x) for row in plain.values() for x in row) else {}
        return cls(name=found.name, dtype=found.dtype, samples=found.samples, digest=found.digest, **plain)


class OutputPrintRecord(Record):
    """fingerprint.OutputPrint; sketches are little-endian float64 in base64, empty where there is nothing to sketch."""

    name: str
    dtype: str
    elements: int
    strange: int
    positions: int
    norm: float
    digest: str
    values: str
    decisions: str

    @classmethod
    def of(cls, found: OutputPrint) -> OutputPrintRecord:
        """Return the record of what an output put out."""
        return cls(
            name=found.name,
            dtype=found.dtype,
            elements=found.elements,
            strange=found.strange,
            positions=found.positions,
            norm=found.norm,
            digest=found.digest,
            values=_packed(found.values) if found.squares else "",
            decisions=_packed(found.decisions) if found.positions else "",
        )

    def sketch(self, which: Literal["values", "decisions"]) -> Array:
        """Return a sketch; zeros where there was nothing. Raises DataError when it is damaged."""
        text: str = getattr(self, which)
        try:
            found = np.frombuffer(base64.b64decode(text, validate=True), "<f8")
        except ValueError as error:
            raise DataError(f"the sketch of output `{self.name}` in the evidence is damaged") from error
        if found.size not in (0, BUCKETS):
            raise DataError(f"the sketch of output `{self.name}` in the evidence has {found.size} numbers")
        return found if found.size else np.zeros(BUCKETS)


def _packed(array: Array) -> str:
    return base64.b64encode(array.astype("<f8").tobytes()).decode()


class InitializerRecord(Record):
    """One initializer of the model written; `norm` |w| and `largest` |w[i]|, of finite elements, tell what moved."""

    name: str
    kind: str
    digest: str
    norm: float | None = None
    largest: float | None = None

    @classmethod
    def of(cls, value: ir.Value) -> InitializerRecord:
        """Return the record of an initializer."""
        tensor = value.const_value
        plain: dict[str, Any] = {}
        if tensor is not None and tensor.dtype.is_floating_point() and tensor.size:
            array = np.asarray(tensor.numpy()).astype(np.float64)
            kept = np.where(np.isfinite(array), array, 0.0)
            plain = {"norm": float(np.linalg.norm(kept)), "largest": float(np.abs(kept).max())}
        digest = weight_digest(value).hex()[:32]
        return cls(name=str(value.name), kind=describe_weight(value), digest=digest, **plain)


class Fingerprint(Record):
    """What a later `ccompile check` is held against: the file by its parts, what it was fed, what it put out."""

    structure: str
    weights: tuple[InitializerRecord, ...]
    inputs: tuple[InputRecord, ...]
    outputs: tuple[OutputPrintRecord, ...]

    @classmethod
    def of(cls, model: ir.Model, inputs: Inputs, outputs: Iterable[OutputPrint]) -> Fingerprint:
        """Return the fingerprint of the model as it stands in its file, and of a run of it."""
        return cls(
            structure=structure(model),
            weights=tuple(InitializerRecord.of(value) for value in model.graph.initializers.values()),
            inputs=tuple(map(InputRecord.of, inputs.prints)),
            outputs=tuple(map(OutputPrintRecord.of, outputs)),
        )
