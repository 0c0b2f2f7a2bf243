"""Hints: which layers are chosen, and that the loss is what it says."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.graph import channel_groups
from compressor.hints import Read, choose_hints, hint_loss, keep
from compressor.surgery import kept_positions, remove_channels
from compressor.training import Recipe, fine_tune
from compressor.values import LabelledImages, Plan
from compressor.watching import watched
from tests.conftest import ConvNet


@pytest.fixture
def pruned(
    conv_net: ConvNet, example: Tensor
) -> tuple[nn.Module, dict[tuple[str, int], np.ndarray]]:
    groups = channel_groups(conv_net, example)
    plan = Plan({"stem": tuple(range(0, 32, 2)), "inner": tuple(range(5, 20))})
    return remove_channels(conv_net, groups, plan), kept_positions(conv_net, groups, plan)


def test_the_last_layer_of_each_size_is_chosen(
    conv_net: ConvNet, example: Tensor, pruned: tuple[nn.Module, dict[tuple[str, int], np.ndarray]]
) -> None:
    """`stem` alone reads maps as large as the image, but that is the image itself."""
    network, kept = pruned
    hints = choose_hints(conv_net, network, kept, example)
    assert list(hints) == ["last", "head"]
    assert hints["last"] is not None
    assert hints["last"].tolist() == list(range(0, 32, 2))
    assert hints["head"] is None


def test_layers_that_are_gone_give_no_hints(conv_net: ConvNet, example: Tensor) -> None:
    without = copy.deepcopy(conv_net)
    without.head = nn.Identity()  # type: ignore[assignment]
    assert list(choose_hints(conv_net, without, {}, example)) == ["last", "hidden"]


def test_the_loss_is_the_distance_of_the_channels_that_are_left(
    conv_net: ConvNet, example: Tensor, pruned: tuple[nn.Module, dict[tuple[str, int], np.ndarray]]
) -> None:
    """Against the same figures taken by hand; and an unpruned copy is at no distance."""
    network, kept = pruned
    hints = choose_hints(conv_net, network, kept, example)
    images = torch.rand(4, *example.shape[1:])
    read: Read = {}
    wanted: Read = {}
    with watched(network, hints, keep(read)), watched(conv_net, hints, keep(wanted)):
        network(images)
        conv_net(images)
    channels = wanted["last"][:, ::2]
    by_hand = ((read["last"] - channels) ** 2).mean() / channels.var()
    by_hand = by_hand + ((read["head"] - wanted["head"]) ** 2).mean() / wanted["head"].var()
    assert hint_loss(network, hints, read, wanted).item() == pytest.approx(by_hand.item() / 2)
    assert by_hand > 0.01
    assert hint_loss(conv_net, dict.fromkeys(hints), wanted, wanted).item() == 0
    assert not any(module._forward_hooks for module in network.modules())


def test_tokens_are_indexed_by_their_last_dimension() -> None:
    """A linear layer reads channels last, whatever stands before them."""
    layer = nn.Sequential(nn.Linear(3, 2))
    hints = {"0": torch.tensor([0, 2, 5])}
    tokens = torch.rand(2, 7, 6)
    assert hint_loss(layer, hints, {"0": tokens[..., [0, 2, 5]]}, {"0": tokens}).item() == 0


def test_hints_are_learned_and_leave_no_hook(
    conv_net: ConvNet, example: Tensor, pruned: tuple[nn.Module, dict[tuple[str, int], np.ndarray]]
) -> None:
    """Without the original's answers; what comes back is watched by nobody."""
    network, kept = pruned
    hints = choose_hints(conv_net, network, kept, example)
    images = torch.rand(64, *example.shape[1:])
    data = LabelledImages(images, torch.zeros(64, dtype=torch.long))

    def nearness(model: nn.Module) -> float:
        read: Read = {}
        wanted: Read = {}
        with watched(model, hints, keep(read)), torch.no_grad():
            model(images)
        with watched(conv_net, hints, keep(wanted)), torch.no_grad():
            conv_net(images)
        return -hint_loss(model, hints, read, wanted).item()

    tuned = fine_tune(
        network, data, Recipe(60, 0.01, batch_size=16, hints=10.0), teacher=conv_net, hints=hints,
        score=nearness, on_progress=lambda _progress: None,
    )  # fmt: skip
    assert nearness(tuned.model) > 0.5 * nearness(network)  # both are below 0
    for model in (tuned.model, network, conv_net):
        assert not any(module._forward_hooks for module in model.modules())
