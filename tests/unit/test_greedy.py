"""The lazy greedy path beside the eager one, and what it costs to measure."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from compressor.goals import MACS
from compressor.search.greedy import lazy_greedy
from compressor.search.harm import HarmModel
from compressor.search.objective import Objective, Problem
from compressor.search.space import SearchSpace, Widths
from compressor.search.warm_start import beyond, warm_starts
from compressor.values import Accuracy, ChannelGroup, LayerCost

N = 12
LIMIT = {MACS: 0.5}


def make_problem(seed: int, n_choices: int = 2) -> Problem:
    """Groups of 64 that feed a layer each; costs differ."""
    generator = np.random.default_rng(seed)
    groups = tuple(ChannelGroup(f"g{i}", 64, ()) for i in range(N))
    layers = tuple(
        LayerCost(f"m{i}.weight", int(c), 64, (64,), ({f"g{i}": 1.0},))
        for i, c in enumerate(generator.integers(10**5, 10**6, N))
    )
    choices = tuple(range(64 - 48, 65, 48 // (n_choices - 1)))
    space = SearchSpace(groups, tuple(generator.random((N, 64))), (choices,) * N, ())
    problem = Problem(space, Objective(limits=LIMIT), Accuracy(0.9, 1000), 60, 2, 0, layers)
    harm = SquaredHarm(problem, seed)
    alone = {g.name: harm(w) for g, w in zip(groups, space.each_alone(), strict=True)}
    return replace(problem, damages=alone)


class SquaredHarm:
    """The square of a sum over variables: the more is gone, the more each step harms."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self.space = problem.space
        self.weights = 0.1 + np.random.default_rng([seed, 1]).random(N)
        self.n_asked = 0

    def __call__(self, plan: Widths) -> float:
        self.n_asked += 1
        gone = 1 - self.space.ratios([plan])[0]
        return float((gone @ self.weights) ** 2)


def eager(problem: Problem, harm: SquaredHarm) -> list[Widths]:
    """Every step measured from every plan."""
    space, table, plan = problem.space, problem.table([]), problem.space.original
    path = []
    while (left := beyond(problem, table, LIMIT, [plan])[0]) > 0:
        rates = {}
        for i, choice in enumerate(space.choices):
            lower = [c for c in choice if c < plan[i]]
            if lower:
                after = (*plan[:i], lower[-1], *plan[i + 1 :])
                saved = left - beyond(problem, table, LIMIT, [after])[0]
                rates[after] = (harm(after) - harm(plan)) / saved
        plan = min(rates, key=lambda after: rates[after])
        path.append(plan)
    return path


@pytest.mark.parametrize("seed", range(10))
def test_the_lazy_path_is_the_eager_one_and_measures_less(seed: int) -> None:
    problem = make_problem(seed)
    lazily, eagerly = SquaredHarm(problem, seed), SquaredHarm(problem, seed)
    path, _ = lazy_greedy(problem, lazily, at_most=10**6)
    assert [problem.space.from_names(each.widths) for each in path] == eager(problem, eagerly)
    assert lazily.n_asked < eagerly.n_asked / 3
    last = problem.space.from_names(path[-1].widths)
    assert path[-1].harm == pytest.approx(lazily(last))
    assert float(problem.costs.macs([last])[0]) <= 0.5


def test_it_beats_single_damages_where_harm_is_no_sum() -> None:
    """A pair of layers of which either can go, but not both."""
    problem = make_problem(0)
    names = problem.space.names
    problem = replace(problem, damages=dict.fromkeys(names, 0.05) | {"g0": 0.001, "g1": 0.001})

    def harm(plan: Widths) -> float:
        gone = [width < 64 for width in plan]
        return 0.05 * sum(gone[2:]) + 0.001 * (gone[0] + gone[1]) + 5.0 * (gone[0] and gone[1])

    measured, _ = lazy_greedy(problem, harm, at_most=10**6)
    trusting, _ = lazy_greedy(problem, harm, at_most=0)
    assert measured[-1].harm == pytest.approx(harm(problem.space.from_names(measured[-1].widths)))
    assert harm(problem.space.from_names(measured[-1].widths)) < 1
    assert harm(problem.space.from_names(trusting[-1].widths)) > 5


def test_no_more_is_measured_than_allowed_and_steps_may_be_coarse() -> None:
    problem = make_problem(3, n_choices=17)
    harm = SquaredHarm(problem, 3)
    shares: list[float] = []
    path, _ = lazy_greedy(problem, harm, at_most=7, on_step=shares.append)
    assert harm.n_asked == 7
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    widths = {width for each in path for width in each.widths.values()}
    assert widths <= {16, 28, 40, 52, 64}  # four steps from whole to least


def test_its_plan_is_the_first_trial() -> None:
    problem = make_problem(1)
    path, _ = lazy_greedy(problem, SquaredHarm(problem, 1), at_most=10**6)
    first, *_ = warm_starts(replace(problem, path=path), problem.table([]))
    last = problem.space.from_names(path[-1].widths)
    assert all(a >= b for a, b in zip(first, last, strict=True))  # what was not needed came back
    assert float(problem.costs.macs([first])[0]) <= 0.5


def test_an_unreachable_limit_ends_at_the_narrowest_plan() -> None:
    problem = replace(make_problem(2), objective=Objective(limits={MACS: 0.001}))
    path, _ = lazy_greedy(problem, SquaredHarm(problem, 2), at_most=10**6)
    assert problem.space.from_names(path[-1].widths) == problem.space.narrowest


def test_the_harm_model_learns_pairs() -> None:
    """Neighbouring layers that go together harm more; sums of single damages cannot know."""
    problem = make_problem(4)
    space, weights = problem.space, np.random.default_rng(4).uniform(0.02, 0.1, N)

    def harm(plan: Widths) -> float:
        gone = 1 - space.ratios([plan])[0]
        return float(gone @ weights + 0.5 * (gone[1:] * gone[:-1]).sum())

    generator = np.random.default_rng(0)
    gone = (generator.random((400, N)) < 0.35).astype(np.float64)
    plans = space.snap(1 - 0.75 * gone)
    known, others = plans[:150], plans[150:]
    model = HarmModel(space, known, [harm(plan) for plan in known])
    truth = [harm(plan) for plan in others]
    sums = (1 - space.ratios(others)) @ weights
    assert spearmanr(model(others), truth)[0] > 0.96
    assert spearmanr(sums, truth)[0] < 0.92
