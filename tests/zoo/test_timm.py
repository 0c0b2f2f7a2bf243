"""timm's architectures, as in test_torchvision.py."""

import pytest

from benchmarks.zoo import AGREES, EXACT, LITTLE_PRUNED, ONNX_TOLERANCE, check
from benchmarks.zoo_names import FAMILIES, TIMM

pytest.importorskip("timm")

# Name -> form; `split_with_sizes` in its code needs a program.
QUICK = {
    "test_resnet": "module", "test_byobnet": "module", "test_efficientnet": "module",
    "lcnet_050": "module", "cs3darknet_s": "program",
}  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_pruned_network_is_exact(name: str) -> None:
    row = check(f"timm:{name}", 64)
    assert row.faults == []
    assert row.error is not None
    assert row.error < EXACT
    assert row.onnx_error is not None
    assert row.onnx_error < ONNX_TOLERANCE
    assert row.form == QUICK[name]
    assert row.nni == AGREES
    assert row.params_kept_ratio < LITTLE_PRUNED


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in (*TIMM, *FAMILIES) if name not in QUICK])
def test_whatever_is_pruned_is_exact(name: str) -> None:
    """How much is free differs from network to network; see benchmarks/results/zoo-timm.md."""
    row = check(f"timm:{name}")
    assert row.faults == []
    assert row.error is not None
    assert row.error < EXACT
    assert row.nni == AGREES
