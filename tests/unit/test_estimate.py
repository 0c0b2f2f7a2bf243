"""Estimated latency: closed forms, the staircase, and the figure reported for a Jetson Nano."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from compressor.errors import ConfigError, MeasurementError
from compressor.export import export_onnx
from compressor.latency.estimate import (
    BANDWIDTH_EFFICIENCY,
    COMPUTE_EFFICIENCY,
    CPU_START_MS,
    ERROR_FACTOR,
    GPU_START_MS,
    estimate_ms,
    estimate_pair,
)
from compressor.latency.targets import load_target
from compressor.template import make_template
from compressor.values import Basis, Figure, Roofline, Target

NEVER = 1e30  # operations or bytes a second: that side of the roofline does not count


def target(
    *, ops_per_s: float = 1e9, bytes_per_s: float = 1e9, step: int = 8, on_gpu: bool = False
) -> Target:
    return Target(
        name="made-up",
        description="round figures",
        runtime="trtexec" if on_gpu else "onnxruntime",
        provider="" if on_gpu else "CPUExecutionProvider",
        n_threads=1,
        precision="fp16",
        step=step,
        step_source="made up",
        opset=13,
        max_opset=13,
        max_ir=8,
        roofline=Roofline(
            Figure(ops_per_s, "computed", "made up"), Figure(bytes_per_s, "computed", "made up"), 2
        ),
    )


def onnx_bytes(
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, tuple[int, ...]],
    shape: Sequence[int | str],
    result: str,
) -> bytes:
    """A model from "x" of `shape` to `result`, all weights zero."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.zeros(s, np.float32), n) for n, s in weights.items()],
    )
    opset = [helper.make_opsetid("", 13)]
    content: bytes = helper.make_model(
        graph, opset_imports=opset, ir_version=8
    ).SerializeToString()
    return content


def conv(
    c_in: int, c_out: int, *, size: int = 10, kernel: int = 3, group: int = 1, relu: bool = False
) -> bytes:
    """One convolution without bias on a `size` x `size` image, which keeps its size."""
    pads = [kernel // 2] * 4
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], pads=pads, group=group)]
    if relu:
        nodes.append(helper.make_node("Relu", ["y"], ["z"]))
    weights = {"w": (c_out, c_in // group, kernel, kernel)}
    return onnx_bytes(nodes, weights, [1, c_in, size, size], "z" if relu else "y")


def compute_ms(n_macs: int) -> float:
    return 1e3 * 2 * n_macs / (1e9 * COMPUTE_EFFICIENCY)


def memory_ms(n_numbers: int) -> float:
    return 1e3 * 2 * n_numbers / (1e9 * BANDWIDTH_EFFICIENCY)


def test_a_compute_bound_convolution_takes_its_arithmetic() -> None:
    """10 x 10 places, 16 filters of 8 x 3 x 3."""
    ms = estimate_ms(conv(8, 16), target(bytes_per_s=NEVER))
    assert ms == pytest.approx(compute_ms(100 * 16 * 72))


def test_a_memory_bound_convolution_takes_its_bytes() -> None:
    """8 channels read, 16 written, 16 x 72 weights, two bytes each."""
    ms = estimate_ms(conv(8, 16), target(ops_per_s=NEVER))
    assert ms == pytest.approx(memory_ms(800 + 1600 + 16 * 72))


def test_the_longer_of_the_two_counts() -> None:
    both = estimate_ms(conv(8, 16), target())
    assert both == max(
        estimate_ms(conv(8, 16), target(bytes_per_s=NEVER)),
        estimate_ms(conv(8, 16), target(ops_per_s=NEVER)),
    )


def test_a_linear_layer_in_closed_form() -> None:
    gemm = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    model = onnx_bytes([gemm], {"w": (24, 40)}, [1, 40], "y")
    assert estimate_ms(model, target(bytes_per_s=NEVER)) == pytest.approx(compute_ms(24 * 40))
    moved = 40 + 24 * 40 + 24
    assert estimate_ms(model, target(ops_per_s=NEVER)) == pytest.approx(memory_ms(moved))


def test_a_matrix_product_of_several_matrices_in_closed_form() -> None:
    matmul = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = onnx_bytes([matmul], {"w": (16, 24)}, [2, 5, 16], "y")
    assert estimate_ms(model, target(bytes_per_s=NEVER)) == pytest.approx(
        compute_ms(2 * 5 * 16 * 24)
    )


def test_a_transposed_convolution_in_closed_form() -> None:
    """Every pixel of the input is spread over its filter: 10 x 10 x 8 x 16 x 2 x 2."""
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])
    model = onnx_bytes([node], {"w": (8, 16, 2, 2)}, [1, 8, 10, 10], "y")
    assert estimate_ms(model, target(bytes_per_s=NEVER)) == pytest.approx(
        compute_ms(100 * 8 * 16 * 4)
    )


