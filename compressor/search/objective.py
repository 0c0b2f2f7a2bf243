"""What a search is asked for: the most accurate plan that meets the latency limit.

Larger is better for both figures: accuracy in [0, 1], and speed-up, the measured ratio
original / candidate. A plan is feasible where its speed-up reaches `min_speedup`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from compressor.search.space import SearchSpace, Widths
from compressor.values import Accuracy, Trial

START, CLUSTERS, LAYERS = "start", "clusters", "layers"

# A trial's speed-up is good to about 2 %; proposals aim this much above the limit.
SPEEDUP_MARGIN = 1.02

# The narrowest plan is measured first. Where even it stays this far below the limit, no plan of
# this space meets it and the rest of the budget is saved.
HOPELESS = 0.95


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything a strategy may know beside the trials.

    Attributes:
        space: What may be chosen.
        min_speedup: The latency limit as a ratio original / candidate.
        original_accuracy: Of the original network on the search split; its speed-up is 1.
        n_trials: The budget.
        n_clusters: Clusters that groups start in.
        seed: Decides every random draw; the same trials give the same proposal.
    """

    space: SearchSpace
    min_speedup: float
    original_accuracy: Accuracy
    n_trials: int
    n_clusters: int
    seed: int


@dataclass(frozen=True)
class Proposal:
    """What to measure next, and which part of the search asks for it."""

    widths: Widths
    phase: str


class Strategy(Protocol):
    """Decides what to measure next, from what was measured and nothing else."""

    def propose(self, problem: Problem, trials: Sequence[Trial]) -> Proposal | None:
        """A plan that was not tried yet; None where none is left.

        A pure function of its arguments, so that a search can be repeated from its log.
        """


def finished(trials: Sequence[Trial]) -> list[Trial]:
    """Trials with a measurement, in order."""
    return [trial for trial in trials if trial.accuracy is not None]


def best_first(trials: Sequence[Trial], min_speedup: float) -> list[Trial]:
    """Feasible trials by falling accuracy, then the infeasible ones by falling speed-up."""

    def rank(trial: Trial) -> tuple[bool, float, float]:
        assert trial.accuracy is not None
        assert trial.speedup is not None
        if trial.speedup >= min_speedup:
            return (True, trial.accuracy.value, trial.speedup)
        return (False, trial.speedup, trial.accuracy.value)

    return sorted(finished(trials), key=rank, reverse=True)


def feasible_first(trials: Sequence[Trial], min_speedup: float) -> list[Trial]:
    """Only the trials that meet the limit, by falling accuracy."""
    ranked = best_first(trials, min_speedup)
    return [t for t in ranked if t.speedup is not None and t.speedup >= min_speedup]


def is_hopeless(trial: Trial, problem: Problem) -> bool:
    """Whether `trial` shows that no plan of the space can meet the limit."""
    return (
        problem.space.from_names(trial.widths) == problem.space.narrowest
        and trial.speedup_ci95 is not None
        and trial.speedup_ci95[1] < HOPELESS * problem.min_speedup
    )
