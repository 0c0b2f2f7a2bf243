"""Ours beside what people would use instead: the same network, images, training and stopwatch.

ResNet-56 on CIFAR-10, brought to shares of its measured time (ONNX Runtime, one thread).
Every peer's knob is turned to the mildest setting that was measured to reach the share; then all
networks get their batch-norms recalibrated and the same fine-tuning (200 steps of 128 images, with
the original's answers), and the files are measured beside the original. Peers are optional:
those that are not installed are named and left out.

    pip install torch-pruning nvidia-modelopt
    python -m benchmarks.peers run --data cifar10-jpeg.zip --model resnet56.pt
    python -m benchmarks.peers report

Rows already in the CSV file are not measured again.
"""

import argparse
import copy
import csv
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compressor
from benchmarks.cifar import MEAN, STD, Block, add_inputs, load_cifar, load_resnet56
from compressor.bench import BATCH_SIZE, n_cores
from compressor.evaluate import accuracy
from compressor.export import export_onnx
from compressor.graph import cost
from compressor.latency.device import Device
from compressor.latency.onnxruntime import predictor
from compressor.latency.timing import FINAL, TRIAL, Effort
from compressor.recovery import recalibrate_batch_norm
from compressor.training import Recipe, fine_tune
from compressor.values import Data, LabelledImages, PairedLatency, draw

RESULTS = Path(__file__).parent / "results" / "peers.csv"
LEVELS = (0.75, 0.65, 0.42)
STRENGTHS = tuple(np.linspace(0.05, 0.9, 18).round(3).tolist())
N_FIT, N_SEARCH, N_TEST = 25_600, 2000, 10_000
TRAINING = Recipe(
    n_steps=N_FIT // 128, learning_rate=0.02, batch_size=128, distillation=0.7,
    augmentations=("flip", "crop"),
)  # fmt: skip
FIELDS = (
    "method", "level", "setting", "macs", "params", "ratio", "low", "high",
    "accuracy_before", "accuracy_after", "seconds",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Setting:
    """What every method gets."""

    base: nn.Module
    data: Data
    device: Device
    original_onnx: Path
    folder: Path

    def compare(self, network: nn.Module, effort: Effort) -> PairedLatency:
        """The network's file beside the original's."""
        file = self.folder / "candidate.onnx"
        export_onnx(network, self.example, file, opset=13)
        return self.device.compare(self.original_onnx, file, effort=effort, seed=0)

    def accuracy(self, network: nn.Module) -> float:
        """On the test split."""
        return accuracy(network, self.data.test, batch_size=BATCH_SIZE).value

    @property
    def example(self) -> Tensor:
        """One image."""
        return self.data.fit.model_input(slice(0, 1))


Prune = Callable[[Setting, float], nn.Module]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    add_inputs(runs)
    runs.add_argument("--methods", help="comma-separated; default all")
    runs.add_argument("--trials", type=int, default=60, help="of our searches")
    runs.add_argument("--csv", type=Path, default=RESULTS)
    commands.add_parser("report").add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.command == "run":
        run_all(args)
    else:
        print(report(args.csv))


def run_all(args: argparse.Namespace) -> None:
    """Every row that the CSV file lacks."""
    peers = available()
    wanted = (
        args.methods.split(",") if args.methods else [*peers, "greedy blocks", "random", "ours"]
    )
    known = {(row["method"], float(row["level"])) for row in read(args.csv)}
    with setting_of(args.data, args.model) as setting:
        for name in wanted:
            levels = [level for level in LEVELS if (name, level) not in known]
            if not levels:
                continue
            if name in ("ours", "random"):
                rows = by_compress(setting, args, name, levels)
            elif name == "greedy blocks":
                rows = by_strength(setting, name, levels, *greedy_blocks(setting))
            else:
                rows = by_strength(setting, name, levels, peers[name], STRENGTHS, 0.0)
            for row in rows:
                write(args.csv, row)
                print(row, flush=True)


@contextmanager
def setting_of(data_path: Path, model_path: Path) -> Iterator[Setting]:
    """The base network, its images, and an open device."""
    data = load_cifar(data_path, N_FIT, N_SEARCH, N_TEST)
    base = load_resnet56(model_path)
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
    strengths: Sequence[float],
    seconds_before: float,
) -> Iterator[dict[str, object]]:
    """For every level, the setting of most MACs among those measured to reach it."""
    began = time.perf_counter()
    measured: list[tuple[float, int, float]] = []  # strength, MACs, share of the time
    for strength in strengths:
        try:
            network = prune(setting, strength)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as err:
            print(f"{name} at {strength}: {type(err).__name__}: {err}", flush=True)
            continue
        macs = cost(network, setting.example).macs
        measured.append((strength, macs, 1 / setting.compare(network, TRIAL).ratio))
    spent = seconds_before + time.perf_counter() - began
    for level in levels:
        reaching = [m for m in measured if m[2] <= level]
        if reaching:
            strength = max(reaching, key=lambda m: m[1])[0]
            began = time.perf_counter()
            row = finished(setting, prune(setting, strength))
            yield row | {"method": name, "level": level, "setting": strength,
                         "seconds": round(spent + time.perf_counter() - began)}  # fmt: skip
        else:
            print(f"{name}: no setting reaches {level}", flush=True)


