"""Views of a tensor, and how a new value of the view becomes one of the whole.

A view (`x[:, :8]`, `x.flatten(1)`, `x.chunk(2, 1)[0]`) that is written over changes the tensor it
looks at. `put_back` says the same without writing: a slice is put between its neighbours with
`cat`, a reshape is reshaped back. `cat` rather than torch's `slice_scatter`, because widths can be
pruned through it, and because ONNX has it.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

RESHAPES = frozenset({
    "view", "_unsafe_view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "ravel",
    "squeeze", "unsqueeze", "Flatten", "Unflatten",
})  # fmt: skip
SWAPS = frozenset({"transpose", "swapaxes", "swapdims", "t"})  # that undo themselves
PARTS = frozenset({"chunk", "split", "split_with_sizes", "unbind"})  # return several views
_WHOLE = slice(None)
_TO_THE_END = 2**63 - 1  # as torch.export writes it


@dataclass(frozen=True, eq=False)
class Spelling:
    """How new nodes are written: with operations of ATen in a program, with torch's elsewhere.

    Attributes:
        graph: That nodes are added to, where it inserts now.
        is_program: Whether it is a torch.export program.
        meta: Of the node they are made for.
    """

    graph: fx.Graph
    is_program: bool
    meta: dict[str, Any]

    def _add(self, theirs: Any, own: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(theirs if self.is_program else own, args)
        node.meta.update(self.meta)
        return node

    def cat(self, parts: Sequence[fx.Node], dim: int) -> fx.Node:  # noqa: D102
        return self._add(aten.cat.default, torch.cat, list(parts), dim)

    def stack(self, parts: Sequence[fx.Node], dim: int) -> fx.Node:  # noqa: D102
        return self._add(aten.stack.default, torch.stack, list(parts), dim)

    def clone(self, x: fx.Node) -> fx.Node:  # noqa: D102
        return self._add(aten.clone.default, torch.clone, x)

    def zeros_like(self, x: fx.Node) -> fx.Node:  # noqa: D102
        return self._add(aten.zeros_like.default, torch.zeros_like, x)

    def add(self, x: fx.Node, y: Any) -> fx.Node:  # noqa: D102
        return self._add(aten.add.Tensor, operator.add, x, y)

    def reshape_as(self, x: fx.Node, other: fx.Node) -> fx.Node:  # noqa: D102
        return self._add(aten.reshape_as.default, torch.Tensor.reshape_as, x, other)

    def expand_as(self, x: fx.Node, other: fx.Node) -> fx.Node:  # noqa: D102
        return self._add(aten.expand_as.default, torch.Tensor.expand_as, x, other)

    def type_as(self, x: fx.Node, other: fx.Node) -> fx.Node:  # noqa: D102
        return self._add(aten.type_as.default, torch.Tensor.type_as, x, other)

    def unsqueeze(self, x: fx.Node, dim: int) -> fx.Node:  # noqa: D102
        return self._add(aten.unsqueeze.default, torch.unsqueeze, x, dim)

    def permute(self, x: fx.Node, order: Sequence[int]) -> fx.Node:  # noqa: D102
        return self._add(aten.permute.default, torch.permute, x, list(order))

    def item(self, parts: fx.Node, number: int) -> fx.Node:  # noqa: D102
        return self._add(operator.getitem, operator.getitem, parts, number)

    def cut(self, x: fx.Node, dim: int, start: Any, stop: Any, step: int = 1) -> fx.Node:
        """`x[start:stop:step]` along `dim`."""
        if self.is_program:
            stop = _TO_THE_END if stop is None else stop
            return self._add(aten.slice.Tensor, None, x, dim, start or 0, stop, step)
        place = (*[_WHOLE] * dim, slice(start, stop, None if step == 1 else step))
        return self._add(None, operator.getitem, x, place)

    def scatter(self, x: fx.Node, new: fx.Node, at: "Range") -> fx.Node:
        """`x` with every `at.step`-th place from `new`."""
        return self._add(
            aten.slice_scatter.default, torch.slice_scatter, x, new, *_fields(at)
        )  # fmt: skip


@dataclass(frozen=True)
class Range:
    """`start:stop:step` along `dim`; a single position where `is_single`."""

    dim: int
    start: Any
    stop: Any
    step: int = 1
    is_single: bool = False


def _fields(at: Range) -> tuple[Any, ...]:
    return at.dim, at.start, at.stop, at.step


def name_of(node: fx.Node) -> str:
    """What a node does, without how it is spelled: "slice", "add_", "ReLU", "getitem"."""
    if node.op == "call_module":
        assert node.graph.owning_module is not None
        return type(node.graph.owning_module.get_submodule(str(node.target))).__name__
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2]
    return str(getattr(node.target, "__name__", node.target))


def ranges(view: fx.Node, whole: Tensor) -> list[Range] | None:
    """The ranges of `whole` that a slicing node looks at; None where it does not slice."""
    name, args = name_of(view), given(view)
    n_dims = whole.ndim
    if name == "getitem":
        return index_ranges(view.args[1], n_dims)
    if name == "slice":
        dim, start, stop, step = (*args, *(0, None, None, 1)[len(args) :])[:4]
        return [Range(dim % n_dims, start, None if stop == _TO_THE_END else stop, step)]
    if name == "narrow" and len(args) == 3:
        dim, start, length = args
        is_plain = isinstance(start, int) and isinstance(length, int) and start >= 0
        return [Range(dim % n_dims, start, start + length)] if is_plain else None
    if name == "select" and len(args) == 2:
        return [_single(args[0] % n_dims, args[1])] if isinstance(args[1], int) else None
    return None


def index_ranges(index: Any, n_dims: int) -> list[Range] | None:
    """The ranges of a Python index `x[index]`; None where it is more than ranges."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if entries.count(Ellipsis) == 1 if all(_is_plain(e) for e in entries) else False:
        at = entries.index(Ellipsis)
        entries[at : at + 1] = [_WHOLE] * (n_dims - len(entries) + 1)
    if not all(_is_plain(e) and e is not Ellipsis for e in entries) or len(entries) > n_dims:
        return None
    found = []
    for dim, entry in enumerate(entries):
        if isinstance(entry, int):
            found.append(_single(dim, entry))
        elif entry != _WHOLE:
            step = 1 if entry.step is None else entry.step
            if not isinstance(step, int) or step < 1:
                return None
            found.append(Range(dim, entry.start, entry.stop, step))
    return found