@pytest.mark.parametrize("side", [{"bytes_per_s": NEVER}, {"ops_per_s": NEVER}])
def test_one_channel_above_a_step_costs_as_the_next_step(side: dict[str, float]) -> None:
    for step in (8, 16):
        device = target(**side, step=step)  # type: ignore[arg-type]
        widths = [step, step + 1, 2 * step, 2 * step + 1]
        out_ms = [estimate_ms(conv(step, n), device) for n in widths]
        in_ms = [estimate_ms(conv(n, step), device) for n in widths]
        for ms in (out_ms, in_ms):
            assert ms[0] < ms[1] == ms[2] < ms[3]


def test_a_depthwise_filter_reads_one_channel() -> None:
    """Its input side is not padded: 16 channels of 9 multiply-accumulates a place."""
    device = target(bytes_per_s=NEVER)
    assert estimate_ms(conv(16, 16, group=16), device) == pytest.approx(compute_ms(100 * 16 * 9))
    assert estimate_ms(conv(9, 9, group=9), device) == estimate_ms(conv(16, 16, group=16), device)


def test_what_follows_a_convolution_is_computed_inside_it() -> None:
    assert estimate_ms(conv(8, 16, relu=True), target()) == estimate_ms(conv(8, 16), target())


def test_a_residual_sum_is_computed_inside_the_convolution_before_it() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4),
        helper.make_node("Add", ["y", "x"], ["z"]),
        helper.make_node("Relu", ["z"], ["out"]),
    ]
    model = onnx_bytes(nodes, {"w": (8, 8, 3, 3)}, [1, 8, 10, 10], "out")
    assert estimate_ms(model, target()) == estimate_ms(conv(8, 8), target())


def test_what_stands_alone_takes_its_bytes() -> None:
    pool = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2])
    model = onnx_bytes([pool], {}, [1, 8, 10, 10], "y")
    assert estimate_ms(model, target()) == pytest.approx(memory_ms(800 + 200))
    relu = onnx_bytes([helper.make_node("Relu", ["x"], ["y"])], {}, [1, 8, 10, 10], "y")
    assert estimate_ms(relu, target()) == pytest.approx(memory_ms(800 + 800))


@pytest.mark.parametrize(("on_gpu", "start_ms"), [(True, GPU_START_MS), (False, CPU_START_MS)])
def test_no_node_takes_less_than_its_start(on_gpu: bool, start_ms: float) -> None:
    device = target(ops_per_s=NEVER, bytes_per_s=NEVER, on_gpu=on_gpu)
    assert estimate_ms(conv(8, 8), device) == start_ms


def test_resnet18_on_a_jetson_nano_is_about_what_was_reported(tmp_path: Path) -> None:
    """90 frames a second, FP16 (NVIDIA-AI-IOT/torch2trt#255)."""
    model = torchvision.models.resnet18().eval()
    content = export_onnx(model, torch.randn(1, 3, 224, 224), tmp_path / "m.onnx").read_bytes()
    ms = estimate_ms(content, load_target("jetson-nano", estimate=True))
    assert 1000 / 90 / ERROR_FACTOR < ms < 1000 / 90 * ERROR_FACTOR


