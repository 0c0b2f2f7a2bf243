"""The contract of every search strategy, on a problem whose answer is known."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from compressor.search import STRATEGIES
from compressor.search.bocr import Bocr, Schedule, group_clusters
from compressor.search.objective import (
    CLUSTERS,
    LAYERS,
    START,
    Problem,
    Strategy,
    best_first,
    is_hopeless,
)
from compressor.search.space import Widths, make_space
from compressor.values import Accuracy, ChannelGroup, Trial

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())

N_IMAGES = 2000
WEIGHTS = (1.0, 0.2, 1.0, 0.2, 1.0, 0.2)  # how much accuracy a group's channels carry
COSTS = (1.0, 3.0, 1.0, 3.0, 1.0, 3.0)  # and how much time


def make_problem(n_trials: int = 30, min_speedup: float = 2.0, seed: int = 0) -> Problem:
    """Six groups of 64; odd ones are cheap to lose and dear to keep."""
    groups = [ChannelGroup(f"g{i}", 64, ()) for i in range(6)]
    spread = [1.0 if w == 1.0 else 4.0 for w in WEIGHTS]
    scores = {
        g.name: s * np.random.default_rng(i).standard_normal(64) + 20
        for i, (g, s) in enumerate(zip(groups, spread, strict=True))
    }
    space = make_space(groups, scores, step=16, min_keep_ratio=0.1)
    original = Accuracy(0.98, N_IMAGES)
    return Problem(space, min_speedup, original, n_trials, n_clusters=2, seed=seed)


def truth(problem: Problem, widths: Widths) -> tuple[float, float]:
    """(accuracy, speed-up) in closed form."""
    ratios = problem.space.ratios([widths])[0]
    lost = sum(w * (1 - r) ** 2 for w, r in zip(WEIGHTS, ratios, strict=True)) / sum(WEIGHTS)
    speedup = sum(COSTS) / sum(c * r for c, r in zip(COSTS, ratios, strict=True))
    return float(0.98 - 0.6 * lost), float(speedup)


def measured(problem: Problem, widths: Widths, number: int, phase: str) -> Trial:
    accuracy, speedup = truth(problem, widths)
    noise = np.random.default_rng(number).normal(size=2)
    speedup *= math.exp(0.01 * float(noise[0]))
    return Trial(
        number=number,
        widths=problem.space.by_name(widths),
        phase=phase,
        accuracy=Accuracy(accuracy + 0.003 * float(noise[1]), N_IMAGES),
        speedup=speedup,
        speedup_ci95=(speedup * 0.98, speedup * 1.02),
        latency_ms=10 / speedup,
    )


def run(strategy: Strategy, problem: Problem, fail_every: int = 0) -> list[Trial]:
    trials: list[Trial] = []
    while len(trials) < problem.n_trials:
        proposal = strategy.propose(problem, trials)
        if proposal is None:
            break
        trial = measured(problem, proposal.widths, len(trials), proposal.phase)
        if fail_every and len(trials) % fail_every == fail_every - 1:
            trial = Trial(trial.number, trial.widths, trial.phase, failed_because="board is gone")
        trials.append(trial)
    return trials


@every_strategy
def test_proposals_are_new_and_in_the_space(strategy: Strategy) -> None:
    problem = make_problem()
    trials = run(strategy, problem)
    plans = [problem.space.from_names(t.widths) for t in trials]
    assert len(plans) == problem.n_trials == len(set(plans))
    assert problem.space.original not in plans
    for plan in plans:
        assert all(w in choice for w, choice in zip(plan, problem.space.choices, strict=True))


@every_strategy
def test_the_same_trials_give_the_same_proposal(strategy: Strategy) -> None:
    problem = make_problem(n_trials=20)
    trials = run(strategy, problem)
    for n in (0, 3, 8, 15):
        assert strategy.propose(problem, trials[:n]) == strategy.propose(problem, trials[:n])


@every_strategy
def test_a_search_survives_failed_trials(strategy: Strategy) -> None:
    problem = make_problem()
    trials = run(strategy, problem, fail_every=3)
    assert len(trials) == problem.n_trials
    assert len({problem.space.from_names(t.widths) for t in trials}) == problem.n_trials


@every_strategy
def test_a_small_space_is_searched_whole_and_then_ends(strategy: Strategy) -> None:
    groups = [ChannelGroup("a", 32, ()), ChannelGroup("b", 32, ())]
    scores = {g.name: np.random.default_rng(i).random(32) for i, g in enumerate(groups)}
    space = make_space(groups, scores, step=16, min_keep_ratio=0.1)
    problem = replace(make_problem(), space=space)
    trials: list[Trial] = []
    while proposal := strategy.propose(problem, trials):
        speedup = 64 / sum(proposal.widths)
        trials.append(
            Trial(
                len(trials), space.by_name(proposal.widths), proposal.phase,
                Accuracy(sum(proposal.widths) / 70, 100), speedup, (speedup, speedup), 1.0,
            )
        )  # fmt: skip
    plans = {space.from_names(t.widths) for t in trials}
    assert plans == {(16, 16), (16, 32), (32, 16)}  # (32, 32) is the original


@every_strategy
@pytest.mark.parametrize("seed", [0, 1])
def test_the_best_of_all_plans_is_nearly_found(strategy: Strategy, seed: int) -> None:
    """Brute force over all 4,096 plans; 30 trials end within 1.5 points of the best of them."""
    problem = make_problem(seed=seed)
    reachable = [truth(problem, plan) for plan in itertools.product(*problem.space.choices)]
    optimum = max(a for a, s in reachable if s >= problem.min_speedup)
    best = best_first(run(strategy, problem), problem.min_speedup)[0]
    assert best.speedup is not None
    assert best.speedup >= problem.min_speedup
    assert truth(problem, problem.space.from_names(best.widths))[0] > optimum - 0.015


@every_strategy
def test_budgets_below_the_start_design_work(strategy: Strategy) -> None:
    for n_trials in (1, 2, 4):
        assert len(run(strategy, make_problem(n_trials=n_trials))) == n_trials


def test_bocr_starts_narrow_then_clusters_then_rolls_back() -> None:
    problem = replace(make_problem(n_trials=40), n_clusters=3)
    trials = run(Bocr(), problem)
    phases = [t.phase for t in trials]
    assert [phase for phase, _ in itertools.groupby(phases)] == [START, CLUSTERS, LAYERS]
    assert problem.space.from_names(trials[0].widths) == problem.space.narrowest
    schedule = Schedule.scaled(40)
    assert schedule.earliest <= phases.index(LAYERS) <= schedule.latest
    clusters = group_clusters(problem)
    for trial in trials[: phases.index(LAYERS)]:
        widths = np.array(problem.space.from_names(trial.widths))
        if trial.number > 0:  # equal widths inside a cluster, as all groups have 64 channels
            assert all(len(set(widths[clusters == k])) == 1 for k in set(clusters))


def test_clusters_are_the_groups_of_alike_spread() -> None:
    clusters = group_clusters(make_problem())
    assert len(set(clusters[::2])) == len(set(clusters[1::2])) == 1
    assert clusters[0] != clusters[1]


def test_schedule_is_the_papers_at_its_budget() -> None:
    assert Schedule.scaled(200) == Schedule(n_start=10, earliest=80, latest=100, patience=20)


def test_an_unreachable_limit_is_seen_from_the_narrowest_plan() -> None:
    for min_speedup, hopeless in ((4.5, True), (3.0, False)):
        problem = make_problem(min_speedup=min_speedup)
        first = Bocr().propose(problem, [])
        assert first is not None
        assert is_hopeless(measured(problem, first.widths, 0, START), problem) is hopeless


def test_best_first_puts_feasible_trials_first_and_then_the_fastest() -> None:
    def trial(number: int, accuracy: float, speedup: float) -> Trial:
        return Trial(number, {}, "", Accuracy(accuracy, 100), speedup, (1, 2), 1.0)

    failed = Trial(9, {}, "", failed_because="x")
    trials = [trial(0, 0.9, 1.5), trial(1, 0.5, 2.1), trial(2, 0.7, 2.0), failed,
              trial(3, 0.1, 1.9)]  # fmt: skip
    assert [t.number for t in best_first(trials, 2.0)] == [2, 1, 3, 0]
