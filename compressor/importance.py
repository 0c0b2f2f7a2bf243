"""Strategies: a score for every channel of a group, the smaller the less it is missed.

[li2017] Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, sec. 3.1.
[fan2022] Fan, Mu, Zhang, Bayesian Optimization with Clustering and Rollback for CNN Auto
    Pruning, ECCV 2022: the L1 norm per *input* channel of the layer that reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from compressor.values import ChannelGroup, ChannelSlice, Role


class Importance(Protocol):
    """One score per channel."""

    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor:
        """`(group.n_channels,)` float64, non-negative and finite, on the CPU."""


@dataclass(frozen=True)
class WeightNorm:
    """Sum of |w|^p over the weights that read a channel [fan2022, code].

    [li2017] sums over the filter that writes the channel instead. Where batch-norm follows, that
    filter can be scaled at will without changing the network, so its norm says little:
    `benchmarks/importance_side.py` has readers ahead of filters, and neither clearly ahead of
    chance once batch-norm is recalibrated.
    A group that nothing reads is ranked by its filters.

    Attributes:
        p: Order of the norm; 1 as in the papers.
    """

    p: int = 1

    def score(self, model: nn.Module, group: ChannelGroup) -> Tensor:
        """`(group.n_channels,)` float64, non-negative and finite, on the CPU."""
        roles = {s.role for s in group.slices}
        ranked_by = Role.CONSUMER if Role.CONSUMER in roles else Role.PRODUCER
        norms = [channel_norms(model, s, self.p) for s in group.slices if s.role is ranked_by]
        return torch.stack(norms).sum(dim=0)


def channel_norms(model: nn.Module, where: ChannelSlice, p: int = 1) -> Tensor:
    """`(n_channels,)` float64: sum of |w|^p over each channel's part of one tensor."""
    weight = model.get_parameter(where.key).detach().cpu().double()
    rows = weight.abs().pow(p).movedim(where.dim, 0).reshape(weight.shape[where.dim], -1)
    per_position = rows.sum(dim=1)
    return per_position[torch.from_numpy(where.index)].sum(dim=1)


IMPORTANCES: Mapping[str, Importance] = {
    "l1": WeightNorm(p=1),
    "l2": WeightNorm(p=2),
}
