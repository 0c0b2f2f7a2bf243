"""What every layer costs on paper, and which channel groups it depends on."""

from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from compressor.graph import outputs
from compressor.values import ChannelGroup, ChannelSlice, Example, LayerCost
from compressor.watching import watched

WITH_WEIGHTS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear,
)  # fmt: skip


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
        shares: dict[tuple[int, bool], dict[str, float]] = defaultdict(dict)
        taken: dict[int, set[int]] = defaultdict(set)
        macs = 0.0
        for group, where in places.get(name, ()):
            share = where.index.size / tensor.shape[where.dim]
            positions = set(where.index.ravel().tolist())
            is_crossed = bool(taken[where.dim] & positions)  # heads, beside channels of all heads
            taken[where.dim] |= positions
            shares[where.dim, is_crossed][group.name] = share
            macs = max(macs, where.macs * group.n_channels / share)
        costs.append(
            LayerCost(
                name,
                round(macs),
                tensor.numel(),
                tuple(tensor.shape),
                tuple(shares[place] for place in sorted(shares)),
                tuple(dim for dim, _ in sorted(shares)),
            )
        )
    return tuple(costs)


def ran(network: nn.Module, example: Example) -> list[str]:
    """Names of the convolutions and linear layers of `network`, in the order they run in."""
    names: list[str] = []
    layers = [n for n, layer in network.named_modules() if isinstance(layer, WITH_WEIGHTS)]
    with watched(network, layers, lambda name, *_: names.append(name)):
        outputs(network, example)
    return names
