"""NNI 3.0's ModelSpeedup makes the layers of the final model: a second engine beside our own.

Left to itself, ModelSpeedup infers from masks of filters what every other layer loses: it sends
random numbers through the network's graph. That inference is wrong, or stops, on padded shortcuts,
channel shuffles, grouped convolutions, batch-norms with an activation in them and attention; it
also takes a minute for a VGG. So NNI is not left to infer. It gets every layer that it can
replace, on an input of its own, with complete masks of what goes in and out:

1. One forward pass says what each such layer reads.
2. The masks come from the same slices that our own surgery takes.
3. ModelSpeedup replaces the layers by its own rules; a layer of a derived class (timm's
   `BatchNormAct2d`) by the rule of its base.
4. The new tensors go into the old layers, which keep their class, hooks and flags.
5. Tensors that NNI has no rule for (a layer scale, GRN, the weights of attention) and numbers in
   the code of a program are our own surgery's.

So the channels are ours, and the layers NNI's.
"""

import contextlib
import copy
import io
import logging
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from compressor.errors import EngineError
from compressor.running import cloned, unfused_attention
from compressor.surgery.positions import Mask, kept_positions, tensor_of
from compressor.surgery.sizes import kept_in_nodes, rewrite_sizes
from compressor.surgery.slicing import cuts_by_tensor, sliced
from compressor.values import ChannelGroup, Example, Plan, call

# What NNI 3.0 was seen to raise, or may, on a network that it does not understand. It writes the
# layers to a temporary file and reads them back.
_NNI_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, OSError,
    RuntimeError, TypeError, ValueError, pickle.PickleError,
)  # fmt: skip
_KINDS = (  # layers whose tensors NNI 3.0 replaces, by the names that it knows
    nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d,
    nn.InstanceNorm2d, nn.GroupNorm, nn.LayerNorm, nn.PReLU,
)  # fmt: skip
_WIDTHS = ("weight", "running_mean", "num_features")  # one of them tells how wide a norm is
_TENSORS = {*_WIDTHS, "bias", "running_var"}  # of these kinds
_COUNTS = (
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features",
    "num_groups", "num_channels", "normalized_shape", "num_parameters",
)  # fmt: skip
Losses = Mapping[str, Mapping[str, Mapping[int, Mask]]]  # module, tensor, dimension -> what stays
_Made = dict[int, tuple[Tensor, Tensor]]  # id -> old tensor, which keeps its id its own, and new
_QUIET = logging.getLogger("nni.quiet")
_QUIET.setLevel(logging.CRITICAL)


def prune_with_nni(
    model: nn.Module, example_input: Example, groups: Sequence[ChannelGroup], plan: Plan
) -> nn.Module:
    """What `remove_channels` returns, with layers that NNI 3.0's ModelSpeedup made.

    NNI computes in float32.

    Args:
        model: In eval mode; not changed.
        example_input: As the model takes it.
        groups: From `graph.channel_groups(model, ...)`.
        plan: One that `check_plan` passes.

    Raises:
        EngineError: NNI cannot be imported, or cannot process this network.
    """
    nni, lost = _nni(), losses(model, groups, plan)
    if not lost:
        return copy.deepcopy(model).eval()
    inputs = layers_for_nni(model, example_input, lost)
    if not inputs:
        raise EngineError(
            f"NNI has no rule for any layer of {type(model).__name__} that loses channels."
        )
    rest = {
        f"{name}.{tensor}".removeprefix("."): cuts
        for name in lost.keys() - inputs.keys()
        for tensor, cuts in lost[name].items()
    }
    victim = sliced(model, rest, groups).eval()
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            _replace_layers(victim, inputs, lost, nni)
            if isinstance(victim, fx.GraphModule):
                rewrite_sizes(victim, kept_in_nodes(victim, groups, plan))
            call(victim, cloned(example_input))
    except (nni.SpeedupError, *_NNI_FAILURES) as err:
        raise EngineError(
            f"NNI cannot process {type(model).__name__}: {type(err).__name__}: {err}"
        ) from err
    _check_widths(victim, kept_positions(model, groups, plan))
    return victim


