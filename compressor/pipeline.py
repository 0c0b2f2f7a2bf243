"""The whole method: trained model in, measured-faster ONNX out."""

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compressor import run_folder
from compressor.bench import (
    ACCURACY,
    BATCH_SIZE,
    EXPORT,
    LATENCY,
    N_HARM_IMAGES,
    N_PROOF_IMAGES,
    RECALIBRATION,
    REPAIR,
    SURGERY,
    Bench,
    Recovery,
    check_surgery,
    n_cores,
    timed,
)
from compressor.config import AUTO, Config
from compressor.datasets import load_data
from compressor.errors import (
    ConfigError,
    DataError,
    DeviceError,
    EngineError,
    EquivalenceError,
    InterruptedRunError,
    MeasurementError,
    SearchError,
)
from compressor.evaluate import accuracy, check_agree, drop_of
from compressor.export import export_onnx
from compressor.graph import cost, outputs
from compressor.graph.costs import layer_costs
from compressor.importance import IMPORTANCES
from compressor.latency.device import open_device
from compressor.latency.onnxruntime import predictor
from compressor.latency.ssh import find_device
from compressor.latency.targets import load_target
from compressor.latency.timing import is_win
from compressor.prunable import MODULE, TRACED, Prunable, load_model, make_prunable, with_branches
from compressor.run_folder import RunFolder
from compressor.search import ASK_FOR_FEATURES, make_strategy
from compressor.search.greedy import lazy_greedy
from compressor.search.objective import (
    START,
    TIME,
    Harmed,
    Objective,
    Problem,
    Proposal,
    best_first,
    feasible_first,
    is_hopeless,
)
from compressor.search.space import SearchSpace, make_space
from compressor.search.study import Study
from compressor.surgery import check_dropped, groups_left, prune_with_nni, remove_branches
from compressor.training import Recipe, Tuned, fine_tune, halving, suitable
from compressor.values import (
    MACS,
    MAX_DROP,
    PARAMS,
    Basis,
    Branch,
    ChannelGroup,
    Data,
    Latency,
    LoadedModel,
    PairedLatency,
    Plan,
    Progress,
    ProgressCallback,
    Result,
    Side,
    Split,
    Target,
    Trial,
    Verdict,
)

N_RANKING_IMAGES = 500  # that gradients are averaged over, where importance looks at them
MIN_INFORMED = 10  # trials; below that, trying every variable first would cost more than they do
FRONT_TIMES = (0.9, 0.75, 0.6, 0.45, 0.3)  # shares of the original's, between which bands lie
N_FINALISTS = 5  # plans measured again, at most, before one is chosen

PROPOSAL = "proposal"
TRIAL_PARTS = (PROPOSAL, SURGERY, REPAIR, RECALIBRATION, EXPORT, LATENCY, ACCURACY)
INHERENT_PARTS = (RECALIBRATION, ACCURACY, LATENCY)  # forward passes and measuring

TrialCallback = Callable[[Trial], None]

logger = logging.getLogger(__name__)


def compress(
    config: Config,
    *,
    on_trial: TrialCallback = lambda _trial: None,
    on_progress: ProgressCallback = lambda _progress: None,
) -> Result:
    """Searches, measures, prunes, recovers, exports and proves; leaves a run folder.

    Args:
        config: What is asked for; see `load_config`.
        on_trial: Told of every trial as it ends.
        on_progress: Told how far long work has come.

    Returns:
        The result, which is also in `result.json` of the run folder.

    Raises:
        CompressorError: See `compressor.errors`; bad input is found before anything is written.
    """
    with _search_of(config, on_trial, on_progress) as (job, bench, folder, searched):
        if searched.problem.objective.front and config.max_drop is not None:
            winner = fastest_within_drop(job, searched, bench, on_progress)
        else:
            finalists = choose(job, searched, bench, on_progress)
            winner = contest(job, finalists, bench, on_progress)
        return build(job, searched, winner, bench, folder, on_progress)


