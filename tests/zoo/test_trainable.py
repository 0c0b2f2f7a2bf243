"""Whatever residual branches are left out, what is left can be trained: one backward pass each."""

import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import fx, nn

from benchmarks.zoo import build
from compressor.containers import tensors_in
from compressor.errors import GraphError
from compressor.graph import channel_groups
from compressor.graph.branches import residual_branches
from compressor.prunable import PROGRAM, TRACED, in_form
from compressor.running import learning
from compressor.surgery import remove_branches
from compressor.values import Branch

N_SUBSETS = 6  # at random, beside each branch alone and all of them
QUICK = ("torchvision:resnet18", "timm:test_resnet", "timm:test_convnext", "timm:test_vit")
SLOW = (
    "torchvision:resnet50", "torchvision:resnext50_32x4d", "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_large", "torchvision:mnasnet1_0", "torchvision:efficientnet_b0",
    "torchvision:efficientnet_v2_s", "torchvision:regnet_x_400mf", "torchvision:regnet_y_400mf",
    "torchvision:convnext_tiny", "torchvision:swin_t", "torchvision:vit_b_16",
    "torchvision:maxvit_t", "timm:resnet26d", "timm:resnetv2_50", "timm:res2net50_26w_4s",
    "timm:seresnet18", "timm:cs3darknet_s", "timm:darknet53", "timm:mobilenetv3_small_100",
    "timm:mobilenetv4_conv_small", "timm:efficientnet_lite0", "timm:tf_efficientnetv2_b0",
    "timm:fbnetc_100", "timm:hardcorenas_a", "timm:ghostnet_100", "timm:regnetz_005",
    "timm:convnext_atto", "timm:poolformer_s12", "timm:fastvit_t8", "timm:repvit_m0_9",
    "timm:mobilevit_xxs", "timm:hgnetv2_b0", "timm:nfnet_l0",
)  # fmt: skip
WITHOUT = ("torchvision:densenet121",)  # concatenates; has no branch that could be left out


def graph_of(name: str, n_pixels: int | None) -> tuple[fx.GraphModule, torch.Tensor]:
    net, example, _ = build(name, n_pixels)
    assert isinstance(example, torch.Tensor)
    for form in (TRACED, PROGRAM):
        try:
            return in_form(net, form, example), torch.cat([example, example.flip(-1)])
        except GraphError:
            continue
    raise AssertionError(f"{name} has no graph")


def subsets(branches: Sequence[Branch]) -> Iterator[Sequence[Branch]]:
    """Each alone, all of them, and some at random."""
    rng = random.Random(0)
    yield from ([branch] for branch in branches)
    yield branches
    for _ in range(N_SUBSETS):
        yield [branch for branch in branches if rng.random() < 0.5]


def backward_fault(network: nn.Module, images: torch.Tensor) -> str | None:
    """What is wrong with one backward pass, in the mode in which networks learn."""
    network.requires_grad_(True)
    for module in learning(network, images):
        module.training = True
    try:
        sum(t.square().mean() for t in tensors_in(network(images.clone()))).backward()  # type: ignore[union-attr]
    except RuntimeError as err:
        return str(err)
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    if not gradients or not all(g.isfinite().all() for g in gradients):
        return "gradients are missing or not finite"
    return None


def faults_of(name: str, n_pixels: int | None) -> tuple[int, int, dict[str, str]]:
    """Branches, networks that were trained for a step, and what went wrong in which."""
    network, images = graph_of(name, n_pixels)
    branches = residual_branches(network, images[:1], channel_groups(network, images[:1]))
    faults, n_tried = {}, 0
    for left_out in subsets(branches):
        fault = backward_fault(remove_branches(network, left_out), images)
        n_tried += 1
        if fault is not None:
            faults[", ".join(branch.name for branch in left_out)] = fault
    return len(branches), n_tried, faults


@pytest.mark.parametrize("name", QUICK)
def test_what_is_left_can_be_trained(name: str) -> None:
    n_branches, n_tried, faults = faults_of(name, 32)
    assert not faults
    assert n_branches >= 3
    assert n_tried == n_branches + 1 + N_SUBSETS


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SLOW, *WITHOUT])
def test_what_is_left_of_any_network_can_be_trained(name: str) -> None:
    n_branches, _, faults = faults_of(name, None)
    assert not faults
    assert (n_branches > 0) == (name not in WITHOUT)
