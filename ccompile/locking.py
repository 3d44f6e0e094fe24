"""The lock of a build: what it was made of, every choice that was made, and the digest of what came out.

A build that is held to its lock fails before any work when something else would go into it, repeats the decisions that
times made, and fails when other bytes come out. It is YAML, to be kept beside the spec and read in reviews.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml
from pydantic import Field, ValidationError

from ccompile import __version__, provenance
from ccompile.errors import ContractError, Problem, SpecError
from ccompile.evidence import Evidence, FileRecord, versions
from ccompile.record import Record

if TYPE_CHECKING:
    from ccompile.data import Data, DataSet
    from ccompile.request import Request

_HEAD = "# Made by `ccompile --lock`: with `--locked`, a build fails when anything here has moved.\n"


class Part(Record):
    """One thing that goes in: what it is called, and its SHA-256."""

    name: str
    digest: str


class Inputs(Record):
    """All that a result depends on. metrics: SHA-256 of the task metrics' own source, nothing without metrics."""

    source: Part
    spec: Part
    target: Part
    calibration: Part | None
    verification: Part
    metrics: str = ""
    seed: int
    threads: int
    ccompile: Part
    libraries: dict[str, str]

    @classmethod
    def of(cls, request: Request, source: str, data: Data) -> Inputs:
        """Return what a compile depends on; source: digest of the model."""
        spec = request.spec
        libraries = {name: version for name, version in versions().items() if name not in ("ccompile", "python")}
        return cls(
            source=Part(name=request.model.name, digest=source),
            spec=Part(name=Path(spec.name).name, digest=spec.digest),
            target=Part(name=spec.target.name, digest=provenance.target_digest(request)),
            calibration=None if data.calibration is None else _part(data.calibration),
            verification=_part(data.verification),
            metrics=provenance.metric_digest(request) if spec.gates.metric else "",
            seed=request.seed,
            threads=request.threads,
            ccompile=Part(name=__version__, digest=provenance.tool_digest()),
            libraries=libraries,
        )


class Choice(Record):
    """What a step did: its verdict, and what it chose at each site, by node."""

    step: str
    verdict: str
    sites: dict[str, str] = Field({})


class Lock(Record):
    """A lock file. decisions: what times decided, which another machine or another day would decide otherwise."""

    lock: Literal[1] = 1
    output: Part
    inputs: Inputs
    decisions: dict[str, str] = Field({})
    steps: tuple[Choice, ...] = ()

    @classmethod
    def of(cls, inputs: Inputs, evidence: Evidence) -> Lock:
        """Return the lock of a build that held."""
        assert evidence.output is not None
        steps = tuple(
            Choice(
                step=f"{step.index:02d}-{step.name}",
                verdict=step.verdict,
                sites={", ".join(site.nodes): site.note for site in step.applied},
            )
            for step in evidence.steps
        )
        output = Part(name=evidence.output.name, digest=evidence.output.digest)
        return cls(output=output, inputs=inputs, decisions=evidence.decisions, steps=steps)

    def text(self) -> str:
        """Return the YAML text."""
        plain = self.model_dump(mode="json")
        return _HEAD + yaml.safe_dump(plain, sort_keys=False, width=120, allow_unicode=True)


def read(path: Path) -> Lock:
    """Return the lock in a file. Raises SpecError when it is missing, damaged or of another version."""
    try:
        return Lock.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        hint = "Make it by compiling with `--lock` once."
        raise SpecError(f"cannot read the lock: {error.strerror}", str(path), hint) from error
    except (yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
        raise SpecError(
            f"not a lock: {str(error).splitlines()[0]}", str(path), "Make it anew with `--lock`."
        ) from error


def check_inputs(lock: Lock, now: Inputs, where: str) -> None:
    """Raise ContractError with everything that has moved since the lock was made."""
    hint = "Undo that, or accept it by compiling with `--lock` instead of `--locked`."
    problems = [Problem(moved, where, hint) for moved in _moved(lock.inputs, now)]
    if problems:
        *others, last = problems
        raise ContractError.of([*(Problem(problem.message, where) for problem in others), last])


def check_output(lock: Lock, output: FileRecord, where: str) -> None:
    """Raise ContractError when other bytes came out of the same inputs."""
    if output.digest != lock.output.digest:
        moved = f"the same inputs gave other bytes: SHA-256 {output.digest[:12]}, locked {lock.output.digest[:12]}"
        hint = "Another processor rounds differently: compile where the lock was made, or lock anew."
        raise ContractError(moved, where, hint)


def _part(data: DataSet) -> Part:
    return Part(name=data.source, digest=data.digest)


def _moved(then: Inputs, now: Inputs) -> Iterator[str]:
    for what in ("source", "spec", "target", "calibration", "verification", "ccompile"):
        old, new = getattr(then, what), getattr(now, what)
        if (old and old.digest) != (new and new.digest):
            called = {"source": "the model", "ccompile": "ccompile"}.get(what, f"the {what}")
            data = " data" if what in ("calibration", "verification") else ""
            yield f"{called}{data} has moved: {_told(new)}, locked {_told(old)}"
    if then.metrics != now.metrics:
        yield "the source of the task metrics has moved"
    for what in ("seed", "threads"):
        if getattr(then, what) != getattr(now, what):
            yield f"`{what}` has moved: {getattr(now, what)}, locked {getattr(then, what)}"
    yield from _versions_moved(then.libraries, now.libraries)


def _versions_moved(then: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            yield f"{name} has moved: {now.get(name, 'none')}, locked {then.get(name, 'none')}"


def _told(part: Part | None) -> str:
    return "none" if part is None else f"{part.name} ({part.digest[:12]})"
