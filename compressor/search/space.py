"""What a search may choose: one width per free channel group, on the target's step.

A step is not a refinement. On AVX-512 two 3x3 convolutions take 0.63 ms with 48 channels, 0.91 ms
with 49, 1.29 ms with 63 and 1.04 ms with 64 (`benchmarks/staircase.py`): plans off the step are
not even considered.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compressor.errors import GraphError
from compressor.values import ChannelGroup, Plan

Widths = tuple[int, ...]  # one per free group, in the order of `SearchSpace.groups`
Ratios = npt.NDArray[np.float64]  # (..., n_groups), width / n_channels, in (0, 1]


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """The free groups, their scores, and the widths each may have.

    Attributes:
        groups: Groups that are not locked, in graph order.
        scores: One importance score per channel of each group.
        choices: Allowed widths of each group, ascending; the last is the original width.
    """

    groups: tuple[ChannelGroup, ...]
    scores: tuple[npt.NDArray[np.float64], ...]
    choices: tuple[Widths, ...]

    @property
    def n_channels(self) -> npt.NDArray[np.int64]:
        """`(n_groups,)` original widths."""
        return np.array([group.n_channels for group in self.groups])

    @property
    def original(self) -> Widths:
        """Every group whole."""
        return tuple(choice[-1] for choice in self.choices)

    @property
    def narrowest(self) -> Widths:
        """Every group at its floor."""
        return tuple(choice[0] for choice in self.choices)

    def snap(self, ratios: Ratios) -> list[Widths]:
        """The plans nearest to `ratios`, `(n_plans, n_groups)`; a tie goes to the narrower."""
        columns = []
        for choice, n, column in zip(self.choices, self.n_channels, ratios.T, strict=True):
            widths = np.array(choice)
            middles = (widths[:-1] + widths[1:]) / 2
            columns.append(widths[np.searchsorted(middles, column * n)])
        return [tuple(row) for row in np.stack(columns, axis=1).tolist()]

    def ratios(self, widths: Sequence[Widths]) -> Ratios:
        """`(n_plans, n_groups)` keep ratios that the widths really have."""
        return np.array(widths, dtype=np.float64).reshape(-1, len(self.groups)) / self.n_channels

    def neighbours(self, widths: Widths) -> list[Widths]:
        """Every plan that differs from `widths` by one step of one group."""
        found = []
        for i, choice in enumerate(self.choices):
            at = choice.index(widths[i])
            for near in (at - 1, at + 1):
                if 0 <= near < len(choice):
                    found.append((*widths[:i], choice[near], *widths[i + 1 :]))
        return found

    def plan(self, widths: Widths) -> Plan:
        """The `widths[i]` highest-scored channels of every group, in their old order."""
        kept = {}
        for group, scores, width in zip(self.groups, self.scores, widths, strict=True):
            best = np.argsort(-scores, kind="stable")[:width]
            kept[group.name] = tuple(sorted(best.tolist()))
        return Plan(kept)

    def by_name(self, widths: Widths) -> dict[str, int]:
        """Group name -> width."""
        return {group.name: width for group, width in zip(self.groups, widths, strict=True)}

    def from_names(self, widths: Mapping[str, int]) -> Widths:
        """The inverse of `by_name`."""
        return tuple(widths[group.name] for group in self.groups)


def make_space(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, npt.NDArray[np.float64]],
    *,
    step: int,
    min_keep_ratio: float,
) -> SearchSpace:
    """The search space over the groups that are not locked.

    Args:
        groups: From `graph.channel_groups`.
        scores: Group name -> `(n_channels,)` importance.
        step: Widths are its multiples, in positions of the producer where a channel stands for
            several; the original width stays allowed off-step.
        min_keep_ratio: In [0, 1]; no group goes below this share of its channels, nor below
            one step.

    Raises:
        GraphError: Every group is locked, or too narrow to lose a step; says why.
    """
    choices = {}
    for group in groups:
        if group.locked_because is None:
            floor = min_keep_ratio * group.n_channels
            own_step = step // math.gcd(step, group.unit)
            multiples = range(own_step, group.n_channels, own_step)
            widths = (*(w for w in multiples if w >= floor), group.n_channels)
            if len(widths) > 1:
                choices[group.name] = widths
    if not choices:
        reasons = "; ".join(
            f"{g.name}: {g.locked_because or f'{g.n_channels} channels, the step is {step}'}"
            for g in groups
        )
        raise GraphError(
            f"Nothing in this network can be pruned. {reasons or 'It has no layers'}."
        )
    free = tuple(group for group in groups if group.name in choices)
    return SearchSpace(
        groups=free,
        scores=tuple(np.asarray(scores[g.name], dtype=np.float64) for g in free),
        choices=tuple(choices[g.name] for g in free),
    )
