"""What measuring finalists and finished files teaches, and whether the search goes on with it."""

import statistics
from collections.abc import Sequence

from compressor.finalists import Finalists, accuracy_of, speed_of
from compressor.search.objective import TIME, Correction, feasible_first, is_hopeless
from compressor.trials import Searched
from compressor.values import PairedLatency, Result, Trial, Verdict

MAX_CORRECTIONS = 2  # times that a search goes on
FAR_FASTER = 1.08  # than asked; 8 % of the time buys accuracy


def taught_by_finalists(searched: Searched, finalists: Finalists) -> Correction | None:
    """What measuring again says against the search; None where the search need not go on.

    It goes on where no plan met the limit on time any more, and where all are far faster than
    asked although accuracy was paid for it.
    """
    known = {trial.number: trial for trial in searched.trials}
    if not goes_on(searched) or not finalists.again:
        return None
    ratios = [finalists.again[number].ratio for number in finalists.again]
    if finalists.is_met and not _is_far_faster(searched, ratios):
        return None
    moved = statistics.median(
        latency.ratio / speed_of(known[number]) for number, latency in finalists.again.items()
    )
    again = {number: _as_measured(latency) for number, latency in finalists.again.items()}
    return Correction(len(searched.study.trials), moved, again)


def taught_by_files(
    searched: Searched, shipped: Trial | None, speedup: PairedLatency
) -> Correction | None:
    """What measuring the finished files says against the search, as `taught_by_finalists` does.

    Args:
        searched: The search.
        shipped: The trial whose plan the files are of.
        speedup: Of the files.
    """
    if not goes_on(searched) or shipped is None:
        return None
    is_met = speedup.ratio >= 1 / searched.problem.objective.limits[TIME]
    if is_met and not _is_far_faster(searched, [speedup.ratio]):
        return None
    moved = speedup.ratio / speed_of(shipped)
    again = {shipped.number: _as_measured(speedup)}
    return Correction(len(searched.study.trials), moved, again, is_by_files=True)


def goes_on(searched: Searched) -> bool:
    """Whether a search may go on after it ended: for the most accurate plan within a time."""
    objective = searched.problem.objective
    is_asked = TIME in objective.limits and not objective.front
    is_plain = objective.weights is None and objective.min_accuracy is None
    is_left = len(searched.study.corrections) < MAX_CORRECTIONS
    return is_asked and is_plain and is_left and not is_hopeless(searched.problem)


def _is_far_faster(searched: Searched, ratios: Sequence[float]) -> bool:
    """Whether the slowest is far faster than asked, and the search has paid accuracy for it."""
    wanted = 1 / searched.problem.objective.limits[TIME]
    if min(ratios) < FAR_FASTER * wanted:
        return False
    original = searched.problem.original_accuracy
    best = feasible_first(searched.trials, searched.problem)
    return not best or accuracy_of(best[0]).value < original.value - original.standard_error


def _as_measured(pair: PairedLatency) -> tuple[float, float, float]:
    return pair.ratio, *pair.ci95


def worth(result: Result) -> tuple[float, ...]:
    """Larger is better: limits that are met, then accuracy on the search split, then speed.

    The test split has no say.
    """
    training = result.training
    learned = training["search_accuracy"] if training and "steps" in training else 0.0
    is_met = result.verdict is Verdict.MET
    is_usable = result.compressed is not None
    return float(is_usable), float(is_met), learned if is_met else 0.0, result.speedup.ratio
