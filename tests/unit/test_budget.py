"""Shares of a time budget, under a fake clock; and what measuring again teaches."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from compressor.cli.time_left import TimeLeft

from compressor.budget import CAUTION, LEAST_TRIALS, Budget
from compressor.errors import ConfigError, RunFolderError
from compressor.finalists import place_of
from compressor.latency.timing import FINAL, TRIAL
from compressor.search.objective import Correction, corrected
from compressor.values import (
    FINE_TUNING,
    FIRST_PLAN,
    GATHERING,
    MEASURING_FILES,
    MEASURING_FINALISTS,
    PRUNING,
    SEARCHING,
    TIMING_LAYERS,
    Accuracy,
    Progress,
    Trial,
)

EXPECTED = {
    TIMING_LAYERS: 20.0, SEARCHING: 100.0, MEASURING_FINALISTS: 20.0, PRUNING: 4.0,
    FINE_TUNING: 100.0, MEASURING_FILES: 8.0,
}  # fmt: skip


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def divided(total_s: float, spent_s: float = 10.0) -> Budget:
    clock = Clock()
    budget = Budget(total_s, clock=clock)
    clock.now += spent_s
    budget.divide(EXPECTED)
    return budget


def test_without_a_budget_there_is_time_for_everything() -> None:
    budget = Budget(None)
    budget.check("anything")
    budget.divide(EXPECTED)
    assert (
        budget.of_s(FIRST_PLAN) == budget.of_s(SEARCHING) == budget.of_s(FINE_TUNING) == math.inf
    )
    assert budget.effort(FINAL, budget.of_s(MEASURING_FINALISTS)) == FINAL
    assert budget.within(EXPECTED) == EXPECTED


def test_a_run_that_began_before_torch_was_loaded_has_spent_that_time() -> None:
    clock = Clock()
    began = clock()
    clock.now += 97
    assert Budget(150, since=began, clock=clock).left_s == 53
    with pytest.raises(ConfigError, match="is spent: loading torch alone took 97 s"):
        Budget(90, since=began, clock=clock).check("loading torch")


@pytest.mark.parametrize("total_s", [60, 120, 300, 1000, 10_000])
def test_shares_add_up_and_none_is_below_zero(total_s: float) -> None:
    budget = divided(total_s)
    shares = [
        budget.of_s(TIMING_LAYERS), budget.of_s(FIRST_PLAN), budget.of_s(SEARCHING),
        budget.of_s(MEASURING_FINALISTS),
        budget.of_s(FINE_TUNING), budget.left_s,
    ]  # fmt: skip
    assert shares == sorted(shares)
    assert shares[0] > 0
    assert shares[-1] == total_s - 10
    training = budget.of_s(FINE_TUNING) - budget.of_s(MEASURING_FINALISTS)
    assert 0 < training <= CAUTION * EXPECTED[FINE_TUNING] + 1e-9
    assert training <= 0.5 * (total_s - 10)
    files = budget.left_s - budget.of_s(FINE_TUNING)
    assert files >= EXPECTED[MEASURING_FILES] + EXPECTED[PRUNING] - 1e-9
    assert files <= CAUTION * (EXPECTED[MEASURING_FILES] + EXPECTED[PRUNING]) + 1e-9


def test_a_few_trials_come_before_training_and_gathering_has_its_share() -> None:
    clock = Clock()
    budget = Budget(80, clock=clock)
    clock.now += 10
    budget.divide(EXPECTED | {GATHERING: 10.0}, trial_s=6.0)
    assert budget.of_s(GATHERING) <= 0.5 * budget.of_s(FIRST_PLAN) + 1e-9
    searching = budget.of_s(SEARCHING) - budget.of_s(FIRST_PLAN)
    assert searching >= LEAST_TRIALS * 6 - 1e-9
    assert budget.of_s(FINE_TUNING) - budget.of_s(MEASURING_FINALISTS) < 0.4 * 60


def test_one_trial_must_be_possible() -> None:
    clock = Clock()
    budget = Budget(60, clock=clock)
    clock.now += 30
    with pytest.raises(ConfigError, match="at least 140s"):  # 30 + 3 (2 + 25 + 8)
        budget.divide(EXPECTED, trial_s=25.0)


def test_a_long_budget_gives_every_part_all_it_wants_and_the_search_the_rest() -> None:
    budget = divided(10_000)
    assert budget.of_s(FIRST_PLAN) >= CAUTION * 20
    assert budget.of_s(SEARCHING) > 9000


@pytest.mark.parametrize("total_s", [15, 19.5])
def test_a_budget_too_short_to_measure_what_comes_out_is_refused(total_s: float) -> None:
    with pytest.raises(ConfigError, match=r"too short: 10 s went into .* at least \d+0s"):
        divided(total_s)


def test_a_run_that_goes_on_is_finished_although_nothing_is_left() -> None:
    clock = Clock()
    budget = Budget(30, clock=clock)
    clock.now += 50
    budget.divide(EXPECTED, is_new=False)
    assert budget.of_s(SEARCHING) <= 0
    assert budget.of_s(FINE_TUNING) <= 0
    assert budget.effort(FINAL, budget.of_s(MEASURING_FINALISTS)).budget_s == 2.0


def test_what_was_spent_before_counts(tmp_path: Path) -> None:
    clock, file = Clock(), tmp_path / "spent.json"
    first = Budget(100, file=file, clock=clock)
    clock.now += 30
    first.keep_in(file)
    clock.now += 3
    first.note()  # too soon
    second = Budget(100, file=file, clock=clock)
    assert second.spent_s == pytest.approx(30)
    clock.now += 10
    assert second.left_s == pytest.approx(60)


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[1]", '{"spent_s": -1}', '{"spent_s": "long"}', '{"spent_s": true}',
     '{"spent_s": 1e400}', '{"spent_s": ' + "9" * 440 + "}", '{"spent_s": 1, "cut_short": [2]}'],
)  # fmt: skip
def test_a_note_that_says_nothing_is_passed_over(tmp_path: Path, content: str) -> None:
    file = tmp_path / "spent.json"
    file.write_text(content)
    assert Budget(100, file=file, clock=Clock()).spent_s == 0


def test_a_folder_where_the_note_is_to_be_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is no file; remove it to go on"):
        Budget(100, file=tmp_path)


def test_what_was_cut_before_a_stop_is_still_said(tmp_path: Path) -> None:
    first = Budget(100, clock=Clock())
    first.cut("5 of 9 trials")
    first.keep_in(tmp_path / "spent.json")
    assert list(Budget(100, file=tmp_path / "spent.json").cut_short) == ["5 of 9 trials"]


def test_time_that_nobody_else_needs_goes_to_what_is_measured_before() -> None:
    assert divided(10_000).of_s(FIRST_PLAN) > 1000


def test_an_effort_takes_no_longer_than_it_may() -> None:
    short = Budget(100).effort(FINAL, 5.0)
    assert (short.budget_s, short.limit_s) == (5.0, 5.0)
    assert Budget(100).effort(TRIAL, 100.0) == TRIAL


def test_what_is_cut_is_said_once() -> None:
    budget = Budget(10)
    budget.cut("a")
    budget.cut("a")
    assert list(budget.cut_short) == ["a"]


def trial(number: int, speedup: float | None) -> Trial:
    if speedup is None:
        return Trial(number, {}, "", failed_because="gone")
    interval = (speedup - 0.1, speedup + 0.1)
    return Trial(number, {}, "", Accuracy(0.9, 100), speedup, interval, 10.0 / speedup)


def test_trials_before_a_correction_move_and_later_ones_do_not() -> None:
    trials = [trial(0, 2.0), trial(1, None), trial(2, 4.0), trial(3, 2.0)]
    moved = corrected(trials, [Correction(3, 0.5, {2: (1.8, 1.7, 1.9)})])
    assert [t.speedup for t in moved] == [1.0, None, 1.8, 2.0]
    assert moved[0].speedup_ci95 == pytest.approx((0.95, 1.05))
    assert moved[0].latency_ms == pytest.approx(10.0)
    assert moved[2].speedup_ci95 == (1.7, 1.9)
    assert moved[1] == trials[1]
    assert corrected(trials, []) == tuple(trials)


def test_what_was_measured_again_moves_only_where_the_files_say_so() -> None:
    trials = [trial(0, 2.0), trial(1, 2.0)]
    first = Correction(2, 0.9, {0: (1.7, 1.6, 1.8)})
    again = corrected(trials, [first, Correction(2, 0.5, {1: (1.9, 1.8, 2.0)})])
    assert [t.speedup for t in again] == [1.7, 1.9]
    files = Correction(2, 0.5, {1: (1.9, 1.8, 2.0)}, is_by_files=True)
    assert [t.speedup for t in corrected(trials, [first, files])] == [0.85, 1.9]


@pytest.mark.parametrize(("step_s", "is_trained"), [(0.1, True), (5.0, True), (20.0, False)])
def test_training_that_there_is_no_time_for_is_not_waited_for(
    step_s: float, is_trained: bool
) -> None:
    budget = divided(150)
    left, told = TimeLeft(Clock()), list[Progress]()
    left.tell(Progress(MEASURING_FINALISTS, 8, 8, expected=EXPECTED))
    run: Any = SimpleNamespace(
        job=SimpleNamespace(n_steps=100), budget=budget, step_s=step_s,
        folder=SimpleNamespace(path=Path("run")), on_progress=told.append,
    )  # fmt: skip
    searched: Any = SimpleNamespace(
        study=SimpleNamespace(number_once=lambda _key, measure: measure())
    )
    assert (place_of(run, searched, 0).n_steps > 0) is is_trained
    for progress in told:
        left.tell(progress)
    rest = sum(EXPECTED.values()) - EXPECTED[MEASURING_FINALISTS]
    assert left.of_run == pytest.approx(rest - (0 if is_trained else EXPECTED[FINE_TUNING]))
