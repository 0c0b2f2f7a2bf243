"""Networks as people write them: pruned equals masked, ONNX Runtime equals torch.

`pytest tests/zoo/test_own_networks.py -m "slow or not slow"` asks of all of them.
"""

import copy

import pytest
import torch

import compressor
from benchmarks.own_networks import NETWORKS
from benchmarks.zoo import EXACT, LITTLE_PRUNED, ONNX_TOLERANCE, build, check
from compressor.graph import outputs

QUICK = (
    "centernet", "image-and-table", "many-heads", "siamese", "gates-se", "ds-cnn", "tc-resnet",
    "edsr", "ecg",
)  # fmt: skip
# What keeps more than LITTLE_PRUNED, and why.
STIFF: dict[str, str] = {}
# Not right yet; whoever mends one takes it out, which its test asks for.
OPEN: dict[str, str] = {}


def marked(name: str) -> object:
    """Slow unless it is quick, and a failure wanted where it is open."""
    marks = [] if name in QUICK else [pytest.mark.slow]
    if name in OPEN:
        marks.append(pytest.mark.xfail(strict=True, reason=OPEN[name]))
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [marked(name) for name in NETWORKS])
def test_pruned_network_is_exact(name: str) -> None:
    row = check(f"own:{name}")
    assert row.faults == []
    assert row.error is not None
    assert row.error < EXACT
    assert row.onnx_error is not None
    assert row.onnx_error < ONNX_TOLERANCE
    assert (row.params_kept_ratio < LITTLE_PRUNED) == (name not in STIFF)


@pytest.mark.parametrize("name", ["image-and-table", "tc-resnet"])
def test_prune_takes_it_as_it_is(name: str) -> None:
    """By the public door; the original is untouched, and the answers have its containers."""
    model, example, _ = build(f"own:{name}")
    before = copy.deepcopy(model.state_dict())
    want = outputs(model, example)
    small = compressor.prune(model, example, 0.5)
    got = outputs(small, example)
    assert type(got) is type(want)
    assert got.shape == want.shape
    assert not torch.equal(got, want)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
