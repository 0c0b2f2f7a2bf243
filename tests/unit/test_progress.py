"""What is drawn while work goes on, and how much of it is left; the clock is moved by hand."""

import io
import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from compressor.cli import progress, time_left
from compressor.cli.time_left import TimeLeft
from rich.console import Console

from compressor.report import trials_report
from compressor.values import GATHERING, SEARCHING, Accuracy, Progress, Trial

ROOT = Path(__file__).parents[2]
EXPECTED = {"Searching": 60.0, "Fine-tuning": 120.0}


class Clock:
    """Stands until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def left(clock: Clock) -> TimeLeft:
    return TimeLeft(clock)


def figures(left: TimeLeft) -> tuple[float | None, float | None]:
    """Of the phase and of the run."""
    return left.of_phase, left.of_run


def trial(number: int, accuracy: float = 0.9) -> Trial:
    return Trial(
        number=number, widths={"a": 8}, phase="layers", accuracy=Accuracy(accuracy, 100),
        speedup=2.0, speedup_ci95=(1.9, 2.1), latency_ms=1.5,
    )  # fmt: skip


def test_the_forecast_holds_from_the_start_and_moves_with_the_clock(
    clock: Clock, left: TimeLeft
) -> None:
    left.tell(Progress("Measuring", 1, 1, expected=EXPECTED))
    assert figures(left) == (None, 180.0)
    left.tell(Progress("Searching", 0, 10))
    assert figures(left) == (60.0, 180.0)
    clock.move(4)
    assert figures(left) == (56.0, 176.0)


def test_what_was_seen_counts_more_the_more_was_seen(clock: Clock, left: TimeLeft) -> None:
    """A minute for a thousand trials was forecast; one takes three seconds."""
    left.tell(Progress("Measuring", 1, 1, expected=EXPECTED))
    left.tell(Progress("Searching", 0, 1000))
    per_trial = []
    for n_done in range(1, 400):
        clock.move(3)
        left.tell(Progress("Searching", n_done, 1000))
        assert left.of_phase is not None
        per_trial.append(left.of_phase / (1000 - n_done))
    assert per_trial[0] == pytest.approx((2 * 0.06 + 3) / 3)
    assert per_trial == sorted(per_trial)
    assert per_trial[-1] == pytest.approx(3, rel=0.01)


def test_without_a_forecast_two_units_are_waited_for(clock: Clock, left: TimeLeft) -> None:
    left.tell(Progress("Timing", 0, 6))
    clock.move(4)
    left.tell(Progress("Timing", 1, 6))
    assert figures(left) == (None, None)
    clock.move(4)
    left.tell(Progress("Timing", 2, 6))
    assert figures(left) == (16.0, None)


def test_a_unit_that_takes_long_lets_more_be_expected(clock: Clock, left: TimeLeft) -> None:
    """Nobody hears of it for four minutes: the figure grows, and does not stand."""
    left.tell(Progress("Timing", 0, 6, expected={"Timing": 60.0}))
    seen = []
    for _ in range(25):
        clock.move(10)
        seen.append(left.of_phase)
    assert seen[0] == 50.0
    told = [seconds for seconds in seen if seconds is not None]
    assert len(set(told)) == len(seen)
    assert told[-1] > 60
    assert left.forecast_exceeded == 60.0
    assert (left.in_phase, left.in_step) == (250.0, 250.0)


def test_a_phase_of_one_piece_is_never_below_zero(clock: Clock, left: TimeLeft) -> None:
    left.tell(Progress("Pruning", 0, 1, expected={"Pruning": 20.0, "Fine-tuning": 60.0}))
    clock.move(15)
    assert str(left) == "about 5 s left, about 1 min 5 s left in all"
    clock.move(30)
    assert (left.of_phase, left.of_run) == (0.0, 60.0)
    assert str(left) == "longer than the 20 s expected, about 1 min 0 s left in all"


def test_a_run_that_goes_on_does_not_count_what_was_there(clock: Clock, left: TimeLeft) -> None:
    left.tell(Progress("Searching", 8, 12))
    clock.move(6)
    left.tell(Progress("Searching", 10, 12))
    assert left.of_phase == 6.0


def test_a_phase_that_comes_back_goes_on_where_it_stood(clock: Clock, left: TimeLeft) -> None:
    left.tell(Progress("Searching", 0, 10, expected=EXPECTED | {"Measuring": 5.0}))
    clock.move(30)
    left.tell(Progress("Searching", 5, 10))
    assert left.of_phase == pytest.approx(30.0)
    left.tell(Progress("Measuring", 0, 4))
    assert left.of_run == 125.0
    clock.move(8)
    left.tell(Progress("Searching", 5, 10))
    assert left.of_phase == pytest.approx(30.0)
    assert left.of_run == pytest.approx(150.0)
    assert left.in_phase == 30.0
    clock.move(6)
    left.tell(Progress("Searching", 6, 20))  # more are wanted now
    assert left.of_phase == pytest.approx(14 * 6.0)


def test_the_newest_forecast_is_taken(clock: Clock, left: TimeLeft) -> None:
    left.tell(Progress("Searching", 0, 10, expected=EXPECTED))
    clock.move(10)
    left.tell(Progress("Searching", 1, 10, expected={"Searching": 90.0, "Fine-tuning": 30.0}))
    assert left.of_phase == pytest.approx((2 * 10 + 10) / 3 * 9)
    assert left.of_run == pytest.approx(90.0 + 30.0)
    left.tell(Progress("Fine-tuning", 0, 1))
    assert left.of_run == 30.0


def test_phases_in_any_order(clock: Clock, left: TimeLeft) -> None:
    """What was forecast and has not come is still to come; what was not costs no error."""
    left.tell(Progress("Reading", 0, 1, expected=EXPECTED))
    left.tell(Progress("Fine-tuning", 0, 0))
    clock.move(1)
    assert left.of_run == 60.0
    left.tell(Progress("Something else", 3, 2))
    assert (left.of_phase, left.of_run) == (None, 60.0)
    left.tell(Progress("Searching", 0, 3))
    assert left.of_run == 60.0


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_plain_lines(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    lines = progress.PlainLines(clock)
    lines.on_progress(Progress("Measuring", 1, 1, expected=EXPECTED))
    lines.on_progress(Progress("Searching", 0, 3))
    lines.on_trial(trial(0))
    lines.on_progress(Progress("Searching", 1, 3))
    lines.on_trial(Trial(number=1, widths={}, phase="start", failed_because="no memory"))
    assert lines_of(capsys) == [
        "Measuring (about 3 min 0 s left in all)",
        "About 3 min 0 s in all: Fine-tuning 2 min 0 s, Searching 1 min 0 s",
        "Searching 0/3 (about 1 min 0 s left, about 3 min 0 s left in all)",
        "trial   1/3  layers    accuracy  90.00%   2.00x  1.500 ms",
        "trial   2/3  failed: no memory",
    ]


@pytest.mark.parametrize("name", ["accuracy", "agreement", "mAP kept"])
def test_trials_say_what_they_are_ranked_by(
    name: str, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = replace(trial(0), accuracy=Accuracy(0.9, 10, name=name))
    assert progress.in_words(measured).endswith(f"{name}  90.00%   2.00x  1.500 ms")
    assert progress.trial_json(measured)["measure"] == name
    assert re.search(rf"trial +phase +{name} ", trials_report(Path("runs/net"), [measured]))
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    table = progress.LiveTable(console, clock)
    table.on_trial(measured)
    with console.capture() as seen:
        console.print(table._shown())
    table.close(is_done=True)
    assert re.search(rf"phase +{name} ", re.sub(r"\x1b\[[0-9;]*m", "", seen.get()))


def test_plain_lines_come_although_nothing_is_told(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = progress.PlainLines(clock)
    lines.beat()
    lines.on_progress(Progress("Searching", 0, 6, expected={"Searching": 60.0}))
    lines_of(capsys)
    for _ in range(25):
        clock.move(1)
        lines.beat()
    assert lines_of(capsys) == [
        "Searching 0/6, for 10 s (about 50 s left)",
        "Searching 0/6, for 20 s (about 1 min 7 s left)",
    ]
    lines.on_progress(Progress("Pruning", 0, 1, "of NNI"))
    clock.move(12)
    lines.beat()
    assert lines_of(capsys) == ["Pruning of NNI", "Pruning, for 12 s of NNI"]


def test_another_forecast_is_told_where_it_differs(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = progress.PlainLines(clock)
    lines.on_progress(Progress("Searching", 0, 6, expected=EXPECTED))
    lines.on_progress(Progress("Searching", 0, 6, expected={"Fine-tuning": 125.0}))
    assert len(lines_of(capsys)) == 2
    lines.on_progress(Progress("Searching", 0, 6, expected={"Fine-tuning": 240.0}))
    assert lines_of(capsys) == ["Now about 5 min 0 s left in all"]


def test_lines_of_json(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    lines = progress.JsonLines(clock)
    lines.on_progress(Progress("Measuring", 1, 1, expected=EXPECTED))
    lines.on_trial(trial(0))
    lines.on_progress(Progress("Searching", 1, 3, best=trial(0)))
    clock.move(9)
    lines.beat()
    clock.move(61)
    lines.beat()
    told = [json.loads(line) for line in lines_of(capsys)]
    assert [each["event"] for each in told] == [
        "expected", "progress", "trial", "progress", "progress",
    ]  # fmt: skip
    assert told[0]["seconds_by_phase"] == EXPECTED
    assert told[2]["accuracy"] == 0.9
    for each in told[3:]:
        assert (each["phase"], each["n_done"], each["n_total"]) == ("Searching", 1, 3)
        assert each["best"]["number"] == 0
    assert [each["is_heartbeat"] for each in told[3:]] == [False, True]
    assert [each["seconds_left"] for each in told[3:]] == [180.0, told[4]["seconds_left"]]
    assert told[4]["seconds_in_step"] == told[4]["seconds_in_phase"] == 70.0
    assert told[4]["is_longer_than_expected"]
    assert told[4]["seconds_left_in_phase"] > 0


def table_on(clock: Clock, width: int = 160) -> tuple[progress.LiveTable, Console]:
    console = Console(force_terminal=True, width=width, height=40, record=True, file=io.StringIO())
    return progress.LiveTable(console, clock), console


def test_the_live_table_shows_the_latest_trials_and_the_best(clock: Clock) -> None:
    """On a terminal that keeps what is drawn; the best trial has left the table by the end."""
    table, console = table_on(clock)
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


def drawn(table: progress.LiveTable) -> str:
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(table._shown())
    return console.export_text()


def test_the_live_table_follows_the_clock_alone(clock: Clock) -> None:
    """And a phase that comes back goes on with its bar."""
    table, _ = table_on(clock)
    table.on_progress(Progress("Searching", 2, 6, expected={"Searching": 60.0}))
    assert "left 1 min 0 s" in drawn(table)
    clock.move(10)
    assert "left 50 s" in drawn(table)
    clock.move(60)
    assert "longer than the 1 min 0 s expected" in drawn(table)
    table.on_progress(Progress("Pruning", 0, 1))
    clock.move(5)
    table.on_progress(Progress("Searching", 2, 6))
    shown = drawn(table)
    table.close(is_done=True)
    assert "2/6" in shown
    assert "1/1" in shown
    assert "1 min 10 s" in next(line for line in shown.splitlines() if "Searching" in line)
    assert "1 min 15 s so far" in shown


def test_nothing_is_written_after_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.02)
    with progress.ProgressDisplay() as display:
        display.begins("Waiting")
        for _ in range(500):
            time.sleep(0.01)
            if ", for" in capsys.readouterr().err:
                break
        else:
            pytest.fail("no beat in 5 s")
    capsys.readouterr()
    for thread in threading.enumerate():
        if thread.name == "heartbeat":
            thread.join(timeout=5)
            assert not thread.is_alive()
    assert capsys.readouterr().err == ""


SLOW = """
import signal, sys, time
from compressor.cli import progress
progress.QUIET_SECONDS = 0.2
progress.TICK_SECONDS = 0.05
with progress.ProgressDisplay(as_json=bool(sys.argv[1:])) as display:
    display.begins("Loading")
    time.sleep(60)
