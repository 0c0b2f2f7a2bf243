"""Watched layers: what is told, in which order, and that nothing stays behind."""

import pytest
import torch
from torch import Tensor, nn

from compressor.watching import watched


class Named(nn.Module):
    """Calls its second layer first, and its first one by the name of its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(input=self.second(x))


def test_layers_are_told_of_in_the_order_they_run_in() -> None:
    """What the one answers is what the other reads, however it is given."""
    network, x = Named(), torch.randn(3, 2)
    seen: list[tuple[str, Tensor, Tensor]] = []
    with watched(network, {"first", "second"}, lambda *told: seen.append(told)):
        answer = network(x)
    (second, read, between), (first, passed_on, last) = seen
    assert (second, first) == ("second", "first")
    assert read is x
    assert passed_on is between
    assert last is answer


def test_nothing_is_watched_any_more_after_an_error() -> None:
    network = Named()
    seen: list[str] = []
    with (
        pytest.raises(RuntimeError, match="shapes"),
        watched(network, {"second"}, lambda name, *_: seen.append(name)),
    ):
        network(torch.randn(3, 5))
    network(torch.randn(3, 2))
    assert seen == []
    assert not network.second._forward_hooks
