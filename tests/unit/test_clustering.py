"""The clustering reproduces the labels that the paper's released code gives."""

from pathlib import Path

import numpy as np
import pytest
import torch

from compressor.search.clustering import FIXED_GRID, cut, importance_tree

CHECKPOINT = Path(__file__).parents[3] / "shared" / "data" / "resnet56-cifar10-original.th"
REFERENCE = {
    3: "0 1 1 2 1 0 2 0 1 1 2 2 1 1 2 2 1 2 0 2 0 1 1 2 2 1 1",
    9: "1 2 4 6 4 0 8 0 4 2 7 6 3 3 7 6 3 7 0 6 0 3 3 7 6 4 5",
}


@pytest.mark.parametrize("n_clusters", [3, 9])
def test_labels_of_the_released_code(n_clusters: int) -> None:
    if not CHECKPOINT.is_file():
        pytest.skip("needs the public ResNet-56 checkpoint (benchmark data)")
    content = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)["state_dict"]
    importances = [
        content[f"module.layer{stage}.{block}.conv2.weight"].abs().sum((0, 2, 3)).double().numpy()
        for stage in (1, 2, 3)
        for block in range(9)
    ]
    labels = cut(importance_tree(importances, grid=FIXED_GRID), n_clusters)
    assert " ".join(map(str, labels)) == REFERENCE[n_clusters]


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