def _nni() -> SimpleNamespace:
    """What is used of NNI."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # NNI greets on stdout
            from nni.compression.speedup import ModelSpeedup
            from nni.compression.speedup.error_code import SpeedupError
            from nni.compression.speedup.replacement import replace_module
            from nni.compression.speedup.replacer import DefaultReplacer
    except (ImportError, AttributeError) as err:  # it is archived; a Python may outgrow it
        raise EngineError(f"NNI cannot be imported here: {err}") from err
    logging.getLogger("nni").setLevel(logging.ERROR)
    return SimpleNamespace(
        ModelSpeedup=ModelSpeedup, SpeedupError=SpeedupError, rules=replace_module,
        DefaultReplacer=DefaultReplacer,
    )  # fmt: skip


def _replace_layers(
    network: nn.Module, inputs: Mapping[str, Tensor], lost: Losses, nni: SimpleNamespace
) -> None:
    """Lets ModelSpeedup replace the layers that have `inputs`, in place."""
    layers = {name: network.get_submodule(name) for name in inputs}
    made: _Made = {}

    def replaced(layer: nn.Module, masks: object) -> nn.Module:
        """NNI's own rules come after this one, and must not take the layer for one of theirs."""
        kind = _kind(layer)
        assert kind is not None
        return _with_tensors(layer, nni.rules[kind.__name__](layer, masks), made)

    derived = {type(layer).__name__ for layer in layers.values()} - nni.rules.keys()
    nni.ModelSpeedup(
        network,
        tuple(inputs.values()),
        {name: _masks(layer, lost[name]) for name, layer in layers.items()},
        batch_size=1,
        customized_mask_updaters=[_AsTold()],
        customized_replacers=[nni.DefaultReplacer(dict.fromkeys(derived, replaced))],
        graph_module=_side_by_side(network, inputs),
        logger=_QUIET,
    ).speedup_model()
    for name, layer in layers.items():
        by_nni = network.get_submodule(name)
        network.set_submodule(name, _with_tensors(layer, by_nni, made))


def losses(model: nn.Module, groups: Sequence[ChannelGroup], plan: Plan) -> Losses:
    """What every module loses under `plan`; a tensor with several owners is in each."""
    lost: dict[str, dict[str, Mapping[int, Mask]]] = defaultdict(dict)
    by_id: dict[int, Mapping[int, Mask]] = {}
    for key, masks in cuts_by_tensor(kept_positions(model, groups, plan)).items():
        value = tensor_of(model, key)
        if isinstance(value, Tensor):
            by_id[id(value)] = masks
        else:
            module, _, number = key.rpartition(".")
            lost[module][number] = masks
    for name, module in model.named_modules():
        for own, tensor in _own_tensors(module).items():
            if id(tensor) in by_id:
                lost[name][own] = by_id[id(tensor)]
    return lost


def layers_for_nni(model: nn.Module, example: Example, lost: Losses) -> dict[str, Tensor]:
    """Layers that NNI can replace, of those that lose channels -> an input like theirs.

    NNI must have a rule for a layer's kind and for every tensor of it that loses something, the
    layer must read one tensor, and no other module may share its tensors that is not NNI's.
    """
    known = {name: m for name in lost if _has_rule(m := model.get_submodule(name), lost[name])}
    inputs: dict[str, Tensor] = {}

    def note(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            inputs.setdefault(name, args[0].new_zeros(()).expand(args[0].shape))

    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True
        )
        for name, layer in known.items()
    ]
    try:
        with torch.no_grad(), unfused_attention():
            call(model, cloned(example))
    finally:
        for hook in hooks:
            hook.remove()

    def shared(name: str) -> set[int]:
        own = _own_tensors(model.get_submodule(name))
        return {id(own[tensor]) for tensor in lost[name] if tensor in own}

    while True:
        others = set[int]().union(*(shared(name) for name in lost if name not in inputs))
        tied = [name for name in inputs if shared(name) & others]
        if not tied:
            return inputs
        for name in tied:
            del inputs[name]


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def _kind(layer: nn.Module) -> type[nn.Module] | None:
    return next((kind for kind in _KINDS if isinstance(layer, kind)), None)


