"""An fx graph in which nothing is written over: every operation returns a new tensor.

A network whose `ReLU(inplace=True)` writes over what came is right as long as nothing else needs
what came. Without a residual branch something may: the layer before does, for its gradient. And
the ONNX exporter loses what is written through a view. So every operation that writes over a
tensor becomes its form that does not, and whatever reads that tensor later, or another view of the
same memory, reads the new value. That is torch's functionalisation, but in a graph that keeps its
modules (torch.func.functionalize takes them apart, norms into what they do in evaluation).

Which tensors share memory, and which a node writes to, is not guessed: the graph is run. Memory
behind views that `lenses.py` cannot put back stays as it is. What comes out must answer alike.
"""

import copy
import logging
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from compressor.containers import tensors_in
from compressor.graph import lenses
from compressor.graph.alike import answers_alike
from compressor.graph.lenses import Spelling, name_of
from compressor.graph.memory import Cell, Run, cell_of, works_in_place
from compressor.graph.plain import make_plain
from compressor.running import buffers_kept
from compressor.values import FORWARD_FAILURES, Example

# Written over with what was given, not with what is computed from what was there.
_FILLS = frozenset({"copy_", "fill_", "zero_"})
# What looks at the memory of a tensor and hides it from gradients, or moves it elsewhere.
_HIDING = frozenset({"detach", "detach_", "data", "set_", "resize_", "as_strided", "getattr"})

logger = logging.getLogger(__name__)


def functional(network: fx.GraphModule, example: Example) -> fx.GraphModule:
    """`network` in a form that writes over no tensor, as far as that can be done exactly.

    Args:
        network: In eval mode; not changed. Modules that work on copies are shared with the answer.
        example: As the network takes it.

    Returns:
        `network` itself where it writes over nothing, or where the other form answers differently.
    """
    name = type(network).__name__
    try:
        with buffers_kept(network):
            made = _rewritten(network, example)
        if made is None:
            return network
        if not answers_alike(network, made, example):
            logger.warning("%s is left to work in place: it would answer otherwise", name)
            return network
    except FORWARD_FAILURES:
        logger.warning("%s is left to work in place", name, exc_info=True)
        return network
    return made


def writing_nodes(network: fx.GraphModule, example: Example) -> tuple[str, ...]:
    """Names of the nodes that write over a tensor which another node returned, in graph order."""
    seen = Run(network)
    seen.look(example)
    return tuple(node.name for node in network.graph.nodes if node in seen.writes)


def _rewritten(network: fx.GraphModule, example: Example) -> fx.GraphModule | None:
    """None where nothing is written over."""
    made = fx.GraphModule(network, copy.deepcopy(network.graph), type(network).__name__).eval()
    seen = Run(made)
    seen.look(example)
    if not seen.writes:
        return None
    _Rewriting(made, seen).run()
    made.graph.lint()
    made.recompile()
    _keep_kinds(made, seen, example)
    return made


def _keep_kinds(made: fx.GraphModule, seen: Run, example: Example) -> None:
    """`x += y` keeps the kind of `x`, `x + y` may not: casts where it did; notes shapes."""
    again = Run(made)
    again.look(example)
    is_program = any("val" in node.meta for node in made.graph.nodes)
    for node in list(made.graph.nodes):
        value, before = again.values.get(node), seen.values.get(node)
        if (
            isinstance(value, Tensor)
            and isinstance(before, Tensor)
            and value.dtype != before.dtype
        ):
            with made.graph.inserting_after(node):
                cast = made.graph.call_method("to", (node, before.dtype))
            node.replace_all_uses_with(cast)
            cast.args = node, before.dtype
        if is_program and "val" not in node.meta and isinstance(value, Tensor):
            node.meta["val"] = value.to("meta")
    made.recompile()


@dataclass(eq=False)
class _Memory:
    """Memory that is written over, and which node has the value that each part of it has now.

    Attributes:
        root: Node that first returned it.
        views: Cell -> (node that first returned it, node of what that looks at).
        now: Cell -> (node that has its value, after how many writes).
        n_writes: So far.
    """

    root: fx.Node
    views: dict[Cell, tuple[fx.Node, fx.Node]] = field(default_factory=dict)
    now: dict[Cell, tuple[fx.Node, int]] = field(default_factory=dict)
    n_writes: int = 0


