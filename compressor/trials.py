"""What is asked of the search, what is measured before it, and its trials."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from compressor.config import Config
from compressor.errors import ConfigError, MeasurementError, SearchError
from compressor.graph.costs import layer_costs
from compressor.job import Job
from compressor.search import ASK_FOR_FEATURES, make_strategy
from compressor.search.greedy import lazy_greedy
from compressor.search.objective import (
    START,
    TIME,
    Harmed,
    Objective,
    Problem,
    Proposal,
    is_hopeless,
)
from compressor.search.study import Study, read_before
from compressor.values import (
    MACS,
    MAX_DROP,
    PARAMS,
    PairedLatency,
    Progress,
    ProgressCallback,
    Trial,
)

MIN_INFORMED = 10  # trials; below that, trying every variable first would cost more than they do
PROPOSAL = "proposal"
TRIAL_PARTS = (PROPOSAL, SURGERY, REPAIR, RECALIBRATION, EXPORT, LATENCY, ACCURACY)
INHERENT_PARTS = (RECALIBRATION, ACCURACY, LATENCY)  # forward passes and measuring
TrialCallback = Callable[[Trial], None]

logger = logging.getLogger(__name__)


def pose(
    job: Job, bench: Bench, on_progress: ProgressCallback, known: Path | None = None
) -> Problem:
    """Turns the user's limits into shares of the original's costs, and measures what it takes.

    Args:
        job: What is compressed for what.
        bench: Measures.
        on_progress: Told how far that has come.
        known: The study of a run that goes on: what it measured then is taken from there.

    Raises:
        ConfigError: The original meets them already.
    """
    original_ms = bench.noise_floor.original.median_ms
    original_accuracy = bench.original_accuracy
    limits: dict[str, float] = {}
    min_accuracy = None
    for constraint in job.config.constraints:
        if constraint.kind in (MACS, PARAMS):
            limits[constraint.kind] = constraint.value
        elif constraint.kind == MAX_DROP:
            min_accuracy = original_accuracy.value - constraint.value / 100
        else:
            limits[TIME] = 1 / constraint.min_speedup(original_ms)
            if limits[TIME] >= 1 and known is None:
                raise ConfigError(
                    f"The original already meets {constraint} on {job.target.name}: it takes "
                    f"{original_ms:.3g} ms. Lower --max-latency, or ship the original."
                )
    # How much is lost before training does not say how much is lost after it.
    is_drop_after_training = bool(min_accuracy is not None and not limits and job.n_steps)
    if is_drop_after_training:
        min_accuracy = None
    seed = job.config.seed
    problem = Problem(
        space=job.space,
        objective=Objective(
            limits,
            min_accuracy,
            {str(k): w for k, w in job.config.weight.items()} or None,
            front=job.config.pareto or is_drop_after_training,
        ),
        original_accuracy=original_accuracy,
        n_trials=job.config.trials,
        n_clusters=job.config.clusters,
        seed=seed,
        layers=layer_costs(job.model, job.groups),
    )
    if known is None:
        timed_plans = bench.timed_plans(seed, at_most=job.config.trials // 2)
        problem = replace(problem, timed=timed_plans)
    else:
        problem = read_before(known, problem)
    if is_hopeless(problem) or job.config.trials < MIN_INFORMED:
        return problem
    if job.config.search in ASK_FOR_FEATURES:
        return replace(problem, features=bench.features())
    if known is not None:
        return problem
    return with_harm(problem, bench, on_progress)


def with_harm(problem: Problem, bench: Bench, on_progress: ProgressCallback) -> Problem:
    """`problem` with what every variable costs alone, and the greedy path to the limit.

    Together they look at no more images than a quarter of the search's trials do.
    """
    problem = replace(problem, damages=bench.damages())
    n_images = problem.n_trials * problem.original_accuracy.n // 4
    at_most = max(0, n_images // N_HARM_IMAGES - len(problem.damages))

    def on_step(share: float) -> None:
        on_progress(Progress("Finding a first plan", round(100 * share), 100))

    path, measured = lazy_greedy(problem, bench.harm, at_most=at_most, on_step=on_step)
    space = problem.space
    alone = [
        Harmed(space.by_name(widths), problem.damages[name])
        for name, widths in zip(space.names, space.each_alone(), strict=True)
    ]
    return replace(problem, path=path, harmed=(*alone, *measured))


@dataclass(frozen=True, eq=False)
class Searched:
    """A search that has ended: its problem, its trials, the seconds and noise they had."""

    problem: Problem
    trials: Sequence[Trial]
    seconds: float
    noise_floor: PairedLatency


def search(
    job: Job,
    problem: Problem,
    bench: Bench,
    study: Study,
    on_trial: TrialCallback,
    on_progress: ProgressCallback,
) -> Searched:
    """Proposes and measures until the budget is spent or nothing is left to try.

    The trials that `study` holds already count.
    """
    strategy = make_strategy(job.config.search, **_search_options(job.config))
    before = sum(sum(trial.seconds.values()) for trial in study.trials)
    started = time.perf_counter() - before
    budget = job.config.time_budget or float("inf")
    hopeless = is_hopeless(problem)
    n_trials = 1 if hopeless else problem.n_trials
    while len(study.trials) < n_trials and time.perf_counter() - started < budget:
        on_progress(Progress("Searching", len(study.trials), problem.n_trials))
        seconds: dict[str, float] = {}
        with timed(seconds, PROPOSAL):
            proposal = (
                Proposal(job.space.narrowest, START)
                if hopeless
                else strategy.propose(problem, study.trials)
            )
        if proposal is None:
            logger.info("every plan of the space was tried")
            break
        on_trial(_run_trial(job, study, proposal, bench, seconds))
    if hopeless:
        logger.info("the fastest plan stays far beyond the limit; no need to go on")
    on_progress(Progress("Searching", len(study.trials), len(study.trials)))
    if not any(trial.accuracy for trial in study.trials):
        reasons = {trial.failed_because for trial in study.trials}
        raise SearchError(f"None of {len(study.trials)} trials could be measured: {reasons}.")
    seconds_spent = time.perf_counter() - started
    return Searched(problem, study.trials, seconds_spent, bench.noise_floor)


def _search_options(config: Config) -> dict[str, str]:
    """Those of BOCR; the other strategies have none."""
    return {
        "distance": config.clustering,
        "rollback": config.rollback,
        "bounds": config.bounds,
        "fit_to_limit": config.fit_to_limit,
    }


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
