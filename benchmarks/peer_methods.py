"""How others make a network smaller: each method has one knob, from 0 (nothing) towards 1.

Peers are optional; those that are not installed are named and left out.

    pip install torch-pruning nvidia-modelopt torchprofile==0.0.4
"""

import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compressor
from compressor.evaluate import accuracy
from compressor.export import export_onnx
from compressor.latency.device import Device
from compressor.latency.onnxruntime import predictor
from compressor.latency.timing import Effort
from compressor.prunable import Prunable, make_prunable, with_branches
from compressor.recovery import recalibrate_batch_norm
from compressor.rows import BATCH_SIZE, one_tensor
from compressor.values import Data, PairedLatency, Plan, Role, Split, draw

N_RANKING = 512  # images of gradients
N_SCORED = 1000  # images that blocks and layers are judged by, one at a time


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

    def accuracy(self, network: nn.Module, split: Split) -> float:
        """By ONNX Runtime, as in a trial."""
        file = self.folder / "batch.onnx"
        export_onnx(network, split.model_input(slice(0, BATCH_SIZE)), file, opset=13)
        return accuracy(predictor(file, n_threads=1), split, batch_size=BATCH_SIZE).value

    def score(self, network: nn.Module) -> float:
        """On some images of the search split, as it is."""
        split, n_right = self.data.search, 0
        with torch.inference_mode():
            for rows in draw(split, N_SCORED).split(BATCH_SIZE):
                images, labels = split.batch(rows)
                answers = network(one_tensor(images).to(memory_format=torch.channels_last))
                n_right += int((answers.argmax(dim=1) == labels).sum())
        return n_right / N_SCORED

    @property
    def example(self) -> Tensor:
        """One image."""
        return one_tensor(self.data.fit.model_input(slice(0, 1)))


Prune = Callable[[Setting, float], nn.Module]


def available() -> dict[str, Prune]:
    """Peers that are installed, by name."""
    found: dict[str, Prune] = {
        "uniform widths": uniform_widths,
        "nni l1 uniform": or_inner_layers(_nni_pruned),
        "greedy blocks": GreedyBlocks(),
    }
    if importlib.util.find_spec("torch_pruning"):
        for how in ("l1 uniform", "l1 global", "taylor global"):
            for step in (1, 8, 16):
                found[f"torch-pruning {how}, steps of {step}"] = torch_pruning(how, step)
    else:
        print("torch-pruning is not installed", flush=True)
    if importlib.util.find_spec("modelopt"):
        for step in (8, 16):
            found[f"modelopt fastnas, steps of {step}"] = fastnas(step)
    else:
        print("nvidia-modelopt is not installed", flush=True)
    return found


def torch_pruning(how: str, step: int) -> Prune:
    """Torch-Pruning; its knob is the pruning ratio."""
    return or_inner_layers(
        lambda setting, strength, ignored: _torch_pruned(setting, strength, how, step, ignored)
    )


def or_inner_layers(prune: Callable[[Setting, float, list[str]], nn.Module]) -> Prune:
    """Once what comes out cannot run, or is wrong, only layers that no sum ties are pruned.

    Neither Torch-Pruning nor NNI follows shortcuts that pad channels.
    """
    outer: list[str] = []

    def tried(setting: Setting, strength: float) -> nn.Module:
        if not outer:
            try:
                return prune(setting, strength, [])
            except (RuntimeError, ValueError, IndexError) as err:
                print(f"{type(err).__name__}; inner layers only", flush=True)
            groups = compressor.channel_groups(setting.base, setting.example)
            tied = [g.modules(Role.PRODUCER) for g in groups]
            outer.extend(name for names in tied if len(names) > 1 for name in names)
        return prune(setting, strength, outer)

    return tried


def _torch_pruned(
    setting: Setting, strength: float, how: str, step: int, ignored: list[str]
) -> nn.Module:
    import torch_pruning as tp

    network = copy.deepcopy(setting.base)
    heads = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    is_taylor = how.startswith("taylor")
    pruner = tp.pruner.MetaPruner(
        network, setting.example,
        importance=tp.importance.TaylorImportance() if is_taylor
        else tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=strength, global_pruning=how.endswith("global"),
        round_to=step if step > 1 else None,
        ignored_layers=[network.get_submodule(name) for name in (*heads, *ignored)],
    )  # fmt: skip
    if is_taylor:
        fit = setting.data.fit
        for rows in draw(fit, N_RANKING).split(64):
            images, labels = fit.batch(rows)
            F.cross_entropy(network(images), labels).backward()
    silenced = copy.deepcopy(setting.base)  # in which the removed channels are 0 instead
    twins = dict(zip(network.modules(), silenced.modules(), strict=True))
    for group in pruner.step(interactive=True):
        for dependency, channels in group:
            norm = twins.get(dependency.target.module)
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.data[channels] = norm.bias.data[channels] = 0
        group.prune()
    network.zero_grad(set_to_none=True)
    network.eval()
    with torch.inference_mode():
        if not torch.allclose(network(setting.example), silenced(setting.example), atol=1e-3):
            raise ValueError("the network without the channels is not the one where they are 0")
    return network


