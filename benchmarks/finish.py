"""What do finalists, the original's answers and its hints gain over plain fine-tuning?

One search on ResNet-56, CIFAR-10, at a share of the original's time; then its plans are trained in
several ways with the same number of steps in all, and the test accuracies are compared. "plain" is
the best plan of the search, trained by its labels alone; images are flipped and shifted in all.

    python -m benchmarks.finish --data cifar10-jpeg.zip --model resnet56.pt
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import compressor
from benchmarks.cifar import MEAN, STD, add_inputs, as_npz, load_cifar, load_resnet56
from compressor.config import Config
from compressor.evaluate import accuracy
from compressor.finalists import Place, choose, contest, train
from compressor.job import Job
from compressor.pipeline import searched_in
from compressor.rows import BATCH_SIZE
from compressor.training import halving

WAYS: dict[str, dict[str, object]] = {
    "plain": {"finalists": 1, "distillation": 0.0, "hints": 0.0},
    "distillation": {"finalists": 1, "hints": 0.0},
    "distillation and hints": {"finalists": 1},
    "finalists": {"distillation": 0.0, "hints": 0.0},  # these two where there are steps enough
    "finalists, distillation and hints": {},
}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_inputs(parser)
    parser.add_argument("--level", type=float, default=0.65, help="share of the original's time")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=1, help="of 25,600 images")
    parser.add_argument("--seeds", type=int, default=2, help="of the training")
    parser.add_argument("--way", action="append", choices=WAYS, help="may be repeated")
    args = parser.parse_args()
    data = load_cifar(args.data, 25_600, 2000, 10_000)
    with tempfile.TemporaryDirectory() as folder:
        config = compressor.load_config(weights(args.model, Path(folder)), {
            "target": "host-cpu", "arch": "benchmarks.cifar:ResNet56", "mean": MEAN, "std": STD,
            "data": as_npz(data, Path(folder)), "speedup": 1 / args.level, "trials": args.trials,
            "fine_tune_epochs": args.epochs, "batch_size": 128, "out": Path(folder) / "run",
        })  # fmt: skip
        print("| way | test accuracy | of the seeds | seconds each |\n|---|--:|---|--:|")
        quiet = lambda _: None  # noqa: E731
        with searched_in(config, quiet, quiet) as (run, searched):
            job, bench = run.job, run.bench
            plans = choose(job, searched, bench, quiet, run.budget).plans
            for name in args.way or WAYS:
                flags = WAYS[name]
                if "finalists" not in flags and not halving(len(plans), job.n_steps):
                    continue
                began = time.perf_counter()
                found = []
                for seed in range(args.seeds):
                    changed = replaced(job, seed=seed, **flags)
                    place = Place(run.folder, 0, changed.n_steps)
                    winner = contest(changed, plans, bench, place, quiet)[0]
                    recipe = changed.recipe(winner.n_steps_left, seed)
                    stands = place.file("training.pt")
                    plan, network = winner.plan, winner.network or bench.repaired(winner.plan, {})
                    tuned = train(changed, plan, network, bench, recipe, quiet, stands, place)
                    run.folder.forget_unfinished()  # the next way starts from nothing
                    found.append(accuracy(tuned.model, data.test, batch_size=BATCH_SIZE).value)
                took = (time.perf_counter() - began) / args.seeds
                every = ", ".join(f"{value:.2%}" for value in found)
                print(f"| {name} | {statistics.mean(found):.2%} | {every} | {took:.0f} |",
                      flush=True)  # fmt: skip


def replaced(job: Job, **flags: object) -> Job:
    """The job with other settings of its training."""
    return replace(job, config=Config.model_validate(job.config.model_dump() | flags))


def weights(path: Path, folder: Path) -> Path:
    """A plain state_dict."""
    file = folder / "model.pt"
    torch.save(load_resnet56(path).state_dict(), file)
    return file


if __name__ == "__main__":
    main()
