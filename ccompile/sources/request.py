"""One source to open: for whom, for which model, from which sample on; and the refusals that all kinds share."""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ccompile.errors import DataError, nearest
from ccompile.sources.options import BATCH

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from ccompile.sources.options import DataSource
    from ccompile.sources.ports import Port

Role = Literal["calibration", "verification"]
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tokenize.TokenError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    SyntaxError,
    RuntimeError,
    OverflowError,
)  # what numpy, zipfile and onnx raise on damaged files


@dataclass(frozen=True)
class Request:
    """A source, the model's inputs and outputs, the folder of the spec, the first sample to use, the seed."""

    source: DataSource
    role: Role
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    base: Path
    start: int
    seed: int

    @property
    def text(self) -> str:
        """Return what the spec gives for the source: its path as written, or the distribution."""
        named = getattr(self.source, self.source.kind)
        return named if isinstance(named, str) else named.distribution

    @property
    def where(self) -> str:
        """Return what errors name."""
        return f"data.{self.role}: {self.source.kind if self.source.synthetic else self.text}"

    @property
    def path(self) -> Path:
        """Return the path of the source; of no meaning when synthetic."""
        return self.base / self.text

    @property
    def takes(self) -> str:
        """Return a sentence that lists the model's inputs."""
        return "It takes " + "; ".join(map(str, self.inputs)) + "." if self.inputs else "It takes no input."

    def refuse(self, message: str, hint: str = "") -> DataError:
        """Return the error to raise."""
        return DataError(message, self.where, hint)

    def check_known(self, name: str, names: Iterable[str], what: str) -> None:
        """Raise DataError unless `name` is among `names`; `what` says of what kind they are."""
        if name not in (known := list(names)):
            raise self.refuse(f"`{name}` is no {what}", nearest(name, known))

    def check_batch(self, size: int, who: str) -> None:
        """Raise DataError when the spec asks for another batch than the fixed one; `who` fixes it."""
        if self.source.batch not in (None, size):
            raise self.refuse(f"`batch` is {self.source.batch}, {who} {size}", "Leave `batch` out.")

    @contextlib.contextmanager
    def reading(self, what: str = "the file") -> Iterator[None]:
        """Turn what missing, unreadable and damaged files raise into DataError."""
        try:
            yield
        except FileNotFoundError as error:
            raise self.refuse(f"no such file: {error.filename}", "Paths are relative to the spec's folder.") from error
        except OSError as error:
            raise self.refuse(f"cannot read {what}: {error.strerror or error}") from error
        except _DAMAGE as error:
            raise self.refuse(f"{what} is damaged: {str(error) or type(error).__name__}", "Write it again.") from error

    def digest(self, paths: Iterable[Path]) -> str:
        """Return the SHA-256 of the files' SHA-256s, in order; raises DataError."""
        digest = hashlib.sha256()
        for path in paths:
            with self.reading(path.name), path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def window(self, total: int) -> tuple[int, tuple[str, ...]]:
        """Return how many of `total` samples are used from `start` on, and notes; raises DataError when it is none."""
        left, wanted = total - self.start, self.source.samples
        if total < 1:
            raise self.refuse("there is no sample in it")
        if left < 1:
            raise self.refuse(
                f"nothing is left: calibration takes {self.start}, there are {total}",
                "Lower `samples` of data.calibration, or name another source.",
            )
        notes = [f"same source as calibration: the first {self.start} are left to it"] if self.start else []
        if wanted is not None and wanted > left:
            notes.append(f"{wanted} samples wanted, {left} there: all are used")
        return min(left, wanted or left), tuple(notes)

    def batch_size(self, ports: Iterable[Port]) -> tuple[int, bool]:
        """Return the samples per batch, and whether the model fixes them; raises DataError when inputs disagree."""
        fixed = {size: port.name for port in ports if port.shape and isinstance(size := port.shape[0], int)}
        if len(fixed) > 1:
            raise self.refuse(
                f"the inputs {', '.join(fixed.values())} have different fixed first axes: {list(fixed)}",
                "Use `test_data`, where each set is one batch as it is.",
            )
        for size, name in fixed.items():
            if size < 1:
                raise self.refuse(f"`{name}` has no room for a sample: its first axis is 0")
            self.check_batch(size, "the model fixes")
            return size, True
        return self.source.batch or BATCH, False
