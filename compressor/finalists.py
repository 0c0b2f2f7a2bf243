"""Which plan is shipped: the best are measured again, trained a little, and one is chosen."""

import itertools
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from compressor.bench import Bench
from compressor.evaluate import drop_of
from compressor.hints import NO_HINTS, choose_hints
from compressor.job import Job
from compressor.run_folder import RunFolder
from compressor.search.objective import TIME, Objective, best_first, feasible_first
from compressor.training import Recipe, Tuned, fine_tune, halving
from compressor.trials import Searched
from compressor.values import (
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
N_FINALISTS = 8  # plans measured again, at most, before one is chosen

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


def choose(
    job: Job, searched: Searched, bench: Bench, on_progress: ProgressCallback
) -> list[Plan]:
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
        return [job.space.plan(job.space.from_names(nearest.widths))]
    min_speedup = 1 / problem.objective.limits.get(TIME, 1.0)
    n_most = min(N_FINALISTS, len(left))
    again: list[tuple[Plan, PairedLatency]] = []
    met: list[Plan] = []
    surely: list[Plan] = []
    worth = 0.0  # accuracy in the search, from which on it is about that of the first that met it
    stays: list[float] = []  # of the search's speed-ups, when measured again
    while len(again) < n_most and len(surely) < job.config.finalists:
        on_progress(Progress(MEASURING_FINALISTS, len(again), n_most))
        wanted = min_speedup / statistics.median(stays or [1.0])
        expected = [trial for trial in left if speed_of(trial) >= wanted]
        is_last = not expected or len(again) == n_most - 1
        if met and (not expected or accuracy_of(expected[0]).value < worth):
            break
        trial = max(left, key=speed_of) if is_last and not met else expected[0]
        left.remove(trial)
        plan = job.space.plan(job.space.from_names(trial.widths))
        latency = searched.study.once(
            f"measured again, trial {trial.number}", partial(bench.remeasure, plan)
        )
        logger.info("finalist %d: speed-up %.3f %s", trial.number, latency.ratio, latency.ci95)
        stays.append(latency.ratio / speed_of(trial))
        again.append((plan, latency))
        if all(c.is_met_in_time(latency) for c in job.config.constraints):
            first = accuracy_of(trial)
            worth = worth if met else first.value - 2 * first.standard_error
            met.append(plan)
            if latency.ci95[0] >= min_speedup:
                surely.append(plan)
        if is_last:
            break
    on_progress(Progress(MEASURING_FINALISTS, n_most, n_most))
    if met:
        return surely or met
    return [max(again, key=lambda pair: pair[1].ratio)[0]]


def accuracy_of(trial: Trial) -> Accuracy:
    """That before training, on the search split."""
    assert trial.accuracy is not None
    return trial.accuracy


def speed_of(trial: Trial) -> float:
    """The speed-up that the search measured."""
    assert trial.speedup is not None
    return trial.speedup


@dataclass(frozen=True, eq=False)
class Winner:
    """The plan that is shipped.

    Attributes:
        plan: What is left out.
        network: Repaired, and trained a little where there were rivals.
        n_steps_left: Of the budget of steps.
        scores: Of every finalist, after each of its short trainings.
        score_before: Of the winner before any training; None where it had none yet.
        stopped_because: Why that training ended early; None where it did not.
    """

    plan: Plan
    network: nn.Module
    n_steps_left: int
    scores: tuple[tuple[float, ...], ...]
    score_before: float | None = None
    stopped_because: str | None = None


def contest(
    job: Job,
    finalists: Sequence[Plan],
    bench: Bench,
    folder: RunFolder,
    on_progress: ProgressCallback,
) -> Winner:
    """The finalist that learns best, and its network as far as it was trained.

    The search ranks plans before training. Here each gets a short one, the better half another
    one, and so on, all out of one budget of steps.

    Returns:
        Plan, network, and the steps that are left.
    """
    n_left = job.n_steps
    rounds = halving(min(job.config.finalists, len(finalists)), n_left)
    finalists = finalists[: rounds[0][0] if rounds else 1]
    networks = {number: bench.repaired(plan, {}) for number, plan in enumerate(finalists)}
    scores: list[list[float]] = [[] for _ in finalists]
    before: dict[int, float] = {}
    for n_plans, n_steps in rounds:
        rivals: list[tuple[int, Tuned]] = []
        for number, network in networks.items():
            on_progress(Progress(TRAINING_FINALISTS, len(rivals), n_plans))
            recipe = job.recipe(n_steps, job.config.seed + 1 + n_plans)  # other images each round
            stands = folder.unfinished / f"finalist-{number}-of-{n_plans}.pt"
            plan = finalists[number]
            tuned = train(job, plan, network, bench, recipe, _in_silence, stands)
            rivals.append((number, tuned))
            n_left -= n_steps
        on_progress(Progress(TRAINING_FINALISTS, n_plans, n_plans))
        rivals.sort(key=lambda pair: pair[1].score, reverse=True)
        for number, tuned in rivals:
            scores[number].append(tuned.score)
            before.setdefault(number, tuned.score_before)
        networks = {number: tuned.model for number, tuned in rivals[: (n_plans + 1) // 2]}
    best = next(iter(networks))
    every = tuple(map(tuple, scores))
    return Winner(finalists[best], networks[best], n_left, every, before.get(best))


def fastest_within_drop(
    job: Job, searched: Searched, bench: Bench, folder: RunFolder, on_progress: ProgressCallback
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
        recipe = job.recipe(job.n_steps, job.config.seed)
        stands = folder.unfinished / f"front-{middle}.pt"
        tuned = train(job, plans[middle], network, bench, recipe, _in_silence, stands)
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
) -> Tuned:
    """Fine-tuning of `network`, pruned by `plan`; never worse on the search split than before."""
    hints = NO_HINTS
    if recipe.hints and recipe.n_steps:
        kept = job.prunable.kept_positions(plan)
        hints = choose_hints(job.model, network, kept, job.example)
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
    )
