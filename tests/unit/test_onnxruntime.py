"""The real ONNX Runtime in this process: a model's answers, and errors that are translated."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from compressor.errors import MeasurementError
from compressor.export import export_onnx
from compressor.latency.onnxruntime import predictor
from tests.conftest import ConvNet


@pytest.fixture
def exported(conv_net: ConvNet, example: Tensor, tmp_path: Path) -> Path:
    return export_onnx(conv_net, example, tmp_path / "net.onnx")


def test_predictions_are_those_of_torch(
    conv_net: ConvNet, exported: Path, example: Tensor
) -> None:
    with torch.no_grad():
        torch.testing.assert_close(
            predictor(exported, n_threads=1)(example), conv_net(example), rtol=1e-4, atol=1e-4
        )


def test_broken_files_are_translated(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    for model in (broken, tmp_path / "missing.onnx", b"not a model"):
        with pytest.raises(MeasurementError, match="cannot load the model"):
            predictor(model, n_threads=1)


def test_a_model_that_fails_while_it_runs_is_translated() -> None:
    node = helper.make_node("Gather", ["data", "index"], ["output"])
    graph = helper.make_graph(
        [helper.make_node("Cast", ["input"], ["index"], to=TensorProto.INT64), node], "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1])],
        [onnx.numpy_helper.from_array(np.ones(1, dtype=np.float32), "data")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    predict = predictor(model.SerializeToString(), n_threads=1)
    with pytest.raises(MeasurementError, match="cannot run the model"):
        predict(torch.tensor([7.0]))


def test_the_processor_is_left_as_it_was(exported: Path, example: Tensor) -> None:
    """ONNX Runtime can switch subnormal numbers off for all of the process that runs it."""
    predictor(exported, n_threads=1)(example)
    assert np.array([1e-40], dtype=np.float32) * np.float32(0.5) > 0
