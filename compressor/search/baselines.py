"""Other ways to search, for comparison and for those who prefer them.

All see what BOCR sees of the space: the same step, the same branches, limits on paper kept by the
same proportional scaling. Of limits in time they learn from trials only, by a penalty: a plan
beyond a limit is worth less than any within it, the less the further. None of them asks for more
than the trials so far, so every search can be repeated from its log.
"""

import warnings
from dataclasses import dataclass

import cmaes
import numpy as np
import optuna

from compressor.search.objective import History, Problem, Proposal, WithoutSettings, penalised
from compressor.search.space import Ratios, Widths
from compressor.search.warm_start import scaled_to
from compressor.values import Trial

FAILED = -10.0  # below all that a measured trial can be worth
N_WALKS = 2000  # random steps from a plan that was tried before none is taken for left


@dataclass(frozen=True)
class RandomSearch(WithoutSettings):
    """Every variable uniform between its floor and whole."""

    def propose(self, problem: Problem, history: History) -> Proposal | None:
        """See `Strategy.propose`."""
        generator = np.random.default_rng([problem.seed, history.n_proposed])
        points = generator.random(len(problem.space.choices))
        return untried(problem, history, points, "random", generator)


@dataclass(frozen=True)
class Tpe(WithoutSettings):
    """Optuna's tree-structured Parzen estimator [bergstra2011], multivariate.

    [bergstra2011] Bergstra, Bardenet, Bengio, Kegl, Algorithms for Hyper-Parameter Optimization,
        NeurIPS 2011.
    """

    def propose(self, problem: Problem, history: History) -> Proposal | None:
        """See `Strategy.propose`."""
        space = problem.space
        seed = problem.seed + history.n_proposed
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():  # before 5, Optuna called it experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        ranges: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.IntDistribution(0, len(choice) - 1)
            for name, choice in zip(space.names, space.choices, strict=True)
        }
        for trial in history.trials:
            places = {
                n: space.choices[i].index(trial.widths[n]) for i, n in enumerate(space.names)
            }
            study.add_trial(optuna.trial.create_trial(
                params=places, distributions=ranges, value=worth(trial, problem)
            ))  # fmt: skip
        asked = study.ask(ranges).params
        widths = tuple(c[asked[n]] for n, c in zip(space.names, space.choices, strict=True))
        points = space.points_of(np.array(widths) / space.sizes)
        return untried(problem, history, points, "tpe", np.random.default_rng(seed))


@dataclass(frozen=True)
class CmaEs(WithoutSettings):
    """Covariance matrix adaptation [hansen2016], in the box of all ratios.

    [hansen2016] Hansen, The CMA Evolution Strategy: A Tutorial, arXiv 1604.00772.

    Attributes:
        sigma: First step size, as a share of the box.
    """

    sigma: float = 0.3

    def propose(self, problem: Problem, history: History) -> Proposal | None:
        """See `Strategy.propose`; generations so far are told again, in the same order."""
        n = len(problem.space.choices)
        box = np.stack([np.zeros(n), np.ones(n)], axis=1)
        optimizer = cmaes.CMA(np.full(n, 0.7), self.sigma, bounds=box, seed=problem.seed)
        asked: list[tuple[Ratios, float]] = []
        for trial in history.trials:
            asked.append((optimizer.ask(), -worth(trial, problem)))
            if len(asked) == optimizer.population_size:
                optimizer.tell(asked)
                asked = []
        generator = np.random.default_rng([problem.seed, history.n_proposed])
        return untried(problem, history, optimizer.ask(), "cma-es", generator)


def worth(trial: Trial, problem: Problem) -> float:
    """What is maximised; far below everything where the trial failed."""
    return FAILED if trial.accuracy is None else penalised(trial, problem)


def untried(
    problem: Problem,
    history: History,
    points: Ratios,
    phase: str,
    generator: np.random.Generator,
) -> Proposal | None:
    """The plan at `points`, within the limits on paper, or the nearest new one found by chance.

    Args:
        problem: What is searched.
        history: Plans so far.
        points: `(n_variables,)` in [0, 1], from each variable's floor to whole.
        phase: Of the proposal.
        generator: Decides which way is gone from a plan that was tried.
    """
    space = problem.space
    tried = history.proposed(space)
    on_paper = problem.objective.limits_on_paper
    table = problem.table([])

    # Branches that surely stay would go all at once where a limit asks for more.
    branches = slice(len(space.groups), None)
    is_sure = points[branches] == 1
    points = points.copy()
    points[branches] -= np.where(is_sure, 0.5 * generator.random(len(is_sure)), 0)

    def fit(ratios: Ratios) -> Widths:
        if on_paper:
            return scaled_to(problem, table, on_paper, ratios)[0]
        return space.snap(ratios)[0]

    widths = walk = fit(space.ratios_at(points)[None])
    for _ in range(N_WALKS):
        if widths not in tried:
            return Proposal(widths, phase)
        near = space.neighbours(walk)
        walk = near[int(generator.integers(len(near)))]
        widths = fit(space.ratios([walk]))
    return None
