"""Networks as people write them, for one rule each: proven, how much goes, and their ONNX file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

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


class CosineAttention(nn.Module):
    """Attention of heads whose queries and keys have unit length, as in Swin V2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x.flatten(2).transpose(1, 2)).reshape(-1, 64, 3, 2, 8)
        q, k, v = y.permute(2, 0, 3, 1, 4).unbind(0)
        k = k / k.norm(dim=-1, keepdim=True).expand(-1, 2, 64, 8)
        scores = F.normalize(q, dim=-1) @ k.transpose(-2, -1)
        y = (5 * scores).softmax(-1) @ v
        return x + self.proj(y.transpose(1, 2).reshape(-1, 64, 16)).transpose(1, 2).view_as(x)


def between(block: nn.Module, width: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.Tanh(), block,
        nn.Conv2d(width, 24, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(24, 5),
    )  # fmt: skip


IMAGE = torch.randn(1, 3, 16, 16)
FREED: dict[str, tuple[Callable[[], nn.Module], str, float]] = {  # form, share left at 0.5
    "global response norm": (lambda: between(ConvNextBlock(16)), PROGRAM, 0.60),
    "cbam": (lambda: between(Attended(16)), PROGRAM, 0.31),
    "deformable": (lambda: between(Deformed(16)), MODULE, 0.34),
    "cosine attention": (lambda: between(CosineAttention(16)), PROGRAM, 0.36),
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


def conv(n_in: int, n_out: int, **options: Any) -> nn.Sequential:
    """3x3 convolution, batch-norm, ReLU."""
    layer = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(n_out), nn.ReLU())


class Crnn(nn.Module):
    """Text in an image: convolutions, columns as a sequence, two recurrent layers."""

    def __init__(self, recurrent: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv(3, 16), nn.MaxPool2d(2), conv(16, 32), nn.MaxPool2d((2, 1)), conv(32, 64)
        )
        self.rnn = recurrent(64 * 4, 16, num_layers=2, bidirectional=True)
        self.head = nn.Linear(32, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = x.flatten(1, 2).permute(2, 0, 1)  # columns first
        x, _ = self.rnn(x)
        return self.head(x)


class SegNet(nn.Module):
    """Pooling hands its places to the unpooling of the other side."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([conv(3, 16), conv(16, 32)])
        self.up = nn.ModuleList([conv(32, 16), conv(16, 16)])
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        places = []
        for layer in self.down:
            x, index = F.max_pool2d(layer(x), 2, return_indices=True)
            places.append(index)
        for layer in self.up:
            x = layer(F.max_unpool2d(x, places.pop(), [2, 2]))
        return self.head(x)


class Siamese(nn.Module):
    """A crop is looked for in an image: its features are the filters of a convolution."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.features = nn.Sequential(conv(3, 16), nn.MaxPool2d(2), conv(16, 32), conv(32, 32))
        self.neck = nn.Conv2d(32, 32, 1)
        self.head = nn.Conv2d(32 if how == "each channel" else 1, 4, 1)

    def forward(self, crop: Tensor, image: Tensor) -> Tensor:
        z, x = (self.neck(self.features(each)) for each in (crop, image))
        if self.how == "each channel":
            b, c = z.shape[:2]
            z = z.reshape(b * c, 1, *z.shape[2:])
            y = F.conv2d(x.reshape(1, b * c, *x.shape[2:]), z, groups=b * c)
            return self.head(y.reshape(b, c, *y.shape[2:]))
        if self.how == "summed":
            return self.head(F.conv2d(x, z))
        y = z.flatten(2).transpose(1, 2) @ x.flatten(2)
        return self.head(y.mean(1).reshape(-1, 1, *x.shape[2:]))


CROP = torch.randn(1, 3, 8, 8)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Example, float]] = {  # share left at 0.5
    "crnn, lstm": (lambda: Crnn(nn.LSTM), torch.randn(1, 3, 16, 24), 0.49),
    "crnn, gru": (lambda: Crnn(nn.GRU), torch.randn(1, 3, 16, 24), 0.46),
    "segnet": (SegNet, IMAGE, 0.27),
    "siamese, each channel": (lambda: Siamese("each channel"), (CROP, IMAGE), 0.27),
    "siamese, summed": (lambda: Siamese("summed"), (CROP, IMAGE), 0.27),
    "siamese, pixel by pixel": (lambda: Siamese("pixels"), (CROP, IMAGE), 0.27),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_as_people_write_them(name: str, tmp_path: Path) -> None:
    make, example, most = NETWORKS[name]
    share, prunable = halved(make(), example)
    assert prunable.form == MODULE
    assert share <= most
    if name != "segnet":  # ONNX has no unpooling
        small = compressor.prune(prunable.module, example, 0.5)
        compressor.export_onnx(small, example, tmp_path / "a.onnx")  # compares with torch


class Csp(nn.Module):
    """As in YOLO11: half of the channels by a number in the code, attention over pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c = width // 2
        self.one, self.two = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.all, self.out = nn.Conv2d(self.c, 2 * self.c, 1), nn.Conv2d(self.c, self.c, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, y = self.one(x).split((self.c, self.c), 1)
        b, _, h, w = y.shape
        parts = self.all(y).view(b, 2, self.c, h * w)  # two heads
        q, k, v = parts.split([self.c // 4, self.c // 4, self.c // 2], 2)
        weights = (q.transpose(-2, -1) @ k * (self.c // 4) ** -0.5).softmax(-1)
        y = y + self.out((v @ weights.transpose(-2, -1)).reshape(b, self.c, h, w))
        return self.two(torch.cat([a, y], 1))


def test_a_program_takes_the_image_sizes_that_its_network_takes() -> None:
    network = between(Csp(32), 32)
    share, prunable = halved(network, IMAGE)
    assert prunable.form == PROGRAM
    assert share <= 0.27
    assert "3.all#heads" in {group.name for group in prunable.groups}
    small = compressor.prune(network, IMAGE, 0.5)
    for shape in ((1, 3, 24, 16), (3, 3, 40, 56)):
        images = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(prunable.module(images), network(images))
            assert small(images).shape == (len(images), 5)
            alone = torch.cat([small(image[None]) for image in images])
            torch.testing.assert_close(small(images), alone)


class Stylised(nn.Module):
    """Instance norm of three images that are put together within the network."""

    def __init__(self, is_affine: bool, is_tracked: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3)
        self.norm = nn.InstanceNorm2d(16, affine=is_affine, track_running_stats=is_tracked)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        seen = self.two(F.relu(self.norm(self.one(torch.cat([x, y, z])))))
        return torch.stack(seen.mean((2, 3)).chunk(3), 1)


@pytest.mark.parametrize("is_tracked", [False, True])
@pytest.mark.parametrize("is_affine", [False, True])
def test_instance_norm_of_several_images_is_free(
    is_affine: bool, is_tracked: bool, tmp_path: Path
) -> None:
    images = tuple(torch.randn(3, 1, 3, 12, 12))
    share, prunable = halved(Stylised(is_affine, is_tracked), images)
    assert prunable.form == MODULE
    assert share <= 0.55
    small = compressor.prune(prunable.module, images, 0.5)
    compressor.export_onnx(small, images, tmp_path / "a.onnx")  # compares with torch


class FusedBias(nn.Module):
    """As in BEiT and EVA: the bias of Q, K and V is put together in the forward pass."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_bias, self.v_bias = (
            nn.Parameter(torch.zeros(width)),
            nn.Parameter(torch.ones(width)),
        )
        self.k_bias = nn.Buffer(torch.zeros(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        rows = x.flatten(2).transpose(1, 2)
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        qkv = F.linear(rows, self.qkv.weight, bias).reshape(b, h * w, 3, self.n_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * (c // self.n_heads) ** -0.5).softmax(-1)
        rows = self.out((weights @ v).transpose(1, 2).reshape(b, h * w, -1))
        return x + rows.transpose(1, 2).reshape(b, c, h, w)


def test_a_bias_put_together_from_parameters_is_free(tmp_path: Path) -> None:
    network = between(FusedBias(32, 4), 32)
    share, prunable = halved(network, IMAGE)
    assert share <= 0.4
    assert prunable.form == PROGRAM
    assert isinstance(prunable.module.get_submodule("3.qkv"), nn.Linear)
    small = compressor.prune(network, IMAGE, 0.5)
    compressor.export_onnx(small, IMAGE, tmp_path / "a.onnx")  # compares with torch
