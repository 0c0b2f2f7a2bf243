"""Channel groups: who is tied to whom, and what is locked."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.errors import GraphError
from compressor.graph import channel_groups, cost
from compressor.surgery import masked, remove_channels
from compressor.values import ChannelGroup, Role
from tests.conftest import ConvNet, random_plan, randomised


def by_name(model: nn.Module, example: Tensor) -> dict[str, ChannelGroup]:
    return {group.name: group for group in channel_groups(model.eval(), example)}


def test_groups_of_the_conv_net(conv_net: ConvNet, example: Tensor) -> None:
    groups = by_name(conv_net, example)
    assert {name: g.n_channels for name, g in groups.items()} == {
        "stem": 32, "inner": 64, "last": 64, "hidden": 24, "head": 5,
    }  # fmt: skip
    assert groups["stem"].modules(Role.PRODUCER) == ("stem", "outer")  # tied by the sum
    assert groups["stem"].modules(Role.CONSUMER) == ("inner", "last")
    assert groups["inner"].modules(Role.PER_CHANNEL) == ("inner_norm", "depthwise")
    locked = {name for name, g in groups.items() if g.locked_because}
    assert locked == {"head"}
    assert groups["head"].locked_because == "its channels are the model's output"


def test_every_channel_lies_once_in_every_tensor(conv_net: ConvNet, example: Tensor) -> None:
    """The rows of an index are a partition of the tensor's dimension."""
    seen: dict[tuple[str, int], list[int]] = {}
    for group in channel_groups(conv_net, example):
        for where in group.slices:
            seen.setdefault((where.key, where.dim), []).extend(where.index.ravel().tolist())
    for (key, dim), positions in seen.items():
        size = conv_net.state_dict()[key].shape[dim]
        assert sorted(positions) == list(range(size)), key


def test_flatten_gives_every_channel_its_pixels(example: Tensor) -> None:
    group = by_name(ConvNet(use_flatten=True), example)["last"]
    (reader,) = [s for s in group.slices if s.role is Role.CONSUMER]
    assert reader.index.shape == (64, 4)
    assert reader.index[3].tolist() == [12, 13, 14, 15]


class Odd(nn.Module):
    """Around one operation: conv, the operation, conv, pooled output."""

    def __init__(self, operation: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3)
        self.second = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1))
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.operation == "softmax":
            x = torch.softmax(x, 1)
        elif self.operation == "shuffle":
            x = x.view(x.size(0), 2, 4, 6, 6).transpose(1, 2).reshape(x.size(0), 8, 6, 6)
        elif self.operation == "constant":
            x = x * self.scale
        elif self.operation == "hard-coded view":
            return self.head(self.second(x).amax((2, 3)).view(-1, 8))
        elif self.operation == "roll":
            x = x + x.roll(1, 1)
        return self.head(self.second(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("operation", "locked", "reason"),
    [
        ("softmax", "first", "softmax"),
        ("shuffle", "first", "view"),
        ("constant", "first", "scale"),
        ("hard-coded view", "second", "amax"),
        ("roll", "first", "roll"),
    ],
)
def test_unknown_operations_lock_with_their_name_and_place(
    operation: str, locked: str, reason: str
) -> None:
    groups = by_name(Odd(operation), torch.randn(1, 1, 8, 8))
    because = groups[locked].locked_because
    assert because is not None
    assert reason in because
    if operation not in ("constant",):
        assert "test_graph.py" in because  # the user's own line


class Shared(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.how = how
        if how == "tied":
            self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x)))
        if self.how == "twice":
            x = self.second(torch.relu(x))
        return self.third(torch.relu(x)).mean((2, 3))


@pytest.mark.parametrize(("how", "reason"), [("tied", "shared weight"), ("twice", "used 2 times")])
def test_shared_weights_are_locked(how: str, reason: str) -> None:
    groups = by_name(Shared(how), torch.randn(1, 1, 6, 6))
    assert reason in (groups["first"].locked_because or "")
    assert reason in (groups["second"].locked_because or "")


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_untraceable_code_is_named() -> None:
    with pytest.raises(GraphError, match=r"Branches cannot be traced.*test_graph\.py, line \d+"):
        channel_groups(Branches().eval(), torch.randn(1, 1))


