"""Copies of networks of whose tensors only some positions are left."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.surgery.positions import Mask, tensor_of
from compressor.values import ChannelGroup, Role

Cuts = Mapping[str, Mapping[int, Mask]]  # tensor -> dimension -> which positions stay


def sliced(model: nn.Module, cuts: Cuts, groups: Sequence[ChannelGroup]) -> nn.Module:
    """A copy of `model` with smaller tensors; its graph, if it is one, is as before.

    Args:
        model: Not changed.
        cuts: As far as the copy is to be smaller.
        groups: They tell convolutions that lose whole groups from others.
    """
    # deepcopy takes what it finds in the memo for a finished copy: pruned tensors are never
    # copied whole, and a tensor with several owners stays one tensor.
    memo: dict[int, Any] = {}
    for key, masks in cuts.items():
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
    for key, masks in cuts.items():
        if isinstance(tensor_of(model, key), int):
            module, _, attribute = key.rpartition(".")
            setattr(pruned.get_submodule(module), attribute, int(masks[0].sum()))
    return pruned


def cuts_by_tensor(kept: Mapping[tuple[str, int], Mask]) -> dict[str, dict[int, Mask]]:
    """What `kept_positions` returns, tensor by tensor."""
    cuts: dict[str, dict[int, Mask]] = {}
    for (key, dim), mask in kept.items():
        cuts.setdefault(key, {})[dim] = mask
    return cuts


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
