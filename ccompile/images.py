"""Image folders: which files, which class, and each file as the array that a model takes."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from ccompile.core import Declaration
from ccompile.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ccompile.core import Array

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm"})
Pixels = Annotated[int, Field(ge=1, le=65536)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Preprocess(Declaration):
    """From an image file to a model input: decode, resize, centre crop, (x * scale - mean) / std, lay out."""

    resize: Pixels | tuple[Pixels, Pixels] | None = Field(
        default=None, description="pixels: the short side, or [height, width]; bilinear", examples=[256, [224, 224]]
    )
    crop: Pixels | tuple[Pixels, Pixels] | None = Field(
        default=None, description="pixels: the side of a centre crop, or [height, width]", examples=[224]
    )
    layout: Literal["NCHW", "NHWC"] = Field(default="NCHW", description="order of the axes")
    channels: Literal["RGB", "BGR", "L"] = Field(default="RGB", description="which channels and their order; L is grey")
    scale: Finite = Field(
        default=1 / 255,
        description="factor on the pixel values 0 to 255; 1 for models that take integers, unless given",
    )
    mean: tuple[Finite, ...] = Field(
        default=(0.0,), description="subtracted after scaling: one for all, or per channel in the order of `channels`"
    )
    std: tuple[Finite, ...] = Field(default=(1.0,), description="divisor after the mean: per channel, or one for all")

    @model_validator(mode="after")
    def _fits_channels(self) -> Preprocess:
        count = len(self.channels)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, count):
                raise ValueError(f"`{name}` has {len(values)} values, {self.channels} needs 1 or {count}")
        if 0 in self.std:
            raise ValueError("`std` is a divisor: it must not hold 0")
        return self


def find(folder: Path, where: str) -> tuple[Path, ...]:
    """Return the image files below a folder, sorted by their path; names that start with a dot are left out.

    Raises DataError: no such folder, a folder that cannot be read, no image.
    """
    if not folder.is_dir():
        raise DataError("no such folder", where, f"Looked for {folder}.")

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}", where) from error

    found: list[Path] = []
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        at = Path(here)
        above = (at.resolve(), *at.resolve().parents)
        folders[:] = [name for name in folders if not name.startswith(".") and (at / name).resolve() not in above]
        found += [at / n for n in names if not n.startswith(".") and Path(n).suffix.lower() in EXTENSIONS]
    if not found:
        raise DataError("the folder holds no image", where, f"Images are *{', *'.join(sorted(EXTENSIONS))}.")
    return tuple(sorted(found, key=lambda path: path.relative_to(folder).parts))


def folder_labels(files: tuple[Path, ...], folder: Path, where: str) -> Array:
    """Return labels[n]: for each file the index of its top subfolder, subfolders sorted by name.

    Raises DataError when an image lies beside the subfolders.
    """
    tops = [path.relative_to(folder).parts for path in files]
    for path, parts in zip(files, tops, strict=True):
        if len(parts) < 2:
            raise DataError(
                f"{path.name} lies in no subfolder, so it has no class",
                where,
                "`labels: folders` takes one subfolder per class.",
            )
    index = {name: number for number, name in enumerate(sorted({parts[0] for parts in tops}))}
    return np.array([index[parts[0]] for parts in tops], dtype=np.int64)


def file_labels(path: Path, count: int, where: str) -> Array:
    """Return labels[n] from a text file with one integer per line, in the order of the sorted images.

    Raises DataError: unreadable file, a line that is no integer, not as many lines as images.
    """
    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
        labels = np.array([int(line) for line in lines], dtype=np.int64)
    except OSError as error:
        raise DataError(
            f"cannot read the labels {path.name}: {error.strerror}",
            where,
            "`labels` of images is `folders`, or a text file with one integer per line.",
        ) from error
    except (ValueError, OverflowError) as error:
        raise DataError(f"the labels {path.name} are not one integer per line: {error}", where) from error
    if len(labels) != count:
        raise DataError(f"{len(labels)} labels in {path.name}, {count} images", where, "One line per image is needed.")
    return labels


def decode(path: Path, preprocess: Preprocess, dtype: np.dtype[Any], where: str) -> Array:
    """Return an image as x[c, h, w] or x[h, w, c], of the model's dtype.

    Alpha is dropped; EXIF rotation is not applied. Raises DataError: Pillow is missing, an unreadable image, more than
    8 bits per channel, a crop larger than the image, values that the dtype cannot hold.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("reading images needs Pillow", where, 'pip install "ccompile[images]"') from error
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
