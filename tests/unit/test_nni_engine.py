"""NNI's engine: number by number what own surgery leaves, on what NNI alone cannot infer."""

import copy
import itertools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor.errors import EngineError, GraphError
from compressor.graph import channel_groups, cost, outputs
from compressor.prunable import make_prunable
from compressor.surgery import masked, prune_with_nni, remove_channels
from compressor.surgery.nni_engine import layers_for_nni, losses
from compressor.values import Example, Plan
from tests.conftest import INPUT_SHAPE, ConvNet, random_plan, randomised
from tests.unit.test_random_networks import HARD_CODED, Network, drawn, prepared
from tests.unit.test_random_networks import IMAGE as SIZE

IMAGE = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Padded(nn.Module):
    """A block of CIFAR's ResNets: its shortcut skips pixels and adds channels of zeros."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, n_out // n_in, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.n_more = n_out - n_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.n_more:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.n_more // 2, self.n_more // 2))
        return F.relu(x + y)


def cifar_resnet(n_blocks: int) -> nn.Module:
    """With three of them a stage it is ResNet-20."""
    widths = [16, *[16] * n_blocks, *[32] * n_blocks, *[64] * n_blocks]
    blocks = [Padded(a, b) for a, b in itertools.pairwise(widths)]
    stem = (nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*stem, *blocks, *_head(64))


def _head(width: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)


class BatchNormAct(nn.BatchNorm2d):
    """Batch-norm with an activation in it, as timm has it."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        return self.act(
            F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)
        )


class Shuffled(nn.Module):
    """ShuffleNet's unit: half of the channels pass, and both halves are mixed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 1), nn.BatchNorm2d(half), nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1, groups=half), nn.Conv2d(half, half, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        passed, worked = x.chunk(2, 1)
        x = torch.cat([passed, self.branch(worked)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class LayerNorm2d(nn.LayerNorm):
    """A LayerNorm over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """ConvNeXt's block: a norm of its own, linear layers on channels last, a learned scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spread = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = LayerNorm2d(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.spread(x)).permute(0, 2, 3, 1)
        return x + self.scale * self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


class Grid(nn.Module):
    """GRN's kind of scale: NNI has no rule for its tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.one, self.other = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.other.weight = self.one.weight
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.one(x) + self.other(x)).mean((2, 3))


class HalfTied(Tied):
    """One weight in a layer and in the code."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        more = F.conv2d(x, self.other.weight, self.other.bias, padding=1)
        return self.last(self.one(x) + more).mean((2, 3))


class Unfolded(nn.Module):
    """NNI's own inference has no way through `unfold`; for us it only locks what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.unfold(self.second(torch.relu(self.first(x))), 2)
        return self.head(x.view(1, 8, -1).mean(2))


def _between(*layers: nn.Module, width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *layers, *_head(width))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "padded shortcuts": lambda: cifar_resnet(2),
    "batch-norm with activation": lambda: _between(
        BatchNormAct(16), nn.Conv2d(16, 16, 3, groups=16), BatchNormAct(16), nn.Conv2d(16, 16, 1)
    ),
    "channel shuffle": lambda: _between(Shuffled(16), Shuffled(16)),
    "convnext": lambda: _between(ConvNeXt(16), LayerNorm2d(16), nn.Conv2d(16, 16, 1)),
    "grouped": lambda: _between(
        nn.Conv2d(16, 16, 3, groups=2), nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 1),
        nn.Conv2d(16, 32, 3, groups=8), nn.PReLU(32), nn.Conv2d(32, 16, 1),
    ),
    "transposed": lambda: _between(
        nn.ConvTranspose2d(16, 8, 2, stride=2), nn.InstanceNorm2d(8),
        nn.ConvTranspose2d(8, 16, 2, groups=2), nn.InstanceNorm2d(16, affine=True),
        nn.ConvTranspose2d(16, 32, 2, groups=8), nn.Conv2d(32, 16, 1),
    ),
    "without affine": lambda: _between(nn.BatchNorm2d(16, affine=False), nn.Conv2d(16, 16, 1)),
    "no rule": lambda: _between(Grid(16), nn.Conv2d(16, 16, 1)),
    "tied": Tied, "half tied": HalfTied, "unfold": Unfolded,
}  # fmt: skip