"""


@pytest.mark.parametrize("args", [(), ("json",)])
def test_a_slow_phase_in_a_process_of_its_own(args: tuple[str, ...], tmp_path: Path) -> None:
    """Its lines come without a word from the work, and Ctrl-C ends it at once."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    running = subprocess.Popen(
        [sys.executable, script, *args], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert running.stderr is not None
    lines = [running.stderr.readline() for _ in range(4)]
    began = time.monotonic()
    running.send_signal(2)
    rest = running.stderr.read()
    running.wait(timeout=30)
    running.stderr.close()
    assert time.monotonic() - began < 10
    assert "KeyboardInterrupt" in rest
    assert "Loading" not in rest.partition("Traceback")[2].partition("KeyboardInterrupt")[2]
    if args:
        told = [json.loads(line) for line in lines]
        assert [each["is_heartbeat"] for each in told] == [False, True, True, True]
        assert all(each["phase"] == "Loading" for each in told)
    else:
        assert lines[0] == "Loading\n"
        assert all(line.startswith("Loading, for ") for line in lines[1:])


def test_trials_are_counted_by_the_search_whatever_is_told_within_it() -> None:
    left = TimeLeft(lambda: 0.0)
    left.tell(Progress(SEARCHING, 0, 5))
    left.tell(Progress(GATHERING, 0, 1000))
    assert (left.n_total, left.n_trials) == (1000, 5)
    assert time_left.SEARCHING == SEARCHING
