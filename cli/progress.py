"""Progress on stderr: a live table on a terminal, plain lines elsewhere, or lines of JSON.

Every display is told the same: `Progress` as work goes on, and a `Trial` whenever one ends. Where
nothing is told for a while, its heart beats: what is being done, since when, and what is left.
"""

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, cast

from compressor.cli.outcome import tell
from compressor.cli.time_left import TimeLeft, duration, expectation
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from compressor.printable import one_line, printable

if TYPE_CHECKING:  # values imports torch, which `--help` need not wait for
    from compressor.values import Progress, Trial

LOADING = "Loading torch"  # the first phase of most commands
QUIET_SECONDS = 10.0  # between lines of one phase
TICK_SECONDS = 1.0  # between looks at whether a line is due
FORECAST_CHANGED = 0.1  # share of what is left in all, from which on it is worth a line
N_ROWS = 8  # of the live table
Clock = Callable[[], float]


@dataclass(frozen=True)
class Begun:
    """A `Progress` for what is done before values, and torch, are there."""

    phase: str
    n_done: int = 0
    n_total: int = 1
    note: str = ""
    best: None = None
    expected: Mapping[str, float] = field(default_factory=dict)


class Display(Protocol):
    """One way to show how far work has come."""

    def on_progress(self, progress: "Progress") -> None:
        """Something has been done."""

    def on_trial(self, trial: "Trial") -> None:
        """A trial has ended."""

    def beat(self) -> None:
        """Nothing was told, perhaps for long."""

    def close(self, *, is_done: bool) -> None:
        """Nothing follows; `is_done` where nothing stopped the work."""


