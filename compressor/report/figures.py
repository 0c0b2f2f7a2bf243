"""What the page draws, as data for plotly.js: (title, what it shows, traces, layout)."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import dendrogram, is_valid_linkage

from compressor.report.words import measure, percent
from compressor.values import Result, Trial

ORIGINAL, COMPRESSED, MUTED, ACCENT = "#8a8f98", "#0b6bcb", "#c9cdd3", "#c2410c"
N_LAYERS = 40  # that take longest; more would not be read
N_BINS = 60


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: Of its element.
        title: Above it.
        text: What it shows and how to read it.
        traces: For plotly.js.
        layout: The same.
        height: Pixels.
    """

    name: str
    title: str
    text: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    height: int = 380


def figures(result: Result, trials: Sequence[Trial]) -> list[Figure]:
    """All that the result has data for, in the order they are read."""
    drawn = [
        pareto(result, trials),
        convergence(result, trials),
        latencies(result),
        widths(result),
        layers(result),
        clusters(result),
    ]
    return [figure for figure in drawn if figure is not None]


def pareto(result: Result, trials: Sequence[Trial]) -> Figure | None:
    """Accuracy and speed-up of every trial."""
    done = [t for t in trials if t.accuracy is not None and t.speedup is not None]
    if not done:
        return None
    traces = []
    for phase in dict.fromkeys(trial.phase for trial in done):
        of_it = [t for t in done if t.phase == phase]
        traces.append({
            "type": "scatter", "mode": "markers", "name": phase,
            "x": [t.speedup for t in of_it],
            "y": [100 * t.accuracy.value for t in of_it if t.accuracy is not None],
            "text": [f"trial {t.number + 1}" for t in of_it],
            "marker": {"size": 8, "opacity": 0.8},
        })  # fmt: skip
    limit = _least_speedup(result)
    shapes = [_line(x=limit)] if limit else []
    return Figure(
        "pareto", "Every trial",
        f"The {measure(result)} on the search split before training, and measured speed-up. "
        + ("Right of the line the limit is met." if shapes else ""),
        traces, {"xaxis": {"title": _text("times as fast"), "type": "log"},
                 "yaxis": {"title": _text(percent(result))}, "shapes": shapes},
    )  # fmt: skip


def convergence(result: Result, trials: Sequence[Trial]) -> Figure | None:
    """The best so far of the trials that meet the limit, and where the search changed."""
    least = _least_speedup(result)
    best, numbers, values = -1.0, list[int](), list[float]()
    for trial in trials:
        if trial.accuracy is None or trial.speedup is None:
            continue
        if trial.speedup >= least:
            best = max(best, trial.accuracy.value)
        if best >= 0:
            numbers.append(trial.number + 1)
            values.append(100 * best)
    if not numbers:
        return None
    phases = [(t.number + 1, t.phase) for t in trials]
    changes = [
        (number, phase)
        for (_, before), (number, phase) in itertools.pairwise(phases)
        if phase != before
    ][:8]
    return Figure(
        "convergence", "How the search went on",
        f"The best {measure(result)} so far among trials within the limit. Dotted lines: a new "
        "phase of the search; at a rollback clusters give way to finer ones, then to single "
        "layers.",
        [{"type": "scatter", "mode": "lines", "x": numbers, "y": values, "name": "best so far",
          "line": {"shape": "hv", "color": COMPRESSED, "width": 3}}],
        {"xaxis": {"title": _text("trial")}, "yaxis": {"title": _text(percent(result))},
         "showlegend": False,
         "shapes": [_line(x=number) for number, _ in changes],
         "annotations": [
             {"x": number, "y": 1, "yref": "paper", "text": phase, "showarrow": False,
              "xanchor": "left", "yanchor": "top", "textangle": 90, "font": {"size": 11}}
             for number, phase in changes
         ]},
    )  # fmt: skip


def latencies(result: Result) -> Figure | None:
    """Every raw time of both networks."""
    pairs = result.speedup.session_pairs
    if not pairs:
        return None
    times = {
        name: [ms for pair in pairs for ms in pair.by(result.speedup.clock)[side]]
        for side, name in enumerate(("original", "compressed"))
    }
    shown = np.concatenate([np.asarray(each) for each in times.values()])
    low, high = float(shown.min()), float(np.quantile(shown, 0.995))
    edges = np.linspace(low, max(high, low * 1.001), N_BINS + 1)
    traces = []
    for (name, each), colour in zip(times.items(), (ORIGINAL, COMPRESSED), strict=True):
        counts, _ = np.histogram(each, edges)
        traces.append({
            "type": "bar", "name": f"{name}, median {np.median(each):.3f} ms",
            "x": ((edges[1:] + edges[:-1]) / 2).round(5).tolist(), "y": counts.tolist(),
            "marker": {"color": colour}, "opacity": 0.8,
        })  # fmt: skip
    return Figure(
        "latencies", "Time of single inferences",
        f"{len(times['original'])} runs of each, in turn, in {len(pairs)} pairs of fresh "
        f"sessions. The slowest 0.5 % lie beyond the right edge.",
        traces, {"barmode": "overlay", "bargap": 0, "xaxis": {"title": _text("ms")},
                 "yaxis": {"title": _text("runs")}},
    )  # fmt: skip


