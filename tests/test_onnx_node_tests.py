"""The ONNX standard's own node tests, rewritten: every operator that the runtime has, in models not written for us.

Each case goes through tidy-graph and fold-batchnorm twice: as it is given (all operands are graph inputs), and stored
(all operands are initializers, and the outputs pass one more node), where nearly everything folds.
"""

from __future__ import annotations

import collections
import functools
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from ccompile import graph, onnx_io, runtime
from ccompile.comparison import compare
from ccompile.core import PassResult, Rewrite, View
from ccompile.errors import ModelError
from ccompile.passes.fold_batchnorm import FoldBatchnorm
from ccompile.passes.tidy_graph import TidyGraph
from ccompile.target import load_target

if TYPE_CHECKING:
    import onnx_ir as ir

    from ccompile.runtime import Feeds, Outputs

CHUNKS = 16
LEAST = 94  # cases that each chunk must have compared; 1,884 cases in onnx 1.23, onnxruntime 1.32 runs about 1,740
SETTINGS = runtime.Settings(threads=1)
STEPS: tuple[Rewrite, ...] = (TidyGraph(), FoldBatchnorm())
REFUSED = dict.fromkeys(("test_not_2d", "test_not_3d", "test_not_4d"), "opset 1 is outside")
RANDOM: frozenset[str] = frozenset()
# Where takes these: FLOAT, UINT8, INT32, INT64, STRING, DOUBLE
_SELECTED = (1, 2, 6, 7, 8, 11)


@functools.cache
def cases() -> tuple[Any, ...]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return tuple(sorted(collect_testcases(None), key=lambda case: str(case.name)))


def feeds_of(case: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, onnx.TensorProto):
            return onnx.numpy_helper.to_array(value)
        return np.asarray(value) if isinstance(value, np.generic) else value

    given = case.data_sets[0][0]
    return {entry.name: plain(value) for entry, value in zip(case.model.graph.input, given, strict=False)}


def given(case: Any) -> tuple[onnx.ModelProto, dict[str, Any]]:
    proto = onnx.ModelProto()
    proto.CopyFrom(case.model)
    return proto, feeds_of(case)


