"""What networks return, in containers as people write them: found and kept, or refused."""

import copy
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import compressor
from compressor.containers import answers_in, map_tensors, tensors_in
from compressor.errors import GraphError


@dataclass(slots=True)
class Slotted:
    boxes: Tensor
    scores: Tensor
    name: str = "x"


@dataclass(frozen=True)
class Frozen:
    boxes: Tensor
    scores: Tensor


@dataclass(slots=True)
class Deeper(Slotted):
    masks: Any = None


class Named(NamedTuple):
    boxes: Tensor
    scores: Tensor


class Plain:
    def __init__(self, boxes: Tensor, scores: Tensor) -> None:
        self.boxes, self.scores, self.itself = boxes, scores, self


class Private:
    __slots__ = ("__boxes", "scores")

    def __init__(self, boxes: Tensor, scores: Tensor) -> None:
        self.__boxes, self.scores = boxes, scores


class Registered:
    """What only its registration tells how to open."""

    def __init__(self, both: list[Tensor]) -> None:
        self.take = lambda: both


pytree.register_pytree_node(
    Registered, lambda value: (value.take(), None), lambda parts, _: Registered(list(parts))
)


class Stream:
    """Read once."""

    def __init__(self, *each: Tensor) -> None:
        self.left = list(each)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if not self.left:
            raise StopIteration
        return self.left.pop(0)


OPEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "list": lambda a, b: [a, b],
    "tuple in list": lambda a, b: [(a,), [b, None]],
    "dict": lambda a, b: {"a": a, "b": b},
    "ordered dict": lambda a, b: OrderedDict(a=a, b=b),
    "default dict": lambda a, b: defaultdict(list, a=a, b=b),
    "user's dict": lambda a, b: UserDict(a=a, b=b),
    "user's list": lambda a, b: UserList([a, b]),
    "deque": lambda a, b: deque([a, b]),
    "named tuple": Named,
    "torch's own": lambda a, b: torch.return_types.max((a, b)),
    "slots": Slotted,
    "inherited slots": lambda a, b: Deeper(a, b, masks=[b]),
    "frozen data class": Frozen,
    "object": Plain,
    "private slots": Private,
    "namespace": lambda a, b: SimpleNamespace(a=a, deep=SimpleNamespace(b=b)),
    "registered": lambda a, b: Registered([a, b]),
}


class Annotated(dict[str, Any]):
    """Items, and more in an attribute."""


def annotated(a: Tensor, b: Tensor) -> Any:
    made = Annotated(a=a)
    made.features = b  # type: ignore[attr-defined]
    return made


def hung(a: Tensor, b: Tensor) -> Any:
    a.features = b  # type: ignore[attr-defined]
    return a


SHUT: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "generator": lambda a, b: (each for each in (a, b)),
    "iterator": lambda a, b: iter([a, b]),
    "map": lambda a, b: map(torch.relu, [a, b]),
    "iterator of one's own": Stream,
    "set": lambda a, b: {a, b},
    "frozen set": lambda a, b: frozenset([a, b]),
    "array": lambda a, b: [a.numpy(), b],
    "function": lambda a, b: {"a": a, "b": lambda: b},
    "dict's values": lambda a, b: [a, {"b": b}.values()],
    "dict with an attribute": annotated,
    "tensor with an attribute": hung,
    "slice": lambda a, b: [a, slice(b, None)],
    "nothing": lambda a, b: None,
    "numbers": lambda a, b: [float(a.sum()), float(b.sum())],
}


class Returning(nn.Module):
    """Two heads, in a container."""

    def __init__(self, contain: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 3)
        self.contain = contain

    def forward(self, x: Tensor) -> Any:
        boxes = self.first(x)
        return self.contain(boxes, self.second(boxes.relu()))


@pytest.mark.parametrize("name", OPEN)
def test_tensors_are_found_in_order_and_changed_in_a_container_of_the_same_kind(name: str) -> None:
    a, b = torch.zeros(2), torch.ones(3)
    value = OPEN[name](a, b)
    found = answers_in(value)
    assert found[0] is a
    assert found[1] is b
    assert all(one is other for one, other in zip(tensors_in(value), found, strict=True))
    changed = map_tensors(lambda t: t + 1, value)
    assert type(changed) is type(value) or name == "user's dict" or name == "user's list"
    assert [float(t[0]) for t in answers_in(changed)][:2] == [1.0, 2.0]
    assert [float(t[0]) for t in answers_in(value)][:2] == [0.0, 1.0]
    assert map_tensors(lambda t: t, value) is value


@pytest.mark.parametrize("name", SHUT)
@pytest.mark.bad_input("an answer that cannot be looked into")
def test_what_cannot_be_looked_into_is_refused_by_name(name: str) -> None:
    with pytest.raises(GraphError, match=r"The network returns an? "):
        answers_in(SHUT[name](torch.zeros(2), torch.ones(3)))


@pytest.mark.parametrize("name", OPEN)
def test_answers_keep_their_width_in_every_container(name: str) -> None:
    """Both convolutions are outputs: nothing is free but what is between, and there is nothing."""
    network = Returning(OPEN[name]).eval()
    groups = compressor.channel_groups(network, torch.rand(1, 3, 12, 12))
    assert {group.name: group.locked_because for group in groups} == {
        "first": "its channels are the model's output",
        "second": "its channels are the model's output",
    }


@pytest.mark.parametrize("name", SHUT)
@pytest.mark.bad_input("an answer that cannot be looked into")
def test_a_network_whose_answers_cannot_be_seen_is_refused(name: str) -> None:
    network = Returning(SHUT[name]).eval()
    with pytest.raises(GraphError):
        compressor.prune(network, torch.rand(1, 3, 12, 12), 0.5)


def test_an_object_that_holds_itself_ends() -> None:
    value = Plain(torch.zeros(1), torch.ones(1))
    copied = copy.copy(value)
    assert len(answers_in({"a": value, "b": copied})) == 6
