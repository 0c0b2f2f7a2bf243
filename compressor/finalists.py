"""Which plan is shipped: the best are measured again, trained a little, and one is chosen."""

import itertools
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from compressor.bench import Bench
from compressor.budget import CAUTION, TRAINING, Budget
from compressor.errors import TrainingError
from compressor.evaluate import drop_of
from compressor.hints import NO_HINTS, choose_hints
from compressor.job import Job
from compressor.latency.timing import FINALIST
from compressor.run import Run
from compressor.run_folder import RunFolder
from compressor.search.objective import (
    TIME,
    Objective,
    best_first,
    feasible_first,
)
from compressor.training import Recipe, Tuned, fine_tune, halving
from compressor.trials import Searched
from compressor.values import (
    FINE_TUNING,
    MEASURING_FINALISTS,
    TRAINING_FINALISTS,
    TRAINING_FRONT,
    Accuracy,
    PairedLatency,
    Plan,
    Progress,
    ProgressCallback,
    Trial,
)

FRONT_TIMES = (0.9, 0.75, 0.6, 0.45, 0.3)  # shares of the original's, between which bands lie
LEAST_STEPS = 10  # of training: fewer only cost time
N_FINALISTS = 8  # plans measured again, at most, before one is chosen
SHARES_OF_FINALISTS, LEAST_FINALIST_S = 4, 3.0  # of the time budget's part for them; seconds

logger = logging.getLogger(__name__)


def bands(searched: Searched) -> list[Searched]:
    """The search once for every band of time that has a trial; slowest first.

    A band whose best trial is less accurate than that of a faster band is left out.
    """
    problem = searched.problem
    found: list[tuple[float, Searched]] = []
    edges = (*FRONT_TIMES, 0.0)
    for limit, floor in itertools.pairwise(edges):
        within = problem.wanting(Objective(limits={TIME: limit}))
        ranked = [
            t for t in feasible_first(searched.trials, within) if within.share(TIME, t) > floor
        ]
        if ranked:
            best = accuracy_of(ranked[0]).value
            found.append((best, replace(searched, problem=within, trials=ranked)))
    return [
        band
        for i, (best, band) in enumerate(found)
        if all(best >= faster for faster, _ in found[i + 1 :])
    ]


@dataclass(frozen=True, eq=False)
class Finalists:
    """Plans that were measured again.

    Attributes:
        plans: From which one is shipped, best first.
        again: Number of a trial -> what it was measured at again.
        is_met: Whether `plans` meet the limits.
    """

    plans: Sequence[Plan]
    again: Mapping[int, PairedLatency]
    is_met: bool


def choose(
    job: Job, searched: Searched, bench: Bench, on_progress: ProgressCallback, budget: Budget
) -> Finalists:
    """The best plans that meet the limits when they are measured again, with more effort.

    Plans just within a limit owe it partly to luck, and the device may be busier now than it was.
    What those measured so far lost, the next ones are expected to lose too, so the most accurate
    one that should still meet the limit comes next; the fastest one as a last resort. Of plans
    that are about as accurate, those whose whole interval meets the limit are preferred to those
    whose figure does. Where no trial met the limits: the one that came nearest.
    """
    problem = searched.problem
    left = feasible_first(searched.trials, problem)
    if not left:
        nearest = best_first(searched.trials, problem)[0]
        return Finalists([plan_of(job, nearest)], {}, is_met=False)
    min_speedup = 1 / problem.objective.limits.get(TIME, 1.0)
    n_most = min(N_FINALISTS, len(left))
    has_files = any(each.is_by_files for each in searched.study.corrections)
    after_files = ", after the files" if has_files else ""  # the machine has changed since
    again: dict[int, PairedLatency] = {}
    plans: dict[int, Plan] = {}
    met: list[int] = []
    surely: list[int] = []
    worth = 0.0  # accuracy in the search, from which on it is about that of the first that met it
    stays: list[float] = []  # of the search's speed-ups, when measured again
    while len(again) < n_most and len(surely) < job.config.finalists:
        on_progress(Progress(MEASURING_FINALISTS, len(again), n_most))
        wanted = min_speedup / statistics.median(stays or [1.0])
        expected = [trial for trial in left if speed_of(trial) >= wanted]
        is_over = not expected or _is_late(budget, again)
        is_last = is_over or len(again) == n_most - 1
        if met and (is_over or accuracy_of(expected[0]).value < worth):
            break
        trial = max(left, key=speed_of) if is_last and not met else expected[0]
        left.remove(trial)
        plans[trial.number] = plan_of(job, trial)
        effort = budget.effort(FINALIST, budget.of_s(MEASURING_FINALISTS) / SHARES_OF_FINALISTS)
        latency = searched.study.once(
            f"measured again, trial {trial.number}{after_files}",
            partial(bench.remeasure, plans[trial.number], effort),
        )
        logger.info("finalist %d: speed-up %.3f %s", trial.number, latency.ratio, latency.ci95)
        stays.append(latency.ratio / speed_of(trial))
        again[trial.number] = latency
        if all(c.is_met_in_time(latency) for c in job.config.constraints):
            first = accuracy_of(trial)
            worth = worth if met else first.value - 2 * first.standard_error
            met.append(trial.number)
            if latency.ci95[0] >= min_speedup:
                surely.append(trial.number)
        if is_last:
            break
    on_progress(Progress(MEASURING_FINALISTS, n_most, n_most))
    chosen = surely or met or [max(again, key=lambda number: again[number].ratio)]
    return Finalists([plans[number] for number in chosen], again, is_met=bool(met))