def widths(result: Result) -> Figure | None:
    """Channels before and after."""
    if not result.groups:
        return None
    names = [group["name"] or "(model)" for group in result.groups]
    why = [
        f"locked: {g['locked_because']}" if g["locked_because"]
        else "went with its branch" if not g["kept"] else f"{g['kept']} of {g['channels']}"
        for g in result.groups
    ]  # fmt: skip
    colours = [MUTED if g["locked_because"] else COMPRESSED for g in result.groups]
    return Figure(
        "widths", "Channels of every group",
        "Outlined: the original's. Filled: what is left; grey where a group is locked.",
        [{"type": "bar", "orientation": "h", "y": names, "name": "original",
          "x": [g["channels"] for g in result.groups], "hoverinfo": "skip",
          "marker": {"color": "rgba(0,0,0,0)", "line": {"color": ORIGINAL, "width": 1}}},
         {"type": "bar", "orientation": "h", "y": names, "name": "kept", "text": why,
          "textposition": "none", "hovertemplate": "%{y}: %{text}<extra></extra>",
          "x": [g["kept"] for g in result.groups], "marker": {"color": colours}}],
        {"barmode": "overlay", "xaxis": {"title": _text("channels")}, "showlegend": False,
         "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"}},
        height=max(240, 120 + 18 * len(names)),
    )  # fmt: skip


def layers(result: Result) -> Figure | None:
    """What every layer took, before and after."""
    longest = sorted(result.layers, key=lambda row: -row["original_ms"])[:N_LAYERS]
    if not longest:
        return None
    shown = [row for row in result.layers if row in longest]
    names = [row["name"] for row in shown]
    sides = (
        ("original", ORIGINAL, [row["original_ms"] for row in shown]),
        ("compressed", COMPRESSED, [row["compressed_ms"] or 0.0 for row in shown]),
    )
    more = len(result.layers) - len(shown)
    return Figure(
        "layers", "Time of every layer",
        "By the runtime's own profiler, which slows each by microseconds."
        + (f" The {more} quickest are not shown." if more else ""),
        [{"type": "bar", "orientation": "h", "name": name, "y": names, "x": values,
          "marker": {"color": colour}} for name, colour, values in sides],
        {"barmode": "group", "xaxis": {"title": _text("ms")},
         "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"}},
        height=max(260, 130 + 26 * len(names)),
    )  # fmt: skip


def clusters(result: Result) -> Figure | None:
    """The tree that the first clusters, and the rollback's, were cut from."""
    tree = result.search.get("tree")
    if tree is None or not tree["linkage"]:
        return None
    linkage = np.asarray(tree["linkage"], dtype=np.float64)
    if not is_valid_linkage(linkage) or len(linkage) + 1 != len(tree["names"]):
        return None  # of a file that somebody else has written
    drawn = dendrogram(linkage, labels=tree["names"], no_plot=True)
    traces = [
        {"type": "scatter", "mode": "lines", "x": d, "y": i, "hoverinfo": "x",
         "line": {"color": COMPRESSED, "width": 1.5}}
        for i, d in zip(drawn["icoord"], drawn["dcoord"], strict=True)
    ]  # fmt: skip
    n = len(drawn["ivl"])
    return Figure(
        "clusters", "Which layers are alike",
        "Layers whose channels' importances are distributed alike join early (left). The search "
        "begins with clusters of them that share one ratio.",
        traces, {"showlegend": False, "xaxis": {"title": _text("distance")},
                 "yaxis": {"tickvals": [5 + 10 * i for i in range(n)], "ticktext": drawn["ivl"],
                           "automargin": True}},
        height=max(240, 120 + 16 * n),
    )  # fmt: skip


def _least_speedup(result: Result) -> float:
    """What the limits ask of the speed-up; 0 where they ask nothing of time."""
    original_ms = result.original.latency_ms.median_ms
    return max((c.min_speedup(original_ms) for c in result.constraints), default=0.0)


def _line(*, x: float) -> dict[str, Any]:
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper",
            "line": {"color": ACCENT, "dash": "dot", "width": 1.5}}  # fmt: skip


def _text(title: str) -> dict[str, str]:
    return {"text": title}
