"""Rules for operations that move channels about: views, slices, concatenations, shuffles.

Legend: `g` groups of a channel shuffle, `r` upscale factor of a pixel shuffle.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.graph.labels import CHANNELS, HEADS
from compressor.graph.layers import labels_read
from compressor.graph.per_channel import elementwise
from compressor.graph.record import Call, all_equal, tensor_dim
from compressor.graph.states import Axis, Channels, Grid, Outcome, labels_of
from compressor.values import IndexArray

_WHOLE = slice(None)


def view(call: Call) -> Outcome:
    """Reshapes. Where channels are cut in two dimensions they stay a rectangle.

    The positions of old and new shape are refined to common factors. The new dimension that
    holds most of the channels becomes the channel dimension, its neighbour that of heads; channels
    that share a place in it are tied, so that user code that reads the sizes goes on working.
    """
    source = next(call.tensors())
    state = call.state(source)
    assert isinstance(state, Channels)
    if "dtype" in call.args:
        return call.unknown()
    shape = tuple(call.out.shape)
    n = len(state.labels)
    if n == 1:
        call.lock(state.labels, "it has a single channel")
        return call.fixed("it has a single channel")
    start = math.prod(source.shape[: state.dim])
    ends = {start, start * n, *np.cumprod(shape).tolist(), 1}
    factors: list[tuple[int, int]] = []  # (first position, size), coarse to fine
    for low, high in zip(sorted(ends), sorted(ends)[1:], strict=False):
        if high % low:
            return call.unknown()
        factors.append((low, high // low))
    within = [size for low, size in factors if start <= low < start * n]
    labels = state.labels.reshape(within)
    at = 1
    spans = []  # the factors that each new dimension covers
    for size in shape:
        spans.append([(low, f) for low, f in factors if at <= low < at * size])
        at *= size
    inside = [[f for low, f in span if start <= low < start * n] for span in spans]
    dim = max(range(len(shape)), key=lambda d: math.prod(inside[d]) if inside[d] else 0)
    heads = [d for d in range(len(shape)) if inside[d] and d != dim]
    if heads:
        place, head = (start, start * n), max((d for d in heads if d < dim), default=heads[0])
        ours, channels = _new_axis(call, factors, spans[dim], place)
        theirs, of_heads = _new_axis(call, factors, spans[head], place)
        parting = call.labels.part(labels, ours, theirs)
        axes = Axis(dim, channels, CHANNELS, parting), Axis(head, of_heads, HEADS, parting)
        return Grid(axes)
    full = [f for _, f in spans[dim]]
    shown = [f if start <= low < start * n else 1 for low, f in spans[dim]]
    return Channels(dim, np.broadcast_to(labels.reshape(shown), full).ravel())


Factors = list[tuple[int, int]]


def _new_axis(
    call: Call, factors: Factors, span: Factors, place: tuple[int, int]
) -> tuple[IndexArray, IndexArray]:
    """New labels along one new dimension: in the shape of the old ones, and along it."""
    own = [f if (low, f) in span else 1 for low, f in factors if place[0] <= low < place[1]]
    fresh = call.labels.fresh(math.prod(own))
    shown = [f if place[0] <= low < place[1] else 1 for low, f in span]
    along = np.broadcast_to(fresh.reshape(shown), [f for _, f in span]).ravel()
    return fresh.reshape(own), along


def permute(call: Call) -> Outcome:
    """Transposes of all kinds."""
    source = next(call.tensors())
    state = call.state(source)
    assert isinstance(state, Channels)
    return Channels(order_of(call, source).index(state.dim), state.labels)


def order_of(call: Call, source: Tensor) -> list[int]:
    """Old dimension of each new one."""
    order = list(range(source.ndim))
    if call.name == "permute":
        return [tensor_dim(d, source.ndim) for d in call.args["dims"]]
    a, b = (call.args["dim0"], call.args["dim1"]) if call.name == "transpose" else (0, -1)
    order[a], order[b] = order[b], order[a]
    return order


def expand(call: Call) -> Outcome:
    """Repeats along dimensions of size 1, without copying."""
    source = next(call.tensors())
    state = call.state(source)
    assert isinstance(state, Channels)
    dim = state.dim + call.out.ndim - source.ndim
    if call.out.shape[dim] != len(state.labels):
        return call.unknown(f"{call.where} spreads it over all channels")
    return Channels(dim, state.labels)


def repeat(call: Call) -> Outcome:
    """Copies the tensor along each dimension."""
    source = next(call.tensors())
    state = call.state(source)
    assert isinstance(state, Channels)
    dim = state.dim + call.out.ndim - source.ndim
    return Channels(dim, np.tile(state.labels, call.args["repeats"][dim]))


def select(call: Call) -> Outcome:
    """One place of a dimension, which disappears."""
    source = next(call.tensors())
    state = call.state(source)
    assert isinstance(state, Channels)
    dim = tensor_dim(call.args["dim"], source.ndim)
    if dim == state.dim:
        return call.unknown(f"{call.where} picks single channels")
    one = Channels(state.dim - (dim < state.dim), state.labels)
    return one if isinstance(call.out, Tensor) else [one] * len(call.out)


def slice_(call: Call) -> Outcome:
    """A range of a dimension."""
    state, dim = _along(call)
    if dim != state.dim:
        return state
    if call.args.get("step", 1) != 1:
        return call.unknown(f"{call.where} picks every other channel")
    start = call.args.get("start") or 0
    start = start + len(state.labels) if start < 0 else start
    return Channels(dim, state.labels[start : start + call.out.shape[dim]])


def split(call: Call) -> Outcome:
    """Several ranges of a dimension; equal ones lose the same channels and stay equal."""
    state, dim = _along(call)
    if dim != state.dim:
        return [state] * len(call.out)
    sizes = [part.shape[dim] for part in call.out]
    parts = np.split(state.labels, np.cumsum(sizes)[:-1])
    if all_equal(sizes):
        for part in parts[1:]:
            call.labels.join(parts[0], part)
    return [Channels(dim, part) for part in parts]


def cat(call: Call) -> Outcome:
    """Tensors side by side; along another dimension than their channels they are tied."""
    tensors = [t for t in call.args["tensors"] if t.numel() or t.ndim > 1]
    states = [call.state(t) for t in tensors]
    dim = tensor_dim(call.args["dim"], call.out.ndim)
    dims = {s.dim for s in states if isinstance(s, Channels)}
    if len(dims) > 1:
        return call.unknown(f"{call.where} mixes two kinds of channels")
    channel_dim = dims.pop()
    parts = [
        s.labels if isinstance(s, Channels)
        else labels_read(call, s, t.shape[channel_dim])
        for t, s in zip(tensors, states, strict=True)
    ]  # fmt: skip
    if channel_dim == dim:
        return Channels(dim, np.concatenate(parts))
    for part in parts[1:]:
        call.labels.join(parts[0], part)
    return Channels(channel_dim, parts[0])


def stack(call: Call) -> Outcome:
    """Tensors along a new dimension."""
    tensors = call.args["tensors"]
    states = [call.state(t) for t in tensors]
    dims = {s.dim if isinstance(s, Channels) else None for s in states}
    (dim, *more) = dims
    if more or dim is None:
        return call.unknown()
    first, *rest = [s.labels for s in states if isinstance(s, Channels)]
    for labels in rest:
        call.labels.join(first, labels)
    new = tensor_dim(call.args["dim"], call.out.ndim)
    return Channels(dim + (new <= dim), first)


def pad(call: Call) -> Outcome:
    """Constant padding; padded channels hold a constant and go with what they are added to."""
    source = call.args["self"]
    state = call.state(source)
    assert isinstance(state, Channels)
    sizes = call.args["pad"]
    at = 2 * (source.ndim - 1 - state.dim)
    left, right = sizes[at : at + 2] if at < len(sizes) else (0, 0)
    if left < 0 or right < 0:
        return call.unknown()
    fresh = call.labels.fresh
    parts = (fresh(left), state.labels, fresh(right)) if left or right else (state.labels,)
    return Channels(state.dim, np.concatenate(parts))


def pixel_shuffle(call: Call) -> Outcome:
    """`r*r` channels become the pixels of one; they go together."""
    state = call.state(call.args["self"])
    assert isinstance(state, Channels)
    if state.dim != call.out.ndim - 3:
        return call.unknown()
    blocks = state.labels.reshape(call.out.shape[-3], -1)
    call.labels.join(blocks, blocks[:, :1])
    return Channels(state.dim, blocks[:, 0])


def pixel_unshuffle(call: Call) -> Outcome:
    """The pixels of one channel become `r*r` channels."""
    return _spread(call, call.args["downscale_factor"] ** 2)


def unfold(call: Call) -> Outcome:
    """`im2col`: the pixels of one channel's window become as many channels, one by one."""
    return _spread(call, math.prod(call.args["kernel_size"]))


