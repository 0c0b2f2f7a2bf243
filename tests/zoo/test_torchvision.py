"""torchvision's architectures: pruned equals masked, ONNX Runtime equals torch, template holds."""

import pytest

from benchmarks.zoo import AGREES, EXACT, LITTLE_PRUNED, ONNX_TOLERANCE, check
from benchmarks.zoo_names import CLASSIFICATION, DETECTION, SEGMENTATION, VIDEO

QUICK = (
    "resnet18", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x1_0", "mnasnet0_5",
    "regnet_y_400mf", "googlenet",
)  # fmt: skip
SLOW = [name for name in (*CLASSIFICATION, *SEGMENTATION) if name not in QUICK]


def slowly(names: list[str]) -> list[object]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", [*QUICK, *slowly(SLOW)])
def test_pruned_network_is_exact(name: str) -> None:
    row = check(f"torchvision:{name}", 64 if name in QUICK else None)
    assert row.faults == []
    assert row.error is not None
    assert row.error < EXACT
    assert row.onnx_error is not None
    assert row.onnx_error < ONNX_TOLERANCE
    assert row.form == "module"
    assert row.nni == AGREES
    assert row.params_kept_ratio < LITTLE_PRUNED


@pytest.mark.slow
@pytest.mark.parametrize("name", VIDEO)
def test_pruned_video_network_is_exact(name: str) -> None:
    row = check(f"torchvision:{name}")
    assert row.faults == []
    assert row.error is not None
    assert row.error < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTION)
def test_pruned_detection_network_finds_the_same(name: str) -> None:
    """Boxes, labels and scores of every proposal, behind sorting and suppression."""
    row = check(f"torchvision:{name}")
    assert row.faults == []
    assert row.error is not None
    assert row.error < EXACT
    assert row.params_kept_ratio < LITTLE_PRUNED
    assert row.nni == AGREES
