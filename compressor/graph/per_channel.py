"""Rules for operations that work on each channel by itself."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from compressor.graph.record import Call, tensor_dim
from compressor.graph.states import BY_WIDTH, WITH_ZEROS, Channels, Fixed, Outcome, Weight
from compressor.values import IndexArray, Role

aten = torch.ops.aten
# Nodes of programs over channels that surgery rewrites.
MEANS = (aten.mean.dim, aten.mean.default)
EXTREMES = (aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim)
# Operations on each channel by itself -> over how many dimensions, from the last.
TRAILING_DIMS = {
    "max_pool1d_with_indices": 1, "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3,
    "avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3, "max_pool1d": 1, "max_pool2d": 2,
    "adaptive_avg_pool1d": 1, "_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3,
    "adaptive_max_pool2d": 2, "adaptive_max_pool3d": 3, "mkldnn_max_pool2d": 2,
    "upsample_nearest1d": 1, "upsample_nearest2d": 2, "upsample_nearest3d": 3,
    "_upsample_nearest_exact1d": 1, "_upsample_nearest_exact2d": 2,
    "_upsample_nearest_exact3d": 3, "upsample_linear1d": 1, "upsample_bilinear2d": 2,
    "_upsample_bilinear2d_aa": 2, "upsample_bicubic2d": 2, "_upsample_bicubic2d_aa": 2,
    "upsample_trilinear3d": 3, "reflection_pad1d": 1, "reflection_pad2d": 2,
    "reflection_pad3d": 3, "replication_pad1d": 1, "replication_pad2d": 2,
    "replication_pad3d": 3, "grid_sampler_2d": 2, "grid_sampler_3d": 3,
}  # fmt: skip


def elementwise(call: Call) -> Outcome:
    """Sums, products, activations: positions that meet are tied."""
    out = call.out
    if not isinstance(out, Tensor):
        return call.unknown()
    operands = [(t, call.state(t), out.ndim - t.ndim) for t in call.tensors()]
    channels = [(s, d) for _, s, d in operands if isinstance(s, Channels)]
    dims = {s.dim + shift for s, shift in channels if len(s.labels) > 1}
    if len(dims) > 1:
        return call.unknown(f"{call.where} mixes two kinds of channels")
    dim = dims.pop() if dims else channels[0][0].dim + channels[0][1]
    n = out.shape[dim]
    tied: IndexArray | None = None
    for _, state, shift in operands:
        if not isinstance(state, Channels):
            continue
        if len(state.labels) != n:  # one channel for all: it cannot go
            call.lock(state.labels, f"{call.where} spreads it over all channels")
        elif state.dim + shift != dim:
            return call.unknown(f"{call.where} mixes two kinds of channels")
        else:
            tied = state.labels if tied is None else tied
            call.labels.join(tied, state.labels)
    if tied is None:
        return call.fixed("it has a single channel")
    obstacle: str | None = None
    for tensor, state, shift in operands:
        size = tensor.shape[dim - shift] if dim >= shift else 1
        if isinstance(state, Channels) or size != n or n == 1:
            continue  # the same for all channels
        if call.follows(tensor, dim - shift, tied):
            continue
        if isinstance(state, Weight):
            call.place(state, dim - shift, tied, Role.PER_CHANNEL)
        elif isinstance(state, Fixed):
            obstacle = f"{call.where} ties it to something that cannot be pruned: {state.because}"
        elif state is None:
            obstacle = f"{call.where} ties it to a constant"
    if obstacle:
        call.lock(tied, obstacle)
    return Channels(dim, tied)


def over_trailing_dims(call: Call) -> Outcome:
    """Pooling, resizing, padding: every channel by itself, over the last dimensions."""
    source, *others = call.tensors()
    state = call.state(source)
    n_dims = TRAILING_DIMS[call.name]
    if not isinstance(state, Channels) or state.dim >= source.ndim - n_dims:
        return call.unknown()
    if any(isinstance(call.state(other), Channels) for other in others):
        return call.unknown()
    if isinstance(call.out, Tensor):
        return state
    return [state for _ in call.out]  # positions within a channel's plane are its own, too


def norm_over_batch(call: Call) -> Outcome:
    """Batch and instance norm: one scale, shift, mean and variance a channel."""
    state = call.state(call.args["input"])
    if not isinstance(state, Channels) or state.dim != 1:
        return call.unknown()
    tensors = ("weight", "bias", "running_mean", "running_var")
    _place_norm(call, tensors, state.labels)
    if all(call.args.get(name) is None for name in tensors):
        call.record.place_width(state.labels)
    return [state, *(None for _ in call.out[1:])]


def group_norm(call: Call) -> Outcome:
    """Normalises over the channels of a group, which can only go together."""
    state = call.state(call.args["input"])
    if not isinstance(state, Channels) or state.dim != 1:
        return call.unknown()
    n_groups = call.args["group"]
    if n_groups == 1:
        call.lock(state.labels, f"{call.where} normalises over all channels together")
    elif call.args["weight"] is None:
        call.lock(state.labels, f"{call.where} has no weight that follows its width")
    blocks = state.labels.reshape(n_groups, -1)
    call.labels.join(blocks, blocks[:, :1])
    _place_norm(call, ("weight", "bias"), state.labels)
    return [state, None, None]


def layer_norm(call: Call) -> Outcome:
    """Normalises over the last dimensions; channels may lie before them only."""
    source = call.args["input"]
    state = call.state(source)
    assert isinstance(state, Channels)
    if state.dim >= source.ndim - len(call.args["normalized_shape"]):
        call.lock(state.labels, f"{call.where} normalises over all channels together")
    return [state, None, None]


def _place_norm(call: Call, names: Sequence[str], labels: IndexArray) -> None:
    for name in names:
        value = call.args.get(name)
        weight = call.state(value)
        if isinstance(weight, Weight) and value is not None and value.ndim == 1:
            call.place(weight, 0, labels, Role.PER_CHANNEL)
        elif value is not None:
            call.lock(labels, f"{call.where} computes its {name} in the forward pass")


def over_dims(call: Call) -> Outcome:
    """Means, norms, softmax over some dimensions: fine if channels are not among them."""
    source = next(call.tensors())
    state = call.state(source)
    assert isinstance(state, Channels)
    dims = call.args.get("dim")
    if dims is None or dims == []:
        dims = list(range(source.ndim))
    dims = [dims] if isinstance(dims, int) else dims
    gone = {tensor_dim(d, source.ndim) for d in dims}
    if state.dim in gone:
        obstacle = over_channels(call)
        if obstacle is not None:
            return call.unknown(obstacle)
        call.read(0, state.dim, state.labels)
        return call.fixed(f"{call.where} goes over all channels together")
    first = call.out if isinstance(call.out, Tensor) else call.out[0]
    n_before = sum(d < state.dim for d in gone) if first.ndim < source.ndim else 0
    return Channels(state.dim - n_before, state.labels)


def over_channels(call: Call) -> str | None:
    """Why what goes over channels does not take removed ones for zeros; None where it does.

    A sum and a norm lose nothing with a zero. A mean divides by as many as there were, and a
    maximum is at least the zero of those that are gone: surgery says so in programs, where it can
    (see `surgery.sizes`).
    """
    if call.name == "sum" or (
        call.name == "linalg_vector_norm" and 0 < float(call.args["ord"]) < math.inf
    ):
        return None
    if call.name == "mean":
        return None if call.is_node(*MEANS) else f"{call.where} {BY_WIDTH}"
    if call.name in ("amax", "amin", "max", "min"):
        node = call.record.node
        if not call.is_node(*EXTREMES):
            return f"{call.where} {WITH_ZEROS}"
        assert node is not None
        places = [user for user in node.users if user.args[1:] != (0,) and user.users]
        if isinstance(call.out, Tensor) or not places:
            return None
    return f"{call.where} goes over all channels together"


def roi_align(call: Call) -> Outcome:
    """Crops of feature maps: `(n_rois, n, h, w)`, every channel by itself."""
    source, rois = list(call.tensors())[:2]
    state = call.state(source)
    if not isinstance(state, Channels) or state.dim != 1:
        return call.unknown()
    boxes = call.state(rois)
    if isinstance(boxes, Channels):
        call.lock(boxes.labels, f"{call.where} reads them as coordinates")
    return state
