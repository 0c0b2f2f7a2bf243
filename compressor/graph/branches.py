"""Residual branches: parts of a network that can be left out whole.

A sum `shortcut + branch` stays legal without its branch where both were computed from one
tensor: what is left is the shortcut. Seen in an fx graph, because leaving a part out is a change
of the graph; `traced` makes one of a network's own code, in which its modules stay what they are.
"""

import copy
import itertools
import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from compressor.containers import tensors_in
from compressor.errors import GraphError
from compressor.graph.record import positional
from compressor.running import cloned, is_norm, is_random, unfused_attention
from compressor.values import FORWARD_FAILURES, Branch, ChannelGroup, Example, Role

aten = torch.ops.aten
_ADDS: frozenset[Any] = frozenset({
    operator.add, operator.iadd, torch.add, aten.add.Tensor, aten.add_.Tensor, "add", "add_",
})  # fmt: skip
Nodes = frozenset[fx.Node]


def traced(model: nn.Module) -> fx.GraphModule:
    """`model` as an fx graph of copies of its modules, with the same names in the state_dict.

    The code runs on a copy: what it keeps in attributes while it is traced is no tensor.

    Raises:
        GraphError: torch.fx cannot follow its code.
    """
    if isinstance(model, fx.GraphModule):
        return model
    tracer = _Tracer()
    try:
        graph = tracer.trace(copy.deepcopy(model))
        return fx.GraphModule(tracer.root, graph, type(model).__name__).eval()
    except (fx.proxy.TraceError, *FORWARD_FAILURES) as err:
        raise GraphError(f"{type(model).__name__} cannot be traced by torch.fx: {err}") from err


class _Tracer(fx.Tracer):
    """Takes norms and what drops at random for layers, whosever they are: they are to learn."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_layer = is_norm(m) or is_random(m)
        return is_layer or super().is_leaf_module(m, module_qualified_name)


def residual_branches(
    network: fx.GraphModule, example: Example, groups: Sequence[ChannelGroup]
) -> tuple[Branch, ...]:
    """Every branch of a residual sum that can be left out, in graph order.

    Args:
        network: From `traced` or `compressor.program`.
        example: What it takes.
        groups: Its channel groups.
    """
    ran, copied = _Ran(network), cloned(example)
    with torch.no_grad(), unfused_attention(), ran.flops, ran.calls:
        ran.run(*positional(network, copied))
    users = _users_of_modules(network)
    found: list[Branch] = []
    n_named: Counter[str] = Counter()
    for node in network.graph.nodes:
        sides = {} if node not in ran.adds else _branches_of(node, ran)
        if not sides:
            continue
        argument = max(sides, key=lambda side: sum(ran.macs[n] for n in sides[side]))
        own = sides[argument]
        if not any(ran.macs[n] for n in own):
            continue
        modules = tuple(name for name, nodes in users.items() if nodes <= own)
        title = _common_module(modules) or node.name
        n_named[title] += 1
        operation, call = ran.adds[node]
        found.append(Branch(
            name=title if n_named[title] == 1 else f"{title}#{n_named[title]}",
            node=node.name,
            argument=argument,
            own_nodes=tuple(n.name for n in network.graph.nodes if n in own),
            modules=modules,
            groups=tuple(g.name for g in groups if _lies_in(g, modules)),
            macs=sum(ran.macs[n] for n in own),
            operation=operation,
            call=call,
        ))  # fmt: skip
    return tuple(found)


def _branches_of(node: fx.Node, ran: "_Ran") -> dict[int, Nodes]:
    """Which argument of the sum `node` is a branch -> the nodes that only that branch needs."""
    terms = node.args[:2]
    if len(terms) < 2 or terms[0] is terms[1]:
        return {}
    if any(ran.shapes.get(term) != ran.shapes[node] for term in terms):  # type: ignore[arg-type]
        return {}
    found = {}
    for argument, (branch, shortcut) in enumerate((terms, terms[::-1])):
        assert isinstance(branch, fx.Node)
        assert isinstance(shortcut, fx.Node)
        own = _needed(branch) - _needed(*_ends(node.graph), without=(node, branch))
        sources = {source for n in own for source in n.all_input_nodes} - own
        tensors = {n for n in sources if n.op != "get_attr" and n in ran.shapes}
        if own and len(tensors) == 1 and tensors <= _read_by(shortcut, ran):
            found[argument] = _with_unused(own, node)
    return found


def _with_unused(own: Nodes, total: fx.Node) -> Nodes:
    """`own`, and what is computed from it for nothing: attention's weights, say."""
    everything = set(own)
    for node in total.graph.nodes:
        if node is not total and everything.intersection(node.all_input_nodes):
            everything.add(node)
    return frozenset(everything)


