"""masked == compact, for any plan; and the input is never touched."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor.errors import PlanError
from compressor.graph import channel_groups
from compressor.surgery import masked, remove_channels
from compressor.values import Plan
from tests.conftest import INPUT_SHAPE, ConvNet, random_plan, randomised


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 9), use_flatten=st.booleans())
def test_removing_equals_cutting_the_wires_that_read(
    seed: int, width: int, use_flatten: bool
) -> None:
    """In float64, so that a wrong channel cannot hide in rounding."""
    model = randomised(ConvNet(width, use_flatten=use_flatten).double(), seed)
    images = torch.randn(3, *INPUT_SHAPE, dtype=torch.float64)
    groups = channel_groups(model, images[:1])
    plan = random_plan(groups, np.random.default_rng(seed))
    before = copy.deepcopy(model.state_dict())

    compact = remove_channels(model, groups, plan)
    oracle = masked(model, groups, plan)
    with torch.no_grad():
        torch.testing.assert_close(compact(images), oracle(images))

    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for group in groups:
        for where in group.slices:
            is_whole_dim = where.index.size == before[where.key].shape[where.dim]
            if is_whole_dim:
                expected = plan.width(group) * where.index.shape[1]
                assert compact.state_dict()[where.key].shape[where.dim] == expected


def test_the_masked_oracle_really_cuts(conv_net: ConvNet, example: Tensor) -> None:
    """An oracle that changes nothing would agree with everything."""
    groups = channel_groups(conv_net, example)
    plan = Plan({"last": tuple(range(8))})
    with torch.no_grad():
        whole = conv_net(example)
        oracle = masked(conv_net, groups, plan)
        if True:
            assert (oracle(example) - whole).abs().max() > 1e-2
        torch.testing.assert_close(conv_net(example), whole)  # the hooks are gone


def test_zeroed_filters_are_not_the_oracle(conv_net: ConvNet, example: Tensor) -> None:
    """Batch-norm turns a zeroed channel into a constant: why readers are cut instead."""
    groups = channel_groups(conv_net, example)
    plan = Plan({"inner": tuple(range(10))})
    compact = remove_channels(conv_net, groups, plan)
    zeroed = copy.deepcopy(conv_net)
    with torch.no_grad():
        zeroed.inner.weight[10:] = 0
        assert (zeroed(example) - compact(example)).abs().max() > 1e-2


def test_attributes_dtype_and_flags_survive(conv_net: ConvNet, example: Tensor) -> None:
    model = copy.deepcopy(conv_net).double()
    model.stem.weight.requires_grad_(False)
    groups = channel_groups(model, example.double())
    plan = Plan({"stem": (0, 2, 4), "inner": tuple(range(7)), "last": (1,), "hidden": (0, 9)})
    compact = remove_channels(model, groups, plan)
    assert isinstance(compact, ConvNet)
    assert (compact.stem.out_channels, compact.norm.num_features) == (3, 3)
    assert (compact.inner.in_channels, compact.inner.out_channels) == (3, 7)
    assert (compact.depthwise.groups, compact.depthwise.in_channels) == (7, 7)
    assert (compact.hidden.in_features, compact.hidden.out_features) == (1, 2)
    assert compact.head.in_features == 2
    assert compact.stem.weight.dtype == torch.float64
    assert not compact.stem.weight.requires_grad
    assert compact.inner.weight.requires_grad
    assert not compact.training


def test_memory_format_stays(conv_net: ConvNet, example: Tensor) -> None:
    last = torch.channels_last
    model = copy.deepcopy(conv_net).to(memory_format=last)
    groups = channel_groups(model, example)
    compact = remove_channels(model, groups, Plan({"stem": (0, 2, 4), "inner": (1, 2, 3, 9)}))
    assert compact.get_parameter("inner.weight").is_contiguous(memory_format=last)
    assert not compact.get_parameter("inner.weight").is_contiguous()
    plain = remove_channels(conv_net, groups, Plan({"stem": (0, 2, 4), "inner": (1, 2, 3, 9)}))
    assert plain.get_parameter("inner.weight").is_contiguous()
    with torch.no_grad():
        torch.testing.assert_close(compact(example), plain(example))


def test_hooks_and_training_flags_stay(conv_net: ConvNet, example: Tensor) -> None:
    model = copy.deepcopy(conv_net)
    seen = []
    model.inner.register_forward_hook(lambda _module, _args, out: seen.append(out.shape[1]))
    groups = channel_groups(model, example)
    model.norm.train()
    compact = remove_channels(model, groups, Plan({"inner": (1, 2, 3, 9)}))
    assert [m.training for m in compact.modules()] == [m.training for m in model.modules()]
    seen.clear()
    compact(example)
    assert seen == [4]


def test_half_precision_stays(conv_net: ConvNet, example: Tensor) -> None:
    model = copy.deepcopy(conv_net).to(torch.bfloat16)
    groups = channel_groups(model, example.to(torch.bfloat16))
    compact = remove_channels(model, groups, Plan({"inner": (1, 2, 3, 9)}))
    assert {p.dtype for p in compact.parameters()} == {torch.bfloat16}
    assert compact(example.to(torch.bfloat16)).isfinite().all()


class OneChannel(nn.Module):
    """A convolution of one channel is not depthwise, and a group of one cannot get smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(1, 1, 3)
        self.widen = nn.Conv2d(1, 8, 3)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.widen(self.squeeze(x))).mean((2, 3))


def test_a_convolution_of_one_channel_is_not_depthwise(example: Tensor) -> None:
    model = randomised(OneChannel())
    groups = channel_groups(model, example)
    assert [(g.name, g.n_channels) for g in groups] == [("squeeze", 1), ("widen", 8), ("head", 3)]
    plan = Plan({"squeeze": (0,), "widen": (1, 6)})
    compact = remove_channels(model, groups, plan)
    with torch.no_grad():
        torch.testing.assert_close(compact(example), masked(model, groups, plan)(example))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"sten": (0,)}, "Unknown channel group 'sten'. Did you mean 'stem'"),
        ({"stem": ()}, "keeps no channel of stem"),
        ({"stem": (0.5,)}, "must list whole numbers"),
        ({"stem": (0, 0)}, "lists channels of stem twice"),
        ({"stem": (0, 32)}, r"must lie in 0\.\.31"),
        ({"stem": (-1, 3)}, r"must lie in 0\.\.31"),
        ({"head": (0,)}, "head cannot be pruned: its channels are the model's output"),
    ],
)
def test_bad_plans_are_refused(
    conv_net: ConvNet, example: Tensor, kept: dict[str, tuple[Any, ...]], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        remove_channels(conv_net, channel_groups(conv_net, example), Plan(kept))


class TiedDepthwise(nn.Module):
    """Two depthwise convolutions with one weight: both lose the same groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 1)
        self.one = nn.Conv2d(8, 8, 3, groups=8)
        self.other = nn.Conv2d(8, 8, 3, groups=8)
        self.other.weight = self.one.weight
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other(torch.relu(self.one(self.first(x))))).mean((2, 3))


def test_tied_depthwise_convolutions_lose_the_same_groups(example: Tensor) -> None:
    model = randomised(TiedDepthwise())
    groups = channel_groups(model, example)
    plan = Plan({"first": (1, 4, 6)})
    compact = remove_channels(model, groups, plan)
    assert isinstance(compact, TiedDepthwise)
    assert compact.one.groups == compact.other.groups == 3
    assert compact.one.weight is compact.other.weight
    with torch.no_grad():
        torch.testing.assert_close(compact(example), masked(model, groups, plan)(example))
