"""A small U-Net: what goes down is put beside what comes up, so groups are concatenated."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two 3x3 convolutions with batch-norm."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Three levels down and up again [ronneberger2015], with padding so that sizes stay."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.down1 = double_conv(1, width)
        self.down2 = double_conv(width, 2 * width)
        self.bottom = double_conv(2 * width, 4 * width)
        self.up2 = double_conv(6 * width, 2 * width)
        self.up1 = double_conv(3 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, 1, h, w)` -> `(batch, 1, h, w)`: logit of every pixel to belong to a digit."""
        fine = self.down1(x)
        middle = self.down2(F.max_pool2d(fine, 2))
        coarse = self.bottom(F.max_pool2d(middle, 2))
        middle = self.up2(torch.cat([F.interpolate(coarse, scale_factor=2.0), middle], dim=1))
        fine = self.up1(torch.cat([F.interpolate(middle, scale_factor=2.0), fine], dim=1))
        mask: Tensor = self.head(fine)
        return mask


def make() -> UNet:
    """The network that is compressed."""
    return UNet()
