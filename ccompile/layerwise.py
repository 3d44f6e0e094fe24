"""What passes share that change one linear layer after the other, fitted to calibration data: splits and codes.

Layers are changed in topological order, each fitted on the inputs that the graph so far makes to the outputs of the
graph before the step; layers behind the first one that are not changed themselves are refitted on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from ccompile import fitting, graph
from ccompile.analysis import linear
from ccompile.core import Array, Chain, Choice, Compression, Kind, Site, Skip, View
from ccompile.fitting import Metric, Was
from ccompile.moments import Layer

Data = tuple[Was, Chain]  # what a layer was, and the walk that tells what has come to it


class Layerwise(Compression):
    """Options that all such passes share."""

    kind: ClassVar[Kind] = "lossy"

    statistics: Literal["calibration", "weights"] = Field(
        "calibration", description="fit to calibration data, or, without any, in the metric of the weights alone"
    )
    ridge: float | None = Field(
        None, ge=0, le=1, description="ridge of all fits, relative to each column's variance; by default as samples ask"
    )
    refit: bool = Field(
        True, description="refit the layers behind the first that changes which do not change themselves"
    )
    sensitivity: bool = Field(True, description="for a budget, measure what each layer's error does to the outputs")

    def wanted(self, name: str) -> float | None:
        """Return the strength that the options give a layer, if any."""
        raise NotImplementedError

    def _form(self, view: View, site: Site) -> Layer:
        form = linear.layer(graph.node_named(view.graph, site.nodes[0]))
        assert isinstance(form, Layer)
        return form

    def _forms(self, view: View) -> list[Layer]:
        """Return the layers that may be changed, of the graph as it came in."""

        def forms() -> list[Layer]:
            return [self._form(view, site) for site in self.sites(view) if isinstance(site, Site)]

        return view.once(("forms", self.pass_name()), forms)

    def _metrics(self, view: View, form: Layer) -> list[Metric]:
        """Return W and H of each group of a layer as the graph came in."""

        def compute() -> list[Metric]:
            W = linear.matrix(graph.node_named(view.graph, form.name), form)
            if self.statistics == "weights":
                return [Metric(group, None, float(np.square(group).sum())) for group in W]
            view.calibration("Give `data.calibration`, or the step `statistics: weights`.")
            return fitting.metrics(view.observe(self._forms(view))[form.name], W, self.ridge)

        return view.once(("metrics", form.name, self.ridge, self.statistics), compute)

    def _allowed(self, site: Site, choices: Sequence[Choice]) -> Sequence[Choice]:
        """Return the choices that a budget has: what the options give a layer, or all."""
        if self.wanted(site.nodes[0]) is None:
            return choices
        picked = self.pick(site, choices)
        return [picked if isinstance(picked, Choice) else choices[0]]

    def _reserve(self, sites: Sequence[Site], what: str, view: View) -> float:
        """Return what biases may cost that fits give to layers without."""
        if self.statistics == "weights":
            return 0.0
        names = fitting.forms(view.model) if self.refit else [site.nodes[0] for site in sites]
        return fitting.biases(view.model, names, what)

    def _impose(self, model: ir.Model, form: Layer, What: Array, view: View) -> None:
        """Give a layer a weight, and the bias that keeps its mean output."""
        node = graph.node_named(model.graph, form.name)
        bias = None
        if self.statistics == "calibration" and form.op != "MatMul":
            old = linear.bias(node, form)
            assert old is not None
            mean = view.observe(self._forms(view))[form.name].mean_x
            bias = old + np.einsum("god,gd->go", linear.matrix(node, form) - What, mean)
        linear.store(node, form, What, bias)

    def _walk(
        self,
        plan: Sequence[tuple[Site, Choice]],
        change: Callable[[ir.Node, Site, Choice, Data | None], Site],
        view: View,
    ) -> list[Site]:
        """Change the layers of a plan, and refit those behind, in topological order."""
        chosen = {site.nodes[0]: (site, choice) for site, choice in plan}
        was, before = fitting.forms(view.model), graph.copy(view.model)
        chain = view.calibration().chain(view.model, before) if self.statistics == "calibration" else None
        found: list[Site] = []
        for node in list(view.graph):
            name = str(node.name)
            if name in chosen:
                view.tell(f"{len(found) + 1}/{len(chosen)} layers")
                found.append(change(node, *chosen[name], None if chain is None else (was[name], chain)))
            elif found and chain is not None and self.refit and name in was:
                fitting.refit_node(node, was[name], chain, self.ridge)
        return found


def spared(site: Site, choice: Choice) -> Choice | Skip:
    """Return a budget's choice; strength 0 leaves the layer alone."""
    return choice if choice.strength else Skip(site.nodes[0], "the budget leaves it whole")
