"""The trials on disk: one Optuna study in SQLite, which optuna-dashboard reads as it is.

Its parameters are always one number a variable (a free group's width, or whether a branch stays),
whatever the phase of the search, so nothing is lost at a rollback. Its two values are accuracy
and speed-up, both larger is better.
"""

import sqlite3
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DatabaseError
from sqlalchemy.pool import NullPool

from compressor.errors import RunFolderError
from compressor.search.objective import Harmed, Problem, Proposal, TimedPlan
from compressor.search.space import SearchSpace
from compressor.values import Accuracy, PairedLatency, Trial

STUDY_NAME = "compress"
MEASURED = "measured"  # the one user attribute of a trial
BEFORE = "before"  # the one of the study


class Study:
    """Trials in the order they were begun; written as they come."""

    def __init__(self, study: optuna.Study, space: SearchSpace) -> None:
        self._study = study
        self._distributions: dict[str, BaseDistribution] = {
            name: IntDistribution(min(choice), max(choice))
            for name, choice in zip(space.names, space.choices, strict=True)
        }
        self._space = space
        self._trials: list[Trial] = []

    @classmethod
    def create(cls, path: Path, space: SearchSpace) -> "Study":
        """A new study in a new file at `path`."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=_storage(path),
            study_name=STUDY_NAME,
            directions=["maximize", "maximize"],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(["accuracy", "speedup"])
        return cls(study, space)

    def keep(self, problem: Problem) -> None:
        """Writes what was measured before the first trial: proposals follow from it too."""
        self._study.set_user_attr(
            BEFORE,
            {
                "original_accuracy": [
                    problem.original_accuracy.value,
                    problem.original_accuracy.n,
                    problem.original_accuracy.loss,
                ],
                "limits": dict(problem.objective.limits),
                "damages": dict(problem.damages),
                "harmed": [_harm_on_disk(each) for each in problem.harmed],
                "path": [_harm_on_disk(each) for each in problem.path],
                "timed": [
                    {"widths": dict(t.widths), "speedup": t.speedup, "ci95": list(t.speedup_ci95)}
                    for t in problem.timed
                ],
            },
        )

    @property
    def trials(self) -> Sequence[Trial]:
        """All trials that were finished or failed."""
        return tuple(self._trials)

    def begin(self, proposal: Proposal) -> optuna.Trial:
        """Writes that a trial is running."""
        self._study.enqueue_trial(self._space.by_name(proposal.widths))
        return self._study.ask(self._distributions)

    def finish(self, running: optuna.Trial, trial: Trial, latency: PairedLatency | None) -> None:
        """Writes what became of it, with every raw time."""
        measured: dict[str, object] = {
            "phase": trial.phase,
            "seconds": {part: round(s, 5) for part, s in trial.seconds.items()},
            "failed_because": trial.failed_because,
        }
        if trial.accuracy is None or latency is None:
            running.set_user_attr(MEASURED, measured)
            self._study.tell(running, state=TrialState.FAIL)
        else:
            measured |= {
                "n_images": trial.accuracy.n,
                "loss": trial.accuracy.loss,
                "speedup_ci95": trial.speedup_ci95,
                "latency_ms": trial.latency_ms,
                "basis": latency.basis,
                "doubtful": list(latency.conditions),
                "rounds_ms": [
                    [[round(ms, 5) for ms in side] for side in (p.original_ms, p.candidate_ms)]
                    for p in latency.session_pairs
                ],
            }
            running.set_user_attr(MEASURED, measured)
            self._study.tell(running, [trial.accuracy.value, latency.ratio])
        self._trials.append(trial)


def read_trials(path: Path) -> tuple[Trial, ...]:
    """The finished and failed trials of the study in the file at `path`.

    Raises:
        RunFolderError: There is no study in it.
    """
    states = (TrialState.COMPLETE, TrialState.FAIL)
    return tuple(_trial(t) for t in _load(path).get_trials(deepcopy=False, states=states))


def read_before(path: Path, problem: Problem) -> Problem:
    """`problem` with what was measured before the first trial of the study in the file at `path`.

    Raises:
        RunFolderError: There is no study in the file, or one of an older version.
    """
    before = _load(path).user_attrs.get(BEFORE)
    if before is None:
        raise RunFolderError(f"{path} was written by an older version; it cannot be repeated.")
    value, n, loss = before["original_accuracy"]
    return replace(
        problem,
        original_accuracy=Accuracy(value, n, loss),
        objective=replace(problem.objective, limits=before["limits"]),
        damages=before["damages"],
        harmed=tuple(Harmed(each["widths"], each["harm"]) for each in before["harmed"]),
        path=tuple(Harmed(each["widths"], each["harm"]) for each in before["path"]),
        timed=tuple(
            TimedPlan(t["widths"], t["speedup"], (t["ci95"][0], t["ci95"][1]))
            for t in before["timed"]
        ),
    )


def _harm_on_disk(each: Harmed) -> dict[str, object]:
    return {"widths": dict(each.widths), "harm": each.harm}


def _load(path: Path) -> optuna.Study:
    if not path.is_file():
        raise RunFolderError(f"No study at {path}.")
    with path.open("rb") as file:
        if file.read(16) != b"SQLite format 3\0":  # Optuna would make a study of an empty file
            raise RunFolderError(f"{path} holds no study of compress: it is not an SQLite file.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.load_study(study_name=STUDY_NAME, storage=_storage(path))
    except (KeyError, DatabaseError, optuna.exceptions.StorageInternalError) as err:
        raise RunFolderError(f"{path} holds no study of compress: {err}") from err


def _storage(path: Path) -> optuna.storages.RDBStorage:
    """By a connection, not a URL: a path may hold `?`, `%` or `#`."""
    file = str(path.resolve())
    return optuna.storages.RDBStorage(
        "sqlite://",
        engine_kwargs={"creator": lambda: sqlite3.connect(file), "poolclass": NullPool},
    )


def _trial(frozen: FrozenTrial) -> Trial:
    measured = frozen.user_attrs[MEASURED]
    common = {
        "number": frozen.number,
        "widths": dict(frozen.params),
        "phase": measured["phase"],
        "seconds": measured["seconds"],
    }
    if frozen.state is TrialState.FAIL:
        return Trial(**common, failed_because=measured["failed_because"])
    low, high = measured["speedup_ci95"]
    return Trial(
        **common,
        accuracy=Accuracy(frozen.values[0], measured["n_images"], measured.get("loss")),
        speedup=frozen.values[1],
        speedup_ci95=(low, high),
        latency_ms=measured["latency_ms"],
    )
