"""The trials on disk: one Optuna study in SQLite, which optuna-dashboard reads as it is.

Its parameters are always one number a variable (a free group's width, or whether a branch stays),
whatever the phase of the search, so nothing is lost at a rollback. Its two values are accuracy
and speed-up, both larger is better.
"""

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from pydantic import TypeAdapter
from sqlalchemy.exc import DatabaseError

from compressor.errors import ForeignStudyError, RunFolderError
from compressor.search.objective import Correction, Harmed, Problem, TimedPlan, corrected
from compressor.search.space import SearchSpace
from compressor.search.study_file import (
    STUDY_NAME,
    reading_storage,
    storage_in,
    trusted_content,
)
from compressor.sqlite import check_free
from compressor.values import Accuracy, Clock, Original, PairedLatency, Trial

MEASURED = "measured"  # the one user attribute of a trial
MAX_CORRECTED = 10**6  # trials
BEFORE, CORRECTIONS, ORIGINAL = "before", "corrections", "original"  # of the study

_PAIR, _NUMBER, _TRIAL = TypeAdapter(PairedLatency), TypeAdapter(float), TypeAdapter(Trial)
_SHARES, _TIMED = TypeAdapter(dict[str, float]), TypeAdapter(TimedPlan)
_HARMED = TypeAdapter(tuple[Harmed, ...])
_ORIGINAL = TypeAdapter(Original)
_CORRECTIONS = TypeAdapter(tuple[Correction, ...])
_T = TypeVar("_T")

logger = logging.getLogger(__name__)


