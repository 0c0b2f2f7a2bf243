"""The statistics of a comparison, under a fake clock and with known answers."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.busy import busy_sessions
from compressor.errors import UnstableClockError
from compressor.export import export_onnx
from compressor.latency import runner
from compressor.latency.device import open_device
from compressor.latency.runner import RunnerError, Samples, time_pair
from compressor.latency.targets import load_target
from compressor.latency.timing import (
    FINAL,
    MAX_SPREAD,
    TRIAL,
    Effort,
    compare,
    decided_by,
    has_thread_clock,
    is_win,
    paired_ratio,
    state_changes,
    summary,
    unsteady,
)
from compressor.values import Clock, Latency, PairedLatency, SessionPair

MS = 1_000_000


class Unwatched:
    """A system that tells neither CPU times nor interruptions."""

    has_thread_clock = False

    def cpu_ns(self) -> int:
        return 0

    def n_interruptions(self) -> int | None:
        return None


class FakeMachine:
    """A clock that only moves when a model runs, and models of known speed."""

    def __init__(self, slow_down: Callable[[int], float] = lambda _run: 1.0) -> None:
        self.now_ns = 0
        self.n_runs = 0
        self.slow_down = slow_down
        self.order: list[str] = []
        self.n_sessions = {"original": 0, "candidate": 0}

    def clock_ns(self) -> int:
        return self.now_ns

    def session(
        self, name: str, milliseconds: float, n_cold: int = 0
    ) -> Callable[[], Callable[[], int]]:
        """Opens sessions whose first `n_cold` runs take ten times as long."""

        def open_session() -> Callable[[], int]:
            self.n_sessions[name] += 1
            n_runs = 0

            def run() -> int:
                nonlocal n_runs
                n_runs += 1
                self.n_runs += 1
                self.order.append(name)
                cold = 10 if n_runs <= n_cold else 1
                took_ns = round(milliseconds * MS * cold * self.slow_down(self.n_runs))
                self.now_ns += took_ns
                return took_ns

            return run

        return open_session

    def time_pair(
        self, original_ms: float, candidate_ms: float, effort: Effort, n_cold: int = 0
    ) -> Callable[[int], SessionPair]:
        """As a runner on this machine would time pairs."""

        def timed(seed: int) -> SessionPair:
            original, candidate = time_pair(
                self.session("original", original_ms, n_cold),
                self.session("candidate", candidate_ms, n_cold),
                seed, effort.pair_s, effort.pair_limit_s, effort.min_rounds, effort.max_rounds,
                effort.n_warmup, effort.warmup_s, self.clock_ns, Unwatched(),
            )  # fmt: skip
            return SessionPair(tuple(original.ms), tuple(candidate.ms))

        return timed


EFFORT = Effort(
    min_pairs=3, max_pairs=6, budget_s=100, pair_s=0.3, min_rounds=5, max_rounds=200, n_warmup=2,
    pair_limit_s=100, warmup_s=100,
)  # fmt: skip


def compared(
    machine: FakeMachine, original_ms: float, candidate_ms: float, effort: Effort = EFFORT
) -> PairedLatency:
    return compare(
        machine.time_pair(original_ms, candidate_ms, effort), effort, clock_ns=machine.clock_ns
    )


def test_known_speeds_give_the_known_ratio() -> None:
    machine = FakeMachine()
    pair = compared(machine, 6.0, 2.0)
    assert pair.ratio == pytest.approx(3.0)
    assert pair.ci95 == pytest.approx((3.0, 3.0))
    assert pair.original.median_ms == 6.0
    assert pair.candidate.p90_ms == 2.0
    assert (
        pair.original.n == pair.candidate.n == sum(len(p.original_ms) for p in pair.session_pairs)
    )
    assert machine.n_sessions == {"original": 3, "candidate": 3}
    assert len(pair.session_pairs[0].original_ms) == 38  # 0.3 s of rounds of 8 ms
    assert pair.is_valid


def test_slow_models_still_get_the_least_number_of_rounds() -> None:
    pair = compared(FakeMachine(), 900.0, 500.0)
    assert [len(p.original_ms) for p in pair.session_pairs] == [5, 5, 5]


def test_quick_models_get_no_more_rounds_than_help() -> None:
    pair = compared(FakeMachine(), 0.002, 0.001)
    assert [len(p.original_ms) for p in pair.session_pairs] == [EFFORT.max_rounds] * 3


def test_warm_up_is_not_timed() -> None:
    """The first runs of each session take ten times as long; none of them is kept."""
    machine = FakeMachine()
    pair = compare(
        machine.time_pair(4.0, 1.0, EFFORT, n_cold=2), EFFORT, clock_ns=machine.clock_ns
    )
    assert max(pair.session_pairs[0].original_ms) == 4.0
    assert pair.ratio == pytest.approx(4.0)


def test_drift_cancels_and_both_run_in_every_round_in_random_order() -> None:
    """A machine that gets steadily slower: block timing would blame whoever ran last."""
    machine = FakeMachine(slow_down=lambda run: 1 + run / 50)
    pair = compared(machine, 3.0, 3.0)
    assert pair.ratio == pytest.approx(1.0, abs=0.01)
    rounds = np.array(machine.order[4:]).reshape(-1, 2)  # after the first warm-up
    assert all(set(pair_of_runs) == {"original", "candidate"} for pair_of_runs in rounds[:30])
    assert {tuple(r) for r in rounds[:30]} == {
        ("original", "candidate"), ("candidate", "original"),
    }  # fmt: skip


def noisy(between: float, seed: int = 0, within: float = 0.01) -> Callable[[int], SessionPair]:
    """Pairs of equal models, whose sessions differ by `between`."""
    generator = np.random.default_rng(seed)

    def timed(_seed: int) -> SessionPair:
        original = np.exp(generator.normal(0, between)) * np.exp(generator.normal(0, within, 40))
        candidate = np.exp(generator.normal(0, within, 40))
        return SessionPair(tuple(original), tuple(candidate))

    return timed


def test_it_ends_when_it_is_sure_or_when_its_pairs_or_its_time_are_spent() -> None:
    steady = compare(noisy(0.001, within=0.001), EFFORT)
    assert len(steady.session_pairs) == EFFORT.min_pairs
    wild = compare(noisy(0.2), EFFORT)
    assert len(wild.session_pairs) == EFFORT.max_pairs
    seconds = iter(range(10**6))
    late = compare(
        noisy(0.2), replace(EFFORT, budget_s=4.5, max_pairs=1000),
        clock_ns=lambda: next(seconds) * 10**9,
    )  # fmt: skip
    assert len(late.session_pairs) == 5  # the clock gains a second at each look
    hurried = compare(
        noisy(0.2), replace(EFFORT, budget_s=0), clock_ns=lambda: next(seconds) * 10**9
    )
    assert len(hurried.session_pairs) == 2  # an interval needs two


def test_it_goes_on_after_its_time_until_it_is_fairly_sure_or_its_limit() -> None:
    def n_pairs(fair_half_width: float, limit_s: float | None = None) -> int:
        seconds = iter(range(10**6))
        effort = replace(
            EFFORT, budget_s=4.5, limit_s=limit_s, max_pairs=1000, half_width=1e-6,
            fair_half_width=fair_half_width,
        )  # fmt: skip
        pair = compare(noisy(0.02), effort, clock_ns=lambda: next(seconds) * 10**9)
        return len(pair.session_pairs)

    assert n_pairs(1e-5, 60.5) == 61  # the clock gains a second a pair
    assert n_pairs(0.5, 60.5) == 5
    fair = n_pairs(0.015, 60.5)
    assert 5 < fair < 61
    assert n_pairs(0.015) == 5  # no limit of its own: the time is the limit


@pytest.mark.parametrize("took_ns", [0, -5])
def test_a_clock_that_runs_backwards_is_found(took_ns: int) -> None:
    with pytest.raises(RunnerError, match=f"took {took_ns} ns"):
        time_pair(lambda: lambda: took_ns, lambda: lambda: 7, 0, 0.1, 1.0, 2, 9, 0, 1.0, lambda: 0)


@pytest.mark.parametrize("times", [(), (1.0, 0.0), (1.0, -2.0), (float("nan"),), (float("inf"),)])
def test_times_that_are_none_are_refused(times: tuple[float, ...]) -> None:
    with pytest.raises(UnstableClockError, match="above 0 ms"):
        compare(lambda _seed: SessionPair((1.0,) * 5, times), EFFORT)


def test_times_that_spread_make_a_pair_doubtful() -> None:
    steady = SessionPair((1.0, 1.01, 1.02, 1.03) * 5, (2.0,) * 20)
    wild = SessionPair((1.0, 1.2, 1.4, 1.6) * 5, (2.0,) * 20)
    assert unsteady([steady] * 3) == ()
    (condition,) = unsteady([wild, wild, steady])
    assert "the original's times" in condition
    assert f"more than {MAX_SPREAD:.0%}" in condition
    assert not compare(lambda _seed: wild, EFFORT).is_valid


def test_an_interval_that_stays_wide_makes_a_pair_doubtful() -> None:
    """Every session is steady, but no two are alike: no times spread, and nothing is known."""
    sessions = iter((2.0, 3.0, 1.5, 2.8, 1.7, 2.4) * 20)

    def pair_of(_seed: int) -> SessionPair:
        return SessionPair((next(sessions),) * 5, (1.0,) * 5)

    wide = compare(pair_of, replace(TRIAL, max_pairs=12))
    assert [c.partition(":")[0] for c in wide.conditions] == ["unsure"]
    assert wide.reached == wide.ci95[0] < wide.ratio
    steady = compare(lambda _seed: SessionPair((2.0,) * 5, (1.0,) * 5), TRIAL)
    assert steady.conditions == ()
    assert steady.reached == steady.ratio


def test_times_of_sessions_that_ran_by_themselves_are_not_paired() -> None:
    """As trtexec gives them: medians count, and the two need not be equally many."""
    pair = SessionPair((4.0, 4.0, 9.0), (2.0, 2.0), interleaved=False)
    assert paired_ratio([pair, pair])[0] == pytest.approx(2.0)


def a_pair(ratio: float, low: float) -> PairedLatency:
    return PairedLatency(ratio, (low, 2 * ratio - low), Latency(1, 1, 9), Latency(1, 1, 9), ())


def test_a_win_is_beyond_doubt_and_beyond_what_the_original_reaches_against_itself() -> None:
    assert is_win(a_pair(1.05, 1.01))
    assert not is_win(a_pair(1.05, 1.0))
    assert not is_win(a_pair(0.9, 0.8))
    assert is_win(a_pair(1.05, 1.01), noise_floor=a_pair(1.02, 0.9))
    assert not is_win(a_pair(1.05, 1.01), noise_floor=a_pair(1.06, 0.9))
    assert not is_win(a_pair(1.05, 1.01), noise_floor=a_pair(0.94, 0.9))


def test_what_a_device_says_of_itself_makes_a_pair_doubtful() -> None:
    state = {"clocks": {"gpu": 900}, "governor": "performance", "throttled": "throttled=0x0"}
    assert state_changes(state, state) == ()
    assert state_changes({}, {}) == ()
    slower = state | {"clocks": {"gpu": 600}}
    (condition,) = state_changes(state, slower)
    assert "gpu -33%" in condition
    on_demand = state | {"governor": "schedutil"}  # moves them on purpose
    assert state_changes(on_demand, slower | {"governor": "schedutil"}) == ()
    assert state_changes(state, state | {"clocks": {"gpu": 890}}) == ()
    (condition,) = state_changes(state, state | {"throttled": "throttled=0x50005"})
    assert "0x50005" in condition
    (condition,) = state_changes(state, state | {"power_mode": "5W"})
    assert "power mode" in condition


def test_one_disturbed_round_does_not_move_the_ratio() -> None:
    pairs = [SessionPair((2.0,) * 20 + (200.0,), (1.0,) * 21)] * 4
    ratio, (low, high) = paired_ratio(pairs)
    assert (ratio, low, high) == pytest.approx((2, 2, 2))


@pytest.mark.parametrize("n_pairs", [4, 12])
@pytest.mark.parametrize("between", [0.005, 0.02])
def test_interval_covers_the_truth_as_often_as_it_says(n_pairs: int, between: float) -> None:
    """Sessions differ by `between` beyond their rounds, which differ by 3 %."""
    n_cases = 600
    generator = np.random.default_rng(0)
    n_covered = 0
    for _ in range(n_cases):
        pairs = []
        for _ in range(n_pairs):
            level = np.exp(generator.normal(0, between))
            original = 2.0 * level * np.exp(generator.normal(0, 0.03, 40))
            candidate = np.exp(generator.normal(0, 0.03, 40))
            pairs.append(SessionPair(tuple(original), tuple(candidate)))
        low, high = paired_ratio(pairs)[1]
        n_covered += low <= 2.0 <= high
    assert 0.92 <= n_covered / n_cases <= 0.98  # 0.95 +- 3.4 standard errors of 600 cases


@pytest.mark.parametrize(
    ("effort", "budget_s"), [(TRIAL, 0.0), (TRIAL, 1e9), (FINAL, 1e9)],
    ids=["trial, fairly sure", "trial", "final"],
)  # fmt: skip
@pytest.mark.parametrize("between", [0.002, 0.02])
def test_stopping_when_it_is_sure_costs_little_of_that_surety(
    effort: Effort, between: float, budget_s: float
) -> None:
    """Looking after each pair lets luck end a comparison early; how much is counted here."""
    cases = [
        compare(noisy(between, seed, within=0.03), replace(effort, budget_s=budget_s, limit_s=1e9))
        for seed in range(200 if effort is TRIAL else 80)
    ]
    covered = np.mean([case.ci95[0] <= 1 <= case.ci95[1] for case in cases])
    assert abs(covered - 0.94) <= 3 * np.sqrt(0.94 * 0.06 / len(cases))
    assert np.mean([is_win(case) for case in cases]) <= 0.08


def test_summary_has_the_textbook_values() -> None:
    times = summary([float(i) for i in range(1, 12)])
    assert (times.median_ms, times.p90_ms, times.n) == (6.0, 10.0, 11)


class BusyMachine:
    """A machine on which other work takes the core away, by a plan; its clocks are exact."""

    def __init__(
        self,
        taken_ms: Callable[[int], float],
        *,
        has_thread_clock: bool = True,
        is_counted: bool = True,
        in_thread: float = 1.0,
    ) -> None:
        """`is_counted`: as context switches; `in_thread`: share of the work."""
        self.wall_ns = self.thread_ns = self.other_ns = self.n_runs = self.n_switches = 0
        self.taken_ms, self.has_thread_clock = taken_ms, has_thread_clock
        self.is_counted, self.in_thread = is_counted, in_thread

    def cpu_ns(self) -> int:
        return self.thread_ns if self.has_thread_clock else 0

    def others_ns(self) -> int:
        return self.other_ns

    def n_interruptions(self) -> int | None:
        return self.n_switches

    def open(self, milliseconds: float) -> Callable[[], Callable[[], int]]:
        def run() -> int:
            self.n_runs += 1
            taken = self.taken_ms(self.n_runs)
            self.n_switches += taken > 0 and self.is_counted
            self.thread_ns += round(self.in_thread * milliseconds * MS)
            self.other_ns += round((1 - self.in_thread) * milliseconds * MS)
            took_ns = round((milliseconds + taken) * MS)
            self.wall_ns += took_ns
            return took_ns

        return lambda: run

    def compared(self, original_ms: float, candidate_ms: float) -> PairedLatency:
        def timed(seed: int) -> SessionPair:
            original, candidate = time_pair(
                self.open(original_ms), self.open(candidate_ms), seed, 0.1, 10.0, 5, 200, 2, 1.0,
                lambda: self.wall_ns, self,
            )  # fmt: skip
            return as_pair(original, candidate)

        return compare(timed, EFFORT, clock_ns=lambda: self.wall_ns)


def as_pair(original: Samples, candidate: Samples) -> SessionPair:
    return SessionPair(
        tuple(original.ms), tuple(candidate.ms), True, tuple(original.cpu_ms),
        tuple(candidate.cpu_ms), tuple(original.interruptions), tuple(candidate.interruptions),
    )  # fmt: skip


def at_random(share: float, at_most_ms: float = 50.0) -> Callable[[int], float]:
    generator = np.random.default_rng(0)
    return lambda _run: float(generator.random() < share) * generator.uniform(1, at_most_ms)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_where_runs_are_interrupted_the_threads_own_clock_decides(share: float) -> None:
    pair = BusyMachine(at_random(share)).compared(6.0, 4.0)
    assert pair.clock is Clock.THREAD_CPU
    assert pair.interrupted == pytest.approx(share, abs=0.1)
    assert pair.ratio == pytest.approx(1.5)
    assert pair.original.median_ms == pytest.approx(6.0)
    assert pair.is_valid


def test_a_busy_machine_gets_as_many_rounds_as_a_quiet_one() -> None:
    quiet, busy = (BusyMachine(at_random(share)).compared(6.0, 4.0) for share in (0.0, 1.0))
    assert quiet.clock is Clock.WALL
    assert quiet.interrupted == 0
    assert busy.original.n == quiet.original.n


def test_rare_interruptions_leave_the_walls_clock() -> None:
    pair = BusyMachine(at_random(0.02)).compared(6.0, 4.0)
    assert pair.clock is Clock.WALL
    assert pair.ratio == pytest.approx(1.5)


def test_without_a_threads_clock_interrupted_rounds_are_taken_again() -> None:
    machine = BusyMachine(at_random(0.3, 2.0), has_thread_clock=False)
    pair = machine.compared(6.0, 4.0)
    assert pair.clock is Clock.WALL
    assert pair.ratio == pytest.approx(1.5)  # of the others
    assert pair.is_valid
    quiet = BusyMachine(at_random(0.0), has_thread_clock=False).compared(6.0, 4.0)
    assert pair.original.n == quiet.original.n
    assert sum(len(p.original_ms) for p in pair.session_pairs) > pair.original.n


def test_without_a_threads_clock_a_machine_that_is_always_busy_is_doubtful() -> None:
    pair = BusyMachine(at_random(1.0), has_thread_clock=False).compared(6.0, 4.0)
    assert pair.clock is Clock.WALL
    assert any("took the processor in 100% of the runs" in each for each in pair.conditions)


INTERRUPTED = (1, 0, 0, 1)


@pytest.mark.parametrize(
    ("wall", "cpu", "is_one"),
    [
        ((9.0, 2.0, 2.0, 7.0), (2.0, 2.0, 2.0, 2.0), True),
        ((9.0, 2.0, 2.0, 7.0), (), False),  # none
        ((9.0, 2.0, 2.0, 7.0), (2.0, 2.0, 2.0), False),  # of other runs
        ((9.0, 2.0, 2.0, 7.0), (0.0, 0.0, 10.0, 0.0), False),  # in steps of 10 ms
        ((2.0, 2.0, 2.0, 2.0), (3.0, 3.0, 3.0, 3.0), False),  # counts more than there was
        ((2.0, 2.0, 2.0, 2.0), (2.0, -2.0, 2.0, 2.0), False),  # jumps
        ((2.0, 2.0, 2.0, 2.0), (2.0, float("nan"), 2.0, 2.0), False),
    ],
)
def test_which_clocks_of_a_thread_are_believed(
    wall: tuple[float, ...], cpu: tuple[float, ...], is_one: bool
) -> None:
    pair = SessionPair(wall, wall, True, cpu, cpu, INTERRUPTED, INTERRUPTED)
    assert has_thread_clock(pair) is is_one
    assert decided_by([pair]) == (Clock.THREAD_CPU if is_one else Clock.WALL, 0.5)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_process_that_is_stopped_is_timed_by_its_threads_clock(share: float) -> None:
    """By SIGSTOP, a frozen container, or memory that has to come back: no switch is counted."""
    pair = BusyMachine(at_random(share), is_counted=False).compared(6.0, 4.0)
    assert pair.clock is Clock.THREAD_CPU
    assert pair.interrupted == pytest.approx(share, abs=0.1)
    assert pair.ratio == pytest.approx(1.5)
    assert pair.is_valid


def test_a_threads_clock_that_misses_what_others_did_is_left_out() -> None:
    quiet = BusyMachine(at_random(0.0), in_thread=0.5).compared(6.0, 4.0)
    assert (quiet.clock, quiet.interrupted) == (Clock.WALL, 0)
    assert quiet.session_pairs[0].original_cpu_ms == ()
    busy = BusyMachine(at_random(1.0), in_thread=0.5).compared(6.0, 4.0)
    assert busy.clock is Clock.WALL
    assert not busy.is_valid


def test_a_system_that_counts_nothing_is_taken_at_its_walls_clock() -> None:
    assert decided_by([SessionPair((1.0, 2.0), (1.0, 2.0))]) == (Clock.WALL, None)


def test_a_host_that_takes_time_from_a_virtual_machine_is_told() -> None:
    before = {"busy_ticks": 100, "stolen_ticks": 7}
    assert not state_changes(before, {"busy_ticks": 300, "stolen_ticks": 9})
    (told,) = state_changes(before, {"busy_ticks": 300, "stolen_ticks": 57})
    assert "took 25% of its time" in told


def test_the_meter_reads_this_threads_clock_and_its_interruptions() -> None:
    meter = runner.Meter(one_thread=True)
    if not meter.has_thread_clock:
        pytest.skip("this system has no clock of a thread")
    before, began = meter.cpu_ns(), runner.clock_ns()
    while runner.clock_ns() - began < 20 * MS:
        pass
    spent = meter.cpu_ns() - before
    assert 0 < spent <= runner.clock_ns() - began + MS
    slept = meter.cpu_ns()
    time.sleep(0.05)
    assert meter.cpu_ns() - slept < 20 * MS
    assert runner.Meter(one_thread=False).cpu_ns() == 0


def test_the_meter_tells_what_other_threads_did() -> None:
    meter = runner.Meter(one_thread=True)
    if not meter.has_thread_clock:
        pytest.skip("this system has no clock of a thread")
    before = meter.others_ns()
    sum(range(10**6))  # this thread's own work is none of theirs
    alone = meter.others_ns() - before
    worker = threading.Thread(target=lambda: sum(range(10**7)))
    worker.start()
    worker.join()
    together = meter.others_ns() - before
    assert alone < 20 * MS < together


def test_a_busy_machine_changes_no_ratio(tmp_path: Path) -> None:
    """Real processes, a real runner without precedence: an upper bound that no luck breaks."""
    example = torch.zeros(1, 3, 24, 24)
    files = [
        export_onnx(nn.Sequential(*body).eval(), example, tmp_path / f"{len(body)}.onnx")
        for body in ([nn.Conv2d(3, 3, 3)], [nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3)])
    ]
    target = load_target("host-cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(runner.PRECEDENCE_VARIABLE, "0")
        with open_device(target) as device, busy_sessions(4 * (os.cpu_count() or 1)):
            pair = device.compare(files[1], files[1], effort=TRIAL)
    assert pair.interrupted is not None
    assert pair.ratio == pytest.approx(1.0, abs=0.25)  # by the wall it is anything up to 3
