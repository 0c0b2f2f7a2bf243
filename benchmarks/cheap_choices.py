"""What do the cheap choices of a trial cost in ranking quality?

A trial repairs a pruned network and takes its accuracy. The dear way, as methods like ours are
usually written: batch-norm recalibrated on 2,560 images, accuracy of 2,000 images by torch. Every
cheap choice is compared with it: does it rank plans of ResNet-56 the same way (Spearman's rank
correlation), and how many seconds does it take? The plans are those that searches found in
`results/search_efficiency.csv`, evenly spread over accuracy.

What is wanted in the end is the accuracy after training, so a part of the plans is fine-tuned too,
and each way's ranking is compared with that of their test accuracies.

    python -m benchmarks.cheap_choices --data cifar10-jpeg.zip --model resnet56.pt
"""

import argparse
import csv
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import nn

import compressor
from benchmarks.cifar import add_inputs, load_cifar, searched_resnet56
from compressor.bench import Bench
from compressor.evaluate import accuracy
from compressor.recovery import Recovery, recalibrate_batch_norm
from compressor.rows import BATCH_SIZE, one_tensor
from compressor.training import Recipe, fine_tune
from compressor.values import Accuracy, LabelledImages, Plan, Split

PLANS = Path(__file__).parent / "results" / "search_efficiency.csv"
DEAR = 2560  # images, 20 batches of 128
OURS = "ONNX Runtime, 256 images: ours"
ON_FEW = "ours on 500 of the images"
HARM = "harm, one pass over 128 images"
DEAR_WAY = f"least squares, {DEAR} images, torch, 2,000 images: the dear way"


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_inputs(parser)
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument(
        "--tuned", type=int, default=12, help="plans that are fine-tuned too; 0 for none"
    )
    args = parser.parse_args()
    data = load_cifar(args.data, 25_000, 2000, 5000)
    example = one_tensor(data.fit.model_input(slice(0, 1)))
    target = compressor.load_target("host-cpu")
    prunable, space = searched_resnet56(args.model, example, target.step)
    with compressor.open_device(target) as device:
        bench = Bench(
            prunable, space, data, target, device,
            recovery=Recovery(), on_progress=lambda _progress: None,
        )  # fmt: skip
    assert isinstance(data.search, LabelledImages)
    few = replace(data.search, images=data.search.images[:500], labels=data.search.labels[:500])

    def by_torch(model: nn.Module, split: Split) -> Accuracy:
        return accuracy(model, split, batch_size=BATCH_SIZE)

    def quickly(model: nn.Module, n_images: int, split: Split = data.search) -> Accuracy:
        if n_images:
            model = recalibrate_batch_norm(
                model, data.fit, n_images=n_images, memory_format=torch.channels_last
            )
        return accuracy(bench.predictor_of(model), split, batch_size=BATCH_SIZE)

    def ways(plan: Plan) -> dict[str, Callable[[], Accuracy]]:
        refitted, bare = bench.refitted(plan, {}), prunable.without(plan)
        return {
            DEAR_WAY: lambda: by_torch(
                recalibrate_batch_norm(refitted, data.fit, n_images=DEAR), data.search
            ),
            "ONNX Runtime": lambda: quickly(refitted, DEAR),
            "ONNX Runtime, 1024 images": lambda: quickly(refitted, 1024),
            OURS: lambda: quickly(refitted, 256),
            "ONNX Runtime, 64 images": lambda: quickly(refitted, 64),
            "ours without recalibration": lambda: quickly(refitted, 0),
            "ours without least squares": lambda: quickly(bare, 256),
            ON_FEW: lambda: quickly(refitted, 256, few),
        }

    values: dict[str, list[float]] = defaultdict(list)
    losses: dict[str, list[float]] = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)
    plans = chosen(args.plans)
    for widths in plans:
        for name, way in ways(space.plan(widths)).items():
            began = time.perf_counter()
            measured = way()
            seconds[name].append(time.perf_counter() - began)
            values[name].append(measured.value)
            losses[name].append(-(measured.loss or 0))
        began = time.perf_counter()
        values[HARM].append(-bench.harm(widths))
        seconds[HARM].append(time.perf_counter() - began)
    picked = [round(i * (len(plans) - 1) / max(1, args.tuned - 1)) for i in range(args.tuned)]
    tuned = [
        trained(bench.repaired(space.plan(plans[i]), {}), data.fit, data.test) for i in picked
    ]
    print(f"{len(plans)} plans, {min(values[DEAR_WAY]):.1%} to {max(values[DEAR_WAY]):.1%} right")
    if tuned:
        print(f"{len(tuned)} of them fine-tuned, {min(tuned):.1%} to {max(tuned):.1%}")
    print("\n| way | seconds | rank correlation with the dear way | with fine-tuned |")
    print("|---|--:|--:|--:|")
    for name in (OURS, ON_FEW):
        values[f"{name}, its loss"], seconds[f"{name}, its loss"] = losses[name], seconds[name]
    for name, found in values.items():
        took = statistics.median(seconds[name])
        with_dear = spearmanr(found, values[DEAR_WAY])[0]
        after = f"{spearmanr([found[i] for i in picked], tuned)[0]:.2f}" if tuned else "-"
        print(f"| {name} | {took:.2f} | {with_dear:.3f} | {after} |")


def chosen(n: int) -> list[tuple[int, ...]]:
    """Plans within half of the MACs, evenly spread over accuracy from 60 % on."""
    with PLANS.open(newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["task"] == "macs" and float(r["best"]) > 0]
    found = {r["plan"]: float(r["accuracy"]) for r in rows if float(r["accuracy"]) > 0.6}
    ranked = sorted(found, key=lambda plan: found[plan])
    picked = [ranked[round(i * (len(ranked) - 1) / (n - 1))] for i in range(n)]
    return [tuple(map(int, plan.split())) for plan in picked]


def trained(model: nn.Module, fit: Split, test: Split) -> float:
    """Test accuracy after 195 steps of 128 images; the last epoch is kept, the only one."""
    recipe = Recipe(n_steps=195, learning_rate=0.02, batch_size=128)
    tuned = fine_tune(
        model, fit, recipe, score=lambda _model: time.perf_counter(),
        on_progress=lambda _progress: None,
    )  # fmt: skip
    return accuracy(tuned.model, test, batch_size=BATCH_SIZE).value


if __name__ == "__main__":
    main()
