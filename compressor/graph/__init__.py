"""From a network to its channel groups, and why a group is locked.

How it works. The network runs once on the example input while `record.py` watches every ATen
operation. Each position along the channel dimension of every tensor carries a *label*. A
convolution writes fresh labels; batch-norm, activations and pooling hand them on; a view, a
concatenation or a shuffle moves them; a sum *joins* the labels of its operands position by
position. Labels that end up joined can only be removed together, and those that lie in the same
tensors form one channel group.

Why not torch.export or torch.fx. Both need code that they can trace, which detection networks and
much of timm are not; both would need a rule for every spelling of an operation (module, function,
method). ATen, which torch.export itself is built on, has one spelling, whatever runs is seen, and
exported programs (`.pt2`) go the same way. What a recording cannot see is another branch of the
code, so code that looks at values of the input is found and locks what it could reach.

An operation without a rule in `rules.py` locks what it reads, with its name and the user's line:
unknown means locked, never guessed.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from compressor.errors import GraphError
from compressor.graph.record import Record, record
from compressor.graph.rules import outcome
from compressor.rows import nothing_in
from compressor.running import buffers_kept, cloned, in_training
from compressor.values import (
    FORWARD_FAILURES,
    WRAPPERS,
    ChannelGroup,
    Cost,
    Example,
    call,
    example_shapes,
)


def channel_groups(model: nn.Module, example_input: Example) -> tuple[ChannelGroup, ...]:
    """Channels that can only be removed together, in graph order.

    Args:
        model: In eval mode; it is not changed.
        example_input: `(1, c, h, w)`, as the model takes it; a tuple holds positional arguments,
            a dict keyword arguments.

    Raises:
        GraphError: The network is in training mode, does not take `example_input`, or depends on
            values of its input so early that nothing is left to prune.
    """
    _check_kind(model)
    training = in_training(model)
    if training:
        where = f" ({training[0]})" if training[0] else ""
        raise GraphError(f"{type(model).__name__}{where} is in training mode; call .eval() first.")
    fault = nothing_in(example_input)
    if fault is not None:
        raise GraphError(f"{type(model).__name__} cannot be recorded: {fault}.")
    try:
        with torch.no_grad(), buffers_kept(model):
            seen = record(model, example_input, outcome)
    except FORWARD_FAILURES as err:
        raise _not_taken(model, example_input, err) from err
    groups = seen.labels.groups(seen.locked_tensors)
    _check_static(model, seen, groups)
    return groups


def outputs(model: nn.Module, example_input: Example) -> Any:
    """What `model` returns for `example_input`, without gradients.

    Raises:
        GraphError: It does not take that input.
    """
    try:
        with torch.no_grad(), buffers_kept(model):
            return call(model, cloned(example_input))
    except FORWARD_FAILURES as err:
        raise _not_taken(model, example_input, err) from err


def cost(module: nn.Module, example_input: Example) -> Cost:
    """Multiply-accumulates of convolutions and matrix products, and parameters, for one example.

    Biases, norms, activations and pooling are not counted, as usual in this field.

    Args:
        module: Not changed.
        example_input: One example.
    """
    counter, copied = FlopCounterMode(display=False), cloned(example_input)
    with torch.no_grad(), buffers_kept(module), counter:
        call(module, copied)
    return Cost(
        macs=counter.get_total_flops() // 2,
        params=sum(p.numel() for p in module.parameters()),
    )


def _check_static(model: nn.Module, seen: Record, groups: tuple[ChannelGroup, ...]) -> None:
    """Refuses a network in which nothing but its dynamic code keeps channels from pruning."""
    if seen.dynamic is not None and all(g.locked_because for g in groups):
        raise GraphError(
            f"{type(model).__name__} cannot be pruned: {seen.dynamic}. With another value the "
            f"code may go another way, which one forward pass does not show. Write it with "
            f"torch.where, move it out of the model, or freeze that part into one way."
        )


def _check_kind(model: nn.Module) -> None:
    """Refuses what stands around a network, and what shows no layers."""
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise GraphError(
            f"{name} is TorchScript, whose layers cannot be changed; give the module that it was "
            f"scripted or traced from."
        )
    for inner in ("_orig_mod", "module"):  # torch.compile; DataParallel and the like
        is_wrapper = inner == "_orig_mod" or isinstance(model, WRAPPERS)
        if is_wrapper and isinstance(getattr(model, inner, None), nn.Module):
            raise GraphError(f"{name} stands around the network; give what is in it, .{inner}.")


def _not_taken(model: nn.Module, example: Example, err: BaseException) -> GraphError:
    if isinstance(err, MemoryError) or "allocate memory" in str(err):
        return GraphError(
            f"{type(model).__name__} needs more memory than there is for an input of shape "
            f"{example_shapes(example)}: {_told(err)}."
        )
    if any(map(is_lazy, model.parameters())):
        return GraphError(
            f"{type(model).__name__} has lazy layers whose weights do not exist yet; load its "
            f"trained weights first, or call it once on an input that it takes."
        )
    advice = (
        "Give the shape that it was trained with (--input-shape C,H,W; image files are read as "
        "colour unless C is 1)."
    )
    if not isinstance(example, Tensor) or example.ndim != 4:
        named = f"It was given {', '.join(example)}; its" if isinstance(example, dict) else "Its"
        advice = f"{named} forward pass takes {inspect.signature(model.forward)}."
    return GraphError(
        f"{type(model).__name__} does not take an input of shape {example_shapes(example)}: "
        f"{_told(err)}. {advice}"
    )


def _told(err: BaseException) -> str:
    lines = str(err).strip().splitlines()
    return f"{type(err).__name__}: {lines[0] if lines else 'no message'}"
