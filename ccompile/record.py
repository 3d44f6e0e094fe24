"""What all records of the evidence file are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of everything in the evidence file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def finite(value: Any) -> Any:
    """Return plain data with infinities and NaN as None, as JSON has none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
