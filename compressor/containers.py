"""What networks take and return: tensors in containers, however people write those.

Lists of known things fail closed. A tensor that nobody found in an answer would be neither locked
nor compared, so that a network would come back with fewer outputs and a proof of nothing. What is
in an answer is therefore either known or refused (`answers_in`).
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compressor.errors import GraphError

# They hold no tensor.
PLAIN = (
    type(None), bool, int, float, complex, str, bytes, range, Enum, torch.Size, torch.dtype,
    torch.device, torch.layout, torch.memory_format, np.generic,
)  # fmt: skip
# They are not looked into, and whatever they hold is not an answer.
_MACHINERY = ("torch._", "torch.fx.")
CLOSED = (type, nn.Module, torch.Generator, np.ndarray)

TORCHS_OWN = "torch._subclasses"  # tensors while torch traces: they hold all that it knows

Rebuild = Callable[[list[Any]], Any]


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in known containers and plain objects, in order; others hold none."""
    yield from _tensors(value, (), lambda _: None)


def answers_in(value: object) -> list[Tensor]:
    """Every tensor that a network returned, in order.

    Raises:
        GraphError: There is none, or `value` holds something that cannot be looked into.
    """

    def refuse(what: object) -> None:
        raise GraphError(
            f"The network returns {_named(what)}{_within(what, value)}: what is in it cannot be "
            f"seen. Expected tensors in lists, tuples, dicts, data classes or plain objects."
        )

    found = list(_tensors(value, (), refuse))
    for tensor in found:
        if tensor.is_nested or tensor.layout is not torch.strided:
            kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            raise GraphError(
                f"The network returns a tensor that is {kind}; expected dense ones. Return "
                f"tensor.to_dense(), or the parts."
            )
    if not found:
        raise GraphError(
            f"The network returns {_named(value)} without a tensor; expected at least one."
        )
    return found


def leaves_in(value: object) -> Iterator[object]:
    """Every tensor and plain value in known containers and plain objects, in order."""
    yield from _leaves(value, (), lambda _: None)


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with every tensor in known containers changed; those are made anew, as they were."""
    return _mapped(change, value, ())


def _tensors(
    value: object, around: tuple[int, ...], refuse: Callable[[object], None]
) -> Iterator[Tensor]:
    yield from (leaf for leaf in _leaves(value, around, refuse) if isinstance(leaf, Tensor))


def _leaves(
    value: object, around: tuple[int, ...], refuse: Callable[[object], None]
) -> Iterator[object]:
    if isinstance(value, Tensor):
        yield value
        if not type(value).__module__.startswith(TORCHS_OWN) and _hides(value, [value]):
            refuse(value)
    elif isinstance(value, PLAIN):
        yield value
    elif id(value) not in around:  # it may hold itself
        opened = _opened(value)
        if opened is None:
            refuse(value)
            return
        found = [t for each in opened[0] for t in _leaves(each, (*around, id(value)), refuse)]
        yield from found
        if isinstance(value, (Mapping, Sequence)) and _hides(value, found):
            refuse(value)


def _hides(value: object, found: Sequence[object]) -> bool:
    """Whether an object with items of its own keeps other tensors in attributes.

    torch keeps machinery of its own there, which has no end.
    """
    known = {id(leaf) for leaf in found}
    kept = getattr(value, "__dict__", {}).values()
    own = (each for each in kept if not type(each).__module__.startswith(_MACHINERY))
    return any(id(tensor) not in known for each in own for tensor in tensors_in(each))


def _mapped(change: Callable[[Tensor], Tensor], value: Any, around: tuple[int, ...]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, PLAIN) or id(value) in around:
        return value
    opened = _opened(value)
    if opened is None:
        return value
    parts, rebuild = opened
    changed = [_mapped(change, part, (*around, id(value))) for part in parts]
    is_same = all(new is old for new, old in zip(changed, parts, strict=True))
    return value if is_same and parts else rebuild(changed)


def _opened(value: Any) -> tuple[list[Any], Rebuild] | None:
    """What is in a container, and how it is made of other parts; None of what is none."""
    kind: Any = type(value)
    if isinstance(value, CLOSED) or callable(value):
        return None
    if isinstance(value, tuple) and hasattr(kind, "_make"):
        return list(value), kind._make
    if kind in pytree.SUPPORTED_NODES:
        node = pytree.SUPPORTED_NODES[kind]
        parts, context = node.flatten_fn(value)
        return list(parts), lambda changed: node.unflatten_fn(changed, context)
    if isinstance(value, Mapping):
        keys = list(value)
        return list(value.values()), lambda changed: dict(zip(keys, changed, strict=True))
    if isinstance(value, tuple):
        return list(value), tuple
    if isinstance(value, Sequence):
        return list(value), list
    if isinstance(value, (Set, Iterator)):  # an order of their own; read once
        return None
    names = list(_attributes(value))
    if not names and not hasattr(value, "__dict__"):  # written in C
        return None

    def rebuilt(changed: list[Any]) -> Any:
        made = copy.copy(value)
        for name, part in zip(names, changed, strict=True):
            object.__setattr__(made, name, part)
        return made

    return [getattr(value, name) for name in names], rebuilt


def _attributes(value: object) -> dict[str, None]:
    """Names of what an object keeps in its dict and its slots, in order."""
    slots: dict[str, None] = {}
    for kind in reversed(type(value).__mro__):
        named = kind.__dict__.get("__slots__", ())
        for name in (named,) if isinstance(named, str) else named:
            mangled = f"_{kind.__name__.lstrip('_')}{name}"
            is_private = name.startswith("__") and not name.endswith("__")
            slots[mangled if is_private else name] = None
    kept = {name: None for name in slots if name not in ("__dict__", "__weakref__")}
    set_ = {name: None for name in kept if hasattr(value, name)}
    return set_ | dict.fromkeys(getattr(value, "__dict__", {}))


def _named(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _within(what: object, value: object) -> str:
    return "" if what is value else f" in {_named(value)}"
