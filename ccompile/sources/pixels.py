"""One image file as the array that a model takes."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from ccompile.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from ccompile.core import Array
    from ccompile.sources.options import Preprocess


def decode(path: Path, preprocess: Preprocess, dtype: np.dtype[Any], where: str) -> Array:
    """Return an image as x[c, h, w] or x[h, w, c], of the model's dtype.

    Alpha is dropped; EXIF rotation is not applied. Raises DataError: Pillow is missing, an unreadable image, more than
    8 bits per channel, a crop larger than the image, values that the dtype cannot hold.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("reading images needs Pillow", where, "pip install pillow") from error
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise DataError(
                    f"{path.name} has the mode {image.mode}", where, "Save it with 8 bits per channel, or use an npz."
                )
            opened = image.convert("L" if preprocess.channels == "L" else "RGB")
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        EOFError,
        IndexError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(f"cannot read the image {path}: {error}", where, "Repair it or take it out.") from error
    x = np.asarray(_framed(opened, path, preprocess, where), dtype=np.float32)
    x = x[:, :, None] if x.ndim == 2 else x
    x = x[:, :, ::-1] if preprocess.channels == "BGR" else x
    x = _cast(_normalised(x, preprocess, dtype, where), dtype, path, where)
    return np.ascontiguousarray(x.transpose(2, 0, 1) if preprocess.layout == "NCHW" else x)


def _framed(image: Image, path: Path, preprocess: Preprocess, where: str) -> Image:
    """Resize and crop; sizes are (width, height) for Pillow. Rounding as in torchvision's Resize and CenterCrop."""
    from PIL.Image import Resampling

    width, height = image.size
    if isinstance(preprocess.resize, int):
        short = min(width, height)
        long = int(preprocess.resize * max(width, height) / short)
        width, height = (preprocess.resize, long) if width == short else (long, preprocess.resize)
    elif preprocess.resize is not None:
        height, width = preprocess.resize
    if (width, height) != image.size:
        image = image.resize((width, height), Resampling.BILINEAR)
    if preprocess.crop is None:
        return image
    high, wide = (preprocess.crop,) * 2 if isinstance(preprocess.crop, int) else preprocess.crop
    if high > height or wide > width:
        raise DataError(
            f"{path.name} is {height} x {width}, smaller than the crop {high} x {wide}",
            where,
            "Give a larger `resize`.",
        )
    left, top = round((width - wide) / 2), round((height - high) / 2)
    return image.crop((left, top, left + wide, top + high))


def _normalised(x: Array, preprocess: Preprocess, dtype: np.dtype[Any], where: str) -> Array:
    """Return (x * scale - mean) / std in float32, x[h, w, c]; models of uint8 take the pixels as they are."""
    integer = np.issubdtype(dtype, np.integer)
    scale = 1.0 if integer and "scale" not in preprocess.model_fields_set else preprocess.scale
    if dtype == np.uint8 and (scale != 1 or any(preprocess.mean) or set(preprocess.std) != {1.0}):
        raise DataError(
            "the model takes uint8 pixels, `scale`, `mean` and `std` would lose them", where, "Leave them out."
        )
    mean, std = (np.array(values, dtype=np.float32) for values in (preprocess.mean, preprocess.std))
    return (x * np.float32(scale) - mean) / std


def _cast(x: Array, dtype: np.dtype[Any], path: Path, where: str) -> Array:
    if not np.issubdtype(dtype, np.integer):
        return x.astype(dtype)
    x, limits = np.rint(x), np.iinfo(dtype)
    if x.min() < limits.min or x.max() > limits.max:
        raise DataError(
            f"{path.name} has values {x.min():g} to {x.max():g}, the model takes {dtype.name}",
            where,
            "Shift or shrink them with `scale`, `mean` and `std`.",
        )
    return x.astype(dtype)
