"""Whether a file is the one that was compiled, from the source and the spec that are claimed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from ccompile.cases import Case
from ccompile.evidence import Evidence, FileRecord
from ccompile.identity import structure
from ccompile.onnx_io import Source
from ccompile.prints import Fingerprint, InitializerRecord
from ccompile.spec import Spec

_SHOWN = 3  # of many things that differ


def artifact_cases(model: Source, evidence: Evidence, recorded: Fingerprint) -> Iterator[Case]:
    """Yield cases of the file's bytes, its weights by name, and its nodes; no tolerance passes what differs."""
    assert evidence.output is not None
    now = FileRecord.of(evidence.output.name, model.path, next(iter(model.external), None))
    then = evidence.output
    grown = f"{now.bytes:,} bytes, {then.bytes:,} recorded"
    yield Case("artifact", "size", "broken" if now.bytes > then.bytes else "holds", grown)
    said = f"SHA-256 {now.digest[:12]}, {then.digest[:12]} recorded"
    yield Case("artifact", "file", "holds" if now.digest == then.digest else "broken", said)
    initializers = model.model.graph.initializers.values()
    changed = changed_weights([InitializerRecord.of(value) for value in initializers], recorded.weights)
    listed = "; ".join(changed[:_SHOWN]) + (f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else "")
    yield Case(
        "artifact", "weights", "broken" if changed else "holds", listed or f"{len(recorded.weights)} as recorded"
    )
    same = structure(model.model) == recorded.structure
    yield Case("artifact", "nodes", "holds" if same else "broken", _counted(model.model, evidence, same))


def changed_weights(now: Sequence[InitializerRecord], then: Sequence[InitializerRecord]) -> list[str]:
    """Return, in words, which initializers differ and by how much they moved."""
    mine, theirs = ({weight.name: weight for weight in weights} for weights in (now, then))
    found = [f"`{name}` is gone" for name in theirs if name not in mine]
    found += [f"`{name}` is new" for name in mine if name not in theirs]
    return found + [_moved(mine[name], old) for name, old in theirs.items() if name in mine and mine[name] != old]


def _moved(now: InitializerRecord, then: InitializerRecord) -> str:
    if now.kind != then.kind:
        return f"`{now.name}` is {now.kind}, recorded {then.kind}"
    if now.norm is None or then.norm is None or now.largest is None or then.largest is None:
        return f"`{now.name}` has other values"
    if abs(now.norm - then.norm) <= 1e-6 * then.norm:
        return f"`{now.name}` has other values of the same norm {now.norm:.6g}"
    sizes = f"|w| is {now.norm:.6g}, recorded {then.norm:.6g}; largest {now.largest:.6g}, was {then.largest:.6g}"
    return f"`{now.name}`: {sizes}"


def _counted(model: ir.Model, evidence: Evidence, same: bool) -> str:
    if same:
        return f"{len(model.graph)} as recorded"
    ops: dict[str, int] = {}
    for node in model.graph:
        ops[node.op_type] = ops.get(node.op_type, 0) + 1
    then: Mapping[str, int] = evidence.result.ops if evidence.result is not None else {}
    kinds = [op for op in sorted({*ops, *then}) if ops.get(op, 0) != then.get(op, 0)] if then else []
    listed = ", ".join(f"{ops.get(op, 0)} {op} instead of {then.get(op, 0)}" for op in kinds[:_SHOWN])
    return listed or "attributes, names or the interface are not those recorded"


def build_cases(model: ir.Model, evidence: Evidence, spec: Spec | None, source: Source | None) -> Iterator[Case]:
    """Yield whether spec and source are those of the evidence: as given, or as the model file says itself."""
    given = spec.digest if spec is not None else None
    yield _built("spec", evidence.spec, model.metadata_props.get("ccompile.spec"), given)
    given = source.digest if source is not None else None
    yield _built("source", evidence.source, model.metadata_props.get("ccompile.source"), given)


def _built(what: str, recorded: FileRecord, written: str | None, given: str | None) -> Case:
    if written is not None and written != recorded.digest:
        detail = (
            f"the model says that its {what} was {written[:12]}, the evidence {recorded.digest[:12]} ({recorded.name})"
        )
        return Case("build", what, "broken", detail, "Compile again, or give the evidence of that build.")
    if given is not None and given != recorded.digest:
        detail = f"the {what} given is {given[:12]}, the evidence is of {recorded.digest[:12]} ({recorded.name})"
        return Case("build", what, "broken", detail, f"Compile again, or give the {what} of that build.")
    if written is None and given is None:
        return Case("build", what, "not judged", f"the model does not say which {what} it was compiled from")
    return Case("build", what, "holds", f"{recorded.digest[:12]} ({recorded.name})")
