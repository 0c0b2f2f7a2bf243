"""What the command line knows before anything heavy is imported, and what it draws."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from compressor.cli import options, progress
from rich.console import Console

from compressor.config import Config
from compressor.importance import IMPORTANCES
from compressor.training import SCHEDULES
from compressor.values import Accuracy, Progress, Trial

ROOT = Path(__file__).parents[2]
EXPECTED = {"Searching": 60.0, "Fine-tuning": 120.0}


def trial(number: int, accuracy: float = 0.9) -> Trial:
    return Trial(
        number=number, widths={"a": 8}, phase="layers", accuracy=Accuracy(accuracy, 100),
        speedup=2.0, speedup_ci95=(1.9, 2.1), latency_ms=1.5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("names", "field"),
    [
        (options.SEARCHES, "search"),
        (options.CLUSTERINGS, "clustering"),
        (options.ROLLBACKS, "rollback"),
        (options.BOUNDS, "bounds"),
        (options.FITS, "fit_to_limit"),
        (options.IMPORTANCES, "importance"),
        (options.SCHEDULES, "schedule"),
    ],
)
def test_help_and_tab_know_the_names_that_are_taken(names: tuple[str, ...], field: str) -> None:
    assert names == get_args(Config.model_fields[field].annotation)


def test_names_are_those_of_what_they_choose() -> None:
    assert set(options.IMPORTANCES) == set(IMPORTANCES)
    assert set(options.SCHEDULES) == set(SCHEDULES)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the display's clock on by so many seconds."""
    now = 0.0

    def move(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    return move


def test_what_is_left_is_what_was_expected_corrected_by_what_was_seen(
    clock: Callable[[float], None],
) -> None:
    left = progress.TimeLeft()
    left.tell(Progress("Measuring", 1, 1, expected=EXPECTED))
    assert (left.of_phase, left.of_run) == (None, 180.0)
    left.tell(Progress("Searching", 0, 10))
    clock(4)
    left.tell(Progress("Searching", 1, 10))
    assert left.of_run == 180.0  # one trial says too little
    clock(4)
    left.tell(Progress("Searching", 2, 10))
    assert (left.of_phase, left.of_run) == (32.0, 152.0)
    left.tell(Progress("Fine-tuning", 0, 100))
    assert left.of_run == 120.0
    clock(10)
    left.tell(Progress("Fine-tuning", 50, 100))
    assert left.of_run == left.of_phase == 10.0


def test_a_run_that_goes_on_does_not_count_what_was_there(clock: Callable[[float], None]) -> None:
    left = progress.TimeLeft()
    left.tell(Progress("Searching", 8, 12))
    clock(6)
    left.tell(Progress("Searching", 10, 12))
    assert left.of_phase == 6.0


def test_lines_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.ProgressDisplay(as_json=True) as display:
        display.on_progress(Progress("Measuring", 1, 1, expected=EXPECTED))
        display.on_trial(trial(0))
        display.on_progress(Progress("Searching", 1, 3, best=trial(0)))
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [each["event"] for each in told] == ["expected", "progress", "trial", "progress"]
    assert told[0]["seconds_by_phase"] == EXPECTED
    assert told[2]["accuracy"] == 0.9
    assert told[3]["best"]["number"] == 0
    assert told[3]["seconds_left"] == 180.0


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.ProgressDisplay() as display:
        display.on_progress(Progress("Measuring", 1, 1, expected=EXPECTED))
        display.on_progress(Progress("Searching", 0, 3))
        display.on_trial(trial(0))
        display.on_progress(Progress("Searching", 1, 3))
        display.on_trial(Trial(number=1, widths={}, phase="start", failed_because="no memory"))
    assert capsys.readouterr().err.splitlines() == [
        "Measuring",
        "About 3 min 0 s in all: Fine-tuning 2 min 0 s, Searching 1 min 0 s",
        "Searching 0/3",
        "trial   1/3  layers    accuracy  90.00%   2.00x  1.500 ms",
        "trial   2/3  failed: no memory",
    ]


def test_the_live_table_shows_the_latest_trials_and_the_best() -> None:
    """On a terminal that keeps what is drawn; the best trial has left the table by the end."""
    file = io.StringIO()
    console = Console(force_terminal=True, width=100, height=40, record=True, file=file)
    table = progress.LiveTable(console)
    table.on_progress(Progress("Measuring", 1, 1, expected=EXPECTED))
    for number in range(20):
        table.on_trial(trial(number, 0.5 if number else 0.98))
        table.on_progress(Progress("Searching", number + 1, 20, best=trial(0, 0.98)))
    table.on_trial(Trial(number=20, widths={}, phase="start", failed_because="no memory"))
    table.close(is_done=True)
    shown = console.export_text()
    assert shown.count("50.00%") == progress.N_ROWS - 1
    assert "failed: no memory" in shown
    best = next(line for line in shown.splitlines() if line.startswith("best so far"))
    assert "98.00%" in best
    assert "20/20" in shown
    assert "left in all" in shown


def completed(words: str, tmp_path: Path) -> list[str]:
    """What bash offers after `words`, by the script that is installed."""
    command = tmp_path / "compress"
    command.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'from compressor.cli import main; main()' \"$@\"\n"
    )
    command.chmod(0o755)
    script = (
        'eval "$(_COMPRESS_COMPLETE=source_bash compress)"\n'
        f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n"
        '_compress_completion compress; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True, cwd=ROOT,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("compress ins", ["inspect"]),
        ("compress --spee", ["--speedup"]),
        ("compress model.pt --max-", ["--max-latency", "--max-drop"]),
        ("compress model.pt --target jetson-na", ["jetson-nano"]),
        ("compress model.pt --search b", ["bocr", "bo"]),
        ("compress measure --fail", ["--fail-below"]),
    ],
)
def test_tab_completes(words: str, offered: list[str], tmp_path: Path) -> None:
    assert completed(words, tmp_path) == offered
