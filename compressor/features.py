"""What channels answer to real images: mean maps, and how well each tells classes apart."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from compressor.values import ChannelGroup, Example, Role, call
from compressor.watching import watched

FloatArray = npt.NDArray[np.float64]


def channel_maps(
    model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[tuple[Example, Tensor]]
) -> dict[str, tuple[FloatArray, FloatArray]]:
    """Group's name -> (mean maps, Fisher ratios) of what its first producer writes.

    Mean maps are `(n_channels, h, w)`, of signals `(n_channels, length)` and so on, before any
    norm; Fisher ratios `(n_channels,)`, the variance of the pooled maps between classes divided by
    that within them. Groups whose channels are no maps, or stand for several positions, are left
    out.

    Args:
        model: In eval mode; not changed.
        groups: Its channel groups.
        batches: Images and labels.
    """
    producers = {
        g.modules(Role.PRODUCER)[0]: g for g in groups if g.locked_because is None and g.unit == 1
    }
    layers = dict(model.named_modules())
    sums: dict[str, Tensor] = {}
    pooled: dict[str, list[Tensor]] = {}

    def add(name: str, _read: Tensor, answer: Tensor) -> None:
        if isinstance(layers[name], nn.modules.conv._ConvNd):
            total = answer.double().sum(dim=0)
            sums[name] = sums[name] + total if name in sums else total
            pooled.setdefault(name, []).append(answer.double().flatten(2).mean(dim=2))

    labels = []
    with watched(model, producers, add), torch.inference_mode():
        for images, of_images in batches:
            call(model, images)
            labels.append(of_images)
    classes = torch.cat(labels).numpy()
    found = {}
    for name, total in sums.items():
        group = producers[name]
        index = next(
            s.index[:, 0] for s in group.slices if s.module == name and s.role is Role.PRODUCER
        )
        answers = torch.cat(pooled[name]).numpy()[:, index]
        maps = total.numpy()[index] / len(classes)
        found[group.name] = maps, fisher_ratios(answers, classes)
    return found


def fisher_ratios(answers: FloatArray, classes: npt.NDArray[np.int64]) -> FloatArray:
    """`(n_channels,)` of `(n_images, n_channels)`: variance between classes / within them."""
    centre = answers.mean(axis=0)
    between, within = np.zeros(answers.shape[1]), np.zeros(answers.shape[1])
    for label in np.unique(classes):
        own = answers[classes == label]
        between += len(own) * (own.mean(axis=0) - centre) ** 2
        within += ((own - own.mean(axis=0)) ** 2).sum(axis=0)
    ratios: FloatArray = between / np.maximum(within, 1e-12)
    return ratios
