"""The contract of every importance strategy; a new one joins without a line of test code."""

import copy
from collections.abc import Iterator
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.graph import channel_groups
from compressor.importance import Importance, Random
from compressor.plugins import IMPORTANCES
from compressor.values import ChannelGroup, Role
from tests.conftest import ConvNet

BY_NAME = {name: cast(Importance, IMPORTANCES.load(name)) for name in IMPORTANCES}
every_importance = pytest.mark.parametrize("importance", BY_NAME.values(), ids=BY_NAME.keys())
every_criterion = pytest.mark.parametrize("name", sorted(BY_NAME.keys() - {"random"}))


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        labels = torch.randint(0, 5, (16,), generator=generator)
        yield torch.randn(16, 1, 8, 8, generator=generator), labels


def losses(network: nn.Module) -> Iterator[Tensor]:
    for images, labels in batches():
        yield F.cross_entropy(network(images), labels)


@every_importance
def test_one_finite_score_per_channel(
    importance: Importance, conv_net: ConvNet, example: Tensor
) -> None:
    groups = channel_groups(conv_net, example)
    scores = importance.scores(conv_net, groups, losses)
    assert list(scores) == [group.name for group in groups]
    for group in groups:
        assert scores[group.name].shape == (group.n_channels,)
        assert scores[group.name].dtype == torch.float64
        assert scores[group.name].isfinite().all()
        assert (scores[group.name] >= 0).all()
        alive = scores[group.name][scores[group.name] > 0]  # a dead ReLU has no gradient
        assert len(alive) >= group.n_channels / 2
        assert len(alive.unique()) == len(alive)  # no two channels of the fixture are alike


def with_channels_in_order(model: nn.Module, group: ChannelGroup, order: list[int]) -> nn.Module:
    """The same function of its input, with the channels of one group in another order."""
    shuffled = copy.deepcopy(model)
    with torch.no_grad():
        for where in group.slices:
            tensor = shuffled.state_dict()[where.key]
            old = tensor.clone().movedim(where.dim, 0)
            new = tensor.movedim(where.dim, 0)
            new[torch.from_numpy(where.index.ravel())] = old[
                torch.from_numpy(where.index[order].ravel())
            ]
    return shuffled


@every_criterion
@pytest.mark.parametrize("group_name", ["stem", "inner", "last"])
def test_a_channel_keeps_its_score_wherever_it_lies(
    name: str, group_name: str, example: Tensor
) -> None:
    """Scores belong to channels, not to positions; `last` is read behind a flatten."""
    model = ConvNet(use_flatten=True).eval()
    importance = BY_NAME[name]
    groups = channel_groups(model, example)
    group = next(g for g in groups if g.name == group_name)
    order = torch.randperm(group.n_channels, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = with_channels_in_order(model, group, order)
    with torch.no_grad():
        torch.testing.assert_close(shuffled(example), model(example))
    before = importance.scores(model, groups, losses)[group_name]
    after = importance.scores(shuffled, groups, losses)[group_name]
    torch.testing.assert_close(after, before[order], rtol=1e-4, atol=1e-7)


@every_importance
def test_scoring_changes_nothing_and_repeats(
    importance: Importance, conv_net: ConvNet, example: Tensor
) -> None:
    before = copy.deepcopy(conv_net.state_dict())
    groups = channel_groups(conv_net, example)
    first = importance.scores(conv_net, groups, losses)
    second = importance.scores(conv_net, groups, losses)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[k], v) for k, v in conv_net.state_dict().items())
    assert not conv_net.training
    assert all(p.grad is None for p in conv_net.parameters())


def test_l1_is_the_norm_of_the_readers(conv_net: ConvNet, example: Tensor) -> None:
    """[fan2022]: sum of |w| over outputs and taps per input channel, over all readers."""
    groups = channel_groups(conv_net, example)
    readers = (conv_net.inner.weight, conv_net.last.weight)
    expected = sum(w.detach().double().abs().sum((0, 2, 3)) for w in readers)
    torch.testing.assert_close(BY_NAME["l1"].scores(conv_net, groups, None)["stem"], expected)


