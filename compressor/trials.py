"""What is asked of the search, what is measured before it, and its trials."""

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compressor.bench import (
    ACCURACY,
    EXPORT,
    LATENCY,
    N_HARM_IMAGES,
    RECALIBRATION,
    REPAIR,
    SURGERY,
    Bench,
    timed,
)
from compressor.budget import Budget
from compressor.chance import check_answers_differ, check_better_than_chance
from compressor.errors import ConfigError, MeasurementError, SearchError
from compressor.features import channel_maps
from compressor.goals import MACS, MAX_DROP, PARAMS
from compressor.graph.costs import layer_costs
from compressor.job import Job, posed_part
from compressor.prunable import Prunable
from compressor.rows import images_at_once
from compressor.search.clustering import n_distinct
from compressor.search.greedy import lazy_greedy
from compressor.search.objective import (
    FEATURES,
    TIME,
    Harmed,
    History,
    Objective,
    Problem,
    Proposal,
    best_first,
    is_hopeless,
)
from compressor.search.proposals import proposed
from compressor.search.space import Widths
from compressor.search.study import Study, read_before
from compressor.tasks import Agreement, Classification
from compressor.values import (
    FIRST_PLAN,
    GATHERING,
    SEARCHING,
    TIMING_LAYERS,
    TRYING_EACH,
    Accuracy,
    GroupFeatures,
    PairedLatency,
    Progress,
    ProgressCallback,
    Split,
    Trial,
    batches,
)

MORE, MIN_MORE = 1 / 6, 3  # of the trials, and trials: after a correction
N_FEATURE_IMAGES = 200  # as in the code of [chang2022]
EPS = tuple(np.geomspace(0.001, 0.5, 12).tolist())  # strengths of merging alike maps
N_TYPICAL = 5  # trials that tell what the next one takes
MIN_INFORMED = 10  # trials; below that, trying every variable first would cost more than they do
PROPOSAL = "proposal"
TRIAL_PARTS = (PROPOSAL, SURGERY, REPAIR, RECALIBRATION, EXPORT, LATENCY, ACCURACY)
INHERENT_PARTS = (RECALIBRATION, ACCURACY, LATENCY)  # forward passes and measuring
TrialCallback = Callable[[Trial], None]

logger = logging.getLogger(__name__)


def pose(job: Job, bench: Bench) -> Problem:
    """Turns the user's limits into shares of the original's costs.

    Raises:
        ConfigError: The original meets them already.
        DataError: The original is right by chance only; or, without labels, answers every image
            alike.
    """
    if isinstance(job.criterion, Classification):
        original = bench.original_accuracy
        check_better_than_chance(
            bench.predictor_of(job.prunable.module),
            job.data.search,
            job.data.class_names,
            n_right=round(original.value * original.n),
            batch_size=bench.batch_size,
            is_folder=job.config.data is not None and job.config.data.is_dir(),
        )
    elif isinstance(job.criterion, Agreement):
        check_answers_differ(bench.search)
    original_ms = bench.noise_floor.original.median_ms
    limits: dict[str, float] = {}
    for constraint in job.config.constraints:
        if constraint.kind in (MACS, PARAMS):
            limits[constraint.kind] = constraint.value
        elif constraint.kind != MAX_DROP:
            limits[TIME] = 1 / constraint.min_speedup(original_ms)
            if limits[TIME] >= 1:
                raise ConfigError(
                    f"The original already meets {constraint} on {job.target.name}: it takes "
                    f"{original_ms:.3g} ms. Lower --max-latency, or ship the original."
                )
    return _wanted(job, bench.original_accuracy, limits)


class _Asked:
    """Whether there is time left for a phase; remembers that it once said no."""

    def __init__(self, budget: Budget, phase: str) -> None:
        self._budget, self._phase, self.was_refused = budget, phase, False

    def __call__(self) -> bool:
        self.was_refused |= self._budget.of_s(self._phase) <= 0
        return not self.was_refused


def gather_once(bench: Bench, study: Study, budget: Budget) -> None:
    """Gathers what least squares needs, from as many images as there is time for.

    A run that goes on looks at as many as it did before.
    """
    has_time = _Asked(budget, GATHERING)
    n = study.number_once("images of least squares", lambda: bench.gather(has_time))
    bench.n_repair_images = int(n)
    if has_time.was_refused:
        budget.cut(f"least squares looked at {bench.n_repair_images} images")


