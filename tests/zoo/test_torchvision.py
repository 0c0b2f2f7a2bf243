"""Real architectures: pruned == masked in float64, with random batch-norm statistics."""

import numpy as np
import pytest
import torch
import torchvision

from compressor.graph import channel_groups
from compressor.surgery import masked, remove_channels
from tests.conftest import random_plan, randomised

# name -> free groups; depthwise, squeeze-excite, flatten with pixels and residual sums are in it
ZOO = {"resnet18": 12, "mobilenet_v2": 25, "mobilenet_v3_small": 27, "alexnet": 7}


@pytest.mark.parametrize("name", ZOO)
def test_pruned_equals_masked(name: str) -> None:
    model = randomised(torchvision.models.get_model(name, num_classes=10).double())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # keep the scale of activations from layer to layer
                parameter.mul_(2 / parameter[0].numel() ** 0.5)
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    groups = channel_groups(model, image)
    assert sum(group.locked_because is None for group in groups) == ZOO[name]
    for seed in range(2):
        plan = random_plan(groups, np.random.default_rng(seed))
        compact = remove_channels(model, groups, plan)
        oracle = masked(model, groups, plan)
        with torch.no_grad():
            expected = oracle(image)
            assert expected.abs().max() > 1e-6  # not everything died on the way
            torch.testing.assert_close(compact(image), expected)
