"""Two models timed in the same rounds, and how sure their ratio is.

Timing one model and then the other says more about the machine than about the models: a model
against itself came out up to 44 % apart. Here both run in every round, in random order, and only
the ratio inside a round counts (`runner.time_pair`). A session also keeps its own memory layout
for life, which made A/A comparisons of one session pair exclude 1.0 in 3 of 6 cases; so pairs of
sessions are opened afresh several times, and the interval is over pairs.

The clock on the wall also counts the time that other work had the core. Where one thread does the
work, its own CPU time does not, and where more than `MAX_INTERRUPTED` of the runs were
interrupted, that clock decides. With twelve busy processes beside a runner without precedence,
each in a session of its own, single session pairs by the wall scattered by 13 to 112 % (standard
deviation, models of 1 to 10 ms), by CPU time by 4 to 5 %. What is left is not the clock's: caches
are cold after an interruption, and neighbours share them. The least time of all runs, and the runs
that nobody interrupted, were tried in place of the median: both scatter more, because slow
machines leave few of such runs. Where there is no such clock (several threads, a GPU), interrupted
rounds are taken again, and where there are not enough others, the figure is called doubtful.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from compressor.errors import UnstableClockError
from compressor.values import MAX_UNSURE, Clock, Latency, PairedLatency, SessionPair

FloatArray = npt.NDArray[np.float64]
TimePair = Callable[[int], SessionPair]  # from a seed for the order inside rounds

MAX_SPREAD = (
    0.10  # interquartile range / median of a steady machine; torch's own benchmark warns there
)
MAX_CLOCK_SHIFT = 0.05
MAX_STOLEN = 0.05  # of a virtual machine's busy time, taken by its host
MAX_INTERRUPTED = 0.05  # of the runs; by medians of the wall's times, so few do no harm
MAX_CPU_SHARE = 1.1  # of the wall's time, that a thread has a core
COARSE_MS = 0.05  # by which two sound clocks may differ
MIN_CLEAN = 4  # rounds that nothing interrupted, from which a pair is judged by these alone
LOCKING_GOVERNORS = ("performance", "userspace")  # the others move clocks on purpose


@dataclass(frozen=True)
class Effort:
    """How long a comparison may take, and how sure it has to be.

    Attributes:
        min_pairs: Fresh pairs of sessions at least; 3 or more, or the interval says little.
        max_pairs: Fresh pairs of sessions at most.
        budget_s: After this long, `fair_half_width` is sure enough.
        limit_s: No new pair is begun after this long, however unsure; None for `budget_s`.
        half_width: It ends as soon as the 95 % interval reaches this far to each side of the
            ratio, as a share of it.
        fair_half_width: The same after `budget_s`; a machine in use gets there later.
        pair_s: Time of the rounds of one pair, warm-up apart; CPU time where one thread works.
        pair_limit_s: Time of a pair by the clock on the wall, but for `min_rounds`.
        min_rounds: At least this many rounds a pair, however slow the models.
        max_rounds: At most this many, however quick; sessions differ more than rounds do.
        n_warmup: Untimed runs of each session.
        warmup_s: They end after this long, too; slow models need fewer.
    """

    min_pairs: int
    max_pairs: int
    budget_s: float
    limit_s: float | None = None
    half_width: float = 0.01
    fair_half_width: float = 0.015
    pair_s: float = 0.2
    pair_limit_s: float = 1.0
    min_rounds: int = 5
    max_rounds: int = 200
    n_warmup: int = 8
    warmup_s: float = 0.04


# Ranks a plan.
TRIAL = Effort(min_pairs=5, max_pairs=24, budget_s=0.8, limit_s=4.0, pair_s=0.1, min_rounds=7)
# What is reported.
FINAL = Effort(
    min_pairs=8, max_pairs=80, budget_s=10.0, limit_s=30.0, half_width=0.005, fair_half_width=0.01
)
# Chooses among plans that trials have ranked.
FINALIST = replace(FINAL, budget_s=4.0, limit_s=15.0)


def compare(
    time_pair: TimePair,
    effort: Effort,
    *,
    seed: int = 0,
    clock_ns: Callable[[], int] = perf_counter_ns,
) -> PairedLatency:
    """Times of both models and original / candidate with its 95 % interval.

    Args:
        time_pair: Opens both models afresh, times them, and returns every time taken.
        effort: When to stop.
        seed: Decides the order inside rounds.
        clock_ns: A monotonic clock in nanoseconds; tests pass a fake one.

    Raises:
        MeasurementError: What `time_pair` raises.
        UnstableClockError: A time is no positive number.
    """
    order = random.Random(seed)
    pairs: list[SessionPair] = []
    started = clock_ns()
    while True:
        pairs.append(checked(time_pair(order.randrange(2**31))))
        spent_s = (clock_ns() - started) / 1e9
        is_late = spent_s >= (effort.limit_s or effort.budget_s)
        if len(pairs) < (2 if is_late else effort.min_pairs):
            continue
        clock, interrupted = decided_by(pairs)
        ratio, (low, high) = paired_ratio(pairs, clock)
        wanted = effort.half_width if spent_s < effort.budget_s else effort.fair_half_width
        is_sure = max(high / ratio, ratio / low) - 1 <= wanted
        if is_sure or is_late or len(pairs) >= effort.max_pairs:
            break
    found = PairedLatency(
        ratio=ratio,
        ci95=(low, high),
        original=summary([ms for pair in pairs for ms in counted(pair, clock)[0]]),
        candidate=summary([ms for pair in pairs for ms in counted(pair, clock)[1]]),
        session_pairs=tuple(pairs),
        conditions=(*unsteady(pairs, clock), *disturbed(pairs, clock)),
        clock=clock,
        interrupted=interrupted,
    )
    return with_conditions(found, unsure(found))


def decided_by(pairs: Sequence[SessionPair]) -> tuple[Clock, float | None]:
    """The clock that ratios come from, and the share of the runs that were interrupted."""
    counts = [n for p in pairs for n in (*p.original_interruptions, *p.candidate_interruptions)]
    interrupted = float(np.mean(np.array(counts) > 0)) if counts else None
    is_busy = interrupted is not None and interrupted > MAX_INTERRUPTED
    if is_busy and all(has_thread_clock(pair) for pair in pairs):
        return Clock.THREAD_CPU, interrupted
    return Clock.WALL, interrupted


def has_thread_clock(pair: SessionPair) -> bool:
    """Whether the thread's own times can stand for those of the wall.

    They cannot where they are too coarse, larger than the wall's, or missing: the runner leaves
    them out where other threads did part of the work.
    """
    for wall, cpu in (
        (pair.original_ms, pair.original_cpu_ms),
        (pair.candidate_ms, pair.candidate_cpu_ms),
    ):
        if len(cpu) != len(wall) or not all(ms > 0 for ms in cpu):
            return False
        wall_ms, cpu_ms = np.array(wall), np.array(cpu)
        if np.median(cpu_ms - MAX_CPU_SHARE * wall_ms) > COARSE_MS:
            return False
    return True


def disturbed(pairs: Sequence[SessionPair], clock: Clock) -> tuple[str, ...]:
    """What other work did to the times, where no clock takes that out of them."""
    _, interrupted = decided_by(pairs)
    if clock is Clock.THREAD_CPU or interrupted is None or interrupted <= MAX_INTERRUPTED:
        return ()
    n_clean = min(int(_clean(pair).sum()) for pair in pairs)
    if n_clean >= MIN_CLEAN and all(pair.interleaved for pair in pairs):
        return ()  # the rounds that nobody interrupted are enough
    return (
        f"interrupted: other work took the processor in {interrupted:.0%} of the runs, and there "
        f"is no clock here that leaves it out; stop other work on the device, or take one thread",
    )


def counted(pair: SessionPair, clock: Clock) -> tuple[FloatArray, FloatArray]:
    """The times of both models that count, in milliseconds.

    By the wall, those of rounds that nothing interrupted, where there are `MIN_CLEAN` of them.
    """
    original, candidate = (np.array(times) for times in pair.by(clock))
    clean = _clean(pair)
    if clock is Clock.WALL and pair.interleaved and clean.sum() >= MIN_CLEAN:
        return original[clean], candidate[clean]
    return original, candidate


def _clean(pair: SessionPair) -> npt.NDArray[np.bool_]:
    """`(n_rounds,)` whether nothing interrupted the round, as far as anybody knows."""
    clean = np.ones(min(len(pair.original_ms), len(pair.candidate_ms)), dtype=np.bool_)
    for counts in (pair.original_interruptions, pair.candidate_interruptions):
        if len(counts) == len(clean):
            clean &= np.array(counts) == 0
    return clean


def checked(pair: SessionPair) -> SessionPair:
    """`pair`, whose times are positive numbers.

    Raises:
        UnstableClockError: One is not, or there are none.
    """
    for times in (pair.original_ms, pair.candidate_ms):
        if not times or not all(np.isfinite(ms) and ms > 0 for ms in times):
            bad = next((ms for ms in times if not (np.isfinite(ms) and ms > 0)), None)
            raise UnstableClockError(
                f"Expected times above 0 ms, got {bad}; the device's clock cannot be trusted."
            )
    return pair


def summary(times_ms: Sequence[float]) -> Latency:
    """Median, 90th percentile and count of `times_ms`."""
    return Latency(
        median_ms=float(np.median(times_ms)),
        p90_ms=float(np.percentile(times_ms, 90)),
        n=len(times_ms),
    )


def paired_ratio(
    pairs: Sequence[SessionPair], clock: Clock = Clock.WALL
) -> tuple[float, tuple[float, float]]:
    """(ratio, its 95 % interval): geometric mean over pairs of sessions.

    The ratio of one pair is the median over its rounds. The interval is Student's t over the
    pairs' logarithms: it holds what rounds and sessions each add. A percentile bootstrap, which
    one would take first, covered the truth in 85 % of simulated cases with 4 pairs that differ by
    2 %, and t in 95 % (`tests/unit/test_timing.py` counts).

    Args:
        pairs: At least 2; one says nothing of how sessions differ.
        clock: That the times are taken by.

    Example:
        >>> fast = SessionPair((4.0, 6.0, 2.0), (2.0, 3.0, 1.0))
        >>> ratio, (low, high) = paired_ratio([fast, fast])
        >>> round(ratio, 6), round(low, 6), round(high, 6)
        (2.0, 2.0, 2.0)
    """
    logs = np.array([_log_ratio(pair, clock) for pair in pairs])
    mean, error = logs.mean(), logs.std(ddof=1) / np.sqrt(len(logs))
    half = stats.t.ppf(0.975, df=len(logs) - 1) * error
    return float(np.exp(mean)), (float(np.exp(mean - half)), float(np.exp(mean + half)))


def unsteady(pairs: Sequence[SessionPair], clock: Clock = Clock.WALL) -> tuple[str, ...]:
    """What the times themselves say against the machine."""
    found = []
    for side, name in enumerate(("original", "candidate")):
        spreads = []
        for pair in pairs:
            low, middle, high = np.percentile(counted(pair, clock)[side], (25, 50, 75))
            spreads.append((high - low) / middle)
        spread = float(np.median(spreads))
        if spread > MAX_SPREAD:
            found.append(
                f"unstable: the middle half of the {name}'s times spreads over {spread:.0%} of "
                f"their median (more than {MAX_SPREAD:.0%}); stop other work on the device, lock "
                f"its clocks"
            )
    return tuple(found)


def unsure(pair: PairedLatency) -> tuple[str, ...]:
    """What the interval says against the ratio."""
    if pair.half_width <= MAX_UNSURE:
        return ()
    return (
        f"unsure: the 95 % interval reaches {pair.half_width:.1%} from the ratio (more than "
        f"{MAX_UNSURE:.0%}) after {len(pair.session_pairs)} pairs of sessions; stop other work on "
        f"the device, and measure again",
    )


def with_conditions(pair: PairedLatency, conditions: Sequence[str]) -> PairedLatency:
    """`pair` with what else makes it doubtful."""
    return replace(pair, conditions=(*pair.conditions, *conditions))


def state_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """In words, what a device's state before and after says against the times between.

    Args:
        before: What `runner.state` said: clocks, governor, power mode, throttling.
        after: The same, later.
    """
    found = []
    for when, state in (("before", before), ("after", after)):
        throttled = str(state.get("throttled", "")).partition("=")[2]
        if throttled not in ("", "0x0"):
            found.append(
                f"throttled: the board reports {throttled} {when} measuring (too hot, or too "
                f"little voltage); cool it, or take another power supply"
            )
            break
    old, new = before.get("clocks") or {}, after.get("clocks") or {}
    moved = {name: new[name] / old[name] - 1 for name in old.keys() & new.keys() if old[name] > 0}
    far = {name: share for name, share in sorted(moved.items()) if abs(share) > MAX_CLOCK_SHIFT}
    fixed = before.get("governor") in LOCKING_GOVERNORS
    if far and fixed:
        shifts = ", ".join(f"{name} {share:+.0%}" for name, share in far.items())
        found.append(f"unstable clocks: {shifts} while measuring; lock them")
    stolen, busy = (
        after.get(key, 0) - before.get(key, 0) for key in ("stolen_ticks", "busy_ticks")
    )
    if busy > 0 and stolen / busy > MAX_STOLEN:
        found.append(
            f"the host of this virtual machine took {stolen / busy:.0%} of its time while "
            f"measuring; measure on a machine of your own, or when the host is less busy"
        )
    if before.get("power_mode") != after.get("power_mode"):
        found.append("the power mode was changed while measuring; measure again")
    return tuple(found)


def is_win(pair: PairedLatency, noise_floor: PairedLatency | None = None) -> bool:
    """Whether the candidate is faster beyond doubt.

    A win whose interval holds 1 is no win, and neither is one that the original reaches against
    itself.

    Args:
        pair: Original and candidate.
        noise_floor: The original against itself.
    """
    floor = max(noise_floor.ratio, 1 / noise_floor.ratio) if noise_floor else 1.0
    return pair.ci95[0] > 1 and pair.ratio > floor


def _log_ratio(pair: SessionPair, clock: Clock) -> float:
    original, candidate = (np.log(times) for times in counted(pair, clock))
    if pair.interleaved:
        return float(np.median(original - candidate))
    return float(np.median(original) - np.median(candidate))
