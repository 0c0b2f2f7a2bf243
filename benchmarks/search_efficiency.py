"""Which search finds the most accurate plan in so many trials?

ResNet-56 on CIFAR-10, before any fine-tuning, in two tasks: half of the MACs, and 60 % of the
original's measured time (ONNX Runtime, one thread, this machine). All searches choose from the
same space (widths on the step, residual branches), and every plan is repaired and measured in the
same way. What BOCR measures before its first trial is taken off its budget, by the seconds it
took. Task `macs` times nothing, so that two searches can run side by side.

    python -m benchmarks.search_efficiency run --data cifar10-jpeg.zip --model resnet56.pt \
        --task macs --trials 60 --seeds 3
    python -m benchmarks.search_efficiency report

Rows already in the CSV file are not measured again.
"""

import argparse
import math
import os
import platform
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt

import compressor
from benchmarks.cifar import add_inputs, load_cifar, searched_resnet56
from benchmarks.rows import append_rows, read_rows
from compressor.bench import (
    ACCURACY,
    LATENCY,
    RECALIBRATION,
    Bench,
    timed,
)
from compressor.config import Config
from compressor.environment import cpu_name
from compressor.goals import MACS
from compressor.graph.costs import layer_costs
from compressor.recovery import Recovery
from compressor.rows import one_tensor
from compressor.search import make_strategy
from compressor.search.bocr import Bocr
from compressor.search.objective import (
    FEATURES,
    TIME,
    History,
    Objective,
    Problem,
    Strategy,
    feasible_first,
)
from compressor.trials import N_FEATURE_IMAGES, features, with_harm
from compressor.values import Trial, few

RESULTS = Path(__file__).parent / "results"
LIMITS = {"macs": {MACS: 0.5}, "time": {TIME: 0.6}}
ORDER = ("bocr", "random", "bo", "tpe", "genetic", "swarm", "cma-es")
N_FIT, N_SEARCH = 5000, 2000
FIELDS = (
    "task", "trials", "strategy", "seed", "trial", "phase", "accuracy", "loss", "time", "macs",
    "best", "dropped", "seconds", "inherent_seconds", "proposal_seconds", "plan",
)  # fmt: skip


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    add_inputs(runs)
    runs.add_argument("--task", choices=LIMITS, required=True)
    runs.add_argument("--trials", type=int, default=60)
    runs.add_argument("--seeds", type=int, default=3)
    runs.add_argument("--first-seed", type=int, default=0)
    runs.add_argument("--strategies", default=",".join(ORDER))
    runs.add_argument("--csv", type=Path, default=RESULTS / "search_efficiency.csv")
    reports = commands.add_parser("report")
    reports.add_argument("--csv", type=Path, default=RESULTS / "search_efficiency.csv")
    args = parser.parse_args()
    if args.command == "report":
        report(args.csv)
    else:
        run_all(args)


def run_all(args: argparse.Namespace) -> None:
    """Every strategy and seed that the CSV file lacks."""
    data = load_cifar(args.data, N_FIT, N_SEARCH, 0)
    example = one_tensor(data.fit.model_input(slice(0, 1)))
    target = compressor.load_target("host-cpu")
    prunable, space = searched_resnet56(args.model, example, target.step)
    known = {(r["task"], r["trials"], r["strategy"], r["seed"]) for r in read_rows(args.csv)}
    with compressor.open_device(target) as device:
        bench = Bench(
            prunable, space, data, target, device,
            recovery=Recovery(), on_progress=lambda _progress: None,
        )  # fmt: skip
        problem = Problem(
            space, Objective(limits=LIMITS[args.task]), bench.original_accuracy, args.trials, 3,
            0, layer_costs(prunable.module, prunable.groups),
        )  # fmt: skip
        print(f"original: {problem.original_accuracy}", flush=True)
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for name in args.strategies.split(","):
                if (args.task, str(args.trials), name, str(seed)) not in known:
                    rows = run(name, replace(problem, seed=1000 * seed), bench, args.task)
                    numbered = [{**r, "seed": seed, "trials": args.trials} for r in rows]
                    append_rows(args.csv, numbered, FIELDS)


