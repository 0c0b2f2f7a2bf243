"""A network in the form in which it can be pruned, proven on the network itself.

Slicing tensors is half of surgery; the forward code must follow the new widths. Code that reads
sizes from its tensors does, and the user's own module stays what is pruned. Code with sizes
written into it (`x.view(-1, 256)`) does not: such a network is pruned as its torch.export
program, in which those numbers are rewritten. Which it is, is not guessed: every group is cut,
each to another width, and the pruned network must answer like the masked original.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from compressor.containers import answers_in
from compressor.errors import GraphError
from compressor.graph import channel_groups
from compressor.graph.alike import answers_alike
from compressor.graph.branches import residual_branches, traced
from compressor.graph.in_place import functional
from compressor.graph.states import NEEDS_PROGRAM
from compressor.inputs import PROGRAM_SUFFIX
from compressor.model_io import load_model as read_file
from compressor.program import export_program, free_batch, with_layers
from compressor.running import cloned
from compressor.surgery import cut, kept_positions, masked
from compressor.values import (
    FORWARD_FAILURES,
    Branch,
    ChannelGroup,
    Example,
    Kept,
    LoadedModel,
    Plan,
    call,
)

# Of the largest output. A wrong channel shows at 1e-1; rounding at 1e-5 and 1e-13.
PROOF_TOLERANCE, PROOF_TOLERANCE_FLOAT64 = 1e-3, 1e-8

WORTH_LOCKING = (
    0.9  # of what is free in the network's own code; below that, both forms are compared
)
MODULE, TRACED, PROGRAM = "module", "traced", "program"  # the forms

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Prunable:
    """A network and the channel groups that were proven on it.

    Attributes:
        module: The very network that was given, or an fx graph of it.
        groups: In graph order.
        form: `MODULE`; `TRACED`, an fx graph with its modules; or `PROGRAM`, of torch.export.
        branches: Residual branches that can be left out; only fx graphs have any.
    """

    module: nn.Module
    groups: tuple[ChannelGroup, ...]
    form: str
    branches: tuple[Branch, ...] = ()

    def without(self, plan: Plan) -> nn.Module:
        """A copy of the network without the channels and branches that `plan` leaves out.

        Raises:
            PlanError: The plan does not fit.
        """
        return cut(self.module, self.groups, plan, self.branches)

    def kept_positions(self, plan: Plan) -> Kept:
        """Which positions of which tensors stay under `plan`."""
        return kept_positions(self.module, self.groups, plan)

    def masked(self, plan: Plan) -> nn.Module:
        """What `without(plan)` must answer like."""
        return masked(self.module, self.groups, plan, self.branches)


def load_model(
    path: Path,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, object] | None = None,
    input_shape: Sequence[int] | None = None,
    example: Example | None = None,
    trust: bool = False,
    weights_key: str | None = None,
) -> LoadedModel:
    """The trained network in eval mode on the CPU, and an input to trace it with.

    Args:
        path: A state_dict or a checkpoint with one in it, of torch.save or `.safetensors`; a
            `.pt2` program, which comes back with nn modules for its layers, and for any batch
            size; or a pickled module, or a checkpoint with one in it, with `trust`.
        arch: `torchvision:NAME`, `timm:NAME`, or "package.module:factory", which is called with
            `arch_args` and returns the module. Modules beside the model file and in the current
            folder are found too. A checkpoint may name one of the first two itself.
        arch_args: Keyword arguments of the factory.
        input_shape: `(c, h, w)` of one input; None takes the architecture's or program's own.
        example: What it takes, in place of `input_shape`: tensors of `(1, ...)`.
        trust: Read pickles in the file although that runs code from it.
        weights_key: Which weights of a checkpoint with several, such as "ema".

    Raises:
        ModelError: The file, the architecture or the weights cannot be used.
        UntrustedModelError: The file is a pickle that holds more than tensors.
    """
    loaded = read_file(
        path, arch=arch, arch_args=arch_args, input_shape=input_shape, example=example,
        trust=trust, weights_key=weights_key,
    )  # fmt: skip
    if path.suffix != PROGRAM_SUFFIX:
        return loaded
    program = free_batch(with_layers(loaded.module), loaded.example_input)
    return replace(loaded, module=functional(program, loaded.example_input))


def make_prunable(model: nn.Module, example: Example) -> Prunable:
    """`model`, or its program where its code does not follow the widths of its tensors.

    A network whose layers compute their weights from others (weight norm, standardised
    convolutions) is a program too, if more can be pruned in it: there these weights are numbers.
    So is one with fused attention that scales by its width, or with means and maxima over
    channels: there the scale is a number, and surgery writes in what is gone.
    Where neither can be pruned whole, the groups that cannot be are locked, one by one; of that
    and a program, the one in which more can be pruned is taken.

    Raises:
        GraphError: As for `channel_groups`.
    """
    groups = channel_groups(model, example)
    form = PROGRAM if isinstance(model, fx.GraphModule) else MODULE
    probe = _probe(model, example)
    fault = _fault(probe, groups, *_proof_plans(groups))
    needs_program = any(
        reason in (group.locked_because or "") for group in groups for reason in NEEDS_PROGRAM
    )
    if fault is None and not needs_program and not _has_layers_without_group(model, groups):
        return Prunable(model, groups, form)
    if fault is not None:
        logger.info("%s does not follow its widths: %s", type(model).__name__, fault)
    if not isinstance(model, fx.GraphModule):
        program = _proven_program(model, example)
        if program is not None and _size(program.groups) > _size(groups):
            return program
        if fault is not None and program is not None:
            if _size(program.groups) >= WORTH_LOCKING * _size(groups):
                return program
            locked = _locked_where_wrong(probe, groups)
            is_more = _size(locked) > _size(program.groups)
            return Prunable(model, locked, form) if is_more else program
    if fault is None:
        return Prunable(model, groups, form)
    return Prunable(model, _locked_where_wrong(probe, groups), form)


def with_branches(prunable: Prunable, example: Example) -> Prunable:
    """The same network in a form in which residual branches can be left out, where it has any.

    Its own code is traced by torch.fx, or, where that fails, exported by torch.export. Then it is
    proven again, with all branches left out and with every second one; those are told apart that
    alone make it answer wrongly.

    Nothing in that form works in place (see `graph.in_place`): without a branch, what was written
    over may be what the layer before needs to learn.
    """
    if prunable.form == MODULE:
        for form in (TRACED, PROGRAM):
            try:
                network = in_form(prunable.module, form, example)
            except GraphError as err:
                logger.info("%s", err)
                continue
            found = _proven_branches(network, form, example, prunable.groups)
            if found is not None:
                return found
        return prunable
    network = in_form(prunable.module, prunable.form, example)
    return _proven_branches(network, prunable.form, example, prunable.groups) or prunable


def in_form(model: nn.Module, form: str, example: Example) -> fx.GraphModule:
    """`model` as a graph that works on no tensor in place, as far as that is exact.

    Args:
        model: In eval mode; not changed. An fx graph is taken for one of that form.
        form: `TRACED` or `PROGRAM`.
        example: As the model takes it.

    Raises:
        GraphError: torch.fx or torch.export cannot follow its code; torch.fx, for one, takes
            `x += y` for `x = x + y` where another name for `x` is read later.
    """
    if isinstance(model, fx.GraphModule):
        return functional(model, example)
    if form == PROGRAM:
        return functional(export_program(model, example), example)
    graph = traced(model)
    if not answers_alike(model, graph, example):
        raise GraphError(f"The torch.fx graph of {type(model).__name__} answers differently.")
    return functional(graph, example)


def _proven_branches(
    network: fx.GraphModule, form: str, example: Example, known: Sequence[ChannelGroup]
) -> Prunable | None:
    """None where the form has no branches, or has other groups, or answers wrongly."""
    locked = {group.name: group.locked_because for group in known}
    groups = tuple(
        replace(g, locked_because=locked.get(g.name, g.locked_because))
        for g in channel_groups(network, example)
    )
    if {g.name: g.n_channels for g in groups} != {g.name: g.n_channels for g in known}:
        return None
    branches = residual_branches(network, example, groups)
    probe, plans = _probe(network, example), _proof_plans(groups)
    if not branches or _fault(probe, groups, *plans) is not None:
        return None
    names = [branch.name for branch in branches]
    some = next(iter(plans), Plan({})).kept
    sets = [names, names[::2], names[1::2]]
    if _fault(probe, groups, *(Plan(some, tuple(s)) for s in sets), branches=branches) is not None:
        branches = tuple(
            b for b in branches
            if _fault(probe, groups, Plan({}, (b.name,)), branches=branches) is None
        )  # fmt: skip
        names = [branch.name for branch in branches]
        if _fault(probe, groups, Plan(some, tuple(names)), branches=branches) is not None:
            return None
    return Prunable(network, groups, form, branches) if branches else None


def _proven_program(model: nn.Module, example: Example) -> Prunable | None:
    """The program of `model`; None where there is none, or it cannot be pruned rightly."""
    try:
        program = in_form(model, PROGRAM, example)
    except GraphError as err:
        logger.info("%s", err)
        return None
    groups = channel_groups(program, example)
    if _fault(_probe(program, example), groups, *_proof_plans(groups)) is not None:
        return None
    return Prunable(program, groups, PROGRAM)


def _has_layers_without_group(model: nn.Module, groups: Sequence[ChannelGroup]) -> bool:
    """Whether a layer's weight lies in no group: it is computed, or the layer was not used."""
    known = {where.module for group in groups for where in group.slices}
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return any(isinstance(m, kinds) and name not in known for name, m in model.named_modules())


