"""What the evidence keeps of graphs, weights, and of how far the values inside have moved."""

from __future__ import annotations

import numpy as np
import pytest
from driver import Bench, bench, model_of

from ccompile import drift, runtime, snapshots
from ccompile.core import Site
from ccompile.passes.fold_batchnorm import FoldBatchnorm
from ccompile.passes.split_svd import SplitSvd
from ccompile.passes.tidy_graph import TidyGraph

NET = """
g (float[N, 12] x) => (float[N, 10] y) <float[12, 16] a, float[16, 10] b> {
  h = MatMul(x, a)
  r = Relu(h)
  y = MatMul(r, b)
}
"""


def net(rank: int | None = None) -> Bench:
    """The net, its first layer split at a rank where one is given."""
    model, _ = model_of(NET)
    rng = np.random.default_rng(0)
    run = bench(model, [{"x": rng.standard_normal((16, 12)).astype(np.float32)}])
    if rank is not None:
        options = {"rank": rank, "statistics": "weights", "only": [name_of("h", run)], "tolerance": {"relative_l2": 2}}
        run.step(0, SplitSvd.model_validate(options))
        assert run.record.verdict == "kept"
    return run


def name_of(value: str, run: Bench) -> str:
    return next(str(node.name) for node in run.model.graph if node.outputs[0].name == value)


def drifts(run: Bench) -> dict[str, float]:
    types = (run.origin.types, run.state.types)
    feeds = next(iter(run.feeds()))
    found = drift.drifts(run.source.model, run.state.model, types, feeds, runtime.Settings(1))
    return {str(node.outputs[0].name): found[str(node.name)] for node in run.model.graph if str(node.name) in found}


def test_nodes_say_what_they_read_make_and_which_weights_they_have() -> None:
    first, relu, _ = snapshots.nodes_of(net().model)
    assert (first.op, first.reads, first.makes, first.weights) == ("MatMul", ("x",), ("h",), ("float 12x16",))
    assert (relu.reads, relu.weights) == (("h",), ())


def test_a_large_graph_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    run = net(4)
    monkeypatch.setattr(snapshots, "NODES", 2)
    assert snapshots.nodes_of(run.model) == ()
    assert snapshots.change_of(run.source.model, run.model) is None


def test_a_change_takes_the_graph_before_to_the_graph_after() -> None:
    run = net(4)
    change = run.record.change
    assert change is not None
    was = {node.name: node for node in snapshots.nodes_of(run.source.model)}
    assert set(change.removed) <= was.keys()
    now = {name: node for name, node in was.items() if name not in change.removed}
    now |= {node.name: node for node in change.changed}
    assert now == {node.name: node for node in snapshots.nodes_of(run.model)}
    assert len(change.changed) == 2  # the stages, and no node that stayed as it was


def test_a_step_that_does_nothing_changes_nothing() -> None:
    run = net()
    run.step(0, FoldBatchnorm())
    assert run.record.change == snapshots.ChangeRecord()


def test_drift_begins_where_the_graph_was_changed_and_is_that_of_numpy() -> None:
    run = net(4)
    found = drifts(run)
    x = next(iter(run.feeds()))["x"].astype(np.float64)
    weights = {
        str(v.name): v.const_value.numpy() for v in run.source.model.graph.initializers.values() if v.const_value
    }
    h = x @ weights["a"]
    stages = [value.const_value.numpy() for value in run.model.graph.initializers.values() if value.const_value]
    V, U = (next(w for w in stages if w.shape == shape) for shape in ((12, 4), (4, 16)))
    assert found["h"] == pytest.approx(np.linalg.norm(x @ V @ U - h) / np.linalg.norm(h), rel=1e-4)
    assert found.keys() == {"h", "r", "y"}


def test_an_unchanged_graph_has_no_drift() -> None:
    assert drifts(net()) == {"h": 0, "r": 0, "y": 0}


def test_values_of_another_shape_have_no_drift() -> None:
    run = net()
    types = dict(run.state.types)
    types["h"] = types["y"]
    found = drift.drifts(run.model, run.model, (run.origin.types, types), next(iter(run.feeds())), runtime.Settings(1))
    assert name_of("h", run) not in found
    assert name_of("r", run) in found


def test_a_spectrum_is_that_of_the_matrix() -> None:
    left, right = (np.linalg.qr(np.random.default_rng(s).standard_normal((n, 4)))[0] for s, n in ((0, 30), (1, 9)))
    W = (left * [8, 4, 2, 1]) @ right.T
    record = snapshots.weight_record(W[None], None)
    assert record.shape == (30, 9)
    assert record.ranks == tuple(range(1, 10))
    assert record.spectrum[:4] == (1, 0.5, 0.25, 0.125)
    assert max(record.spectrum[4:]) < 1e-6


def test_shares_count_zeros_and_both_ends() -> None:
    before, after = np.array([[[-2.0, 0.0, 2.0, 2.0]]]), np.array([[[0.0, 0.0, 9.0, 2.0]]])
    record = snapshots.weight_record(before, after)
    middle = snapshots.BINS // 2
    assert (record.before[0], record.before[middle], record.before[-1], record.zeros_before) == (0.25, 0.25, 0.5, 0.25)
    assert (record.after[middle], record.after[-1], record.zeros_after) == (0.5, 0.5, 0.5)
    assert sum(record.before) == sum(record.after) == 1


def test_a_wide_matrix_has_no_spectrum() -> None:
    assert snapshots.weight_record(np.ones((1, 513, 513)), None).spectrum == ()


def test_a_zero_weight_is_recorded() -> None:
    assert snapshots.weight_record(np.zeros((1, 3, 3)), None).spectrum == (0, 0, 0)


def test_weights_are_of_layers_only_and_of_the_first_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    run = net()
    sites = [Site((str(node.name),)) for node in run.model.graph]
    assert [site in snapshots.weights_of(run.model, run.model, sites) for site in sites] == [True, False, True]
    monkeypatch.setattr(snapshots, "WEIGHTS", 1)
    assert len(snapshots.weights_of(run.model, run.model, sites)) == 1


def test_a_lossy_step_records_weights_and_an_exact_one_does_not() -> None:
    assert net(4).record.applied[0].weight is not None
    model, _ = model_of("g (float[N, 12] x) => (float[N, 12] y) { z = Identity(x) y = Relu(z) }")
    run = bench(model)
    run.step(0, TidyGraph())
    assert run.record.applied
    assert all(site.weight is None for site in run.record.applied)