def compress_front(
    config: Config,
    *,
    on_trial: TrialCallback = lambda _trial: None,
    on_progress: ProgressCallback = lambda _progress: None,
) -> tuple[Result, ...]:
    """One search, and a finished model for every band of speed, slowest first.

    Args:
        config: With `pareto`, or any other goal.
        on_trial: Told of every trial as it ends.
        on_progress: Told how far long work has come.

    Returns:
        The results, each with a folder of its own in the run folder.

    Raises:
        CompressorError: See `compressor.errors`; bad input is found before anything is written.
    """
    with _search_of(config, on_trial, on_progress) as (job, bench, folder, searched):
        results: list[Result] = []
        for band in bands(searched):
            winner = contest(job, choose(job, band, bench, on_progress), bench, on_progress)
            point = folder.within(f"point-{len(results) + 1}", config.as_toml())
            results.append(build(job, searched, winner, bench, point, on_progress))
        return tuple(results)


@contextmanager
def _search_of(
    config: Config, on_trial: TrialCallback, on_progress: ProgressCallback
) -> Iterator[tuple["Job", Bench, RunFolder, "Searched"]]:
    """What both ways to end a run begin with; the device stays open meanwhile."""
    on_progress(Progress("Reading model and data", 0, 1))
    job = prepare(config)
    with open_device(job.target) as device:
        on_progress(Progress("Measuring the original", 0, 1))
        bench = Bench(
            job.prunable, job.space, job.data, job.target, device,
            recovery=job.recovery, on_progress=on_progress,
        )  # fmt: skip
        problem = pose(job, bench, on_progress)
        default_name = f"{config.model.stem}-{job.target.name}"
        folder = run_folder.create(config.out, default_name, config.as_toml())
        with run_folder.logged(folder), _what_is_kept(folder):
            yield job, bench, folder, search(job, problem, bench, folder, on_trial, on_progress)


def build(
    job: "Job",
    searched: "Searched",
    winner: "Winner",
    bench: Bench,
    folder: RunFolder,
    on_progress: ProgressCallback,
) -> Result:
    """Prunes for real, trains on, exports and proves."""
    compact, engines = cut_out(job, winner.plan, on_progress)
    recipe = job.recipe(winner.n_steps_left, job.config.seed)
    tuned = train(job, winner.network, bench, recipe, on_progress, folder.training)
    compact.load_state_dict(tuned.model.state_dict())
    training = training_report(job, winner, tuned)
    return finish(
        job, searched, winner.plan, compact, engines, training, bench, folder, on_progress
    )


