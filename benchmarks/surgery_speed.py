"""What it takes to prune ResNet-50 to half its channels: compressor, NNI and Torch-Pruning.

    python benchmarks/surgery_speed.py [NAME ...]

Seconds on this machine, all in one process, one engine after the other; the best of several runs
where a run takes less than a second. Torch-Pruning is a dependency of this benchmark only
(`pip install torch-pruning`) and is left out where it is missing. Every engine prunes the same
randomly initialised torchvision network in eval mode; "right" compares its answer with that of
the masked original, or says which channels it took instead.
"""

import copy
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import models

from compressor.errors import EngineError
from compressor.graph import channel_groups, cost
from compressor.search.space import make_space
from compressor.surgery import masked, prune_with_nni, remove_channels


def best_s(work: Callable[[], Any], n_runs: int = 5) -> tuple[float, Any]:
    """The shortest of several runs; one run where it takes more than a second."""
    times = []
    for _ in range(n_runs):
        began = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - began)
        if times[-1] > 1:
            break
    return min(times), result


def torch_pruning(model: nn.Module, example: Tensor) -> nn.Module:
    """Torch-Pruning's magnitude pruner at ratio 0.5, as in its README."""
    import torch_pruning as tp

    victim = copy.deepcopy(model).requires_grad_(True)
    last = [m for m in victim.modules() if isinstance(m, nn.Linear)][-1]
    with torch.enable_grad():
        pruner = tp.pruner.MagnitudePruner(
            victim, example, importance=tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=0.5, ignored_layers=[last],
        )  # fmt: skip
        pruner.step()
    return victim.eval()


def row(engine: str, seconds: float, paper: float, note: str) -> None:
    """Prints one line of the table."""
    print(f"| {engine} | {seconds:.3f} | {paper:.2f} | {note} |", flush=True)


def compare(name: str) -> None:
    """One table for the torchvision network `name`."""
    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval()
    example = torch.randn(1, 3, 224, 224)
    whole = cost(model, example).params
    print(f"\n{name}, 224 pixels, {torch.get_num_threads()} threads\n")
    print("| engine | seconds | M parameters left | answer |\n|---|---|---|---|")

    groups_s, groups = best_s(lambda: channel_groups(model, example))
    row("compressor: groups, once a network", groups_s, whole / 1e6, "")
    scores = {g.name: np.arange(g.n_channels, dtype=np.float64) for g in groups}
    space = make_space(groups, scores, step=1, min_keep_ratio=0.0)
    (widths,) = space.snap(np.full((1, len(space.groups)), 0.5))
    plan = space.plan(widths)
    seconds, compact = best_s(lambda: remove_channels(model, groups, plan))
    with torch.no_grad():
        expected, got = masked(model, groups, plan)(example), compact(example)
    error = float((expected - got).abs().max() / expected.abs().max())
    left = cost(compact, example).params / 1e6
    row("compressor: surgery, every plan", seconds, left, f"off by {error:.0e} of the largest")

    try:
        seconds, by_nni = best_s(lambda: prune_with_nni(model, example, groups, plan))
    except EngineError as err:
        row("NNI ModelSpeedup", float("nan"), float("nan"), str(err)[:80])
    else:
        with torch.no_grad():
            error = float((expected - by_nni(example)).abs().max() / expected.abs().max())
        left = cost(by_nni, example).params / 1e6
        row("NNI ModelSpeedup", seconds, left, f"off by {error:.0e} of the largest")

    if importlib.util.find_spec("torch_pruning") is None:
        print("\nTorch-Pruning is not installed.")
        return
    try:
        seconds, theirs = best_s(lambda: torch_pruning(model, example))
        with torch.no_grad():
            theirs(example)
    except (RuntimeError, ValueError, AttributeError, KeyError, AssertionError) as err:
        row("Torch-Pruning", float("nan"), float("nan"), f"fails: {str(err)[:80]}")
    else:
        left = cost(theirs, example).params / 1e6
        row("Torch-Pruning: graph and pruning", seconds, left, "other channels; it runs")


if __name__ == "__main__":
    for network in sys.argv[1:] or ["resnet50"]:
        compare(network)