def _size(groups: Sequence[ChannelGroup]) -> int:
    """Parameters that go with the channels that can be pruned."""
    return sum(group.cost.params for group in groups if group.locked_because is None)


def disagreement(prunable: Prunable, plan: Plan, example: Example) -> str | None:
    """How a network pruned by `plan` differs from the masked original; None where it does not."""
    probe = _probe(prunable.module, example)
    return _fault(probe, prunable.groups, plan, branches=prunable.branches)


def _locked_where_wrong(
    probe: "_Probe", groups: tuple[ChannelGroup, ...]
) -> tuple[ChannelGroup, ...]:
    """`groups`, those locked that alone make the pruned network answer wrongly."""
    checked = []
    for group in groups:
        if group.locked_because is None:
            fault = _fault(probe, groups, *_proof_plans([group]))
            if fault is not None:
                because = f"the forward code does not follow its width: {fault}"
                group = replace(group, locked_because=because)
        checked.append(group)
    fault = _fault(probe, checked, *_proof_plans(checked))
    if fault is not None:
        because = f"the forward code does not follow its widths: {fault}"
        checked = [replace(g, locked_because=g.locked_because or because) for g in checked]
    return tuple(checked)


def _proof_plans(groups: Sequence[ChannelGroup]) -> tuple[Plan, ...]:
    """Plans that cut every free group, in pairs that keep what the other removes.

    A number in the code that happens to fit one of a pair cannot fit the other as well. Code that
    takes a share of what it gets (`x[:, : x.shape[1] // 2]`) is right where both shares lose as
    many channels: so alike groups are cut to different widths, and where there are more of them
    than widths, every two of them are told apart by plans that cut one and not the other.
    """
    rng = np.random.default_rng(0)
    free = [g for g in groups if g.locked_because is None and g.n_channels > 1]
    alike: dict[int, list[ChannelGroup]] = {}
    for group in free:
        alike.setdefault(group.n_channels, []).append(group)
    cut: dict[str, tuple[NDArray[np.intp], NDArray[np.intp]]] = {}
    places: dict[str, int] = {}
    for n_channels, members in alike.items():
        margin = n_channels // 4 or 1
        widths = rng.permutation(np.arange(margin, n_channels - margin + 1))
        for i, group in enumerate(members):
            order = rng.permutation(n_channels)
            cut[group.name] = order[: widths[i % len(widths)]], order[widths[i % len(widths)] :]
            places[group.name] = i if len(members) > len(widths) else 0
    n_bits = max(places.values(), default=0).bit_length()
    subsets = [free] + [[g for g in free if places[g.name] >> bit & 1] for bit in range(n_bits)]
    return tuple(
        Plan({g.name: tuple(sorted(cut[g.name][side].tolist())) for g in subset})
        for subset in subsets
        for side in (0, 1)
    )


