"""Why time followed the multiply-accumulates, or did not: a result's layers, read out in words."""

from collections.abc import Sequence

from compressor.tasks import AGREEMENT, CLASSIFICATION
from compressor.values import Basis, LayerRow, Result, Verdict

FOLLOWS = 1.15  # time falls with MACs where its share is at most so many times theirs
MUCH = 0.15  # share of the compressed network's time that is worth a sentence
A_LITTLE = 0.03  # that none of would be expected
CAST = "Cast"  # the operation, in ONNX and in the names of inserted ones
SLOWED = 0.75  # of its MACs a second, below which a layer got less efficient
SMALL_MS = 0.01  # layers this quick are mostly the runtime's own work between them
N_NAMED = 3
NO_LABELS = (
    "no label was used: accuracy is the share of images to which the compressed network answers "
    "the class that the original answers, which has 100 % by definition"
)


def is_agreement(result: Result) -> bool:
    """Whether accuracy is agreement with the original's answers."""
    return result.search.get("task") == AGREEMENT.name


def measure(result: Result) -> str:
    """What plans are ranked by: "accuracy", "agreement", or "mAP kept" of a task's metric."""
    name = str(result.search.get("task") or CLASSIFICATION.name)
    return name if result.original.metric is None else f"{name} kept"


def percent(result: Result) -> str:
    """The measure, for the axis of a figure."""
    return f"{'agreement with the original' if is_agreement(result) else measure(result)}, %"


def verdict_in_words(result: Result) -> str:
    """One sentence for somebody who reads no further."""
    low, high = result.speedup.ci95
    limits = " and ".join(map(str, result.constraints)) or "the wish"
    if result.compressed is None:
        return (
            f"No network is handed back: none was measured to be faster than the original on "
            f"{result.target}."
        )
    drop = result.accuracy_drop_points or 0.0
    what = "loses" if drop > 0 else "gains"
    change = f"{what} {abs(drop):.2f} points of accuracy" if drop else "keeps its accuracy"
    if is_agreement(result):
        change = f"answers as it does to {result.compressed.accuracy:.2%} of the test images"
    elif result.original.metric is not None:
        change = f"keeps {result.compressed.accuracy:.2%} of its {result.search.get('task')}"
    measured = "by the profile's figures, not measured," if result.basis is Basis.ESTIMATE else ""
    meets = "meets" if result.verdict is Verdict.MET else "misses"
    return (
        f"On {result.target} the compressed network is {measured} {result.speedup.ratio:.2f} "
        f"times as fast as the original (95 % interval {low:.2f} to {high:.2f}), {change} and "
        f"{meets} {limits}."
    ).replace("  ", " ")


def why(result: Result, step: int | None = None) -> list[str]:
    """Sentences on what became of the time; empty where nothing is handed back.

    Args:
        result: With its layers, where the runtime told of them.
        step: Channels that the target runs fast in multiples of; None where it is not known.
    """
    after = result.compressed
    if after is None:
        return []
    of_macs, of_time = after.macs / result.original.macs, 1 / result.speedup.ratio
    follows = of_time <= FOLLOWS * of_macs
    said = [
        f"{of_macs:.0%} of the multiply-accumulates are left, and {of_time:.0%} of the time: "
        f"{'time followed them' if follows else 'time did not follow them all the way'}."
    ]
    total_ms = sum(row["compressed_ms"] or 0.0 for row in result.layers)
    if not total_ms:
        return [*said, "This runtime does not tell what each layer takes."]
    said += _of_kinds(result.layers, total_ms)
    said += _of_widths(result, step)
    return said


def _of_kinds(layers: Sequence[LayerRow], total_ms: float) -> list[str]:
    said = []
    free = sum(row["compressed_ms"] or 0.0 for row in layers if not row["original_macs"])
    if free > MUCH * total_ms:
        said.append(
            f"Memory-bound: {free / total_ms:.0%} of the time goes into operations that multiply "
            f"nothing (sums, pooling, changes of layout)."
        )
    casts = sum(row["compressed_ms"] or 0.0 for row in layers if CAST in row["kind"])
    if casts > A_LITTLE * total_ms:
        said.append(
            f"Fallback precision: {casts / total_ms:.0%} of the time goes into casts, because the "
            f"runtime computes some operations in another precision than the file's."
        )
    small = [row for row in layers if row["compressed_ms"] and row["compressed_ms"] < SMALL_MS]
    in_small = sum(row["compressed_ms"] or 0.0 for row in small)
    if in_small > MUCH * total_ms:
        said.append(
            f"Launch-bound: {len(small)} nodes of under {1000 * SMALL_MS:.0f} us take "
            f"{in_small / total_ms:.0%} of the time; fewer channels make them no quicker, fewer "
            f"layers would."
        )
    same = [r for r in layers if r["original_macs"] and r["original_macs"] == r["compressed_macs"]]
    in_same = sum(row["compressed_ms"] or 0.0 for row in same)
    if in_same > MUCH * total_ms:
        most = sorted(same, key=lambda row: -(row["compressed_ms"] or 0.0))
        said.append(
            f"{in_same / total_ms:.0%} of the time is in layers that kept all their channels, "
            f"such as {_named(most)}."
        )
    slower = [
        row for row in layers if _speed(row, "compressed") < SLOWED * _speed(row, "original")
    ]
    slower.sort(key=lambda row: -(row["compressed_ms"] or 0.0))
    in_slower = sum(row["compressed_ms"] or 0.0 for row in slower)
    if in_slower > MUCH * total_ms:
        said.append(
            f"{in_slower / total_ms:.0%} of the time is in layers that multiply more slowly than "
            f"before, as narrow layers fill vector units less, such as {_named(slower)}."
        )
    gone = [row for row in layers if row["compressed_ms"] is None]
    if gone:
        total = sum(row["original_ms"] for row in layers)
        saved = sum(row["original_ms"] for row in gone)
        said.append(
            f"{len(gone)} nodes went whole, with {saved / total:.0%} of the original's time."
        )
    return said


def _of_widths(result: Result, step: int | None) -> list[str]:
    if not step or step == 1:
        return []
    off = [g["name"] for g in result.groups if g["kept"] % step and g["kept"] != g["channels"]]
    if not off:
        return [f"Every width that was changed is on the target's step of {step} channels."]
    return [f"Off the target's step of {step} channels: {', '.join(off)}."]


def _speed(row: LayerRow, side: str) -> float:
    """MACs a millisecond; 0 where nothing is known, so that nothing is said."""
    if side == "original":
        return row["original_macs"] / row["original_ms"] if row["original_ms"] else 0.0
    if not row["compressed_ms"] or not row["compressed_macs"]:
        return float("inf")
    return row["compressed_macs"] / row["compressed_ms"]


def _named(rows: Sequence[LayerRow]) -> str:
    return ", ".join(row["name"] for row in rows[:N_NAMED])