def stored(case: Any) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Tensor inputs become initializers; outputs pass Where(c, y, y), so that what makes them is no graph output."""
    proto, feeds = given(case)
    proto.ir_version = max(proto.ir_version, 4)
    main = proto.graph
    constant = {name for name, value in feeds.items() if isinstance(value, np.ndarray) and value.dtype != object}
    main.initializer.extend(onnx.numpy_helper.from_array(feeds.pop(name), name) for name in sorted(constant))
    kept = [entry for entry in main.input if entry.name not in constant]
    del main.input[:]
    main.input.extend(kept)
    outputs = {o.name: f"{o.name}/before" for o in main.output if o.type.tensor_type.elem_type in _SELECTED}
    if outputs and {entry.domain: entry.version for entry in proto.opset_import}.get("", 0) >= 9:
        for node in main.node:
            for field in (node.input, node.output):
                field[:] = [outputs.get(name, name) for name in field]
        main.node.extend(onnx.helper.make_node("Where", ["c", old, old], [new]) for new, old in outputs.items())
        main.input.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []))
        feeds["c"] = np.array(True)
    return proto, feeds


def differences(mine: Outputs, theirs: Outputs) -> dict[str, list[str]]:
    """What is more than float reordering; nothing differs between outputs that are empty or not finite."""
    found = compare([mine], [theirs], 1)
    return {name: broken for name, broken in found.exact_violations().items() if name not in found.unjudged}


def rewritten(model: ir.Model, step: Rewrite) -> tuple[ir.Model, PassResult]:
    """As the pipeline does it."""
    copy = graph.copy(model)
    view = View(copy, target(), np.random.default_rng(0), step, graph.facts, evaluate)
    result = step.run(view)
    graph.remove_dead(copy.graph)
    graph.name_nodes(copy.graph)
    return copy, result


@functools.cache
def target() -> Any:
    return load_target("generic-cpu", Path())


def evaluate(values: Any) -> Any:
    return runtime.evaluate(values, SETTINGS)


def in_bytes(model: ir.Model) -> bytes:
    proto, weights = onnx_io.to_proto(model)
    shell: bytes = proto.SerializeToString(deterministic=True)
    return shell + b"".join(weight.tobytes() for weight in weights.values())


def faults(model: ir.Model, feeds: Feeds, wanted: Outputs, folder: Path) -> list[str]:
    """Rewrite with every step, and return all that went wrong."""
    found = []
    accepted, before = not onnx_io.check(model), in_bytes(model)
    if wrong := differences(runtime.Session(model, SETTINGS).run(feeds), wanted):
        found.append(f"loading it changes the outputs: {wrong}")
    current = model
    for step in STEPS:
        name, was = step.pass_name(), in_bytes(current)
        after, result = rewritten(current, step)
        if in_bytes(current) != was:
            found.append(f"{name} touched its input")
        if graph.signature(after) != graph.signature(model):
            found.append(f"{name} changed the signature to {graph.signature(after)}")
        if accepted and (complaint := onnx_io.check(after)):
            found.append(f"{name}: the checker says {complaint}")
        if wrong := differences(runtime.Session(after, SETTINGS).run(feeds), wanted):
            found.append(f"{name}: {wrong}, by {[site.note for site in result.applied]}")
        again, second = rewritten(after, step)
        if second.applied or in_bytes(again) != in_bytes(after):
            found.append(f"{name} is not idempotent: {second.applied}")
        current = after
    if in_bytes(model) != before:
        found.append("the source was touched")
    onnx_io.save(current, folder / "out.onnx")
    back = onnx_io.load(folder / "out.onnx").model
    if in_bytes(back) != in_bytes(current) or graph.signature(back) != graph.signature(model):
        found.append("it does not survive save and load")
    if wrong := differences(runtime.run_file(folder / "out.onnx", feeds, SETTINGS), wanted):
        found.append(f"the file written gives {wrong}")
    return found


def verdict(proto: onnx.ModelProto, feeds: Feeds, folder: Path) -> tuple[str, Any]:
    """Return ran, refused, random, failed or `the runtime cannot`, and what there is to say about it."""
    path = folder / "in.onnx"
    path.write_bytes(proto.SerializeToString())
    try:
        wanted = runtime.run_file(path, feeds, SETTINGS)
        twice = runtime.run_file(path, feeds, SETTINGS)
    except ModelError as error:
        return "the runtime cannot", str(error)
    if differences(twice, wanted):
        return "random", ""
    try:
        model = onnx_io.load(path).model
    except ModelError as error:
        return "refused", str(error)
    found = faults(model, feeds, wanted, folder)
    return ("failed" if found else "ran"), found


def judge_chunk(chunk: int, form: Any) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    with tempfile.TemporaryDirectory() as folder, np.errstate(all="ignore"):
        for case in cases()[chunk::CHUNKS]:
            proto, feeds = form(case)
            kind, detail = verdict(proto, feeds, Path(folder))
            found[kind][case.name] = detail
    return found


@pytest.mark.parametrize("form", [given, stored], ids=["given", "stored"])
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_the_standards_node_tests_keep_their_outputs(chunk: int, form: Any) -> None:
    found = judge_chunk(chunk, form)
    assert not found["failed"], "\n".join(f"{name}: {detail}" for name, detail in found["failed"].items())
    mine = {case.name for case in cases()[chunk::CHUNKS]}
    assert {name: found["refused"].get(name) for name in REFUSED.keys() & mine} == found["refused"]
    assert all(REFUSED[name] in reason for name, reason in found["refused"].items())
    assert set(found["random"]) == RANDOM & mine
    assert len(found["ran"]) >= LEAST


def test_the_chunks_compare_1500_cases_or_more() -> None:
    assert CHUNKS * LEAST >= 1500
    assert {case.name for chunk in range(CHUNKS) for case in cases()[chunk::CHUNKS]} == {c.name for c in cases()}


def test_a_rewrite_that_changes_an_output_would_be_noticed(tmp_path: Path) -> None:
    case = next(case for case in cases() if case.name == "test_abs")
    proto, feeds = given(case)
    wanted = {"y": case.data_sets[0][1][0] + 1e-3}
    assert faults(onnx_io.from_proto(proto)[0], feeds, wanted, tmp_path)