def _has_rule(layer: nn.Module, lost: Mapping[str, Mapping[int, Mask]]) -> bool:
    """Whether NNI's rule for the layer's kind makes all its tensors that lose something."""
    kind, own = _kind(layer), _own_tensors(layer)
    if kind is None or not lost.keys() <= _TENSORS:
        return False
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d):
        return "running_mean" in own
    if kind is nn.LayerNorm:
        return own.keys() >= {"weight", "bias"} and own["weight"].ndim == 1
    return "weight" in own or kind is nn.InstanceNorm2d


def _masks(layer: nn.Module, lost: Mapping[str, Mapping[int, Mask]]) -> dict[str, Tensor]:
    """`(1, n_channels)` each, 1 for what stays, by NNI's names for what goes in and out."""

    def stays(tensor: str, dim: int) -> Mask:
        value = getattr(layer, tensor)
        size = value.shape[dim] if isinstance(value, Tensor) else value
        return lost.get(tensor, {}).get(dim, np.ones(size, dtype=np.bool_))

    if isinstance(layer, nn.modules.conv._ConvNd):
        rows, columns = stays("weight", 0), stays("weight", 1)
        is_left = rows.reshape(layer.groups, -1).any(axis=1, keepdims=True)
        inner = (is_left & columns).ravel()
        ins, outs = (rows, inner) if layer.transposed else (inner, rows)
    elif isinstance(layer, nn.Linear):
        outs, ins = stays("weight", 0), stays("weight", 1)
    else:
        ins = outs = stays(next(name for name in _WIDTHS if name in lost), 0)
    return {
        name: torch.from_numpy(mask[None].astype(np.float32))
        for name, mask in (("_input_0", ins), ("_output_0", outs))
    }


class _AsTold:
    """NNI's mask updater for every node: the masks are those that were given."""

    def detect(self, speedup: Any, node: fx.Node) -> bool:
        """NNI asks whose the node is; it looks at the masks of parameters for their sizes only."""
        if node.op == "call_module":
            own = _own_tensors(speedup.fetch_attr(node.target))
            speedup.node_infos[node].param_masks = {k: torch.ones_like(t) for k, t in own.items()}
        return True

    def direct_update_process(self, speedup: Any, node: fx.Node) -> None:
        """NNI asks what goes in and out of a layer."""
        if node.op == "call_module":
            masks = speedup.masks[node.target]
            speedup.node_infos[node].output_masks = masks["_output_0"]
            speedup.node_infos[node.args[0]].output_masks = masks["_input_0"]

    def _nothing(self, speedup: Any, node: fx.Node) -> None:
        """Nothing is inferred."""

    direct_update_preprocess = direct_update_postprocess = _nothing
    indirect_update_preprocess = indirect_update_process = indirect_update_postprocess = _nothing


def _side_by_side(network: nn.Module, names: Iterable[str]) -> fx.GraphModule:
    """A graph in which each of these layers reads an input of its own."""
    graph = fx.Graph()
    inputs = {name: graph.placeholder(f"input_{i}") for i, name in enumerate(names)}
    graph.output(tuple(graph.call_module(name, (read,)) for name, read in inputs.items()))
    return fx.GraphModule(network, graph)


def _with_tensors(layer: nn.Module, by_nni: nn.Module, made: _Made) -> nn.Module:
    """The very `layer`, with the tensors that NNI made; it keeps its class, hooks and flags.

    Args:
        layer: With its old tensors, or with the new ones already.
        by_nni: With the new tensors.
        made: Shared tensors stay shared. It grows.
    """
    for own, old in _own_tensors(layer).items():
        new = getattr(by_nni, own, None)
        if isinstance(new, Tensor) and new.shape != old.shape:
            new = new.detach().to(old.dtype)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            setattr(layer, own, made.setdefault(id(old), (old, new))[1])
    for count in _COUNTS:
        if hasattr(by_nni, count):
            setattr(layer, count, getattr(by_nni, count))
    return layer


def _check_widths(network: nn.Module, kept: Mapping[tuple[str, int], Mask]) -> None:
    for (key, dim), keep in kept.items():
        tensor = tensor_of(network, key)
        found = tensor.shape[dim] if isinstance(tensor, Tensor) else tensor
        if found != keep.sum():
            raise EngineError(
                f"NNI left {key} {found} wide in dimension {dim}; {keep.sum()} were planned."
            )
