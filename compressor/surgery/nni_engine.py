"""NNI 3.0's ModelSpeedup, an independent second opinion on the final model."""

import contextlib
import copy
import io
import logging
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from compressor.errors import EngineError
from compressor.surgery.positions import kept_positions, removed_channels, tensor_of
from compressor.values import BATCH_NORMS, ChannelGroup, Example, Plan, Role, call

# What NNI 3.0 was seen to raise, or may, on a network that it does not understand.
_NNI_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip


def prune_with_nni(
    model: nn.Module, example_input: Example, groups: Sequence[ChannelGroup], plan: Plan
) -> nn.Module:
    """The same as `remove_channels`, done by NNI 3.0's ModelSpeedup.

    NNI's own tracer fails on current torch, so it is given a torch.fx graph. It prunes in place,
    so it gets a copy. It runs random inputs through batch-norm in training mode, which would
    overwrite the running statistics (seen: outputs off by 8.1); momentum 0 meanwhile keeps them.

    Args:
        model: Not changed.
        example_input: As the model takes it.
        groups: From `graph.channel_groups(model, ...)`.
        plan: One that `check_plan` passes.

    Raises:
        EngineError: NNI cannot be imported, or cannot process this network.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # NNI greets on stdout
            from nni.compression.speedup import ModelSpeedup
            from nni.compression.speedup.error_code import SpeedupError
    except (ImportError, AttributeError) as err:  # it is archived; a Python may outgrow it
        raise EngineError(f"NNI cannot be imported here: {err}") from err

    logging.getLogger("nni").setLevel(logging.ERROR)
    victim = copy.deepcopy(model).eval()
    masks = _nni_masks(model, groups, plan)
    if not masks:
        return victim
    norms = {name: m for name, m in victim.named_modules() if isinstance(m, BATCH_NORMS)}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    for norm in norms.values():
        norm.momentum = 0.0
    try:
        graph_module = fx.symbolic_trace(victim)
        with contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
            speedup = ModelSpeedup(victim, example_input, masks, graph_module=graph_module)
            compact = speedup.speedup_model().eval()
            with torch.no_grad():
                call(compact, example_input)
    except (SpeedupError, fx.proxy.TraceError, *_NNI_FAILURES) as err:
        raise EngineError(
            f"NNI cannot process {type(model).__name__}: {type(err).__name__}: {err}"
        ) from err
    assert isinstance(compact, nn.Module)
    for name, momentum in momenta.items():
        slimmed = compact.get_submodule(name)
        assert isinstance(slimmed, BATCH_NORMS)
        slimmed.momentum = momentum
    for (key, dim), keep in kept_positions(model, groups, plan).items():
        tensor = tensor_of(compact, key)
        found = tensor.shape[dim] if isinstance(tensor, Tensor) else tensor
        if found != keep.sum():
            raise EngineError(
                f"NNI left {key} {found} wide in dimension {dim}; {keep.sum()} were planned."
            )
    return compact


def _nni_masks(
    model: nn.Module, groups: Sequence[ChannelGroup], plan: Plan
) -> dict[str, dict[str, Tensor]]:
    """Zeros over the filters of removed channels, in producers and depthwise convolutions.

    NNI finds the rest by itself, but not through a depthwise convolution with a bias.
    """
    masks: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for group in groups:
        removed = removed_channels(group, plan)
        for where in group.slices:
            module = model.get_submodule(where.module)
            if where.role is Role.CONSUMER or isinstance(module, BATCH_NORMS) or not len(removed):
                continue
            value = tensor_of(model, where.key)
            if isinstance(value, int):
                continue
            mask = masks[where.module].setdefault(where.tensor, torch.ones_like(value).detach())
            mask.index_fill_(where.dim, torch.from_numpy(where.index[removed].ravel()), 0)
    return dict(masks)
