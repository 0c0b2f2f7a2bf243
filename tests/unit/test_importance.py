"""The contract of every importance strategy; a new one joins without a line of test code."""

import copy

import pytest
import torch
from torch import Tensor

from compressor.graph import channel_groups
from compressor.importance import IMPORTANCES, Importance, WeightNorm
from compressor.surgery import remove_channels
from compressor.values import Plan
from tests.conftest import ConvNet

every_importance = pytest.mark.parametrize(
    "importance", IMPORTANCES.values(), ids=IMPORTANCES.keys()
)


@every_importance
def test_one_finite_score_per_channel(
    importance: Importance, conv_net: ConvNet, example: Tensor
) -> None:
    for group in channel_groups(conv_net, example):
        scores = importance.score(conv_net, group)
        assert scores.shape == (group.n_channels,)
        assert scores.dtype == torch.float64
        assert scores.isfinite().all()
        assert (scores >= 0).all()
        assert len(scores.unique()) == group.n_channels  # no two channels of the fixture alike


@every_importance
def test_score_belongs_to_its_channel(
    importance: Importance, conv_net: ConvNet, example: Tensor
) -> None:
    """After surgery, a kept channel has the score it had, where its readers stayed whole."""
    groups = channel_groups(conv_net, example)
    kept = (1, 5, 6, 30)
    compact = remove_channels(conv_net, groups, Plan({"inner": kept}))
    before = next(g for g in groups if g.name == "inner")
    after = next(g for g in channel_groups(compact, example) if g.name == "inner")
    torch.testing.assert_close(
        importance.score(compact, after), importance.score(conv_net, before)[list(kept)]
    )


@every_importance
def test_scoring_changes_nothing(
    importance: Importance, conv_net: ConvNet, example: Tensor
) -> None:
    before = copy.deepcopy(conv_net.state_dict())
    for group in channel_groups(conv_net, example):
        importance.score(conv_net, group)
    assert all(torch.equal(before[k], v) for k, v in conv_net.state_dict().items())


def test_l1_is_the_norm_of_the_readers(conv_net: ConvNet, example: Tensor) -> None:
    """[fan2022]: sum of |w| over outputs and taps per input channel, over all readers."""
    stem = channel_groups(conv_net, example)[0]
    readers = (conv_net.inner.weight, conv_net.last.weight)
    expected = sum(w.detach().double().abs().sum((0, 2, 3)) for w in readers)
    torch.testing.assert_close(WeightNorm(p=1).score(conv_net, stem), expected)
