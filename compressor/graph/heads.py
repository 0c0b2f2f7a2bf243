"""Rules for tensors with channels along several dimensions: heads, and the channels of each.

A view that parts the channels of a layer makes such a tensor (see `moves.view`), a view that puts
them together again ends it. Between them lies attention, which works on each head by itself: then
whole heads can go, beside channels of all heads. A rule returns None where it cannot keep the
dimensions apart; heads are then tied as they were without these rules.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
from torch import Tensor

from compressor.graph.labels import CHANNELS, HEADS
from compressor.graph.moves import dims_after_index, order_of
from compressor.graph.per_channel import over_channels
from compressor.graph.record import Call, all_equal, tensor_dim
from compressor.graph.states import (
    BY_WIDTH,
    Axis,
    Channels,
    Grid,
    Outcome,
    State,
    Weight,
    places_of,
)
from compressor.values import Role

Axes = dict[int, Axis]  # by dimension


def axes_of(state: State | None) -> Axes:
    """The dimensions that have channels."""
    if isinstance(state, Grid):
        return {axis.dim: axis for axis in state.axes if not axis.is_gone}
    return {dim: Axis(dim, labels, CHANNELS) for dim, labels in places_of(state)}


def state_of(call: Call, axes: Mapping[int, Axis], because: str) -> State:
    """A tensor with these dimensions of channels."""
    placed = [replace(axis, dim=dim) for dim, axis in sorted(axes.items())]
    if not placed:
        return call.fixed(because)
    if len(placed) == 1 and placed[0].side == CHANNELS:
        return Channels(placed[0].dim, placed[0].labels)
    return Grid(tuple(placed))


def without_heads(call: Call, state: Grid) -> State:
    """What is left where heads cannot be told apart: the channels of each, the same of all."""
    left: Axes = {}
    for dim, axis in sorted(axes_of(state).items()):
        if axis.side == HEADS and axis.parting is not None:
            call.labels.settle(axis.parting, is_tied=True)
        if axis.side == HEADS or left:
            call.lock(axis.labels, f"{call.where} is not known to keep heads apart")
        else:
            left[dim] = axis
    return state_of(call, left, f"{call.where} is not known to keep heads apart")


def meet(call: Call, axes: Axes, axis: Axis) -> bool:
    """Ties an axis to the one that lies along the same dimension; False where that cannot be."""
    other = axes.setdefault(axis.dim, axis)
    if other.side != axis.side or len(other.labels) != len(axis.labels):
        return False
    if other.parting is not axis.parting:
        _keep_apart(call, other, axis)
    call.labels.join(other.labels, axis.labels)
    return True


def _keep_apart(call: Call, *axes: Axis) -> None:
    for axis in axes:
        if axis.parting is not None:
            call.labels.settle(axis.parting, is_tied=False)


def view(call: Call) -> Outcome:
    """Reshapes that leave every dimension of channels whole, or put both into one."""
    source = next(call.tensors())
    axes = axes_of(call.state(source))
    shape = tuple(call.out.shape)
    ends = sorted({1, *np.cumprod(source.shape).tolist(), *np.cumprod(shape).tolist()})
    if "dtype" in call.args or any(high % low for low, high in pairwise(ends)):
        return None
    factors = [(low, high // low) for low, high in pairwise(ends)]
    owners: dict[int, Axis] = {}  # first position of a factor -> the axis it is part of
    for axis in axes.values():
        start = math.prod(source.shape[: axis.dim])
        end = start * len(axis.labels)
        owners |= {low: axis for low, _ in factors if start <= low < end}
    found: Axes = {}
    at = 1
    for dim, size in enumerate(shape):
        span = [(low, f) for low, f in factors if at <= low < at * size]
        at *= size
        own = list(dict.fromkeys(owners[low] for low, _ in span if low in owners))
        if any(math.prod(f for low, f in span if owners.get(low) is axis) != len(axis.labels)
               for axis in own):  # fmt: skip
            return None
        shown = [
            axis.labels.reshape([f if owners.get(low) is axis else 1 for low, f in span])
            for axis in own
        ]
        full = [f for _, f in span]
        if len(own) == 1:
            found[dim] = replace(own[0], labels=np.broadcast_to(shown[0], full).ravel())
        elif own:
            if {axis.side for axis in own} != {CHANNELS, HEADS} or len(axes) != 2:
                return None
            _keep_apart(call, *own)
            inner = [f if low in owners else 1 for low, f in span]
            flat = call.labels.fresh(math.prod(inner)).reshape(inner)
            for axis, labels in zip(own, shown, strict=True):
                call.labels.join(flat, labels, axis.side)
            return Channels(dim, np.broadcast_to(flat, full).ravel())
    return state_of(call, found, "")


def permute(call: Call) -> Outcome:
    """Transposes of all kinds."""
    source = next(call.tensors())
    order = order_of(call, source)
    axes = axes_of(call.state(source))
    return state_of(call, {order.index(dim): axis for dim, axis in axes.items()}, "")


def select(call: Call) -> Outcome:
    """One place, or each place, of a dimension without channels."""
    source = next(call.tensors())
    dim, axes = tensor_dim(call.args.get("dim", 0), source.ndim), axes_of(call.state(source))
    if dim in axes:
        return None
    one = state_of(call, {d - (dim < d): axis for d, axis in axes.items()}, "")
    return one if isinstance(call.out, Tensor) else [one] * len(call.out)


def along_one(call: Call) -> Outcome:
    """Ranges of a dimension; where it is that of the channels of a head, all of it in parts."""
    source = next(call.tensors())
    state = call.state(source)
    dim, axes = tensor_dim(call.args.get("dim", 0), source.ndim), axes_of(state)
    if dim not in axes:
        return state if isinstance(call.out, Tensor) else [state] * len(call.out)
    if axes[dim].side == HEADS or isinstance(call.out, Tensor):
        return None
    sizes = [part.shape[dim] for part in call.out]
    parts = np.split(axes[dim].labels, np.cumsum(sizes)[:-1])
    for part in parts[1:] if all_equal(sizes) else ():  # equal parts stay equal
        call.labels.join(parts[0], part)
    return [state_of(call, axes | {dim: replace(axes[dim], labels=part)}, "") for part in parts]


def indexed(call: Call) -> Outcome:
    """`x[:, places]`, where neither heads nor channels are what is picked."""
    axes, dims = axes_of(call.state(call.args["self"])), dims_after_index(call)
    if dims is None or not axes.keys() <= set(dims):
        return None
    return state_of(call, {dims.index(dim): axis for dim, axis in axes.items()}, "")


def expand(call: Call) -> Outcome:
    """Repeats along dimensions of size 1."""
    source = next(call.tensors())
    shift = call.out.ndim - source.ndim
    axes = {dim + shift: axis for dim, axis in axes_of(call.state(source)).items()}
    return state_of(call, axes, "")


def cat(call: Call) -> Outcome:
    """Tensors side by side, along a dimension without channels."""
    dim = tensor_dim(call.args["dim"], call.out.ndim)
    axes: Axes = {}
    states = [axes_of(call.state(tensor)) for tensor in call.args["tensors"]]
    if any(each.keys() != states[0].keys() or dim in each for each in states):
        return None
    if not all(meet(call, axes, axis) for each in states for axis in each.values()):
        return None
    return state_of(call, axes, "")


def elementwise(call: Call) -> Outcome:
    """Sums, products, activations: positions that meet are tied."""
    out = call.out
    if not isinstance(out, Tensor):
        return None
    axes: Axes = {}
    operands = [(t, call.state(t), out.ndim - t.ndim) for t in call.tensors()]
    for _, state, shift in operands:
        if isinstance(state, Channels):
            continue
        for axis in axes_of(state).values():
            if not meet(call, axes, replace(axis, dim=axis.dim + shift)):
                return None
    for _, state, shift in operands:
        if isinstance(state, Channels) and not _with_heads(call, axes, state, state.dim + shift):
            return None
    for dim, axis in axes.items():
        for tensor, state, shift in operands:
            size = tensor.shape[dim - shift] if dim >= shift else 1
            if out.shape[dim] != len(axis.labels):
                return None
            if size == 1 or dim - shift in axes_of(state):
                continue
            if call.follows(tensor, dim - shift, axis.labels):
                continue
            if isinstance(state, Weight):
                call.place(state, dim - shift, axis.labels, Role.PER_CHANNEL)
            else:
                call.lock(axis.labels, f"{call.where} ties it to what cannot be pruned")
    return state_of(call, axes, "")


def _with_heads(call: Call, axes: Axes, state: Channels, dim: int) -> bool:
    """Ties one channel for each head (a shift, a gate) to the heads along `dim`, if there are any.

    Such a channel goes with its head, and not without.
    """
    if dim not in axes or axes[dim].side != HEADS or len(axes[dim].labels) != len(state.labels):
        return False
    call.labels.lock(state.labels, f"{call.where} ties it to a whole head", CHANNELS)
    return meet(call, axes, Axis(dim, state.labels, HEADS))


def over_dims(call: Call) -> Outcome:
    """Softmax, means, norms: a dimension of channels that is gone over stays as it is."""
    source = next(call.tensors())
    axes = axes_of(call.state(source))
    dims = call.args.get("dim")
    dims = [dims] if isinstance(dims, int) else dims or range(source.ndim)
    gone = {tensor_dim(d, source.ndim) for d in dims}
    for dim in gone & axes.keys():
        axis, obstacle = axes.pop(dim), over_channels(call)
        if obstacle is None:
            call.read(0, dim, axis.labels)
        else:
            call.lock(axis.labels, obstacle)
    first = call.out if isinstance(call.out, Tensor) else call.out[0]
    is_smaller = first.ndim < source.ndim
    left = {d - is_smaller * sum(g < d for g in gone): axis for d, axis in axes.items()}
    return state_of(call, left, f"{call.where} goes over all channels together")


def layer_norm(call: Call) -> Outcome:
    """Over the channels of a head: those stay, whole heads go."""
    source = call.args["input"]
    state = call.state(source)
    for dim, labels in places_of(state):
        if dim >= source.ndim - len(call.args["normalized_shape"]):
            call.lock(labels, f"{call.where} normalises over all channels together")
    return [state, None, None]


def product(call: Call) -> Outcome:
    """`bmm` and `mm` of activations: attention, pooling by attention, correlation.

    Channels that the sum does not go over stay. Where channels meet in the sum, those that meet go
    together, and one that was removed adds zero. Products of one batch are those of one head.
    """
    left, right = call.state(call.args["self"]), call.state(call.args["mat2"])
    if isinstance(left, Weight) or isinstance(right, Weight):
        return call.unknown()
    last = call.out.ndim - 1
    ours, theirs = axes_of(left), axes_of(right)
    out: Axes = {}
    summed = ours.pop(last, None), theirs.pop(last - 1, None)
    if last == 2:
        batch = [axes.pop(0) for axes in (ours, theirs) if 0 in axes]
        if len(batch) != 2 or not all(meet(call, out, axis) for axis in batch):
            out.clear()
            for each in batch:
                call.lock(each.labels, f"{call.where} ties it to what cannot be pruned")
    first, second = summed
    if first and second and first.side == second.side:
        call.labels.join(first.labels, second.labels)
        call.read(0, last, first.labels)
    else:
        for axis in summed:
            if axis is not None:
                call.lock(axis.labels, f"{call.where} sums over channels")
    _work_apart(call, axes_of(left), axes_of(right))
    return state_of(call, out | ours | theirs, f"{call.where} sums over channels")


def attention(call: Call) -> Outcome:
    """Fused attention `(batch, heads, n, channels)`: queries meet keys, values stay."""
    given = [call.args[name] for name in ("query", "key", "value")]
    states = [axes_of(call.state(each)) for each in given]
    channel_dim = given[0].ndim - 1
    out: Axes = {}
    for each in states:
        heads = each.get(1)
        if each.keys() - {1, channel_dim} or (heads and not meet(call, out, heads)):
            return None
    if any(1 not in each for each in states) and 1 in out:
        call.lock(out.pop(1).labels, f"{call.where} ties it to what cannot be pruned")
    for other in call.tensors():
        if all(other is not each for each in given):  # a mask
            state, dim = call.state(other), other.ndim - 3
            if (
                isinstance(state, Channels)
                and state.dim == dim
                and _with_heads(call, out, state, 1)
            ):
                continue
            if isinstance(state, (Channels, Grid)):
                return None
            if 1 not in out or dim < 0 or other.shape[dim] == 1:
                continue
            if isinstance(state, Weight):
                call.place(state, dim, out[1].labels, Role.PER_CHANNEL)
            else:
                call.lock(out[1].labels, f"{call.where} ties it to what cannot be pruned")
    query, key, values = (each.get(channel_dim) for each in states)
    if query and key and query.side == key.side and call.args.get("scale") is not None:
        call.labels.join(query.labels, key.labels)
        call.read(0, channel_dim, query.labels)
    else:
        is_by_width = query is not None and key is not None
        reason = f"{BY_WIDTH}; give scale=" if is_by_width else "sums over channels"
        for axis in (query, key):
            if axis is not None:
                call.lock(axis.labels, f"{call.where} {reason}")
    _work_apart(call, *states)
    if values is not None:
        out[channel_dim] = values
    fixed = call.fixed(f"{call.where} sums over channels")
    return [
        state_of(call, out, f"{call.where} sums over channels"),
        *(fixed for _ in call.out[1:]),
    ]


def _work_apart(call: Call, *states: Axes) -> None:
    """Says that heads are worked on one by one, so that they can be a group."""
    found = [axis for axes in states for axis in axes.values() if axis.side == HEADS]
    _keep_apart(call, *found)
    call.labels.heads += [axis.labels for axis in found]


RULES: dict[str, Callable[[Call], Outcome]] = {
    "view": view, "_unsafe_view": view, "reshape": view, "_reshape_alias": view, "squeeze": view,
    "unsqueeze": view, "permute": permute, "transpose": permute, "t": permute, "select": select,
    "unbind": select, "slice": along_one, "split": along_one,
    "split_with_sizes": along_one, "index": indexed, "expand": expand, "cat": cat, "bmm": product,
    "_scaled_dot_product_flash_attention_for_cpu": attention, "native_layer_norm": layer_norm,
    "mean": over_dims, "sum": over_dims, "amax": over_dims, "linalg_vector_norm": over_dims,
    "_softmax": over_dims, "_safe_softmax": over_dims,
}  # fmt: skip