def informed(
    job: Job,
    problem: Problem,
    bench: Bench,
    study: Study,
    on_progress: ProgressCallback,
    budget: Budget,
) -> Problem:
    """`problem` with what is measured before the first trial; what `study` has of it stays."""
    has_time = _Asked(budget, TIMING_LAYERS)
    timed_plans = bench.timed_plans(
        problem.seed, at_most=problem.n_trials // 2, once=study.once, has_time=has_time
    )
    if has_time.was_refused:
        budget.cut("not all plans were timed that are before the first trial")
    problem = replace(problem, timed=timed_plans)
    if not is_looked_into(problem):
        return problem
    if FEATURES in job.strategy.needs:
        return _with_features(job, problem)

    def harm(widths: Widths) -> float:
        return study.number_once(f"harm of {widths}", partial(bench.harm, widths))

    return with_harm(problem, harm, on_progress, budget)


def posed_before(job: Job, study: Path) -> Problem:
    """The same, as it was posed before the first trial of the study in the file at `study`."""
    before = read_before(study, _wanted(job, Accuracy(0.0, 1), {}))
    posed = _wanted(job, before.original_accuracy, before.objective.limits)
    problem = replace(before, objective=posed.objective)
    asks = FEATURES in job.strategy.needs and is_looked_into(problem)
    return _with_features(job, problem) if asks else problem


def _wanted(job: Job, original: Accuracy, limits: Mapping[str, float]) -> Problem:
    """What is asked for, with nothing measured but the original."""
    min_accuracy = None
    if job.config.max_drop is not None:
        min_accuracy = original.value - job.config.max_drop / 100
    # How much is lost before training does not say how much is lost after it.
    is_drop_after_training = bool(min_accuracy is not None and not limits and job.n_steps)
    return Problem(
        space=job.space,
        objective=Objective(
            limits,
            None if is_drop_after_training else min_accuracy,
            {str(k): w for k, w in job.config.weight.items()} or None,
            front=job.config.pareto or is_drop_after_training,
        ),
        original_accuracy=original,
        n_trials=job.config.trials,
        n_clusters=job.config.clusters,
        seed=job.config.seed,
        layers=layer_costs(job.model, job.groups),
    )


def is_looked_into(problem: Problem) -> bool:
    """Whether it pays to look at every variable before the first trial."""
    return not is_hopeless(problem) and problem.n_trials >= MIN_INFORMED


def _with_features(job: Job, problem: Problem) -> Problem:
    """`problem` with what its channels answer."""
    some = posed_part(job.data.fit, N_FEATURE_IMAGES, job.model, job.criterion)
    return replace(problem, features=features(job.prunable, some))


def features(prunable: Prunable, some: Split) -> dict[str, GroupFeatures]:
    """What the channels of every free group answer; see `features.channel_maps`."""
    maps = channel_maps(prunable.module, prunable.groups, batches(some, images_at_once(some)))
    return {
        name: GroupFeatures(
            means, fisher, tuple(n_distinct(means.reshape(len(means), -1), e) for e in EPS)
        )
        for name, (means, fisher) in maps.items()
    }


