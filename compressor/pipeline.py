"""The whole method: trained model in, measured-faster ONNX out."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compressor import run_folder
from compressor.bench import Bench
from compressor.config import Config, make_config
from compressor.errors import DeviceError, InterruptedRunError, RunFolderError
from compressor.finalists import bands, choose, contest, fastest_within_drop
from compressor.job import Job, prepare
from compressor.latency.device import open_device
from compressor.run_folder import RunFolder
from compressor.search.study import Study, has_begun, read_trials
from compressor.shipping import build, is_shipped
from compressor.trials import (
    Searched,
    TrialCallback,
    pose,
    posed_before,
    proposed,
    search,
    strategy_of,
)
from compressor.values import Progress, ProgressCallback, Replayed, Result

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


def replay(path: Path, *, on_progress: ProgressCallback = lambda _progress: None) -> Replayed:
    """Searches again with the measurements that a run has kept; nothing is measured.

    Args:
        path: The run folder.
        on_progress: Told how far it has come.

    Returns:
        Whether every proposal follows from the trials before it, and which trial was shipped.

    Raises:
        CompressorError: There is no run, or model, data or `config.toml` are others now.
    """
    folder = RunFolder(path)
    config = make_config(run_folder.read_settings(path) | {"out": path})
    job = prepare(config, is_new=False)
    environment = run_folder.describe_environment(job.target, job.loaded, job.data)
    folder.check(environment, force=False)
    trials = read_trials(folder.study)
    problem, strategy = posed_before(job, folder.study), strategy_of(config)
    differs_at = None
    for n, trial in enumerate(trials):
        on_progress(Progress("Searching again", n, len(trials)))
        proposal = proposed(strategy, problem, trials[:n])
        if proposal is None or job.space.by_name(proposal.widths) != trial.widths:
            differs_at = n
            break
    on_progress(Progress("Searching again", len(trials), len(trials)))
    shipped = None
    if (path / run_folder.RESULT).is_file():
        result = run_folder.read_result(path)
        plans = {t.number: job.space.plan(job.space.from_names(t.widths)) for t in trials}
        same = [n for n, plan in plans.items() if is_shipped(job.prunable, plan, result)]
        shipped = same[0] if same else None
    return Replayed(len(trials), differs_at, shipped)


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
        known = stopped.study if stopped is not None and has_begun(stopped.study) else None
        problem = posed_before(job, known) if known else pose(job, bench, on_progress)
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
        finalists = choose(job, searched, bench, on_progress)
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
        finalists = choose(job, band, bench, on_progress)
        winner = contest(job, finalists, bench, point, on_progress)
        results.append(build(job, searched, winner, bench, point, on_progress))
    folder.forget_unfinished()
    return tuple(results)


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
