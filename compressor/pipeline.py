"""The whole method: trained model in, measured-faster ONNX out."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from compressor import run_folder
from compressor.bench import Bench
from compressor.border import config_of
from compressor.config import Config
from compressor.errors import DeviceError, InterruptedRunError, RunFolderError
from compressor.finalists import bands, choose, contest, fastest_within_drop
from compressor.forecast import forecast
from compressor.job import Job, prepare
from compressor.latency.device import open_device
from compressor.run_folder import RunFolder
from compressor.search.study import Study, has_begun, read_trials
from compressor.shipping import build, is_shipped
from compressor.trials import (
    Searched,
    TrialCallback,
    informed,
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
        The results, each with a folder of its own in the run folder; those that came out no
        faster than the original come first.

    Raises:
        CompressorError: See `compressor.errors`; bad input is found before anything is written.
    """
    with searched_in(config, on_trial, on_progress) as run:
        return finish_front(*run, on_progress)


def resume(
    path: Path,
    *,
    force: bool = False,
    trust: bool = False,
    on_trial: TrialCallback = lambda _trial: None,
    on_progress: ProgressCallback = lambda _progress: None,
) -> Result | tuple[Result, ...]:
    """Goes on where a run was stopped, however that was.

    What was measured or trained before is not done again, but for the trial, or the pass over the
    images, that was under way.

    Args:
        path: The run folder.
        force: Go on although the model, the data or `config.toml` is another one now.
        trust: Read pickles in the model file, as it was said to when the run was begun.
        on_trial: Told of every new trial as it ends.
        on_progress: Told how far long work has come.

    Returns:
        As `compress` or `compress_front`; of a run that was finished, what it wrote.

    Raises:
        CompressorError: As for `compress`; or there is nothing to go on with.
    """
    folder = RunFolder(path)
    config = config_of(path, trust=trust)
    if (path / run_folder.RESULT).is_file():
        return run_folder.read_result(path)
    with searched_in(config, on_trial, on_progress, folder, force=force) as run:
        return (finish_front if config.pareto else finish_one)(*run, on_progress)


def replay(
    path: Path,
    *,
    trust: bool = False,
    on_progress: ProgressCallback = lambda _progress: None,
) -> Replayed:
    """Searches again with the measurements that a run has kept; nothing is measured.

    Args:
        path: The run folder.
        trust: Read pickles in the model file, as it was said to when the run was begun.
        on_progress: Told how far it has come.

    Returns:
        Whether every proposal follows from the trials before it, and which trial was shipped.

    Raises:
        CompressorError: There is no run, or model, data or `config.toml` are others now.
    """
    folder = RunFolder(path)
    config = config_of(path, trust=trust)
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
    with ExitStack() as stack:
        if stopped is not None:
            stack.enter_context(_worked_in(stopped))
        job = prepare(config, is_new=stopped is None)
        environment = run_folder.describe_environment(job.target, job.loaded, job.data)
        if stopped is not None:
            stopped.check(environment, force=force)
        device = stack.enter_context(open_device(job.target))
        on_progress(Progress("Measuring the original", 0, 1))
        bench = Bench(
            job.prunable, job.space, job.data, job.target, device,
            recovery=job.recovery, on_progress=on_progress, criterion=job.criterion,
        )  # fmt: skip
        if stopped is not None and has_begun(stopped.study):
            folder, study = stopped, Study.open(stopped.study, job.space)
            problem = posed_before(job, stopped.study)
            expected = forecast(job, bench, problem, n_trials_done=len(study.trials))
            on_progress(Progress("Measuring the original", 1, 1, expected=expected))
        else:
            problem = pose(job, bench)  # the last thing that bad input can break
            expected = forecast(job, bench, problem)
            on_progress(Progress("Measuring the original", 1, 1, expected=expected))
            folder = stopped or stack.enter_context(_new_folder(job, environment, bench))
            study = Study.begin(folder.study, job.space)
            problem = informed(job, problem, bench, study, on_progress)
            study.keep(problem)
        yield job, bench, folder, search(job, problem, bench, study, on_trial, on_progress)


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
    """The best plan of every band of speed as a finished model; those that are there stay.

    The order is that of the last measurements: near a band's edge it may differ from the search's.
    """
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
    return tuple(sorted(results, key=lambda r: (r.compressed is not None, r.speedup.ratio)))


@contextmanager
def _new_folder(job: Job, environment: Mapping[str, object], bench: Bench) -> Iterator[RunFolder]:
    """A folder of its own for the run, which works in it meanwhile."""
    name = f"{job.config.model.stem}-{job.target.name}"
    folder = run_folder.create(job.config.out, name, job.config.as_toml())
    with _worked_in(folder):
        device = {"seed": job.config.seed, "device": dict(bench.described)}
        folder.write_manifest({**environment, **device})
        yield folder


@contextmanager
def _worked_in(folder: RunFolder) -> Iterator[None]:
    """No other process works there meanwhile; whatever ends this one is told, and logged."""
    with folder.locked(), run_folder.logged(folder), _what_is_kept(folder):
        yield


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