def _is_late(budget: Budget, again: Mapping[int, PairedLatency]) -> bool:
    """Whether there is no time for one more finalist."""
    if budget.of_s(MEASURING_FINALISTS) > LEAST_FINALIST_S or not again:
        return False
    budget.cut(f"{len(again)} finalists were measured again")
    return True


def plan_of(job: Job, trial: Trial) -> Plan:
    """What the trial left out."""
    return job.space.plan(job.space.from_names(trial.widths))


def accuracy_of(trial: Trial) -> Accuracy:
    """That before training, on the search split."""
    assert trial.accuracy is not None
    return trial.accuracy


def speed_of(trial: Trial) -> float:
    """The speed-up that the search measured."""
    assert trial.speedup is not None
    return trial.speedup


@dataclass(frozen=True, eq=False)
class Place:
    """Where and how long is trained.

    Attributes:
        folder: The run's, which keeps trainings that are not finished.
        attempt: Models that were finished before.
        n_steps: Of all training together.
        has_time: Says no when training has to end.
    """

    folder: RunFolder
    attempt: int
    n_steps: int
    has_time: Callable[[], bool] = lambda: True

    def file(self, name: str) -> Path:
        """Where a training stands."""
        prefix = f"again-{self.attempt}-" if self.attempt else ""
        return self.folder.unfinished / f"{prefix}{name}"


def place_of(run: Run, searched: Searched, n_before: int, *, n_trainings: int = 1) -> Place:
    """Where and how long is trained, as far as the time budget goes.

    Args:
        run: With its budget.
        searched: Whose study keeps how many steps were decided on.
        n_before: Models that were finished before.
        n_trainings: Whole trainings that share the time.
    """
    whole = run.job.n_steps

    def affordable() -> float:
        left_s = run.budget.of_s(FINE_TUNING) / CAUTION / max(1, n_trainings)
        if not whole or run.step_s * whole <= left_s:
            return whole
        n_steps = int(max(0.0, left_s) / run.step_s)
        return n_steps if n_steps >= LEAST_STEPS else 0

    key = f"training steps, {run.folder.path.name if n_trainings > 1 else ''}{n_before}"
    n_steps = int(searched.study.number_once(key, affordable))
    if n_steps < whole:
        run.budget.cut(f"{n_steps} of {whole} training steps")
    if not n_steps:  # nobody waits for it any more
        expected = dict.fromkeys(TRAINING, 0.0)
        run.on_progress(Progress(MEASURING_FINALISTS, 1, 1, expected=expected))
    return Place(run.folder, n_before, n_steps, lambda: run.budget.of_s(FINE_TUNING) > 0)


@dataclass(frozen=True, eq=False)
class Winner:
    """The plan that is shipped.

    Attributes:
        plan: What is left out.
        network: Repaired, and trained a little where there were others; None where it has to be
            made first.
        n_steps_left: Of the budget of steps.
        scores: Of every finalist, after each of its short trainings.
        score_before: Of the winner before any training; None where it had none yet.
        stopped_because: Why that training ended early; None where it did not.
    """

    plan: Plan
    network: nn.Module | None
    n_steps_left: int
    scores: tuple[tuple[float, ...], ...]
    score_before: float | None = None
    stopped_because: str | None = None