class Study:
    """Trials in the order they came; written one by one."""

    def __init__(self, study: optuna.Study, space: SearchSpace) -> None:
        self._study = study
        self._distributions: dict[str, BaseDistribution] = {
            name: IntDistribution(min(choice), max(choice))
            for name, choice in zip(space.names, space.choices, strict=True)
        }
        self._space = space
        self._trials: list[Trial] = []
        self._kept: dict[str, Any] = dict(study.user_attrs)
        self._corrections = _corrections_in(self._kept)

    @classmethod
    def create(cls, path: Path, space: SearchSpace) -> "Study":
        """A new study in a new file at `path`.

        Raises:
            RunFolderError: Something is there already; or it cannot be written.
        """
        check_free(path)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with _written(), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                storage=storage_in(path),
                study_name=STUDY_NAME,
                directions=["maximize", "maximize"],
            )
            study.set_metric_names(["accuracy", "speedup"])
        return cls(study, space)

    @classmethod
    def of_stopped(cls, path: Path, space: SearchSpace) -> "Study | None":
        """The study of a run that was stopped; None where it was stopped before there was one.

        A file that was being made then, and cannot be read, is put aside.

        Raises:
            RunFolderError: The study is of another space, or was written by something else.
        """
        if not path.exists():
            return None
        if has_begun(path):
            return cls.open(path, space)
        try:
            return cls.open(path, space)
        except ForeignStudyError:
            raise
        except RunFolderError as err:
            aside = path.with_name(f"{path.name}.broken")
            path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
            logger.warning("%s It is kept as %s; a new one is begun.", err, aside.name)
            path.replace(aside)
            return None

    @classmethod
    def open(cls, path: Path, space: SearchSpace) -> "Study":
        """The study in the file at `path`, as far as it came.

        Raises:
            RunFolderError: There is no study in it, or one of another space.
        """
        _ = trusted_content(path)
        study = cls(_loaded(path, storage_in(path)), space)
        study._trials = list(_trials_of(path, study._study))
        if any(set(trial.widths) != set(space.names) for trial in study._trials):
            raise RunFolderError(f"The trials in {path} are of another network or target.")
        return study

    def keep(self, problem: Problem) -> None:
        """Writes what was measured before the first trial: proposals follow from it too."""
        with _written():
            self._study.set_user_attr(BEFORE, self._on_disk(problem))

    @property
    def has_problem(self) -> bool:
        """Whether it was opened with what was measured before the first trial."""
        return BEFORE in self._kept

    @staticmethod
    def _on_disk(problem: Problem) -> dict[str, object]:
        return {
            "original_accuracy": {
                "value": problem.original_accuracy.value,
                **_accuracy_on_disk(problem.original_accuracy),
            },
            "limits": dict(problem.objective.limits),
            "damages": dict(problem.damages),
            "harmed": [_harm_on_disk(each) for each in problem.harmed],
            "path": [_harm_on_disk(each) for each in problem.path],
            "timed": [
                {"widths": dict(t.widths), "speedup": t.speedup, "ci95": list(t.speedup_ci95)}
                for t in problem.timed
            ],
        }

    def once(self, what: str, measure: Callable[[], PairedLatency]) -> PairedLatency:
        """What `measure` returns, or returned before this study was stopped.

        Args:
            what: Is measured; a name of its own.
            measure: Measures it.

        Raises:
            RunFolderError: It cannot be written.
        """
        return self._once(what, measure, _PAIR)

    def number_once(self, what: str, compute: Callable[[], float]) -> float:
        """The number that `compute` returns, or returned before this study was stopped."""
        return self._once(what, compute, _NUMBER)

    def keep_original(self, original: Original) -> None:
        """Writes what was measured of the original, in place of what was before."""
        self._kept.pop(ORIGINAL, None)
        self._once(ORIGINAL, lambda: original, _ORIGINAL)

    def original(self) -> Original | None:
        """What was measured of the original; None where it was stopped before that."""
        if ORIGINAL not in self._kept:
            return None
        with _read("what was measured of the original"):
            return _ORIGINAL.validate_json(self._kept[ORIGINAL])

    def _once(self, key: str, make: Callable[[], _T], kind: TypeAdapter[_T]) -> _T:
        if key not in self._kept:
            made = kind.dump_json(make()).decode()
            with _written():
                self._study.set_user_attr(key, made)
            self._kept[key] = made
        with _read("was measured before"):
            return kind.validate_json(self._kept[key])

    @property
    def trials(self) -> Sequence[Trial]:
        """All trials that were finished or failed, as they were measured."""
        return tuple(self._trials)

    @property
    def corrections(self) -> tuple[Correction, ...]:
        """What measuring again has taught, in order."""
        return self._corrections

    @property
    def known(self) -> tuple[Trial, ...]:
        """All trials, with the speed-ups that are expected of them now."""
        return corrected(self._trials, self._corrections)

    def correct(self, correction: Correction) -> None:
        """Writes what measuring again has taught."""
        self._corrections = (*self._corrections, correction)
        with _written():
            written = _CORRECTIONS.dump_python(self._corrections, mode="json")
            self._study.set_user_attr(CORRECTIONS, written)

    def add(self, trial: Trial, latency: PairedLatency | None) -> None:
        """Writes a trial that was finished or failed, with every raw time.

        In one transaction: a process that is killed leaves the trial whole, or nothing of it.
        """
        measured: dict[str, object] = {
            "phase": trial.phase,
            "seconds": {part: round(s, 5) for part, s in trial.seconds.items()},
            "failed_because": trial.failed_because,
        }
        state, values = TrialState.FAIL, None
        if trial.accuracy is not None and latency is not None:
            state, values = TrialState.COMPLETE, [trial.accuracy.value, latency.ratio]
            measured |= {
                **_accuracy_on_disk(trial.accuracy),
                "speedup_ci95": trial.speedup_ci95,
                "latency_ms": trial.latency_ms,
                "basis": latency.basis,
                "doubtful": list(latency.conditions),
                "clock": latency.clock,
                "interrupted": latency.interrupted,
                "rounds_ms": [
                    [[round(ms, 5) for ms in side] for side in p.by(Clock.WALL)]
                    for p in latency.session_pairs
                ],
                "rounds_cpu_ms": [
                    [[round(ms, 5) for ms in side] for side in p.by(Clock.THREAD_CPU)]
                    for p in latency.session_pairs
                ],
            }
        finished = create_trial(
            state=state,
            values=values,
            params={name: trial.widths[name] for name in self._space.names},
            distributions=self._distributions,
            user_attrs={MEASURED: measured},
        )
        with _written():
            self._study.add_trial(finished)
        self._trials.append(trial)


@contextlib.contextmanager
def _read(what: Path | str) -> Iterator[None]:
    """Raises `RunFolderError` where a study says something that none of ours says."""
    try:
        yield
    except (DatabaseError, optuna.exceptions.StorageInternalError) as err:
        raise RunFolderError(f"{what} is broken: {str(err).splitlines()[0]}") from err
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as err:
        raise RunFolderError(
            f"{what} says what no study of compress says: {type(err).__name__}: {err}."
        ) from err


@contextlib.contextmanager
def _written() -> Iterator[None]:
    """Raises `RunFolderError` where SQLite cannot write."""
    try:
        yield
    except (DatabaseError, optuna.exceptions.StorageInternalError) as err:
        reason = str(err.__cause__ or err).splitlines()[0]
        raise RunFolderError(f"The study cannot be written: {reason}.") from err


