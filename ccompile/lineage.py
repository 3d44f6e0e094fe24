"""What became of each node: the graphs before and after each step, and the parts of them around a site.

Evidence holds the source's graph and how each step changed it; everything here follows from names alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property

from ccompile.evidence import Evidence, SiteRecord
from ccompile.snapshots import ChangeRecord, NodeRecord

CENTRE, AROUND = 12, 6  # nodes shown of a site, and of what is next to it


@dataclass(frozen=True)
class Net:
    """A graph as the evidence records it: nodes by name, in the order in which they came to be."""

    nodes: Mapping[str, NodeRecord]

    @cached_property
    def makers(self) -> Mapping[str, str]:
        """Return the node that makes each value."""
        return {value: node.name for node in self.nodes.values() for value in node.makes}

    @cached_property
    def readers(self) -> Mapping[str, Sequence[str]]:
        """Return the nodes that read each value."""
        found: dict[str, list[str]] = {}
        for node in self.nodes.values():
            for value in node.reads:
                found.setdefault(value, []).append(node.name)
        return found

    def sources(self, name: str) -> list[str]:
        """Return the nodes whose values a node reads."""
        return [self.makers[value] for value in self.nodes[name].reads if value in self.makers]

    def followers(self, name: str) -> list[str]:
        """Return the nodes that read what a node makes."""
        return [reader for value in self.nodes[name].makes for reader in self.readers.get(value, ())]

    def changed(self, change: ChangeRecord) -> Net:
        """Return the graph after a change."""
        gone = set(change.removed)
        kept = {name: node for name, node in self.nodes.items() if name not in gone}
        return Net(kept | {node.name: node for node in change.changed})


@dataclass(frozen=True)
class Shown:
    """One node in a drawing; `touched` where the pass acted: it made, changed or removed it."""

    node: NodeRecord
    touched: bool


@dataclass(frozen=True)
class Piece:
    """The parts of the graphs before and after a step that surround one site."""

    before: tuple[Shown, ...] = ()
    after: tuple[Shown, ...] = ()


@dataclass(frozen=True)
class Stage:
    """The graphs before and after one step; `claims`: which site of the step names a node."""

    before: Net
    after: Net
    removed: frozenset[str] = frozenset()
    touched: frozenset[str] = frozenset()
    claims: Mapping[str, int] = field(default_factory=dict)

    @property
    def new(self) -> frozenset[str]:
        """Return the names that the graph before did not have."""
        return frozenset(name for name in self.touched if name not in self.before.nodes)

    def piece(self, index: int, site: SiteRecord) -> Piece:
        """Return what is around the site of that number: its nodes, what went and came beside them, and context."""
        before = [name for name in site.nodes if name in self.before.nodes]
        maker = self.before.makers.get(site.output)
        if maker is not None and (maker in self.removed or not before):
            before.append(maker)
        before = self._grown(self.before, before, self.removed, {index})
        after = [name for name in site.nodes if name in self.after.nodes]
        after += [self.after.makers[v] for n in before for v in self.before.nodes[n].makes if v in self.after.makers]
        owners = {index, *(self.claims[name] for name in after if name in self.claims)}
        if not after:  # a node that is gone: what read it
            after = [name for n in before for name in self.before.followers(n) if name in self.after.nodes]
        after = self._grown(self.after, after, self.new, owners)
        acted = self.touched | self.removed | set(site.nodes)
        return Piece(_shown(self.before, before, acted), _shown(self.after, after, acted))

    def _grown(self, net: Net, seeds: Iterable[str], among: frozenset[str], owners: set[int]) -> list[str]:
        """Return seeds and the nodes of `among` that hang together with them and belong to no site but the owners."""
        found = dict.fromkeys(seeds)
        queue = list(found)
        while queue and len(found) < CENTRE:
            name = queue.pop(0)
            for other in (*net.sources(name), *net.followers(name)):
                if other in among and other not in found and self._belongs(other, owners):
                    found[other] = None
                    queue.append(other)
        return list(found)[:CENTRE]

    def _belongs(self, name: str, owners: set[int]) -> bool:
        """Return whether no other site names the node, or what makes its values now."""
        node = self.before.nodes.get(name)
        heirs = () if node is None else (self.after.makers.get(value, "") for value in node.makes)
        return all(self.claims[one] in owners for one in (name, *heirs) if one in self.claims)


def _shown(net: Net, centre: Sequence[str], touched: Set[str]) -> tuple[Shown, ...]:
    """Return nodes, those that they read from, and those that read them; what has no weights is looked through once."""
    inside = set(centre)
    above = [name for node in centre for name in net.sources(node)]
    below = [name for node in centre for name in net.followers(node)]
    below += [name for node in below if not net.nodes[node].weights for name in net.followers(node)]
    around = [list(dict.fromkeys(name for name in names if name not in inside))[:AROUND] for names in (above, below)]
    found = dict.fromkeys((*around[0], *centre, *around[1]))
    return tuple(Shown(net.nodes[name], name in touched and name in inside) for name in found)


def stages_of(evidence: Evidence) -> list[Stage]:
    """Return the graphs around each step, up to the first that is not recorded; undone steps lead nowhere."""
    net = Net({node.name: node for node in evidence.graph})
    found = []
    for step in evidence.steps:
        if step.change is None or not net.nodes:
            break
        after = net.changed(step.change)
        claims = {name: index for index, site in reversed(list(enumerate(step.applied))) for name in site.nodes}
        touched = frozenset(node.name for node in step.change.changed)
        found.append(Stage(net, after, frozenset(step.change.removed), touched, claims))
        if step.verdict in ("kept", "weakened"):
            net = after
    return found


def origins_of(evidence: Evidence, stages: Sequence[Stage]) -> dict[str, str]:
    """Return the source node that each node of the result came of; a node of no source node is its own.

    What makes a value takes after the node that made it before; what feeds it alone after what it feeds.
    """
    origin = {node.name: node.name for node in evidence.graph}
    for step, stage in zip(evidence.steps, stages, strict=False):
        if step.change is None or step.verdict not in ("kept", "weakened"):
            continue
        new = stage.new
        for name in reversed([node.name for node in step.change.changed if node.name in new]):
            before = [stage.before.makers.get(value, "") for value in stage.after.nodes[name].makes]
            heirs = [*before, *stage.after.followers(name), *stage.after.sources(name)]
            origin[name] = next((origin[heir] for heir in heirs if heir in origin), name)
    return origin
