"""Task metrics: top1, top5, and functions of the user's own found beside the spec."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
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


def _top(k: int, outputs: Mapping[str, Array], labels: Array) -> float:
    if labels.ndim != 1:
        raise DataError(f"labels of shape {list(labels.shape)}: top1 and top5 take one class per sample")
    for scores in outputs.values():
        if scores.ndim == 2 and len(scores) == len(labels) and class_axis(scores) is not None:
            best = np.argpartition(-scores, min(k, scores.shape[1]) - 1, axis=1)[:, :k] if k > 1 else None
            hits = scores.argmax(1) == labels if best is None else (best == labels[:, None]).any(1)
            return float(hits.mean())
    raise DataError("no output has scores of shape [samples, classes] for top1/top5", hint="Name a function instead.")


def top1(outputs: Mapping[str, Array], labels: Array) -> float:
    """Return the share of samples whose largest score is the label's."""
    return _top(1, outputs, labels)


def top5(outputs: Mapping[str, Array], labels: Array) -> float:
    """Return the share of samples whose label is among the five largest scores."""
    return _top(5, outputs, labels)


METRICS: dict[str, Metric] = {"top1": top1, "top5": top5}


def find_metric(name: str, base: Path) -> Metric:
    """Return a metric by name, or `module:function`, the module found beside the spec or on the Python path.

    Raises SpecError: unknown name, module or function.
    """
    if name in METRICS:
        return METRICS[name]
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise SpecError(f"unknown metric `{name}`", hint=nearest(name, METRICS) + " Or name a `module:function`.")
    sys.path.insert(0, str(base.resolve()))
    try:
        found = getattr(_module(module, base), function)
    except (Exception, SystemExit) as error:  # the user's module runs here
        said = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise SpecError(f"metric `{name}`: {said}", hint="It is a function (outputs, labels) -> float.") from error
    finally:
        sys.path.remove(str(base.resolve()))
    if not callable(found):
        raise SpecError(f"metric `{name}` is not a function", hint="It is a function (outputs, labels) -> float.")
    metric: Metric = found
    return metric


def _module(name: str, base: Path) -> ModuleType:
    """Return the module beside the spec, whatever else of that name was imported before, or one on the Python path."""
    path = base / f"{name}.py"
    if not path.exists():
        return importlib.import_module(name)
    loader = SourceFileLoader(name, str(path))
    module = ModuleType(name)
    module.__file__ = str(path)
    loader.exec_module(module)
    return module


def measure(metrics: Mapping[str, Metric], outputs: Iterable[Outputs], labels: Sequence[Array]) -> dict[str, float]:
    """Return each metric over all batches; outputs whose batches do not stack on axis 0 are not shown to it.

    Raises DataError when a metric fails on these outputs.
    """
    if not metrics or not labels:
        return {}
    batches = list(outputs)
    names = [name for name in batches[0] if _stacks([batch[name] for batch in batches])]
    whole = {name: np.concatenate([np.asarray(batch[name]) for batch in batches]) for name in names}
    truth = np.concatenate(list(labels))
    values = {}
    for name, metric in metrics.items():
        try:
            values[name] = float(metric(whole, truth))
        except DataError:
            raise
        except (Exception, SystemExit) as error:  # the user's function runs here
            raise DataError(f"metric `{name}` fails: {type(error).__name__}: {error}") from error
    return values


def _stacks(values: Sequence[Any]) -> bool:
    if not all(isinstance(value, np.ndarray) and value.ndim for value in values):
        return False
    return len({value.shape[1:] for value in values}) == 1
