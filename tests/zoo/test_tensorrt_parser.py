"""NVIDIA's parser reads what we export for TensorRT; see benchmarks/results/zoo-tensorrt.md."""

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks.zoo_names import DETECTION, TIMM
from benchmarks.zoo_tensorrt import SOURCES, check, file_faults, in_own_process, refusal
from compressor.latency.tensorrt_runner import TensorRT

QUICK = (
    "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "mnasnet0_5",
)  # fmt: skip
KNOWN = {  # refused for want of these; see benchmarks/results/zoo-tensorrt.md
    **dict.fromkeys((f"torchvision:{name}" for name in DETECTION), "NonZero"),
    **dict.fromkeys((f"timm:{name}" for name in TIMM if "nfnet" in name), "BatchNormalization"),
    "timm:resnetv2_50x1_bit": "BatchNormalization",
}
EVERY = [name for names in SOURCES.values() for name in names]


@pytest.fixture(scope="module")
def backend() -> TensorRT:
    trt: Any = pytest.importorskip(
        "tensorrt_rtx_bindings",
        reason="pip install tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs",
        exc_type=ImportError,
    )
    return TensorRT(trt)


@pytest.mark.parametrize("name", QUICK)
def test_a_network_and_its_half_are_read(name: str, backend: TensorRT) -> None:
    row = check(f"torchvision:{name}", backend, 64)
    assert row.refused == {}
    assert row.faults == []
    assert row.not_exported == {}
    assert row.opset == 13
    assert row.ir <= 7
    assert row.n_nodes > 20


@pytest.mark.slow
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", EVERY)
def test_whatever_is_exported_is_read(name: str) -> None:
    row = in_own_process(name, 280)
    assert row.faults == []
    assert row.opset in (13, 17)
    assert bool(row.refused) == (name in KNOWN)
    assert all(KNOWN[name] in words for words in row.refused.values())


# The judges themselves: they must be able to say no.


def file_of(op: str, *, opset: int = 13, ir: int = 7) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 3)) for n in "xy")
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], name="odd one")], "g", [x], [y])
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir)


def test_the_parser_refuses_an_unknown_operation(backend: TensorRT, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(file_of("Relu"), path)
    assert refusal(backend, path) == ""
    onnx.save(file_of("Frobnicate"), path)
    assert refusal(backend, path).startswith("node 0 'odd one' (Frobnicate): ")


def test_what_a_file_is_not_is_told() -> None:
    assert file_faults(file_of("Relu"), 13, 7) == []
    assert file_faults(file_of("Relu", ir=8), 13, None) == []
    assert file_faults(file_of("Relu", opset=14, ir=8), 13, 7) == [
        "opsets are {'': 14}; expected only 13",
        "IR version is 8; expected at most 7",
    ]
    outside = file_of("Relu")
    tensor = helper.make_tensor("w", TensorProto.FLOAT, (1,), [0.0])
    tensor.data_location = TensorProto.EXTERNAL
    outside.graph.initializer.append(tensor)
    assert file_faults(outside, 13, 7) == ["w lies in another file"]
