"""Ours beside what people would use instead: the same network, images, training and stopwatch.

Two networks on CIFAR-10, ResNet-56 and EfficientNet-Lite0 (`benchmarks/efficientnet.py`), brought
to shares of their measured time (ONNX Runtime, one thread). Every peer's knob is turned to the
best setting that was measured to reach the share (`by_strength`); then all networks get the same
fine-tuning (200 steps of 128 images, with the original's answers), and the files are measured
beside the original. `ours` alone learns from the original's hints too: they need to know which
channels are left, which the peers do not tell.

    python -m benchmarks.peers run --data cifar10-jpeg.zip --model resnet56.pt
    python -m benchmarks.peers run --data cifar10-jpeg.zip \
        --network efficientnet-lite0 --model efficientnet-lite0.pt
    python -m benchmarks.peers report
    python -m benchmarks.peers summary

Rows already in the CSV file are not measured again. Seconds are those of the CPU, with one thread
(`OMP_NUM_THREADS=1 taskset -c 0`); nothing else may run on that core.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import nn

import compressor
from benchmarks.cifar import MEAN, STD, add_inputs, as_npz, load_cifar, load_resnet56
from benchmarks.peer_methods import Prune, Setting, available
from benchmarks.rows import append_rows, read_rows
from compressor.export import export_onnx
from compressor.graph import cost
from compressor.latency.timing import FINAL, TRIAL
from compressor.recovery import recalibrate_batch_norm
from compressor.training import Recipe, fine_tune
from compressor.values import PairedLatency

RESULTS = Path(__file__).parent / "results" / "peers.csv"
LEVELS = (0.75, 0.65, 0.42)
STRENGTHS = tuple(np.linspace(0.05, 0.9, 18).round(3).tolist())
N_JUDGED = 5  # settings by their accuracy, a level
N_FIT, N_SEARCH, N_TEST = 25_600, 2000, 10_000
TRAINING = Recipe(
    n_steps=N_FIT // 128, learning_rate=0.02, batch_size=128, distillation=0.7,
    augmentations=("flip", "crop"),
)  # fmt: skip
FIELDS = (
    "network", "method", "seed", "level", "setting", "macs", "params", "ratio", "low", "high",
    "accuracy_before", "accuracy_after", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """One of the networks.

    Attributes:
        arch: As `compress` takes it.
        arch_args: The same.
        side: Pixels of an image.
    """

    arch: str
    arch_args: dict[str, int]
    side: int


@dataclass(frozen=True, eq=False)
class Candidate:
    """What a setting of a method makes of the network, and its share of the original's time."""

    strength: float
    network: nn.Module
    macs: int
    share: float


NETWORKS = {
    "resnet56": Network("benchmarks.cifar:ResNet56", {}, 32),
    "efficientnet-lite0": Network("timm:efficientnet_lite0", {"num_classes": 10}, 64),
}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    add_inputs(runs)
    runs.add_argument("--network", choices=NETWORKS, default="resnet56")
    runs.add_argument("--levels", help="comma-separated shares of the time; default all")
    runs.add_argument("--method", action="append", help="may be repeated; default all")
    runs.add_argument("--trials", type=int, default=60, help="of our searches")
    runs.add_argument("--seed", type=int, default=0, help="of search and training")
    runs.add_argument("--csv", type=Path, default=RESULTS)
    for name in ("report", "summary"):
        commands.add_parser(name).add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.command == "run":
        run_all(args)
    else:
        print(report(args.csv) if args.command == "report" else summary(args.csv))


def run_all(args: argparse.Namespace) -> None:
    """Every row that the CSV file lacks."""
    peers = available()
    wanted = args.method or ["ours", *peers, "random"]
    levels = tuple(map(float, args.levels.split(","))) if args.levels else LEVELS
    known = {
        (row["network"], row["method"], int(row["seed"]), float(row["level"]))
        for row in read_rows(args.csv)
    }
    with setting_of(args) as setting:
        for name in wanted:
            asked = {level: (args.network, name, args.seed, level) for level in levels}
            left = [level for level, row in asked.items() if row not in known]
            if not left:
                continue
            if name in ("ours", "random"):
                rows = by_compress(setting, args, name, left)
            else:
                rows = by_strength(setting, name, left, peers[name], args.seed)
            for row in rows:
                row |= {"network": args.network, "method": name, "seed": args.seed}
                append_rows(args.csv, [row], FIELDS)
                print(row, flush=True)


