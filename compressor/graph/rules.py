"""Which rule an ATen operation follows.

Every rule is a function of a `Call`; it returns the state of the output (or one state for each
output) after joining and locking labels. What has no rule locks what it reads: unknown means
locked, never guessed.
"""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from compressor.graph import heads
from compressor.graph.layers import convolution, deformed, linear
from compressor.graph.moves import (
    cat,
    channel_shuffle,
    copied,
    dims_after_index,
    expand,
    fold,
    glu,
    indexed,
    order_of,
    over_others,
    pad,
    permute,
    picked,
    pixel_shuffle,
    pixel_unshuffle,
    repeat,
    select,
    slice_,
    split,
    stack,
    unchanged_elsewhere,
    unfold,
    view,
)
from compressor.graph.per_channel import (
    TRAILING_DIMS,
    elementwise,
    group_norm,
    layer_norm,
    norm_over_batch,
    over_dims,
    over_trailing_dims,
    roi_align,
)
from compressor.graph.record import Call, tensor_dim
from compressor.graph.states import Channels, Fixed, Grid, Outcome, State, Weight, depends_on_input

Rule = Callable[[Call], Outcome]

LOOKS_AT_VALUES = frozenset({"_local_scalar_dense", "is_nonzero", "equal"})


def outcome(call: Call, is_pointwise: bool) -> Outcome:
    """The states of what `call` returned."""
    if call.name in LOOKS_AT_VALUES:
        if any(depends_on_input(call.state(tensor)) for tensor in call.tensors()):
            call.record.look_at_value()
        return call.unknown()
    if call.name == "expand":
        call.spread()
    found = _of_heads(call, is_pointwise=is_pointwise) if call.name not in METADATA else None
    if found is not None:
        return found
    states = [call.state(tensor) for tensor in call.tensors()]
    if (
        not any(isinstance(state, (Channels, Grid)) for state in states)
        and call.name not in PRODUCERS
    ):
        return _without_channels(call, states, is_pointwise=is_pointwise)
    if call.name in METADATA:
        return call.fixed("it is a constant")
    if call.name in RULES:
        is_ready = call.name in MANY or isinstance(states[0], Channels)
        return RULES[call.name](call) if is_ready else call.unknown()
    if is_pointwise or call.name in POINTWISE:
        return elementwise(call)
    if call.name in TRAILING_DIMS:
        return over_trailing_dims(call)
    return call.unknown()


def matrix(call: Call) -> Outcome:
    """`mm`: a layer, or a product of two activations."""
    is_layer = isinstance(call.state(call.args["mat2"]), Weight)
    return linear(call) if is_layer else heads.product(call)


def fused(call: Call) -> Outcome:
    """Fused attention of one head, or where heads are not kept apart."""
    return heads.attention(call) or call.unknown()


def _of_heads(call: Call, *, is_pointwise: bool) -> Outcome:
    """What a tensor of heads becomes; None where they cannot be kept apart, and are no more."""
    grids = [t for t in call.tensors() if isinstance(call.state(t), Grid)]
    rule = heads.RULES.get(call.name)
    if rule is None and (is_pointwise or call.name in POINTWISE):
        rule = heads.elementwise
    found = rule(call) if grids and rule is not None else None
    if found is None:
        for tensor in grids:
            state = call.state(tensor)
            if isinstance(state, Grid):
                call.record.states[tensor] = heads.without_heads(call, state)
    return found


def _without_channels(
    call: Call, states: Sequence[State | None], *, is_pointwise: bool
) -> Outcome:
    """Weights stay weights under views and functions of each element; the rest is fixed."""
    weights = [state for state in states if isinstance(state, Weight)]
    fixed = [state for state in states if isinstance(state, Fixed)]
    if call.name == "index" and isinstance(states[0], Weight):
        left = dims_after_index(call)
        if left is not None and not any(map(depends_on_input, states)):
            for places in weights[1:]:
                call.record.lock_tensors(places, f"{places.sources[0][0]} is used by {call.where}")
            return states[0].through(left)
    if weights and not fixed and isinstance(call.out, Tensor):
        if is_pointwise or call.name in POINTWISE:
            return _pointwise_weight(call)
        if len(weights) == 1:
            dims = _view_dims(call, weights[0])
            if dims is not None:
                return weights[0].through(dims)
    for weight in weights:
        call.record.lock_tensors(weight, f"{weight.sources[0][0]} is used by {call.where}")
    if fixed:
        return call.fixed(fixed[0].because)
    return call.fixed(f"it is computed from {weights[0].sources[0][0]}")


def _pointwise_weight(call: Call) -> Outcome:
    """Each element of the output depends on one element of each weight."""
    n_dims = call.out.ndim
    sources: list[tuple[str, tuple[int | None, ...]]] = []
    blank: set[int] = set()  # dimensions of some weight's own that no dimension of it runs along
    for tensor in call.tensors():
        state, shift = call.state(tensor), call.out.ndim - tensor.ndim
        if isinstance(state, Weight):
            dims = [
                None if d < shift or tensor.shape[d - shift] == 1 else d - shift
                for d in range(n_dims)
            ]
            sources += state.through(dims).sources
            own_dims = ((d, own) for d, own in enumerate(dims) if own is not None)
            blank |= {d for d, own in own_dims if not state.runs_along(own)}
        elif tensor.numel() > 1:
            return call.unknown(f"{call.where} combines it with a constant")
    made = Weight(tuple(sources))
    if any(made.runs_along(d) for d in blank):
        return call.unknown(f"{call.where} combines it with a constant")
    return made