def _is_plain(entry: Any) -> bool:
    return entry is Ellipsis or isinstance(entry, slice) or type(entry) is int


def _single(dim: int, at: int) -> Range:
    return Range(dim, at, None if at == -1 else at + 1, is_single=True)


def given(view: fx.Node) -> tuple[Any, ...]:
    """What a view is told beside the tensor; keyword arguments follow, in order."""
    return (*view.args[1:], *(v for k, v in view.kwargs.items() if k not in ("input", "self")))


PutBack = Callable[[Spelling, fx.Node, fx.Node], fx.Node]  # (spelling, whole, new view) -> whole


def put_back(view: fx.Node, whole: Tensor, seen: Tensor) -> PutBack | None:
    """What makes a new whole of a new value of the view; None where nothing is known to.

    Args:
        view: The node that returns the view; of several parts, the one that picks this part.
        whole: What it looks at, as it was when it ran.
        seen: What it returned.
    """
    name = name_of(view)
    source = view.args[0] if view.args else None
    if name == "getitem" and isinstance(source, fx.Node) and name_of(source) in PARTS:
        return _put_part(view, source)
    if name in RESHAPES:
        return lambda spell, old, new: spell.reshape_as(new, old)
    if name in SWAPS or name == "permute":
        order = _order(name, given(view), whole.ndim)
        if order is None:
            return None
        back = [order.index(d) for d in range(len(order))]
        return lambda spell, old, new: spell.permute(new, back)
    found = ranges(view, whole)
    if found is None:
        return None
    sizes = tuple(whole.shape)
    return lambda spell, old, new: put_ranges(spell, old, found, new, sizes)


def put_ranges(
    spell: Spelling, whole: fx.Node, at: Sequence[Range], new: fx.Node, sizes: Sequence[int]
) -> fx.Node:
    """`whole` with `new` where `at` says; `sizes` are those of `whole`."""
    for place in at:
        if place.is_single:
            new = spell.unsqueeze(new, place.dim)
    return _put(spell, whole, [r for r in at if r.is_single or not _is_all(r, sizes)], new, sizes)


def _put(
    spell: Spelling, whole: fx.Node, at: Sequence[Range], new: fx.Node, sizes: Sequence[int]
) -> fx.Node:
    if not at:
        return new
    place, *rest = at
    if rest:
        inner = spell.cut(whole, *_fields(place))
        new = _put(spell, inner, rest, new, sizes)
    if place.step != 1:
        return spell.scatter(whole, new, place)
    parts = [new]
    if place.start not in (None, 0):
        parts.insert(0, spell.cut(whole, place.dim, None, place.start))
    if place.stop is not None and not (
        isinstance(place.stop, int) and place.stop >= sizes[place.dim]
    ):
        parts.append(spell.cut(whole, place.dim, place.stop, None))
    return spell.cat(parts, place.dim) if len(parts) > 1 else new


def _is_all(place: Range, sizes: Sequence[int]) -> bool:
    ends = place.stop is None or (isinstance(place.stop, int) and place.stop >= sizes[place.dim])
    return place.start in (None, 0) and ends and place.step == 1


def _put_part(view: fx.Node, source: fx.Node) -> PutBack | None:
    """Of one of several parts: the whole is all of them again."""
    number, dims = view.args[1], given(source)
    name = name_of(source)
    at = 0 if name == "unbind" else 1
    dim = dims[at] if len(dims) > at else 0
    if not isinstance(number, int) or not isinstance(dim, int):
        return None

    def put(spell: Spelling, old: fx.Node, new: fx.Node) -> fx.Node:
        with_old = spell.graph.node_copy(source, lambda n: old if n is source.args[0] else n)
        n_parts = source.meta["n_parts"]
        parts = [new if i == number % n_parts else spell.item(with_old, i) for i in range(n_parts)]
        return spell.stack(parts, dim) if name == "unbind" else spell.cat(parts, dim)

    return put


def _order(name: str, args: Sequence[Any], n_dims: int) -> list[int] | None:
    """The dimensions of the whole, in the order the view has them."""
    if name == "t":
        return list(range(n_dims))[::-1]
    dims = args[0] if len(args) == 1 and isinstance(args[0], (list, tuple)) else args
    if not all(isinstance(d, int) for d in dims):
        return None
    if name == "permute":
        return [d % n_dims for d in dims]
    order = list(range(n_dims))
    first, second = (d % n_dims for d in dims)
    order[first], order[second] = second, first
    return order


def with_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of `x` with `value` at `index`, whatever that is: a mask, numbers, every second."""
    changed = x.clone()
    changed[index] = value
    return changed
