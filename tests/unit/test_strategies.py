"""The contract of every search strategy, on a problem whose answer is known."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compressor.config import Config
from compressor.errors import SearchError
from compressor.goals import MACS
from compressor.plugins import LOOKING_AT_CLASSES, STRATEGIES
from compressor.search import make_strategy
from compressor.search.bocr import GRADUAL, NONE, PER_DIMENSION, WALL, Bocr, PlainBo
from compressor.search.clustering import JS, ST
from compressor.search.objective import (
    ACCURACY,
    CLUSTERS,
    FEATURES,
    LAYERS,
    START,
    TIME,
    History,
    Objective,
    Problem,
    Strategy,
    TimedPlan,
    best_first,
    feasible_first,
    is_hopeless,
    penalised,
)
from compressor.search.schedule import Schedule
from compressor.search.space import Widths, make_space
from compressor.values import Accuracy, Branch, ChannelGroup, GroupFeatures, LayerCost, Trial


def asking(search: str, **settings: object) -> Config:
    return Config(model=Path("model.pt"), target="host-cpu", search=search, **settings)  # type: ignore[arg-type]


BY_NAME: Mapping[str, Strategy] = {name: make_strategy(asking(name)) for name in STRATEGIES}
every_strategy = pytest.mark.parametrize("strategy", BY_NAME.values(), ids=BY_NAME.keys())
VARIANTS: Mapping[str, Strategy] = {
    "js": Bocr(distance=JS),
    "st": Bocr(distance=ST),
    "no rollback": Bocr(rollback=NONE),
    "gradual": Bocr(rollback=GRADUAL),
    "per dimension": Bocr(bounds=PER_DIMENSION),
    "wall": Bocr(fit_to_limit=WALL),
    "uninformed": Bocr(is_informed=False),
}
every_variant = pytest.mark.parametrize("strategy", VARIANTS.values(), ids=VARIANTS.keys())

N_IMAGES = 2000
WEIGHTS = (1.0, 0.2, 1.0, 0.2, 1.0, 0.2)  # how much accuracy a group's channels carry
COSTS = (1.0, 3.0, 1.0, 3.0, 1.0, 3.0)  # and how much time
DROPS = (0.02, 0.3)  # accuracy that goes with each branch, beside that of its channels
TIME_AT_LIMIT = 0.5


def make_problem(
    n_trials: int = 30, time: float = TIME_AT_LIMIT, seed: int = 0, n_branches: int = 0
) -> Problem:
    """Six groups of 64; odd ones are cheap to lose and dear to keep.

    Branches hold groups 1 and 3.
    """
    groups = [ChannelGroup(f"g{i}", 64, ()) for i in range(6)]
    spread = [1.0 if w == 1.0 else 4.0 for w in WEIGHTS]
    scores = {
        g.name: s * np.random.default_rng(i).standard_normal(64) + 20
        for i, (g, s) in enumerate(zip(groups, spread, strict=True))
    }
    branches = tuple(
        Branch(
            f"b{i}", f"add_{i}", 0, (), (f"m{2 * i + 1}",), (f"g{2 * i + 1}",), 1, "aten::add", i
        )
        for i in range(n_branches)
    )
    layers = tuple(
        LayerCost(f"m{i}.weight", round(1e6 * c), 64, (64,), ({f"g{i}": 1.0},))
        for i, c in enumerate(COSTS)
    )
    generator = np.random.default_rng(7)
    features = {
        g.name: GroupFeatures(generator.random((64, 4, 4)), generator.random(64), (60, 40, 20))
        for g in groups
    }
    space = make_space(groups, scores, step=16, min_keep_ratio=0.1, branches=branches)
    original = Accuracy(0.98, N_IMAGES)
    limits = Objective(limits={TIME: time})
    return Problem(
        space,
        limits,
        original,
        n_trials,
        n_clusters=2,
        seed=seed,
        layers=layers,
        features=features,
    )


def truth(problem: Problem, widths: Widths) -> tuple[float, float]:
    """(accuracy, speed-up) in closed form."""
    ratios = problem.space.ratios([widths])[0]
    lost = sum(w * (1 - r) ** 2 for w, r in zip(WEIGHTS, ratios[:6], strict=True)) / sum(WEIGHTS)
    drops = sum(d for d, kept in zip(DROPS, ratios[6:], strict=False) if not kept)
    left = sum(c * r for c, r in zip(COSTS, ratios[:6], strict=True))
    return max(0.05, float(0.98 - 0.6 * lost - drops)), float(sum(COSTS) / max(left, 0.1))


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
        proposal = strategy.propose(problem, History(trials))
        if proposal is None:
            break
        trial = measured(problem, proposal.widths, len(trials), proposal.phase)
        if fail_every and len(trials) % fail_every == fail_every - 1:
            trial = Trial(trial.number, trial.widths, trial.phase, failed_because="board is gone")
        trials.append(trial)
    return trials


def check_new(problem: Problem, trials: list[Trial]) -> None:
    space = problem.space
    plans = [space.from_names(t.widths) for t in trials]
    assert len(plans) == problem.n_trials == len(set(plans))
    assert space.original not in plans
    assert space.written_once(plans) == plans
    for plan in plans:
        assert all(w in choice for w, choice in zip(plan, space.choices, strict=True))


@every_strategy
def test_proposals_are_new_and_in_the_space(strategy: Strategy) -> None:
    problem = make_problem(n_trials=20, n_branches=2)
    check_new(problem, run(strategy, problem))


@every_variant
def test_so_are_those_of_every_variant(strategy: Strategy) -> None:
    problem = make_problem(n_trials=14, n_branches=2)
    check_new(problem, run(strategy, problem))


@every_strategy
def test_the_same_trials_give_the_same_proposal(strategy: Strategy) -> None:
    problem = make_problem(n_trials=12, n_branches=1)
    trials = run(strategy, problem)
    for n in (0, 3, 8):
        known = History(trials[:n])
        assert strategy.propose(problem, known) == strategy.propose(problem, known)


@every_strategy
@pytest.mark.parametrize("fail_every", [1, 3])
def test_a_search_survives_failed_trials(strategy: Strategy, fail_every: int) -> None:
    problem = make_problem(n_trials=12, n_branches=1)
    trials = run(strategy, problem, fail_every)
    assert len(trials) == problem.n_trials
    assert len({problem.space.from_names(t.widths) for t in trials}) == problem.n_trials


@every_strategy
def test_a_small_space_is_searched_whole_and_then_ends(strategy: Strategy) -> None:
    groups = [ChannelGroup("a", 32, ()), ChannelGroup("b", 32, ())]
    scores = {g.name: np.random.default_rng(i).random(32) for i, g in enumerate(groups)}
    space = make_space(groups, scores, step=16, min_keep_ratio=0.1)
    layers = tuple(LayerCost(g.name, 9, 9, (32,), ({g.name: 1.0},)) for g in groups)
    problem = replace(make_problem(), space=space, layers=layers, features={})
    trials: list[Trial] = []
    while proposal := strategy.propose(problem, History(trials)):
        speedup = 64 / sum(proposal.widths)
        trials.append(
            Trial(
                len(trials), space.by_name(proposal.widths), proposal.phase,
                Accuracy(sum(proposal.widths) / 70, 100), speedup, (speedup, speedup), 1.0,
            )
        )  # fmt: skip
    plans = {space.from_names(t.widths) for t in trials}
    assert plans == {(16, 16), (16, 32), (32, 16)}  # (32, 32) is the original


def optimum(problem: Problem) -> float:
    """Brute force over all plans."""
    plans = problem.space.written_once(list(itertools.product(*problem.space.choices)))
    limit = 1 / problem.objective.limits[TIME]
    return max(a for a, s in (truth(problem, plan) for plan in set(plans)) if s >= limit)


def test_the_best_of_all_plans_is_nearly_found() -> None:
    """Of 16,384 plans; 30 trials end within 2 points of the best."""
    check_nearly_best(BY_NAME["bocr"], seed=0, n_branches=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bocr", "bo", "js", "gradual", "per dimension", "wall"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("n_branches", [0, 2])
def test_so_is_it_by_every_variant(name: str, seed: int, n_branches: int) -> None:
    check_nearly_best({**BY_NAME, **VARIANTS}[name], seed, n_branches)


def check_nearly_best(strategy: Strategy, seed: int, n_branches: int) -> None:
    problem = make_problem(seed=seed, n_branches=n_branches)
    best = feasible_first(run(strategy, problem), problem)[0]
    found = truth(problem, problem.space.from_names(best.widths))[0]
    assert found > optimum(problem) - 0.02


@pytest.mark.parametrize("name", ["random", "tpe", "cma-es", "genetic", "swarm"])
def test_rivals_find_something_feasible(name: str) -> None:
    problem = make_problem(n_trials=40, n_branches=2)
    assert feasible_first(run(BY_NAME[name], problem), problem)


@every_strategy
def test_limits_on_paper_are_kept_by_every_proposal(strategy: Strategy) -> None:
    limits = Objective(limits={MACS: 0.5})
    problem = replace(make_problem(n_trials=14, n_branches=2), objective=limits)
    trials = run(strategy, problem)
    plans = [problem.space.from_names(t.widths) for t in trials]
    assert len(trials) == problem.n_trials
    assert problem.costs.macs(plans).max() <= 0.5


@every_strategy
def test_budgets_below_the_start_design_work(strategy: Strategy) -> None:
    for n_trials in (1, 3):
        assert len(run(strategy, make_problem(n_trials=n_trials))) == n_trials


def test_the_fastest_network_within_a_drop() -> None:
    """Brute force over all plans; 30 trials end within 5 % of the fastest allowed one."""
    wanted = Objective(min_accuracy=0.95)
    problem = replace(make_problem(n_branches=2), objective=wanted)
    plans = problem.space.written_once(list(itertools.product(*problem.space.choices)))
    fastest = max(s for a, s in (truth(problem, p) for p in set(plans)) if a >= 0.95)
    best = feasible_first(run(Bocr(), problem), problem)[0]
    assert best.accuracy is not None
    assert best.accuracy.value >= 0.95
    assert truth(problem, problem.space.from_names(best.widths))[1] > 0.95 * fastest


@pytest.mark.slow
def test_the_largest_weighted_sum() -> None:
    weights = {ACCURACY: 1.0, TIME: 0.4, MACS: 0.1}
    problem = replace(make_problem(n_branches=2), objective=Objective(weights=weights))
    plans = list(set(problem.space.written_once(list(itertools.product(*problem.space.choices)))))
    macs = problem.costs.macs(plans)
    values = [
        a / 0.98 + 0.4 * (1 - 1 / s) + 0.1 * (1 - m)
        for (a, s), m in zip((truth(problem, p) for p in plans), macs, strict=True)
    ]
    best = best_first(run(Bocr(), problem), problem)[0]
    found = values[plans.index(problem.space.from_names(best.widths))]
    assert found > max(values) - 0.02


@pytest.mark.slow
def test_the_front_has_good_plans_at_every_time() -> None:
    problem = replace(make_problem(n_trials=50), objective=Objective(front=True))
    trials = run(Bocr(), problem)
    for time in (0.8, 0.6, 0.4):
        limited = replace(problem, objective=Objective(limits={TIME: time}))
        best = feasible_first(trials, limited)[0]
        assert best.accuracy is not None
        assert best.accuracy.value > optimum(limited) - 0.04


def test_bocr_starts_by_hand_then_clusters_then_rolls_back() -> None:
    problem = replace(make_problem(n_trials=30), n_clusters=3)
    trials = run(Bocr(), problem)
    phases = [t.phase for t in trials]
    assert [phase for phase, _ in itertools.groupby(phases)] == [START, CLUSTERS, LAYERS]
    schedule = Schedule.scaled(30)
    assert schedule.earliest <= phases.index(LAYERS) <= schedule.latest
    labels = Bocr().labels(problem, 3)
    for trial in trials[phases.index(CLUSTERS) : phases.index(LAYERS)]:
        widths = np.array(problem.space.from_names(trial.widths))
        assert all(len(set(widths[labels == k])) == 1 for k in set(labels))


@pytest.mark.slow
def test_a_gradual_rollback_goes_by_way_of_more_clusters() -> None:
    groups = make_problem().space
    problem = replace(make_problem(n_trials=30), n_clusters=1)
    trials = run(Bocr(rollback=GRADUAL), problem)
    distinct = []
    for trial in trials:
        widths = problem.space.from_names(trial.widths)
        distinct.append((trial.phase, len(set(widths))))
    assert distinct[0][0] == START
    assert trials[-1].phase == LAYERS
    second = [n for phase, n in distinct if phase == CLUSTERS]
    assert min(second) == 1
    assert max(second) > 1
    assert len(groups.choices) == 6


def test_clusters_are_the_groups_of_alike_spread() -> None:
    labels = Bocr().labels(make_problem(n_branches=2), 2)
    assert len(set(labels[:6:2])) == len(set(labels[1:6:2])) == 1
    assert labels[0] != labels[1]
    assert set(labels[6:]).isdisjoint(labels[:6])


def test_schedule_is_the_papers_at_its_budget() -> None:
    assert Schedule.scaled(200) == Schedule(
        n_start=10, earliest=80, latest=100, patience=20, second_earliest=130, second_latest=150
    )


def test_an_unreachable_limit_is_seen_from_the_fastest_plan() -> None:
    for time, hopeless in ((1 / 4.5, True), (1 / 3, False)):
        problem = make_problem(time=time)
        narrowest = problem.space.narrowest
        speedup = truth(problem, narrowest)[1]
        interval = (speedup * 0.99, speedup * 1.01)
        timed = [TimedPlan(problem.space.by_name(narrowest), speedup, interval)]
        assert is_hopeless(replace(problem, timed=timed)) is hopeless
        assert not is_hopeless(problem)  # nothing was timed


def test_best_first_puts_feasible_trials_first_and_then_those_nearest_to_it() -> None:
    problem = make_problem()
    names = problem.space.by_name(problem.space.narrowest)

    def trial(number: int, accuracy: float, speedup: float) -> Trial:
        return Trial(number, names, "", Accuracy(accuracy, 100), speedup, (1, 2), 1.0)

    failed = Trial(9, names, "", failed_because="x")
    trials = [trial(0, 0.9, 1.5), trial(1, 0.5, 2.1), trial(2, 0.7, 2.0), failed,
              trial(3, 0.1, 1.9)]  # fmt: skip
    assert [t.number for t in best_first(trials, problem)] == [2, 1, 3, 0]
    assert [t.number for t in feasible_first(trials, problem)] == [2, 1]
    ranked = sorted((t for t in trials if t.accuracy), key=lambda t: -penalised(t, problem))
    assert [t.number for t in ranked] == [2, 1, 3, 0]


def test_what_looks_at_classes_is_known_before_it_is_loaded() -> None:
    looking = {name for name in STRATEGIES.built_in if FEATURES in BY_NAME[name].needs}
    assert looking == LOOKING_AT_CLASSES


def test_options_reach_bocr_alone() -> None:
    assert make_strategy(asking("bocr", rollback=GRADUAL)) == Bocr(rollback=GRADUAL)
    assert make_strategy(asking("bo", rollback=GRADUAL)) == PlainBo(rollback=GRADUAL)
    assert make_strategy(asking("random", rollback=GRADUAL)) == BY_NAME["random"]
    assert issubclass(SearchError, Exception)


def test_what_one_search_remembers_changes_no_other() -> None:
    """Two strategies ask for the same data in turn: each gets the processes of its own kind."""
    problem = make_problem(n_trials=12)
    trials = run(BY_NAME["random"], problem, fail_every=1)[:8]  # all that is known is alike
    alone = {name: BY_NAME[name].propose(problem, History(trials)) for name in ("bocr", "bo")}
    for names in (("bo", "bocr"), ("bocr", "bo")):
        assert {name: BY_NAME[name].propose(problem, History(trials)) for name in names} == alone
