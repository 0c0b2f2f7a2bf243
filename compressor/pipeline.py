"""The whole method: trained model in, measured-faster ONNX out."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from compressor import run_folder, threads
from compressor.bench import N_ORIGINAL_PARTS, Bench
from compressor.border import config_of
from compressor.budget import Budget
from compressor.config import Config
from compressor.corrections import taught_by_files, taught_by_finalists, worth
from compressor.environment import describe_environment
from compressor.errors import CompressorError, DeviceError, InterruptedRunError, RunFolderError
from compressor.exporter import whole_inputs
from compressor.finalists import (
    Finalists,
    bands,
    choose,
    contest,
    fastest_within_drop,
    front,
    place_of,
)
from compressor.forecast import forecast
from compressor.job import Job, prepare
from compressor.latency.device import open_device
from compressor.run import Run, measured_before
from compressor.run_folder import RunFolder
from compressor.search.objective import History, corrected
from compressor.search.proposals import proposed
from compressor.search.study import Study, read_corrections, read_trials
from compressor.shipping import build, write_result
from compressor.summary import trial_shipped
from compressor.trials import (
    Searched,
    TrialCallback,
    gather_once,
    informed,
    pose,
    posed_before,
    search,
)
from compressor.values import (
    MEASURING_ORIGINAL,
    READING,
    SEARCHING,
    Progress,
    ProgressCallback,
    Replayed,
    Result,
)

logger = logging.getLogger(__name__)


def compress(
    config: Config,
    *,
    since: float | None = None,
    on_trial: TrialCallback = lambda _trial: None,
    on_progress: ProgressCallback = lambda _progress: None,
) -> Result:
    """Searches, measures, prunes, recovers, exports and proves; leaves a run folder.

    Args:
        config: What is asked for; see `load_config`.
        since: When the run began for whoever waits for it, by `time.monotonic`; its time budget
            counts from there. None for now.
        on_trial: Told of every trial as it ends.
        on_progress: Told how far long work has come.

    Returns:
        The result, which is also in `result.json` of the run folder.

    Raises:
        CompressorError: See `compressor.errors`; bad input is found before anything is written.
    """
    with searched_in(config, on_trial, on_progress, since=since) as run:
        return finish_one(*run)


def compress_front(
    config: Config,
    *,
    since: float | None = None,
    on_trial: TrialCallback = lambda _trial: None,
    on_progress: ProgressCallback = lambda _progress: None,
) -> tuple[Result, ...]:
    """One search, and a finished model for every band of speed, slowest first.

    Args:
        config: With `pareto`, or any other goal.
        since: See `compress`.
        on_trial: Told of every trial as it ends.
        on_progress: Told how far long work has come.

    Returns:
        The results, each with a folder of its own in the run folder; those that came out no
        faster than the original come first.

    Raises:
        CompressorError: See `compressor.errors`; bad input is found before anything is written.
    """
    with searched_in(config, on_trial, on_progress, since=since) as run:
        return finish_front(*run)


def resume(
    path: Path,
    *,
    force: bool = False,
    trust: bool = False,
    since: float | None = None,
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
        since: When going on began, as for `compress`.
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
        folder.tidy()
        return run_folder.read_result(path)
    if config.pareto and folder.is_finished_front:
        return in_order(run_folder.read_result(point.parent) for point in folder.points)
    with searched_in(config, on_trial, on_progress, folder, force=force, since=since) as run:
        return (finish_front if config.pareto else finish_one)(*run)


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
    environment = describe_environment(job.target, job.loaded, job.data)
    folder.check(environment, force=False)
    trials, corrections = read_trials(folder.study), read_corrections(folder.study)
    problem = posed_before(job, folder.study)
    differs_at = None
    for n, trial in enumerate(trials):
        on_progress(Progress("Searching again", n, len(trials)))
        known = corrected(trials[:n], [each for each in corrections if each.n_trials <= n])
        proposal = proposed(config.search, job.strategy, problem, History(known))
        if proposal is None or job.space.by_name(proposal.widths) != trial.widths:
            differs_at = n
            break
    on_progress(Progress("Searching again", len(trials), len(trials)))
    shipped = None
    if (path / run_folder.RESULT).is_file():
        result = run_folder.read_result(path)
        found = trial_shipped(job, trials, result)
        shipped = None if found is None else found.number
    return Replayed(len(trials), differs_at, shipped)


@contextmanager
def searched_in(
    config: Config,
    on_trial: TrialCallback,
    on_progress: ProgressCallback,
    stopped: RunFolder | None = None,
    *,
    force: bool = False,
    since: float | None = None,
) -> Iterator[tuple[Run, Searched]]:
    """What all ways to end a run begin with; the device stays open meanwhile.

    Args:
        config: What is asked for.
        on_trial: Told of every trial as it ends.
        on_progress: Told how far it has come.
        stopped: Of a run that goes on.
        force: See `resume`.
        since: See `compress`.
    """
    on_progress(Progress(READING, 0, 1))
    with ExitStack() as stack:
        stack.enter_context(threads.restored())
        if stopped is not None:
            stack.enter_context(_worked_in(stopped))
        budget = Budget(config.time_budget, file=stopped.spent if stopped else None, since=since)
        on_progress = budget.watching(on_progress, is_new=stopped is None)
        job = prepare(config, is_new=stopped is None, on_progress=on_progress)
        environment = describe_environment(job.target, job.loaded, job.data)
        if stopped is not None:
            stopped.check(environment, force=force)
        device = stack.enter_context(open_device(job.target, whole_inputs(job.model, job.example)))
        study = Study.of_stopped(stopped.study, job.space) if stopped else None
        begun = study is not None and study.has_problem
        bench = Bench(
            job.prunable, job.space, job.data, job.target, device,
            recovery=job.recovery, on_progress=on_progress, criterion=job.criterion,
            measured=measured_before(stopped, study, device) if stopped and study else None,
        )  # fmt: skip
        if stopped is not None and begun:
            folder, problem = stopped, posed_before(job, stopped.study)
        else:
            _ = bench.original_accuracy
            if stopped is None:
                budget.check("reading model and data, and measuring the original")
            problem = pose(job, bench)  # the last thing that bad input can break but for time
        n_done = len(study.trials) if study else 0
        expected = forecast(job, bench, problem, n_trials_done=n_done)
        budget.divide(expected.phases, trial_s=expected.trial_s, is_new=stopped is None)
        done, to_come = N_ORIGINAL_PARTS, budget.within(expected.phases)
        on_progress(Progress(MEASURING_ORIGINAL, done, done, expected=to_come))
        if not begun:
            folder = stopped or stack.enter_context(_new_folder(job, environment, bench))
        budget.keep_in(folder.spent)
        study = study or Study.create(folder.study, job.space)
        gather_once(bench, study, budget)
        if not begun:
            study.keep_original(bench.original)
            problem = informed(job, problem, bench, study, on_progress, budget)
            study.keep(problem)
        run = Run(job, bench, folder, budget, expected.step_s, on_trial, on_progress)
        yield run, search(job, problem, bench, study, budget, on_trial, on_progress)


def finish_one(run: Run, searched: Searched) -> Result:
    """The best plan as a finished model.

    Where the finished files miss the limit, or are far faster than asked, the search goes on with
    what that taught, once; the better one of both models is shipped.
    """
    aside = run.folder.aside
    if aside is not None and not any(c.is_by_files for c in searched.study.corrections):
        searched = _goes_on(run, searched, aside)  # stopped in between
    while True:
        began_s = run.budget.spent_s
        searched, result = _built(run, searched, n_before=int(aside is not None))
        if aside is not None:
            break
        shipped = trial_shipped(run.job, searched.trials, result)
        correction = taught_by_files(searched, shipped, result.speedup)
        if correction is None or run.budget.left_s < run.budget.spent_s - began_s:
            return write_result(run, searched, result)
        run.folder.set_aside(result)
        aside = result
        searched = _goes_on(run, searched, aside)
    if worth(aside) > worth(result):
        run.folder.take_back()
        result = aside
    return write_result(run, searched, result)


def _goes_on(run: Run, searched: Searched, aside: Result) -> Searched:
    """The search after what the finished files of `aside` taught."""
    shipped = trial_shipped(run.job, searched.trials, aside)
    correction = taught_by_files(searched, shipped, aside.speedup)
    if correction is None:
        return searched
    logger.info("the search goes on: the files came out at %.3f", aside.speedup.ratio)
    searched.study.correct(correction)
    n_done = len(searched.study.trials)
    expected = forecast(run.job, run.bench, searched.problem, n_trials_done=n_done)
    run.budget.divide(expected.phases, trial_s=expected.trial_s, is_new=False)
    return _search_on(run, searched)


def _built(run: Run, searched: Searched, n_before: int) -> tuple[Searched, Result]:
    """The search as far as it went, and its best plan built and measured.

    There is no result in its folder yet.
    """
    is_by_drop = searched.problem.objective.front and run.job.config.max_drop is not None
    if is_by_drop:
        place = place_of(run, searched, n_before, n_trainings=len(front(searched)).bit_length())
        found = fastest_within_drop(run.job, searched, run.bench, place, run.on_progress)
        return searched, build(run, searched, [found], place)
    searched, finalists = _settled(run, searched)
    place = place_of(run, searched, n_before)
    winners = contest(run.job, finalists.plans, run.bench, place, run.on_progress)
    return searched, build(run, searched, winners, place)


def _settled(run: Run, searched: Searched) -> tuple[Searched, Finalists]:
    """The finalists; the search goes on where measuring them again says that it should."""
    while True:
        finalists = choose(run.job, searched, run.bench, run.on_progress, run.budget)
        correction = taught_by_finalists(searched, finalists)
        if correction is None or run.budget.of_s(SEARCHING) <= 0:
            return searched, finalists
        logger.info("the search goes on: finalists came out %.3f times as fast", correction.moved)
        searched.study.correct(correction)
        searched = _search_on(run, searched)


def _search_on(run: Run, searched: Searched) -> Searched:
    """Some trials more, with what was taught."""
    return search(
        run.job, searched.problem, run.bench, searched.study, run.budget, run.on_trial,
        run.on_progress,
    )  # fmt: skip


def finish_front(run: Run, searched: Searched) -> tuple[Result, ...]:
    """The best plan of every band of speed as a finished model; those that are there stay.

    The order is that of the last measurements: near a band's edge it may differ from the search's.
    """
    results: list[Result] = []
    every_band = bands(searched)
    for n, band in enumerate(every_band):
        point = run.within(f"point-{n + 1}", run.job.config.as_toml())
        if (point.folder.path / run_folder.RESULT).is_file():
            point.folder.forget_unfinished()  # (of one that was killed in doing so)
            results.append(run_folder.read_result(point.folder.path))
            continue
        finalists = choose(run.job, band, run.bench, run.on_progress, run.budget)
        place = place_of(point, band, n, n_trainings=len(every_band) - n)
        winners = contest(run.job, finalists.plans, run.bench, place, run.on_progress)
        results.append(write_result(point, band, build(point, band, winners, place)))
    run.folder.forget_unfinished()
    return in_order(results)


def in_order(results: Iterable[Result]) -> tuple[Result, ...]:
    """Slowest first; those that came out no faster than the original before all others."""
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
    except Exception as err:
        if not isinstance(err, CompressorError):
            logger.exception("an error that nobody expected")
            err.add_note(f"Its traceback is in {folder.path / run_folder.LOG}.")
        raise
