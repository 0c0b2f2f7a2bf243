"""How long a phase, and all that follows, may still take: from a forecast and from what was seen.

A phase is told by its name and by how many of its units are done. Phases come in any order, and
may come back. Nothing here waits for the next word: whoever asks is answered by the clock.
"""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # values imports torch, which `--help` need not wait for
    from compressor.values import Progress

FORECAST_UNITS = 2  # as many seen units weigh as much as the forecast does
MIN_UNITS = 2  # seen, before anything is said where nothing was forecast

SEARCHING = "Searching"  # `values.SEARCHING`, which would need torch


class TimeLeft:
    """Of the phase and of the whole run.

    Attributes:
        phase: That is under way; "" before the first.
        n_done: Its units that are finished.
        n_total: Its units in all.
        n_trials: Trials of the search in all; 0 before it began.
        note: The latest figure worth showing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing is known yet.

        Args:
            clock: Seconds; tests pass one that they move.
        """
        self._clock = clock
        self.phase, self.n_done, self.n_total, self.note = "", 0, 0, ""
        self.n_trials = 0
        self._to_come: dict[str, float] = {}  # phase -> seconds, but for the one under way
        self._unfinished: dict[str, float] = {}  # phase that was left before its end -> seconds
        self._spent: dict[str, float] = {}  # phase -> seconds, before it came back
        self._is_forecast = False
        self._began = self._stepped = clock()
        self._n_before = 0  # units that were done when the phase began
        self._forecast_s: float | None = None  # of the phase, since it began
        self._unit_s: float | None = None  # of one of its units, by the forecast

    def tell(self, progress: "Progress") -> None:
        """Something was done, or is to be done now."""
        now = self._clock()
        self._is_forecast |= bool(progress.expected)
        if progress.phase != self.phase:
            self._leave(now)
            self.phase, self.note = progress.phase, ""
            self._began = self._stepped = now
            self._n_before = progress.n_done  # a run that goes on has some already
            self._forecast_s = self._unit_s = None
            told = self._unfinished.pop(self.phase, None)
            told = self._to_come.pop(self.phase, told)
        else:
            told = None
            if progress.n_done != self.n_done:
                self._stepped = now
        self.n_done, self.n_total = progress.n_done, progress.n_total
        if progress.phase == SEARCHING:
            self.n_trials = progress.n_total
        self.note = progress.note or self.note
        self._to_come |= progress.expected
        told = self._to_come.pop(self.phase, told)
        if told is not None:
            self._forecast_s = now - self._began + told
            self._unit_s = told / max(1, self._n_left)

    def _leave(self, now: float) -> None:
        """The phase under way is over, or interrupted."""
        self._spent[self.phase] = self.in_phase
        left = self.of_phase
        if left is not None and self._n_left and self.n_total > 1:
            self._unfinished[self.phase] = left

    @property
    def _n_left(self) -> int:
        return max(0, self.n_total - self.n_done)

    @property
    def in_phase(self) -> float:
        """Seconds that the phase has taken, with those before it came back."""
        return self._spent.get(self.phase, 0.0) + self._clock() - self._began

    @property
    def in_step(self) -> float:
        """Seconds since a unit of the phase was done last, or since it began."""
        return self._clock() - self._stepped

    @property
    def of_phase(self) -> float | None:
        """Seconds, never below 0; None where nobody can know."""
        in_step = self.in_step
        unit_s = self._unit(self._stepped - self._began, self.n_done - self._n_before)
        if unit_s is None:
            return None
        if not self._n_left:
            return 0.0
        if in_step > unit_s:  # slower than all before: it counts as if it ended now
            later = self._unit(self._clock() - self._began, self.n_done - self._n_before + 1)
            unit_s = max(unit_s, later or 0.0)
        return max(0.0, unit_s - in_step) + (self._n_left - 1) * unit_s

    def _unit(self, seconds: float, n_units: int) -> float | None:
        """Seconds of one unit, where `n_units` took `seconds`."""
        if self._unit_s is not None:
            return (FORECAST_UNITS * self._unit_s + seconds) / (FORECAST_UNITS + n_units)
        return seconds / n_units if n_units >= MIN_UNITS else None

    @property
    def of_run(self) -> float | None:
        """Seconds; None where nothing was forecast."""
        return sum(self._to_come.values()) + (self.of_phase or 0.0) if self._is_forecast else None

    @property
    def forecast_exceeded(self) -> float | None:
        """Seconds that the phase was to take, where it has taken longer; else None."""
        expected = self._forecast_s
        is_late = expected is not None and self._clock() - self._began > expected
        return expected if is_late and self._n_left else None

    def __str__(self) -> str:
        """What is left, in words, for parentheses; "" where nobody can know."""
        left, exceeded, in_all = self.of_phase, self.forecast_exceeded, self.of_run
        parts = []
        if exceeded is not None:
            parts.append(f"longer than the {duration(exceeded)} expected")
        if left:
            parts.append(f"about {duration(left)} left")
        if in_all is not None and any(self._to_come.values()):
            parts.append(f"about {duration(in_all)} left in all")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """In words, as exact as anyone asks.

    Example:
        >>> duration(0.4), duration(75), duration(7500)
        ('1 s', '1 min 15 s', '2 h 5 min')
    """
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def expectation(expected: Mapping[str, float]) -> str:
    """What a run is expected to take, the longest parts named.

    Example:
        >>> expectation({"Searching": 60.0, "Fine-tuning": 120.0, "Measuring finalists": 2.0})
        'About 3 min 2 s in all: Fine-tuning 2 min 0 s, Searching 1 min 0 s'
    """
    total = sum(expected.values())
    longest = sorted(expected.items(), key=lambda item: -item[1])
    named = [f"{phase} {duration(s)}" for phase, s in longest if s >= 0.05 * total]
    return f"About {duration(total)} in all: {', '.join(named)}"