def with_harm(
    problem: Problem,
    harm: Callable[[Widths], float],
    on_progress: ProgressCallback,
    budget: Budget | None = None,
) -> Problem:
    """`problem` with what every variable costs alone, and the greedy path to the limit.

    Together they look at no more images than a quarter of the search's trials do. Where there is
    no time for every variable, none is looked at: half of them would mislead.
    """
    space, budget = problem.space, budget or Budget(None)
    damages: dict[str, float] = {}
    began_s = budget.spent_s
    for n, (name, widths) in enumerate(zip(space.names, space.each_alone(), strict=True)):
        took_s = (budget.spent_s - began_s) / max(1, n)
        if budget.of_s(FIRST_PLAN) <= took_s * (len(space.names) - n):
            budget.cut("what each group and branch does alone was not looked at")
            return problem
        on_progress(Progress(TRYING_EACH, n, len(space.names)))
        damages[name] = harm(widths)
    problem = replace(problem, damages=damages)
    n_images = problem.n_trials * problem.original_accuracy.n // 4
    at_most = max(0, n_images // N_HARM_IMAGES - len(problem.damages))

    def on_step(share: float) -> None:
        on_progress(Progress(FIRST_PLAN, round(100 * share), 100))

    has_time = _Asked(budget, FIRST_PLAN)
    path, measured = lazy_greedy(
        problem, harm, at_most=at_most, on_step=on_step, has_time=has_time
    )
    if has_time.was_refused:
        budget.cut("the first plan was made from fewer measurements")
    alone = [
        Harmed(space.by_name(widths), problem.damages[name])
        for name, widths in zip(space.names, space.each_alone(), strict=True)
    ]
    return replace(problem, path=path, harmed=(*alone, *measured))


@dataclass(frozen=True, eq=False)
class Searched:
    """A search that has ended.

    Attributes:
        problem: What was asked.
        trials: Those that count, with the speed-ups that are expected of them now.
        study: All of them, on disk.
        seconds: That they took.
        noise_floor: Of their measurements.
    """

    problem: Problem
    trials: Sequence[Trial]
    study: Study
    seconds: float
    noise_floor: PairedLatency


def n_trials_wanted(problem: Problem, study: Study) -> int:
    """Trials of the search; after a correction, some more."""
    if is_hopeless(problem):
        return 1
    if not study.corrections:
        return problem.n_trials
    more = max(MIN_MORE, round(MORE * problem.n_trials))
    return min(study.corrections[-1].n_trials, len(study.trials)) + more


def search(
    job: Job,
    problem: Problem,
    bench: Bench,
    study: Study,
    budget: Budget,
    on_trial: TrialCallback,
    on_progress: ProgressCallback,
) -> Searched:
    """Proposes and measures until the budget is spent or nothing is left to try.

    The trials that `study` holds already count.
    """
    before = sum(sum(trial.seconds.values()) for trial in study.trials)
    started = time.perf_counter() - before
    n_trials = n_trials_wanted(problem, study)

    def tell() -> None:
        best = next(iter(best_first(study.known, problem)), None)
        on_progress(Progress(SEARCHING, len(study.trials), n_trials, best=best))

    while len(study.trials) < n_trials:
        if study.trials and budget.of_s(SEARCHING) < _typical_seconds(study.trials):
            budget.cut(f"{len(study.trials)} of {n_trials} trials")
            break
        tell()
        seconds: dict[str, float] = {}
        with timed(seconds, PROPOSAL):
            proposal = proposed(job.config.search, job.strategy, problem, History(study.known))
        if proposal is None:
            logger.info("every plan of the space was tried")
            break
        on_trial(_run_trial(job, study, proposal, bench, seconds))
        budget.note()
    if is_hopeless(problem):
        logger.info("the fastest plan stays far beyond the limit; no need to go on")
    tell()
    if not any(trial.accuracy for trial in study.trials):
        reasons = {trial.failed_because for trial in study.trials}
        raise SearchError(f"None of {len(study.trials)} trials could be measured: {reasons}.")
    seconds_spent = time.perf_counter() - started
    return Searched(problem, study.known, study, seconds_spent, bench.noise_floor)


def _typical_seconds(trials: Sequence[Trial]) -> float:
    """Of one trial, by the latest ones."""
    latest = [sum(trial.seconds.values()) for trial in trials[-N_TYPICAL:]]
    return statistics.fmean(latest)


def _run_trial(
    job: Job, study: Study, proposal: Proposal, bench: Bench, seconds: dict[str, float]
) -> Trial:
    number = len(study.trials)
    outcome: dict[str, Any] = {}
    latency = None
    try:
        plan = job.space.plan(proposal.widths)
        measured, latency = bench.measure(plan, seconds, seed=job.config.seed + number)
        outcome = {
            "accuracy": measured,
            "speedup": latency.ratio,
            "speedup_ci95": latency.ranking_ci95,
            "latency_ms": latency.candidate.median_ms,
        }
    except MeasurementError as err:
        outcome = {"failed_because": str(err)}
    trial = Trial(
        number=number,
        widths=job.space.by_name(proposal.widths),
        phase=proposal.phase,
        seconds=seconds,
        **outcome,
    )
    study.add(trial, latency)
    logger.info("%s", trial)
    return trial