def finished(setting: Setting, network: nn.Module) -> dict[str, object]:
    """Recalibrated, trained and measured."""
    network = recalibrate_batch_norm(network, setting.data.fit, n_images=1024)
    tuned = fine_tune(
        network, setting.data.fit, TRAINING, teacher=setting.base,
        score=lambda model: accuracy(model, setting.data.search, batch_size=BATCH_SIZE).value,
        on_progress=lambda _progress: None, memory_format=torch.channels_last,
    )  # fmt: skip
    pair = setting.compare(tuned.model, FINAL)
    paper = cost(tuned.model, setting.example)
    return {
        "macs": paper.macs, "params": paper.params, **ratios(pair),
        "accuracy_before": setting.accuracy(network),
        "accuracy_after": setting.accuracy(tuned.model),
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
    images = setting.folder / "cifar.npz"
    if not images.is_file():
        splits = {
            "fit": setting.data.fit,
            "search": setting.data.search,
            "test": setting.data.test,
        }
        arrays = {}
        for split_name, split in splits.items():
            assert isinstance(split, LabelledImages)
            arrays[f"{split_name}_images"] = split.images[:].numpy()
            arrays[f"{split_name}_labels"] = split.labels.numpy()
        np.savez(images, **arrays)  # type: ignore[arg-type]
    weights = setting.folder / "model.pt"
    torch.save(setting.base.state_dict(), weights)
    for level in levels:
        began = time.perf_counter()
        config = compressor.load_config(weights, {
            "target": "host-cpu", "arch": "benchmarks.cifar:ResNet56", "data": images,
            "mean": MEAN, "std": STD,
            "speedup": 1 / level, "trials": args.trials, "fine_tune_epochs": 1,
            "batch_size": TRAINING.batch_size, "learning_rate": TRAINING.learning_rate,
            "distillation": TRAINING.distillation, "augment": TRAINING.augmentations,
            "out": setting.folder / f"{name}-{level}",
            **({"search": "random", "finalists": 1} if name == "random" else {}),
        })  # fmt: skip
        result = compressor.compress(config)
        seconds = time.perf_counter() - began
        if result.compressed is None:
            print(f"{name} at {level}: {result.verdict}", flush=True)
            continue
        yield {
            "method": name, "level": level, "setting": f"{args.trials} trials",
            "macs": result.compressed.macs, "params": result.compressed.params,
            **ratios(result.speedup), "accuracy_before": "",
            "accuracy_after": result.compressed.accuracy, "seconds": round(seconds),
        }  # fmt: skip


def available() -> dict[str, Prune]:
    """Peers that are installed, by name."""
    found: dict[str, Prune] = {"uniform widths": uniform_widths, "nni l1 uniform": nni_l1}
    if importlib.util.find_spec("torch_pruning"):
        for how in ("l1 uniform", "l1 global", "taylor global"):
            for step in (1, 8, 16):
                found[f"torch-pruning {how}, steps of {step}"] = torch_pruning(how, step)
    else:
        print("torch-pruning is not installed", flush=True)
    return found


def torch_pruning(how: str, step: int) -> Prune:
    """Torch-Pruning; its knob is the pruning ratio."""
    import torch_pruning as tp

    def prune(setting: Setting, strength: float) -> nn.Module:
        network = copy.deepcopy(setting.base)
        is_taylor = how.startswith("taylor")
        pruner = tp.pruner.MetaPruner(
            network, setting.example,
            importance=tp.importance.TaylorImportance() if is_taylor
            else tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=strength, global_pruning=how.endswith("global"),
            round_to=step if step > 1 else None, ignored_layers=[network.get_submodule("linear")],
        )  # fmt: skip
        if is_taylor:
            fit = setting.data.fit
            for rows in draw(fit, 512).split(64):
                images, labels = fit.batch(rows)
                F.cross_entropy(network(images), labels).backward()
        pruner.step()
        network.zero_grad(set_to_none=True)
        return network.eval()

    return prune


def uniform_widths(setting: Setting, strength: float) -> nn.Module:
    """The same share of every group's channels goes, the smallest by L1."""
    return compressor.prune(setting.base, setting.example, 1 - strength)


def nni_l1(setting: Setting, strength: float) -> nn.Module:
    """NNI's L1-norm pruner and ModelSpeedup, the same ratio everywhere."""
    from nni.compression.pruning import L1NormPruner
    from nni.compression.speedup import ModelSpeedup

    network = copy.deepcopy(setting.base)
    pruner = L1NormPruner(network, [{"op_types": ["Conv2d"], "sparse_ratio": strength}])
    _, masks = pruner.compress()
    pruner.unwrap_model()
    pruned: nn.Module = ModelSpeedup(network, setting.example, masks).speedup_model()
    return pruned.eval()


class Shortcut(nn.Module):
    """What is left of a block without its branch."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.stride, self.n_more = block.stride, block.n_more

    def forward(self, x: Tensor) -> Tensor:
        """As in `Block`, whose input is not negative."""
        if self.n_more:
            half = self.n_more // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return x


def greedy_blocks(setting: Setting) -> tuple[Prune, Sequence[float], float]:
    """The block whose loss costs least search accuracy goes, one at a time, 18 of 27 times."""
    began = time.perf_counter()
    names = [name for name, module in setting.base.named_modules() if isinstance(module, Block)]
    order: list[str] = []
    few = setting.data.search

    def without(gone: Sequence[str]) -> nn.Module:
        network = copy.deepcopy(setting.base)
        for name in gone:
            block = network.get_submodule(name)
            assert isinstance(block, Block)
            network.set_submodule(name, Shortcut(block))
        return network

    def value(gone: Sequence[str]) -> float:
        network = recalibrate_batch_norm(
            without(gone), setting.data.fit, n_images=256, memory_format=torch.channels_last
        )
        file = setting.folder / "blocks.onnx"
        batch = setting.example.expand(BATCH_SIZE, -1, -1, -1).contiguous()
        export_onnx(network, batch, file, opset=13)
        return accuracy(predictor(file, n_threads=n_cores()), few, batch_size=BATCH_SIZE).value

    while len(order) < 18:
        left = [name for name in names if name not in order]
        order.append(max(left, key=lambda name: value([*order, name])))
        print(f"block {len(order)}: {order[-1]}", flush=True)
    strengths = tuple(float(n) for n in range(1, len(order) + 1))
    seconds = time.perf_counter() - began
    return lambda _setting, n: without(order[: int(n)]), strengths, seconds


def read(path: Path) -> list[dict[str, str]]:
    """All rows so far."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, row: dict[str, object]) -> None:
    """Appends a row."""
    is_new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def report(path: Path) -> str:
    """A table, best accuracy first within each level."""
    lines = ["| time | method | setting | measured | MACs | params | before | after | seconds |",
             "|--:|---|--:|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    rows = sorted(read(path), key=lambda r: (-float(r["level"]), -float(r["accuracy_after"])))
    for row in rows:
        before = f"{float(row['accuracy_before']):.2%}" if row["accuracy_before"] else ""
        lines.append(
            f"| {row['level']} | {row['method']} | {row['setting']} | {row['ratio']} "
            f"[{row['low']}, {row['high']}] | {int(row['macs']) / 1e6:.1f} M | "
            f"{int(row['params']) / 1e3:.0f} k | {before} | {float(row['accuracy_after']):.2%} | "
            f"{row['seconds']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
