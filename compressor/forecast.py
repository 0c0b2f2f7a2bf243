"""How long a run may take, said before anything long is begun.

What is timed for it is the original: its accuracy, its export, a comparison with itself, and one
step of training. What nobody can know yet is guessed: how much cheaper pruned networks are, how
many of the measurements are needed, how long NNI takes.
"""

from dataclasses import dataclass

from compressor.bench import ACCURACY, CHECKING, EXPORT, LATENCY, N_HARM_IMAGES, Bench
from compressor.finalists import FRONT_TIMES, N_FINALISTS
from compressor.goals import MACS
from compressor.hints import NO_HINTS, choose_hints
from compressor.job import Job
from compressor.search.objective import TIME, Problem
from compressor.search.space import design
from compressor.training import CONTEST_SHARE, halving, step_seconds
from compressor.trials import is_looked_into
from compressor.values import (
    FINE_TUNING,
    FIRST_PLAN,
    GATHERING,
    MEASURING_FILES,
    MEASURING_FINALISTS,
    PRUNING,
    SEARCHING,
    TIMING_LAYERS,
    TRAINING_FINALISTS,
    TRAINING_FRONT,
    TRYING_EACH,
)

PROPOSING_S = 0.4  # a trial; see benchmarks/README.md
FINAL_LATENCY = 3.0  # what a figure with more effort takes, in those of a trial
LEFT = 0.6  # of a network's cost, where the limits do not say
NNI_S = 0.15  # a layer
FIRST_PLAN_SHARE = 0.5  # of the harms that may be measured on the way to the limit
BISECTIONS = 4  # trainings along a front
GATHERED = 4.0  # an image that least squares looks at, in the time of one that is judged
ALONE = 1.5  # an image by itself, in the time of one among many


@dataclass(frozen=True)
class Forecast:
    """What is to come of a run.

    Attributes:
        phases: Phase -> seconds that it may take.
        trial_s: Of one trial.
        step_s: Of one step of training.
    """

    phases: dict[str, float]
    trial_s: float
    step_s: float


def forecast(job: Job, bench: Bench, problem: Problem, *, n_trials_done: int = 0) -> Forecast:
    """How long every part of the run may take.

    Args:
        job: What is asked for.
        bench: That has measured the original.
        problem: With limits; with what was measured before the search, where a run goes on.
        n_trials_done: Of a run that goes on.
    """
    _ = bench.original_accuracy  # which a run that goes on has not looked at yet
    limits = problem.objective.limits
    share = min([limits[cost] for cost in (TIME, MACS) if cost in limits], default=LEFT)
    latency_s, accuracy_s = bench.seconds[LATENCY], bench.seconds[ACCURACY]
    trial_s = latency_s + (1 + share) / 2 * accuracy_s + bench.seconds[EXPORT] + PROPOSING_S
    searching_s = trial_s * max(0, problem.n_trials - n_trials_done)
    layers = sum(1 for module in job.model.modules() if not any(True for _ in module.children()))
    image_s = accuracy_s / max(1, len(job.data.search))
    n_times = 1 + (bench.search is not job.data.search)  # it is asked first what is right
    checking_s = bench.seconds[CHECKING]
    expected = {
        GATHERING: GATHERED * image_s * bench.n_repair_images,
        SEARCHING: searching_s,
        MEASURING_FINALISTS: FINAL_LATENCY * latency_s * N_FINALISTS,
        PRUNING: NNI_S * layers + checking_s,
        MEASURING_FILES: (
            checking_s
            + 2 * FINAL_LATENCY * latency_s
            + ALONE * image_s * len(job.data.test) * (n_times + share)
        ),
    }
    if not n_trials_done:
        expected = _before_the_search(bench, problem) | expected
    training, step_s = _training(job, bench, share)
    return Forecast(expected | training, trial_s, step_s)


def _before_the_search(bench: Bench, problem: Problem) -> dict[str, float]:
    n_plans = min(len(design(problem.space, problem.seed)), problem.n_trials // 2 + 1)
    found = {TIMING_LAYERS: n_plans * (bench.seconds[LATENCY] + bench.seconds[EXPORT])}
    if is_looked_into(problem):
        n_images = problem.original_accuracy.n
        harm_s = bench.seconds[ACCURACY] * min(1.0, N_HARM_IMAGES / n_images)
        n_alone = len(problem.space.names)
        n_more = max(0, problem.n_trials * n_images // 4 // N_HARM_IMAGES - n_alone)
        found[TRYING_EACH] = harm_s * n_alone
        found[FIRST_PLAN] = FIRST_PLAN_SHARE * harm_s * n_more
    return found


def _training(job: Job, bench: Bench, share: float) -> tuple[dict[str, float], float]:
    if not job.n_steps:
        return {}, 0.0
    recipe = job.recipe(job.n_steps, job.config.seed)
    hints = choose_hints(job.model, job.model, {}, job.example) if recipe.hints else NO_HINTS
    step_s = step_seconds(
        job.model, job.data.fit, recipe, criterion=job.lesson, teacher=job.model, hints=hints,
        memory_format=bench.memory_format,
    )  # fmt: skip
    answers = int(bool(recipe.distillation or hints))  # of the original; back costs two forward
    whole_s = job.n_steps * step_s * (answers + 3 * share) / (answers + 3)
    whole_s += job.config.fine_tune_epochs * bench.seconds[ACCURACY]
    step_s = whole_s / job.n_steps  # with what is looked at between passes
    if job.config.pareto:
        whole_s *= len(FRONT_TIMES)
    elif job.config.max_drop is not None:
        return {TRAINING_FRONT: BISECTIONS * whole_s}, step_s
    rounds = halving(job.config.finalists, job.n_steps)
    contest = CONTEST_SHARE if rounds else 0.0
    phases = {TRAINING_FINALISTS: contest * whole_s, FINE_TUNING: (1 - contest) * whole_s}
    return phases, step_s
