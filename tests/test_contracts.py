"""What every pass owes, over a small zoo: signature, contract, untouched input, determinism, an honest report."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import builders
import driver
import numpy as np
import pytest

from ccompile import graph, onnx_io, registry, spec

if TYPE_CHECKING:
    import onnx_ir as ir

    from ccompile.core import Pass

# The options that a pass needs: a line per pass whose defaults are not enough to do something.
OPTIONS: dict[str, dict[str, object]] = {
    "allocate": {"budget": {"params": 0.8}, "among": ["prune-channels", "split-svd"]},
    "binarize-weights": {},
    "cluster-vectors": {"bits": 4, "size": 2},
    "cluster-weights": {"bits": 3},
    "encode-weights": {},
    "fold-batchnorm": {},
    "lower-fft": {"select": "always", "min_kernel": 3},
    "lower-winograd": {"select": "always"},
    "fuse-activations": {"select": "always"},
    "lower-conv1d": {"select": "always"},
    "lower-pool": {},
    "merge-linear": {},
    "merge-neurons": {"amount": 0.3},
    "prune-channels": {"keep": 0.5},
    "prune-weights": {"keep": 0.3},
    "quantize-activations": {"where": "everywhere"},
    "quantize-weights": {"bits": 4},
    "repair": {},
    "replace-pool": {},
    "share-hashed": {"keep": 0.1},
    "split-basis": {"keep": 0.6},
    "split-biclusters": {"rank": 1, "inputs": 1},
    "split-colour": {"rank": 2},
    "split-cp": {"rank": 2},
    "split-separable": {"keep": 0.6},
    "split-spatial": {"keep": 0.6},
    "split-svd": {"keep": 0.6},
    "split-tucker": {"keep": 0.6},
    "tidy-graph": {},
}
# Passes that find nothing to do in a net of the zoo; every other pair must act, or the net tests nothing.
IDLE = {
    "binarize-weights": {"capturing", "half", "quantised", "shared_weights", "upsampling"},
    "cluster-vectors": {"capturing", "half", "open", "quantised", "shared_weights", "upsampling"},
    "cluster-weights": {"capturing", "half", "quantised", "shared_weights", "upsampling"},
    "replace-pool": set(builders.ZOO),
    "share-hashed": {"capturing", "half", "open", "quantised", "shared_weights", "upsampling"},
    "prune-weights": {"capturing", "half", "quantised", "shared_weights", "upsampling"},
    "quantize-weights": {"capturing", "half", "quantised", "shared_weights", "upsampling"},
    "split-biclusters": {"mlp", "quantised", "shared_weights", "transformer", "upsampling"},
    "split-colour": set(builders.ZOO) - {"conv_bn", "grouped", "residual", "open"},
    "allocate": {"shared_weights"},
    "encode-weights": set(builders.ZOO),  # none has few values: tests/passes/encode_weights.txt
    "fold-batchnorm": {"mlp", "residual", "shared_weights", "capturing", "transformer", "quantised"},
    "lower-fft": set(builders.ZOO) - {"conv_bn", "grouped", "residual"},
    "lower-winograd": set(builders.ZOO) - {"conv_bn", "grouped", "residual"},
    "fuse-activations": set(builders.ZOO),  # the transformer's opset has no Gelu
    "lower-conv1d": set(builders.ZOO),
    "lower-pool": set(builders.ZOO),
    "merge-linear": set(builders.ZOO),
    "merge-neurons": set(builders.ZOO) - {"mlp", "residual", "open"},
    "prune-channels": {"shared_weights", "capturing", "quantised"},
    "quantize-activations": {"half"},
    "repair": set(builders.ZOO),  # it has the source before it: tests/test_repair.py damages it first
    "split-basis": set(builders.ZOO) - {"conv_bn", "grouped", "residual", "open"},
    "split-cp": set(builders.ZOO) - {"conv_bn", "grouped", "residual", "open"},
    "split-separable": set(builders.ZOO) - {"conv_bn", "grouped", "residual", "open"},
    "split-spatial": set(builders.ZOO) - {"conv_bn", "grouped", "residual", "open"},
    "split-svd": {"shared_weights", "upsampling"},
    "split-tucker": set(builders.ZOO) - {"conv_bn", "grouped", "residual", "open"},
    "tidy-graph": set(builders.ZOO) - {"open", "transformer"},
}
PASSES = sorted(registry.passes())
PAIRS = [(name, net) for name in PASSES for net in builders.ZOO]


def step_of(name: str) -> Pass:
    assert name in OPTIONS, f"give `{name}` a line in OPTIONS of {__file__}"
    return registry.passes()[name].model_validate(OPTIONS[name])


@functools.cache
def model_of(net: str) -> ir.Model:
    return builders.ZOO[net](3)


@functools.cache
def run_of(name: str, net: str) -> driver.Bench:
    return driver.run_step(step_of(name), model_of(net), seed=5)


def bytes_of(model: ir.Model) -> bytes:
    found: bytes = driver.proto_of(model).SerializeToString(deterministic=True)
    return found


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_has_options_here(name: str) -> None:
    assert step_of(name).pass_name() == name
    assert name in IDLE, f"say in which nets `{name}` has nothing to do"


@pytest.mark.parametrize(("name", "net"), PAIRS)
def test_the_contract_holds(name: str, net: str) -> None:
    record = run_of(name, net).record
    assert record.verdict == "kept", record.reason
    assert record.against_previous is not None
    assert all(output.elements for output in record.against_previous.outputs)


@pytest.mark.parametrize(("name", "net"), PAIRS)
def test_the_pass_acts_where_it_is_known_to(name: str, net: str) -> None:
    assert bool(run_of(name, net).record.applied) == (net not in IDLE.get(name, ()))


@pytest.mark.parametrize(("name", "net"), PAIRS)
def test_the_signature_is_kept(name: str, net: str) -> None:
    assert graph.signature(run_of(name, net).model) == graph.signature(model_of(net))


@pytest.mark.parametrize(("name", "net"), PAIRS)
def test_the_checker_accepts_the_result(name: str, net: str) -> None:
    assert onnx_io.check(run_of(name, net).model) == ""


@pytest.mark.parametrize(("name", "net"), PAIRS)
def test_the_graph_that_came_in_is_untouched(name: str, net: str) -> None:
    model = builders.ZOO[net](3)
    before = bytes_of(model)
    held = {key: value.const_value for key, value in model.graph.initializers.items()}
    driver.run_step(step_of(name), model, seed=5)
    assert bytes_of(model) == before
    assert {key: value.const_value for key, value in model.graph.initializers.items()} == held


@pytest.mark.parametrize(("name", "net"), PAIRS)
def test_new_weights_are_read_only(name: str, net: str) -> None:
    for value in run_of(name, net).model.graph.initializers.values():
        assert value.const_value is not None
        assert not np.asarray(value.const_value.numpy()).flags.writeable, value.name


@pytest.mark.parametrize(("name", "net"), PAIRS)
def test_the_same_seed_gives_the_same_bytes(name: str, net: str) -> None:
    again = driver.run_step(step_of(name), builders.ZOO[net](3), seed=5)
    assert bytes_of(again.model) == bytes_of(run_of(name, net).model)
    assert again.record == run_of(name, net).record


@pytest.mark.parametrize(("name", "net"), [pair for pair in PAIRS if registry.passes()[pair[0]].kind == "exact"])
def test_an_exact_pass_has_nothing_left_to_do(name: str, net: str) -> None:
    first = run_of(name, net)
    again = driver.run_step(step_of(name), first.model, seed=5)
    assert again.record.applied == ()
    assert bytes_of(again.model) == bytes_of(first.model)


@pytest.mark.parametrize("name", PASSES)
def test_options_survive_yaml(name: str) -> None:
    given: dict[str, object] = {
        **OPTIONS[name],
        "only": ["fc*", {"op": "Conv", "where": "groups > 1"}],
        "skip": ["fc2"],
        "tolerance": {"atol": 0.5, "rtol": 1e-3},
        "on_violation": "revert",
    }
    step = registry.passes()[name].model_validate(given)
    text = f"version: 1\npasses:\n{spec.dump_step(step)}"
    assert spec.parse(text).passes == (step,)


@pytest.mark.parametrize(("name", "net"), PAIRS)
def test_names_are_unique(name: str, net: str) -> None:
    main = run_of(name, net).model.graph
    nodes = [node.name for node in main]
    made = [str(output.name) for node in main.all_nodes() for output in node.outputs if output.name]
    values = [str(value.name) for value in main.inputs] + list(main.initializers) + made
    assert all(nodes)
    assert len(set(nodes)) == len(nodes)
    assert len(set(values)) == len(values)
    assert all(value.name == key for key, value in main.initializers.items())


@pytest.mark.parametrize(("name", "net"), PAIRS)
def test_the_report_names_what_exists(name: str, net: str) -> None:
    run = run_of(name, net)
    assert run.result is not None
    nodes = [{str(node.name) for node in model.graph} for model in (model_of(net), run.model)]
    values = [graph.names(model.graph) for model in (model_of(net), run.model)]
    for site in run.result.applied:
        assert site.note, site
        assert set(site.nodes) <= nodes[0] | nodes[1]
        assert not site.output or site.output in values[1], site
        assert not site.input or site.input in values[0] & values[1], site
        if site.bound is not None:
            assert set(site.nodes) <= nodes[1]
            assert site.input
            assert site.output in values[0]
    for skip in run.result.skipped:
        assert skip.node in nodes[1], skip
        assert skip.reason, skip


@pytest.mark.parametrize(("name", "net"), PAIRS)
def test_every_stated_bound_is_measured(name: str, net: str) -> None:
    for site in run_of(name, net).record.applied:
        assert (site.bound is None) == (site.measured is None), site


@pytest.mark.parametrize(("name", "net"), PAIRS)
def test_nodes_named_by_skip_are_left_alone(name: str, net: str) -> None:
    step = registry.passes()[name].model_validate({**OPTIONS[name], "skip": ["*"]})
    run = driver.run_step(step, model_of(net), seed=5)
    assert all(not site.nodes for site in run.record.applied)
    assert [(n.name, n.op_type) for n in run.model.graph] == [(n.name, n.op_type) for n in model_of(net).graph]
