"""ONNX files whose tensors lie beside them: read as ONNX Runtime reads them, from their folder."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from compressor.errors import MeasurementError
from compressor.export import export_onnx
from compressor.latency import machine
from compressor.latency.machine import content_of

IMAGES = torch.rand(1, 3, 8, 8)


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """The same network in one file (one.onnx) and in two (two/model.onnx)."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    one = export_onnx(network, IMAGES, tmp_path / "one.onnx")
    (tmp_path / "two").mkdir()
    path = tmp_path / "two" / "model.onnx"
    onnx.save(
        onnx.load(one), path, save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    return path


def answers(content: bytes) -> np.ndarray:
    session = onnxruntime.InferenceSession(content)
    return np.asarray(session.run(None, {"input": IMAGES.numpy()})[0])


def test_tensors_beside_the_file_are_read(split: Path) -> None:
    one = (split.parents[1] / "one.onnx").read_bytes()
    assert len(split.read_bytes()) < len(one)
    np.testing.assert_array_equal(answers(content_of(split)), answers(one))


@pytest.mark.bad_input("an ONNX file whose tensors cannot be read")
@pytest.mark.parametrize("fault", ["missing", "outside", "linked", "short"])
def test_files_elsewhere_are_not_read(split: Path, fault: str) -> None:
    weights = split.parent / "weights.bin"
    if fault == "short":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        weights.rename(split.parents[1] / "weights.bin")
    if fault == "linked":
        weights.symlink_to(split.parents[1] / "weights.bin")
    if fault == "outside":
        model = onnx.load(split, load_external_data=False)
        for tensor in model.graph.initializer:
            tensor.external_data[0].value = "../weights.bin"
        split.write_bytes(model.SerializeToString())
    with pytest.raises(MeasurementError, match="cannot be read"):
        content_of(split)


@pytest.mark.bad_input("an ONNX file that is too large with its tensors")
def test_what_is_too_large_for_one_file_is_refused(
    split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "MAX_ONNX_BYTES", len(split.read_bytes()) + 10)
    with pytest.raises(MeasurementError, match=r"weights\.bin have 0\.0 GiB"):
        content_of(split)
