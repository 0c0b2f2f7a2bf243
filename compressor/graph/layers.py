"""Rules for operations that read channels and write others: convolutions and linear layers.

Legend: `g` groups of a grouped convolution; `ours` are the labels of what a layer reads,
`theirs` of what it writes.
"""

import math
from dataclasses import replace

from torch import Tensor

from compressor.graph.record import Call
from compressor.graph.states import COMPUTED_BIAS, Channels, Fixed, Outcome, State, Weight
from compressor.values import IndexArray, Role


def convolution(call: Call) -> Outcome:
    """Plain, grouped, depthwise and transposed, in one, two or three dimensions."""
    source, weight = call.args["input"], call.state(call.args["weight"])
    is_transposed, g = call.args["transposed"], call.args["groups"]
    state = call.state(source)
    n_in, n_out = source.shape[1], call.out.shape[1]
    if not isinstance(weight, Weight):
        return correlation(call)
    if isinstance(state, Channels) and state.dim != 1:
        return call.unknown()
    ours = labels_read(call, state, n_in)
    full, inner = (0, 1) if not is_transposed else (1, 0)  # dims of output and input channels
    n_pixels = math.prod((source if is_transposed else call.out).shape[2:])
    theirs = call.labels.fresh(n_out)
    if g == 1:
        call.place(weight, inner, ours, Role.CONSUMER, n_pixels)
        call.place(weight, full, theirs, Role.PRODUCER, n_pixels)
        call.read(0, 1, ours)
    elif g >= min(n_in, n_out) // g:  # more groups than channels in one: whole groups go
        call.labels.join(ours.reshape(g, -1)[:, :1], ours.reshape(g, -1))
        call.labels.join(ours.reshape(g, -1)[:, :1], theirs.reshape(g, -1))
        call.place(weight, 0, ours if is_transposed else theirs, Role.PER_CHANNEL, n_pixels)
    else:  # the same channel of every group goes, so that groups stay alike
        for labels in (ours, theirs):
            call.labels.join(labels.reshape(g, -1)[:1], labels.reshape(g, -1))
        first = {full: theirs, inner: ours}
        roles = {full: Role.PRODUCER, inner: Role.CONSUMER}
        for dim, labels in first.items():
            whole = labels if dim == 0 else labels.reshape(g, -1)[0]
            call.place(weight, dim, whole, roles[dim], n_pixels)
        call.read(0, 1, ours)
    _place_bias(call, call.args["bias"], theirs)
    return Channels(1, theirs)


def correlation(call: Call) -> Outcome:
    """What one image gives as filters for another: they meet channel by channel."""
    ours, theirs = call.state(call.args["input"]), call.state(call.args["weight"])
    is_plain = not call.args["transposed"] and call.args["bias"] is None
    if isinstance(ours, Channels) and isinstance(theirs, Channels) and is_plain and ours.dim == 1:
        if (theirs.dim, call.args["groups"]) == (1, 1):
            call.labels.join(ours.labels, theirs.labels)
            call.read(0, 1, ours.labels)
            return call.fixed(f"{call.where} sums over channels")
        if theirs.dim == 0 and len(ours.labels) == len(theirs.labels) == call.args["groups"]:
            call.labels.join(ours.labels, theirs.labels)
            return ours
    return call.unknown(f"{call.where} computes its weight from other tensors")


def deformed(call: Call) -> Outcome:
    """Deformable convolution of torchvision: where it looks is no channel of what it reads."""
    for name in ("offset", "mask"):
        state = call.state(call.args[name])
        if isinstance(state, Channels):
            call.lock(state.labels, f"{call.where} reads them as coordinates")
    state = call.state(call.args["input"])
    if call.args["offset_groups"] != 1 and isinstance(state, Channels):
        call.lock(state.labels, f"{call.where} gives some channels offsets of their own")
    return convolution(replace(call, args={**call.args, "transposed": False}))


def linear(call: Call) -> Outcome:
    """`mm`, `addmm` and `linear` of activations with a weight."""
    if call.name == "linear":
        source, matrix, argument = call.args["input"], call.args["weight"], 0
    elif call.name == "mm":
        source, matrix, argument = call.args["self"], call.args["mat2"], 0
    else:
        source, matrix, argument = call.args["mat1"], call.args["mat2"], 1
    state, weight = call.state(source), call.state(matrix)
    if not isinstance(weight, Weight):
        return call.unknown()
    if isinstance(state, Weight):
        if any(name in call.record.parameters for name, _ in state.sources):
            return call.unknown()
        call.record.lock_tensors(state, f"{call.where} reads it")  # a buffer: coordinates, say
    if isinstance(state, Channels) and state.dim != source.ndim - 1:
        return call.unknown()
    inner, full = (1, 0) if call.name == "linear" else (0, 1)
    ours = labels_read(call, state, source.shape[-1])
    theirs = call.labels.fresh(call.out.shape[-1])
    n_rows = source.numel() // source.shape[-1]
    call.place(weight, inner, ours, Role.CONSUMER, n_rows)
    call.place(weight, full, theirs, Role.PRODUCER, n_rows)
    call.read(argument, source.ndim - 1, ours)
    _place_bias(call, call.args.get("bias") if call.name == "linear" else call.args.get("self")
                if call.name == "addmm" else None, theirs)  # fmt: skip
    return Channels(call.out.ndim - 1, theirs)


def labels_read(call: Call, state: State | None, n: int) -> IndexArray:
    """Labels of what a layer reads; new ones, locked, where nothing prunable comes in."""
    if isinstance(state, Channels):
        return state.labels
    because = state.because if isinstance(state, Fixed) else "it is a constant"
    return call.labels.fresh(n, because)


def _place_bias(call: Call, bias: Tensor | None, labels: IndexArray) -> None:
    weight = call.state(bias)
    if isinstance(weight, Weight) and bias is not None and bias.ndim == 1:
        call.place(weight, 0, labels, Role.PER_CHANNEL)
    elif bias is not None:
        call.lock(labels, f"{call.where} {COMPUTED_BIAS}")
