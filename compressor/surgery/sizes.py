"""Sizes that stand in the code of a program, made those of its new widths.

What goes over all channels goes over those that are gone too, which count as zeros: that is
written into a program as well.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from compressor.surgery.positions import Mask, removed_channels
from compressor.values import ChannelGroup, Plan

aten = torch.ops.aten
Kept = Mapping[str, Mapping[int, Mask]]  # node -> dimension of its output -> what stays


def rewrite_sizes(program: fx.GraphModule, keep: Kept) -> None:
    """Makes the numbers in a program's graph those of its new widths, in place.

    Args:
        program: From `compressor.program`.
        keep: Node name -> dimension of its output that has channels -> which positions stay.
    """
    for node in list(program.graph.nodes):
        if node.op == "call_function" and node.target in _SIZES:
            _SIZES[node.target](node, keep)
    program.recompile()


def _rewrite_shape(node: fx.Node, keep: Kept) -> None:
    """view, reshape, expand: the sizes of the dimensions of channels."""
    if node.name in keep:
        node.update_arg(1, _new_sizes(list(_as_list(node.args[1])), keep[node.name]))


def _new_sizes(sizes: list[Any], keep: Mapping[int, Mask]) -> list[Any]:
    for dim, mask in keep.items():
        if not 0 <= dim < len(sizes):
            continue
        if sizes[dim] == len(mask):
            sizes[dim] = int(mask.sum())
        elif isinstance(sizes[dim], fx.Node) and -1 not in sizes:  # batch times heads
            sizes[dim] = -1
    return sizes


def _rewrite_unflatten(node: fx.Node, keep: Kept) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if node.name in keep:
        first = _dim(source, node.args[1])
        inside = {dim - first: mask for dim, mask in keep[node.name].items()}
        node.update_arg(2, _new_sizes(list(_as_list(node.args[2])), inside))


def _rewrite_slice(node: fx.Node, keep: Kept) -> None:
    mask = _source_mask(node, keep)
    if mask is not None:
        for position in (2, 3):
            at = node.args[position] if len(node.args) > position else None
            if isinstance(at, int):
                at = at + len(mask) if at < 0 else at
                node.update_arg(position, int(mask[:at].sum()))


def _rewrite_narrow(node: fx.Node, keep: Kept) -> None:
    mask = _source_mask(node, keep)
    if mask is not None:
        start, length = node.args[2], node.args[3]
        assert isinstance(start, int)
        assert isinstance(length, int)
        node.update_arg(2, int(mask[:start].sum()))
        node.update_arg(3, int(mask[start : start + length].sum()))


def _rewrite_split(node: fx.Node, keep: Kept) -> None:
    mask = _source_mask(node, keep)
    if mask is None:
        return
    (source, how, dim) = (*node.args, 0)[:3]
    if node.target is aten.split_with_sizes.default:
        sizes = list(_as_list(how))
    else:
        assert isinstance(how, int)
        size = -(-len(mask) // how) if node.target is aten.chunk.default else how
        sizes = [min(size, len(mask) - start) for start in range(0, len(mask), size)]
    parts = np.split(mask, np.cumsum(sizes)[:-1])
    node.target = aten.split_with_sizes.default
    node.args = (source, [int(part.sum()) for part in parts], dim)


def _rewrite_pad(node: fx.Node, keep: Kept) -> None:
    for dim, mask in keep.get(node.name, {}).items():
        sizes = list(_as_list(node.args[1]))
        at = 2 * (node.meta["val"].ndim - 1 - dim)
        if at < len(sizes):
            left, right = sizes[at : at + 2]
            sizes[at] = int(mask[:left].sum())
            sizes[at + 1] = int(mask[len(mask) - right :].sum())
            node.update_arg(1, sizes)


def _rewrite_groups(node: fx.Node, keep: Kept) -> None:
    """A convolution whose weight is no layer's: as many groups as its weight has inputs for."""
    schema = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    at = schema.index("groups")
    source, weight = node.args[0], node.args[1]
    assert isinstance(source, fx.Node)
    mask = keep.get(source.name, {}).get(1)
    is_grouped = len(node.args) > at and node.args[at] != 1
    if is_grouped and mask is not None and isinstance(weight, fx.Node) and weight.op == "get_attr":
        owner, _, name = str(weight.target).rpartition(".")
        module = node.graph.owning_module
        assert module is not None
        per_group = getattr(module.get_submodule(owner), name).shape[1]
        node.update_arg(at, int(mask.sum()) // per_group)


def _rewrite_group_norm(node: fx.Node, keep: Kept) -> None:
    if node.name in keep:
        mask = keep[node.name][1]
        n_groups = node.args[1]
        assert isinstance(n_groups, int)
        node.update_arg(1, n_groups * int(mask.sum()) // len(mask))


def _rewrite_mean(node: fx.Node, keep: Kept) -> None:
    """A mean over channels: the sum of those that stay, by as many as there were."""
    share = math.prod(float(mask.mean()) for mask in _masks_over(node, keep))
    if share < 1:
        _follow(node, aten.mul.Tensor, share)


def _rewrite_extreme(node: fx.Node, keep: Kept) -> None:
    """A maximum over channels is at least the zero of one that is gone; so a minimum at most."""
    if all(mask.all() for mask in _masks_over(node, keep)):
        return
    is_least = node.target in (aten.amin.default, aten.min.dim)
    bound = aten.clamp_max.default if is_least else aten.clamp_min.default
    if node.target in (aten.max.dim, aten.min.dim):
        for values in list(node.users):
            if values.users:  # those are the values; where they lie, nobody asks
                _follow(values, bound, 0.0)
    else:
        _follow(node, bound, 0.0)


def _masks_over(node: fx.Node, keep: Kept) -> list[Mask]:
    """What stays along each dimension of channels of its input that the node goes over."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dims = node.args[1] if len(node.args) > 1 else None
    dims = dims if isinstance(dims, (list, tuple)) else [] if dims is None else [dims]
    over = {_dim(source, dim) for dim in dims}
    return [mask for dim, mask in keep.get(source.name, {}).items() if not dims or dim in over]


def _follow(node: fx.Node, target: Any, argument: float) -> None:
    """Lets whatever reads `node` read `target(node, argument)`."""
    with node.graph.inserting_after(node):
        made = node.graph.call_function(target, (node, argument))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)


def _source_mask(node: fx.Node, keep: Kept) -> Mask | None:
    """What stays of the node's input, if the node works along its channels."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.name not in keep:
        return None
    position = 1 if node.target in (aten.slice.Tensor, aten.narrow.default) else 2
    along = node.args[position] if len(node.args) > position else 0
    return keep[source.name].get(_dim(source, along))


def _dim(node: fx.Node, dim: Any) -> int:
    return int(dim) % int(node.meta["val"].ndim)


def _as_list(sizes: Any) -> list[Any]:
    assert isinstance(sizes, (list, tuple))
    return list(sizes)


_SIZES: dict[Any, Callable[[fx.Node, Kept], None]] = {
    aten.view.default: _rewrite_shape, aten.reshape.default: _rewrite_shape,
    aten._unsafe_view.default: _rewrite_shape, aten.expand.default: _rewrite_shape,
    aten.unflatten.int: _rewrite_unflatten, aten.slice.Tensor: _rewrite_slice,
    aten.narrow.default: _rewrite_narrow, aten.split.Tensor: _rewrite_split,
    aten.split_with_sizes.default: _rewrite_split, aten.chunk.default: _rewrite_split,
    aten.constant_pad_nd.default: _rewrite_pad, aten.pad.default: _rewrite_pad,
    aten.conv1d.default: _rewrite_groups, aten.conv2d.default: _rewrite_groups,
    aten.conv3d.default: _rewrite_groups, aten.convolution.default: _rewrite_groups,
    aten.group_norm.default: _rewrite_group_norm,
    aten.mean.dim: _rewrite_mean, aten.mean.default: _rewrite_mean,
    aten.amax.default: _rewrite_extreme, aten.amin.default: _rewrite_extreme,
    aten.max.dim: _rewrite_extreme, aten.min.dim: _rewrite_extreme,
}  # fmt: skip


def kept_in_nodes(
    program: fx.GraphModule, groups: Sequence[ChannelGroup], plan: Plan
) -> dict[str, dict[int, Mask]]:
    """Node name -> dimension of its output that has channels -> which positions stay."""
    known = {n.name for n in program.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
    keep: dict[str, dict[int, Mask]] = defaultdict(dict)
    for group in groups:
        removed = removed_channels(group, plan)
        for where in group.nodes:
            if len(removed) and where.node in known:
                whole = np.ones(where.size, dtype=np.bool_)
                mask = keep[where.node].setdefault(where.dim, whole)
                rows = where.index[removed].ravel()
                mask[rows[rows >= 0]] = False
    return keep
