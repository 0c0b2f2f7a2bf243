"""Recalibration of batch-norm against its closed form."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from compressor.recovery import recalibrate_batch_norm
from compressor.values import LabelledImages
from tests.conftest import INPUT_SHAPE, ConvNet


def split(n: int = 128) -> LabelledImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, *INPUT_SHAPE, generator=generator) + 2.0
    return LabelledImages(images, torch.randint(0, 5, (n,), generator=generator))


def test_statistics_are_the_plain_mean_over_batches(conv_net: ConvNet) -> None:
    """One batch of everything, and then several: unbiased variance, averaged over batches."""
    data = split(96)
    with torch.no_grad():
        output = conv_net.stem(data.images)
    recalibrated = recalibrate_batch_norm(conv_net, data, n_images=96, batch_size=96)
    assert isinstance(recalibrated, ConvNet)
    mean, variance = output.mean((0, 2, 3)), output.var((0, 2, 3))
    torch.testing.assert_close(recalibrated.norm.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(recalibrated.norm.running_var, variance, rtol=1e-4, atol=1e-5)
    several = recalibrate_batch_norm(conv_net, data, n_images=96, batch_size=32)
    assert isinstance(several, ConvNet)
    torch.testing.assert_close(several.norm.running_mean, mean, rtol=1e-4, atol=1e-5)
    assert several.norm.running_var is not None
    assert not torch.allclose(several.norm.running_var, variance, rtol=1e-6)


def test_statistics_do_not_depend_on_the_order_of_the_classes() -> None:
    """Folders are read class by class; the first images alone would be of one class."""
    norm = nn.BatchNorm2d(1)
    images = torch.arange(1000.0).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    data = LabelledImages(images, torch.arange(1000) // 100)
    recalibrated = recalibrate_batch_norm(norm.eval(), data, n_images=200, batch_size=50)
    mean = recalibrated.get_buffer("running_mean").item()
    assert abs(mean - 499.5) < 5 * 289 / 200**0.5  # five standard errors; the first 200 give 99.5


def test_recalibration_changes_only_a_copys_statistics(conv_net: ConvNet) -> None:
    before = copy.deepcopy(conv_net.state_dict())
    recalibrated = recalibrate_batch_norm(conv_net, split())
    assert all(torch.equal(before[k], v) for k, v in conv_net.state_dict().items())
    changed = {k for k, v in recalibrated.state_dict().items() if not torch.equal(before[k], v)}
    assert {k.split(".")[1] for k in changed} == {
        "running_mean", "running_var", "num_batches_tracked",
    }  # fmt: skip
    assert not recalibrated.training
    assert [m.momentum for m in recalibrated.modules() if isinstance(m, nn.BatchNorm2d)] == [
        0.1, 0.1,
    ]  # fmt: skip


def test_one_image_cannot_wipe_the_statistics(conv_net: ConvNet) -> None:
    recalibrated = recalibrate_batch_norm(conv_net, split(1))
    before = conv_net.state_dict()
    assert all(torch.equal(before[k], v) for k, v in recalibrated.state_dict().items())


def test_dropout_stays_off_while_recalibrating() -> None:
    norm = nn.BatchNorm2d(1)
    net = nn.Sequential(nn.Dropout(0.9), norm).eval()
    data = split()
    recalibrated = recalibrate_batch_norm(net, data, n_images=128, batch_size=64)
    torch.testing.assert_close(
        recalibrated.get_buffer("1.running_mean"),
        data.model_input(slice(None)).mean((0, 2, 3)),
        rtol=1e-4,
        atol=1e-4,
    )


def lazy_norm(n_channels: int) -> nn.Module:
    norm = nn.LazyBatchNorm2d()
    norm(torch.rand(2, n_channels, 4, 4))
    return norm


NORMS = [
    nn.BatchNorm2d, nn.SyncBatchNorm, lazy_norm,
    lambda n: nn.InstanceNorm2d(n, track_running_stats=True),
]  # fmt: skip


@pytest.mark.parametrize("make", NORMS)
def test_every_norm_that_keeps_statistics_is_recalibrated(
    make: Callable[[int], nn.Module],
) -> None:
    norm = make(3)
    images = torch.randn(200, 3, 4, 4) * 3 + 2
    data = LabelledImages(images, torch.zeros(200, dtype=torch.long))
    found = recalibrate_batch_norm(norm.eval(), data, n_images=200, batch_size=50)
    torch.testing.assert_close(
        found.get_buffer("running_mean"), images.mean((0, 2, 3)), rtol=1e-3, atol=1e-3
    )
