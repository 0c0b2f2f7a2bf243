"""(model, plan) -> a new, smaller model.

Two engines. `remove_channels` slices tensors in milliseconds and is what the search uses.
`prune_with_nni` is NNI's ModelSpeedup, which infers the sizes by itself from masks: slow, but
an independent second opinion on the final model.

The oracle of both is `masked`: the original network whose *readers* of a removed channel see
zeros. (A network with zeroed filters is no oracle: batch-norm turns a zeroed channel into a
constant, which the compact network does not have.)
"""

import contextlib
import copy
import io
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from compressor.errors import EngineError, PlanError, unknown_name
from compressor.values import BATCH_NORMS, CONVOLUTIONS, ChannelGroup, ChannelSlice, Plan, Role

logger = logging.getLogger(__name__)


def remove_channels(model: nn.Module, groups: Sequence[ChannelGroup], plan: Plan) -> nn.Module:
    """A copy of `model` without the channels that `plan` leaves out.

    Args:
        model: Not changed.
        groups: From `graph.channel_groups(model, ...)`.
        plan: Group name -> kept channels; groups not named stay whole.

    Returns:
        The same class of module with smaller tensors; dtype, device, training mode and
        requires_grad as before.

    Raises:
        PlanError: The plan names unknown or locked groups, or impossible channels.
    """
    check_plan(groups, plan)
    pruned = copy.deepcopy(model)
    touched: set[str] = set()
    for (module_name, tensor, dim), keep in _kept_positions(model, groups, plan).items():
        module = pruned.get_submodule(module_name)
        _replace(module, tensor, dim, torch.from_numpy(np.flatnonzero(keep)))
        touched.add(module_name)
    for module_name in touched:
        _fix_attributes(pruned.get_submodule(module_name))
    return pruned


def check_plan(groups: Sequence[ChannelGroup], plan: Plan) -> None:
    """Raises `PlanError` where `plan` does not fit `groups`; returns nothing."""
    by_name = {group.name: group for group in groups}
    for name, kept in plan.kept.items():
        if name not in by_name:
            raise PlanError(unknown_name("channel group", name, by_name))
        group = by_name[name]
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


def prune_with_nni(
    model: nn.Module, example_input: Tensor, groups: Sequence[ChannelGroup], plan: Plan
) -> nn.Module:
    """The same as `remove_channels`, done by NNI 3.0's ModelSpeedup.

    NNI's own tracer fails on current torch, so it is given a torch.fx graph. It prunes in place,
    so it gets a copy. It runs random inputs through batch-norm in training mode, which would
    overwrite the running statistics (seen: outputs off by 8.1); momentum 0 meanwhile keeps them.

    Raises:
        PlanError: As for `remove_channels`.
        EngineError: NNI cannot be imported, or cannot process this network.
    """
    check_plan(groups, plan)
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
    graph_module = torch.fx.symbolic_trace(victim)
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
            speedup = ModelSpeedup(victim, example_input, masks, graph_module=graph_module)
            compact = speedup.speedup_model().eval()
            with torch.no_grad():
                compact(example_input)
    except (SpeedupError, *_NNI_FAILURES) as err:
        raise EngineError(
            f"NNI cannot process {type(model).__name__}: {type(err).__name__}: {err}"
        ) from err
    assert isinstance(compact, nn.Module)
    for name, momentum in momenta.items():
        slimmed = compact.get_submodule(name)
        assert isinstance(slimmed, BATCH_NORMS)
        slimmed.momentum = momentum
    for (module_name, tensor, dim), keep in _kept_positions(model, groups, plan).items():
        found = getattr(compact.get_submodule(module_name), tensor).shape[dim]
        if found != keep.sum():
            raise EngineError(
                f"NNI left {module_name}.{tensor} {found} wide in dimension {dim}; "
                f"{keep.sum()} were planned."
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
        removed = _removed(group, plan)
        for where in group.slices:
            module = model.get_submodule(where.module)
            if where.role is Role.CONSUMER or isinstance(module, BATCH_NORMS) or not len(removed):
                continue
            value = getattr(module, where.tensor)
            mask = masks[where.module].setdefault(where.tensor, torch.ones_like(value).detach())
            mask[where.index[removed].ravel()] = 0
    return dict(masks)


# What NNI 3.0 was seen to raise, or may, on a network that it does not understand.
_NNI_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip


@contextlib.contextmanager
def masked(model: nn.Module, groups: Sequence[ChannelGroup], plan: Plan) -> Iterator[nn.Module]:
    """`model` whose readers of removed channels see zeros while the context lasts.

    Yields:
        The very `model`, with hooks that are gone afterwards; no tensor of it is touched.
    """
    hooks = []
    for group in groups:
        removed = _removed(group, plan)
        for where in group.slices:
            if where.role is Role.CONSUMER and len(removed):
                columns = torch.from_numpy(where.index[removed].ravel())
                reader = model.get_submodule(where.module)
                hooks.append(reader.register_forward_pre_hook(_ZeroInputs(columns)))
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


class _ZeroInputs:
    """A pre-hook that clears some channels of a module's input."""

    def __init__(self, columns: Tensor) -> None:
        self.columns = columns

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        cleared = args[0].clone()
        cleared[:, self.columns] = 0
        return (cleared, *args[1:])


def _removed(group: ChannelGroup, plan: Plan) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    kept = plan.kept.get(group.name, range(group.n_channels))
    return np.setdiff1d(np.arange(group.n_channels), np.fromiter(kept, dtype=np.int64))


def _kept_positions(
    model: nn.Module, groups: Sequence[ChannelGroup], plan: Plan
) -> dict[tuple[str, str, int], np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """(module, tensor, dim) -> which positions stay; several groups may share one tensor."""
    keep: dict[tuple[str, str, int], np.ndarray[tuple[int], np.dtype[np.bool_]]] = {}
    for group in groups:
        removed = _removed(group, plan)
        if not len(removed):
            continue
        for where in group.slices:
            place = (where.module, where.tensor, where.dim)
            if place not in keep:
                keep[place] = np.ones(_tensor(model, where).shape[where.dim], dtype=np.bool_)
            keep[place][where.index[removed].ravel()] = False
    return keep


def _tensor(model: nn.Module, where: ChannelSlice) -> Tensor:
    value = getattr(model.get_submodule(where.module), where.tensor)
    assert isinstance(value, Tensor)
    return value


def _replace(module: nn.Module, tensor: str, dim: int, rows: Tensor) -> None:
    old = getattr(module, tensor)
    new = old.detach().index_select(dim, rows.to(old.device))
    if isinstance(old, nn.Parameter):
        setattr(module, tensor, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        setattr(module, tensor, new)


def _fix_attributes(module: nn.Module) -> None:
    """Channel counts that a module keeps beside its tensors."""
    if isinstance(module, CONVOLUTIONS):
        is_depthwise = module.groups > 1
        module.out_channels = module.weight.shape[0]
        if is_depthwise:
            module.groups = module.out_channels
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, BATCH_NORMS):
        tensors = (module.weight, module.running_mean)
        module.num_features = next(len(t) for t in tensors if t is not None)