def test_a_filled_template_takes_what_the_exported_file_takes(
    conv_net: nn.Module, example: Tensor, tmp_path: Path
) -> None:
    """The template keeps its batch-norms, which any runtime folds away."""
    filled = make_template(conv_net, example).fill(conv_net)
    exported = export_onnx(conv_net, example, tmp_path / "net.onnx").read_bytes()
    assert estimate_ms(filled, target()) == estimate_ms(exported, target())


def test_sizes_that_the_graph_computes_are_followed(tmp_path: Path) -> None:
    """The exporter writes a split of the channels as arithmetic on shapes."""

    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.chunk(2, dim=1)[1])

    model = export_onnx(Halved().eval(), torch.randn(1, 16, 10, 10), tmp_path / "m.onnx")
    ms = estimate_ms(model.read_bytes(), target(bytes_per_s=NEVER))
    assert ms == pytest.approx(compute_ms(100 * 16 * 72) + CPU_START_MS)


def test_a_pair_is_labelled_and_as_wide_as_the_error() -> None:
    pair = estimate_pair(conv(16, 32), conv(16, 16), target())
    assert pair.ratio == pair.original.median_ms / pair.candidate.median_ms > 1
    assert pair.ci95 == (pair.ratio / ERROR_FACTOR, pair.ratio * ERROR_FACTOR)
    assert pair.basis is Basis.ESTIMATE
    assert (pair.original.n, pair.candidate.n, pair.session_pairs) == (0, 0, ())
    assert pair.original.median_ms == pair.original.p90_ms


def test_a_dynamic_shape_is_refused_with_what_to_do() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="stem")
    model = onnx_bytes([node], {"w": (8, 8, 3, 3)}, ["batch", 8, 10, 10], "y")
    with pytest.raises(MeasurementError, match=r"'stem' \(Conv\).*Export with static shapes"):
        estimate_ms(model, target())


def test_work_that_shapes_do_not_tell_is_refused() -> None:
    node = helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=4, name="memory")
    weights = {"w": (1, 16, 8), "r": (1, 16, 4)}
    with pytest.raises(MeasurementError, match=r"'memory' \(LSTM\).*without --estimate"):
        estimate_ms(onnx_bytes([node], weights, [5, 1, 8], "y"), target())


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(MeasurementError, match="Not a model"):
        estimate_ms(b"no model", target())
    clash = onnx_bytes([helper.make_node("Add", ["x", "w"], ["y"])], {"w": (9, 9)}, [1, 8], "y")
    with pytest.raises(MeasurementError):
        estimate_ms(clash, target())


def test_a_model_that_does_nothing_is_refused() -> None:
    with pytest.raises(MeasurementError, match="no node that takes time"):
        estimate_ms(
            onnx_bytes([helper.make_node("Identity", ["x"], ["y"])], {}, [1], "y"), target()
        )


def test_without_figures_there_is_no_estimate() -> None:
    with pytest.raises(ConfigError, match="made-up has no figures"):
        estimate_ms(conv(8, 8), replace(target(), roofline=None))


SIZES = {"c_in": 40, "c_out": 40, "size": 12, "kernel": 5}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), grown=st.sampled_from(sorted(SIZES)), on_gpu=st.booleans())
def test_bigger_is_never_faster(data: st.DataObject, grown: str, on_gpu: bool) -> None:
    """Whichever side of the roofline binds, and wherever between two steps a width lies."""
    drawn = {name: data.draw(st.integers(1, top), label=name) for name, top in SIZES.items()}
    drawn["kernel"] = drawn["kernel"] // 2 * 2 + 1  # odd, so that the image keeps its size
    more = drawn | {grown: drawn[grown] + 2 * data.draw(st.integers(0, 8))}
    balance = data.draw(st.floats(1e-3, 1e3))
    device = target(
        bytes_per_s=1e9 * balance, step=data.draw(st.sampled_from([1, 4, 8, 16])), on_gpu=on_gpu
    )
    assert estimate_ms(conv(**drawn), device) <= estimate_ms(conv(**more), device)  # type: ignore[arg-type]