def fastnas(step: int) -> Prune:
    """NVIDIA Model Optimizer's FastNAS; its knob is the share of FLOPs that goes.

    How sensitive each layer is, is measured once and kept.
    """

    def prune(setting: Setting, strength: float) -> nn.Module:
        import modelopt.torch.prune as mtp

        ratios = tuple(step * i / 1024 for i in range(1, 1024 // step + 1))
        conv = {"*": {"channels_ratio": ratios, "kernel_size": (), "channel_divisor": step}}
        other = {"*": {"features_ratio": ratios, "feature_divisor": step}}
        network, _ = mtp.prune(
            copy.deepcopy(setting.base),
            mode=[("fastnas", {"nn.Conv2d": conv, "nn.BatchNorm2d": other, "nn.Linear": other})],
            constraints={"flops": f"{100 * (1 - strength):.1f}%"},
            dummy_input=setting.example,
            config={
                "data_loader": list(_calibration(setting.data.fit)), "score_func": setting.score,
                "checkpoint": str(setting.folder / f"fastnas-{step}.pth"), "verbose": False,
            },
        )  # fmt: skip
        pruned: nn.Module = network.eval()
        return pruned

    return prune


def _calibration(fit: Split) -> Iterator[tuple[Tensor]]:
    """What FastNAS takes batch-norm statistics of, for every candidate."""
    for rows in draw(fit, 256).split(64):
        yield (one_tensor(fit.model_input(rows)),)


def uniform_widths(setting: Setting, strength: float) -> nn.Module:
    """The same share of every group's channels goes, the smallest by L1."""
    return compressor.prune(setting.base, setting.example, 1 - strength)


def _nni_pruned(setting: Setting, strength: float, ignored: list[str]) -> nn.Module:
    """NNI's L1-norm pruner and ModelSpeedup, the same ratio everywhere."""
    from nni.compression.pruning import L1NormPruner
    from nni.compression.speedup import ModelSpeedup

    network = copy.deepcopy(setting.base)
    wanted = {"op_types": ["Conv2d"], "sparse_ratio": strength, "exclude_op_names": ignored}
    pruner = L1NormPruner(network, [wanted])
    _, masks = pruner.compress()
    pruner.unwrap_model()
    graph = torch.fx.symbolic_trace(network)
    speedup = ModelSpeedup(network, setting.example, masks, graph_module=graph)
    pruned: nn.Module = speedup.speedup_model().eval()
    with torch.inference_mode():
        pruned(setting.example)
    return pruned


class GreedyBlocks:
    """The branch whose loss costs least accuracy goes, one at a time, two thirds of all."""

    def __init__(self) -> None:
        self._prunable: Prunable | None = None
        self._order: list[str] = []

    def __call__(self, setting: Setting, strength: float) -> nn.Module:
        """Without so large a share of the branches, rounded down."""
        if self._prunable is None:
            self._prunable = with_branches(
                make_prunable(setting.base, setting.example), setting.example
            )
            self._find_order(setting, self._prunable)
        n_gone = int(strength * len(self._prunable.branches))
        if not 0 < n_gone <= len(self._order):
            raise ValueError(f"{n_gone} branches are not to go")
        return self._prunable.without(Plan({}, tuple(self._order[:n_gone])))

    def _find_order(self, setting: Setting, prunable: Prunable) -> None:
        def value(name: str) -> float:
            network = prunable.without(Plan({}, (*self._order, name)))
            network = recalibrate_batch_norm(
                network, setting.data.fit, n_images=256, memory_format=torch.channels_last
            )
            return setting.score(network)

        names = {branch.name for branch in prunable.branches}
        while len(self._order) < 2 * len(names) // 3:
            self._order.append(max(sorted(names - set(self._order)), key=value))
            print(f"block {len(self._order)}: {self._order[-1]}", flush=True)
