"""Networks as people write them, for one rule each: proven, how much goes, and their ONNX file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import compressor
from compressor.prunable import MODULE, PROGRAM, Prunable, disagreement, make_prunable
from compressor.values import Example
from tests.conftest import random_plan, randomised


def halved(network: nn.Module, example: Example) -> tuple[float, Prunable]:
    """Share of the parameters that a keep ratio of 0.5 leaves, proven, and the network."""
    prunable = make_prunable(randomised(network.eval()), example)
    for seed in range(3):
        plan = random_plan(prunable.groups, np.random.default_rng(seed))
        assert disagreement(prunable, plan, example) is None
    small = compressor.prune(network, example, 0.5)
    return n_params(small) / n_params(network), prunable


def n_params(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


class ResponseNorm(nn.Module):
    """Global response norm, as in ConvNeXt V2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 1, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        over_space = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        share = over_space / (over_space.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * share) + self.beta + x


class ConvNextBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.response = ResponseNorm(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.down(self.response(F.gelu(self.up(y))))
        return x + y.permute(0, 3, 1, 2)


class Attended(nn.Module):
    """CBAM: means and maxima over pixels gate channels, those over channels gate pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze, self.expand = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)
        self.pixels = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)
        x = x * sum(self.expand(F.relu(self.squeeze(p))) for p in pooled).sigmoid()
        most, _ = torch.max(x, dim=1, keepdim=True)
        return x * self.pixels(torch.cat([x.mean(1, keepdim=True), most], 1)).sigmoid()


class Deformed(nn.Module):
    """Deformable convolution v2: offsets and a mask of their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.where = nn.Conv2d(width, 18, 3, padding=1)
        self.mask = nn.Conv2d(width, 9, 3, padding=1)
        self.conv = torchvision.ops.DeformConv2d(width, 2 * width, 3, padding=1)
        self.last = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(x, self.where(x), self.mask(x).sigmoid()).relu())


def between(block: nn.Module, width: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.Tanh(), block,
        nn.Conv2d(width, 24, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip


IMAGE = torch.randn(1, 3, 16, 16)
FREED: dict[str, tuple[Callable[[], nn.Module], str, float]] = {  # form, share left at 0.5
    "global response norm": (lambda: between(ConvNextBlock(16)), PROGRAM, 0.60),
    "cbam": (lambda: between(Attended(16)), PROGRAM, 0.31),
    "deformable": (lambda: between(Deformed(16)), MODULE, 0.34),
}


@pytest.mark.parametrize("name", FREED)
def test_more_goes_exactly(name: str, tmp_path: Path) -> None:
    make, form, most = FREED[name]
    share, prunable = halved(make(), IMAGE)
    assert prunable.form == form
    assert share <= most
    if name != "deformable":  # which ONNX has from opset 19 on
        small = compressor.prune(prunable.module, IMAGE, 0.5)
        compressor.export_onnx(small, IMAGE, tmp_path / "a.onnx")  # compares with torch