def _corrections_in(attributes: Mapping[str, Any]) -> tuple[Correction, ...]:
    with _read("what measuring again has taught"):
        found = _CORRECTIONS.validate_python(attributes.get(CORRECTIONS, ()))
        last = 0
        for each in found:
            figures = [each.moved, *(n for row in each.again.values() for n in row)]
            if not all(math.isfinite(figure) and figure > 0 for figure in figures):
                raise ValueError("a ratio that is no positive number")
            if not last <= each.n_trials <= MAX_CORRECTED:
                raise ValueError(f"{each.n_trials} trials before a correction")
            last = each.n_trials
        return found


def read_corrections(path: Path) -> tuple[Correction, ...]:
    """What measuring again has taught the run whose study is the file at `path`.

    Raises:
        RunFolderError: There is no study in it.
    """
    return _corrections_in(_load(path).user_attrs)


def has_begun(path: Path) -> bool:
    """Whether the file at `path` holds what was measured before the first trial."""
    try:
        return path.is_file() and BEFORE in _load(path).user_attrs
    except ForeignStudyError:
        raise
    except RunFolderError:  # stopped while the file was made
        return False


def read_trials(path: Path) -> tuple[Trial, ...]:
    """The finished and failed trials of the study in the file at `path`.

    Raises:
        RunFolderError: There is no study in it.
    """
    return _trials_of(path, _load(path))


def _trials_of(path: Path, study: optuna.Study) -> tuple[Trial, ...]:
    states = (TrialState.COMPLETE, TrialState.FAIL)
    with _read(path):
        return tuple(_trial(t) for t in study.get_trials(deepcopy=False, states=states))


def read_before(path: Path, problem: Problem) -> Problem:
    """`problem` with what was measured before the first trial of the study in the file at `path`.

    Raises:
        RunFolderError: There is no study in the file, or one of an older version.
    """
    before = _load(path).user_attrs.get(BEFORE)
    if before is None:
        raise RunFolderError(f"{path} was written by an older version; it cannot be repeated.")
    with _read(path):
        accuracy = before["original_accuracy"]
        return replace(
            problem,
            original_accuracy=_accuracy(accuracy["value"], accuracy),
            objective=replace(problem.objective, limits=_SHARES.validate_python(before["limits"])),
            damages=_SHARES.validate_python(before["damages"]),
            harmed=_HARMED.validate_python(before["harmed"]),
            path=_HARMED.validate_python(before["path"]),
            timed=tuple(
                _TIMED.validate_python({**t, "speedup_ci95": t["ci95"]}) for t in before["timed"]
            ),
        )


def _accuracy_on_disk(accuracy: Accuracy) -> dict[str, object]:
    """All but its value, which stands where dashboards look for it."""
    return {
        "n_images": accuracy.n,
        "loss": accuracy.loss,
        "metric": accuracy.metric,
        "spread": accuracy.spread,
        "name": accuracy.name,
    }


def _accuracy(value: float, kept: Mapping[str, Any]) -> Accuracy:
    figures = {key: kept.get(key) for key in ("loss", "metric", "spread")}
    name = str(kept.get("name", Accuracy.name))  # studies of older versions do not have it
    return Accuracy(value, kept["n_images"], **figures, name=name)


def _harm_on_disk(each: Harmed) -> dict[str, object]:
    return {"widths": dict(each.widths), "harm": each.harm}


def _load(path: Path) -> optuna.Study:
    """The study in the file at `path` as it is now, in memory."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return _loaded(path, reading_storage(path))


def _loaded(path: Path, storage: optuna.storages.RDBStorage) -> optuna.Study:
    with _read(path):
        return optuna.load_study(study_name=STUDY_NAME, storage=storage)


def _trial(frozen: FrozenTrial) -> Trial:
    measured = frozen.user_attrs[MEASURED]
    common = {
        "number": frozen.number,
        "widths": dict(frozen.params),
        "phase": measured["phase"],
        "seconds": measured["seconds"],
    }
    if frozen.state is TrialState.FAIL:
        found = {"failed_because": measured["failed_because"]}
    else:
        found = {
            "accuracy": _accuracy(frozen.values[0], measured),
            "speedup": frozen.values[1],
            "speedup_ci95": measured["speedup_ci95"],
            "latency_ms": measured["latency_ms"],
        }
    return _TRIAL.validate_python({**common, **found})
