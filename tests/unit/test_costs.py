"""Costs on paper against counted ones, and the latency table against a network of known times."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from compressor.graph import cost
from compressor.graph.costs import layer_costs
from compressor.prunable import make_prunable, with_branches
from compressor.search.costs import Costs, LatencyTable
from compressor.search.space import SearchSpace, design, make_space
from tests.conftest import make_conv_net

NETS = ("resnet18", "mobilenet_v2", "densenet121", "shufflenet_v2_x1_0", "resnext50_32x4d")


def spaced(net: nn.Module, example: torch.Tensor) -> tuple[Costs, SearchSpace, nn.Module]:
    prunable = with_branches(make_prunable(net, example), example)
    scores = {g.name: np.random.default_rng(0).random(g.n_channels) for g in prunable.groups}
    space = make_space(
        prunable.groups, scores, step=4, min_keep_ratio=0.1, branches=prunable.branches
    )
    return Costs(space, layer_costs(prunable.module, prunable.groups)), space, net


@pytest.mark.parametrize("name", NETS[:1])
def test_paper_costs_are_those_of_the_pruned_network(name: str) -> None:
    check_costs(getattr(torchvision.models, name)(weights=None).eval(), torch.randn(1, 3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS[1:])
def test_so_are_they_of_larger_networks(name: str) -> None:
    check_costs(getattr(torchvision.models, name)(weights=None).eval(), torch.randn(1, 3, 64, 64))


def test_so_are_they_of_a_small_one() -> None:
    check_costs(make_conv_net().eval(), torch.randn(1, 1, 8, 8))


def check_costs(net: nn.Module, example: torch.Tensor) -> None:
    prunable = with_branches(make_prunable(net, example), example)
    costs, space, _ = spaced(net, example)
    whole = cost(net, example)
    assert costs.macs_of_layers.sum() == whole.macs
    assert costs.params_of_layers.sum() == whole.params
    for widths in design(space, seed=1)[:4]:
        counted = cost(prunable.without(space.plan(widths)), example)
        assert counted.macs == pytest.approx(whole.macs * float(costs.macs([widths])[0]), rel=1e-6)
        assert counted.params == pytest.approx(
            whole.params * float(costs.params([widths])[0]), rel=1e-6
        )
    assert costs.macs([space.original])[0] == pytest.approx(1)


def test_heads_and_their_channels_multiply() -> None:
    """Two groups that cross in a tensor: half of one and a third of the other leave a sixth."""
    layer = nn.TransformerEncoderLayer(24, 3, 16, batch_first=True)
    net, example = nn.Sequential(nn.Linear(5, 24), layer).eval(), torch.randn(1, 7, 5)
    prunable = make_prunable(net, example)
    scores = {g.name: np.arange(float(g.n_channels)) for g in prunable.groups}
    space = make_space(prunable.groups, scores, step=1, min_keep_ratio=0.1)
    costs = Costs(space, layer_costs(prunable.module, prunable.groups))
    plans = design(space, seed=0)[:4]
    whole = sum(p.numel() for p in net.parameters())
    for plan, share in zip(plans, costs.params(plans), strict=True):
        small = prunable.without(space.plan(plan))
        assert sum(p.numel() for p in small.parameters()) == pytest.approx(share * whole)


def test_the_table_finds_what_layers_really_cost() -> None:
    """Times that MACs do not tell, with 0.5 % of noise: new plans within 3 %."""
    costs, space, _ = spaced(
        torchvision.models.resnet18(weights=None).eval(), torch.randn(1, 3, 64, 64)
    )
    generator = np.random.default_rng(0)
    busy = costs.macs_of_layers > 0
    alike = {m: generator.uniform(0.4, 2.5) for m in sorted(set(costs.macs_of_layers))}
    own = np.array([alike[m] * m for m in costs.macs_of_layers])
    own *= 0.85 / own.sum()

    def times(plans: list[tuple[int, ...]]) -> np.ndarray:
        return 0.15 + costs.layers_left(plans) @ own

    seen = design(space, seed=0)
    noisy = times(seen) * np.exp(0.005 * generator.standard_normal(len(seen)))
    table = LatencyTable(costs, seen, noisy, np.full(len(seen), 0.01))
    new = design(space, seed=99)
    assert np.abs(np.log(table.times(new) / times(new))).max() < 0.1
    assert np.median(np.abs(np.log(table.times(new) / times(new)))) < 0.03
    by_macs = 0.1 + 0.9 * costs.macs(new)
    assert np.abs(np.log(by_macs / times(new))).max() > 0.15  # what a table of MACs would miss
    assert table.times([space.original])[0] == pytest.approx(1, abs=0.01)
    assert table.share_of_layers[busy].sum() == pytest.approx(0.85, abs=0.1)