def run(name: str, problem: Problem, bench: Bench, task: str) -> list[dict[str, object]]:
    """One search: a row a trial."""
    began = time.perf_counter()
    strategy = strategy_of(name)
    if isinstance(strategy, Bocr) and strategy.is_informed:
        if task == "time":
            problem = replace(problem, timed=bench.timed_plans(problem.seed, at_most=24))
        if not name.endswith("-no-damages"):
            problem = with_harm(problem, bench.harm, lambda _progress: None)
    if FEATURES in strategy.needs:
        some = few(bench.data.fit, N_FEATURE_IMAGES)
        problem = replace(problem, features=features(bench.prunable, some))
    before = time.perf_counter() - began
    trials: list[Trial] = []
    rows: list[dict[str, object]] = []
    n_trials, n_before = problem.n_trials, 0
    while len(trials) < problem.n_trials:
        seconds: dict[str, float] = {}
        with timed(seconds, "all"):
            with timed(seconds, "proposal"):
                proposal = strategy.propose(problem, History(trials))
            assert proposal is not None
            trial = measure(problem, bench, proposal.widths, len(trials), seconds, task)
        trial = replace(trial, phase=proposal.phase, seconds=seconds)
        trials.append(trial)
        if len(trials) == 5 and before > 1:  # what was measured before costs trials
            mean = statistics.fmean(t.seconds["all"] for t in trials)
            n_before = math.ceil(before / mean)
            problem = replace(problem, n_trials=n_trials - n_before)
        best = feasible_first(trials, problem)
        found = best[0].accuracy.value if best and best[0].accuracy else 0.0
        assert trial.accuracy is not None
        n_groups = len(problem.space.groups)
        inherent = (ACCURACY, LATENCY, RECALIBRATION)
        rows.append({
            "task": task, "strategy": name, "trial": len(trials),
            "phase": trial.phase, "accuracy": trial.accuracy.value,
            "loss": round(trial.accuracy.loss or 0, 5),
            "time": round(problem.share(TIME, trial), 4),
            "macs": round(problem.share(MACS, trial), 4), "best": found,
            "dropped": list(trial.widths.values())[n_groups:].count(0),
            "seconds": round(seconds["all"], 3),
            "inherent_seconds": round(sum(seconds.get(part, 0.0) for part in inherent), 3),
            "proposal_seconds": round(seconds["proposal"], 3),
            "plan": " ".join(map(str, trial.widths.values())),
        })  # fmt: skip
    for row in rows:
        row["trial"] = int(str(row["trial"])) + n_before
    spent = time.perf_counter() - began
    if problem.damages:
        print({name: round(harm, 4) for name, harm in problem.damages.items()}, flush=True)
    print(f"{task} {name} seed {problem.seed // 1000}: {before:.0f} s before, {len(trials)} "
          f"trials in {spent:.0f} s, best {rows[-1]['best']:.4f}", flush=True)  # fmt: skip
    return rows


def measure(
    problem: Problem,
    bench: Bench,
    widths: tuple[int, ...],
    number: int,
    seconds: dict[str, float],
    task: str,
) -> Trial:
    """A trial; in task `macs`, its time is that of its MACs and nobody looks at it."""
    space = problem.space
    plan = space.plan(widths)
    if task == "time":
        accuracy, latency = bench.measure(plan, seconds, seed=problem.seed + number)
        return Trial(
            number, space.by_name(widths), "", accuracy, latency.ratio, latency.ranking_ci95,
            latency.candidate.median_ms,
        )  # fmt: skip
    pruned = bench.repaired(plan, seconds)
    with timed(seconds, ACCURACY):
        accuracy = bench.accuracy(pruned)
    speedup = 1 / float(problem.costs.macs([widths])[0])
    return Trial(
        number, space.by_name(widths), "", accuracy, speedup, (speedup, speedup), 1 / speedup
    )


def strategy_of(name: str) -> Strategy:
    """A strategy, or one of BOCR's variants."""
    variants: dict[str, Strategy] = {
        "bocr-no-damages": Bocr(),
        "bocr-gradual": Bocr(rollback="gradual"),
        "bocr-no-clusters": Bocr(clusters=False),
    }
    if name in variants:
        return variants[name]
    return make_strategy(Config(model=Path("resnet56.pt"), target="host-cpu", search=name))