@contextmanager
def setting_of(args: argparse.Namespace) -> Iterator[Setting]:
    """The base network, its images, and an open device."""
    data = load_cifar(args.data, N_FIT, N_SEARCH, N_TEST, side=NETWORKS[args.network].side)
    base: nn.Module
    if args.network == "resnet56":
        base = load_resnet56(args.model)
    else:
        from benchmarks.efficientnet import load_efficientnet

        base = load_efficientnet(args.model)
    target = compressor.load_target("host-cpu")
    with compressor.open_device(target) as device, tempfile.TemporaryDirectory() as folder:
        original = Path(folder) / "original.onnx"
        export_onnx(base, data.fit.model_input(slice(0, 1)), original, opset=target.opset)
        yield Setting(base, data, device, original, Path(folder))


def by_strength(
    setting: Setting,
    name: str,
    levels: Sequence[float],
    prune: Prune,
    seed: int,
) -> Iterator[dict[str, object]]:
    """For every level, a setting that was measured to reach it.

    Of the `N_JUDGED` of most MACs the one that has most images of the search split right, with its
    batch-norms recalibrated: where widths are rounded, more MACs may well be the worse network.
    Settings beyond one that reaches all levels have fewer MACs, and are not looked at.
    """
    began = cpu_seconds()
    measured: list[Candidate] = []
    for strength in STRENGTHS:
        try:
            network = prune(setting, strength)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as err:
            print(f"{name} at {strength}: {type(err).__name__}: {err}", flush=True)
            continue
        macs = cost(network, setting.example).macs
        share = 1 / setting.compare(network, TRIAL).ratio
        measured.append(Candidate(strength, network, macs, share))
        if share <= min(levels):
            break
    spent = cpu_seconds() - began

    @cache
    def judged(each: Candidate) -> tuple[float, nn.Module]:
        network = recalibrate_batch_norm(each.network, setting.data.fit, n_images=1024)
        return setting.accuracy(network, setting.data.search), network

    rows: dict[Candidate, dict[str, object]] = {}
    for level in levels:
        reaching = [each for each in measured if each.share <= level]
        if not reaching:
            print(f"{name}: no setting reaches {level}", flush=True)
            continue
        began = cpu_seconds()
        # Rounding makes the same network of several strengths; the weakest stands for them.
        by_macs = {each.macs: each for each in reversed(reaching)}
        most = [by_macs[macs] for macs in sorted(by_macs, reverse=True)[:N_JUDGED]]
        best = max(most, key=lambda each: judged(each)[0])
        if best not in rows:
            row = finished(setting, judged(best)[1], seed)
            rows[best] = row | {"seconds": round(spent + cpu_seconds() - began)}
        yield rows[best] | {"level": level, "setting": best.strength}


def finished(setting: Setting, network: nn.Module, seed: int) -> dict[str, object]:
    """Trained and measured."""
    tuned = fine_tune(
        network, setting.data.fit, replace(TRAINING, seed=seed), teacher=setting.base,
        score=lambda model: setting.accuracy(model, setting.data.search),
        on_progress=lambda _progress: None, memory_format=torch.channels_last,
    )  # fmt: skip
    pair = setting.compare(tuned.model, FINAL)
    paper = cost(tuned.model, setting.example)
    return {
        "macs": paper.macs, "params": paper.params, **ratios(pair),
        "accuracy_before": setting.accuracy(network, setting.data.test),
        "accuracy_after": setting.accuracy(tuned.model, setting.data.test),
    }  # fmt: skip


def ratios(pair: PairedLatency) -> dict[str, object]:
    """Shares of the original's time."""
    low, high = pair.ci95
    return {
        "ratio": round(1 / pair.ratio, 4),
        "low": round(1 / high, 4),
        "high": round(1 / low, 4),
    }