def test_geometric_median_is_the_sum_of_distances(conv_net: ConvNet, example: Tensor) -> None:
    """[he2019, eq. 7], pair by pair; two producers that a sum ties are one vector."""
    groups = channel_groups(conv_net, example)
    producers = (conv_net.stem.weight, conv_net.outer.weight)
    vectors = torch.cat([w.detach().double().flatten(1) for w in producers], dim=1)
    expected = [sum((a - b).norm().item() for b in vectors) for a in vectors]
    scores = BY_NAME["geometric-median"].scores(conv_net, groups, None)["stem"]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64))


def test_bn_scale_is_gamma_and_l1_without_one(conv_net: ConvNet, example: Tensor) -> None:
    groups = channel_groups(conv_net, example)
    scores = BY_NAME["bn-scale"].scores(conv_net, groups, None)
    torch.testing.assert_close(scores["inner"], conv_net.inner_norm.weight.detach().double().abs())
    assert torch.equal(scores["hidden"], BY_NAME["l1"].scores(conv_net, groups, None)["hidden"])


def test_taylor_is_the_slope_of_the_loss(conv_net: ConvNet, example: Tensor) -> None:
    """Shrinking all that writes a channel by a factor 1-e changes the loss by e times the root."""
    model = copy.deepcopy(conv_net).double()
    groups = channel_groups(model, example.double())
    group = next(g for g in groups if g.name == "inner")
    images, labels = next(iter(batches()))

    def one_loss(network: nn.Module) -> Iterator[Tensor]:
        yield F.cross_entropy(network(images.double()), labels)

    scores = BY_NAME["taylor"].scores(model, groups, one_loss)["inner"]
    for channel in (0, 7, 40):
        around = []
        for factor in (1 + 1e-5, 1 - 1e-5):
            shrunk = copy.deepcopy(model)
            for where in group.slices:
                if where.role is not Role.CONSUMER and "running" not in where.tensor:
                    tensor = shrunk.state_dict()[where.key]
                    tensor.movedim(where.dim, 0)[torch.from_numpy(where.index[channel])] *= factor
            with torch.no_grad():
                around.append(F.cross_entropy(shrunk(images.double()), labels).item())
        slope = (around[0] - around[1]) / 2e-5
        assert scores[channel].item() == pytest.approx(slope**2, rel=1e-3)


def test_taylor_without_images_says_so(conv_net: ConvNet, example: Tensor) -> None:
    with pytest.raises(ConfigError, match="taylor looks at gradients; give it labelled images"):
        BY_NAME["taylor"].scores(conv_net, channel_groups(conv_net, example), None)


def test_cpmc_weighs_weights_macs_and_parameters(conv_net: ConvNet, example: Tensor) -> None:
    """By hand for the stem: two producers and two readers, 64 pixels each."""
    groups = channel_groups(conv_net, example)
    scores = BY_NAME["cpmc"].scores(conv_net, groups, None)
    named = {g.name: g for g in groups}
    macs = {n: g.cost.macs / g.n_channels for n, g in named.items()}
    params = {n: g.cost.params / g.n_channels for n, g in named.items()}
    weights = [
        conv_net.stem.weight.flatten(1),
        conv_net.outer.weight.flatten(1),
        conv_net.inner.weight.transpose(0, 1).flatten(1),
        conv_net.last.weight.transpose(0, 1).flatten(1),
    ]
    mean = torch.cat([w.detach().double().abs() for w in weights], dim=1).mean(dim=1)
    rest = scores["stem"] - 0.3 * (1 - macs["stem"] / max(macs.values()))
    rest = rest - 0.3 * (1 - params["stem"] / max(params.values()))
    ratio = rest / mean  # 1 / the largest weight score of the network, for every channel
    torch.testing.assert_close(ratio, ratio[:1].expand(len(ratio)))


def test_random_differs_from_seed_to_seed(conv_net: ConvNet, example: Tensor) -> None:
    groups = channel_groups(conv_net, example)
    one, other = (Random(seed=seed).scores(conv_net, groups, None) for seed in (0, 1))
    assert not torch.equal(one["stem"], other["stem"])
