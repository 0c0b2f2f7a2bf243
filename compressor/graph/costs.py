"""What every layer costs on paper, and which channel groups it depends on."""

from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from compressor.values import ChannelGroup, ChannelSlice, LayerCost


def layer_costs(model: nn.Module, groups: Sequence[ChannelGroup]) -> tuple[LayerCost, ...]:
    """The cost of every parameter tensor, in the order of the model's parameters.

    Multiply-accumulates are those of one example; a tensor that several layers share has the sum.

    Args:
        model: Not changed.
        groups: From `channel_groups(model, ...)`.
    """
    places: dict[str, list[tuple[ChannelGroup, ChannelSlice]]] = defaultdict(list)
    for group in groups:
        for where in group.slices:
            places[where.key].append((group, where))
    costs = []
    for name, tensor in model.named_parameters():
        shares: dict[int, dict[str, float]] = defaultdict(dict)
        macs = 0.0
        for group, where in places.get(name, ()):
            share = where.index.size / tensor.shape[where.dim]
            shares[where.dim][group.name] = share
            macs = max(macs, where.macs * group.n_channels / share)
        costs.append(
            LayerCost(
                name,
                round(macs),
                tensor.numel(),
                tuple(tensor.shape),
                tuple(shares[d] for d in sorted(shares)),
            )
        )
    return tuple(costs)
