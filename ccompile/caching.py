"""Results of a compile's steps, and of whole compiles, kept in a store and found again by what they depend on.

A graph is kept as its message and one content per large weight, so that graphs which share weights share their bytes.
It is kept only when it reads back as the very same bytes: what follows from it does not depend on where it came from.
A step is found by the graph that it was given, so a change in step k runs from k on, and ends where the graphs agree.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
from pydantic import ValidationError

from ccompile import files, onnx_io, provenance
from ccompile.errors import CcompileError, ModelError
from ccompile.evidence import Evidence, StepRecord
from ccompile.request import Request, step_name
from ccompile.store import LIMIT, Store, key_of

if TYPE_CHECKING:
    from ccompile.core import Pass
    from ccompile.data import Data

FOLDER, GIGABYTES = "CCOMPILE_CACHE", "CCOMPILE_CACHE_GB"  # environment


class LostError(Exception):
    """Something that the cache knew is no longer there: the compile must be run without it."""


@dataclass(frozen=True)
class Kept:
    """What is kept of a step. after: its graph (see `_put`), None when the step was reverted or failed."""

    record: StepRecord
    notes: tuple[str, ...]
    decisions: Mapping[str, str]
    seconds: float
    after: dict[str, Any] | None


@dataclass
class Cache:
    """The cache of one compile: off without a store.

    hits, misses: steps that were found, and steps that were run; is_repeated: the whole compile was found.
    """

    store: Store | None = None
    is_read: bool = True
    hits: int = 0
    misses: int = 0
    is_repeated: bool = False
    _request: Request | None = None
    _base: str = ""
    _locked: Mapping[str, str] | None = None

    def begin(self, request: Request, source: str, data: Data) -> None:
        """Take account of what all depends on; source: digest of the model."""
        if self.store is not None:
            self._request, self._locked = request, request.locked
            self._base = provenance.base_key(request, source, data)

    # ------------------------------------------------------------------------------------------ whole compiles

    def whole(self) -> tuple[Evidence, ir.Model | None] | None:
        """Return the evidence and the result of the same compile, if it is known; dumps and races are always made."""
        if not self._is_repeatable():
            return None
        assert self.store is not None
        for key in self._whole_keys():
            kept = self.store.read(key) if self.is_read else None
            evidence = None if kept is None else _evidence(kept["evidence"])
            if kept is None or evidence is None or not self._agrees(evidence.decisions):
                continue
            model = None if kept["model"] is None else _get(self.store, kept["model"])
            if kept["model"] is None or model is not None:
                self.is_repeated = True
                return evidence, model
        return None

    def keep_whole(self, evidence: Evidence, model: ir.Model | None) -> None:
        """Keep the evidence and, when all held, the result of a compile."""
        if self.store is None:
            return
        if self._is_repeatable():
            ref = None if model is None else _put(self.store, model)
            if ref is not None or model is None:
                plain = evidence.model_dump(mode="json")
                self.store.write(self._whole_keys()[0], {"evidence": plain, "model": ref})
        self.store.trim()

    def _is_repeatable(self) -> bool:
        request = self._request
        if self.store is None or request is None:
            return False
        return request.dump is None and not request.measure and request.spec.gates.measured_seconds is None

    def _whole_keys(self) -> list[str]:
        assert self._request is not None
        keys = [provenance.compile_key(self._base, self._request, locked) for locked in self._lockings("")]
        return list(dict.fromkeys(keys))

    # ------------------------------------------------------------------------------------------ steps

    def find(self, index: int, step: Pass, state: str) -> Kept | None:
        """Return what the cache knows of a step on the graph of that digest."""
        if self.store is None or self._request is None:
            return None
        for key in self._step_keys(index, step, state) if self.is_read and state else ():
            found = self.store.read(key)
            kept = None if found is None else _kept(found)
            if kept is None or not self._agrees(kept.decisions, step_name(index, step) + "/"):
                continue
            undumped = self._request.dump is not None and kept.after is None  # its graph is wanted, and not kept
            if not undumped and (kept.after is None or _holds(self.store, kept.after)):
                self.hits += 1
                return kept
        self.misses += 1
        return None

    def keep(self, index: int, step: Pass, state: str, kept: Kept) -> None:
        """Keep what a step led to; state: as for `find`, nothing where that graph could not be kept."""
        if self.store is None or self._request is None or not state:
            return
        plain = {**vars(kept), "record": kept.record.model_dump(mode="json"), "decisions": dict(kept.decisions)}
        self.store.write(self._step_keys(index, step, state)[0], plain)

    def _step_keys(self, index: int, step: Pass, state: str) -> list[str]:
        lockings = self._lockings(step_name(index, step) + "/")
        return [provenance.step_key(self._base, state, index, step, locked) for locked in lockings]

    def _lockings(self, prefix: str) -> list[dict[str, str]]:
        """Return the decisions that are locked, and none: the same ones may have been made freely."""
        locked = {key: value for key, value in (self._locked or {}).items() if key.startswith(prefix)}
        return [locked, {}] if locked else [{}]

    def _agrees(self, decisions: Mapping[str, str], prefix: str = "") -> bool:
        locked = None if self._locked is None else {k: v for k, v in self._locked.items() if k.startswith(prefix)}
        return locked is None or locked == dict(decisions)

    # ------------------------------------------------------------------------------------------ graphs

    def keep_graph(self, model: ir.Model) -> dict[str, Any] | None:
        """Keep a graph; return what finds it again, or None when it does not read back as it is."""
        return None if self.store is None else _put(self.store, model)

    def graph_of(self, ref: dict[str, Any]) -> ir.Model:
        """Return a graph that was kept. Raises LostError."""
        model = None if self.store is None else _get(self.store, ref)
        if model is None:
            raise LostError
        return model

    def lose(self) -> None:
        """Read no more: what was found could not be used."""
        self.is_read = self.is_repeated = False
        self.hits = self.misses = 0

    @property
    def notes(self) -> list[str]:
        """Return what the store has to tell."""
        return [] if self.store is None else self.store.notes


def digest_of(ref: dict[str, Any]) -> str:
    """Return the digest of a graph that was kept."""
    return key_of("graph", ref)


def _put(store: Store, model: ir.Model) -> dict[str, Any] | None:
    proto, weights = onnx_io.to_proto(model)
    try:
        message = proto.SerializeToString(deterministic=True)
    except ValueError:  # protobuf refuses 2 GiB
        return None
    ref = {"message": store.put(message), "weights": {}}
    ref["weights"] = {name: store.put(files.bytes_of(tensor)) for name, tensor in weights.items()}
    twin = _get(store, ref)
    if twin is None or onnx_io.to_proto(twin)[0].SerializeToString(deterministic=True) != message:
        return None
    return ref


def _get(store: Store, ref: dict[str, Any]) -> ir.Model | None:
    message = store.get(ref["message"])
    contents = {name: store.get(digest) for name, digest in ref["weights"].items()}
    if message is None or None in contents.values():
        return None
    proto = onnx.ModelProto.FromString(message)
    weights = {}
    for tensor in proto.graph.initializer:
        if (content := contents.get(tensor.name)) is not None:
            weights[tensor.name] = files.array_of(tensor, ir.DataType(tensor.data_type), content)
    try:
        return onnx_io.from_proto(proto, weights)[0]
    except ModelError:
        return None


def _holds(store: Store, ref: dict[str, Any]) -> bool:
    return all(store.holds(digest) for digest in (ref["message"], *ref["weights"].values()))


def _kept(found: dict[str, Any]) -> Kept | None:
    try:
        record = StepRecord.model_validate(found["record"])
    except ValidationError:
        return None
    return Kept(record, tuple(found["notes"]), found["decisions"], found["seconds"], found["after"])


def _evidence(plain: dict[str, Any]) -> Evidence | None:
    try:
        return Evidence.model_validate(plain)
    except ValidationError:
        return None


def default_folder() -> Path:
    """Return where results are kept unless told: $CCOMPILE_CACHE, or the user's cache folder."""
    import platformdirs

    return Path(os.environ.get(FOLDER) or platformdirs.user_cache_dir("ccompile"))


def open_store(folder: Path | None = None) -> Store:
    """Return the store in a folder, or the default one. Raises CcompileError: a limit that is no number."""
    given = os.environ.get(GIGABYTES, "")
    try:
        limit = round(float(given) * 1e9) if given else LIMIT
    except (ValueError, OverflowError):
        limit = -1
    if limit < 0:
        raise CcompileError(f"`{given}` is no number of gigabytes", GIGABYTES, "Write it as 4 or 0.5.")
    return Store(folder or default_folder(), limit)