def _spread(call: Call, n: int) -> Outcome:
    """Every channel of an image becomes `n` channels in its place."""
    source = call.args["self"]
    state = call.state(source)
    assert isinstance(state, Channels)
    if state.dim != source.ndim - 3:
        return call.unknown()
    return Channels(state.dim, np.repeat(state.labels, n))


def fold(call: Call) -> Outcome:
    """`col2im`: the channels of one window are summed into one channel."""
    source = call.args["self"]
    state = call.state(source)
    assert isinstance(state, Channels)
    if state.dim != source.ndim - 2:
        return call.unknown()
    rows = state.labels.reshape(-1, math.prod(call.args["kernel_size"]))
    call.labels.join(rows[:, :1], rows)
    return Channels(state.dim, rows[:, 0].copy())


def channel_shuffle(call: Call) -> Outcome:
    """Position `(i, j)` of `(g, n/g)` goes to `(j, i)`; the same `j` of every group is tied."""
    state = call.state(call.args["self"])
    assert isinstance(state, Channels)
    if state.dim != 1:
        return call.unknown()
    g = call.args["groups"]
    rows = state.labels.reshape(g, -1)
    call.labels.join(rows[:1], rows)
    return Channels(1, np.repeat(rows[0], g))


def glu(call: Call) -> Outcome:
    """One half gates the other."""
    state, dim = _along(call)
    if dim != state.dim:
        return state
    first, second = np.split(state.labels, 2)
    call.labels.join(first, second)
    return Channels(dim, first)


