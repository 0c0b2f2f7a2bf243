"""The statistics of a comparison, under a fake clock and with known answers."""

from collections.abc import Callable

import numpy as np
import pytest

from compressor.latency.timing import Effort, RunOnce, compare, paired_ratio, summary
from compressor.values import SessionPair

MS = 1_000_000


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

    def session(self, name: str, milliseconds: float) -> Callable[[], RunOnce]:
        def open_session() -> RunOnce:
            self.n_sessions[name] += 1

            def run() -> None:
                self.n_runs += 1
                self.order.append(name)
                self.now_ns += round(milliseconds * MS * self.slow_down(self.n_runs))

            return run

        return open_session


EFFORT = Effort(n_session_pairs=3, pair_seconds=0.3, min_rounds=5, n_warmup=2)


def test_known_speeds_give_the_known_ratio() -> None:
    machine = FakeMachine()
    pair = compare(
        machine.session("original", 6.0), machine.session("candidate", 2.0), EFFORT,
        clock_ns=machine.clock_ns,
    )  # fmt: skip
    assert pair.ratio == pytest.approx(3.0)
    assert pair.ci95 == pytest.approx((3.0, 3.0))
    assert pair.original.median_ms == 6.0
    assert pair.candidate.p90_ms == 2.0
    assert (
        pair.original.n == pair.candidate.n == sum(len(p.original_ms) for p in pair.session_pairs)
    )
    assert machine.n_sessions == {"original": 3, "candidate": 3}
    assert len(pair.session_pairs[0].original_ms) == 38  # 0.3 s of rounds of 8 ms


def test_slow_models_still_get_the_least_number_of_rounds() -> None:
    machine = FakeMachine()
    pair = compare(
        machine.session("original", 900.0), machine.session("candidate", 500.0), EFFORT,
        clock_ns=machine.clock_ns,
    )  # fmt: skip
    assert [len(p.original_ms) for p in pair.session_pairs] == [5, 5, 5]


def test_quick_models_get_no_more_rounds_than_help() -> None:
    machine = FakeMachine()
    pair = compare(
        machine.session("original", 0.002),
        machine.session("candidate", 0.001),
        EFFORT,
        clock_ns=machine.clock_ns,
    )
    assert [len(p.original_ms) for p in pair.session_pairs] == [EFFORT.max_rounds] * 3


def test_warm_up_is_not_timed() -> None:
    """The first runs of each session take ten times as long; none of them is kept."""
    machine = FakeMachine()

    def cold(name: str, milliseconds: float) -> Callable[[], RunOnce]:
        def open_session() -> RunOnce:
            n_runs = 0

            def run() -> None:
                nonlocal n_runs
                n_runs += 1
                machine.now_ns += round(milliseconds * MS * (10 if n_runs <= 2 else 1))

            return run

        return open_session

    pair = compare(
        cold("original", 4.0), cold("candidate", 1.0), EFFORT, clock_ns=machine.clock_ns
    )
    assert max(pair.session_pairs[0].original_ms) == 4.0
    assert pair.ratio == pytest.approx(4.0)


def test_drift_cancels_and_both_run_in_every_round_in_random_order() -> None:
    """A machine that gets steadily slower: block timing would blame whoever ran last."""
    machine = FakeMachine(slow_down=lambda run: 1 + run / 50)
    pair = compare(
        machine.session("original", 3.0), machine.session("candidate", 3.0), EFFORT,
        clock_ns=machine.clock_ns,
    )  # fmt: skip
    assert pair.ratio == pytest.approx(1.0, abs=0.01)
    rounds = np.array(machine.order[4:]).reshape(-1, 2)  # after the first warm-up
    assert all(set(pair_of_runs) == {"original", "candidate"} for pair_of_runs in rounds[:30])
    assert {tuple(r) for r in rounds[:30]} == {
        ("original", "candidate"), ("candidate", "original"),
    }  # fmt: skip


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


def test_summary_has_the_textbook_values() -> None:
    times = summary([float(i) for i in range(1, 12)])
    assert (times.median_ms, times.p90_ms, times.n) == (6.0, 10.0, 11)
