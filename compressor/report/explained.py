"""What `compress explain` says, as text and as JSON."""

from pydantic import TypeAdapter

from compressor.report import aligned, si, speedup_of
from compressor.values import Explained

N_EXPLAINED = 25  # layers that take longest; the rest is summed up


def explain_report(explained: Explained) -> str:
    """What each layer takes, what may become of it, and how fast the network can be at most."""
    total = sum(row["original_ms"] for row in explained.layers) or 1.0
    longest = sorted(explained.layers, key=lambda row: -row["original_ms"])[:N_EXPLAINED]
    rows = [("layer", "kind", "time", "share", "at least", "MACs", "group")]
    for row in longest:
        least = row["compressed_ms"]
        rows.append((
            row["name"], row["kind"], f"{row['original_ms']:.3f} ms",
            f"{row['original_ms'] / total:.0%}", "gone" if least is None else f"{least:.3f} ms",
            si(row["original_macs"]) if row["original_macs"] else "-",
            explained.freedom.get(row["name"], "-"),
        ))  # fmt: skip
    more = len(explained.layers) - len(longest)
    rest = total - sum(row["original_ms"] for row in longest)
    target, pair = explained.target, explained.at_most
    nothing = sum(row["original_ms"] for row in explained.layers if not row["original_macs"])
    told = [
        *aligned(rows, right=(2, 3, 4, 5)),
        *([f"and {more} more, {rest:.3f} ms together"] if more else []),
        "",
        f"memory-bound  {nothing / total:.0%} of the time multiplies nothing (sums, pooling, "
        f"layout)",
    ]
    return "\n".join([
        *(told if explained.layers else ["This runtime does not tell what each layer takes.", ""]),
        f"step          {target.step} channels ({target.step_source}); widths between two of its "
        f"multiples gain nothing",
        f"free          {explained.n_free} of {explained.n_groups} channel groups can be pruned, "
        f"{explained.n_branches} residual branches left out",
        f"at most       {speedup_of(pair)}: every free group at its least, every branch out",
        f"original      {pair.original.median_ms:.3f} ms on {target.name} ({target.runtime})",
    ])  # fmt: skip


def explain_json(explained: Explained) -> str:
    """The same as JSON, with every layer."""
    return TypeAdapter(Explained).dump_json(explained, indent=2).decode()
