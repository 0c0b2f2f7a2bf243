"""(model, plan) -> a new, smaller model.

Two engines. `remove_channels` slices tensors in milliseconds and is what the search uses;
`remove_branches` leaves whole branches out of an fx graph.
`prune_with_nni` lets NNI's ModelSpeedup make the layers of the final model: it gets complete
masks of what goes in and out of each, infers nothing, and must make what our own surgery makes.

The oracle of both is `masked`: the original network whose *readers* of a removed channel see
zeros. (A network with zeroed filters is no oracle: batch-norm turns a zeroed channel into a
constant, which the compact network does not have.)
"""

from collections.abc import Sequence

import numpy as np
from torch import fx, nn

from compressor.errors import PlanError, unknown_name
from compressor.surgery.branches import check_dropped, groups_left, remove_branches
from compressor.surgery.nni_engine import prune_with_nni
from compressor.surgery.oracle import masked
from compressor.surgery.positions import kept_positions
from compressor.surgery.sizes import kept_in_nodes, rewrite_sizes
from compressor.surgery.slicing import cuts_by_tensor, sliced
from compressor.values import Branch, ChannelGroup, Plan

__all__ = [
    "check_dropped",
    "check_plan",
    "cut",
    "groups_left",
    "kept_positions",
    "masked",
    "prune_with_nni",
    "remove_branches",
    "remove_channels",
]


def cut(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    plan: Plan,
    branches: Sequence[Branch] = (),
) -> nn.Module:
    """A copy of `model` without the channels and branches that `plan` leaves out.

    It must answer like `masked` of the same arguments. See `remove_channels` and
    `remove_branches` for them.

    Raises:
        PlanError: The plan does not fit `groups` or `branches`.
    """
    return remove_branches(remove_channels(model, groups, plan), check_dropped(branches, plan))


def remove_channels(model: nn.Module, groups: Sequence[ChannelGroup], plan: Plan) -> nn.Module:
    """A copy of `model` without the channels that `plan` leaves out.

    Args:
        model: Not changed.
        groups: From `graph.channel_groups(model, ...)`.
        plan: Group name -> kept channels; groups not named stay whole.

    Returns:
        The same class of module with smaller tensors; dtype, device, memory format, training
        mode, hooks and requires_grad as before, and shared parameters still shared.

    Raises:
        PlanError: The plan names unknown or locked groups, or impossible channels.
    """
    check_plan(groups, plan)
    pruned = sliced(model, cuts_by_tensor(kept_positions(model, groups, plan)), groups)
    if isinstance(pruned, fx.GraphModule):
        rewrite_sizes(pruned, kept_in_nodes(pruned, groups, plan))
    return pruned


def check_plan(groups: Sequence[ChannelGroup], plan: Plan) -> None:
    """Raises `PlanError` where `plan` does not fit `groups`; returns nothing."""
    by_name = {group.name: group for group in groups}
    for name, kept in plan.kept.items():
        if name not in by_name:
            raise PlanError(unknown_name("channel group", name, by_name))
        group = by_name[name]
        if not all(isinstance(channel, (int, np.integer)) for channel in kept):
            raise PlanError(f"Plan for {name} must list whole numbers; got {list(kept)}.")
        if not kept:
            raise PlanError(f"Plan keeps no channel of {name}; at least 1 must stay.")
        if len(set(kept)) != len(kept):
            raise PlanError(f"Plan lists channels of {name} twice: kept={list(kept)}.")
        if min(kept) < 0 or max(kept) >= group.n_channels:
            raise PlanError(
                f"Plan for {name} must lie in 0..{group.n_channels - 1}; "
                f"kept runs from {min(kept)} to {max(kept)}."
            )
        if group.locked_because is not None and len(kept) < group.n_channels:
            raise PlanError(f"{name} cannot be pruned: {group.locked_because}.")
