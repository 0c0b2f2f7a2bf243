"""The forms of operations that write over nothing: `add` of `add_`, `relu` of `relu_`."""

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from compressor.graph.lenses import name_of

_OPERATORS = {
    getattr(operator, f"i{name}"): getattr(operator, plain)
    for name, plain in {
        "add": "add", "sub": "sub", "mul": "mul", "truediv": "truediv", "pow": "pow",
        "floordiv": "floordiv", "mod": "mod", "and": "and_", "or": "or_", "xor": "xor",
        "matmul": "matmul", "lshift": "lshift", "rshift": "rshift",
    }.items()
}  # fmt: skip
# Their plain namesakes do something else, or there is none; they get a copy to write over.
_OTHERS = frozenset({"bernoulli_", "random_", "normal_", "uniform_", "exponential_", "geometric_"})


def make_plain(node: fx.Node) -> bool:
    """Gives a node that writes over its first argument its plain form, where that is known."""
    name = name_of(node)
    if node.op == "call_method":
        if name in _OTHERS or not name.endswith("_") or not hasattr(Tensor, name[:-1]):
            return False
        node.target = name[:-1]
        return True
    found: Callable[..., Any] | None = _OPERATORS.get(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        found = None if name in _OTHERS else _plain_overload(node.target)
    elif found is None and "inplace" in _parameters(node.target):
        at = _parameters(node.target).index("inplace")
        if len(node.args) > at:
            node.update_arg(at, False)
        else:
            node.kwargs = {**node.kwargs, "inplace": False}
        return True
    elif found is None and name.endswith("_") and name not in _OTHERS:
        found = getattr(torch, name[:-1], None) or getattr(F, name[:-1], None)
    if found is None:
        return False
    node.target = found
    return True


def _plain_overload(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """`aten.add.Tensor` of `aten.add_.Tensor`."""
    space, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, space), name.removesuffix("_"), None)
    if packet is None or not name.endswith("_"):
        return None
    takes = _takes(target)
    found = (getattr(packet, overload) for overload in packet.overloads())
    return next((o for o in found if not o._schema.is_mutable and _takes(o) == takes), None)


def _takes(target: torch._ops.OpOverload) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in target._schema.arguments]


def _parameters(function: Any) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # written in C
        return []
