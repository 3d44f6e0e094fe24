"""Where activations forget, and that fits use it."""

from __future__ import annotations

import driver
import numpy as np
import pytest
from calibrated import calibration, feeds, layers, outputs, set_weight, weight

from ccompile import fitting, graph
from ccompile.analysis import saturation
from ccompile.stats import Rows, Sight

HEAD = (
    "g (float[N,6] x) => (float[N,3] z) <float[6,4] w, float[4] b, float[4,3] v, float low = {0.5}, float high = {2}> "
)
ENDS = {
    "Relu": ("[a] h = Relu(y)", (0.0, np.inf)),
    "both": ("[a] h = Clip(y, low, high)", (0.5, 2.0)),
    "low": ("[a] h = Clip(y, low)", (0.5, np.inf)),
    "none": ("[a] h = Clip(y)", None),
    "smooth": ("[a] h = Sigmoid(y)", None),
    "seen": ("[a] h0 = Relu(y) [s] h = Add(h0, y)", None),
}


@pytest.mark.parametrize("name", ENDS)
def test_limits_are_those_of_the_only_reader(name: str) -> None:
    text, limits = ENDS[name]
    model, _ = driver.model_of(HEAD + "{ [fc] y = Gemm(x, w, b) " + text + " [out] z = MatMul(h, v) }")
    assert saturation.limits(graph.node_named(model.graph, "fc").outputs[0]) == limits


def test_targets_move_only_where_nothing_is_seen() -> None:
    sight = Sight((0.0, np.inf), np.eye(3)[None], np.zeros((1, 3)))
    made = np.array([[[-2.0, 1.0, -3.0]]])
    targets, left = sight.targets(Rows(made, np.array([[[-1.0, -5.0, 4.0]]]), np.zeros(1), 1))
    assert targets.tolist() == [[[-2.0, 0.0, 4.0]]]
    assert left == 1.0 + 16.0


def test_a_refit_loses_less_behind_the_activation_than_the_plain_one() -> None:
    text = HEAD + "{ [fc] y = Gemm(x, w, b) [a] h = Relu(y) [out] z = MatMul(h, v) }"
    source, _ = driver.model_of(text)
    damaged = graph.copy(source)
    mixed = weight(damaged, "fc")
    mixed[5] = 0  # one input is no longer read
    set_weight(damaged, "fc", mixed)
    batches = feeds(source, (300, 300))
    for batch in batches:
        batch["x"][:, 5] = np.maximum(batch["x"][:, 0], 0) + 0.5 * batch["x"][:, 5] ** 2  # not linear in the others
    found = []
    for sights in (0, fitting.SIGHTS):
        model = graph.copy(damaged)
        node = graph.node_named(model.graph, "fc")
        for batch in batches:
            batch["x"] = batch["x"].astype(np.float32)
        stats = calibration(source, batches, seed=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fitting, "SIGHTS", sights)
            was = fitting.Was(layers(source)["fc"])
            # the columns that are left: the sixth input is dead for the fit
            moved = [dict(batch, x=batch["x"] * np.array([1, 1, 1, 1, 1, 0], np.float32)) for batch in batches]
            chain = stats.chain(model, source)
            chain.current.live = type(chain.current.live)()
            for batch in moved:
                chain.current.live.append(batch)
            fitting.refit_node(node, was, chain, 0.0)
        wanted = [np.maximum(outputs(source, batch, "y")["y"], 0) for batch in batches]
        made = [np.maximum(outputs(model, batch, "y")["y"], 0) for batch in moved]
        found.append(sum(float(np.square(a - b).sum()) for a, b in zip(made, wanted, strict=True)))
    assert found[1] < 0.99 * found[0]