def contest(
    job: Job,
    finalists: Sequence[Plan],
    bench: Bench,
    place: Place,
    on_progress: ProgressCallback,
) -> list[Winner]:
    """The finalists, that which learns best first, and their networks as far as they were trained.

    The search ranks plans before training. Here each gets a short one, the better half another
    one, and so on, all out of one budget of steps. One that cannot be trained is out.

    Returns:
        Those of the last round, best first; then the others, in case these fail. Each with the
        steps that are left.

    Raises:
        TrainingError: None can be trained.
    """
    n_left = place.n_steps
    rounds = halving(min(job.config.finalists, len(finalists)), n_left)
    n_taking_part = rounds[0][0] if rounds else 1
    networks = {n: bench.repaired(finalists[n], {}) for n in range(n_taking_part)}
    scores: list[list[float]] = [[] for _ in networks]
    before: dict[int, float] = {}
    failed: dict[int, TrainingError] = {}
    for n_plans, n_steps in rounds:
        recipe = job.recipe(n_steps, job.config.seed + 1 + n_plans)  # other images each round
        tuned: dict[int, Tuned] = {}
        for number, network in networks.items():
            on_progress(Progress(TRAINING_FINALISTS, len(tuned), n_plans))
            stands = place.file(f"finalist-{number}-of-{n_plans}.pt")
            plan = finalists[number]
            try:
                tuned[number] = train(
                    job, plan, network, bench, recipe, _in_silence, stands, place
                )
            except TrainingError as err:
                logger.warning("finalist %d cannot be trained, and is out: %s", number, err)
                failed[number] = err
            n_left -= n_steps
        on_progress(Progress(TRAINING_FINALISTS, n_plans, n_plans))
        ranked = sorted(tuned, key=lambda number: tuned[number].score, reverse=True)
        for number in ranked:
            scores[number].append(tuned[number].score)
            before.setdefault(number, tuned[number].score_before)
        networks = {number: tuned[number].model for number in ranked[: (n_plans + 1) // 2]}
    every = tuple(map(tuple, scores))
    first = [
        Winner(finalists[n], net, n_left, every, before.get(n)) for n, net in networks.items()
    ]
    others = [n for n in range(len(finalists)) if n not in networks and n not in failed]
    winners = first + [Winner(finalists[n], None, place.n_steps, every) for n in others]
    if not winners:
        raise next(iter(failed.values()))
    return winners


def fastest_within_drop(
    job: Job, searched: Searched, bench: Bench, place: Place, on_progress: ProgressCallback
) -> Winner:
    """The fastest plan that loses no more than it may once it is trained, by bisection.

    Of the search's plans those are looked at than which none is both faster and more accurate.
    The loss is that on the search split, plus its standard error. Where no plan stays within it,
    the most accurate one is taken, and the verdict will say so.
    """
    assert job.config.max_drop is not None
    plans = front(searched)
    original = bench.judgements(job.model)
    within, trained = None, None
    low, high, n_trained = 0, len(plans) - 1, 0
    while low <= high:
        middle = (low + high) // 2
        on_progress(Progress(TRAINING_FRONT, n_trained, len(plans).bit_length()))
        network = bench.repaired(plans[middle], {})
        recipe = job.recipe(place.n_steps, job.config.seed)
        stands = place.file(f"front-{middle}.pt")
        tuned = train(job, plans[middle], network, bench, recipe, _in_silence, stands, place)
        n_trained += 1
        drop, error = drop_of(original, bench.judgements(tuned.model), bench.criterion)
        logger.info("plan %d of %d: drop %.4f +- %.4f", middle, len(plans), drop, error)
        trained = Winner(
            plans[middle], tuned.model, 0, ((tuned.score,),),
            tuned.score_before, tuned.stopped_because,
        )  # fmt: skip
        if drop + error <= job.config.max_drop / 100:
            within, low = trained, middle + 1
        else:
            high = middle - 1
    on_progress(Progress(TRAINING_FRONT, n_trained, n_trained))
    winner = within or trained  # without one within it, the slowest was trained last
    assert winner is not None
    return winner


def front(searched: Searched) -> list[Plan]:
    """Plans than which none of the search is both faster and more accurate; slowest first."""
    space = searched.problem.space
    best, plans = -1.0, []
    measured = [t for t in searched.trials if t.accuracy is not None]
    for trial in sorted(measured, key=lambda t: t.speedup or 0.0, reverse=True):
        if accuracy_of(trial).value > best:
            best = accuracy_of(trial).value
            plans.append(space.plan(space.from_names(trial.widths)))
    return plans[::-1]


def _in_silence(_progress: Progress) -> None:
    """Short trainings are told of by the number of them."""


def train(
    job: Job,
    plan: Plan,
    network: nn.Module,
    bench: Bench,
    recipe: Recipe,
    on_progress: ProgressCallback,
    checkpoint: Path,
    place: Place,
) -> Tuned:
    """Fine-tuning of `network`, pruned by `plan`; never worse on the search split than before.

    Raises:
        TrainingError: It fails.
    """
    hints = NO_HINTS
    if recipe.hints and recipe.n_steps:
        kept = job.prunable.kept_positions(plan)
        hints = choose_hints(job.model, network, kept, job.example)
    bench.settle_threads()
    return fine_tune(
        network,
        job.data.fit,
        recipe,
        criterion=job.lesson,
        teacher=job.model,
        hints=hints,
        score=lambda model: bench.accuracy(model).value,
        on_progress=on_progress,
        checkpoint=checkpoint,
        memory_format=bench.memory_format,
        has_time=place.has_time,
    )
