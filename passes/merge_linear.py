"""Merge linear layers that follow each other, or that are summed, into one, and pool where there is least to do.

W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2), for products and for convolutions, an AveragePool being one, too;
W1 x + W2 x = (W1 + W2) x, for a convolution and another, a BatchNormalization or its input.  A 1 x 1 convolution and a
pooling whose weights sum to one change places.  All only where fewer multiply-adds are left: not around a bottleneck.

Fires:  Conv - Conv, Conv - AveragePool, Gemm/MatMul [- Add] - Gemm/MatMul, read by nothing else; Conv 1x1 -
        AveragePool or GlobalAveragePool; Add, Sum of a Conv and a Conv, a BatchNormalization or what they read.
        What is second may pad only where the first has one tap and no bias.
Error:  float rounding: computed in float64, stored in the weight's type.
Cost:   conv3x3 - AveragePool2 36 -> 16 multiply-adds per pair of channels and output position, conv1x1 - AveragePool2
        4 -> 1, RepVGG's branches 10 -> 9. Weights may grow (3 x 3 to 4 x 4).
Source: Ding et al. 2021, arXiv:2103.13425 and arXiv:2101.03697, section 3.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ccompile import graph, merging, merging_products
from ccompile.core import Kind, PassResult, Rewrite, Site, Skip, View

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

_RULES: dict[str, Callable[[ir.Node, View], Site | str]] = {
    **dict.fromkeys(("Conv", *merging.POOLS), merging.behind),
    **dict.fromkeys(merging.SUMS, merging.summed),
    **dict.fromkeys(merging_products.PRODUCTS, merging_products.multiplied),
}


class MergeLinear(Rewrite):
    """Options of merge-linear: those that every step takes."""

    kind: ClassVar[Kind] = "exact"

    def run(self, view: View) -> PassResult:
        """Merge until nothing merges; a layer that could, but stays, is a Skip."""
        applied: list[Site] = []
        while True:
            skipped: list[Skip] = []
            site = _first(view, skipped)
            if site is None:
                return PassResult(tuple(applied), tuple(skipped))
            applied.append(site)
            graph.remove_dead(view.graph)
            view.changed()


def _first(view: View, skipped: list[Skip]) -> Site | None:
    """Carry out the first merge that can be; collect why others cannot."""
    for node in view.graph:
        if node.op_type not in _RULES or node.domain not in ("", "ai.onnx"):
            continue
        found = _RULES[node.op_type](node, view)
        if isinstance(found, Site):
            return found
        if found:
            skipped.append(Skip(str(node.name), found))
    return None
