"""The whole method: trained model in, measured-faster ONNX out."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from compressor import run_folder
from compressor.bench import N_PROOF_IMAGES, Bench, check_surgery, n_cores
from compressor.config import Config, make_config
from compressor.errors import (
    DeviceError,
    EngineError,
    EquivalenceError,
    ExportError,
    InterruptedRunError,
    RunFolderError,
)
from compressor.evaluate import accuracy, check_agree
from compressor.export import export_onnx
from compressor.files import write_whole
from compressor.finalists import Winner, bands, choose, contest, fastest_within_drop, train
from compressor.graph import cost
from compressor.job import Job, prepare
from compressor.latency.device import open_device
from compressor.latency.onnxruntime import predictor
from compressor.latency.precision import half_onnx
from compressor.latency.timing import is_win
from compressor.prunable import MODULE, TRACED, Prunable
from compressor.run_folder import RunFolder
from compressor.search.study import Study, has_begun
from compressor.surgery import check_dropped, groups_left, prune_with_nni, remove_branches
from compressor.training import Tuned
from compressor.trials import INHERENT_PARTS, TRIAL_PARTS, Searched, TrialCallback, pose, search
from compressor.values import (
    Basis,
    Branch,
    Latency,
    PairedLatency,
    Plan,
    Progress,
    ProgressCallback,
    Result,
    Side,
    Verdict,
)

FP16 = "fp16"
FP16_TOLERANCE = 3e-2  # of the largest output; each of some 50 layers rounds to 1 in 2,048

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
    with searched_in(config, on_trial, on_progress) as run:
        return finish_one(*run, on_progress)


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
    with searched_in(config, on_trial, on_progress) as run:
        return finish_front(*run, on_progress)


def resume(
    path: Path,
    *,
    force: bool = False,
    on_trial: TrialCallback = lambda _trial: None,
    on_progress: ProgressCallback = lambda _progress: None,
) -> Result | tuple[Result, ...]:
    """Goes on where a run was stopped, however that was.

    What was measured or trained before is not done again, but for the trial, or the pass over the
    images, that was under way.

    Args:
        path: The run folder.
        force: Go on although the model, the data or `config.toml` is another one now.
        on_trial: Told of every new trial as it ends.
        on_progress: Told how far long work has come.

    Returns:
        As `compress` or `compress_front`; of a run that was finished, what it wrote.

    Raises:
        CompressorError: As for `compress`; or there is nothing to go on with.
    """
    folder = RunFolder(path)
    config = make_config(run_folder.read_settings(path) | {"out": path})
    if (path / run_folder.RESULT).is_file():
        return run_folder.read_result(path)
    with searched_in(config, on_trial, on_progress, folder, force=force) as run:
        return (finish_front if config.pareto else finish_one)(*run, on_progress)


@contextmanager
def searched_in(
    config: Config,
    on_trial: TrialCallback,
    on_progress: ProgressCallback,
    stopped: RunFolder | None = None,
    *,
    force: bool = False,
) -> Iterator[tuple[Job, Bench, RunFolder, Searched]]:
    """What all ways to end a run begin with; the device stays open meanwhile.

    Args:
        config: What is asked for.
        on_trial: Told of every trial as it ends.
        on_progress: Told how far long work has come.
        stopped: Of a run that goes on.
        force: See `resume`.
    """
    on_progress(Progress("Reading model and data", 0, 1))
    job = prepare(config, is_new=stopped is None)
    environment = run_folder.describe_environment(job.target, job.loaded, job.data)
    if stopped is not None:
        stopped.check(environment, force=force)
    with open_device(job.target) as device:
        on_progress(Progress("Measuring the original", 0, 1))
        bench = Bench(
            job.prunable, job.space, job.data, job.target, device,
            recovery=job.recovery, on_progress=on_progress, criterion=job.criterion,
        )  # fmt: skip
        known = None
        if stopped is not None and has_begun(stopped.study):
            known = stopped.study
        problem = pose(job, bench, on_progress, known)
        default_name = f"{config.model.stem}-{job.target.name}"
        folder = stopped or run_folder.create(config.out, default_name, config.as_toml())
        with folder.locked(), run_folder.logged(folder), _what_is_kept(folder):
            if stopped is None:
                folder.write_manifest(environment)
            if known is None:
                folder.study.unlink(missing_ok=True)
                study = Study.create(folder.study, job.space)
                study.keep(problem)
            else:
                study = Study.open(folder.study, job.space)
            searched = search(job, problem, bench, study, on_trial, on_progress)
            yield job, bench, folder, searched


def finish_one(
    job: Job, bench: Bench, folder: RunFolder, searched: Searched, on_progress: ProgressCallback
) -> Result:
    """The best plan as a finished model."""
    if searched.problem.objective.front and job.config.max_drop is not None:
        winner = fastest_within_drop(job, searched, bench, folder, on_progress)
    else:
        finalists = choose(job, searched, bench, folder, on_progress)
        winner = contest(job, finalists, bench, folder, on_progress)
    return build(job, searched, winner, bench, folder, on_progress)


def finish_front(
    job: Job, bench: Bench, folder: RunFolder, searched: Searched, on_progress: ProgressCallback
) -> tuple[Result, ...]:
    """The best plan of every band of speed as a finished model; those that are there stay."""
    results: list[Result] = []
    for band in bands(searched):
        point = folder.within(f"point-{len(results) + 1}", job.config.as_toml())
        if (point.path / run_folder.RESULT).is_file():
            results.append(run_folder.read_result(point.path))
            continue
        finalists = choose(job, band, bench, point, on_progress)
        winner = contest(job, finalists, bench, point, on_progress)
        results.append(build(job, searched, winner, bench, point, on_progress))
    folder.forget_unfinished()
    return tuple(results)


def build(
    job: Job,
    searched: Searched,
    winner: Winner,
    bench: Bench,
    folder: RunFolder,
    on_progress: ProgressCallback,
) -> Result:
    """Prunes for real, trains on, exports and proves."""
    compact, engines = cut_out(job, winner.plan, on_progress)
    recipe = job.recipe(winner.n_steps_left, job.config.seed)
    stands = folder.unfinished / "training.pt"
    tuned = train(job, winner.network, bench, recipe, on_progress, stands)
    compact.load_state_dict(tuned.model.state_dict())
    training = training_report(job, winner, tuned)
    return finish(
        job, searched, winner.plan, compact, engines, training, bench, folder, on_progress
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
    engines: dict[str, object],
    training: Mapping[str, object],
    bench: Bench,
    folder: RunFolder,
    on_progress: ProgressCallback,
) -> Result:
    """Exports both models, proves and measures the files, and writes the result last."""
    on_progress(Progress("Measuring the exported files", 0, 1))
    images = job.data.test.model_input(slice(0, N_PROOF_IMAGES))
    original_file = folder.original_onnx
    with folder.unproven_onnx() as unproven:
        engines = engines | export_both(job, tuned, (original_file, unproven), images, bench)
        speedup = bench.compare(original_file, unproven)
        before = measured_side(job, job.model, original_file, speedup.original, bench)
        after = measured_side(job, tuned, unproven, speedup.candidate, bench, before.metric)
        are_met = [c.is_met(speedup, before, after) for c in job.config.constraints]
        verdict = judge(speedup, searched.noise_floor, are_met)
        handed_back = verdict is not Verdict.NOT_FASTER
        if handed_back:
            folder.write_checkpoint(rebuildable(job, plan, tuned))
            unproven.replace(folder.model_onnx)
    errors = [e for e in engines.values() if isinstance(e, float)]
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
            "engines": engines,
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
    folder.forget_unfinished()
    return result


def training_report(job: Job, winner: Winner, tuned: Tuned) -> dict[str, object]:
    """How the shipped network was trained."""
    if not job.data.is_trainable and job.config.fine_tune_epochs:
        return {"skipped_because": "there is no fit split to learn from"}
    if not job.n_steps:
        return {}
    return {
        "steps": job.n_steps,
        "batch_size": job.config.batch_size,
        "finalists": [list(scores) for scores in winner.scores],
        "distillation": job.distillation,
        "augmentations": list(job.augmentations),
        "search_accuracy": tuned.score,
        "search_accuracy_before": (
            tuned.score_before if winner.score_before is None else winner.score_before
        ),
        "stopped_because": winner.stopped_because or tuned.stopped_because,
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


def export_both(
    job: Job, tuned: nn.Module, files: tuple[Path, Path], images: Tensor, bench: Bench
) -> dict[str, float]:
    """Writes the original and the compressed network; how far the latter's answers are from torch.

    For a target that runs FP16 both files are FP16, inputs and outputs aside. ONNX Runtime on a
    CPU rounds to FP16 between operations, not within them: the device's own rounding may add to
    that error.

    Raises:
        ExportError: A file cannot be written as the target needs it.
        EquivalenceError: They do not agree, or FP16 has not the range for this network.
    """
    for network, file in zip((job.model, tuned), files, strict=True):
        export_onnx(network, job.example, file, opset=job.target.opset, max_ir=job.target.max_ir)
    open_file = partial(predictor, files[-1], n_threads=n_cores(), like=bench.like)
    errors = {"onnxruntime": check_agree("torch and ONNX Runtime", tuned, open_file(), images)}
    if job.target.precision != FP16:
        return errors
    for file in files:
        try:
            write_whole(file, half_onnx(file.read_bytes(), str(file)))
        except ValueError as err:
            raise ExportError(str(err)) from err
    in_half = check_agree("torch and FP16", tuned, open_file(), images, tolerance=FP16_TOLERANCE)
    return errors | {FP16: in_half}


def measured_side(
    job: Job,
    model: nn.Module,
    file: Path,
    latency: Latency,
    bench: Bench,
    original: float | None = None,
) -> Side:
    """One model of the result: its test accuracy is that of the ONNX file.

    `original` is the metric of the original, of a task that is no classification.
    """
    paper = cost(model, job.loaded.example_input)
    predict = predictor(file, n_threads=n_cores(), like=bench.like)
    measured = accuracy(
        predict, job.data.test, batch_size=1, criterion=job.criterion, original=original
    )
    return Side(
        accuracy=measured.value,
        latency_ms=latency,
        macs=paper.macs,
        params=paper.params,
        file_bytes=file.stat().st_size,
        metric=measured.metric,
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
        "task": job.criterion.name,
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
    except (KeyboardInterrupt, DeviceError, OSError, RunFolderError) as err:
        kept = f"All that was measured is kept; `compress resume {folder.path}` goes on"
        logger.warning("stopped: %r", err)
        if isinstance(err, (DeviceError, RunFolderError)):
            raise type(err)(f"{err} {kept}.") from err
        if isinstance(err, OSError):
            raise RunFolderError(f"{folder.path} cannot be written: {err}. {kept}.") from err
        raise InterruptedRunError(f"Stopped. {kept}.") from err
