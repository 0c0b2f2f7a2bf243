"""Which nodes of an fx graph share memory, and which of them write to it, seen by running it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.containers import tensors_in
from compressor.graph.record import positional
from compressor.running import cloned, unfused_attention
from compressor.values import Example

Cell = tuple[Any, ...]  # memory, offset, shape, strides, kind: where exactly a tensor lies


class Run(fx.Interpreter):
    """What running a graph shows of the memory its nodes share.

    Attributes:
        values: Node -> what it returned; kept, so that no memory is used twice.
        cells: Node that returned one tensor -> where that lay.
        writes: Node -> where it wrote to, in memory that an earlier node returned.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}
        self.cells: dict[fx.Node, Cell] = {}
        self.writes: dict[fx.Node, list[Cell]] = {}
        self._known: set[int] = set()

    def look(self, example: Example) -> None:
        """Runs the graph once, on tensors of its own."""
        with torch.no_grad(), unfused_attention():
            self.run(*positional(self.module, cloned(example)))  # type: ignore[arg-type]

    def run_node(self, n: fx.Node) -> Any:
        """Notes what the node returned and wrote."""
        with _Writes() as seen:
            value = super().run_node(n)
        if n.op == "output":
            return value
        self.values[n] = value
        wrote = [cell for cell in dict.fromkeys(seen.cells) if cell[0] in self._known]
        is_quiet = works_in_place(n) and not seen.cells  # dropout, in evaluation
        if is_quiet and isinstance(value, Tensor) and cell_of(value)[0] in self._known:
            wrote = [cell_of(value)]
        if wrote:
            self.writes[n] = wrote
        if isinstance(value, Tensor):
            self.cells[n] = cell_of(value)
        elif isinstance(value, (list, tuple)):
            n.meta["n_parts"] = len(value)
        self._known.update(cell_of(tensor)[0] for tensor in tensors_in(value))
        return value


class _Writes(TorchDispatchMode):
    """Where operations write to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cells: list[Cell] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for i, argument in enumerate(func._schema.arguments):
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.cells += [cell_of(tensor) for tensor in tensors_in(value)]
        return func(*args, **kwargs)


def cell_of(tensor: Tensor) -> Cell:
    """Where a tensor lies: the memory, and what of it."""
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    memory = tensor.untyped_storage()._cdata
    return memory, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def works_in_place(node: fx.Node) -> bool:
    """Whether a node runs a module that says that it works in place."""
    if node.op != "call_module" or node.graph.owning_module is None:
        return False
    return (
        getattr(node.graph.owning_module.get_submodule(str(node.target)), "inplace", None) is True
    )