def _ends(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op in ("output", "placeholder")]


def _needed(*ends: fx.Node, without: tuple[fx.Node, fx.Node] | None = None) -> Nodes:
    """All that `ends` are computed from, they too, where (sum, term) `without` is left out."""
    seen: set[fx.Node] = set()
    waiting = list(ends)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            for source in node.all_input_nodes:
                if (node, source) != without:
                    waiting.append(source)
    return frozenset(seen)


def _read_by(term: fx.Node, ran: "_Ran") -> Nodes:
    """What `term` is computed from; a tensor of which it takes the size alone is not."""
    seen: set[fx.Node] = set()
    waiting = [term]
    while waiting:
        node = waiting.pop()
        if node not in seen and node in ran.holding:
            seen.add(node)
            waiting += node.all_input_nodes
    return frozenset(seen)


def _users_of_modules(network: fx.GraphModule) -> dict[str, Nodes]:
    """Module with tensors of its own -> the nodes that run it or read from it."""
    users: dict[str, set[fx.Node]] = {}
    for node in network.graph.nodes:
        if node.op == "call_module":
            users.setdefault(str(node.target), set()).add(node)
        elif node.op == "get_attr":
            users.setdefault(str(node.target).rpartition(".")[0], set()).update(node.users)
    return {
        name: frozenset(nodes)
        for name, nodes in users.items()
        if any(True for _ in network.get_submodule(name).parameters())
    }


def _common_module(names: Sequence[str]) -> str:
    """The innermost module that holds all of `names`; empty where it is the network."""
    parts = zip(*(name.split(".") for name in names), strict=False)
    same = itertools.takewhile(lambda alike: len(set(alike)) == 1, parts)
    return ".".join(each[0] for each in same)


def _lies_in(group: ChannelGroup, modules: Sequence[str]) -> bool:
    """Whether all that produces the group's channels is in `modules`."""
    return all(
        any(f"{producer}.".startswith(f"{module}.") for module in modules)
        for producer in group.modules(Role.PRODUCER)
    )


class _Ran(fx.Interpreter):
    """What is known of a network's nodes after they ran.

    Attributes:
        shapes: Node -> shape, of nodes that return one tensor.
        holding: Nodes that return a tensor or several.
        macs: Node -> multiply-accumulates.
        adds: Node that adds -> the ATen operation, and its number among those of that name.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.holding: set[fx.Node] = set()
        self.macs: Counter[fx.Node] = Counter()
        self.adds: dict[fx.Node, tuple[str, int]] = {}
        self.flops = FlopCounterMode(display=False)
        self.calls = _Calls()

    def run_node(self, n: fx.Node) -> Any:
        before = self.flops.get_total_flops()
        self.calls.last = None
        value = super().run_node(n)
        self.macs[n] = (self.flops.get_total_flops() - before) // 2
        if any(True for _ in tensors_in(value)):
            self.holding.add(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
            if n.target in _ADDS and self.calls.last is not None:
                self.adds[n] = self.calls.last
        return value


class _Calls(TorchDispatchMode):
    """Numbers operations as `Record` does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n_calls: Counter[str] = Counter()
        self.last: tuple[str, int] | None = None

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        self.last = name, self.n_calls[name]
        self.n_calls[name] += 1
        return func(*args, **(kwargs or {}))
