"""From a network to its channel groups, and why a group is locked.

How it works. The network is traced with torch.fx (NNI needs the same graph later, and nodes
keep the names of the user's modules) and run once on the example input for its shapes. Every
position along dimension 1 of every tensor then carries a *label*. A convolution writes fresh
labels; batch-norm, activations and pooling hand them on; a flatten repeats each one per pixel;
a sum *joins* the labels of its operands position by position. Labels that end up joined can
only be removed together, and those that lie in the same tensors form one channel group.

An operation that is not in the tables below locks what it reads, with its name and place:
unknown means locked, never guessed.
"""

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.nn.utils import parametrize

from compressor.errors import GraphError
from compressor.values import (
    BATCH_NORMS,
    CONVOLUTIONS,
    ChannelGroup,
    ChannelSlice,
    Cost,
    IndexArray,
    Role,
)

# Work on each channel by itself, whatever the values.
PER_CHANNEL_MODULES = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
PER_CHANNEL_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset({
    torch.relu, torch.sigmoid, torch.tanh, torch.clamp, torch.abs, torch.neg,
    F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.gelu, F.silu, F.mish, F.sigmoid, F.tanh,
    F.hardswish, F.hardsigmoid, F.hardtanh, F.softplus, F.dropout, F.dropout2d,
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
    torch.max_pool2d, operator.neg,
})  # fmt: skip
PER_CHANNEL_METHODS = frozenset({
    "relu", "relu_", "sigmoid", "tanh", "clamp", "contiguous", "clone", "detach", "float", "abs",
})  # fmt: skip
ELEMENTWISE_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset({
    operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul,
    torch.add, torch.sub, torch.mul,
})  # fmt: skip
ELEMENTWISE_METHODS = frozenset({"add", "add_", "sub", "sub_", "mul", "mul_"})


def trace(module: nn.Module) -> fx.GraphModule:
    """The network as a torch.fx graph.

    Raises:
        GraphError: The forward code cannot be traced; the message names its line.
    """
    try:
        tracer = fx.Tracer()
        tracer.record_stack_traces = True
        return fx.GraphModule(module, tracer.trace(module))
    except (fx.proxy.TraceError, TypeError, RuntimeError, ValueError, AttributeError) as err:
        raise GraphError(
            f"{type(module).__name__} cannot be traced: {err} ({_user_line(err)}). "
            f"Its forward must not branch on the values of tensors; move such code out of it."
        ) from err


def channel_groups(model: nn.Module, example_input: Tensor) -> tuple[ChannelGroup, ...]:
    """Channels that can only be removed together, in graph order.

    Args:
        model: In eval mode; it is not changed.
        example_input: `(1, c, h, w)`, as the model takes it.

    Raises:
        GraphError: The network is in training mode, cannot be traced, or does not take
            `example_input`.
    """
    if any(module.training for module in model.modules()):
        raise GraphError(f"{type(model).__name__} is in training mode; call .eval() first.")
    try:
        with torch.no_grad():
            model(example_input)
    except (RuntimeError, ValueError, TypeError, IndexError) as err:
        raise GraphError(
            f"{type(model).__name__} does not take an input of shape "
            f"{tuple(example_input.shape)}: {err}. "
            f"Give the shape that it was trained with (--input-shape C,H,W; image files are "
            f"read as colour unless C is 1)."
        ) from err
    graph_module = trace(model)
    with torch.no_grad():
        ShapeProp(graph_module).propagate(example_input)
    labels = _Labels()
    walk = _Walk(graph_module, labels)
    for node in graph_module.graph.nodes:
        walk.visit(node)
    walk.lock_what_is_read_by_hand()
    return labels.groups()


