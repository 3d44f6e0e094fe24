"""Task metrics: top1, top5, and functions of the user's own found beside the spec."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ccompile.comparison import class_axis
from ccompile.errors import DataError, SpecError, nearest

if TYPE_CHECKING:
    from ccompile.core import Array
    from ccompile.runtime import Outputs


class Metric(Protocol):
    """A task metric: outputs by name over all samples, and labels; higher is better."""

    def __call__(self, outputs: Mapping[str, Array], labels: Array) -> float:
        """Return the metric."""
        ...


def _top(k: int, batches: Iterable[Mapping[str, Any]], labels: Sequence[Array]) -> float:
    """Return the share of samples whose label is among the k largest scores, holding one batch at a time.

    Scores are the first output of shape [samples, classes] in every batch. Raises DataError: no scores, or labels that
    are not one class per sample.
    """
    wrong = next((truth for truth in labels if truth.ndim != 1), None)
    if wrong is not None:
        raise DataError(f"labels of shape {list(wrong.shape)}: top1 and top5 take one class per sample")
    hits: dict[str, int] | None = None
    classes: dict[str, int] = {}
    for batch, truth in zip(batches, labels, strict=True):
        scores = {name: value for name, value in batch.items() if _is_scores(value, len(truth))}
        found = {name: value for name, value in scores.items() if hits is None or name in hits}
        for name, value in found.items():
            classes.setdefault(name, value.shape[1])
        fit = {name: value for name, value in found.items() if value.shape[1] == classes[name]}
        hits = {name: (hits or {}).get(name, 0) + _hits(k, value, truth) for name, value in fit.items()}
    if not hits:
        hint = "Name a function instead."
        raise DataError("no output has scores of shape [samples, classes] for top1/top5", hint=hint)
    name = next(iter(hits))
    truth = np.concatenate(list(labels))
    if not ((truth >= 0) & (truth < classes[name])).all():
        raise DataError(
            f"labels from {truth.min()} to {truth.max()}, but output `{name}` has classes 0 to {classes[name] - 1}",
            hint="Labels count the scores from 0; samples without a class must be left out.",
        )
    return hits[name] / len(truth)


def _is_scores(value: object, samples: int) -> bool:
    if not isinstance(value, np.ndarray):
        return False
    return value.ndim == 2 and len(value) == samples and class_axis(value) is not None


def _hits(k: int, scores: Array, labels: Array) -> int:
    if k == 1:
        return int(np.count_nonzero(scores.argmax(1) == labels))
    best = np.argpartition(-scores, min(k, scores.shape[1]) - 1, axis=1)[:, :k]
    return int(np.count_nonzero((best == labels[:, None]).any(1)))


def top1(outputs: Mapping[str, Array], labels: Array) -> float:
    """Return the share of samples whose largest score is the label's."""
    return _top(1, [outputs], [labels])


def top5(outputs: Mapping[str, Array], labels: Array) -> float:
    """Return the share of samples whose label is among the five largest scores."""
    return _top(5, [outputs], [labels])


METRICS: dict[str, Metric] = {"top1": top1, "top5": top5}
_LARGEST: dict[Metric, int] = {top1: 1, top5: 5}  # these are measured batch by batch


def find_metric(name: str, base: Path) -> Metric:
    """Return a metric by name, or `module:function`, the module found beside the spec or on the Python path.

    Raises SpecError: unknown name, module or function.
    """
    if name in METRICS:
        return METRICS[name]
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise SpecError(f"unknown metric `{name}`", hint=nearest(name, METRICS) + " Or name a `module:function`.")
    try:
        with _on_path(base):
            found = getattr(_module(module, base), function)
    except (Exception, SystemExit) as error:  # the user's module runs here
        said = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise SpecError(f"metric `{name}`: {said}", hint="It is a function (outputs, labels) -> float.") from error
    if not callable(found):
        raise SpecError(f"metric `{name}` is not a function", hint="It is a function (outputs, labels) -> float.")

    def metric(outputs: Mapping[str, Array], labels: Array) -> float:
        with _on_path(base):  # it may import its neighbours only now
            value: float = found(outputs, labels)
            return value

    return metric


def files_of(name: str, base: Path) -> list[Path]:
    """Return the Python files that a `module:function` may come from: all beside the spec, or the module's own."""
    module = name.partition(":")[0]
    if (base / f"{module}.py").exists():
        return sorted(base.glob("*.py"))
    found = sys.modules.get(module)
    return [Path(found.__file__)] if found is not None and found.__file__ else []


@contextlib.contextmanager
def _on_path(base: Path) -> Iterator[None]:
    folder = str(base.resolve())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's module may change the path as well
            sys.path.remove(folder)


_numbers = itertools.count()


def _module(name: str, base: Path) -> ModuleType:
    """Return the module beside the spec, whatever else of that name was imported before, or one on the Python path."""
    path = base / f"{name}.py"
    if not path.exists():
        return importlib.import_module(name)
    private = f"_ccompile_metric_{next(_numbers)}_{name}"
    loader = SourceFileLoader(private, str(path))
    module = ModuleType(private)
    module.__file__ = str(path)
    sys.modules[private] = module  # dataclasses and pickle look a class's module up there
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[private]
        raise
    return module


class _Whole(Mapping[str, "Array"]):
    """Outputs over all batches, concatenated when asked for; it holds the last one that was."""

    def __init__(self, batches: Iterable[Outputs]) -> None:
        self._batches = batches
        shapes: dict[str, set[tuple[int, ...] | None]] = {}
        for batch in batches:
            for name, value in batch.items():
                shapes.setdefault(name, set()).add(_row(value))
        self._names = [name for name, rows in shapes.items() if len(rows) == 1 and None not in rows]
        self._held: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._held:
            self._held.clear()
            self._held[name] = np.concatenate([np.asarray(batch[name]) for batch in self._batches])
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _row(value: object) -> tuple[int, ...] | None:
    """Return the shape without axis 0, along which batches stack; None where they cannot."""
    return value.shape[1:] if isinstance(value, np.ndarray) and value.ndim else None


def measure(metrics: Mapping[str, Metric], outputs: Iterable[Outputs], labels: Sequence[Array]) -> dict[str, float]:
    """Return each metric over all batches; outputs whose batches do not stack on axis 0 are not shown to it.

    `outputs` is iterated several times. Raises DataError when a metric fails on these outputs.
    """
    if not metrics or not labels:
        return {}
    values = {}
    for name, metric in metrics.items():
        if metric in _LARGEST:
            values[name] = _top(_LARGEST[metric], outputs, labels)
            continue
        try:
            values[name] = float(metric(_Whole(outputs), np.concatenate(list(labels))))
        except DataError:
            raise
        except (Exception, SystemExit) as error:  # the user's function runs here
            raise DataError(f"metric `{name}` fails: {type(error).__name__}: {error}") from error
    return values
