"""What split-basis and split-separable share: a few kernels per input channel, and a 1 x 1 convolution behind them."""

from __future__ import annotations

import pytest
from builders import Net
from calibrated import skips
from convolutions import assert_budget_met, conv, split

from ccompile.passes.split_basis import SplitBasis
from ccompile.passes.split_separable import SplitSeparable
from ccompile.splitting import Split

KINDS: list[type[Split]] = [SplitBasis, SplitSeparable]


@pytest.mark.parametrize("kind", KINDS)
def test_all_stages_run_behind_the_stride(kind: type[Split]) -> None:
    run = split(kind, conv((16, 8, 3, 3), (8, 8), strides=[2, 2], pads=[1] * 4), rank=2)
    macs = {node.name: node.macs for node in run.price(run.model).nodes}
    assert macs == {"conv/D": 2 * 8 * 9 * 16, "conv/P": 16 * 2 * 8 * 16}


@pytest.mark.parametrize("what", ["macs", "params"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_is_met(kind: type[Split], what: str) -> None:
    assert_budget_met(kind, what)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_layers_are_no_sites_and_pointwise_ones_are_left_to_split_svd(kind: type[Split]) -> None:
    net = Net(0)
    x = net.conv(net.input("x", ["N", 6, 1, 1]), "point", (12, 6, 1, 1))
    model = net.model(net.dense(net.node("Flatten", x), "fc", 12, 12))
    run = split(kind, model, rank=1)
    assert not run.record.applied
    assert skips(run) == {"point": "its kernel has one tap: split-svd splits it"}
