"""Progress on stderr: a bar with the time left on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as RichProgress,
)

if TYPE_CHECKING:  # values imports torch, which `--help` need not wait for
    from compressor.values import Progress, Trial

PLAIN_SECONDS = 10.0  # between plain lines of one phase


class ProgressDisplay:
    """Draws `Progress` and `Trial` as they come; a context manager."""

    def __init__(self) -> None:
        self._n_total = 0  # of the phase
        self._console = Console(stderr=True)
        self._bars: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._phase = ""
        self._last_line = 0.0
        self._phase_began = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bars = RichProgress(
                TextColumn("{task.description:<30}"), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"), console=self._console,
            )  # fmt: skip
            self._bars.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            if _type is None:
                self._close_phase()
            self._bars.stop()

    def on_progress(self, progress: "Progress") -> None:
        """Moves the phase's bar; a new phase completes the one before."""
        self._n_total = progress.n_total
        if self._bars is None:
            self._plain(progress)
            return
        if progress.phase != self._phase:
            self._close_phase()
            self._tasks[progress.phase] = self._bars.add_task(
                progress.phase, total=progress.n_total, note=""
            )
        self._phase = progress.phase
        task = self._tasks[progress.phase]
        self._bars.update(task, completed=progress.n_done, total=progress.n_total)
        if progress.note:
            self._bars.update(task, note=progress.note)

    def on_trial(self, trial: "Trial") -> None:
        """One line a trial."""
        if trial.accuracy is None or trial.speedup is None:
            text = f"trial {trial.number + 1:>3}  failed: {trial.failed_because}"
        else:
            text = (
                f"trial {trial.number + 1:>3}/{self._n_total}  {trial.phase:<8}  "
                f"accuracy {trial.accuracy.value:7.2%}  {trial.speedup:5.2f}x  "
                f"{trial.latency_ms:.3f} ms"
            )
        if self._bars is None:
            sys.stderr.write(f"{text}\n")
        else:
            self._bars.console.print(text, highlight=False, markup=False)

    def _close_phase(self) -> None:
        if self._bars is not None and self._phase:
            task = self._tasks[self._phase]
            self._bars.update(task, completed=self._bars.tasks[task].total)

    def _plain(self, progress: "Progress") -> None:
        """A line when a phase begins and ends, and every `PLAIN_SECONDS` in between."""
        is_due = time.monotonic() - self._last_line > PLAIN_SECONDS
        is_last = progress.n_done == progress.n_total and progress.n_total > 1
        if progress.phase != self._phase or is_due or is_last:
            parts = [progress.phase]
            if progress.n_total > 1:
                parts += [f"{progress.n_done}/{progress.n_total}", self._time_left(progress)]
            sys.stderr.write(" ".join(filter(None, (*parts, progress.note))) + "\n")
            self._last_line = time.monotonic()
        if progress.phase != self._phase:
            self._phase, self._phase_began = progress.phase, time.monotonic()

    def _time_left(self, progress: "Progress") -> str:
        if progress.phase != self._phase or not 0 < progress.n_done < progress.n_total:
            return ""
        seconds = (time.monotonic() - self._phase_began) / progress.n_done
        return f"(about {seconds * (progress.n_total - progress.n_done):.0f} s left)"