def test_wrong_input_shape_is_named(conv_net: ConvNet) -> None:
    with pytest.raises(GraphError, match=r"\(1, 3, 8, 8\).*--input-shape"):
        channel_groups(conv_net, torch.randn(1, 3, 8, 8))


class Careless(nn.Module):
    """Two convolutions and a head, written in ways that a pruner can trip over."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8, affine=how != "affine")
        self.second = nn.Conv2d(8, 8, 3)
        self.bound = nn.Conv2d(1, 8, 3)
        self.head = nn.Linear(8, 3)
        self.extra = nn.Parameter(torch.rand(8))
        self.how = how
        if how == "weight norm":
            nn.utils.parametrizations.weight_norm(self.first)
        elif how == "spectral norm":
            nn.utils.parametrizations.spectral_norm(self.second)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        if self.how == "clamp":
            y = torch.clamp(y, min=self.bound(x))
        elif self.how == "count":
            y = y * (1.0 / y.shape[1])
        elif self.how == "unpacked":
            _, n_channels, _, _ = y.shape
            y = y / n_channels
        elif self.how == "viewed":
            y = y + self.extra.view(1, -1, 1, 1)
        elif self.how == "by hand":
            y = y * self.second.weight.sum()
        y = self.second(input=y) if self.how == "keyword" else self.second(y)
        if self.how == "features":
            return self.head(y.mean((2, 3)) * self.extra)
        n, _c, h, w = y.shape  # reading the batch and the pixels is harmless
        return self.head(y.reshape(n, -1, h, w).mean((2, 3)) if self.how == "same" else
                         y.mean((2, 3)))  # fmt: skip


@pytest.mark.parametrize(
    ("how", "locked", "reason"),
    [
        ("affine", "first", "affine=False"),
        ("weight norm", "first", "computes its weight"),
        ("spectral norm", "first", "computes its weight"),
        ("clamp", "first", "clamp"),
        ("clamp", "bound", "clamp"),
        ("count", "first", "number of its channels is read"),
        ("unpacked", "first", "number of its channels is read"),
        ("by hand", "first", "reads second.weight itself"),
        ("by hand", "second", "reads second.weight itself"),
        ("keyword", "first", "second"),
        ("viewed", "first", "add"),
        ("features", "second", "mul"),
        ("plain", "first", ""),
        ("plain", "second", ""),
    ],
)
def test_careless_code_is_locked_and_not_broken(how: str, locked: str, reason: str) -> None:
    """What is still free after the locks must be right: pruned equals masked."""
    model = randomised(Careless(how).double())
    example = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    groups = channel_groups(model, example)
    # A layer whose weight is computed produces nothing that can be cut: it has no group.
    because = {g.name: g.locked_because for g in groups}.get(locked, "computes its weight")
    assert reason in (because or "")
    assert bool(because) == bool(reason)
    plan = random_plan(groups, np.random.default_rng(0))
    compact = remove_channels(model, groups, plan)
    with masked(model, groups, plan) as oracle, torch.no_grad():
        torch.testing.assert_close(compact(example), oracle(example))


def test_training_mode_is_refused() -> None:
    """A forward pass would change the statistics of the caller's model."""
    model = ConvNet()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GraphError, match=r"training mode; call \.eval\(\)"):
        channel_groups(model, torch.randn(1, 1, 8, 8))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_cost_has_the_closed_form() -> None:
    """k*k*Cin*Cout*H*W of a convolution and in*out of a linear layer, by hand."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    paper = cost(net, torch.randn(2, 3, 10, 10))
    assert paper.macs == 9 * 3 * 8 * 100 + 9 * 1 * 8 * 25 + 8 * 5
    assert paper.params == (9 * 3 * 8 + 8) + (9 * 8 + 8) + (8 * 5 + 5)
