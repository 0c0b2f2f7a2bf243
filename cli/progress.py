"""Progress on stderr: a live table on a terminal, plain lines elsewhere, or lines of JSON.

Every display is told the same: `Progress` as work goes on, and a `Trial` whenever one ends.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bars,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # values imports torch, which `--help` need not wait for
    from compressor.values import Progress, Trial

PLAIN_SECONDS = 10.0  # between plain lines of one phase
N_ROWS = 8  # of the live table


class Display(Protocol):
    """One way to show how far work has come."""

    def on_progress(self, progress: "Progress") -> None:
        """Something has been done."""

    def on_trial(self, trial: "Trial") -> None:
        """A trial has ended."""

    def close(self, *, is_done: bool) -> None:
        """Nothing follows; `is_done` where nothing stopped the work."""


class ProgressDisplay:
    """The display that suits where stderr goes; a context manager."""

    def __init__(self, *, as_json: bool = False) -> None:
        self._as_json = as_json
        self._display: Display

    def __enter__(self) -> Self:
        console = Console(stderr=True)
        if self._as_json:
            self._display = JsonLines()
        elif console.is_terminal:
            self._display = LiveTable(console)
        else:
            self._display = PlainLines()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._display.close(is_done=kind is None)

    def on_progress(self, progress: "Progress") -> None:
        """Shows it."""
        self._display.on_progress(progress)

    def on_trial(self, trial: "Trial") -> None:
        """Shows it."""
        self._display.on_trial(trial)


class TimeLeft:
    """Of the phase and of the whole run, from what was expected and what was seen."""

    def __init__(self) -> None:
        self._expected: dict[str, float] = {}  # phase -> seconds, of those to come
        self._phase = ""
        self._began = time.monotonic()
        self._n_done_before = 0
        self.of_phase: float | None = None
        self.of_run: float | None = None

    def tell(self, progress: "Progress") -> None:
        """Looks at the clock."""
        now = time.monotonic()
        self._expected |= progress.expected
        if progress.phase != self._phase:
            self._expected.pop(self._phase, None)
            self._phase, self._began = progress.phase, now
            self._n_done_before = progress.n_done  # a run that goes on has some already
        n_new, n_left = progress.n_done - self._n_done_before, progress.n_total - progress.n_done
        self.of_phase = (now - self._began) / n_new * n_left if n_new > 1 else None
        if self._phase in self._expected and self.of_phase is not None:
            self._expected[self._phase] = self.of_phase
        self.of_run = sum(self._expected.values()) if self._expected else None


class PlainLines:
    """A line when a phase begins and ends, every `PLAIN_SECONDS` in between, and every trial."""

    def __init__(self) -> None:
        self._left = TimeLeft()
        self._phase, self._n_total = "", 0
        self._last_line = 0.0

    def on_progress(self, progress: "Progress") -> None:
        """Writes a line if it is due."""
        self._left.tell(progress)
        self._n_total = progress.n_total
        is_due = time.monotonic() - self._last_line > PLAIN_SECONDS
        is_last = progress.n_done == progress.n_total and progress.n_total > 1
        if progress.phase != self._phase or is_due or is_last:
            parts = [progress.phase]
            if progress.n_total > 1:
                parts.append(f"{progress.n_done}/{progress.n_total}")
            if self._left.of_phase:
                parts.append(f"(about {duration(self._left.of_phase)} left)")
            _write(" ".join(filter(None, (*parts, progress.note))))
            self._last_line = time.monotonic()
        if progress.expected:
            _write(expectation(progress.expected))
        self._phase = progress.phase

    def on_trial(self, trial: "Trial") -> None:
        """One line a trial."""
        _write(in_words(trial, self._n_total))

    def close(self, *, is_done: bool) -> None:
        """Nothing is left to write."""


class JsonLines:
    """One JSON object a line, for programs: `event` says what it tells."""

    def __init__(self) -> None:
        self._left = TimeLeft()
        self._began = time.monotonic()

    def on_progress(self, progress: "Progress") -> None:
        """Every step of a phase, and what the whole run is expected to take."""
        self._left.tell(progress)
        if progress.expected:
            self._tell("expected", {"seconds_by_phase": dict(progress.expected)})
        best = None if progress.best is None else trial_json(progress.best)
        self._tell("progress", {
            "phase": progress.phase, "n_done": progress.n_done, "n_total": progress.n_total,
            "note": progress.note, "best": best,
            "seconds_left_in_phase": _rounded(self._left.of_phase),
            "seconds_left": _rounded(self._left.of_run),
        })  # fmt: skip

    def on_trial(self, trial: "Trial") -> None:
        """What was measured."""
        self._tell("trial", trial_json(trial))

    def close(self, *, is_done: bool) -> None:
        """What ended it is told by `outcome`."""

    def _tell(self, event: str, content: Mapping[str, object]) -> None:
        seconds = round(time.monotonic() - self._began, 1)
        _write(json.dumps({"event": event, "seconds": seconds, **content}))


class LiveTable:
    """The latest trials, the best one so far, a bar a phase, and the time left."""

    def __init__(self, console: Console) -> None:
        self._left = TimeLeft()
        self._began = time.monotonic()
        self._bars = Bars(
            TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"), console=console, auto_refresh=False,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._phase = ""
        self._rows: deque[tuple[int, list[str]]] = deque(
            maxlen=N_ROWS
        )  # number of the trial, cells
        self._best: Trial | None = None
        self._n_total = 0  # of the phase that trials belong to
        self._live = Live(console=console, get_renderable=self._shown, refresh_per_second=4)
        self._live.start()

    def on_progress(self, progress: "Progress") -> None:
        """Moves the phase's bar; a new phase completes the one before."""
        self._left.tell(progress)
        if progress.phase != self._phase:
            self._complete()
            if progress.phase not in self._tasks:
                self._tasks[progress.phase] = self._bars.add_task(progress.phase, note="")
        self._phase, self._n_total = progress.phase, progress.n_total
        task = self._tasks[progress.phase]
        self._bars.update(task, completed=progress.n_done, total=progress.n_total)
        if progress.note:
            self._bars.update(task, note=progress.note)
        self._best = progress.best or self._best

    def on_trial(self, trial: "Trial") -> None:
        """A row of the table."""
        self._rows.append((trial.number, _cells(trial, self._n_total)))

    def close(self, *, is_done: bool) -> None:
        """Leaves the last state on the terminal."""
        if is_done:
            self._complete()
        self._live.stop()

    def _complete(self) -> None:
        if self._phase:
            task = self._tasks[self._phase]
            self._bars.update(task, completed=self._bars.tasks[task].total)

    def _shown(self) -> Group:
        parts: list[Table | Text | Bars] = []
        if self._rows:
            table = Table(box=None, pad_edge=False)
            for name in ("trial", "phase", "accuracy", "speed-up", "latency"):
                table.add_column(name, justify="left" if name == "phase" else "right")
            for number, cells in self._rows:
                is_best = self._best is not None and number == self._best.number
                table.add_row(*cells, style="bold" if is_best else "")
            parts.append(table)
        if self._best is not None:
            parts.append(Text(f"best so far: {in_words(self._best)}", style="bold"))
        parts.append(self._bars)
        told = f"{duration(time.monotonic() - self._began)} so far"
        if self._left.of_run is not None:
            told += f", about {duration(self._left.of_run)} left in all"
        return Group(*parts, Text(told, style="dim"))


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


