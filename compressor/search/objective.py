"""What a search is asked for, and which of two trials is the better one.

Costs are shares of the original's: a network twice as fast has time 0.5. Four questions can be
asked (`Objective`): the most accurate network within limits; the fastest one that loses no more
than so much accuracy; the largest weighted sum of what is kept and what is saved [choudhary2022];
and the whole front of accuracy against time.

[choudhary2022] Choudhary, Mishra, Goswami, Sarangapani, Inference-aware convolutional neural
    network pruning, FGCS 135, 2022. Their weights are not known; ours are options.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Protocol, Self

import numpy as np

from compressor.config import Config
from compressor.goals import MACS
from compressor.search.costs import Costs, FloatArray, LatencyTable
from compressor.search.harm import HarmModel
from compressor.search.space import SearchSpace, Widths
from compressor.values import Accuracy, GroupFeatures, LayerCost, Trial

START, CLUSTERS, LAYERS = "start", "clusters", "layers"
TIME = "time"  # a cost, as MACS and PARAMS are
ACCURACY = "accuracy"
FEATURES = "features"  # what channels answer, by class

# A trial's time is good to about 2 %; proposals aim this much below the limit.
TIME_MARGIN = 0.98

# Where even the fastest plan stays this far above the limit, no plan of this space meets it.
HOPELESS = 1.05

MIN_ERROR = 0.01  # of log time; two finalists came out 1.2 % and 1.6 % from their trials
T95 = 2.78  # half a trial's interval in standard errors: Student's t of about 5 session pairs


@dataclass(frozen=True)
class Objective:
    """What is wanted.

    Attributes:
        limits: `TIME`, `MACS` or `PARAMS` -> largest share of the original's.
        min_accuracy: Lowest accuracy; then time is what is minimised.
        weights: `ACCURACY`, `TIME`, `MACS` or `PARAMS` -> weight; then the sum of the weighted
            accuracy (as a share of the original's) and savings is what is maximised.
        front: Every time between the fastest and the original's is wanted with the best accuracy.
    """

    limits: Mapping[str, float] = field(default_factory=dict)
    min_accuracy: float | None = None
    weights: Mapping[str, float] | None = None
    front: bool = False

    @property
    def limits_on_paper(self) -> dict[str, float]:
        """All limits but that of time; whether a plan meets them is known exactly."""
        return {metric: limit for metric, limit in self.limits.items() if metric != TIME}


@dataclass(frozen=True)
class TimedPlan:
    """A plan that was timed before the search.

    Attributes:
        widths: Variable's name -> its number.
        speedup: original / candidate.
        speedup_ci95: Its interval.
    """

    widths: Mapping[str, int]
    speedup: float
    speedup_ci95: tuple[float, float]


@dataclass(frozen=True)
class Correction:
    """What measuring finalists, or finished files, taught about the trials before.

    The trials that were measured again have their new figures; the others are expected to have
    moved as those did, because selection by a noisy figure, or a machine that has changed, moves
    them all alike.

    Attributes:
        n_trials: Trials before it; later ones are measured as things are now.
        moved: New speed-up / old one, of those that were measured again.
        again: Number of a trial -> its speed-up when it was measured again, and the interval.
        is_by_files: Whether it is the finished files that taught it.
    """

    n_trials: int
    moved: float
    again: Mapping[int, tuple[float, float, float]]
    is_by_files: bool = False


def corrected(trials: Sequence[Trial], corrections: Sequence[Correction]) -> tuple[Trial, ...]:
    """`trials` with the speed-ups that are expected of them now."""
    found = list(trials)
    known: set[int] = set()  # measured with the effort of a final figure
    for each in corrections:
        for i, trial in enumerate(found[: each.n_trials]):
            if trial.speedup is None or trial.speedup_ci95 is None or trial.latency_ms is None:
                continue
            if trial.number in each.again:
                ratio, low, high = each.again[trial.number]
            elif trial.number in known and not each.is_by_files:
                continue
            else:
                ratio = trial.speedup * each.moved
                low, high = (bound * each.moved for bound in trial.speedup_ci95)
            found[i] = replace(
                trial, speedup=ratio, speedup_ci95=(low, high),
                latency_ms=trial.latency_ms * trial.speedup / ratio,
            )  # fmt: skip
        known |= each.again.keys()
    return tuple(found)


@dataclass(frozen=True)
class Harmed:
    """A plan whose answers were looked at before the search.

    Attributes:
        widths: Variable's name -> its number.
        harm: How far its answers go from the original's, in nats.
    """

    widths: Mapping[str, int]
    harm: float


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything a strategy may know beside the trials.

    Attributes:
        space: What may be chosen.
        layers: What its layers cost; empty where no cost on paper is asked for.
        objective: What is wanted.
        original_accuracy: Of the original network on the search split; its costs are 1.
        n_trials: The budget.
        n_clusters: Clusters that groups start in.
        seed: Decides every random draw; the same trials give the same proposal.
        damages: Variable's name -> how far the answers go from the original's (in nats) where
            it alone is at its least; empty where it was not measured.
        harmed: Plans whose answers were looked at before the search.
        path: Those of them that lead from the original to the limit (`greedy.lazy_greedy`).
        timed: Plans that were timed before the search.
        features: Group's name -> what its channels answer; empty where no strategy asks for it.
    """

    space: SearchSpace
    objective: Objective
    original_accuracy: Accuracy
    n_trials: int
    n_clusters: int
    seed: int
    layers: tuple[LayerCost, ...] = ()
    damages: Mapping[str, float] = field(default_factory=dict)
    harmed: Sequence[Harmed] = ()
    path: Sequence[Harmed] = ()
    timed: Sequence[TimedPlan] = ()
    features: Mapping[str, GroupFeatures] = field(default_factory=dict)

    @cached_property
    def costs(self) -> Costs:
        """On paper."""
        return Costs(self.space, self.layers)

    @cached_property
    def harm_model(self) -> HarmModel | None:
        """Of plans that were not looked at; None where none was."""
        plans = [self.space.from_names(each.widths) for each in self.harmed]
        return HarmModel(self.space, plans, [h.harm for h in self.harmed]) if plans else None

    def wanting(self, objective: Objective) -> "Problem":
        """The same with another objective; what was worked out does not depend on it."""
        other = replace(self, objective=objective)
        vars(other).update(costs=self.costs, harm_model=self.harm_model)
        return other

    def table(self, trials: Sequence[Trial]) -> LatencyTable:
        """The latency table, from all that was timed so far."""
        timed = self.all_timed(trials)
        plans = [self.space.from_names(plan.widths) for plan in timed]
        times = np.array([1 / plan.speedup for plan in timed])
        errors = np.array([log_error(plan.speedup_ci95) for plan in timed])
        return LatencyTable(self.costs, plans, times, errors)

    def all_timed(self, trials: Sequence[Trial]) -> list[TimedPlan]:
        """Before the search and in it."""
        in_trials = [
            TimedPlan(t.widths, t.speedup, t.speedup_ci95)
            for t in trials
            if t.speedup is not None and t.speedup_ci95 is not None
        ]
        return [*self.timed, *in_trials]

    def expected(self, metric: str, plans: Sequence[Widths], table: LatencyTable) -> FloatArray:
        """`(n_plans,)` share of the original's that is expected of `plans`."""
        if metric == TIME:
            return table.times(plans)
        return self.costs.macs(plans) if metric == MACS else self.costs.params(plans)

    def share(self, metric: str, trial: Trial) -> float:
        """What the trial has of the original's `metric`."""
        if metric == TIME:
            assert trial.speedup is not None
            return 1 / trial.speedup
        plans = [self.space.from_names(trial.widths)]
        return float((self.costs.macs if metric == MACS else self.costs.params)(plans)[0])

    def excess(self, trial: Trial) -> float:
        """How far the trial is beyond its limits, as a sum of logarithms; 0 where it meets all."""
        assert trial.accuracy is not None
        beyond = sum(
            max(0.0, math.log(self.share(metric, trial) / limit))
            for metric, limit in self.objective.limits.items()
        )
        if self.objective.min_accuracy is not None:
            missing = self.objective.min_accuracy - trial.accuracy.value
            beyond += max(0.0, missing)
        return beyond

    def value(self, trial: Trial) -> float:
        """What is maximised."""
        assert trial.accuracy is not None
        if self.objective.weights is not None:
            weights = dict(self.objective.weights)
            accuracy = trial.accuracy.value / max(self.original_accuracy.value, 1e-9)
            total = weights.pop(ACCURACY, 0.0) * accuracy
            return total + sum(w * (1 - self.share(m, trial)) for m, w in weights.items())
        if self.objective.min_accuracy is not None:
            return -math.log(self.share(TIME, trial))
        return trial.accuracy.value


@dataclass(frozen=True)
class Proposal:
    """What to measure next, and which part of the search asks for it."""

    widths: Widths
    phase: str


@dataclass(frozen=True)
class History:
    """What a search knows of the plans it has proposed.

    Attributes:
        trials: Finished and failed ones, in the order in which they arrived.
        pending: Plans that are being measured.
    """

    trials: Sequence[Trial] = ()
    pending: Sequence[Widths] = ()

    @property
    def n_proposed(self) -> int:
        """Plans so far; the number of the next trial."""
        return len(self.trials) + len(self.pending)

    def proposed(self, space: SearchSpace) -> set[Widths]:
        """Every plan that need not be proposed again; the original is one of them."""
        tried = {space.from_names(trial.widths) for trial in self.trials}
        return tried | set(self.pending) | {space.original}


class Strategy(Protocol):
    """Decides what to measure next, from what was measured and nothing else.

    Attributes:
        needs: What `Problem` is to have of what costs time to find out: `FEATURES`, or nothing.
    """

    needs: ClassVar[frozenset[str]]

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """The strategy, with the settings that are its own."""

    def propose(self, problem: Problem, history: History) -> Proposal | None:
        """A plan that was not proposed yet; None where none is left.

        A pure function of its arguments, so that a search can be repeated from its log.
        """


class WithoutSettings:
    """What a strategy has that needs nothing and that no setting changes."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """See `Strategy`."""
        return cls()


def log_error(interval: tuple[float, float]) -> float:
    """Standard error of the logarithm of a ratio with that 95 % interval."""
    low, high = np.log(interval)
    return float(np.hypot((high - low) / (2 * T95), MIN_ERROR))


def finished(trials: Sequence[Trial]) -> list[Trial]:
    """Trials with a measurement, in order."""
    return [trial for trial in trials if trial.accuracy is not None]


def best_first(trials: Sequence[Trial], problem: Problem) -> list[Trial]:
    """Trials within the limits by falling value, then the others by rising excess."""

    def rank(trial: Trial) -> tuple[float, float, float]:
        assert trial.speedup is not None
        return (-problem.excess(trial), problem.value(trial), trial.speedup)

    return sorted(finished(trials), key=rank, reverse=True)


def feasible_first(trials: Sequence[Trial], problem: Problem) -> list[Trial]:
    """Only the trials within the limits, by falling value."""
    return [trial for trial in best_first(trials, problem) if problem.excess(trial) == 0]


def penalised(trial: Trial, problem: Problem) -> float:
    """One number for optimisers that know no limits: beyond them, the worse the further."""
    excess = problem.excess(trial)
    return problem.value(trial) if excess == 0 else -excess


def is_hopeless(problem: Problem) -> bool:
    """Whether even the fastest plan, which was timed before the search, misses the time limit."""
    limit = problem.objective.limits.get(TIME)
    fastest = [t for t in problem.timed
               if problem.space.from_names(t.widths) == problem.space.narrowest]  # fmt: skip
    if limit is None or not fastest:
        return False
    return 1 / fastest[0].speedup_ci95[1] > HOPELESS * limit