def by_compress(
    setting: Setting, args: argparse.Namespace, name: str, levels: Sequence[float]
) -> Iterator[dict[str, object]]:
    """What `compress` does with the same images, steps and limit."""
    network, images = NETWORKS[args.network], as_npz(setting.data, setting.folder)
    weights = setting.folder / "model.pt"
    torch.save(setting.base.state_dict(), weights)
    for level in levels:
        began = cpu_seconds()
        config = compressor.load_config(weights, {
            "target": "host-cpu", "arch": network.arch, "arch_args": network.arch_args,
            "data": images, "mean": MEAN, "std": STD,
            "speedup": 1 / level, "trials": args.trials, "fine_tune_epochs": 1,
            "batch_size": TRAINING.batch_size, "learning_rate": TRAINING.learning_rate,
            "distillation": TRAINING.distillation, "augment": TRAINING.augmentations,
            "seed": args.seed, "out": setting.folder / f"{name}-{level}",
            **({"search": "random", "finalists": 1} if name == "random" else {}),
        })  # fmt: skip
        result = compressor.compress(config)
        seconds = cpu_seconds() - began
        if result.compressed is None:
            print(f"{name} at {level}: {result.verdict}", flush=True)
            continue
        yield {
            "level": level, "setting": f"{args.trials} trials",
            "macs": result.compressed.macs, "params": result.compressed.params,
            **ratios(result.speedup), "accuracy_before": "",
            "accuracy_after": result.compressed.accuracy, "seconds": round(seconds),
        }  # fmt: skip


def cpu_seconds() -> float:
    """Of this process and its children since they began."""
    here = psutil.Process()
    return sum(sum(process.cpu_times()[:4]) for process in (here, *here.children(recursive=True)))


def report(path: Path) -> str:
    """A table a network and level, best accuracy first."""
    lines: list[str] = []
    rows = read_rows(path)
    for network in NETWORKS:
        of_it = [row for row in rows if row["network"] == network]
        for level in sorted({float(row["level"]) for row in of_it}, reverse=True):
            found = [row for row in of_it if float(row["level"]) == level]
            lines += [
                "", f"## {network}, at most {level} of the time", "",
                "| method | knob | measured | MACs | params | before training | after | seconds |",
                "|---|--:|--:|--:|--:|--:|--:|--:|",
            ]  # fmt: skip
            for row in sorted(found, key=lambda r: -float(r["accuracy_after"])):
                before = f"{float(row['accuracy_before']):.2%}" if row["accuracy_before"] else ""
                lines.append(
                    f"| {named(row)} | {row['setting']} | {row['ratio']} "
                    f"[{row['low']}, {row['high']}] | {int(row['macs']) / 1e6:.1f} M | "
                    f"{int(row['params']) / 1e3:.0f} k | {before} | "
                    f"{float(row['accuracy_after']):.2%} | {row['seconds']} |"
                )
    return "\n".join(lines)


def named(row: Mapping[str, str]) -> str:
    """The method, and the seed where it is not the first."""
    return row["method"] if row["seed"] == "0" else f"{row['method']}, seed {row['seed']}"


def summary(path: Path) -> str:
    """For each network: a row a method, a column a level; accuracy, and its share of the time."""
    lines: list[str] = []
    rows = read_rows(path)
    for network in NETWORKS:
        of_it = {(named(row), float(row["level"])): row for row in rows
                 if row["network"] == network}  # fmt: skip
        levels = sorted({level for _, level in of_it}, reverse=True)
        fields = {
            method: [
                f"{float(row['accuracy_after']):.2%} at {float(row['ratio']):.2f}" if row else ""
                for row in (of_it.get((method, level)) for level in levels)
            ]
            for method, _ in of_it
        }
        lines += [
            f"| {network}, at most | " + " | ".join(map(str, levels)) + " |",
            "|---|" + "--:|" * len(levels),
            *(f"| {method} | {' | '.join(fields[method])} |"
              for method in sorted(fields, key=lambda method: fields[method], reverse=True)),
            "",
        ]  # fmt: skip
    return "\n".join(lines[:-1])


if __name__ == "__main__":
    main()
