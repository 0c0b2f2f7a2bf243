"""How long a run may take (`--time-budget`), and what each part of it gets.

The time of a run is that of all its parts: what is measured before the first trial, trials,
finalists, training, and the last measurement. A run that was stopped has spent what it spent
before, so that going on costs no more than never having stopped.

What has to be at the end is put aside first. Of the rest, what is measured before the first trial
gets 30 % at most, and training 40 %, as far as a few trials stay possible. Trials have what is
left.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from compressor.errors import ConfigError, RunFolderError
from compressor.files import parsed_json, read_text, write_whole
from compressor.latency.timing import Effort
from compressor.values import (
    FINE_TUNING,
    FIRST_PLAN,
    GATHERING,
    MEASURING_FILES,
    MEASURING_FINALISTS,
    PRUNING,
    READING,
    SEARCHING,
    TIMING_LAYERS,
    TRAINING_FINALISTS,
    TRAINING_FRONT,
    TRYING_EACH,
    Progress,
    ProgressCallback,
)

AFTER_GATHERING = (TIMING_LAYERS, TRYING_EACH, FIRST_PLAN)
BEFORE = (GATHERING, *AFTER_GATHERING)  # the first trial
TRAINING = (TRAINING_FINALISTS, FINE_TUNING, TRAINING_FRONT)

CAUTION = 1.25  # what was forecast may take that many times as long
MOST_FILES, MOST_FINALISTS = 0.3, 0.15  # of what is left
MOST_TRAINING, MOST_BEFORE = 0.4, 0.3  # of the rest
MOST_GATHERING = 0.5  # of what is measured before the first trial
LEAST_TRIALS = 4  # for which there is to be time before there is any for training
LEAST_EFFORT_S = 2.0  # of a comparison whose figure is reported
KEEP_S = 5.0  # between two notes of what was spent

logger = logging.getLogger(__name__)


class Budget:
    """The seconds of one run, over all processes that worked on it.

    Attributes:
        total_s: All of them; infinite where none was given.
        cut_short: What was left out for lack of time, in words, each once.
    """

    def __init__(
        self,
        total_s: float | None,
        *,
        file: Path | None = None,
        since: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begins to count.

        Args:
            total_s: None for no limit.
            file: Where what was spent is kept; what an earlier process wrote there counts.
            since: When this process began to work on the run, by `clock`; None for now.
            clock: Monotonic, in seconds.
        """
        self.total_s = math.inf if total_s is None else total_s
        self.cut_short: dict[str, None] = {}
        self._clock, self._file = clock, file
        self._before_s, cut_short = _kept_in(file)
        self.cut_short |= dict.fromkeys(cut_short)
        self._began = clock() if since is None else since
        self._kept = self._began
        self._until: dict[str, float] = {}

    @property
    def spent_s(self) -> float:
        """So far, by this process and those before it."""
        return self._before_s + self._clock() - self._began

    @property
    def left_s(self) -> float:
        """Of the whole budget; below 0 where it is overdrawn."""
        return self.total_s - self.spent_s

    def keep_in(self, file: Path) -> None:
        """From now on what is spent is written to `file`."""
        self._file = file
        self.note(is_due=True)

    def note(self, *, is_due: bool = False) -> None:
        """Writes what was spent, where that was long ago."""
        if self._file is None or math.isinf(self.total_s):
            return
        if is_due or self._clock() - self._kept >= KEEP_S:
            self._kept = self._clock()
            kept = {"spent_s": round(self.spent_s, 1), "cut_short": list(self.cut_short)}
            write_whole(self._file, json.dumps(kept))

    def watching(self, on_progress: ProgressCallback, *, is_new: bool) -> ProgressCallback:
        """`on_progress`, with a look at the clock whenever anything is told.

        Args:
            on_progress: Told the same.
            is_new: Whether reading may end the run where all is spent.
        """

        def told(progress: Progress) -> None:
            self.note()
            if is_new and progress.phase == READING:
                self.check("reading model and data")
            on_progress(progress)

        return told

    def check(self, what: str) -> None:
        """Raises `ConfigError` where all is spent after `what`, before anything was searched."""
        if self.left_s <= 0:
            raise ConfigError(
                f"--time-budget {self.total_s:g}s is spent: {what} alone took "
                f"{self.spent_s:.0f} s. Give it at least {_rounded_up(4 * self.spent_s)}s."
            )

    def within(self, expected: Mapping[str, float]) -> dict[str, float]:
        """`expected`, no phase of which takes more than its share."""
        if math.isinf(self.total_s):
            return dict(expected)
        ends = {
            GATHERING: self.of_s(GATHERING),
            **dict.fromkeys(AFTER_GATHERING, self.of_s(FIRST_PLAN)),
            SEARCHING: self.of_s(SEARCHING),
            **dict.fromkeys(TRAINING, self.of_s(FINE_TUNING) - self.of_s(MEASURING_FINALISTS)),
        }  # fmt: skip
        return {p: max(0.0, min(s, ends.get(p, math.inf))) for p, s in expected.items()}

    def divide(
        self, expected: Mapping[str, float], *, trial_s: float = 0.0, is_new: bool = True
    ) -> None:
        """Gives every part its share of what is left.

        Args:
            expected: Phase to come -> seconds that it is forecast to take.
            trial_s: Of those of the search, what one trial takes.
            is_new: Whether nothing was searched yet; else what is there is finished in any case.

        Raises:
            ConfigError: It is not enough for one trial and what has to be measured at the end.
        """
        if math.isinf(self.total_s):
            return
        left = max(0.0, self.left_s)

        def expected_s(phase: str) -> float:
            return expected.get(phase, 0.0)

        def wanted(phases: Iterable[str]) -> float:
            return CAUTION * sum(map(expected_s, phases))

        least = LEAST_EFFORT_S + trial_s + expected_s(MEASURING_FILES)
        if is_new and least > left:
            raise ConfigError(
                f"--time-budget {self.total_s:g}s is too short: {self.spent_s:.0f} s went into "
                f"reading the model and measuring the original, and about {least:.0f} s are "
                f"needed for one trial and to measure what comes out. Give it at least "
                f"{_rounded_up(self.spent_s + 3 * least)}s."
            )
        files = min(wanted((PRUNING, MEASURING_FILES)), MOST_FILES * left)
        finalists = min(wanted((MEASURING_FINALISTS,)), MOST_FINALISTS * left)
        rest = left - files - finalists
        before = min(wanted(BEFORE), MOST_BEFORE * rest)
        for_trials = min(LEAST_TRIALS * trial_s, expected_s(SEARCHING))
        training = min(wanted(TRAINING), MOST_TRAINING * rest, rest - before - for_trials)
        training = max(0.0, training)
        spare = rest - training - wanted((SEARCHING,))
        before = max(before, min(MOST_BEFORE * rest, spare))  # where nobody else needs it
        gathering = min(wanted((GATHERING,)), MOST_GATHERING * before)
        after = sum(map(expected_s, AFTER_GATHERING))
        timing = (before - gathering) * expected_s(TIMING_LAYERS) / max(1e-9, after)
        now = self.spent_s
        self._until = {
            GATHERING: now + gathering,
            TIMING_LAYERS: now + gathering + timing,
            FIRST_PLAN: now + before,
            SEARCHING: now + rest - training,
            MEASURING_FINALISTS: now + rest - training + finalists,
            FINE_TUNING: now + rest + finalists,
            MEASURING_FILES: self.total_s,
        }
        logger.info("shares of the time budget: %s", {k: round(v) for k, v in self._until.items()})

    def of_s(self, phase: str) -> float:
        """What is left until `phase` has to end; infinite where nothing was divided.

        Args:
            phase: `GATHERING`, `TIMING_LAYERS`, `FIRST_PLAN` (all that is measured before the
                first trial), `SEARCHING`, `MEASURING_FINALISTS`, `FINE_TUNING` (all training) or
                `MEASURING_FILES`.
        """
        return self._until.get(phase, math.inf) - self.spent_s

    def effort(self, effort: Effort, at_most_s: float) -> Effort:
        """`effort`, in no more than `at_most_s` seconds."""
        most = max(LEAST_EFFORT_S, at_most_s)
        if most >= (effort.limit_s or effort.budget_s):
            return effort
        return replace(effort, budget_s=min(effort.budget_s, most), limit_s=most)

    def cut(self, what: str) -> None:
        """Says that something was left out; once."""
        if what not in self.cut_short:
            self.cut_short[what] = None
            self.note(is_due=True)
            logger.warning("cut short by --time-budget: %s", what)


def _kept_in(file: Path | None) -> tuple[float, list[str]]:
    """What an earlier process noted of what was spent and cut short; nothing without a file.

    Raises:
        RunFolderError: Something else stands where the file is to be.
    """
    if file is None or not file.exists():
        return 0.0, []
    if not file.is_file():
        raise RunFolderError(f"{file} is no file; remove it to go on.")
    try:
        kept = parsed_json(read_text(file))
        spent, cut_short = kept["spent_s"], kept.get("cut_short", [])
        if isinstance(spent, bool) or not 0 <= float(spent) < math.inf:
            raise ValueError(f"spent_s = {str(spent)[:40]}")
        if not isinstance(cut_short, list) or not all(isinstance(c, str) for c in cut_short):
            raise ValueError("cut_short is no list of texts")
        return float(spent), cut_short
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as err:
        logger.warning("%s does not say what was spent (%s); counted anew", file, err)
        return 0.0, []


def _rounded_up(seconds: float) -> int:
    """To ten seconds.

    Example:
        >>> _rounded_up(31.2)
        40
    """
    return max(10, math.ceil(seconds / 10) * 10)