@dataclass(frozen=True, eq=False)
class Job:
    """What is compressed for what, checked and in memory."""

    config: Config
    target: Target
    loaded: LoadedModel
    data: Data
    prunable: Prunable
    space: SearchSpace

    @property
    def model(self) -> nn.Module:
        """The original, in the form in which it is pruned."""
        return self.prunable.module

    @property
    def recovery(self) -> Recovery:
        """What is done to pruned networks before their accuracy is taken."""
        config = self.config
        return Recovery(config.least_squares, config.recalibration_images)

    @property
    def n_steps(self) -> int:
        """Of all training together."""
        n_batches = max(1, len(self.data.fit) // self.config.batch_size)
        return self.config.fine_tune_epochs * n_batches

    def recipe(self, n_steps: int, seed: int) -> Recipe:
        """How it is trained on."""
        config = self.config
        return Recipe(
            n_steps=n_steps,
            learning_rate=config.learning_rate,
            batch_size=config.batch_size,
            distillation=config.distillation,
            temperature=config.temperature,
            label_smoothing=config.label_smoothing,
            ema_decay=config.ema,
            augmentations=self.augmentations,
            is_compiled=config.compile,
            seed=seed,
        )

    @cached_property
    def augmentations(self) -> tuple[str, ...]:
        """What becomes of images while the network is trained."""
        if self.config.augment == AUTO:
            return suitable(self.model, self.data.search)
        return tuple(self.config.augment)

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """Its channel groups."""
        return self.prunable.groups

    @property
    def example(self) -> Tensor:
        """`(1, c, h, w)`; `prepare` has checked that the model takes one tensor."""
        assert isinstance(self.loaded.example_input, Tensor)
        return self.loaded.example_input


def prepare(config: Config) -> Job:
    """Everything that bad input can break, before anything is written."""
    config.check_goal()
    if config.device is not None:
        find_device(config.device)
    if config.out is not None:
        run_folder.check_free(config.out)
    target = load_target(
        config.target,
        device=config.device,
        precision=config.precision,
        estimate=config.estimate,
    )
    if config.data is None:
        raise ConfigError("No images to rank plans by; give --data FILE.npz or --data FOLDER.")
    data = read_data(config, config.data)
    if config.input_shape is not None and config.input_shape != data.input_shape:
        raise ConfigError(
            f"--input-shape is {config.input_shape}, but the images are {data.input_shape}."
        )
    loaded = read_model(config, data.input_shape)
    _check_outputs(loaded, data, is_folder=config.data.is_dir())
    prunable = make_prunable(loaded.module, loaded.example_input)
    if config.depth:
        prunable = with_branches(prunable, loaded.example_input)
    groups = prunable.groups
    scores = IMPORTANCES[config.importance].scores(
        prunable.module, groups, partial(_ranking_batches, data.fit)
    )
    space = make_space(
        groups,
        {name: score.numpy() for name, score in scores.items()},
        step=target.step,
        min_keep_ratio=config.min_keep_ratio,
        branches=prunable.branches,
    )
    job = Job(config, target, loaded, data, prunable, space)
    check_surgery(prunable, space.plan(space.narrowest), data)
    return job


def _ranking_batches(fit: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """What importance may look at: some images of every kind, always the same ones."""
    for rows in fit.draw(N_RANKING_IMAGES).split(BATCH_SIZE):
        yield fit.model_input(rows), fit.labels[rows]


def _check_outputs(loaded: LoadedModel, data: Data, *, is_folder: bool) -> None:
    """Raises `DataError` where the model has not one logit for every class."""
    if not isinstance(loaded.example_input, Tensor):
        raise DataError("The model takes several inputs; images alone cannot rank its plans.")
    output = outputs(loaded.module, loaded.example_input)
    if not isinstance(output, Tensor) or output.ndim != 2:
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise DataError(
            f"The model must return one tensor of logits, shape (1, n_classes); it returns {what}."
        )
    n_classes, n_logits = len(data.class_names), output.shape[1]
    if n_logits < n_classes or (is_folder and n_logits != n_classes):
        raise DataError(
            f"The data has {n_classes} classes ({data.class_names[0]} to {data.class_names[-1]}), "
            f"the model {n_logits} logits. Class folders, sorted by name, must be its outputs."
        )


def read_data(config: Config, source: Path) -> Data:
    """The images at `source`, as `config` wants them read."""
    return load_data(
        source,
        image_size=config.image_size,
        n_channels=config.input_shape[0] if config.input_shape else None,
        mean=config.mean,
        std=config.std,
        seed=config.seed,
    )


def read_model(config: Config, input_shape: Sequence[int] | None) -> LoadedModel:
    """The model of `config`."""
    return load_model(
        config.model,
        arch=config.arch,
        arch_args=config.arch_args,
        input_shape=input_shape,
        trust=config.trust,
    )


def pose(job: Job, bench: Bench, on_progress: ProgressCallback) -> Problem:
    """Turns the user's limits into shares of the original's costs, and measures what it takes.

    Raises:
        ConfigError: The original meets them already.
    """
    original_ms = bench.noise_floor.original.median_ms
    original_accuracy = bench.original_accuracy()
    limits: dict[str, float] = {}
    min_accuracy = None
    for constraint in job.config.constraints:
        if constraint.kind in (MACS, PARAMS):
            limits[constraint.kind] = constraint.value
        elif constraint.kind == MAX_DROP:
            min_accuracy = original_accuracy.value - constraint.value / 100
        else:
            limits[TIME] = 1 / constraint.min_speedup(original_ms)
            if limits[TIME] >= 1:
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
        timed=bench.timed_plans(seed, at_most=job.config.trials // 2),
    )
    if is_hopeless(problem) or job.config.trials < MIN_INFORMED:
        return problem
    if job.config.search in ASK_FOR_FEATURES:
        return replace(problem, features=bench.features())
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
    folder: RunFolder,
    on_trial: TrialCallback,
    on_progress: ProgressCallback,
) -> Searched:
    """Proposes and measures until the budget is spent or nothing is left to try."""
    strategy = make_strategy(job.config.search, **_search_options(job.config))
    study = Study.create(folder.study, job.space)
    study.keep(problem)
    started = time.perf_counter()
    budget = job.config.time_budget or float("inf")
    hopeless = is_hopeless(problem)
    while len(study.trials) < problem.n_trials and time.perf_counter() - started < budget:
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
        trial = _run_trial(job, study, proposal, bench, seconds)
        on_trial(trial)
        if hopeless:
            logger.info("the fastest plan stays far beyond the limit; no need to go on")
            break
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
    running = study.begin(proposal)
    outcome: dict[str, Any] = {}
    latency = None
    try:
        plan = job.space.plan(proposal.widths)
        measured, latency = bench.measure(plan, seconds, seed=job.config.seed + running.number)
        outcome = {
            "accuracy": measured,
            "speedup": latency.ratio,
            "speedup_ci95": latency.ranking_ci95,
            "latency_ms": latency.candidate.median_ms,
        }
    except MeasurementError as err:
        outcome = {"failed_because": str(err)}
    trial = Trial(
        number=running.number,
        widths=job.space.by_name(proposal.widths),
        phase=proposal.phase,
        seconds=seconds,
        **outcome,
    )
    study.finish(running, trial, latency)
    logger.info("%s", trial)
    return trial


def bands(searched: Searched) -> list[Searched]:
    """The search once for every band of time that has a trial; slowest first.

    A band whose best trial is less accurate than that of a faster band is left out.
    """
    problem = searched.problem
    found: list[tuple[float, Searched]] = []
    edges = (*FRONT_TIMES, 0.0)
    for limit, floor in itertools.pairwise(edges):
        within = replace(problem, objective=Objective(limits={TIME: limit}))
        ranked = [
            t for t in feasible_first(searched.trials, within) if within.share(TIME, t) > floor
        ]
        if ranked:
            accuracy = ranked[0].accuracy
            assert accuracy is not None
            found.append((accuracy.value, replace(searched, problem=within, trials=ranked)))
    return [
        band
        for i, (best, band) in enumerate(found)
        if all(best >= faster for faster, _ in found[i + 1 :])
    ]


def choose(
    job: Job, searched: Searched, bench: Bench, on_progress: ProgressCallback
) -> list[Plan]:
    """The best plans that meet the limits when they are measured again, with more effort.

    Plans just within a limit owe it partly to luck, so those whose whole interval meets it are
    preferred to those whose figure does; the surest plan of the search is always looked at. Where
    no trial met the limits: the one that came nearest.
    """
    problem = searched.problem
    feasible = feasible_first(searched.trials, problem)
    if not feasible:
        nearest = best_first(searched.trials, problem)[0]
        return [job.space.plan(job.space.from_names(nearest.widths))]
    surest = max(feasible, key=lambda t: t.speedup_ci95[0] if t.speedup_ci95 else 0.0)
    finalists = feasible[:N_FINALISTS]
    if surest not in finalists:
        finalists.append(surest)
    min_speedup = 1 / problem.objective.limits.get(TIME, 1.0)
    again: list[tuple[Plan, PairedLatency]] = []
    met: list[Plan] = []
    surely: list[Plan] = []
    for trial in finalists:
        on_progress(Progress("Measuring finalists", len(again), len(finalists)))
        plan = job.space.plan(job.space.from_names(trial.widths))
        latency = bench.remeasure(plan)
        logger.info("finalist %d: speed-up %.3f %s", trial.number, latency.ratio, latency.ci95)
        again.append((plan, latency))
        if all(c.is_met_in_time(latency) for c in job.config.constraints):
            met.append(plan)
            if latency.ci95[0] >= min_speedup:
                surely.append(plan)
        if len(surely) == job.config.finalists:
            break
    on_progress(Progress("Measuring finalists", len(finalists), len(finalists)))
    if met:
        return surely or met
    return [max(again, key=lambda pair: pair[1].ratio)[0]]


@dataclass(frozen=True, eq=False)
class Winner:
    """The plan that is shipped.

    Attributes:
        plan: What is left out.
        network: Repaired, and trained a little where there were rivals.
        n_steps_left: Of the budget of steps.
        scores: Of every finalist, after each of its short trainings.
    """

    plan: Plan
    network: nn.Module
    n_steps_left: int
    scores: tuple[tuple[float, ...], ...]


def contest(
    job: Job, finalists: Sequence[Plan], bench: Bench, on_progress: ProgressCallback
) -> Winner:
    """The finalist that learns best, and its network as far as it was trained.

    The search ranks plans before training. Here each gets a short one, the better half another
    one, and so on, all out of one budget of steps.

    Returns:
        Plan, network, and the steps that are left.
    """
    n_left = job.n_steps
    finalists = finalists[: job.config.finalists if n_left else 1]
    networks = [(plan, bench.repaired(plan, {})) for plan in finalists]
    scores: dict[int, list[float]] = {id(plan): [] for plan in finalists}
    for n_plans, n_steps in halving(len(finalists), n_left):
        rivals: list[tuple[Plan, Tuned]] = []
        for plan, network in networks:
            on_progress(Progress("Training finalists", len(rivals), n_plans))
            recipe = job.recipe(n_steps, job.config.seed + 1 + n_plans)  # other images each round
            rivals.append((plan, train(job, network, bench, recipe, _in_silence)))
            n_left -= n_steps
        on_progress(Progress("Training finalists", n_plans, n_plans))
        rivals.sort(key=lambda pair: pair[1].score, reverse=True)
        for plan, tuned in rivals:
            scores[id(plan)].append(tuned.score)
        networks = [(plan, tuned.model) for plan, tuned in rivals[: (n_plans + 1) // 2]]
    plan, network = networks[0]
    return Winner(plan, network, n_left, tuple(tuple(s) for s in scores.values()))


def fastest_within_drop(
    job: Job, searched: Searched, bench: Bench, on_progress: ProgressCallback
) -> Winner:
    """The fastest plan that loses no more than it may once it is trained, by bisection.

    Of the search's plans those are looked at than which none is both faster and more accurate.
    The loss is that on the search split, plus its standard error. Where no plan stays within it,
    the most accurate one is taken, and the verdict will say so.
    """
    assert job.config.max_drop is not None
    plans = front(searched)
    original = bench.right(job.model)
    within, trained = None, None
    low, high, n_trained = 0, len(plans) - 1, 0
    while low <= high:
        middle = (low + high) // 2
        on_progress(Progress("Training along the front", n_trained, len(plans).bit_length()))
        network = bench.repaired(plans[middle], {})
        recipe = job.recipe(job.n_steps, job.config.seed)
        tuned = train(job, network, bench, recipe, _in_silence)
        n_trained += 1
        drop, error = drop_of(original, bench.right(tuned.model))
        logger.info("plan %d of %d: drop %.4f +- %.4f", middle, len(plans), drop, error)
        trained = Winner(plans[middle], tuned.model, 0, ((tuned.score,),))
        if drop + error <= job.config.max_drop / 100:
            within, low = trained, middle + 1
        else:
            high = middle - 1
    on_progress(Progress("Training along the front", n_trained, n_trained))
    winner = within or trained  # without one within it, the slowest was trained last
    assert winner is not None
    return winner


def front(searched: Searched) -> list[Plan]:
    """Plans than which none of the search is both faster and more accurate; slowest first."""
    space = searched.problem.space
    best, plans = -1.0, []
    measured = [t for t in searched.trials if t.accuracy is not None]
    for trial in sorted(measured, key=lambda t: t.speedup or 0.0, reverse=True):
        assert trial.accuracy is not None
        if trial.accuracy.value > best:
            best = trial.accuracy.value
            plans.append(space.plan(space.from_names(trial.widths)))
    return plans[::-1]


def _in_silence(_progress: Progress) -> None:
    """Short trainings are told of by the number of them."""


def train(
    job: Job,
    network: nn.Module,
    bench: Bench,
    recipe: Recipe,
    on_progress: ProgressCallback,
    checkpoint: Path | None = None,
) -> Tuned:
    """Fine-tuning; never worse on the search split than before."""
    return fine_tune(
        network,
        job.data.fit,
        recipe,
        teacher=job.model,
        score=lambda model: bench.accuracy(model).value,
        on_progress=on_progress,
        checkpoint=checkpoint,
        memory_format=bench.memory_format,
    )


def cut_out(
    job: Job, plan: Plan, on_progress: ProgressCallback
) -> tuple[nn.Module, dict[str, object]]:
    """The compact network, and how far each engine's outputs are from it on real images.

    It is NNI's where NNI can process the network and answers the same, else that of our own
    surgery; `engines` says which and why.

    Raises:
        EquivalenceError: The masked original answers differently.
    """
    on_progress(Progress("Pruning with NNI and checking", 0, 1))
    images = job.data.search.model_input(slice(0, N_PROOF_IMAGES))
    compact, error = check_surgery(job.prunable, plan, job.data)
    engines: dict[str, object] = {"masked": error}
    dropped = check_dropped(job.prunable.branches, plan)
    network = remove_branches(job.model, dropped)
    groups = groups_left(job.groups, dropped, network)
    try:
        by_nni = prune_with_nni(network, job.example, groups, plan)
        engines["nni"] = check_agree("NNI and own surgery", compact, by_nni, images)
    except (EngineError, EquivalenceError) as err:
        logger.warning("%s Own surgery's model is used; it equals the masked original.", err)
        engines["nni"] = str(err)
        return compact, engines
    return by_nni, engines


def finish(
    job: Job,
    searched: Searched,
    plan: Plan,
    tuned: nn.Module,
    engines: Mapping[str, object],
    training: Mapping[str, object],
    bench: Bench,
    folder: RunFolder,
    on_progress: ProgressCallback,
) -> Result:
    """Exports both models, proves and measures the files, and writes the result last."""
    on_progress(Progress("Measuring the exported files", 0, 1))
    original, example = job.model, job.example  # the form that the search measured
    export = partial(export_onnx, opset=job.target.opset, max_ir=job.target.max_ir)
    images = job.data.test.model_input(slice(0, N_PROOF_IMAGES))
    original_file = export(original, example, folder.original_onnx)
    with folder.unproven_onnx() as unproven:
        export(tuned, example, unproven)
        answers = predictor(unproven, n_threads=n_cores())
        error = check_agree("torch and ONNX Runtime", tuned, answers, images)
        speedup = bench.compare(original_file, unproven)
        before = measured_side(job, original, original_file, speedup.original)
        after = measured_side(job, tuned, unproven, speedup.candidate)
        are_met = [c.is_met(speedup, before, after) for c in job.config.constraints]
        verdict = judge(speedup, searched.noise_floor, are_met)
        handed_back = verdict is not Verdict.NOT_FASTER
        if handed_back:
            folder.write_checkpoint(rebuildable(job, plan, tuned))
            unproven.replace(folder.model_onnx)
    errors = [e for e in (*engines.values(), error) if isinstance(e, float)]
    result = Result(
        verdict=verdict,
        target=job.target.name,
        runtime=job.target.runtime,
        basis=speedup.basis,
        constraint=next(iter(job.config.constraints), None),
        constraints=job.config.constraints,
        branches=branches_table(job.prunable.branches, plan),
        training=training,
        original=before,
        compressed=after if handed_back else None,
        speedup=speedup,
        accuracy_drop_points=100 * (before.accuracy - after.accuracy) if handed_back else None,
        equivalence={
            "engines": {**engines, "onnxruntime": error},
            "n_inputs": len(images),
            "max_abs_error": max(errors),
        },
        search=search_report(job, searched),
        groups=groups_table(job.prunable, plan),
        environment={
            **run_folder.describe_environment(job.target, job.loaded, job.data),
            "device": dict(bench.described),
        },
        out=folder.path,
    )
    folder.write_result(result)
    folder.training.unlink(missing_ok=True)
    return result


def training_report(job: Job, winner: Winner, tuned: Tuned) -> dict[str, object]:
    """How the shipped network was trained."""
    config = job.config
    if not job.n_steps:
        return {}
    return {
        "steps": job.n_steps,
        "batch_size": config.batch_size,
        "finalists": [list(scores) for scores in winner.scores],
        "distillation": config.distillation,
        "augmentations": list(job.augmentations),
        "search_accuracy": tuned.score,
        "stopped_because": tuned.stopped_because,
    }


def rebuildable(job: Job, plan: Plan, tuned: nn.Module) -> dict[str, object]:
    """The content of `model.pt`: tensors and plain values, read by `load_compressed`."""
    return {
        "state_dict": tuned.state_dict(),
        "plan": {name: list(kept) for name, kept in plan.kept.items()},
        "dropped": list(plan.dropped),
        "arch": job.config.arch,
        "arch_args": dict(job.config.arch_args),
        "input_shape": list(job.data.input_shape),
        "form": MODULE if job.prunable.form == TRACED and not plan.dropped else job.prunable.form,
    }


def measured_side(job: Job, model: nn.Module, file: Path, latency: Latency) -> Side:
    """One model of the result: its test accuracy is that of the ONNX file."""
    paper = cost(model, job.loaded.example_input)
    predict = predictor(file, n_threads=n_cores())
    return Side(
        accuracy=accuracy(predict, job.data.test, batch_size=1).value,
        latency_ms=latency,
        macs=paper.macs,
        params=paper.params,
        file_bytes=file.stat().st_size,
    )


def groups_table(prunable: Prunable, plan: Plan) -> list[dict[str, object]]:
    """What became of every channel group; one that went with its branch keeps 0."""
    gone = {name for b in prunable.branches if b.name in plan.dropped for name in b.groups}
    return [
        {
            "name": group.name,
            "channels": group.n_channels,
            "unit": group.unit,
            "kept": 0 if group.name in gone else plan.width(group),
            "locked_because": group.locked_because,
        }
        for group in prunable.groups
    ]


def branches_table(branches: Sequence[Branch], plan: Plan) -> list[dict[str, object]]:
    """What became of every residual branch."""
    return [{"name": b.name, "kept": b.name not in plan.dropped, "macs": b.macs} for b in branches]


def judge(speedup: PairedLatency, noise_floor: PairedLatency, are_met: Sequence[bool]) -> Verdict:
    """Whether the limits are met; and what is no faster than noise can make it is no win.

    An estimate has no noise, and its error is no interval: only its ratio is looked at, and the
    result is labelled with its basis.
    """
    is_estimate = speedup.basis is Basis.ESTIMATE
    if not (speedup.ratio > 1 if is_estimate else is_win(speedup, noise_floor)):
        return Verdict.NOT_FASTER
    return Verdict.MET if all(are_met) else Verdict.INFEASIBLE


def search_report(job: Job, searched: Searched) -> dict[str, object]:
    """How the plan was found, and what a trial cost: seconds a trial, part by part."""
    trials = searched.trials
    parts = {
        part: sum(t.seconds.get(part, 0.0) for t in trials) / len(trials) for part in TRIAL_PARTS
    }
    wall = searched.seconds / len(trials)
    floor = searched.noise_floor
    return {
        "strategy": job.config.search,
        "n_trials": len(trials),
        "n_failed": sum(trial.failed_because is not None for trial in trials),
        "seconds": searched.seconds,
        "seed": job.config.seed,
        "limits": dict(searched.problem.objective.limits),
        "front": job.config.pareto,
        "n_timed_before": len(searched.problem.timed),
        "noise_floor": {"ratio": floor.ratio, "ci95": list(floor.ci95)},
        "seconds_per_trial": {**parts, "all": wall},
        "overhead_seconds_per_trial": wall - sum(parts[part] for part in INHERENT_PARTS),
    }


@contextmanager
def _what_is_kept(folder: RunFolder) -> Iterator[None]:
    """Says, where a run is stopped or its device is gone, what is left of it."""
    try:
        yield
    except (KeyboardInterrupt, DeviceError) as err:
        kept = "Nothing was measured yet"
        if folder.study.is_file():
            kept = f"The trials so far are kept; `compress report {folder.path}` shows them"
        logger.warning("stopped: %r", err)
        if isinstance(err, DeviceError):
            raise type(err)(f"{err} {kept}.") from err
        raise InterruptedRunError(f"Stopped. {kept}.") from err
