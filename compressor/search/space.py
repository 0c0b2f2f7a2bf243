"""What a search may choose: a width per free channel group, and which residual branches stay.

A step is not a refinement. On AVX-512 two 3x3 convolutions take 0.63 ms with 48 channels, 0.91 ms
with 49, 1.29 ms with 63 and 1.04 ms with 64 (`benchmarks/staircase.py`): plans off the step are
not even considered. Nor is a branch that is left out the end of a ramp: between one step of
channels and none lies the whole cost of its layers' starts, so it is a variable of its own.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from compressor.errors import GraphError
from compressor.values import Branch, ChannelGroup, Plan

# One number a variable: the width of every free group, then 1 or 0 for every branch. Groups
# inside a branch that is left out have their original width, so that a plan is written in one way.
Widths = tuple[int, ...]
Ratios = npt.NDArray[np.float64]  # (..., n_variables), share that is kept, in [0, 1]

MIN_DESIGN, MAX_DESIGN = 8, 24  # plans that are timed before a search


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """The free groups, their scores, the widths each may have, and the branches.

    Attributes:
        groups: Groups that are not locked, in graph order.
        scores: One importance score per channel of each group.
        choices: Allowed numbers of each variable, ascending; the last is the original's.
        branches: Residual branches that may be left out, in graph order.
    """

    groups: tuple[ChannelGroup, ...]
    scores: tuple[npt.NDArray[np.float64], ...]
    choices: tuple[Widths, ...]
    branches: tuple[Branch, ...] = ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the variables, as trials and the study know them."""
        return (*(g.name for g in self.groups), *(f"keep {b.name}" for b in self.branches))

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """`(n_variables,)` original widths, and 1 for a branch."""
        return np.array([*(g.n_channels for g in self.groups), *(1 for _ in self.branches)])

    @cached_property
    def floors(self) -> Ratios:
        """`(n_variables,)` smallest shares."""
        return np.array([choice[0] for choice in self.choices]) / self.sizes

    def ratios_at(self, points: Ratios) -> Ratios:
        """Ratios of `points` in [0, 1], from each variable's floor to whole."""
        return np.asarray(self.floors + points * (1 - self.floors))

    def points_of(self, ratios: Ratios) -> Ratios:
        """The inverse of `ratios_at`."""
        return np.asarray((ratios - self.floors) / (1 - self.floors))

    def each_alone(self) -> list[Widths]:
        """For every variable, the plan in which it alone is at its least."""
        whole = self.original
        return self.written_once(
            [(*whole[:i], choice[0], *whole[i + 1 :]) for i, choice in enumerate(self.choices)]
        )

    @cached_property
    def inside(self) -> npt.NDArray[np.bool_]:
        """`(n_groups, n_branches)`: whether the group goes with the branch."""
        names = [set(branch.groups) for branch in self.branches]
        lies = [[group.name in those for those in names] for group in self.groups]
        return np.array(lies, dtype=np.bool_).reshape(len(self.groups), len(self.branches))

    @cached_property
    def original(self) -> Widths:
        """Everything whole."""
        return tuple(choice[-1] for choice in self.choices)

    @cached_property
    def narrowest(self) -> Widths:
        """Every group at its floor and every branch left out."""
        return self.written_once([tuple(choice[0] for choice in self.choices)])[0]

    def snap(self, ratios: Ratios) -> list[Widths]:
        """The plans nearest to `ratios`, `(n_plans, n_variables)`; a tie goes to the narrower."""
        columns = []
        for choice, n, column in zip(self.choices, self.sizes, ratios.T, strict=True):
            widths = np.array(choice)
            middles = (widths[:-1] + widths[1:]) / 2
            columns.append(widths[np.searchsorted(middles, column * n)])
        return self.written_once([tuple(row) for row in np.stack(columns, axis=1).tolist()])

    def written_once(self, plans: Sequence[Widths]) -> list[Widths]:
        """The same plans, with groups that went with their branch at their original width."""
        if not self.branches or not plans:
            return list(plans)
        rows = np.array(plans)
        gone = self._gone(rows)
        rows[:, : len(self.groups)][gone] = np.broadcast_to(
            self.sizes[: len(self.groups)], gone.shape
        )[gone]
        return [tuple(row) for row in rows.tolist()]

    def ratios(self, plans: Sequence[Widths]) -> Ratios:
        """`(n_plans, n_variables)` shares really kept; 0 for groups that went with a branch."""
        rows = np.array(plans, dtype=np.float64).reshape(-1, len(self.choices)) / self.sizes
        if self.branches:
            rows[:, : len(self.groups)][self._gone(rows)] = 0.0
        return rows

    def _gone(self, rows: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
        """`(n_plans, n_groups)`: whether the group went with a branch."""
        dropped = rows[:, len(self.groups) :] == 0
        return np.asarray(dropped.astype(np.int64) @ self.inside.T.astype(np.int64) > 0)

    def neighbours(self, widths: Widths) -> list[Widths]:
        """Every plan that differs from `widths` by one step of one variable."""
        found = []
        for i, choice in enumerate(self.choices):
            at = choice.index(widths[i])
            for near in (at - 1, at + 1):
                if 0 <= near < len(choice):
                    found.append((*widths[:i], choice[near], *widths[i + 1 :]))
        return [plan for plan in dict.fromkeys(self.written_once(found)) if plan != widths]

    def wider(self, widths: Widths) -> list[Widths]:
        """Every plan in which one variable of `widths` is a step wider."""
        found = []
        for i, choice in enumerate(self.choices):
            if widths[i] < choice[-1]:
                near = choice[bisect_right(choice, widths[i])]
                found.append((*widths[:i], near, *widths[i + 1 :]))
        return found

    def plan(self, widths: Widths) -> Plan:
        """The highest-scored channels of every group, in their old order, and the branches."""
        n = len(self.groups)
        dropped = [b for b, kept in zip(self.branches, widths[n:], strict=True) if not kept]
        gone = {name for branch in dropped for name in branch.groups}
        kept = {}
        for group, scores, width in zip(self.groups, self.scores, widths[:n], strict=True):
            if group.name not in gone:
                best = np.argsort(-scores, kind="stable")[:width]
                kept[group.name] = tuple(sorted(best.tolist()))
        return Plan(kept, tuple(branch.name for branch in dropped))

    def by_name(self, widths: Widths) -> dict[str, int]:
        """Variable's name -> its number."""
        return dict(zip(self.names, widths, strict=True))

    def from_names(self, widths: Mapping[str, int]) -> Widths:
        """The inverse of `by_name`."""
        return tuple(widths[name] for name in self.names)


def make_space(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, npt.NDArray[np.float64]],
    *,
    step: int,
    min_keep_ratio: float,
    branches: Sequence[Branch] = (),
) -> SearchSpace:
    """The search space over the groups that are not locked, and over the branches.

    Args:
        groups: From `graph.channel_groups`.
        scores: Group name -> `(n_channels,)` importance.
        step: Widths are its multiples, in positions of the producer where a channel stands for
            several; the original width stays allowed off-step.
        min_keep_ratio: In [0, 1]; no group goes below this share of its channels, nor below
            one step.
        branches: Residual branches that may be left out.

    Raises:
        GraphError: Every group is locked, or too narrow to lose a step, and there is no branch;
            says why.
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
    if not choices and not branches:
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
        choices=(*(choices[g.name] for g in free), *((0, 1) for _ in branches)),
        branches=tuple(branches),
    )


def design(space: SearchSpace, seed: int) -> list[Widths]:
    """The fastest plan, and random ones in which every variable is at its least half of the time.

    Their number grows with the square root of that of the variables: layers are alike.
    """
    n = len(space.choices)
    n_plans = int(np.clip(round(3 * np.sqrt(n)), MIN_DESIGN, MAX_DESIGN))
    generator = np.random.default_rng(seed)
    floors = space.floors
    shares = generator.uniform(0.1, 0.9, size=(n_plans, 1))
    ratios = np.where(generator.random((n_plans, n)) < shares, floors, 1.0)
    between = generator.random((n_plans, n)) < 0.3
    ratios = np.where(between, space.ratios_at(generator.random((n_plans, n))), ratios)
    plans = [space.narrowest, *space.snap(ratios)]
    return [plan for plan in dict.fromkeys(plans) if plan != space.original]
