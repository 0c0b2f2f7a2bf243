"""Attention with biases by position, from tables and from layers, and places that are picked."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.prunable import Prunable, disagreement, make_prunable
from compressor.surgery import remove_channels
from compressor.values import Plan
from tests.conftest import random_plan, randomised

IMAGE = torch.randn(1, 3, 16, 16)


class Positioned(nn.Module):
    """Attention over 16 places with three heads, each with a bias for every pair of places."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.norm = nn.Conv2d(3, 24, 4, 4), nn.LayerNorm(24)
        self.all, self.out, self.head = nn.Linear(24, 72), nn.Linear(24, 24), nn.Linear(24, 5)
        at = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        apart = at[:, None] - at[None] + 3
        self.places = nn.Buffer(apart[..., 0] * 7 + apart[..., 1], persistent=False)
        if how in ("layers", "gated"):
            self.far = nn.Buffer(torch.randn(49, 2), persistent=False)
            self.wide, self.narrow = nn.Linear(2, 16), nn.Linear(16, 3)
        elif how == "by place":
            self.table = nn.Parameter(torch.randn(4, 49))
        else:
            self.table = nn.Parameter(torch.randn(49, 3))

    def biases(self) -> Tensor:
        """`(3, 16, 16)`."""
        if self.how == "by place":  # the dimension along heads is no dimension of the table
            chosen = self.table[torch.tensor([2, 0, 1])]
            return chosen[:, self.places.view(-1)].view(3, 16, 16)
        if self.how in ("layers", "gated"):
            table = self.narrow(F.relu(self.wide(self.far)))
        else:
            table = self.table
        rows = table[self.places.view(-1)]
        rows = rows.view(16, 16, 3 if self.how == "sizes" else -1)
        return rows.permute(2, 0, 1).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        b, n, _ = x.shape
        q, k, v = self.all(x).reshape(b, n, 3, -1, 8).permute(2, 0, 3, 1, 4).unbind(0)
        biases = self.biases().unsqueeze(0)
        if self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=biases, scale=0.3)
        elif self.how == "gated":
            y = ((q @ k.transpose(-2, -1)).softmax(-1) * torch.sigmoid(biases)) @ v
        else:
            y = (q @ k.transpose(-2, -1) + biases).softmax(-1) @ v
        return self.head((x + self.out(y.transpose(1, 2).flatten(2))).mean(1))


def proven(how: str) -> Prunable:
    prunable = make_prunable(randomised(Positioned(how).eval()), IMAGE)
    for seed in range(2):
        plan = random_plan(prunable.groups, np.random.default_rng(seed))
        assert disagreement(prunable, plan, IMAGE) is None
    return prunable


@pytest.mark.parametrize(
    ("how", "written"),
    [("rows", "table"), ("sizes", "table"), ("fused", "table"), ("layers", "narrow.weight"),
     ("gated", "narrow.weight")],
)  # fmt: skip
def test_heads_go_with_their_biases(how: str, written: str) -> None:
    prunable = proven(how)
    (heads,) = (g for g in prunable.groups if g.name.endswith("#heads"))
    assert heads.locked_because is None
    assert written in {where.key for where in heads.slices}
    plan = Plan({heads.name: (0, 2)})
    assert disagreement(prunable, plan, IMAGE) is None
    small = remove_channels(prunable.module, prunable.groups, plan)
    assert small.get_submodule("out").weight.shape == (24, 16)
    kept = small.get_parameter(written)
    whole = prunable.module.get_parameter(written)
    dim = 1 if written == "table" else 0
    assert torch.equal(kept, whole.index_select(dim, torch.tensor([0, 2])))


def test_a_layer_of_biases_goes_only_with_its_heads() -> None:
    groups = {g.name: g for g in proven("layers").groups}
    assert "whole head" in (groups["narrow"].locked_because or "")
    assert groups["wide"].locked_because is None


def test_heads_whose_biases_lie_along_no_dimension_of_a_table_stay() -> None:
    prunable = proven("by place")
    assert not [g for g in prunable.groups if g.name.endswith("#heads") and not g.locked_because]


class Picked(nn.Module):
    """Some pixels, or some channels, picked by number."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.last = nn.Conv2d(3, 12, 3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        at = torch.tensor([3, 1, 2])
        if self.how == "pixels":  # rows and columns lie side by side: (b, 12, 3)
            return self.last(x[:, :, at, at.flip(0)].sum(2))
        if self.how == "table":  # (b, 12, 2, 3, w)
            return self.last(x[:, :, torch.stack([at, at + 4])].amax((2, 3, 4)))
        if self.how == "apart":  # picked places come first: (3, 12, h)
            return self.last(x[at - at, :, :, at].amax(2))
        if self.how == "mask":
            return self.last(x[:, :, torch.eye(14, dtype=torch.bool)].sum(2))
        return self.last(x[:, torch.arange(11, -1, -1)].amax((2, 3)))


@pytest.mark.parametrize(
    ("how", "is_free"),
    [("pixels", True), ("table", True), ("apart", True), ("mask", False), ("channels", False)],
)
def test_what_is_picked_by_number_leaves_channels_apart(how: str, is_free: bool) -> None:
    prunable = make_prunable(randomised(Picked(how).eval()), IMAGE)
    first = next(g for g in prunable.groups if g.name == "first")
    assert (first.locked_because is None) is is_free
    for seed in range(2):
        plan = random_plan(prunable.groups, np.random.default_rng(seed))
        assert disagreement(prunable, plan, IMAGE) is None