def trial_json(trial: "Trial") -> dict[str, object]:
    """What a program wants to know of a trial."""
    return {
        "number": trial.number, "phase": trial.phase,
        "accuracy": None if trial.accuracy is None else trial.accuracy.value,
        "speedup": trial.speedup, "latency_ms": trial.latency_ms,
        "failed_because": trial.failed_because, "widths": dict(trial.widths),
    }  # fmt: skip


def in_words(trial: "Trial", n_total: int = 0) -> str:
    """One line; `n_total` trials are wanted, where that is known."""
    number, phase, *measured = _cells(trial, n_total)
    if len(measured) < 3:
        return f"trial {number}  {phase}"
    accuracy, speedup, latency = measured
    return f"trial {number}  {phase:<8}  accuracy {accuracy:>7}  {speedup:>6}  {latency}"


def _cells(trial: "Trial", n_total: int) -> list[str]:
    number = f"{trial.number + 1:>3}" + (f"/{n_total}" if n_total else "")
    if trial.accuracy is None or trial.speedup is None:
        return [number, f"failed: {trial.failed_because}"]
    return [
        number, trial.phase, f"{trial.accuracy.value:.2%}", f"{trial.speedup:.2f}x",
        f"{trial.latency_ms:.3f} ms",
    ]  # fmt: skip


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def _write(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
