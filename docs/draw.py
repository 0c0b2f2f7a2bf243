"""The pictures of the pages, drawn from the figures in `benchmarks/results`.

Same figures, same versions of the libraries: same files, byte for byte. Each file says what it was
made from (`fingerprint`). Text stays text, so that the files are small and can be searched.
"""

import csv
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
STAIRCASES = {  # file -> what was probed
    "probe_avx512.txt": "AVX-512, step 16",
    "probe_avx2_emulated.txt": "limited to AVX2, emulated, step 8",
}
NOISE, SEARCHES, DEMO = "latency_noise.txt", "search_efficiency.csv", "demo-result.json"
MAX_BYTES = 60_000  # of a picture
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#777777"
STRATEGIES = {"bocr": BLUE, "bo": ORANGE, "tpe": GREEN, "random": GREY}
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "compressor", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e5e5e5", "axes.axisbelow": True, "figure.facecolor": "white",
    "savefig.facecolor": "white", "legend.frameon": False,
}  # fmt: skip


def draw_all(folder: Path) -> list[Path]:
    """Every picture as an SVG file in `folder`; what else lies there is removed.

    Raises:
        ValueError: A picture came out too large.
    """
    folder.mkdir(exist_ok=True)
    metadata = {"Date": None, "Creator": None, "Description": f"made from {fingerprint()}"}
    written = []
    with mpl.rc_context(STYLE):
        for name, draw in PICTURES.items():
            path = folder / f"{name}.svg"
            draw().savefig(path, metadata=metadata, bbox_inches="tight")
            if path.stat().st_size > MAX_BYTES:
                raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {MAX_BYTES}.")
            written.append(path)
    for old in set(folder.iterdir()) - set(written):
        old.unlink()
    return written