def _view_dims(call: Call, weight: Weight) -> Sequence[int | None] | None:
    """For each dimension of a view, the viewed one; None if this is more than a view."""
    source = next(call.tensors())
    if call.name in ("permute", "transpose", "t"):
        return order_of(call, source)
    if call.name == "repeat":  # `Labels.untiled` tells the copies by their number
        shift = call.out.ndim - source.ndim
        return [
            d - shift if d >= shift and source.shape[d - shift] > 1 else None
            for d in range(call.out.ndim)
        ]
    if call.name == "expand":
        shift = call.out.ndim - source.ndim
        return [
            d - shift if d >= shift and source.shape[d - shift] == n else None
            for d, n in enumerate(call.out.shape)
        ]
    if call.name == "select":  # a row of a stacked parameter
        gone = tensor_dim(call.args["dim"], source.ndim)
        return [d for d in range(source.ndim) if d != gone]
    if call.name not in VIEWS or source.numel() != call.out.numel():
        return None
    old, new = _places(source.shape), _places(call.out.shape)
    whole = {place: d for d, place in enumerate(old) if place in new and place[1] != 1}
    split = (d for d, (_, n) in enumerate(old) if n != 1 and d not in whole.values())
    if any(map(weight.runs_along, split)):
        return None
    return [whole.get(place) for place in new]


def _places(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Of each dimension how many parts lie before it, and its size: views keep both."""
    return [(math.prod(shape[:d]), n) for d, n in enumerate(shape)]


VIEWS = frozenset({
    "view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze",
    "detach", "alias", "clone", "_to_copy", "contiguous", "lift_fresh", "lift_fresh_copy",
})  # fmt: skip
# Element by element, though ATen does not tag them so.
POINTWISE = frozenset({
    "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu", "celu", "selu", "mish",
    "softplus", "gelu", "silu", "relu6", "relu", "log_sigmoid_forward", "detach", "alias",
    "clone", "_to_copy", "contiguous", "lift_fresh", "lift_fresh_copy", "fill", "zero",
    "native_dropout", "dropout", "nan_to_num", "threshold", "softshrink", "hardshrink",
    "zeros_like", "ones_like", "rsub", "masked_fill", "_prelu_kernel",
})  # fmt: skip
# Take from the tensor no more than its shape, kind and place.
METADATA = frozenset({
    "new_zeros", "new_ones", "new_full", "new_empty", "empty_like", "rand_like", "randn_like",
    "_assert_tensor_metadata",
})  # fmt: skip
MANY = frozenset({
    "convolution", "mm", "addmm", "linear", "bmm", "cat", "stack", "copy",
    "_scaled_dot_product_flash_attention_for_cpu", "torchvision::deform_conv2d",
})  # fmt: skip
PRODUCERS = frozenset({"convolution", "mm", "addmm", "linear", "torchvision::deform_conv2d"})
RULES: dict[str, Rule] = {
    "convolution": convolution, "mm": matrix, "addmm": linear, "linear": linear,
    "bmm": heads.product, "_scaled_dot_product_flash_attention_for_cpu": fused,
    "native_batch_norm": norm_over_batch, "_native_batch_norm_legit": norm_over_batch,
    "_native_batch_norm_legit_no_training": norm_over_batch, "cudnn_batch_norm": norm_over_batch,
    "miopen_batch_norm": norm_over_batch, "batch_norm": norm_over_batch,
    "native_group_norm": group_norm, "native_layer_norm": layer_norm,
    "mean": over_dims, "sum": over_dims, "amax": over_dims, "amin": over_dims, "var": over_dims,
    "std": over_dims, "var_mean": over_dims, "std_mean": over_dims, "max": over_dims,
    "min": over_dims, "argmax": over_dims, "argmin": over_dims, "logsumexp": over_dims,
    "linalg_vector_norm": over_dims, "norm": over_dims, "prod": over_dims, "any": over_dims,
    "all": over_dims, "_softmax": over_dims, "_log_softmax": over_dims, "cumsum": over_dims,
    "view": view, "_unsafe_view": view, "reshape": view, "_reshape_alias": view,
    "squeeze": view, "unsqueeze": view, "permute": permute, "transpose": permute, "t": permute,
    "expand": expand, "repeat": repeat, "select": select, "unbind": select, "slice": slice_,
    "split": split, "split_with_sizes": split, "unsafe_split": split, "cat": cat, "stack": stack,
    "constant_pad_nd": pad, "pixel_shuffle": pixel_shuffle, "pixel_unshuffle": pixel_unshuffle,
    "channel_shuffle": channel_shuffle, "native_channel_shuffle": channel_shuffle, "glu": glu,
    "index": indexed, "index_select": unchanged_elsewhere, "sort": unchanged_elsewhere,
    "topk": unchanged_elsewhere, "flip": over_others, "roll": over_others, "median": over_dims,
    "nanmedian": over_dims, "kthvalue": over_dims, "mode": over_dims, "copy": copied,
    "im2col": unfold, "col2im": fold, "gather": picked, "max_unpool2d": picked,
    "max_unpool3d": picked, "_fft_r2c": over_others, "_fft_c2r": over_others,
    "_fft_c2c": over_others,
    "torchvision::deform_conv2d": deformed, "torchvision::roi_align": roi_align,
    "torchvision::roi_pool": roi_align,
}  # fmt: skip
