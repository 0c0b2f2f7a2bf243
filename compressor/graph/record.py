"""One forward pass, recorded operation by operation.

A `TorchDispatchMode` sees every ATen operation that a network runs, after modules, functions,
methods and shapes are behind it. Each tensor gets a *state*, and `rules.py` says, for each of the
few operations that ATen has, how the states of its inputs become those of its outputs.
"""

import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from compressor.containers import answers_in, tensors_in
from compressor.graph.labels import Labels
from compressor.graph.states import (
    Fixed,
    Outcome,
    State,
    Weight,
    depends_on_input,
    labels_of,
    places_of,
)
from compressor.running import cloned, in_small_steps
from compressor.values import Example, IndexArray, Role, call

logger = logging.getLogger(__name__)

TORCH_FOLDER = os.path.dirname(torch.__file__) + os.sep
OWN_FOLDER = os.path.dirname(os.path.dirname(__file__)) + os.sep

Rules = Callable[["Call", bool], Outcome]  # (call, whether ATen tags it element-wise)


@dataclass(frozen=True, eq=False)
class Call:
    """One operation as it ran.

    Attributes:
        number: Its place among the operations of its full name in the pass, from 0.
        full_name: "aten::convolution".
        name: "convolution"; in-place variants have the name of the plain one.
        args: By the names of the operation's schema, defaults filled in.
        out: What it returned.
        record: The pass it belongs to.
    """

    number: int
    full_name: str
    name: str
    args: Mapping[str, Any]
    out: Any
    record: "Record"

    def state(self, tensor: object) -> State | None:
        """State of one of the tensors; None for constants, and for what is no tensor."""
        return self.record.states.get(tensor) if isinstance(tensor, Tensor) else None

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor among the arguments."""
        for value in self.args.values():
            for each in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(each, Tensor):
                    yield each

    @property
    def labels(self) -> Labels:
        """Of the whole network."""
        return self.record.labels

    def place(
        self, weight: Weight, dim: int, labels: IndexArray, role: Role, macs_per_number: int = 0
    ) -> None:
        """Says that `labels` run along dimension `dim` of a weight."""
        if len(labels) > 1 and all(dims[dim] is None for _, dims in weight.sources):
            self.lock(labels, f"{self.where} ties it to what cannot be pruned")
        for name, dims in weight.sources:
            own_dim = dims[dim]
            if own_dim is not None:
                shape = self.record.shapes[name]
                labels = self.labels.untiled(labels, shape[own_dim])
                slot = self.labels.place(name, own_dim, shape, role, labels)
                slot.macs_per_number += macs_per_number
                slot.is_parameter = name in self.record.parameters

    def read(self, argument: int, dim: int, labels: IndexArray) -> None:
        """Says that the operation reads `labels` along `dim` and writes other channels."""
        place = (self.full_name, self.number, argument, dim)
        self.labels.readings.append((*place, labels))

    def lock(self, labels: IndexArray, because: str) -> None:
        """No channel with one of `labels` may be removed."""
        self.labels.lock(labels, because)

    def spread(self) -> None:
        """Notes along which dimensions `expand` repeats its numbers."""
        source = next(self.tensors())
        shift = self.out.ndim - source.ndim
        self.record.spread[self.out] = {
            dim: self.labels.fresh(n)
            for dim, n in enumerate(self.out.shape)
            if n > 1 and (dim < shift or source.shape[dim - shift] == 1)
        }

    def follows(self, tensor: Tensor, dim: int, labels: IndexArray) -> bool:
        """Whether `tensor` repeats one number along `dim`: it then has as many as there are."""
        spread = self.record.spread.get(tensor, {}).get(dim)
        if spread is not None:
            self.labels.join(spread, labels)
        return spread is not None

    def fixed(self, because: str) -> Fixed:
        """State of an output in which nothing can be removed."""
        states = [self.state(tensor) for tensor in self.tensors()]
        return Fixed(because, any(map(depends_on_input, states)))

    def unknown(self, because: str | None = None) -> Fixed:
        """Locks every input; what a rule returns where it cannot keep channels apart."""
        because = because or f"{self.where} is not known to keep channels apart"
        for tensor in self.tensors():
            state = self.state(tensor)
            for labels in labels_of(state):
                self.lock(labels, because)
            if isinstance(state, Weight):
                self.record.lock_tensors(state, because)
        return self.fixed(because)

    def is_node(self, *targets: OpOverload) -> bool:
        """Whether it is the whole of a node of a program, one that surgery can rewrite."""
        node = self.record.node
        return node is not None and node.target in targets

    @property
    def where(self) -> str:
        """`softmax in Attention (block.1) (net.py, line 7)`, the user's own line."""
        module = self.record.innermost_module()
        return f"{self.name}{f' in {module}' if module else ''}{self.record.place()}"