def cost(module: nn.Module, example_input: Tensor) -> Cost:
    """Multiply-accumulates of convolutions and linear layers, and parameters, for one example.

    Biases, norms, activations and pooling are not counted, as usual in this field.
    """
    macs = 0

    def count(layer: nn.Module, _args: object, output: Tensor) -> None:
        nonlocal macs
        weight = layer.weight
        assert isinstance(weight, Tensor)
        per_filter = math.prod(weight.shape[1:])
        macs += output.numel() * per_filter

    layers = [m for m in module.modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.no_grad():
            module(example_input)
    finally:
        for hook in hooks:
            hook.remove()
    n_examples = example_input.shape[0]
    return Cost(macs=macs // n_examples, params=sum(p.numel() for p in module.parameters()))


@dataclass
class _Labels:
    """Labels that can be joined, and the tensors they lie in (a union-find)."""

    parent: list[int] = field(default_factory=list)
    locked: dict[int, str] = field(default_factory=dict)
    slots: list[tuple[str, str, int, Role, IndexArray]] = field(default_factory=list)

    def fresh(self, n: int, locked_because: str | None = None) -> IndexArray:
        start = len(self.parent)
        self.parent.extend(range(start, start + n))
        if locked_because is not None:
            self.locked.update(dict.fromkeys(range(start, start + n), locked_because))
        return np.arange(start, start + n)

    def root(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = self.parent[self.parent[label]]
            label = self.parent[label]
        return label

    def join(self, ours: IndexArray, theirs: IndexArray) -> None:
        for a, b in zip(ours.tolist(), theirs.tolist(), strict=True):
            first, second = sorted((self.root(a), self.root(b)))
            self.parent[second] = first
            if second in self.locked:
                self.locked.setdefault(first, self.locked[second])

    def lock(self, labels: IndexArray, because: str) -> None:
        for label in labels.tolist():
            self.locked.setdefault(self.root(label), because)

    def groups(self) -> tuple[ChannelGroup, ...]:
        """Channels (joined labels) that lie in the same tensors, each set one group."""
        positions: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for slot, (*_, labels) in enumerate(self.slots):
            for position, label in enumerate(labels.tolist()):
                positions[self.root(label)][slot].append(position)
        alike: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
        for channel, places in positions.items():
            alike[tuple((slot, len(where)) for slot, where in places.items())].append(channel)
        groups = []
        names: set[str] = set()
        for signature, channels in alike.items():
            slices = tuple(
                ChannelSlice(
                    *self.slots[slot][:4],
                    index=np.array([positions[c][slot] for c in channels]),
                )
                for slot, _ in signature
            )
            producer = next((s.module for s in slices if s.role is Role.PRODUCER), None)
            if producer is None:
                continue  # the model's input and other tensors that nothing here produces
            name = producer
            while name in names:
                name += "+"
            names.add(name)
            reasons = [self.locked[c] for c in channels if c in self.locked]
            because = reasons[0] if reasons else None
            groups.append(ChannelGroup(name, len(channels), slices, because))
        return tuple(groups)


class _Walk:
    """Visits the nodes in order and gives every tensor its labels."""

    def __init__(self, graph_module: fx.GraphModule, labels: _Labels) -> None:
        self.modules = dict(graph_module.named_modules())
        self.labels = labels
        self.of: dict[fx.Node, IndexArray] = {}
        self.shape_of: dict[fx.Node, fx.Node] = {}
        self.read_by_hand: dict[str, str] = {}
        self.n_calls: dict[str, int] = defaultdict(int)
        for node in graph_module.graph.nodes:
            if node.op == "call_module":
                self.n_calls[str(node.target)] += 1
        owners: dict[int, list[str]] = defaultdict(list)
        for name, parameter in graph_module.named_parameters(remove_duplicate=False):
            owners[id(parameter)].append(name)
        self.tied = {name: names for names in owners.values() if len(names) > 1 for name in names}

    def visit(self, node: fx.Node) -> None:
        if node.op == "output":
            self._lock_inputs(node, "its channels are the model's output")
        elif node.op == "placeholder":
            self._fixed(node, "the model's input")
        elif node.op == "get_attr":
            self.read_by_hand[str(node.target).rpartition(".")[0]] = str(node.target)
            self._fixed(node, f"added to or multiplied with the constant {node.target}")
        elif node.op == "call_module":
            self._module(node, str(node.target))
        else:
            self._call(node)

    def _module(self, node: fx.Node, name: str) -> None:
        module = self.modules[name]
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source not in self.of:
            return self._unknown(node)
        because = _not_sliceable(module)
        if because is not None:
            return self._unknown(node, f"{name} {because}")
        if isinstance(module, CONVOLUTIONS) and module.groups == 1:
            return self._layer(node, source, name, module)
        if isinstance(module, CONVOLUTIONS) and _is_depthwise(module):
            return self._per_channel_layer(node, source, name, ("weight", "bias"))
        if isinstance(module, nn.Linear) and len(_shape(source) or ()) == 2:
            return self._layer(node, source, name, module)
        if isinstance(module, BATCH_NORMS):
            tensors = ("weight", "bias", "running_mean", "running_var")
            return self._per_channel_layer(node, source, name, tensors)
        if isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1:
            return self._flatten(node, source)
        if isinstance(module, PER_CHANNEL_MODULES):
            return self._pass_on(node, source)
        return self._unknown(node)

    def _call(self, node: fx.Node) -> None:
        tensors = [source for source in node.all_input_nodes if source in self.of]
        is_method = node.op == "call_method"
        target = node.target
        if target is operator.getitem and node.args[0] in self.shape_of:
            shape = node.args[0]
            assert isinstance(shape, fx.Node)
            return self._channel_count(node, self.shape_of[shape], node.args[1])
        if not tensors:
            return None  # arithmetic on shapes
        source = tensors[0]
        rest = node.args[1:]
        if (is_method and (target, rest) == ("size", ())) or (
            target is getattr and rest == ("shape",)
        ):
            self.shape_of[node] = source
            return None
        if is_method and target == "size":
            return self._channel_count(node, source, rest[0])
        if is_method and target == "dim":
            return None
        if any(n not in self.of and math.prod(_shape(n) or ()) > 1 for n in node.all_input_nodes):
            return self._unknown(node)  # a tensor without labels, such as a bias made by a view
        if target in (PER_CHANNEL_METHODS if is_method else PER_CHANNEL_FUNCTIONS):
            return self._pass_on(node, source) if len(tensors) == 1 else self._unknown(node)
        if target in (ELEMENTWISE_METHODS if is_method else ELEMENTWISE_FUNCTIONS):
            return self._elementwise(node, tensors)
        if _is_flatten(node, source):
            return self._flatten(node, source)
        if _is_spatial_mean(node, source):
            return self._pass_on(node, source)
        return self._unknown(node)

    def _layer(self, node: fx.Node, source: fx.Node, name: str, module: nn.Module) -> None:
        """A convolution or linear layer: reads all channels, writes new ones."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        fresh = self.labels.fresh(weight.shape[0])
        self.labels.slots.append((name, "weight", 1, Role.CONSUMER, self.of[source]))
        self.labels.slots.append((name, "weight", 0, Role.PRODUCER, fresh))
        if module.bias is not None:
            self.labels.slots.append((name, "bias", 0, Role.PER_CHANNEL, fresh))
        self.of[node] = fresh
        self._lock_if_shared(node, source, name, ("weight", "bias"))

    def _per_channel_layer(
        self, node: fx.Node, source: fx.Node, name: str, tensors: Sequence[str]
    ) -> None:
        """Batch-norm or depthwise convolution: one value or filter a channel."""
        for tensor in tensors:
            if getattr(self.modules[name], tensor, None) is not None:
                self.labels.slots.append((name, tensor, 0, Role.PER_CHANNEL, self.of[source]))
        self.of[node] = self.of[source]
        self._lock_if_shared(node, source, name, tensors)

    def _lock_if_shared(
        self, node: fx.Node, source: fx.Node, name: str, tensors: Sequence[str]
    ) -> None:
        because = None
        if self.n_calls[name] > 1:
            because = f"{name} is used {self.n_calls[name]} times in one forward pass"
        for tensor in tensors:
            sharers = self.tied.get(f"{name}.{tensor}")
            if sharers:
                because = f"shared weight: {' and '.join(sharers)} are one tensor"
        if because:
            for end in (node, source):
                self.labels.lock(self.of[end], because)

    def _pass_on(self, node: fx.Node, source: fx.Node) -> None:
        self.of[node] = self.of[source]

    def _elementwise(self, node: fx.Node, tensors: Sequence[fx.Node]) -> None:
        shapes = [_shape(tensor) for tensor in tensors]
        if len({(len(s), s[1]) if s and len(s) > 1 else None for s in shapes}) > 1:
            return self._unknown(node)  # broadcast over channels
        for other in tensors[1:]:
            self.labels.join(self.of[tensors[0]], self.of[other])
        self._pass_on(node, tensors[0])
        return None

    def _flatten(self, node: fx.Node, source: fx.Node) -> None:
        shape = _shape(source)
        assert shape is not None
        self.of[node] = np.repeat(self.of[source], math.prod(shape[2:]))

    def _channel_count(self, node: fx.Node, source: fx.Node, index: object) -> None:
        """One side of a shape: the batch and the pixels stay what they are, channels do not."""
        n_dims = len(_shape(source) or ())
        if node.users and not (isinstance(index, int) and index % max(n_dims, 1) != 1):
            because = f"the number of its channels is read{_place(node)}"
            self.labels.lock(self.of[source], because)

    def lock_what_is_read_by_hand(self) -> None:
        """Weights that the forward code uses itself, beside the layer that owns them."""
        for module, _tensor, _dim, _role, labels in self.labels.slots:
            if module in self.read_by_hand:
                because = f"the forward code reads {self.read_by_hand[module]} itself"
                self.labels.lock(labels, because)

    def _unknown(self, node: fx.Node, because: str | None = None) -> None:
        because = because or f"{_describe(node, self.modules)} is not known to keep channels apart"
        self._lock_inputs(node, because)
        self._fixed(node, because)

    def _lock_inputs(self, node: fx.Node, because: str) -> None:
        for source in node.all_input_nodes:
            if source in self.of:
                self.labels.lock(self.of[source], because)

    def _fixed(self, node: fx.Node, because: str) -> None:
        shape = _shape(node)
        if shape is not None and len(shape) > 1:
            self.of[node] = self.labels.fresh(shape[1], because)


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape) if isinstance(meta, TensorMetadata) else None


def _not_sliceable(module: nn.Module) -> str | None:
    """Why the tensors of a known layer cannot be cut, in words; None where they can."""
    if not isinstance(module, (*CONVOLUTIONS, *BATCH_NORMS, nn.Linear)):
        return None
    if parametrize.is_parametrized(module) or module._forward_pre_hooks:
        return "computes its weight from other tensors (a parametrization or a hook)"
    if isinstance(module, BATCH_NORMS) and not module.affine:
        return "has no weight of its own (affine=False)"
    return None


def _is_depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, CONVOLUTIONS)
        and module.groups == module.in_channels == module.out_channels
        and module.groups > 1
    )


def _is_flatten(node: fx.Node, source: fx.Node) -> bool:
    """`flatten(x, 1)`, or a view to `(batch, -1)`; a hard-coded channel count is not one."""
    shape = _shape(source)
    if shape is None or _shape(node) != (shape[0], math.prod(shape[1:])):
        return False
    if node.target in (torch.flatten, "flatten"):
        return True
    if node.target in (torch.reshape, "view", "reshape"):
        sizes = node.args[1:]
        if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
            sizes = tuple(sizes[0])
        return len(sizes) == 2 and bool(sizes[1] == -1)
    return False


def _is_spatial_mean(node: fx.Node, source: fx.Node) -> bool:
    """`x.mean((2, 3))` of `(batch, c, h, w)`: the mean over every pixel of a channel."""
    shape = _shape(source)
    if node.target not in (torch.mean, "mean") or shape is None:
        return False
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if isinstance(dims, int):
        dims = (dims,)
    if not isinstance(dims, (tuple, list)):
        return False
    spatial = sorted(d % len(shape) for d in dims if isinstance(d, int))
    return spatial == list(range(2, len(shape)))


def _describe(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        name = str(node.target)
        return f"{type(modules[name]).__name__} ({name})"
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return f"{name}{_place(node)}"


def _place(node: fx.Node) -> str:
    """` (File "net.py", line 7, in forward)`, the user's line; empty where it is not known."""
    lines = [line.strip() for line in (node.stack_trace or "").splitlines()]
    places = [line for line in lines if line.startswith("File ") and "/torch/" not in line]
    return f" ({places[-1]})" if places else ""


def _user_line(err: BaseException) -> str:
    """The innermost line of the traceback that is not in torch itself."""
    place = "no source line known"
    frame = err.__traceback__
    while frame is not None:
        filename = frame.tb_frame.f_code.co_filename
        if "/torch/" not in filename and "<" not in filename and filename != __file__:
            place = f"{filename}, line {frame.tb_lineno}"
        frame = frame.tb_next
    return place
