"""Labels of channel positions: which are tied, which are locked, and the groups they form.

A *label* stands for one channel at one place. Labels that were joined can only be removed
together; the joined sets are the connected components of a graph, found once at the end.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from compressor.values import ChannelGroup, ChannelSlice, IndexArray, NodeSlice, Reading, Role


@dataclass
class Slot:
    """One dimension of one parameter or buffer, and the labels along it."""

    name: str
    dim: int
    role: Role
    labels: IndexArray
    shape: tuple[int, ...]
    macs_per_number: int = 0
    is_parameter: bool = True


@dataclass
class Labels:
    """Every label of a network, in the order they were met."""

    n_labels: int = 0
    joins: list[tuple[IndexArray, IndexArray]] = field(default_factory=list)
    locks: list[tuple[IndexArray, str]] = field(default_factory=list)
    slots: dict[tuple[str, int], Slot] = field(default_factory=dict)
    readings: list[tuple[str, int, int, int, IndexArray]] = field(default_factory=list)
    nodes: list[tuple[str, int, IndexArray]] = field(default_factory=list)

    def fresh(self, n: int, locked_because: str | None = None) -> IndexArray:
        """`n` new labels."""
        labels = np.arange(self.n_labels, self.n_labels + n)
        self.n_labels += n
        if locked_because is not None:
            self.lock(labels, locked_because)
        return labels

    def join(self, ours: IndexArray, theirs: IndexArray) -> None:
        """Ties labels position by position; the arrays broadcast against each other."""
        if ours is not theirs:
            a, b = np.broadcast_arrays(ours, theirs)
            self.joins.append((a.ravel(), b.ravel()))

    def lock(self, labels: IndexArray, because: str) -> None:
        """Labels that may not be removed; the first reason given is the one that is told."""
        self.locks.append((labels.ravel(), because))

    def place(
        self, name: str, dim: int, shape: tuple[int, ...], role: Role, labels: IndexArray
    ) -> Slot:
        """Says that `labels` run along `dim` of the tensor `name`; a second time ties both."""
        slot = self.slots.setdefault((name, dim), Slot(name, dim, role, labels, shape))
        self.join(slot.labels, labels)
        return slot

    def groups(self, locked_tensors: dict[str, str]) -> tuple[ChannelGroup, ...]:
        """Channels (joined labels) that lie in the same tensors, each set one group.

        Args:
            locked_tensors: Tensor name -> why it must stay as it is.
        """
        channel_of = self._components()
        slots = list(self.slots.values())
        for slot in slots:
            if slot.name in locked_tensors:
                self.lock(slot.labels, locked_tensors[slot.name])
        reasons: dict[int, str] = {}
        for labels, because in self.locks:
            for channel in np.unique(channel_of[labels]).tolist():
                reasons.setdefault(channel, because)
        positions = _positions([channel_of[slot.labels] for slot in slots])
        alike: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
        for channel, places in positions.items():
            alike[tuple((slot, len(where)) for slot, where in places.items())].append(channel)
        read_at = _positions([channel_of[labels] for *_, labels in self.readings])
        found_in = _positions([channel_of[labels] for *_, labels in self.nodes])

        groups = []
        n_named: dict[str, int] = defaultdict(int)
        for signature, channels in alike.items():
            slices = tuple(
                _slice(slots[s], np.array([positions[c][s] for c in channels]))
                for s, _ in signature
            )
            producer = next((s.module for s in slices if s.role is Role.PRODUCER), None)
            if producer is None:
                continue  # the model's input and other tensors that nothing here produces
            n_named[producer] += 1
            name = producer if n_named[producer] == 1 else f"{producer}#{n_named[producer]}"
            readings = tuple(
                Reading(*self.readings[i][:4], index=index)
                for i, index in _common(channels, read_at)
            )
            nodes = tuple(
                NodeSlice(*self.nodes[i][:2], index=index)
                for i, index in _common(channels, found_in)
            )
            locked = next((reasons[c] for c in channels if c in reasons), None)
            groups.append(ChannelGroup(name, len(channels), slices, locked, readings, nodes))
        return tuple(groups)

    def _components(self) -> IndexArray:
        """`(n_labels,)`: which joined set each label is in."""
        if not self.joins:
            return np.arange(self.n_labels)
        ours, theirs = (np.concatenate(side) for side in zip(*self.joins, strict=True))
        edges = coo_array((np.ones(len(ours), dtype=bool), (ours, theirs)), (self.n_labels,) * 2)
        return np.asarray(connected_components(edges, directed=False)[1], dtype=np.int64)


def _slice(slot: Slot, index: IndexArray) -> ChannelSlice:
    module, _, tensor = slot.name.rpartition(".")
    n_numbers = int(np.prod(slot.shape)) // slot.shape[slot.dim] * index.shape[1]
    return ChannelSlice(
        module, tensor, slot.dim, slot.role, index,
        params=n_numbers * slot.is_parameter, macs=n_numbers * slot.macs_per_number,
    )  # fmt: skip


def _positions(places: Sequence[IndexArray]) -> dict[int, dict[int, list[int]]]:
    """Channel -> place -> the positions where it lies, for channels along every place."""
    found: dict[int, dict[int, list[int]]] = defaultdict(dict)
    for place, channels in enumerate(places):
        for position, channel in enumerate(channels.tolist()):
            found[channel].setdefault(place, []).append(position)
    return found


def _common(
    channels: Sequence[int], positions: dict[int, dict[int, list[int]]]
) -> list[tuple[int, IndexArray]]:
    """(place, index) for every place where some of `channels` lie, alike or not."""
    rows: dict[int, list[list[int]]] = defaultdict(list)
    for channel in channels:
        for place in positions.get(channel, {}):
            rows[place].append(positions[channel][place])
    found = []
    for place in sorted(rows):
        per_channel = [positions.get(c, {}).get(place, []) for c in channels]
        widest = max(map(len, per_channel))
        found.append((place, np.array([r + [-1] * (widest - len(r)) for r in per_channel])))
    return found
