"""Nine famous nets as the onnx package ships them: opset 9, initializers as inputs, weights made by ConstantOfShape."""

from __future__ import annotations

import collections
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from ccompile import onnx_io, spec
from ccompile.pipeline import compile_model
from ccompile.request import Request

if TYPE_CHECKING:
    import onnx_ir as ir

    from ccompile.evidence import Evidence

FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
NAMES = (
    "vgg19 bvlc_alexnet zfnet512 densenet121 inception_v1 inception_v2 resnet50 shufflenet squeezenet".split()
)  # slowest first
SPEC = """
version: 1
data: {verification: {synthetic: {distribution: uniform}, samples: 1}}
passes: [tidy-graph, fold-batchnorm]
"""
PRUNE = """
version: 1
data:
  calibration: {synthetic: {distribution: uniform}, samples: 3}
  verification: {synthetic: {distribution: uniform}, samples: 1}
passes: [tidy-graph, fold-batchnorm, prune-channels: {keep: 0.9, tolerance: {relative_l2: 1.0e+9}}]
"""
# what of each net cannot be pruned, by reason, and how many groups are cut; the others take minutes of linear algebra
PRUNED = {
    "shufflenet": (12, {"all channels of `` stand and fall together": 4, "it normalises over them": 1}),
    "squeezenet": (14, {"it normalises over them": 1}),
    "inception_v1": (33, {"it mixes neighbouring channels": 2, "it normalises over them": 1}),
}


def compiled(path: Path, folder: Path, text: str = SPEC) -> tuple[ir.Model, Evidence]:
    request = Request(path, spec.parse(text), folder / "out.onnx", threads=1)
    evidence = compile_model(request)
    return onnx_io.load(request.output).model, evidence


def check(source: Path, folder: Path) -> collections.Counter[str]:
    """Compile; every contract must hold on fewer nodes. Return the ops left."""
    model, evidence = compiled(source, folder)
    assert evidence.verdict == "ok"
    assert [step.verdict for step in evidence.steps] == ["kept", "kept"]
    assert evidence.final is not None
    assert all(output.elements and not output.problem for output in evidence.final.outputs)
    ops = collections.Counter(node.op_type for node in model.graph)
    before = onnx_io.load(source).model.graph
    assert sum(ops.values()) < len(before)
    assert not {"Dropout", "Identity"} & ops.keys()
    return ops


def with_random_weights(source: Path) -> onnx.ModelProto:
    """Every ConstantOfShape becomes a seeded tensor: constant weights would hide a wrong order of channels."""
    rng = np.random.default_rng(0)
    proto = onnx.load(source)
    shapes = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    made = {n.output[0]: shapes[n.input[0]] for n in proto.graph.node if n.op_type == "ConstantOfShape"}
    positive = {
        name for n in proto.graph.node if n.op_type == "BatchNormalization" for name in (n.input[1], n.input[4])
    }
    kept = [node for node in proto.graph.node if node.op_type != "ConstantOfShape"]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    for name, shape in made.items():
        scale = np.sqrt(2 / max(np.prod(shape[1:]), 1)) if len(shape) > 1 else 0.1
        array = rng.uniform(0.5, 1.5, shape) if name in positive else scale * rng.standard_normal(shape)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    for node in proto.graph.node:
        if node.op_type == "Softmax":  # random logits are large: it would give one 1, whatever they are
            node.op_type = "Identity"
            del node.attribute[:]
    proto.ir_version = max(proto.ir_version, 4)
    return proto


@pytest.mark.parametrize("name", NAMES)
def test_a_famous_net_keeps_every_contract(name: str, tmp_path: Path) -> None:
    check(FOLDER / f"light_{name}.onnx", tmp_path)


@pytest.mark.parametrize("name", ["densenet121", "inception_v2", "resnet50", "shufflenet"])
def test_batchnorms_next_to_convolutions_fold_at_any_weights(name: str, tmp_path: Path) -> None:
    (tmp_path / "in.onnx").write_bytes(with_random_weights(FOLDER / f"light_{name}.onnx").SerializeToString())
    ops = check(tmp_path / "in.onnx", tmp_path)
    # densenet normalises what it concatenates: 62 of its 121 read no convolution, or one that is read elsewhere
    assert ops["BatchNormalization"] == (62 if name == "densenet121" else 0)


@pytest.mark.parametrize("name", PRUNED)
def test_a_famous_net_loses_a_tenth_of_its_channels_or_says_why_not(name: str, tmp_path: Path) -> None:
    model, evidence = compiled(FOLDER / f"light_{name}.onnx", tmp_path, PRUNE)
    assert evidence.verdict == "ok", evidence.reason
    tidied, step = evidence.steps[1], evidence.steps[2]
    assert onnx_io.check(model) == ""
    assert step.cost is not None
    assert tidied.cost is not None
    assert step.cost.params < 0.96 * tidied.cost.params
    assert step.cost.macs < 0.96 * tidied.cost.macs
    cut, left = PRUNED[name]
    assert len(step.applied) == cut
    assert all(site.nodes and " units kept" in site.note for site in step.applied)
    reasons = collections.Counter(
        re.sub("`[^`]*`", "``", skip.reason).removeprefix("group ``: ") for skip in step.skipped
    )
    assert {reason: count for reason, count in reasons.items() if not reason.endswith("units stay")} == left
