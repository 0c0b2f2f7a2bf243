"""Importances whose scores are none."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from compressor.importance import Losses, Scores
from compressor.values import ChannelGroup


@dataclass(frozen=True)
class Constant:
    """The same score for all channels, of which there are some more or fewer."""

    value: float
    n_more: int = 0

    def scores(
        self, model: nn.Module, groups: Sequence[ChannelGroup], losses: Losses | None
    ) -> Scores:
        return {g.name: torch.full((g.n_channels + self.n_more,), self.value) for g in groups}


SHORT, NEGATIVE = Constant(1.0, n_more=-1), Constant(-1.0)