def unchanged_elsewhere(call: Call) -> Outcome:
    """Operations along one dimension that would mix channels, were they along theirs."""
    state, dim = _along(call)
    if dim == state.dim:
        return call.unknown()
    return state


def over_others(call: Call) -> Outcome:
    """Flips, rolls and Fourier transforms of other dimensions than that of channels."""
    source = next(call.tensors())
    state = call.state(source)
    assert isinstance(state, Channels)
    dims = call.args["dims"] if "dims" in call.args else call.args["dim"]
    dims = [dims] if isinstance(dims, int) else dims
    if not dims or state.dim in {tensor_dim(d, source.ndim) for d in dims}:
        return call.unknown()
    return state


def indexed(call: Call) -> Outcome:
    """`x[:, places]`, where channels are not what is picked."""
    state, dims = call.state(call.args["self"]), dims_after_index(call)
    if not isinstance(state, Channels) or dims is None or state.dim not in dims:
        return call.unknown()
    return Channels(dims.index(state.dim), state.labels)


def dims_after_index(call: Call) -> list[int | None] | None:
    """For each dimension of `x[places]` that of `x`, or None where places are picked.

    None altogether where places are said by a mask, or by channels.
    """
    places = call.args["indices"]
    picked = [dim for dim, place in enumerate(places) if place is not None]
    tensors = [places[dim] for dim in picked]
    if any(t.dtype in (torch.bool, torch.uint8) or labels_of(call.state(t)) for t in tensors):
        return None
    rest = [dim for dim in range(call.args["self"].ndim) if dim not in picked]
    are_neighbours = picked == list(range(picked[0], picked[-1] + 1))
    at = picked[0] if are_neighbours else 0
    return [*rest[:at], *[None] * max(t.ndim for t in tensors), *rest[at:]]


def picked(call: Call) -> Outcome:
    """`gather` and `max_unpool`: values of a channel go where an index of that channel says."""
    source, index = list(call.tensors())[:2]
    state, of_index = call.state(source), call.state(index)
    dim = call.args.get("dim")
    if not isinstance(state, Channels) or not isinstance(of_index, Channels):
        return call.unknown()
    if state.dim != of_index.dim or len(state.labels) != len(of_index.labels):
        return call.unknown()
    if dim is not None and tensor_dim(dim, source.ndim) == state.dim:
        return call.unknown()
    call.labels.join(state.labels, of_index.labels)
    return state


def copied(call: Call) -> Outcome:
    """`copy_` into a tensor of its own, all of which is written over."""
    into, source = list(call.tensors())[:2]
    state = call.state(source)
    is_whole = into.shape == source.shape and not into._is_view()
    return state if is_whole and isinstance(state, Channels) else elementwise(call)


def _along(call: Call) -> tuple[Channels, int]:
    """The state of the first tensor, and the dimension that the operation goes along."""
    source = next(call.tensors())
    state = call.state(source)
    assert isinstance(state, Channels)
    dim: Any = call.args.get("dim", 0)
    return state, tensor_dim(dim, source.ndim)
