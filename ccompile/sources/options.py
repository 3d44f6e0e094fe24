"""What a spec says about data: where samples come from, how many, and how an image becomes an input."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from ccompile.declaration import Declaration

SourceKind = Literal["npz", "test_data", "images", "synthetic"]
KINDS: tuple[SourceKind, ...] = get_args(SourceKind)
BATCH, SYNTHETIC_BATCH, SYNTHETIC_SAMPLES = 32, 8, 16  # samples, where the spec and the model leave it open
Dimension = Annotated[int, Field(ge=1, le=2**31 - 1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Integer = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
PathText = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]
_PerChannel = Annotated[
    tuple[Finite, ...],
    BeforeValidator(
        lambda given: (given,) if isinstance(given, int | float) else given,
        json_schema_input_type=Finite | tuple[Finite, ...],
    ),
]
Pixels = Annotated[int, Field(ge=1, le=65536)]


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
    mean: _PerChannel = Field(
        default=(0.0,), description="subtracted after scaling: one for all, or per channel in the order of `channels`"
    )
    std: _PerChannel = Field(default=(1.0,), description="divisor after the mean: per channel, or one for all")

    @model_validator(mode="after")
    def _fits_channels(self) -> Preprocess:
        count = len(self.channels)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, count):
                raise ValueError(f"`{name}` has {len(values)} values, {self.channels} needs 1 or {count}")
        if 0 in self.std:
            raise ValueError("`std` is a divisor: it must not hold 0")
        return self


class Synthetic(Declaration):
    """Seeded random inputs, for models without data at hand."""

    distribution: Literal["normal", "uniform"] = Field(
        default="normal", description="of float inputs; normal is N(0, 1)"
    )
    low: Finite = Field(default=0.0, description="least value of `uniform`")
    high: Finite = Field(default=1.0, description="upper end of `uniform`, excluded")
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


_ONLY_FOR: dict[str, tuple[SourceKind, ...]] = {
    "labels": ("npz", "images"),
    "preprocess": ("images",),
    "input": ("images",),
    "batch": ("npz", "images", "synthetic"),
}


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
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(KINDS)}; given: {', '.join(given) or 'none'}")
        if self.images is not None and self.preprocess is None:
            raise ValueError("images need `preprocess`, for example `preprocess: {resize: 256, crop: 224}`")
        for name, kinds in _ONLY_FOR.items():
            if getattr(self, name) is not None and given[0] not in kinds:
                raise ValueError(f"`{name}` is for {' and '.join(kinds)}, not for {given[0]}")
        return self

    @property
    def kind(self) -> SourceKind:
        """Return which of the four sources is given."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


class DataSpec(Declaration):
    """The inputs that statistics are taken on, and those that every step is compared on."""

    calibration: DataSource | None = Field(
        default=None, description="inputs for the statistics that lossy passes fit to; `synthetic: {}` draws them"
    )
    verification: DataSource | None = Field(
        default=None,
        description="inputs that every step is compared on, never those of calibration; default: synthetic",
    )
