"""Does the search find better plans than chance, at equal numbers of trials?

On the digits sample (run samples/digits/train.py first), 2x faster, 48 trials: BOCR and plans
drawn uniformly over keep ratios, snapped to the same step and measured in the same way. Prints the
best accuracy on the search split among plans that meet the limit, before any fine-tuning. About
two minutes a line on 2 cores.

    python benchmarks/search_vs_random.py --seeds 3
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import compressor
from compressor import open_device
from compressor.pipeline import Bench, Job, pose, prepare
from compressor.search import STRATEGIES
from compressor.search.objective import Problem, Proposal, Strategy, finished
from compressor.values import Trial

MODEL = Path(__file__).parents[1] / "samples" / "digits" / "model.pt"


@dataclass(frozen=True)
class UniformRandom:
    """Keep ratios drawn uniformly, whatever the trials said."""

    def propose(self, problem: Problem, trials: Sequence[Trial]) -> Proposal:
        """A random plan; it may repeat one."""
        generator = np.random.default_rng([problem.seed, len(trials)])
        ratios = generator.uniform(0.1, 1, size=(1, len(problem.space.groups)))
        return Proposal(problem.space.snap(ratios)[0], "random")


def run(strategy: Strategy, problem: Problem, bench: Bench) -> list[Trial]:
    """All trials of one search."""
    trials: list[Trial] = []
    while len(trials) < problem.n_trials:
        proposal = strategy.propose(problem, trials)
        assert proposal is not None
        plan = problem.space.plan(proposal.widths)
        measured, latency = bench.measure(plan, {}, seed=len(trials))
        widths = problem.space.by_name(proposal.widths)
        trials.append(
            Trial(len(trials), widths, proposal.phase, measured, latency.ratio, latency.ci95,
                  latency.candidate.median_ms)
        )  # fmt: skip
    return trials


def best(trials: Sequence[Trial], min_speedup: float) -> float:
    """Highest accuracy among the trials that meet the limit; 0 where none does."""
    return max(
        (t.accuracy.value for t in finished(trials)
         if t.accuracy and t.speedup and t.speedup >= min_speedup),
        default=0.0,
    )  # fmt: skip


def main() -> None:
    """Reads the command line and runs every search."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=48)
    args = parser.parse_args()
    flags = {"target": "host-cpu", "speedup": 2.0, "trials": args.trials}
    job = prepare(compressor.load_config(MODEL, flags))
    with open_device(job.target) as device:
        compare_strategies(job, Bench(job, device, lambda _progress: None), args.seeds)


def compare_strategies(job: Job, bench: Bench, n_seeds: int) -> None:
    """Prints one line a search."""
    problem = pose(job, bench)
    strategies: dict[str, Strategy] = {"bocr": STRATEGIES["bocr"], "random": UniformRandom()}
    for seed in range(n_seeds):
        for name, strategy in strategies.items():
            trials = run(strategy, replace(problem, seed=1000 * seed), bench)
            curve = [best(trials[:n], problem.min_speedup) for n in (12, 24, 36, len(trials))]
            after = ", ".join(f"{a:.2%}" for a in curve)
            print(f"{name:<7} seed {seed}: best after 12, 24, 36, {len(trials)} trials: {after}",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
