"""An importance: a high norm of what writes a channel, which its largest weights decide."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from compressor.importance import Losses, Scores, channel_norms
from compressor.values import ChannelGroup, Role


@dataclass(frozen=True)
class Peak:
    """Sum of |w|^p over the weights that write a channel."""

    p: int = 8

    def scores(
        self, model: nn.Module, groups: Sequence[ChannelGroup], losses: Losses | None
    ) -> Scores:
        written = {g.name: [s for s in g.slices if s.role is Role.PRODUCER] for g in groups}
        return {
            name: torch.stack([channel_norms(model, s, self.p) for s in slices]).sum(dim=0)
            for name, slices in written.items()
        }


PEAK = Peak()