Curve = list[tuple[int, float]]  # trial, best so far
Key = tuple[str, int]  # task, budget


def report(path: Path) -> None:
    """Writes a table and a picture beside the CSV file."""
    curves: dict[Key, dict[str, dict[str, Curve]]] = defaultdict(lambda: defaultdict(dict))
    seconds: dict[Key, dict[str, list[tuple[float, ...]]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(path):
        key, name = (row["task"], int(row["trials"])), row["strategy"]
        curves[key][name].setdefault(row["seed"], []).append(
            (int(row["trial"]), float(row["best"]))
        )
        parts = (float(row[f]) for f in ("seconds", "inherent_seconds", "proposal_seconds"))
        seconds[key][name].append(tuple(parts))
    lines = [
        "# Best accuracy before fine-tuning, after so many trials", "",
        "ResNet-56, CIFAR-10 (2,000 search images, of which the original has 97.5 % right). "
        "Median [range] over seeds.", "", versions(), "",
        "    python -m benchmarks.search_efficiency run --data ZIP --model PT --task macs",
        "    python -m benchmarks.search_efficiency run --data ZIP --model PT --task time",
        "    python -m benchmarks.search_efficiency report", "",
    ]  # fmt: skip
    for (task, budget), names in sorted(curves.items()):
        marks = [n for n in (15, 30, 45, 60, 100, 150, 200) if n <= budget]
        limit = next(iter(LIMITS[task].values()))
        what = {"macs": "of the MACs", "time": "of the measured time"}[task]
        lines += [f"## At most {limit:.0%} {what}, {budget} trials", "",
                  "| strategy | seeds | " + " | ".join(map(str, marks))
                  + " | s a trial | in proposals | x forward passes and timing |",
                  "|---|--:|" + "--:|" * (len(marks) + 3)]  # fmt: skip
        for name in sorted(names, key=lambda n: -at(names[n], budget)[0]):
            cells = ["{:.2%} [{:.2%}, {:.2%}]".format(*at(names[name], mark)) for mark in marks]
            whole, inherent, proposal = map(
                statistics.fmean, zip(*seconds[task, budget][name], strict=True)
            )
            cells += [f"{whole:.2f}", f"{proposal:.2f}", f"{whole / inherent:.2f}"]
            lines.append(f"| {name} | {len(names[name])} | " + " | ".join(cells) + " |")
        lines.append("")
    text = "\n".join(lines)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    draw(curves, path.with_suffix(".png"))


def at(seeds: dict[str, Curve], mark: int) -> tuple[float, float, float]:
    """Median, least and largest best accuracy of all seeds after `mark` trials."""
    bests = [max((b for n, b in curve if n <= mark), default=0.0) for curve in seeds.values()]
    return statistics.median(bests), min(bests), max(bests)


def draw(curves: dict[Key, dict[str, dict[str, Curve]]], path: Path) -> None:
    """A panel for every task and budget: medians, and the ranges of bocr, bo and random."""
    figure, panels = plt.subplots(1, len(curves), figsize=(6 * len(curves), 4.5), squeeze=False)
    for panel, ((task, budget), names) in zip(panels[0], sorted(curves.items()), strict=True):
        for name in [n for n in ORDER if n in names] + sorted(set(names) - set(ORDER)):
            marks = range(1, budget + 1)
            medians, lows, highs = zip(*(at(names[name], mark) for mark in marks), strict=True)
            (line,) = panel.plot(marks, medians, label=name)
            if name in ("bocr", "bo", "random"):
                panel.fill_between(marks, lows, highs, color=line.get_color(), alpha=0.15)
        panel.set(title=f"{task}, {budget} trials", xlabel="trials", ylim=(0.3, 0.95))
        panel.set_ylabel("best search accuracy, before fine-tuning")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def versions() -> str:
    """Machine and packages."""
    packages = ("torch", "onnxruntime", "botorch", "optuna", "cmaes")
    known = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{cpu_name()}, {os.cpu_count()} cores; Python {platform.python_version()}, {known}."


if __name__ == "__main__":
    main()