class ProgressDisplay:
    """The display that suits where stderr goes; a context manager."""

    def __init__(self, *, as_json: bool = False) -> None:
        self._as_json = as_json
        self._display: Display
        self._turn = threading.Lock()
        self._is_closed = threading.Event()

    def __enter__(self) -> Self:
        console = Console(stderr=True)
        if self._as_json:
            self._display = JsonLines()
        elif console.is_terminal:
            self._display = LiveTable(console)
        else:
            self._display = PlainLines()
        threading.Thread(target=self._beats, name="heartbeat", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._is_closed.set()
        got_turn = self._turn.acquire(timeout=TICK_SECONDS)  # never waits for a pipe nobody reads
        try:
            with contextlib.suppress(OSError):
                self._display.close(is_done=kind is None)
        finally:
            if got_turn:
                self._turn.release()

    def begins(self, phase: str) -> None:
        """Shows what is done until the first `on_progress`."""
        self.on_progress(cast("Progress", Begun(phase)))

    def on_progress(self, progress: "Progress") -> None:
        """Shows it."""
        with self._turn, contextlib.suppress(OSError):  # a terminal that is gone
            self._display.on_progress(progress)

    def on_trial(self, trial: "Trial") -> None:
        """Shows it."""
        with self._turn, contextlib.suppress(OSError):
            self._display.on_trial(trial)

    def _beats(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads stderr any more
            while not self._is_closed.wait(TICK_SECONDS):
                with self._turn:
                    if not self._is_closed.is_set():
                        self._display.beat()


class PlainLines:
    """A line when a phase begins and ends, every `QUIET_SECONDS` in between, and every trial."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._left = TimeLeft(clock)
        self._last_line = 0.0

    def on_progress(self, progress: "Progress") -> None:
        """Writes a line if it is due."""
        is_new = progress.phase != self._left.phase
        before = self._left.of_run
        self._left.tell(progress)
        is_last = progress.n_done == progress.n_total and progress.n_total > 1
        if is_new or is_last or self._is_due():
            self._write()
        if progress.expected:
            now = self._left.of_run or 0.0
            if before is None:
                tell(expectation(progress.expected))
            elif abs(now - before) > FORECAST_CHANGED * before:
                tell(f"Now about {duration(now)} left in all")

    def on_trial(self, trial: "Trial") -> None:
        """One line a trial."""
        tell(in_words(trial, self._left.n_trials))

    def beat(self) -> None:
        """A line if none was written for long."""
        if self._left.phase and self._is_due():
            self._write(is_beat=True)

    def close(self, *, is_done: bool) -> None:
        """Nothing is left to write."""

    def _is_due(self) -> bool:
        return self._clock() - self._last_line >= QUIET_SECONDS

    def _write(self, *, is_beat: bool = False) -> None:
        left = self._left
        parts = [left.phase]
        if left.n_total > 1:
            parts.append(f"{left.n_done}/{left.n_total}")
        if is_beat:
            parts[-1] += f", for {duration(left.in_step)}"
        if str(left):
            parts.append(f"({left})")
        tell(" ".join(filter(None, (*parts, left.note))))
        self._last_line = self._clock()


class JsonLines:
    """One JSON object a line, for programs: `event` says what it tells."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._left = TimeLeft(clock)
        self._began = self._last_line = clock()
        self._note = ""
        self._best: Trial | None = None

    def on_progress(self, progress: "Progress") -> None:
        """Every step of a phase, and what the whole run is expected to take."""
        self._left.tell(progress)
        self._note, self._best = progress.note, progress.best
        if progress.expected:
            self._tell("expected", {"seconds_by_phase": dict(progress.expected)})
        self._tell_progress()

    def _tell_progress(self, *, is_beat: bool = False) -> None:
        left = self._left
        self._tell("progress", {
            "phase": left.phase, "n_done": left.n_done, "n_total": left.n_total,
            "note": self._note, "best": None if self._best is None else trial_json(self._best),
            "seconds_left_in_phase": _rounded(left.of_phase),
            "seconds_left": _rounded(left.of_run),
            "seconds_in_phase": _rounded(left.in_phase),
            "seconds_in_step": _rounded(left.in_step),
            "is_longer_than_expected": left.forecast_exceeded is not None,
            "is_heartbeat": is_beat,
        })  # fmt: skip

    def on_trial(self, trial: "Trial") -> None:
        """What was measured."""
        self._tell("trial", trial_json(trial))

    def beat(self) -> None:
        """The state of things, if nothing was told for long."""
        if self._left.phase and self._clock() - self._last_line >= QUIET_SECONDS:
            self._tell_progress(is_beat=True)

    def close(self, *, is_done: bool) -> None:
        """What ended it is told by `outcome`."""

    def _tell(self, event: str, content: Mapping[str, object]) -> None:
        self._last_line = self._clock()
        seconds = round(self._last_line - self._began, 1)
        tell(json.dumps({"event": event, "seconds": seconds, **content}))


class LiveTable:
    """The latest trials, the best one so far, a bar a phase, and the time left.

    Rich draws it again a few times a second, by the clock: no beat is needed.
    """

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._left = TimeLeft(clock)
        self._began = clock()
        self._bars = Bars(
            _plain("{task.description:<30}"), BarColumn(bar_width=12), MofNCompleteColumn(),
            _plain("{task.fields[spent]}"), _plain("{task.fields[left]}"),
            _plain("{task.fields[note]}"), console=console, auto_refresh=False,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._rows: deque[tuple[int, list[str]]] = deque(
            maxlen=N_ROWS
        )  # number of the trial, cells
        self._best: Trial | None = None
        self._measure = "accuracy"
        self._live = Live(console=console, get_renderable=self._shown, refresh_per_second=4)
        self._live.start()

    def on_progress(self, progress: "Progress") -> None:
        """Moves the phase's bar; a new phase ends the one before."""
        if progress.phase != self._left.phase:
            self._end()
        self._left.tell(progress)
        if progress.phase not in self._tasks:
            task = self._bars.add_task(printable(progress.phase), spent="", left="", note="")
            self._tasks[progress.phase] = task
        task = self._tasks[progress.phase]
        note = printable(self._left.note)
        self._bars.update(task, completed=progress.n_done, total=progress.n_total, note=note)
        self._best = progress.best or self._best

    def on_trial(self, trial: "Trial") -> None:
        """A row of the table."""
        self._rows.append((trial.number, _cells(trial, self._left.n_trials)))
        self._measure = _measure(trial) or self._measure

    def beat(self) -> None:
        """Nothing: what is shown follows the clock."""

    def close(self, *, is_done: bool) -> None:
        """Leaves the last state on the terminal."""
        if is_done:
            self._end()
        self._live.stop()

    def _end(self) -> None:
        """The phase's clock stops; a bar of one piece, which never tells its end, is full."""
        task = self._tasks.get(self._left.phase)
        if task is None:
            return
        self._tick(task)
        self._bars.update(task, left="")
        if self._left.n_total <= 1:
            self._bars.update(task, completed=self._bars.tasks[task].total)

    def _tick(self, task: TaskID) -> None:
        left = self._left.of_phase
        said = f"left {duration(left)}" if left else ""
        self._bars.update(task, spent=duration(self._left.in_phase), left=said)

    def _shown(self) -> Group:
        parts: list[Table | Text | Bars] = []
        rows = list(self._rows)
        if rows:
            table = Table(box=None, pad_edge=False)
            for name in ("trial", "phase", printable(self._measure), "speed-up", "latency"):
                table.add_column(_text(name), justify="left" if name == "phase" else "right")
            for number, cells in rows:
                is_best = self._best is not None and number == self._best.number
                table.add_row(*map(_text, cells), style="bold" if is_best else "")
            parts.append(table)
        if self._best is not None:
            best = f"best so far: {in_words(self._best)}"
            parts.append(Text(printable(best), style="bold"))
        task = self._tasks.get(self._left.phase)
        if task is not None and self._live.is_started:
            self._tick(task)
        parts.append(self._bars)
        told = f"{duration(self._clock() - self._began)} so far"
        if self._left.of_run is not None:
            told += f", about {duration(self._left.of_run)} left in all"
        exceeded = self._left.forecast_exceeded
        if exceeded is not None:
            told += f"; {self._left.phase} takes longer than the {duration(exceeded)} expected"
        return Group(*parts, Text(printable(told), style="dim"))


def _text(cell: str) -> Text:
    """As it is: rich takes brackets for its own markup, and TensorRT's names have them."""
    return Text(printable(cell))


def _plain(form: str) -> TextColumn:
    return TextColumn(form, markup=False)


def trial_json(trial: "Trial") -> dict[str, object]:
    """What a program wants to know of a trial."""
    return {
        "number": trial.number, "phase": trial.phase,
        "accuracy": None if trial.accuracy is None else trial.accuracy.value,
        "measure": _measure(trial) or None,
        "speedup": trial.speedup, "latency_ms": trial.latency_ms,
        "failed_because": trial.failed_because, "widths": dict(trial.widths),
    }  # fmt: skip


def in_words(trial: "Trial", n_total: int = 0) -> str:
    """One line; `n_total` trials are wanted, where that is known."""
    number, phase, *measured = _cells(trial, n_total)
    if len(measured) < 3:
        return f"trial {number}  {phase}"
    value, speedup, latency = measured
    return f"trial {number}  {phase:<8}  {_measure(trial)} {value:>7}  {speedup:>6}  {latency}"


def _measure(trial: "Trial") -> str:
    """What plans are ranked by: "accuracy", "agreement", or a task's metric."""
    return "" if trial.accuracy is None else one_line(trial.accuracy.name)


def _cells(trial: "Trial", n_total: int) -> list[str]:
    number = f"{trial.number + 1:>3}" + (f"/{n_total}" if n_total else "")
    if trial.accuracy is None or trial.speedup is None:
        return [number, f"failed: {one_line(trial.failed_because)}"]
    return [
        number, trial.phase, f"{trial.accuracy.value:.2%}", f"{trial.speedup:.2f}x",
        f"{trial.latency_ms:.3f} ms",
    ]  # fmt: skip


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
