"""Labels of channel positions: which are tied, which are locked, and the groups they form.

A *label* stands for one channel at one place. Labels that were joined can only be removed
together; the joined sets are the connected components of a graph, found once at the end.

Where a view parts the channels of a layer into heads, a channel may go in two ways: with the same
channel of every other head, or with its whole head. So there are two *sides*, on each of which
all labels lie, and are joined alike but at such views: on one the heads are tied there, on the
other the channels of a head. A channel goes if it goes on either.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from compressor.values import ChannelGroup, ChannelSlice, IndexArray, NodeSlice, Reading, Role

CHANNELS, HEADS = 0, 1  # the sides


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


@dataclass(eq=False)
class Parting:
    """A view that parts channels into heads, or into what turns out to be no heads.

    Attributes:
        flat: Labels before it, in the shape that the view gives them.
        channels: Those along the channels of a head, to be broadcast against `flat`.
        heads: Those along heads, likewise.
        is_tied: Whether the parts were taken for no heads: None until that is known.
    """

    flat: IndexArray
    channels: IndexArray
    heads: IndexArray
    is_tied: bool | None = None


@dataclass
class Labels:
    """Every label of a network, in the order they were met.

    Attributes:
        heads: Labels of heads that are worked on one by one.
        weight_nodes: Node of a program, a dimension of its output, the size of that, and the
            dimension of a parameter that runs along it.
    """

    n_labels: int = 0
    joins: list[tuple[IndexArray, IndexArray, int | None]] = field(default_factory=list)
    locks: list[tuple[IndexArray, str, int | None]] = field(default_factory=list)
    slots: dict[tuple[str, int], Slot] = field(default_factory=dict)
    readings: list[tuple[str, int, int, int, IndexArray]] = field(default_factory=list)
    nodes: list[tuple[str, int, IndexArray]] = field(default_factory=list)
    weight_nodes: list[tuple[str, int, int, str, int]] = field(default_factory=list)
    heads: list[IndexArray] = field(default_factory=list)
    partings: list[Parting] = field(default_factory=list)

    def fresh(self, n: int, locked_because: str | None = None) -> IndexArray:
        """`n` new labels."""
        labels = np.arange(self.n_labels, self.n_labels + n)
        self.n_labels += n
        if locked_because is not None:
            self.lock(labels, locked_because)
        return labels

    def join(self, ours: IndexArray, theirs: IndexArray, side: int | None = None) -> None:
        """Ties labels position by position; the arrays broadcast against each other.

        Args:
            ours: Labels.
            theirs: Others.
            side: Where; None is on both sides.
        """
        if ours is not theirs:
            a, b = np.broadcast_arrays(ours, theirs)
            self.joins.append((a.ravel(), b.ravel(), side))

    def untiled(self, labels: IndexArray, size: int) -> IndexArray:
        """`(size,)`, of labels along what `repeat` has put together: its copies are tied."""
        if len(labels) == size:
            return labels
        copies = labels.reshape(-1, size)
        first: IndexArray = copies[0]
        self.join(first, copies)
        return first

    def part(self, flat: IndexArray, channels: IndexArray, heads: IndexArray) -> Parting:
        """Begins a parting; see there."""
        self.join(flat, channels, CHANNELS)
        self.partings.append(Parting(flat, channels, heads))
        return self.partings[-1]

    def settle(self, parting: Parting, *, is_tied: bool) -> None:
        """Ties the parts on both sides, or heads on theirs; the first word counts."""
        if parting.is_tied is None:
            parting.is_tied = is_tied
            self.join(parting.flat, parting.channels if is_tied else parting.heads, HEADS)

    def lock(self, labels: IndexArray, because: str, side: int | None = None) -> None:
        """Labels that may not be removed; the first reason given is the one that is told.

        Args:
            labels: Of channels.
            because: In words.
            side: Where; None is on both sides.
        """
        self.locks.append((labels.ravel(), because, side))

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
        for slot in self.slots.values():
            if slot.name in locked_tensors:
                self.lock(slot.labels, locked_tensors[slot.name])
        for parting in self.partings:
            self.settle(parting, is_tied=False)
        for node, dim, size, name, own_dim in self.weight_nodes:
            placed = self.slots.get((name, own_dim))
            if placed is not None and len(placed.labels) == size:
                self.nodes.append((node, dim, placed.labels))
        found = self._groups_on(CHANNELS)
        if self.heads:
            found += self._groups_on(HEADS)
        return tuple(group for _, group in sorted(found, key=lambda each: each[0]))

    def _groups_on(self, side: int) -> list[tuple[int, ChannelGroup]]:
        """(first slot, group) of one side; of heads, only those that can go."""
        channel_of = self._components(side)
        slots = list(self.slots.values())
        reasons: dict[int, str] = {}
        for labels, because, on_side in self.locks:
            if on_side in (None, side):
                for channel in np.unique(channel_of[labels]).tolist():
                    reasons.setdefault(channel, because)
        positions = _positions([channel_of[slot.labels] for slot in slots])
        if side == HEADS:
            apart = set(channel_of[np.concatenate(self.heads)].tolist()) - reasons.keys()
            positions = {c: places for c, places in positions.items() if c in apart}
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
            number = f"#{n_named[producer]}" if n_named[producer] > 1 else ""
            name = f"{producer}{'#heads' if side == HEADS else ''}{number}"
            readings = tuple(
                Reading(*self.readings[i][:4], index=index)
                for i, index in _common(channels, read_at)
            )
            nodes = tuple(
                NodeSlice(*self.nodes[i][:2], len(self.nodes[i][2]), index)
                for i, index in _common(channels, found_in)
            )
            locked = next((reasons[c] for c in channels if c in reasons), None)
            group = ChannelGroup(name, len(channels), slices, locked, readings, nodes)
            groups.append((signature[0][0], group))
        return groups

    def _components(self, side: int) -> IndexArray:
        """`(n_labels,)`: which joined set each label is in, on one side."""
        joins = [(a, b) for a, b, where in self.joins if where in (None, side)]
        if not joins:
            return np.arange(self.n_labels)
        ours, theirs = (np.concatenate(end) for end in zip(*joins, strict=True))
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
