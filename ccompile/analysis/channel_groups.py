"""Groups of channels as facts, and how the records of a walk become such."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from ccompile.analysis.channel_flow import Flow, Role, compressed, flat, varying
from ccompile.core import Array, Skip


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one constant that carries channels of a group.

    `value` is what input `input` of `node` reads: stored, or behind ops that graph.constant sees through.
    role: producer, rows of a linear weight or its bias; consumer, columns of a linear weight that contracts the
    channels; through, whatever follows them (normalisation parameters, broadcast constants, depthwise weights).
    unit[position along axis]: the unit's number in the group, -1 where the position belongs to no unit of it.
    """

    value: str
    node: str
    input: int
    axis: int
    role: Role
    unit: Array


@dataclass(frozen=True, eq=False)
class Size:
    """Numbers of a node that count channels; `unit` as in Member, along the axis that they count.

    now[index] counts it (Reshape, Expand and Resize targets, Split sizes, Conv's `group`, GroupNormalization's
    `num_groups`), except: Slice, now = (start, end) of its `index`-th axis, `unit` along its input; Pad, now = (begin,
    end) of its `index`-th axis, `unit` along its output; Gather, now = indices, `unit` along its input.
    """

    node: str
    index: int
    now: tuple[int, ...]
    unit: Array


@dataclass(frozen=True, eq=False)
class Carrier:
    """One axis of an activation along which channels of a group run; `unit` as in Member."""

    value: str
    axis: int
    unit: Array


@dataclass(frozen=True, eq=False)
class Group:
    """Units that share tensors; a unit is the least set of channels that can be removed alone.

    A group with `pinned` must not be touched. Other groups may share its tensors (Concat), in positions of unit -1.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    sizes: tuple[Size, ...]
    carriers: tuple[Carrier, ...]
    pinned: tuple[Skip, ...]

    def by_role(self, role: Role) -> tuple[Member, ...]:
        """Return the members of one role."""
        return tuple(member for member in self.members if member.role == role)

    def parts(self) -> list[Array]:
        """Return the units[n] of each value that has some of them only, as one of those that a Concat joins may."""
        found = [np.unique(carrier.unit[carrier.unit >= 0]) for carrier in self.carriers]
        return list({units.tobytes(): units for units in found if 0 < units.size < self.size}.values())


@dataclass(frozen=True)
class Channels:
    """The groups of a model in topological order of their first producer."""

    groups: tuple[Group, ...]

    def named(self, name: str) -> Group:
        """Return the group of that name. Raises KeyError when there is none."""
        return {group.name: group for group in self.groups}[name]

    @property
    def free(self) -> tuple[Group, ...]:
        """Return the groups that nothing pins."""
        return tuple(group for group in self.groups if not group.pinned)


class Gathering:
    """Turn the records of a walk into groups: units that a producer makes side by side share one."""

    def __init__(self, flow: Flow, unit: Array) -> None:
        self.flow, self.unit = flow, unit
        self.group, self.number, self.sizes = self._label()
        self._lines: dict[tuple[int, int], list[tuple[int, Array]]] = {}
        self._held: list[Array] = []

    def _label(self) -> tuple[Array, Array, Array]:
        """Return each id's group and its unit's number there, and the size of each group, in order of first id."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        starts = np.array([first for first, _ in self.flow.origins], np.int64)
        origin = np.searchsorted(starts, np.arange(self.flow.size), side="right") - 1
        count = int(self.unit.max(initial=-1)) + 1
        total = count + starts.size
        links = coo_array((np.ones(self.flow.size, np.int8), (self.unit, count + origin)), shape=(total, total))
        label = connected_components(links, directed=False)[1][self.unit]
        group = _ranked(label)
        first = np.unique(self.unit, return_index=True)[1]  # of each unit, its first id
        number = np.zeros(count, np.int64)
        sizes = np.zeros(int(group.max(initial=-1)) + 1, np.int64)
        for unit in np.argsort(first, kind="stable"):
            number[unit] = sizes[group[first[unit]]]
            sizes[group[first[unit]]] += 1
        return group, number[self.unit], sizes

    def _line(self, ids: Array, along: int) -> list[tuple[int, Array]]:
        """Return (group, unit per position along one axis) of every group there; none when units do not vary there."""
        key = (id(ids), along % ids.ndim)
        if key not in self._lines:
            self._held.append(ids)
            self._lines[key] = self._computed_line(ids, key[1])
        return self._lines[key]

    def _computed_line(self, ids: Array, along: int) -> list[tuple[int, Array]]:
        units = compressed(self.unit[ids])
        if units.shape[along] == 1:
            return []
        row = flat(ids, [axis for axis in range(ids.ndim) if axis != along]).reshape(-1)
        group, number = self.group[row], self.number[row].astype(np.int32)
        return [(int(g), _frozen(np.where(group == g, number, np.int32(-1)))) for g in np.unique(group)]

    def gather(self) -> Channels:
        """Return the groups."""
        members: dict[int, list[Member]] = defaultdict(list)
        sizes: dict[int, list[Size]] = defaultdict(list)
        carriers: dict[int, list[Carrier]] = defaultdict(list)
        pinned: dict[int, dict[Skip, None]] = defaultdict(dict)
        for read in self.flow.reads:
            for group, unit in self._line(read.ids, read.along):
                found = Member(str(read.value.name), str(read.node.name), read.input, read.axis, read.role, unit)
                members[group].append(found)
        for count in self.flow.counts:
            for group, unit in self._line(count.ids, count.along):
                sizes[group].append(Size(str(count.node.name), count.index, count.now, unit))
        for name, ids in self.flow.values.items():
            for axis in varying(ids):
                for group, unit in self._line(ids, axis):
                    carriers[group].append(Carrier(name, axis, unit))
        for ids, skip in self.flow.pins:
            for group in np.unique(self.group[ids]):
                pinned[int(group)].setdefault(skip)
        names = self._names(members)
        return Channels(
            tuple(
                Group(name, int(self.sizes[g]), tuple(members[g]), tuple(sizes[g]), tuple(carriers[g]), tuple(skips))
                for g, name in names.items()
                if (skips := _reasons(name, members[g], list(pinned[g]))) is not None
            )
        )

    def _names(self, members: dict[int, list[Member]]) -> dict[int, str]:
        """Return the name of each group: its first producer's, else that of the node where it starts."""
        names: dict[int, str] = {}
        for first, node in self.flow.origins:
            group = int(self.group[first])
            if group not in names:
                producer = next((member.node for member in members[group] if member.role == "producer"), node)
                taken = sum(name.split("#")[0] == producer for name in names.values())
                names[group] = f"{producer}#{taken + 1}" if taken else producer
        return names


def _reasons(name: str, members: list[Member], pinned: list[Skip]) -> list[Skip] | None:
    """Return why a group is pinned, nothing when it is not; None when it is no group at all."""
    roles = {member.role for member in members}
    if not members and not pinned:
        return None
    if not pinned and "producer" not in roles:
        return [Skip(name, "no linear layer makes its channels")]
    if not pinned and "consumer" not in roles:
        return [Skip(name, "no linear layer reads its channels")]
    return pinned


def _ranked(label: Array) -> Array:
    """Renumber labels in the order in which they first occur."""
    _, first, inverse = np.unique(label, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _frozen(array: Array) -> Array:
    array.flags.writeable = False
    return array