class Record(TorchDispatchMode):
    """What is known of the tensors of one forward pass.

    Attributes:
        rules: From a call to the states of its outputs.
        labels: Filled as operations run.
        states: Tensor -> state, while the tensor lives.
        spread: What `expand` made -> dimension along which it repeats its numbers -> labels of
            their own, for the size that is written there.
        shapes: Of the parameters and buffers.
        parameters: Names of those that are parameters.
        locked_tensors: Parameter -> why it must stay whole.
        dynamic: The first place where the code looked at a value that depends on the input.
    """

    def __init__(self, model: nn.Module, rules: "Rules") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rules = rules
        self.labels = Labels()
        self.states: Any = WeakTensorKeyDictionary()
        self.spread: Any = WeakTensorKeyDictionary()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.parameters = {name for name, _ in model.named_parameters()}
        self.locked_tensors: dict[str, str] = {}
        self.dynamic: str | None = None
        self.node: fx.Node | None = None
        self._n_calls: Counter[str] = Counter()
        self._names = {id(module): name for name, module in model.named_modules()}
        self._stack: list[nn.Module] = []
        for tensors in (model.named_parameters(), model.named_buffers()):
            for name, tensor in tensors:
                self.states[tensor] = Weight(((name, tuple(range(tensor.ndim))),))
                self.shapes[name] = tuple(tensor.shape)

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Runs `func` and gives its outputs their states."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        full_name = func._schema.name
        number = self._n_calls[full_name]
        self._n_calls[full_name] += 1
        if not any(t in self.states for t in tensors_in((args, kwargs))):
            return out  # arithmetic on constants
        schema = func._schema
        given = {a.name: a.default_value for a in schema.arguments}
        given.update({a.name: v for a, v in zip(schema.arguments, args, strict=False)})
        given.update(kwargs)
        name = full_name.removeprefix("aten::")
        if schema.is_mutable and name.endswith("_") and not name.endswith("__"):
            name = name[:-1]
        this = Call(number, full_name, name, given, out, self)
        is_pointwise = torch.Tag.pointwise in func.tags
        try:
            states = self.rules(this, is_pointwise)
        except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError):
            logger.warning("no rule fits %s", this.where, exc_info=True)
            states = this.unknown()
        self._assign(out, states)
        if schema.is_mutable and isinstance(states, Fixed):
            for argument, value in zip(schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._assign(value, states)
        if self.dynamic is not None:
            for tensor in tensors_in((args, kwargs, out)):
                for labels in labels_of(self.states.get(tensor)):
                    self.labels.lock(labels, self.dynamic)
        return out

    def _assign(self, out: Any, states: "Outcome") -> None:
        outs = out if isinstance(out, (list, tuple)) else [out]
        each = states if isinstance(states, Sequence) else [states] * len(outs)
        for tensor, state in zip(outs, each, strict=False):
            if isinstance(tensor, Tensor) and state is not None:
                for dim, labels in places_of(state):
                    assert tensor.shape[dim] == len(labels), (tensor.shape, state)
                self.states[tensor] = state

    def place_width(self, labels: IndexArray) -> None:
        """A norm without tensors of its own keeps its width as a number, `num_features`."""
        width = getattr(self._stack[-1], "num_features", None) if self._stack else None
        if isinstance(width, int):
            name = f"{self._names[id(self._stack[-1])]}.num_features".removeprefix(".")
            labels = self.labels.untiled(labels, width)
            slot = self.labels.place(name, 0, tuple(labels.shape), Role.PER_CHANNEL, labels)
            slot.is_parameter = False

    def lock_tensors(self, weight: Weight, because: str) -> None:
        """No channel may be removed from the parameters behind `weight`."""
        for name, _ in weight.sources:
            self.locked_tensors.setdefault(name, because)

    def look_at_value(self) -> None:
        """The code turned a tensor that depends on the input into a Python number."""
        if self.dynamic is None:
            module = self.innermost_module()
            self.dynamic = (
                f"the forward code takes a Python value from a tensor that depends on the input"
                f"{f', in {module}' if module else ''}{self.place()}"
            )
            for state in self.states.values():  # another way could use whatever is still alive
                for labels in labels_of(state):
                    self.labels.lock(labels, self.dynamic)

    def lock_output(self, output: Any) -> None:
        """Whatever the model returns keeps its channels."""
        for tensor in answers_in(output):
            for labels in labels_of(self.states.get(tensor)):
                self.labels.lock(labels, "its channels are the model's output")

    def note(self, node: fx.Node, value: Any) -> None:
        """Where channels lie in what a node of an fx graph returned."""
        state = self.states.get(value) if isinstance(value, Tensor) else None
        if isinstance(state, Weight) and node.op == "call_function":
            self.labels.weight_nodes += [
                (node.name, dim, value.shape[dim], name, own_dim)
                for name, dims in state.sources
                for dim, own_dim in enumerate(dims)
                if own_dim is not None
            ]
        spread = self.spread.get(value, {}) if isinstance(value, Tensor) else {}
        for dim, labels in (*places_of(state), *spread.items()):
            self.labels.nodes.append((node.name, dim, labels))

    def innermost_module(self) -> str:
        """`Attention (block.1)`, the module that is running now; empty in the model itself."""
        for module in reversed(self._stack):
            name = self._names.get(id(module))
            if name:
                return f"{type(module).__name__} ({name})"
        return ""

    def place(self) -> str:
        """` (net.py, line 7)`, the innermost line that is not torch's; empty if there is none."""
        if self.node is not None:
            lines = [line.strip() for line in (self.node.stack_trace or "").splitlines()]
            theirs = [x for x in lines if x.startswith("File ") and TORCH_FOLDER not in x]
            if not theirs:
                return f" (node {self.node.name})"
            filename, number, *_ = theirs[-1].removeprefix('File "').split('", line ')
            return f" ({_short(filename)}, line {number.partition(',')[0]})"
        frame = sys._getframe()
        while frame.f_back is not None:
            filename = frame.f_code.co_filename
            if not filename.startswith((TORCH_FOLDER, OWN_FOLDER, "<")):
                return f" ({_short(filename)}, line {frame.f_lineno})"
            frame = frame.f_back
        return ""

    @contextmanager
    def watching_modules(self) -> Iterator[None]:
        """Keeps the stack of running modules meanwhile."""
        hooks = (
            register_module_forward_pre_hook(lambda module, _: self._stack.append(module)),
            register_module_forward_hook(
                lambda *_: (self._stack.pop(), None)[1], always_call=True
            ),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def record(model: nn.Module, example: Example, rules: "Rules") -> Record:
    """Runs `model` once and returns what was seen; errors of its forward code pass through."""
    seen, example = Record(model, rules), cloned(example)
    for tensor in tensors_in(example):
        seen.states[tensor] = Fixed("it is the model's input", from_input=True)
    with torch.no_grad(), seen.watching_modules(), in_small_steps(model):
        if isinstance(model, fx.GraphModule):
            output = call(_Interpreter(model, seen).run, positional(model, example))
        else:
            with seen:
                output = call(model, example)
    seen.lock_output(output)
    return seen


class _Interpreter(fx.Interpreter):
    """Runs an fx graph under the recorder, node by node."""

    def __init__(self, model: fx.GraphModule, seen: Record) -> None:
        super().__init__(model)
        self.seen = seen

    def run_node(self, n: fx.Node) -> Any:
        self.seen.node = n
        with self.seen:
            value = super().run_node(n)
        self.seen.note(n, value)
        return value


def positional(model: fx.GraphModule, example: Example) -> tuple[Any, ...]:
    """The interpreter takes the placeholders' values in order."""
    if not isinstance(example, dict):
        return example if isinstance(example, tuple) else (example,)
    names = [node.target for node in model.graph.nodes if node.op == "placeholder"]
    return tuple(example[str(name)] for name in names)


def _short(filename: str) -> str:
    """The file as its owner knows it: from the current folder, or from its package."""
    _, is_installed, inside = filename.rpartition(f"site-packages{os.sep}")
    own = os.getcwd() + os.sep
    return inside if is_installed else filename.removeprefix(own)


def tensor_dim(dim: int, n_dims: int) -> int:
    """`dim` counted from 0."""
    return dim % max(n_dims, 1)


def all_equal(sizes: Sequence[int]) -> bool:
    """Whether every size is the same."""
    return len(np.unique(sizes)) <= 1
