"""A kernel whose outer taps are zero becomes smaller, and computes the same at every border."""

from typing import Any

import numpy as np
import pytest
from builders import Net

from ccompile import graph, runtime
from ccompile.cropping import crop
from ccompile.runtime import Settings


def cropped(taps: tuple[slice, slice], **attributes: Any) -> tuple[str, tuple[int, ...]]:
    """Crop a 5 x 5 kernel that is zero but for `taps`; fail unless outputs stay; return what it says and the kernel."""
    net, rng = Net(0), np.random.default_rng(0)
    weight = np.zeros((4, 3, 5, 5), np.float32)
    weight[:, :, *taps] = rng.standard_normal(weight[:, :, *taps].shape)
    y = net.node("Conv", net.input("x", ["N", 3, "H", "W"]), net.constant(weight, "w"), name="conv", **attributes)
    before = net.model(y)
    after = graph.copy(before)
    said = crop(graph.node_named(after.graph, "conv"))
    feeds = {"x": rng.standard_normal((2, 3, 11, 13)).astype(np.float32)}
    (expected,), (found,) = (list(runtime.Session(model, Settings()).run(feeds).values()) for model in (before, after))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    kept = graph.static_shape(graph.node_named(after.graph, "conv").inputs[1])
    assert kept is not None
    return said, kept[2:]


@pytest.mark.parametrize("stride", [1, 2])
def test_a_ring_of_zeros_goes(stride: int) -> None:
    said, kernel = cropped((slice(1, 4), slice(1, 4)), pads=[2, 2, 2, 2], strides=[stride, stride])
    assert kernel == (3, 3)
    assert said == "kernel 5x5 cropped to 3x3"


def test_one_side_goes_alone() -> None:
    assert cropped((slice(0, 3), slice(0, 5)), pads=[2, 2, 2, 2])[1] == (3, 5)


def test_taps_go_only_as_far_as_there_are_pads_to_take_off() -> None:
    assert cropped((slice(2, 3), slice(2, 3)), pads=[1, 0, 2, 0])[1] == (2, 5)


def test_dilated_taps_take_their_reach_off_the_pads() -> None:
    assert cropped((slice(1, 5), slice(1, 5)), pads=[3, 1, 4, 4], dilations=[2, 2])[1] == (4, 5)


def test_a_kernel_of_zeros_keeps_a_tap() -> None:
    assert cropped((slice(0, 0), slice(0, 0)), pads=[4, 4, 4, 4])[1] == (1, 1)


def test_automatic_pads_are_left_alone() -> None:
    assert cropped((slice(1, 4), slice(1, 4)), auto_pad="SAME_UPPER") == ("", (5, 5))
