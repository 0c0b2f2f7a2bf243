"""Hints: a pruned network is to read, deep within, what the original reads there.

FitNets [romero2015] let a thin student follow one layer of its teacher, through a regressor that
is learned because the student's channels are others. Those of a pruned network are the teacher's
own, so here nothing is learned: where a layer still reads channels 3 and 5, they are to be what
the original's layer reads as channels 3 and 5. Deviations: several layers instead of one, the last
that reads maps of each size; their hints act along with the labels, not before them.

[romero2015] Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from compressor.containers import tensors_in
from compressor.running import cloned
from compressor.values import Example, Kept, call
from compressor.watching import See, watched

Read = dict[str, Tensor]
Hints = Mapping[str, Tensor | None]  # layer -> which of the channels it read are left; None: all

NO_HINTS: Hints = {}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def choose_hints(original: nn.Module, pruned: nn.Module, kept: Kept, example: Example) -> Hints:
    """The last layer of both networks that reads maps of each size.

    Args:
        original: In eval mode.
        pruned: The same with fewer channels and layers.
        kept: (tensor, dimension) -> which positions of the original's tensor are left.
        example: As both take it.
    """
    last: dict[torch.Size, str] = {}
    left = _read_by(pruned, example)
    for name, tensor in _read_by(original, example).items():
        if name in left:
            last[_map_size(original.get_submodule(name), tensor)] = name
    masks = {name: kept.get((f"{name}.weight", 1)) for name in last.values()}
    return {
        name: None if mask is None else torch.from_numpy(np.flatnonzero(mask))
        for name, mask in masks.items()
    }


def keep(kept: Read) -> See:
    """Keeps what every layer read last, in the order they read it."""

    def see(name: str, read: Tensor, _answer: Tensor) -> None:
        kept.pop(name, None)
        kept[name] = read

    return see


def hint_loss(student: nn.Module, hints: Hints, read: Read, wanted: Read) -> Tensor:
    """Mean over the hints of the squared distance, as a share of the original's variance.

    Args:
        student: Whose layers they are.
        hints: As chosen.
        read: What the student's layers read.
        wanted: What the original's did.
    """
    losses = []
    for name, index in hints.items():
        target = wanted[name].detach().float()
        if index is not None:
            is_linear = isinstance(student.get_submodule(name), nn.Linear)
            target = target.index_select(-1 if is_linear else 1, index.to(target.device))
        losses.append((read[name].float() - target).square().mean() / (target.var() + 1e-12))
    return torch.stack(losses).mean()


def _read_by(network: nn.Module, example: Example) -> Read:
    """What every layer reads whose weight has a column for each channel of it, but the inputs."""
    plain = [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, CONVOLUTIONS) and layer.groups == 1)
    ]
    read: Read = {}
    own = cloned(example)  # the network may write over it
    with watched(network, plain, keep(read)), torch.inference_mode():
        call(network, own)
    given = {id(tensor) for tensor in tensors_in(own)}
    return {name: tensor for name, tensor in read.items() if id(tensor) not in given}


def _map_size(layer: nn.Module, read: Tensor) -> torch.Size:
    return read.shape[1:-1] if isinstance(layer, nn.Linear) else read.shape[2:]