class _Rewriting:
    """Goes through a graph once, from first to last, and takes the writing out of it."""

    def __init__(self, made: fx.GraphModule, seen: Run) -> None:
        self.made, self.graph, self.seen = made, made.graph, seen
        self.nodes = list(made.graph.nodes)
        self.is_program = any(isinstance(n.target, torch._ops.OpOverload) for n in self.nodes)
        self.views_of_parts: dict[fx.Node, fx.Node] = {}  # chunk and the like -> what it looks at
        self.disposable: set[fx.Node] = set()
        self.given = {node: (node.args, node.kwargs) for node in self.nodes}
        self.memories = self._written_memories()
        self.switched = self._modules_to_switch()

    # What is written over, and whether that can be undone.

    def _written_memories(self) -> dict[Any, _Memory]:
        """Those that can be rewritten whole."""
        cells, written = self.seen.cells, {c[0] for ws in self.seen.writes.values() for c in ws}
        memories: dict[Any, _Memory] = {}
        hopeless: set[Any] = set()
        for node in self.nodes:
            source = self._source(node)
            if node not in cells:
                self._look_at_parts(node, source, hopeless)
                continue
            cell = cells[node]
            memory = memories.setdefault(cell[0], _Memory(node))
            is_root = memory.root is node
            if node.op == "get_attr" or (name_of(node) in _HIDING and not is_root):
                hopeless.add(cell[0])
            if is_root or cell in memory.views or cell == cells[memory.root]:
                continue
            if source is None or node in self.seen.writes:
                hopeless.add(cell[0])
            else:
                memory.views[cell] = node, source
        memories = {key: m for key, m in memories.items() if key in written - hopeless}
        while True:  # a node that writes over two is left alone where one of them is
            bad = {
                cell[0]
                for node, wrote in self.seen.writes.items()
                if not self._can_undo(node, wrote, memories)
                for cell in wrote
            }
            if not bad & memories.keys():
                return memories
            memories = {key: m for key, m in memories.items() if key not in bad}

    def _source(self, node: fx.Node) -> fx.Node | None:
        """The argument that shares its memory with what the node returned."""
        value = self.seen.values.get(node)
        memory = {cell_of(tensor)[0] for tensor in tensors_in(value)}
        for argument in node.all_input_nodes:
            found = self.views_of_parts.get(argument, argument)
            if found in self.seen.cells and self.seen.cells[found][0] in memory:
                return found
        return None

    def _look_at_parts(self, node: fx.Node, source: fx.Node | None, hopeless: set[Any]) -> None:
        """Several tensors: parts of one that is known, or each one's memory by itself."""
        held = {cell_of(tensor)[0] for tensor in tensors_in(self.seen.values.get(node))}
        if source is not None and name_of(node) in lenses.PARTS:
            self.views_of_parts[node] = source
        elif any(name_of(user) != "getitem" for user in node.users):
            hopeless |= held

    def _can_undo(self, node: fx.Node, wrote: list[Cell], memories: dict[Any, _Memory]) -> bool:
        if len(wrote) != 1 or wrote[0][0] not in memories:
            return False
        memory = memories[wrote[0][0]]
        target = self._target(node, wrote[0])
        if target is None:
            return False
        return all(
            lenses.put_back(view, self._tensor(whole), self._tensor(view)) is not None
            for view, whole in self._chain(memory, self.seen.cells[target])
        )

    def _target(self, node: fx.Node, cell: Cell) -> fx.Node | None:
        """The argument that is written over: all of it, or by `x[...] = y` a part."""
        if node.target is operator.setitem:
            first = node.args[0]
            return first if isinstance(first, fx.Node) and first in self.seen.cells else None
        same = [a for a in node.all_input_nodes if self.seen.cells.get(a) == cell]
        return same[0] if same else None

    def _tensor(self, node: fx.Node) -> Tensor:
        value = self.seen.values[node]
        assert isinstance(value, Tensor)
        return value

    def _chain(self, memory: _Memory, cell: Cell) -> Iterator[tuple[fx.Node, fx.Node]]:
        """(view, what it looks at), from `cell` to the whole memory."""
        while cell in memory.views:
            view, whole = memory.views[cell]
            yield view, whole
            cell = self.seen.cells[whole]

    def _modules_to_switch(self) -> set[int]:
        """Modules whose `inplace` can be switched off: nowhere is their writing left as it is."""
        sites: dict[int, bool] = {}
        for node in self.nodes:
            if works_in_place(node):
                module = self.made.get_submodule(str(node.target))
                undone = all(c[0] in self.memories for c in self.seen.writes.get(node, []))
                sites[id(module)] = sites.get(id(module), True) and undone
        return {module for module, undone in sites.items() if undone}

    # The rewriting itself.

    def run(self) -> None:
        """Rewrites the graph in place."""
        for node in self.nodes:
            with self.graph.inserting_before(node):
                wrote = self.seen.writes.get(node, [])
                if wrote and wrote[0][0] in self.memories:
                    self._take_out(node, wrote[0])
                else:
                    self._read(node)
        self._switch_off()
        for node in reversed(list(self.graph.nodes)):
            if node in self.disposable and not node.users:
                self.graph.erase_node(node)

    def _read(self, node: fx.Node) -> None:
        """Lets a node that writes to nothing read what is there now."""
        source = self._source(node)
        is_fresh = source is not None and self._memory(source) is not None
        self._refresh(node)
        memory = self._memory(node)
        if memory is None:
            return
        cell = self.seen.cells[node]
        if is_fresh or cell not in memory.now:
            memory.now[cell] = node, memory.n_writes
        if memory.root is not node:
            self.disposable.add(node)

    def _refresh(self, node: fx.Node) -> None:
        """Lets a node read what lies now where its arguments point to."""
        node.args = fx.node.map_arg(node.args, self._fresh)
        node.kwargs = fx.node.map_arg(node.kwargs, self._fresh)

    def _memory(self, node: fx.Node) -> _Memory | None:
        cell = self.seen.cells.get(node)
        return self.memories.get(cell[0]) if cell is not None else None

    def _fresh(self, node: fx.Node) -> fx.Node:
        """The node that has now what lies where `node` pointed to."""
        memory = self._memory(self.views_of_parts.get(node, node))
        if memory is None or (node in self.views_of_parts and not memory.n_writes):
            return node
        if node in self.views_of_parts:
            return self._again(node)
        cell = self.seen.cells[node]
        found, n_writes = memory.now.get(cell, (None, -1))
        if found is None or n_writes != memory.n_writes:
            found = self._again(memory.views[cell][0])
            memory.now[cell] = found, memory.n_writes
        return found

    def _again(self, view: fx.Node) -> fx.Node:
        """The view, of what is there now."""
        args, kwargs = (fx.node.map_arg(given, self._fresh) for given in self.given[view])
        made = self.graph.create_node(view.op, view.target, args, kwargs)
        made.meta.update(view.meta)
        self.disposable.add(made)
        return made

    def _take_out(self, node: fx.Node, cell: Cell) -> None:
        """Makes a node return what it would have written."""
        target = self._target(node, cell)
        assert target is not None
        memory, spell = self.memories[cell[0]], Spelling(self.graph, self.is_program, _meta(node))
        chain = [
            (view, whole, self._fresh(whole))
            for view, whole in self._chain(memory, self.seen.cells[target])
        ]
        new = self._new_value(node, target, cell, spell)
        if new is None:
            return
        memory.n_writes += 1
        memory.now[self.seen.cells[target]] = new, memory.n_writes
        with self.graph.inserting_before(node.next):
            for view, whole, old in chain:
                put = lenses.put_back(view, self._tensor(whole), self._tensor(view))
                assert put is not None
                new = put(spell, old, new)
                memory.now[self.seen.cells[whole]] = new, memory.n_writes

    def _new_value(
        self, node: fx.Node, target: fx.Node, cell: Cell, spell: Spelling
    ) -> fx.Node | None:
        """What lies in `target` after `node`; None where that is what was there before."""
        old = self._fresh(target)
        if node.target is operator.setitem:
            self.disposable.add(node)
            return self._assigned(node, old, cell, spell)
        returns_it = self.seen.cells.get(node) == cell
        if name_of(node) in _FILLS and returns_it and node.op != "call_module":
            value = lenses.given(node)[0] if name_of(node) != "zero_" else 0
            if self._fits(value, cell):
                self.disposable.add(node)
                return self._filled(old, value, cell, spell)
        self._refresh(node)
        if node.op == "call_module" and returns_it:
            if id(self.made.get_submodule(str(node.target))) in self.switched:
                return node
        elif returns_it and node.args and node.args[0] is old and make_plain(node):
            return node
        if returns_it and node.kwargs.get("out") is old and node.op == "call_function":
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "out"}
            if isinstance(node.target, torch._ops.OpOverload):
                node.target = node.target.overloadpacket
            return node
        own = spell.clone(old)
        node.replace_input_with(old, own)
        return node if returns_it else own

    def _assigned(
        self, node: fx.Node, old: fx.Node, cell: Cell, spell: Spelling
    ) -> fx.Node | None:
        """What `x[index] = value` makes of `x`."""
        whole, index, value = node.args
        assert isinstance(whole, fx.Node)
        if isinstance(value, fx.Node) and self.seen.cells.get(value) == cell:
            return None  # `x[index] += 1` ends with it: what is there is put there
        found = lenses.index_ranges(index, self._tensor(whole).ndim)
        if found is None or not self._fits(value, cell):
            args = fx.node.map_arg((old, index, value), self._fresh)
            return self.graph.call_function(lenses.with_item, (old, *args[1:]))
        part = self.graph.call_function(operator.getitem, (old, index))
        self.disposable.add(part)
        new = self._filled(part, value, cell, spell)
        return lenses.put_ranges(spell, old, found, new, self._tensor(whole).shape)

    def _fits(self, value: Any, cell: Cell) -> bool:
        """Whether `_filled` can make a tensor of the kind and shape of `cell` from it."""
        _, _, shape, _, dtype = cell
        if isinstance(value, fx.Node):
            return value in self.seen.cells and self._tensor(value).ndim <= len(shape)
        return isinstance(value, (bool, int)) or (
            isinstance(value, float) and dtype.is_floating_point
        )

    def _filled(self, part: fx.Node, value: Any, cell: Cell, spell: Spelling) -> fx.Node:
        """`value`, as large as `part`, which lies in `cell`, and of its kind."""
        if not isinstance(value, fx.Node):
            zeros = spell.zeros_like(part)
            return spell.add(zeros, value) if value else zeros
        new = self._fresh(value)
        tensor = self._tensor(value)
        if (tensor.shape, tensor.dtype) != (cell[2], cell[4]):
            return spell.expand_as(spell.type_as(new, part), part)
        is_safe = self._memory(value) is not None or not self._is_written(value)
        return new if is_safe else spell.clone(new)

    def _is_written(self, node: fx.Node) -> bool:
        memory = self.seen.cells[node][0]
        return any(cell[0] == memory for wrote in self.seen.writes.values() for cell in wrote)

    def _switch_off(self) -> None:
        """Gives the graph copies of its in-place modules that are not."""
        copies: dict[int, nn.Module] = {}
        for node in self.nodes:
            if works_in_place(node):
                module = self.made.get_submodule(str(node.target))
                if id(module) in self.switched:
                    quiet = copies.setdefault(id(module), copy.copy(module))
                    quiet.inplace = False  # type: ignore[assignment]
                    self.made.set_submodule(str(node.target), quiet)


def _meta(node: fx.Node) -> dict[str, Any]:
    """What new nodes take over: where the user's code is that they are for."""
    return {k: node.meta[k] for k in ("stack_trace", "nn_module_stack") if k in node.meta}
