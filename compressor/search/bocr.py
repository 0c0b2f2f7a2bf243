"""BOCR: Bayesian optimisation with clustering and rollback [fan2022], for a measured limit.

[fan2022] Fan, Mu, Zhang, Bayesian Optimization with Clustering and Rollback for CNN Auto
    Pruning, ECCV 2022, and its released code.
[ament2023] Ament et al., Unexpected Improvements to Expected Improvement, NeurIPS 2023.

1. Groups with alike importances share one keep ratio: few dimensions, few trials needed.
2. A Gaussian process learns from every trial and proposes the next.
3. When trials stop improving, the search *rolls back*: every group gets its own ratio, bounded by
   what the best plans so far used, and all trials so far are kept with their real ratios
   (*direct* rollback).

Where we deviate, and why:

* The paper limits FLOPs, by clipping proposals layer by layer so that late layers pay. We limit
  measured latency, which no formula gives, so a second Gaussian process learns the logarithm of
  the speed-up and the acquisition is log constrained expected improvement [ament2023].
* Widths are discrete (the target's step), so the acquisition is maximised over plans that can
  be built, by random plans and then step-wise ascent, not by L-BFGS over the box.
* Length scales are one a dimension with BoTorch's dimension-scaled prior; the paper shares one.
  Layers of very different cost cannot share one for latency.
* Trigger points scale with the budget; the paper's are those of 200 trials.
* Points before the rollback enter with the ratios they really had, as those after it do.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from botorch.acquisition.analytic import (
    AnalyticAcquisitionFunction,
    LogConstrainedExpectedImprovement,
    LogProbabilityOfFeasibility,
)
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.model_list_gp_regression import ModelListGP
from gpytorch.mlls import ExactMarginalLogLikelihood
from scipy.stats import qmc
from torch import Tensor

from compressor.search.clustering import cut, importance_tree
from compressor.search.objective import (
    CLUSTERS,
    LAYERS,
    SPEEDUP_MARGIN,
    START,
    Problem,
    Proposal,
    best_first,
    feasible_first,
    finished,
)
from compressor.search.space import SearchSpace, Widths
from compressor.values import Trial

IntArray = npt.NDArray[np.int64]

N_RANDOM = 1024  # random plans that the acquisition is read at, as in the paper's code
N_ASCENTS = 3  # so many of the best climb on, as a beam
TOP_K = 10  # plans whose ratios bound the search after the rollback
FIT_STEPS = 60  # of L-BFGS: as 200 in 5 of 6 proposals of a digits run; 20 only in 3
MIN_SPEEDUP_ERROR = 0.01  # relative; two finalists came out 1.2 % and 1.6 % from their trials
T95 = 2.78  # half a trial's interval in standard errors: Student's t of about 5 session pairs


@dataclass(frozen=True)
class Schedule:
    """When a search of `n_trials` changes phase; the paper's numbers at 200 trials.

    Attributes:
        n_start: Trials of the start design; at least 5.
        earliest: Trial from which a rollback may happen.
        latest: Trial at which it happens at the latest.
        patience: Trials without improvement that bring it about in between.
    """

    n_start: int
    earliest: int
    latest: int
    patience: int

    @classmethod
    def scaled(cls, n_trials: int) -> Self:
        """The paper's schedule (10, 80, 100, 20 of 200) scaled to `n_trials`."""
        return cls(
            n_start=min(n_trials, max(5, n_trials // 20)),
            earliest=round(0.4 * n_trials),
            latest=round(0.5 * n_trials),
            patience=max(3, round(0.1 * n_trials)),
        )


@dataclass(frozen=True)
class Bocr:
    """Bayesian optimisation with clustering and direct rollback."""

    def propose(self, problem: Problem, trials: Sequence[Trial]) -> Proposal | None:
        """A plan that was not tried yet; None where none is left."""
        with _one_thread():  # matrices of a few dozen rows: more threads take half as long again
            return self._propose(problem, trials)

    def _propose(self, problem: Problem, trials: Sequence[Trial]) -> Proposal | None:
        tried = {problem.space.from_names(trial.widths) for trial in trials}
        tried.add(problem.space.original)
        clusters = group_clusters(problem)
        if len(trials) < Schedule.scaled(problem.n_trials).n_start:
            for start in _start_design(problem, clusters):
                if start not in tried:
                    return Proposal(start, START)
        seed = problem.seed + len(trials)
        if not _rolled_back(problem, trials):
            widths = _maximise(problem, trials, clusters, problem.space, tried, seed)
            if widths is not None:
                return Proposal(widths, CLUSTERS)
        every_group = np.arange(len(problem.space.groups))
        for space in (_bounded(problem, trials), problem.space):
            widths = _maximise(problem, trials, every_group, space, tried, seed)
            if widths is not None:
                return Proposal(widths, LAYERS)
        return None


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def group_clusters(problem: Problem) -> IntArray:
    """`(n_groups,)` the cluster that each free group starts in."""
    n_groups = len(problem.space.groups)
    if n_groups <= problem.n_clusters or n_groups < 3:
        return np.arange(n_groups)
    return cut(importance_tree(problem.space.scores), problem.n_clusters)


def _start_design(problem: Problem, clusters: IntArray) -> list[Widths]:
    """The narrowest plan (can the limit be met at all?), then Sobol points over the clusters."""
    space = problem.space
    floors = space.ratios([space.narrowest])[0]
    n_clusters = int(clusters.max()) + 1
    sobol = qmc.Sobol(n_clusters, scramble=False).random(64)[1:]  # the first is the zero point
    low = np.array([floors[clusters == k].min() for k in range(n_clusters)])
    ratios = low + sobol * (1 - low)
    return [space.narrowest, *space.snap(ratios[:, clusters])]


def _rolled_back(problem: Problem, trials: Sequence[Trial]) -> bool:
    """Whether groups have ratios of their own by now; decided from the trials alone."""
    if any(trial.phase == LAYERS for trial in trials):
        return True
    schedule = Schedule.scaled(problem.n_trials)
    best, last_improved = -np.inf, 0
    for number, trial in enumerate(trials):
        if trial.accuracy is None or trial.speedup is None:
            continue
        if trial.speedup >= problem.min_speedup and trial.accuracy.value > best:
            best, last_improved = trial.accuracy.value, number
    n_without = len(trials) - 1 - last_improved
    if len(trials) >= schedule.latest:
        return True
    return len(trials) >= schedule.earliest and n_without >= schedule.patience


def _bounded(problem: Problem, trials: Sequence[Trial]) -> SearchSpace:
    """The space between the smallest and the largest ratio of the best feasible plans.

    Two numbers for all groups, as in the released code; unchanged without a feasible plan.
    """
    space = problem.space
    feasible = feasible_first(trials, problem.min_speedup)[:TOP_K]
    if not feasible:
        return space
    used = space.ratios([space.from_names(trial.widths) for trial in feasible])
    low, high = used.min() - 1e-9, used.max() + 1e-9
    choices = []
    for choice, n_channels in zip(space.choices, space.n_channels, strict=True):
        inside = tuple(w for w in choice if low <= w / n_channels <= high)
        choices.append(inside or choice)
    return SearchSpace(space.groups, space.scores, tuple(choices))


def _maximise(
    problem: Problem,
    trials: Sequence[Trial],
    clusters: IntArray,
    space: SearchSpace,
    tried: set[Widths],
    seed: int,
) -> Widths | None:
    """The untried plan of `space` that promises most; None where none is left."""
    generator = np.random.default_rng(seed)
    pool = {w: None for w in _pool(problem, trials, clusters, space, generator) if w not in tried}
    if not pool:
        return None
    acquisition = _Acquisition(problem, trials, clusters, seed)
    plans = list(pool)
    values = acquisition.values(plans)
    if clusters.max() + 1 < len(clusters):
        return max(zip(values, plans, strict=True))[1]  # few dimensions: the pool is dense
    climbers = sorted(zip(values, plans, strict=True), reverse=True)[:N_ASCENTS]
    while True:
        near = {w: None for _, plan in climbers for w in space.neighbours(plan) if w not in tried}
        ranked = [*climbers, *zip(acquisition.values(list(near)), near, strict=True)]
        higher = sorted(set(ranked), reverse=True)[:N_ASCENTS]
        if higher == climbers:
            return climbers[0][1]
        climbers = higher


def _pool(
    problem: Problem,
    trials: Sequence[Trial],
    clusters: IntArray,
    space: SearchSpace,
    generator: np.random.Generator,
) -> list[Widths]:
    """Random plans of `space`, and around the best trials where groups are free."""
    n_clusters = int(clusters.max()) + 1
    floors = space.ratios([space.narrowest])[0]
    tops = space.ratios([space.original])[0]
    uniform = generator.uniform(size=(N_RANDOM, n_clusters))[:, clusters]
    plans = space.snap(floors + uniform * (tops - floors))
    if n_clusters == len(clusters):
        best = best_first(trials, problem.min_speedup)[:TOP_K]
        used = problem.space.ratios([problem.space.from_names(t.widths) for t in best])
        for kept in space.snap(used):
            for widths in space.neighbours(kept):
                plans.append(widths)
                further = space.neighbours(widths)
                plans.append(further[generator.integers(len(further))])
    return plans


class _Acquisition:
    """Log constrained expected improvement of plans, from all finished trials.

    Legend: `n` trials and the original, `d` clusters (or groups), features are keep ratios.
    """

    def __init__(
        self, problem: Problem, trials: Sequence[Trial], clusters: IntArray, seed: int
    ) -> None:
        self.space, self.clusters = problem.space, clusters
        known = finished(trials)
        widths = [problem.space.original, *(problem.space.from_names(t.widths) for t in known)]
        features = self._features(widths)
        accuracies = [problem.original_accuracy, *(t.accuracy for t in known if t.accuracy)]
        speedups = np.array([1.0, *(t.speedup for t in known if t.speedup is not None)])
        errors = np.array([MIN_SPEEDUP_ERROR, *(_relative_error(t) for t in known)])
        accuracy = _column([a.value for a in accuracies])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            gp_accuracy = _fit(
                features, accuracy, _column([a.standard_error**2 for a in accuracies])
            )
            gp_log_speedup = _fit(features, _column(np.log(speedups)), _column(errors**2))
        model = ModelListGP(gp_accuracy, gp_log_speedup)
        limits: dict[int, tuple[float | None, float | None]] = {
            1: (float(np.log(problem.min_speedup * SPEEDUP_MARGIN)), None)
        }
        feasible = torch.from_numpy(speedups >= problem.min_speedup)
        if feasible.any():
            with torch.no_grad():
                means = gp_accuracy.posterior(features[feasible]).mean
            self.acquisition: AnalyticAcquisitionFunction = LogConstrainedExpectedImprovement(
                model, best_f=means.max(), objective_index=0, constraints=limits
            )
        else:
            self.acquisition = LogProbabilityOfFeasibility(model, constraints=limits)

    def values(self, plans: Sequence[Widths]) -> list[float]:
        if not plans:
            return []
        with torch.no_grad():
            values: Tensor = self.acquisition(self._features(plans).unsqueeze(-2))
        return [float(v) for v in values]

    def _features(self, plans: Sequence[Widths]) -> Tensor:
        """`(n, d)` float64: mean real ratio over the members of each cluster."""
        ratios = self.space.ratios(plans)
        n_clusters = int(self.clusters.max()) + 1
        columns = [ratios[:, self.clusters == k].mean(axis=1) for k in range(n_clusters)]
        return torch.from_numpy(np.stack(columns, axis=1))


def _fit(features: Tensor, values: Tensor, variances: Tensor) -> SingleTaskGP:
    model = SingleTaskGP(features, values, train_Yvar=variances)
    likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(likelihood, optimizer_kwargs={"options": {"maxiter": FIT_STEPS}})
    return model


def _relative_error(trial: Trial) -> float:
    assert trial.speedup_ci95 is not None
    low, high = np.log(trial.speedup_ci95)
    return float(np.hypot((high - low) / (2 * T95), MIN_SPEEDUP_ERROR))


def _column(values: Sequence[float] | npt.NDArray[np.float64]) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float64).unsqueeze(-1)
