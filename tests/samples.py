"""One-line models and sources, and what opening them gives or refuses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ccompile import onnx_io
from ccompile.data import Batch, Data, DataSource, DataSpec, open_data
from ccompile.errors import DataError

if TYPE_CHECKING:
    import onnx_ir as ir

    from ccompile.core import Array

FLOAT, INT64, UINT8, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8, TensorProto.STRING
Dims = list[int | str | None] | None


def tensor(name: str, dims: Dims, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, dims)


def model_of(*inputs: onnx.ValueInfoProto) -> ir.Model:
    """A model that hands its inputs through."""
    names = [value.name for value in inputs]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in names]
    outputs = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in inputs]
    for value in outputs:
        value.name += "_out"
    proto = helper.make_model(
        helper.make_graph(nodes, "g", list(inputs), outputs), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    return onnx_io.from_proto(proto)[0]


def source(**options: Any) -> DataSource:
    return DataSource.model_validate(options)


def verify(model: ir.Model, base: Path, **options: Any) -> Data:
    return open_data(DataSpec(verification=source(**options)), model, base, 0)


def both(model: ir.Model, base: Path, calibration: dict[str, Any], verification: dict[str, Any]) -> Data:
    spec = DataSpec(calibration=source(**calibration), verification=source(**verification))
    return open_data(spec, model, base, 0)


def joined(batches: list[Batch], name: str) -> Array:
    return np.concatenate([batch.feeds[name] for batch in batches])


def refusal(model: ir.Model, base: Path, **options: Any) -> str:
    """The error that opening and reading the source as verification data gives."""
    with pytest.raises(DataError) as caught:
        for _ in verify(model, base, **options).verification.batches():
            pass
    assert "data.verification" in str(caught.value)
    return str(caught.value)


ROWS = np.arange(50, dtype=np.float32).reshape(10, 5)
OPEN = model_of(tensor("x", ["N", 5]))
