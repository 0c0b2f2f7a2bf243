"""ResNet-20 for images of 32 x 32 pixels [he2016, sec. 4.2].

[he2016] He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, CVPR 2016.
"""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes.

    The paper pads the shortcut with zeros there; a projection leaves a search free to take
    channels from either side of it.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, in_channels, h, w)` -> `(batch, out_channels, h / stride, w / stride)`."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """A 3x3 stem, then three stages of blocks, each of half the side and twice the channels."""

    def __init__(self, width: int, n_blocks: int, n_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        in_channels = width
        for stage in range(3):
            for block in range(n_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Block(in_channels, width << stage, stride))
                in_channels = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(in_channels, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, 3, 32, 32)` -> `(batch, n_classes)` logits."""
        return self.classifier(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


def resnet20(width: int = 16) -> CifarResNet:
    """The sample's network: stages of 16, 32 and 64 channels, three blocks each."""
    return CifarResNet(width, 3, 10)
