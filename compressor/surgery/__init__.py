"""(model, plan) -> a new, smaller model.

Two engines. `remove_channels` slices tensors in milliseconds and is what the search uses;
`remove_branches` leaves whole branches out of an fx graph.
`prune_with_nni` is NNI's ModelSpeedup, which infers the sizes by itself from masks: slow, but
an independent second opinion on the final model.

The oracle of both is `masked`: the original network whose *readers* of a removed channel see
zeros. (A network with zeroed filters is no oracle: batch-norm turns a zeroed channel into a
constant, which the compact network does not have.)
"""

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from compressor.errors import PlanError, unknown_name
from compressor.surgery.branches import check_dropped, groups_left, remove_branches
from compressor.surgery.nni_engine import prune_with_nni
from compressor.surgery.oracle import masked
from compressor.surgery.positions import Mask, kept_positions, tensor_of
from compressor.surgery.sizes import kept_in_nodes, rewrite_sizes
from compressor.values import Branch, ChannelGroup, Plan, Role

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
    keep: dict[str, dict[int, Mask]] = defaultdict(dict)
    for (key, dim), mask in kept_positions(model, groups, plan).items():
        keep[key][dim] = mask
    # deepcopy takes what it finds in the memo for a finished copy: pruned tensors are never
    # copied whole, and a tensor with several owners stays one tensor.
    memo: dict[int, Any] = {}
    for key, masks in keep.items():
        old = tensor_of(model, key)
        if isinstance(old, Tensor):
            memo[id(old)] = _cut(old, masks)
    touched = {
        name: module
        for name, module in model.named_modules()
        if any(id(t) in memo for t in (*module._parameters.values(), *module._buffers.values()))
    }
    by_group = {  # weights of convolutions that lose whole groups
        id(tensor_of(model, where.key))
        for group in groups
        for where in group.slices
        if where.role is Role.PER_CHANNEL
    }
    pruned = copy.deepcopy(model, memo)
    for name, old_module in touched.items():
        n_groups = None
        if isinstance(old_module, nn.modules.conv._ConvNd) and id(old_module.weight) in by_group:
            n_filters = len(memo[id(old_module.weight)])
            n_groups = old_module.groups * n_filters // len(old_module.weight)
        _fix_attributes(pruned.get_submodule(name), n_groups)
    for key, masks in keep.items():
        if isinstance(tensor_of(model, key), int):
            module, _, attribute = key.rpartition(".")
            setattr(pruned.get_submodule(module), attribute, int(masks[0].sum()))
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


def _cut(old: Tensor, keep: Mapping[int, Mask]) -> Tensor:
    """The rows that stay, dimension by dimension; parameters stay parameters."""
    new = old.detach()
    for dim, mask in keep.items():
        new = new.index_select(dim, torch.from_numpy(np.flatnonzero(mask)).to(old.device))
    for ndim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if old.ndim == ndim and not old.is_contiguous():
            new = new.contiguous(memory_format=layout)
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new


def _fix_attributes(module: nn.Module, n_groups: int | None) -> None:
    """Channel counts that a module keeps beside its tensors.

    Args:
        module: With its new tensors and its old numbers.
        n_groups: Of a convolution that lost whole groups: how many are left.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        module.groups = n_groups or module.groups
        first, second = module.weight.shape[0], module.weight.shape[1] * module.groups
        module.out_channels, module.in_channels = (
            (second, first) if module.transposed else (first, second)
        )
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.GroupNorm):
        n_channels = len(module.weight)
        module.num_groups = module.num_groups * n_channels // module.num_channels
        module.num_channels = n_channels
    elif isinstance(module, nn.RNNBase):
        weight = module.weight_ih_l0
        assert isinstance(weight, Tensor)
        module.input_size = weight.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        tensors = (module.weight, module.running_mean)
        module.num_features = next(len(t) for t in tensors if t is not None)