@dataclass(frozen=True, eq=False)
class _Probe:
    """A network and an input on which a wrong channel shows."""

    model: nn.Module
    example: Example
    tolerance: float


def _probe(model: nn.Module, example: Example) -> _Probe:
    """In float64, where rounding cannot reorder the detections of a detector.

    Code that makes float32 tensors of its own is probed as it is.
    """
    wide: Example = torch.utils._pytree.tree_map(
        lambda value: (
            value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        ),
        example,
    )
    try:
        double = nn.Module.double(_stirred(model))
        with torch.no_grad():
            call(double, cloned(wide))
    except FORWARD_FAILURES:
        return _Probe(_stirred(model), example, PROOF_TOLERANCE)
    return _Probe(double, wide, PROOF_TOLERANCE_FLOAT64)


def _stirred(model: nn.Module) -> nn.Module:
    """A copy in which no norm scale is 0 and no two channels are alike.

    Networks often start with residual branches scaled by 0, behind which nothing can be seen.
    """
    stirred = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*stirred.named_parameters(), *stirred.named_buffers()):
            if tensor.is_floating_point() and tensor.numel() == max(tensor.shape, default=0):
                is_shift = name.endswith(("bias", "mean"))
                drawn = torch.rand(tensor.shape, generator=generator) + (-0.5 if is_shift else 0.5)
                tensor.copy_(drawn.to(tensor))
    return stirred


def _fault(
    probe: _Probe,
    groups: Sequence[ChannelGroup],
    *plans: Plan,
    branches: tuple[Branch, ...] = (),
) -> str | None:
    """What is wrong with the pruned network, beside the masked one; None where nothing is."""
    for plan in plans:
        if not plan.kept and not plan.dropped:
            continue
        try:
            oracle = masked(probe.model, groups, plan, branches)
            expected = _outputs(call(oracle, cloned(probe.example)))
            with torch.no_grad():
                compact = cut(probe.model, groups, plan, branches)
                got = _outputs(call(compact, cloned(probe.example)))
        except FORWARD_FAILURES as err:
            lines = str(err).strip().splitlines()
            return f"{type(err).__name__}: {lines[0] if lines else 'no message'}"
        shapes = [tuple(t.shape) for t in expected], [tuple(t.shape) for t in got]
        if shapes[0] != shapes[1]:
            return f"outputs are {shapes[1]}, not {shapes[0]}"
        for want, have in zip(expected, got, strict=True):
            error, largest = float((want - have).abs().max()), float(want.abs().max())
            if not error <= probe.tolerance * largest:
                return f"outputs differ by {error:.2g} where the largest is {largest:.2g}"
    return None


def _outputs(output: object) -> list[Tensor]:
    return [t.double() for t in answers_in(output) if t.numel()]
