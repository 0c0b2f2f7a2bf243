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
import csv
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import compressor
from benchmarks.cifar import load_cifar, load_resnet56
from compressor.bench import ACCURACY, LATENCY, RECALIBRATION, Bench, Recovery, timed
from compressor.graph.costs import layer_costs
from compressor.importance import IMPORTANCES
from compressor.prunable import make_prunable, with_branches
from compressor.search import ASK_FOR_FEATURES, STRATEGIES
from compressor.search.bocr import Bocr
from compressor.search.objective import (
    TIME,
    Objective,
    Problem,
    Strategy,
    feasible_first,
)
from compressor.search.space import make_space
from compressor.values import MACS, Trial

RESULTS = Path(__file__).parent / "results"
LIMITS = {"macs": {MACS: 0.5}, "time": {TIME: 0.6}}
ORDER = ("bocr", "random", "bo", "tpe", "genetic", "swarm", "cma-es")
N_FIT, N_SEARCH = 5000, 2000
FIELDS = (
    "task", "trials", "strategy", "seed", "trial", "phase", "accuracy", "time", "macs", "best",
    "dropped", "seconds", "inherent_seconds", "proposal_seconds", "plan",
)  # fmt: skip


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--data", type=Path, required=True)
    runs.add_argument("--model", type=Path, required=True)
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
    network = load_resnet56(args.model)
    example = data.fit.model_input(slice(0, 1))
    prunable = with_branches(make_prunable(network, example), example)
    target = compressor.load_target("host-cpu")
    scores = IMPORTANCES["l1"].scores(prunable.module, prunable.groups, None)
    space = make_space(
        prunable.groups, {n: s.numpy() for n, s in scores.items()},
        step=target.step, min_keep_ratio=0.1, branches=prunable.branches,
    )  # fmt: skip
    known = {(r["task"], r["trials"], r["strategy"], r["seed"]) for r in read(args.csv)}
    with compressor.open_device(target) as device:
        bench = Bench(
            prunable, space, data, target, device,
            recovery=Recovery(), on_progress=lambda _progress: None,
        )  # fmt: skip
        problem = Problem(
            space, Objective(limits=LIMITS[args.task]), bench.original_accuracy(), args.trials, 3,
            0, layer_costs(prunable.module, prunable.groups),
        )  # fmt: skip
        print(f"original: {problem.original_accuracy}", flush=True)
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for name in args.strategies.split(","):
                if (args.task, str(args.trials), name, str(seed)) not in known:
                    rows = run(name, replace(problem, seed=1000 * seed), bench, args.task)
                    write(args.csv, [{**r, "seed": seed, "trials": args.trials} for r in rows])


def run(name: str, problem: Problem, bench: Bench, task: str) -> list[dict[str, object]]:
    """One search: a row a trial."""
    began = time.perf_counter()
    strategy = strategy_of(name)
    if isinstance(strategy, Bocr) and strategy.is_informed:
        if task == "time":
            problem = replace(problem, timed=bench.timed_plans(problem.seed, at_most=24))
        if not name.endswith("-no-damages"):
            problem = replace(problem, damages=bench.damages())
    if name in ASK_FOR_FEATURES:
        problem = replace(problem, features=bench.features())
    before = time.perf_counter() - began
    trials: list[Trial] = []
    rows: list[dict[str, object]] = []
    n_trials, n_before = problem.n_trials, 0
    while len(trials) < problem.n_trials:
        seconds: dict[str, float] = {}
        with timed(seconds, "all"):
            with timed(seconds, "proposal"):
                proposal = strategy.propose(problem, trials)
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
    return variants.get(name) or STRATEGIES[name]


def read(path: Path) -> list[dict[str, str]]:
    """All rows so far."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Appends rows of a finished search."""
    is_new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def report(path: Path) -> None:
    """Median and range over seeds of the best accuracy after 20, 40, ... trials."""
    curves: dict[tuple[str, int, str], dict[str, list[tuple[int, float]]]] = defaultdict(dict)
    for row in read(path):
        key = row["task"], int(row["trials"]), row["strategy"]
        curve = curves[key].setdefault(row["seed"], [])
        curve.append((int(row["trial"]), float(row["best"])))
    for task, budget in sorted({(task, budget) for task, budget, _ in curves}):
        marks = [n for n in (15, 30, 45, 60, 100, 150, 200) if n <= budget]
        print(f"\n{task}, {budget} trials: median [range] over seeds of the best accuracy after")
        print("| strategy | seeds | " + " | ".join(map(str, marks)) + " |")
        print("|---|--:|" + "--:|" * len(marks))
        for (own_task, own_budget, name), seeds in curves.items():
            if (own_task, own_budget) == (task, budget):
                cells = []
                for mark in marks:
                    bests = [
                        max((b for n, b in c if n <= mark), default=0.0) for c in seeds.values()
                    ]
                    cells.append(
                        f"{statistics.median(bests):.2%} [{min(bests):.2%}, {max(bests):.2%}]"
                    )
                print(f"| {name} | {len(seeds)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
