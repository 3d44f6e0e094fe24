"""ccompile: compiles neural networks in ONNX to smaller and faster ones under a declarative, verified spec."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from onnxruntime import InferenceSession, SessionOptions

    Provider = str | tuple[str, Mapping[str, str]]

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


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
