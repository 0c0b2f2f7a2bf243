"""The clustering reproduces the labels that the paper's released code gives."""

from pathlib import Path

import numpy as np
import pytest
import torch

from compressor.search.clustering import (
    EU,
    FIXED_GRID,
    JS,
    cut,
    importance_tree,
    n_distinct,
    structure_tree,
)
from compressor.search.space import SearchSpace
from compressor.values import ChannelGroup, LayerCost

CHECKPOINT = Path(__file__).parents[3] / "shared" / "data" / "resnet56-cifar10-original.th"
REFERENCE = {
    (EU, 3): "0 1 1 2 1 0 2 0 1 1 2 2 1 1 2 2 1 2 0 2 0 1 1 2 2 1 1",
    (EU, 9): "1 2 4 6 4 0 8 0 4 2 7 6 3 3 7 6 3 7 0 6 0 3 3 7 6 4 5",
    (JS, 3): "0 2 0 1 0 0 2 0 0 0 2 1 2 2 2 2 2 2 0 1 0 1 1 1 1 0 1",
}


@pytest.mark.parametrize(("distance", "n_clusters"), REFERENCE)
def test_labels_of_the_released_code(distance: str, n_clusters: int) -> None:
    if not CHECKPOINT.is_file():
        pytest.skip("needs the public ResNet-56 checkpoint (benchmark data)")
    content = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)["state_dict"]
    importances = [
        content[f"module.layer{stage}.{block}.conv2.weight"].abs().sum((0, 2, 3)).double().numpy()
        for stage in (1, 2, 3)
        for block in range(9)
    ]
    tree = importance_tree(importances, grid=FIXED_GRID, distance=distance)
    assert " ".join(map(str, cut(tree, n_clusters))) == REFERENCE[distance, n_clusters]


@pytest.mark.parametrize("n_clusters", [3, 6, 9])
def test_by_structure_every_stage_is_a_cluster(n_clusters: int) -> None:
    """Layers of one stage are alike in everything, so that more clusters cannot be had."""
    sizes = [16] * 9 + [32] * 9 + [64] * 9
    groups = tuple(ChannelGroup(f"g{i}", n, ()) for i, n in enumerate(sizes))
    space = SearchSpace(groups, tuple(np.ones(n) for n in sizes), tuple((8, n) for n in sizes))
    layers = [
        LayerCost(
            f"l{i}", 9 * n * n * (1024 // n) ** 2, 9 * n * n, (n, n, 3, 3), ({}, {f"g{i}": 1.0})
        )
        for i, n in enumerate(sizes)
    ]
    labels = cut(structure_tree(space, layers), n_clusters)
    assert len(set(labels)) == 3
    assert all(len(set(labels[9 * s : 9 * s + 9])) == 1 for s in range(3))


def test_alike_maps_count_once() -> None:
    """Seven copies of one map and of another, each with a little noise, and four of their own."""
    generator = np.random.default_rng(0)
    base = generator.random((6, 64))
    copies = np.repeat(base[:2], 7, axis=0) + 0.001 * generator.random((14, 64))
    maps = np.concatenate([copies, generator.standard_normal((4, 64))])
    assert n_distinct(maps, 0.01) == 2 + 4
    assert n_distinct(maps, 1e-9) == len(maps)
    assert n_distinct(np.ones((8, 4)), 0.01) == 1


def test_groups_of_alike_spread_share_a_cluster() -> None:
    """Shifting by the median makes the level irrelevant: only the spread counts."""
    generator = np.random.default_rng(0)
    spreads = [1.0, 4.0, 1.0, 4.0, 1.0]
    importances = [10 * i + s * generator.standard_normal(200) for i, s in enumerate(spreads)]
    labels = cut(importance_tree(importances), 2)
    assert labels[0] == labels[2] == labels[4] != labels[1] == labels[3]


def test_fewer_clusters_than_asked_where_groups_are_identical() -> None:
    one, other = np.arange(16.0), 3 * np.arange(16.0)
    assert len(set(cut(importance_tree([one, one, other, other]), 3))) == 2


def test_constant_importances_do_not_break_the_density() -> None:
    labels = cut(importance_tree([np.ones(8), np.ones(8), np.arange(8.0)]), 2)
    assert labels[0] == labels[1] != labels[2]
