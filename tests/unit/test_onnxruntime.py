"""The real ONNX Runtime: real sessions, real errors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from compressor.errors import MeasurementError
from compressor.export import export_onnx
from compressor.latency.onnxruntime import compare_latency, open_session, predictor
from compressor.latency.targets import load_target
from compressor.latency.timing import Effort
from tests.conftest import ConvNet

QUICK = Effort(n_session_pairs=3, pair_seconds=0.05)


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


def test_a_network_of_eight_times_the_work_is_measured_as_slower(tmp_path: Path) -> None:
    """No figure is asserted, only the sign, at a distance noise does not reach."""
    example = torch.randn(1, 16, 32, 32)
    small = nn.Sequential(nn.Conv2d(16, 16, 3))
    large = nn.Sequential(*[nn.Conv2d(16, 16, 3) for _ in range(8)])
    original = export_onnx(large.eval(), example, tmp_path / "large.onnx")
    candidate = export_onnx(small.eval(), example, tmp_path / "small.onnx")
    pair = compare_latency(original, candidate, load_target("host-cpu"), effort=QUICK)
    assert pair.ci95[0] > 1.5
    assert pair.original.median_ms > pair.candidate.median_ms


def test_missing_provider_is_refused(exported: Path) -> None:
    """ONNX Runtime itself would run on the CPU and say nothing."""
    target = replace(load_target("host-cpu"), provider="CUDAExecutionProvider")
    with pytest.raises(MeasurementError, match="asks for CUDAExecutionProvider"):
        open_session(exported, target)


def test_broken_files_are_translated(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    target = load_target("host-cpu")
    for model in (broken, tmp_path / "missing.onnx", b"not a model"):
        with pytest.raises(MeasurementError, match="cannot load the model"):
            open_session(model, target)


def _one_node(op: str, shape: list[int | str], kind: int = TensorProto.FLOAT) -> bytes:
    node = helper.make_node(op, ["input"], ["output"])
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("input", kind, shape)],
        [helper.make_tensor_value_info("output", kind, shape)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    content: bytes = model.SerializeToString()
    return content


def test_dynamic_shapes_and_odd_types_are_refused() -> None:
    target = load_target("host-cpu")
    with pytest.raises(MeasurementError, match="static shape"):
        open_session(_one_node("Relu", ["batch", 3]), target)
    with pytest.raises(MeasurementError, match=r"tensor\(int64\)"):
        open_session(_one_node("Abs", [1, 3], TensorProto.INT64), target)


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