def fingerprint() -> str:
    """Of the figures, and of the code that draws them."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for name in (*STAIRCASES, NOISE, SEARCHES, DEMO):
        digest.update((RESULTS / name).read_bytes())
    return digest.hexdigest()[:16]


def staircase() -> Figure:
    """What a 3x3 convolution costs at each width, on AVX-512 and on AVX2."""
    figure, axes = _axes(6.4, 3.2)
    for (file, name), color in zip(STAIRCASES.items(), (BLUE, ORANGE), strict=True):
        rows = [line.split() for line in _text(file).splitlines() if line.strip()[:1].isdigit()]
        widths, shares = [int(row[0]) for row in rows], [100 * float(row[1]) for row in rows]
        axes.plot(widths, shares, "o-", color=color, markersize=3.5, linewidth=1.2, label=name)
    axes.plot([0, 64], [0, 100], ":", color=GREY, linewidth=1, label="in proportion to channels")
    axes.set(
        xlabel="channels of two 3x3 convolutions, ONNX Runtime, one thread",
        ylabel="% of the time of 64", xticks=range(0, 65, 8), ylim=(0, None), xlim=(0, 66),
    )  # fmt: skip
    axes.legend(loc="upper left")
    return figure


def noise() -> Figure:
    """How far a model seems to be from its own time: as trials measure, and by the wall."""
    figure, axes = _axes(6.4, 3.8)
    labels: list[str] = []
    for line in _text(NOISE).splitlines():
        name, _, figures = line.partition("  ")
        shares = [float(each) for each in re.findall(r"([\d.]+)%", figures)]
        if not re.match(r"\d+ busy", name) or len(shares) < 2:
            continue
        place = len(labels)
        labels.append(name)
        is_block = "after the other" in name
        pairs = [(ORANGE, shares[0], shares[1])]
        if not is_block:
            pairs = [(BLUE, shares[0], shares[1]), (ORANGE, shares[-2], shares[-1])]
        for color, mean, worst in pairs:
            axes.plot([mean, worst], [place, place], color=color, linewidth=1.5)
            axes.plot(mean, place, "o", color=color, markersize=6)
            axes.plot(worst, place, "|", color=color, markersize=11, markeredgewidth=2)
    axes.plot([], [], "o-", color=BLUE, label="as a trial measures")
    axes.plot([], [], "o-", color=ORANGE, label="by the clock on the wall")
    axes.legend(loc="lower right")
    axes.set_xscale("log")
    axes.set_xticks([0.1, 1, 10, 100], ["0.1 %", "1 %", "10 %", "100 %"])
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("error of the ratio of a model to itself: mean (dot), worst (bar)")
    return figure


def convergence() -> Figure:
    """Best accuracy so far over trials, by search."""
    figure, axes = _axes(6.4, 3.2)
    for strategy, color in STRATEGIES.items():
        best: dict[int, list[float]] = defaultdict(list)
        for row in _trials(strategy):
            best[int(row["trial"]) + 1].append(100 * float(row["best"]))
        numbers = sorted(best)
        middle = [float(np.median(best[n])) for n in numbers]
        axes.plot(numbers, middle, color=color, linewidth=1.5, label=strategy)
        axes.fill_between(
            numbers, [min(best[n]) for n in numbers], [max(best[n]) for n in numbers],
            color=color, alpha=0.15, linewidth=0,
        )  # fmt: skip
    axes.set(
        xlabel="trials (what bocr looks at before its first one is counted as trials)",
        ylabel="best accuracy so far, %", xlim=(0, 60), ylim=(45, 90),
    )  # fmt: skip
    axes.legend(loc="lower right", ncols=2)
    return figure


def trials() -> Figure:
    """Time and accuracy of every trial of one seed: of bocr, and of plans drawn at random."""
    figure, axes = _axes(6.4, 3.2)
    for strategy in ("random", "bocr"):
        rows = [row for row in _trials(strategy) if row["seed"] == "0" and row["accuracy"]]
        times = [100 * float(row["time"]) for row in rows]
        right = [100 * float(row["accuracy"]) for row in rows]
        axes.plot(times, right, "o", color=STRATEGIES[strategy], markersize=4, alpha=0.7,
                  markeredgewidth=0, label=strategy)  # fmt: skip
    axes.axvline(60, color=ORANGE, linewidth=1, linestyle="--", label="limit")
    axes.set(xlabel="% of the original's measured time", ylabel="accuracy before training, %",
             ylim=(0, 95))  # fmt: skip
    axes.legend(loc="upper left")
    return figure


def widths() -> Figure:
    """Channels of every group of the demo, before and after."""
    groups = _demo()["groups"]
    figure, axes = _axes(6.4, 2.8)
    places = np.arange(len(groups))
    axes.bar(places, [g["channels"] for g in groups], 0.7, color="#dddddd", label="original")
    axes.bar(places, [g["kept"] for g in groups], 0.7, color=BLUE, label="kept")
    for place, group in enumerate(groups):
        axes.text(place, group["channels"] + 4, str(group["kept"]), ha="center", fontsize=8)
    names = [f"{g['name']}{' (locked)' if g['locked_because'] else ''}" for g in groups]
    axes.set_xticks(places, names, rotation=30, ha="right")
    axes.set_ylabel("channels")
    axes.legend(loc="upper left")
    axes.grid(visible=False, axis="x")
    return figure


def layers() -> Figure:
    """What every layer of the demo takes, before and after."""
    rows = [row for row in _demo()["layers"] if row["original_ms"] >= 0.005]
    figure, axes = _axes(6.4, 3.8)
    places = np.arange(len(rows))
    axes.barh(
        places - 0.2, [r["original_ms"] for r in rows], 0.4, color="#bbbbbb", label="original"
    )
    axes.barh(places + 0.2, [r["compressed_ms"] or 0 for r in rows], 0.4, color=BLUE,
              label="compressed")  # fmt: skip
    axes.set_yticks(places, [r["name"] for r in rows])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, by ONNX Runtime's profiler")
    axes.legend(loc="upper right")
    axes.grid(visible=False, axis="y")
    return figure


def trial() -> Figure:
    """Where the time of one of the demo's trials goes."""
    parts = {k: v for k, v in _demo()["search"]["seconds_per_trial"].items() if k != "all"}
    figure, axes = _axes(6.4, 2.0)
    names = list(parts)
    axes.barh(range(len(names)), [1000 * parts[n] for n in names], 0.65, color=BLUE)
    for place, name in enumerate(names):
        axes.text(1000 * parts[name] + 12, place, f"{1000 * parts[name]:.0f}", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a trial, mean over the demo's 48 trials")
    axes.grid(visible=False, axis="y")
    return figure


def groups() -> Figure:
    """Which channels of a residual block can only go together."""
    figure, axes = _canvas(7.2, 2.9)
    stream, inner = BLUE, ORANGE
    for x, y, text, color in (
        (0.0, 1.0, "stem\nconv + norm", stream), (1.7, 1.0, "conv1\n+ norm", inner),
        (3.4, 1.0, "conv2\n+ norm", stream), (5.1, 0.35, "+", stream),
        (6.0, 0.35, "next\nlayers", GREY),
    ):  # fmt: skip
        wide = 0.5 if text == "+" else 1.2
        _box(axes, x, y, wide, 0.75, text, color)
    for start, end in (((1.2, 1.37), (1.7, 1.37)), ((2.9, 1.37), (3.4, 1.37)),
                       ((4.6, 1.37), (5.3, 1.1)), ((5.6, 0.72), (6.0, 0.72))):  # fmt: skip
        _arrow(axes, start, end)
    axes.plot([0.6, 0.6, 5.1], [1.0, 0.6, 0.6], color="#333333", linewidth=1.2)
    axes.text(2.2, 0.4, "shortcut", fontsize=8, color="#333333")
    axes.text(0.0, 2.05, "one group: the sum ties what the stem and conv2 write, "
              "and all that reads the sum", color=stream, fontsize=8.5)  # fmt: skip
    axes.text(1.7, 1.83, "its own group: conv1's filters and norm, conv2's inputs", color=inner,
              fontsize=8.5)  # fmt: skip
    axes.text(1.7, 0.05, "a branch, conv1 to conv2, can go whole: the shortcut is left",
              color="#333333", fontsize=8.5)  # fmt: skip
    axes.set(xlim=(-0.1, 7.3), ylim=(-0.1, 2.3))
    return figure


def run() -> Figure:
    """The steps of a run, in order."""
    figure, axes = _canvas(9.0, 2.0)
    steps = (
        ("groups and\nbranches", GREY), ("original\nmeasured", GREEN),
        ("some plans\ntimed, first\nplan made", GREEN), ("trials", GREEN),
        ("best again,\nfew trained", PURPLE), ("NNI and own\nsurgery agree", GREY),
        ("winner\ntrained", PURPLE), ("export, proof,\nfiles\nmeasured", GREEN),
    )  # fmt: skip
    for i, (text, color) in enumerate(steps):
        _box(axes, 1.15 * i, 0.6, 0.98, 0.8, text, color, size=7.5)
        if i:
            _arrow(axes, (1.15 * i - 0.17, 1.0), (1.15 * i, 1.0))
    axes.annotate("", xy=(3.75, 0.6), xytext=(4.15, 0.6),
                  arrowprops={"arrowstyle": "->", "connectionstyle": "arc3,rad=-0.9",
                              "color": "#333333"})  # fmt: skip
    axes.text(3.95, 0.1, "a Gaussian process proposes the next", ha="center", fontsize=8)
    axes.text(0, 1.6, "green: on the target; purple: with the fit images", fontsize=8)
    axes.set(xlim=(-0.1, 9.15), ylim=(-0.05, 1.8))
    return figure


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = _axes(width, height)
    axes.axis("off")
    return figure, axes


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str,
    size: float = 8.5,
) -> None:  # fmt: skip
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor="white",
                                  edgecolor=color, linewidth=1.8))  # fmt: skip
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": "#333333"})


def _text(name: str) -> str:
    return (RESULTS / name).read_text(encoding="utf-8")


def _demo() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_text(DEMO))
    return found


def _trials(strategy: str) -> list[dict[str, str]]:
    """Of the searches for 60 % of the measured time."""
    with (RESULTS / SEARCHES).open(newline="") as file:
        return [
            row for row in csv.DictReader(file)
            if row["task"] == "time" and row["trials"] == "60" and row["strategy"] == strategy
        ]  # fmt: skip


PICTURES: dict[str, Callable[[], Figure]] = {
    "staircase": staircase, "noise": noise, "convergence": convergence, "trials": trials,
    "widths": widths, "layers": layers, "trial": trial, "groups": groups, "run": run,
}  # fmt: skip
