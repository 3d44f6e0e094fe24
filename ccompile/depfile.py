"""Dependency files for Make, Ninja and CMake: what a compile read, as `OUT: MODEL SPEC DATA...`.

Each file read also stands as a target of its own without a recipe, so that one that was removed makes a build run again
instead of stop. Source: GNU make manual, 4.14; `gcc -MP`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ccompile import metrics
from ccompile.request import Request, inputs_of


def text(request: Request, external: Iterable[Path]) -> str:
    """Return the dependency file of a compile; external: the model's external data."""
    read = [escaped(path) for path in dict.fromkeys((*_read(request), *external))]
    rule = " \\\n  ".join([f"{escaped(request.output)}:", *read])
    return "\n".join([rule, *(f"{path}:" for path in read)]) + "\n"


def escaped(path: Path) -> str:
    r"""Return a path as Make and Ninja read it.

    >>> escaped(Path("my model #1 $x.onnx"))
    'my\\ model\\ \\#1\\ $$x.onnx'
    """
    return str(path).replace("$", "$$").replace("#", r"\#").replace(" ", r"\ ")


def _read(request: Request) -> Iterator[Path]:
    for path, _ in inputs_of(request):
        yield path
    spec = request.spec
    for source in (spec.data.calibration, spec.data.verification) if spec.data is not None else ():
        for name in (source.images, source.test_data) if source is not None else ():
            folder = (spec.data_base or spec.base) / name if name is not None else None
            if folder is not None:  # folders change when files come or go
                found = sorted(folder.rglob("*"))
                yield folder
                yield from found
    for name in spec.gates.metric:
        if name not in metrics.METRICS:
            yield from metrics.files_of(name, spec.base)
