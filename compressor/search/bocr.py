"""BOCR: Bayesian optimisation with clustering and rollback [fan2022], for a measured limit.

[fan2022] Fan, Mu, Zhang, Bayesian Optimization with Clustering and Rollback for CNN Auto
    Pruning, ECCV 2022, and its released code.

1. Groups with alike importances share one keep ratio: few dimensions, few trials needed.
2. A Gaussian process learns from every trial and proposes the next.
3. When trials stop improving, the search *rolls back*: every group gets its own ratio, bounded by
   what the best plans so far used, and all trials so far are kept with their real ratios
   (*direct* rollback); or it goes by way of a finer cut of the same tree (*gradual*).

Where we deviate, and why:

* Whole residual branches can be left out, which is where the speed is. Every cluster has a second
  variable: how many of its branches stay, the most harmful last.
* The paper limits FLOPs, by clipping proposals layer by layer so that late layers pay. We limit
  measured latency, which no formula gives, so a second Gaussian process learns its logarithm,
  around a latency table (`costs.LatencyTable`), and the acquisition is log constrained expected
  improvement. Limits on paper are kept exactly, by proportional scaling or by the paper's wall.
* The first trial is a plan that was made step by step, each step's harm measured on few images
  (`greedy`), the next ones are made by hand and by the table (`warm_start`). After so good a start
  the rollback may come at once, where `patience` trials have brought nothing.
* The accuracy's process lies around a line in the harm that those first measurements let expect
  (`harm`), and accuracies are denoised by losses (`surrogate`).
* What was tried and did not help at equal cost: looking at the harm of several candidates before
  one gets a trial; exchanges of one variable for another as neighbours; damages summed over alike
  layers as columns of the process.
* Widths are discrete (the target's step), so the acquisition is maximised over plans that can
  be built, by random plans and then step-wise ascent, not by L-BFGS over the box.
* Length scales are one a dimension with BoTorch's dimension-scaled prior; the paper shares one.
* Trigger points scale with the budget; the paper's are those of 200 trials.
* Points before the rollback enter with the ratios they really had, as those after it do, and a
  gradual rollback takes the mean over members, not the first one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from scipy.stats import qmc

from compressor.config import Config
from compressor.search.clustering import EU, IntArray, cluster_labels
from compressor.search.costs import LatencyTable
from compressor.search.objective import (
    CLUSTERS,
    LAYERS,
    START,
    TIME,
    History,
    Objective,
    Problem,
    Proposal,
    best_first,
    feasible_first,
)
from compressor.search.schedule import Schedule
from compressor.search.space import Ratios, SearchSpace, Widths
from compressor.search.surrogate import Features, LogConstrainedEI, one_thread
from compressor.search.warm_start import (
    Knapsack,
    clipped_to_limit,
    damages,
    limits_of,
    meets,
    scaled_to,
    warm_starts,
)
from compressor.values import Trial

N_ALTERED = 40  # around each of the best plans
N_RANDOM = 256  # random plans at the limit that the acquisition is read at
N_CLIPPED = 128
N_KNAPSACKS = 24  # with damages as they might be
HARM_ERROR = 0.7  # of the logarithm of a damage, in those
BRANCH_HARM = (-0.7, 2.0)  # logarithm of what branches harm more than one by one
N_ASCENTS = 3  # so many of the best climb on, as a beam
N_CLIMBS = 12
TOP_K = 10  # plans whose ratios bound the search after the rollback
MIN_BOX = 0.05
BRIDGE = 1 / 3  # of the variables, in the middle stage of a gradual rollback
NONE, DIRECT, GRADUAL = "none", "direct", "gradual"
GLOBAL, PER_DIMENSION = "global", "per-dimension"
SCALE, WALL = "scale", "wall"


@dataclass(frozen=True)
class Bocr:
    """Bayesian optimisation with clustering and rollback; see the module.

    Attributes:
        distance: What makes groups alike: `EU`, `JS` or `ST`.
        rollback: `NONE`, `DIRECT` or `GRADUAL`.
        bounds: After a rollback, two numbers for all variables (`GLOBAL`, as in the released
            code) or two for each (`PER_DIMENSION`).
        fit_to_limit: How plans are brought to a limit: `SCALE` or `WALL`.
        clusters: Whether it begins with clusters.
        is_informed: Whether it knows the latency table, the measured damages and the plans of
            `warm_start`.
    """

    distance: str = EU
    rollback: str = DIRECT
    bounds: str = GLOBAL
    fit_to_limit: str = SCALE
    clusters: bool = True
    is_informed: bool = True
    needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """See `Strategy`."""
        return cls(
            distance=config.clustering,
            rollback=config.rollback,
            bounds=config.bounds,
            fit_to_limit=config.fit_to_limit,
        )

    def propose(self, problem: Problem, history: History) -> Proposal | None:
        """See `Strategy.propose`."""
        with one_thread():
            return self._propose(problem, history)

    def _propose(self, problem: Problem, history: History) -> Proposal | None:
        if not self.is_informed:
            problem = replace(problem, timed=(), damages={}, harmed=(), path=())
        trials, n_proposed = history.trials, history.n_proposed
        tried = history.proposed(problem.space)
        schedule = Schedule.scaled(problem.n_trials)
        if n_proposed < max(schedule.n_start, problem.n_trials // 4):
            by_hand = self._warm_starts(problem, trials)
            n_start = min(max(schedule.n_start, len(by_hand)), problem.n_trials)
            if n_proposed < n_start:
                for start in [*by_hand, *self._sobol(problem)]:
                    if start not in tried:
                        return Proposal(start, START)
        problem = _at_this_time(problem, n_proposed)
        table = problem.table(trials)
        seed = problem.seed + n_proposed
        stage = self._stage(problem, trials)
        for labels, phase, own_space in self._stages(problem, trials, stage):
            maximiser = _Maximiser(self, problem, trials, table, labels, own_space, tried, seed)
            widths = maximiser.best()
            if widths is not None:
                return Proposal(widths, phase)
        return None

    def _warm_starts(self, problem: Problem, trials: Sequence[Trial]) -> list[Widths]:
        # By all that was timed so far: where the first plan missed the limit, a second one.
        return warm_starts(problem, problem.table(trials)) if self.is_informed else []

    def _sobol(self, problem: Problem) -> list[Widths]:
        """Points over the clusters."""
        labels = self.labels(problem, problem.n_clusters)
        points = qmc.Sobol(int(labels.max()) + 1, scramble=False).random(64)[1:]  # no zero point
        return self._at_limit(problem, problem.table([]), expand(problem, labels, points))

    def _at_limit(self, problem: Problem, table: LatencyTable, ratios: Ratios) -> list[Widths]:
        # What is on paper is on paper for everybody.
        limits = limits_of(problem)[0] if self.is_informed else problem.objective.limits_on_paper
        if not limits:
            return problem.space.snap(ratios)
        if self.fit_to_limit == WALL:
            return clipped_to_limit(problem, table, limits, ratios[:N_CLIPPED])
        return scaled_to(problem, table, limits, ratios)

    def labels(self, problem: Problem, n_clusters: int) -> IntArray:
        """`(n_variables,)` clusters, or every variable by itself."""
        if not self.clusters:
            return np.arange(len(problem.space.choices))
        return cluster_labels(problem.space, problem.layers, n_clusters, self.distance)

    def _stage(self, problem: Problem, trials: Sequence[Trial]) -> int:
        """0 in clusters, 1 in the finer cut of a gradual rollback, 2 with every variable free."""
        if not self.clusters:
            return 2
        if self.rollback == NONE:
            return 0
        schedule = Schedule.scaled(problem.n_trials)
        windows = [(schedule.earliest, schedule.latest)]
        if self.rollback == GRADUAL:
            windows.append((schedule.second_earliest, schedule.second_latest))
        stage, best, last = 0, -np.inf, 0
        for number in range(len(trials) + 1):
            if stage < len(windows):
                earliest, latest = windows[stage]
                if problem.path:  # the first plan is good already
                    earliest = 0
                tired = number >= earliest and number - 1 - last >= schedule.patience
                if number >= latest or tired:
                    stage, last = stage + 1, number
            if number < len(trials) and trials[number].accuracy is not None:
                trial = trials[number]
                value = problem.value(trial)
                if problem.excess(trial) == 0 and value > best:
                    best, last = value, number
        return 2 if stage == len(windows) else stage

    def _stages(
        self, problem: Problem, trials: Sequence[Trial], stage: int
    ) -> list[tuple[IntArray, str, SearchSpace]]:
        """What to try in turn: (clusters, phase, space); wider where nothing new is left."""
        space = problem.space
        free = np.arange(len(space.choices))
        found = []
        if stage == 0:
            found.append((self.labels(problem, problem.n_clusters), CLUSTERS, space))
        if stage == 1:
            finer = max(problem.n_clusters + 1, round(BRIDGE * len(space.groups)))
            found.append((self.labels(problem, finer), CLUSTERS, self._bounded(problem, trials)))
        if stage == 2 and self.clusters:
            found.append((free, LAYERS, self._bounded(problem, trials)))
        return [*found, (free, LAYERS, space)]

    def _bounded(self, problem: Problem, trials: Sequence[Trial]) -> SearchSpace:
        """The space between the smallest and the largest ratio of the best feasible plans.

        Unchanged without a feasible plan. Branches stay free: between 0 and 1 there is nothing.
        """
        space = problem.space
        feasible = feasible_first(trials, problem)[:TOP_K]
        if not feasible:
            return space
        plans = [space.from_names(trial.widths) for trial in feasible]
        n_groups = len(space.groups)
        used = (np.array(plans) / space.sizes)[:, :n_groups]
        if not used.size:
            return space
        low, high = used.min(axis=0), used.max(axis=0)
        if self.bounds == GLOBAL:
            low, high = np.full(n_groups, low.min()), np.full(n_groups, high.max())
        missing = np.maximum(MIN_BOX - (high - low), 0) / 2
        low, high = low - missing - 1e-9, high + missing + 1e-9
        choices = list(space.choices)
        for i, (a, b) in enumerate(zip(low, high, strict=True)):
            inside = tuple(w for w in space.choices[i] if a <= w / space.sizes[i] <= b)
            choices[i] = inside or space.choices[i]
        return replace(space, choices=tuple(choices))


@dataclass(frozen=True)
class PlainBo(Bocr):
    """Bayesian optimisation without clusters and without what was measured before the trials."""

    clusters: bool = False
    is_informed: bool = False


def expand(problem: Problem, labels: IntArray, points: Ratios) -> Ratios:
    """`(n, n_variables)` ratios from `(n, n_clusters)` points in [0, 1].

    A group has its cluster's ratio; of a cluster's branches, the share stays whose loss harms
    most.
    """
    space = problem.space
    n_groups = len(space.groups)
    ratios = space.ratios_at(points[:, labels])
    harm = damages(problem)
    branches = np.arange(n_groups, len(labels))
    for k in np.unique(labels[n_groups:]):
        members = branches[labels[branches] == k]
        ranks = np.empty(len(members))
        ranks[np.argsort(-harm[members], kind="stable")] = np.arange(len(members))
        # The harmful ones first: rank 0 stays as long as anything does.
        ratios[:, members] = np.clip(points[:, [k]] * len(members) - ranks, 0, 1)
    return ratios


def _at_this_time(problem: Problem, n_proposed: int) -> Problem:
    """Where the whole front is wanted: the problem with one time of it as the limit, in turn."""
    if not problem.objective.front:
        return problem
    times = np.linspace(0.9, 0.3, 7)
    limit = float(times[n_proposed % len(times)])
    return problem.wanting(Objective(limits={TIME: limit}))


class _Maximiser:
    """Finds the untried plan that promises most."""

    def __init__(
        self,
        strategy: Bocr,
        problem: Problem,
        trials: Sequence[Trial],
        table: LatencyTable,
        labels: IntArray,
        space: SearchSpace,
        tried: set[Widths],
        seed: int,
    ) -> None:
        self.strategy, self.problem, self.trials, self.table = strategy, problem, trials, table
        self.labels, self.space, self.tried, self.seed = labels, space, tried, seed
        self.is_free = int(labels.max()) + 1 == len(labels)

    def best(self) -> Widths | None:
        """None where no untried plan is left."""
        pool = self._allowed(self._pool(np.random.default_rng(self.seed)))
        if not pool:
            return None
        problem, informed = self.problem, self.strategy.is_informed
        features = Features(problem.space, self.table, self.labels, problem.harm_model)
        acquisition = LogConstrainedEI(
            problem, self.trials, features, informed=informed, seed=self.seed
        )
        ranked = sorted(zip(acquisition(pool), pool, strict=True), reverse=True)
        if not self.is_free:
            return ranked[0][1]  # few dimensions: the pool is dense
        climbers = ranked[:N_ASCENTS]
        for _ in range(N_CLIMBS):
            near = self._allowed([p for _, plan in climbers for p in self._neighbours(plan)])
            tops = [*climbers, *zip(acquisition(near), near, strict=True)]
            higher = sorted(set(tops), reverse=True)[:N_ASCENTS]
            if higher == climbers:
                break
            climbers = higher
        return climbers[0][1]

    def _neighbours(self, plan: Widths) -> list[Widths]:
        """Inside the bounded space, also from plans that lie outside it."""
        return [
            p for p in self.problem.space.neighbours(plan)
            if all(w in c or w == old
                   for w, old, c in zip(p, plan, self.space.choices, strict=True))
        ]  # fmt: skip

    def _allowed(self, plans: Sequence[Widths]) -> list[Widths]:
        """New ones, each once, that keep the limits on paper."""
        new = [plan for plan in dict.fromkeys(plans) if plan not in self.tried]
        on_paper = self.problem.objective.limits_on_paper
        if not new or not on_paper:
            return new
        fits = meets(self.problem, self.table, on_paper, new)
        return [plan for plan, fit in zip(new, fits, strict=True) if fit]

    def _pool(self, generator: np.random.Generator) -> list[Widths]:
        problem, space = self.problem, self.problem.space
        points = generator.uniform(size=(N_RANDOM, int(self.labels.max()) + 1))
        ratios = self._uniform(points) if self.is_free else expand(problem, self.labels, points)
        plans = [*self.strategy._at_limit(problem, self.table, ratios), *space.snap(ratios)]
        if not self.is_free:
            return plans
        if self.strategy.is_informed:
            plans += self._knapsacks(generator)
        for trial in best_first(self.trials, problem)[:TOP_K]:
            kept = space.from_names(trial.widths)
            plans += self._neighbours(kept)
            plans += self._altered(kept, generator)
        return plans

    def _knapsacks(self, generator: np.random.Generator) -> list[Widths]:
        """Plans at the limit, by damages as they might be."""
        problem, n_groups = self.problem, len(self.space.groups)
        knapsacks = [Knapsack(problem, self.table, limits) for limits in limits_of(problem)]
        found = []
        for i in range(N_KNAPSACKS):
            factors = HARM_ERROR * generator.standard_normal(int(self.labels.max()) + 1)
            harm = damages(problem) * np.exp(factors[self.labels])
            harm[n_groups:] *= np.exp(generator.uniform(*BRANCH_HARM))
            found.append(knapsacks[i % len(knapsacks)].plan(harm))
        return found

    def _altered(self, plan: Widths, generator: np.random.Generator) -> list[Widths]:
        """Plans that differ from `plan` in two to four variables."""
        found = []
        for _ in range(N_ALTERED):
            widths = list(plan)
            n_changed = min(int(generator.integers(2, 5)), len(plan))
            for i in generator.choice(len(plan), n_changed, replace=False):
                widths[i] = int(generator.choice(self.space.choices[i]))
            found.append(tuple(widths))
        return self.problem.space.written_once(found)

    def _uniform(self, points: Ratios) -> Ratios:
        """`points` in [0, 1] as ratios of the bounded space."""
        floors = self.space.floors
        tops = np.array(self.space.original) / self.space.sizes
        return np.asarray(floors + points * (tops - floors))
