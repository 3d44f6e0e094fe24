"""What one compile is asked for, and the paths it may write to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ccompile import disk, files
from ccompile.core import Pass
from ccompile.errors import CcompileError
from ccompile.spec import Spec


@dataclass(frozen=True)
class Request:
    """One compile. threads, jobs: 0 means all cores; measure: race the result against the source on this machine.

    locked: decisions of an earlier compile, by key (Evidence.decisions), that are repeated instead of made.
    lock: where the lock of the build goes, or, where it `is_held`, what it is held to; see locking.py.
    """

    model: Path
    spec: Spec
    output: Path
    evidence: Path | None = None
    dump: Path | None = None
    seed: int = 0
    threads: int = 0
    measure: bool = False
    jobs: int = 1
    report: Path | None = None
    junit: Path | None = None
    locked: Mapping[str, str] | None = None
    lock: Path | None = None
    is_held: bool = False
    depfile: Path | None = None

    @property
    def evidence_path(self) -> Path:
        """Return where the evidence goes."""
        return self.evidence or self.output.with_name(self.output.name + ".evidence.json")


def check_paths(request: Request) -> None:
    """Refuse outputs that would destroy an input or each other, or that cannot be written, before any work."""
    try:
        inputs = {path.resolve(): what for path, what in inputs_of(request)}
        taken: dict[Path, str] = {}
        for output, what in _outputs(request):
            real = output.resolve()
            if real in inputs:
                raise CcompileError(f"{what} would overwrite {inputs[real]}", str(output), "Choose another path.")
            if real in taken:
                raise CcompileError(f"{taken[real]} and {what} would be one file", str(output), "Name two.")
            taken[real] = what
            if output.is_dir():
                raise CcompileError(f"{what} is a folder", str(output), "Name a file.")
        for output, what in _files(request):
            if not output.parent.is_dir():
                raise CcompileError(f"the folder of {what} does not exist", str(output.parent), "Make it first.")
            disk.probe(output)
        if request.dump is not None:
            request.dump.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CcompileError(f"cannot write: {error.strerror}", str(error.filename), "Name another path.") from error


def check_external(request: Request, external: Iterable[Path]) -> None:
    """Refuse outputs that would destroy the model's external data, which is known once the model is read."""
    held = list(external)
    for output, what in _outputs(request):
        for data in held:
            if data.resolve() == output.resolve() or files.is_data_of(data, output):
                message = f"{what} would overwrite the model's external data `{data.name}`"
                raise CcompileError(message, str(output), "Choose another path.")


def inputs_of(request: Request) -> Iterable[tuple[Path, str]]:
    """Yield the single files that a compile reads, and what each is."""
    yield request.model, "the model"
    yield Path(request.spec.name), "the spec"
    if request.lock is not None and request.is_held:
        yield request.lock, "the lock"
    if request.spec.target_file is not None:
        yield request.spec.target_file, "the target"
    data, base = request.spec.data, request.spec.data_base or request.spec.base
    for source in (data.calibration, data.verification) if data is not None else ():
        if source is not None and source.npz is not None:
            yield base / source.npz, "the data"
        if source is not None and source.images is not None and source.labels not in (None, "folders"):
            yield base / str(source.labels), "the labels"


def _files(request: Request) -> Iterable[tuple[Path, str]]:
    yield request.output, "the output"
    yield request.evidence_path, "the evidence"
    if request.report is not None:
        yield request.report, "the report"
    if request.junit is not None:
        yield request.junit, "the JUnit file"
    if request.depfile is not None:
        yield request.depfile, "the dependency file"
    if request.lock is not None and not request.is_held:
        yield request.lock, "the lock"


def _outputs(request: Request) -> Iterable[tuple[Path, str]]:
    yield from _files(request)
    if request.dump is not None:
        for index, step in enumerate(request.spec.passes):
            yield request.dump / dump_name(index, step), "a dumped model"


def dump_name(index: int, step: Pass) -> str:
    """Return the file name of the model after a step."""
    return f"{step_name(index, step)}.onnx"


def step_name(index: int, step: Pass) -> str:
    """Return what a step is called in file names and keys of decisions: its number and its pass."""
    return f"{index + 1:02d}-{step.pass_name()}"