def assert_agrees(model: nn.Module, example: Example, plan: Plan | None = None) -> None:
    """NNI's network has own surgery's tensors and widths, and answers like the masked one."""
    prunable = make_prunable(model, example)
    plan = plan or random_plan(prunable.groups, np.random.default_rng(0))
    given = prunable.module, prunable.groups, plan
    before = copy.deepcopy(prunable.module.state_dict())
    own, by_nni = remove_channels(*given), prune_with_nni(given[0], example, *given[1:])
    assert repr(by_nni) == repr(own)
    assert by_nni.state_dict().keys() == own.state_dict().keys()
    assert all(torch.equal(t, own.state_dict()[key]) for key, t in by_nni.state_dict().items())
    torch.testing.assert_close(outputs(by_nni, example), outputs(own, example))
    expected = outputs(masked(*given), example)
    torch.testing.assert_close(outputs(by_nni, example), expected, rtol=1e-3, atol=1e-3)
    after = prunable.module.state_dict()
    assert all(torch.equal(before[key], value) for key, value in after.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_nni_agrees(name: str) -> None:
    model = randomised(NETWORKS[name]())
    free = [g for g in make_prunable(model, IMAGE).groups if g.locked_because is None]
    assert free
    assert_agrees(model, IMAGE)


@settings(max_examples=8, deadline=None)
@given(network=drawn(*HARD_CODED) | drawn(), seed=st.integers(0, 2**32 - 1))
def test_nni_agrees_on_random_networks(network: Network, seed: int) -> None:
    model = prepared(network).float()
    example = torch.randn(1, network.n_inputs, *SIZE, generator=torch.Generator().manual_seed(1))
    try:
        prunable = make_prunable(model, example)
    except GraphError:
        return
    plan = random_plan(prunable.groups, np.random.default_rng(seed))
    lost = losses(prunable.module, prunable.groups, plan)
    if lost and not layers_for_nni(prunable.module, example, lost):
        return
    by_nni = prune_with_nni(prunable.module, example, prunable.groups, plan)
    own = remove_channels(prunable.module, prunable.groups, plan).state_dict()
    assert all(torch.equal(own[key], tensor) for key, tensor in by_nni.state_dict().items())


class Words(nn.Module):
    """An embedding, convolutions along a sentence, attention, and batch-norm of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.conv, self.norm = nn.Conv1d(16, 24, 3, groups=2, padding=1), nn.BatchNorm1d(24)
        self.narrow = nn.Conv1d(24, 16, 1)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.hidden, self.vectors = nn.Linear(16, 12), nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(F.relu(self.norm(self.conv(self.embed(x).mT)))).mT
        return self.head(F.relu(self.vectors(self.hidden(self.encoder(x).mean(1)))))


def test_nni_agrees_on_a_network_for_words() -> None:
    model, sentence = randomised(Words()), torch.arange(9)[None]
    assert {g.name for g in channel_groups(model, sentence) if not g.locked_because} >= {
        "conv", "encoder.linear1", "hidden",
    }  # fmt: skip
    assert_agrees(model, sentence)


def test_layers_keep_what_else_they_are() -> None:
    """Class, momentum, flags, hooks, other names, and tensors shared with others."""
    model: Any = randomised(Tied())
    model.one.weight.requires_grad_(False)
    model.add_module("alias", model.first)
    seen: list[int] = []
    model.last.register_forward_hook(lambda *_: seen.append(1))
    plan = Plan({"first": (0, 2), "one": (1, 2, 3)})
    by_nni: Any = prune_with_nni(model, IMAGE, channel_groups(model, IMAGE), plan)
    assert by_nni.one.weight is by_nni.other.weight
    assert not by_nni.one.weight.requires_grad
    assert by_nni.alias is by_nni.first
    n_before = len(seen)
    by_nni(IMAGE)
    assert len(seen) == n_before + 1


@pytest.mark.parametrize("name", ["padded shortcuts", "channel shuffle", "convnext"])
def test_nni_makes_every_layer(name: str) -> None:
    """Own surgery cuts what is no layer, and only that."""
    model = randomised(NETWORKS[name]())
    groups = channel_groups(model, IMAGE)
    lost = losses(model, groups, random_plan(groups, np.random.default_rng(0)))
    rest = lost.keys() - layers_for_nni(model, IMAGE, lost).keys()
    assert {type(model.get_submodule(m)) for m in rest} <= {ConvNeXt}


def test_the_layers_are_those_of_nni(
    conv_net: ConvNet, example: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong rule of NNI's must show."""
    from nni.compression.speedup.replacement import replace_module

    right = replace_module["Conv2d"]

    def wrong(layer: nn.Module, masks: object) -> nn.Module:
        made: nn.Module = right(layer, masks)
        made.get_parameter("weight").data.mul_(2)
        return made

    monkeypatch.setitem(replace_module, "Conv2d", wrong)
    groups, plan = channel_groups(conv_net, example), Plan({"stem": (0, 3, 5)})
    by_nni = prune_with_nni(conv_net, example, groups, plan).get_parameter("stem.weight")
    own = remove_channels(conv_net, groups, plan).get_parameter("stem.weight")
    torch.testing.assert_close(by_nni, 2 * own)


@pytest.mark.parametrize("seed", range(3))
def test_nni_agrees_and_keeps_batch_norm(seed: int, example: Tensor) -> None:
    model = randomised(ConvNet(), seed)
    groups = channel_groups(model, example)
    plan = random_plan(groups, np.random.default_rng(seed))
    compact = remove_channels(model, groups, plan)
    by_nni = prune_with_nni(model, example, groups, plan)
    images = torch.randn(4, *INPUT_SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(by_nni(images), compact(images))
    assert cost(by_nni, example) == cost(compact, example)
    assert [m.momentum for m in by_nni.modules() if isinstance(m, nn.BatchNorm2d)] == [0.1, 0.1]


def test_nothing_to_remove_is_a_copy(conv_net: ConvNet, example: Tensor) -> None:
    by_nni = prune_with_nni(conv_net, example, channel_groups(conv_net, example), Plan({}))
    assert by_nni is not conv_net
    assert cost(by_nni, example) == cost(conv_net, example)


def test_no_layer_for_nni_is_an_error_of_ours() -> None:
    model = nn.Sequential(nn.Conv3d(3, 8, 1), nn.ReLU(), nn.Conv3d(8, 2, 1)).eval()
    volume = torch.randn(1, 3, 4, 4, 4)
    groups = channel_groups(model, volume)
    with pytest.raises(EngineError, match="NNI has no rule for any layer of Sequential"):
        prune_with_nni(model, volume, groups, Plan({"0": (1, 2)}))


def test_nni_failing_is_an_error_of_ours(
    conv_net: ConvNet, example: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NNI raises exceptions of its own family."""
    from nni.compression.speedup.error_code import EmptyLayerError
    from nni.compression.speedup.replacement import replace_module

    def refuse(layer: nn.Module, masks: object) -> nn.Module:
        raise EmptyLayerError

    monkeypatch.setitem(replace_module, "Conv2d", refuse)
    groups = channel_groups(conv_net, example)
    with pytest.raises(EngineError, match="NNI cannot process ConvNet: EmptyLayerError"):
        prune_with_nni(conv_net, example, groups, Plan({"stem": (0, 1)}))


def test_a_width_that_nni_leaves_is_an_error_of_ours(
    conv_net: ConvNet, example: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nni.compression.speedup.replacement import replace_module

    monkeypatch.setitem(replace_module, "Conv2d", lambda layer, masks: layer)
    groups = channel_groups(conv_net, example)
    plan = Plan({"hidden": (0, 1), "last": (0,)})
    with pytest.raises(EngineError, match="NNI"):
        prune_with_nni(conv_net, example, groups, plan)


def test_a_python_that_nni_does_not_know_is_an_error_of_ours(
    conv_net: ConvNet, example: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nni.compression.speedup", None)
    groups = channel_groups(conv_net, example)
    with pytest.raises(EngineError, match="NNI cannot be imported here"):
        prune_with_nni(conv_net, example, groups, Plan({"stem": (0, 1)}))


@pytest.mark.slow
@pytest.mark.parametrize("n_blocks", [3, 5, 9], ids=["resnet20", "resnet32", "resnet56"])
def test_nni_agrees_on_cifar_resnets(n_blocks: int) -> None:
    example = torch.randn(1, 3, 32, 32)
    assert_agrees(randomised(cifar_resnet(n_blocks)), example)
