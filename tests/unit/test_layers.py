"""Nodes of the real ONNX Runtime, led back to the layers of the network that was exported."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor.errors import MeasurementError
from compressor.export import export_onnx
from compressor.graph.costs import ran
from compressor.latency.device import open_device
from compressor.latency.layers import Profiled, layer_rows
from compressor.latency.targets import load_target
from compressor.values import KernelTime, LayerRow
from tests.conftest import ConvNet, randomised


class Residual(nn.Module):
    """Names in two levels, a sum after which the convolution's node is called, a pooling."""

    def __init__(self, *, has_branch: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.blocks = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1) for _ in range(2)])
        self.has_branch = has_branch
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        if self.has_branch:
            x = torch.relu(x + self.blocks[1](torch.relu(self.blocks[0](x))))
        return self.head(nn.functional.max_pool2d(x, 2).mean((2, 3)))


def rows_of(
    original: nn.Module, compressed: nn.Module, example: Tensor, folder: Path
) -> dict[str, LayerRow]:
    files = []
    for name, network in (("a", original), ("b", compressed)):
        file = export_onnx(network, example, folder / f"{name}.onnx", opset=13)
        files.append(file.read_bytes())
    with open_device(load_target("host-cpu")) as device:
        before, after = (Profiled(content, device.profile(content)) for content in files)
    return {row["name"]: row for row in layer_rows(before, after)}


def test_layers_are_called_as_in_the_network(
    conv_net: ConvNet, example: Tensor, tmp_path: Path
) -> None:
    """Their MACs add up to those that torch counts."""
    small = compressor.prune(conv_net, example, 0.5)
    rows = rows_of(conv_net, small, example, tmp_path)
    layers = {n for n, m in conv_net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert layers <= set(rows)
    for network, key in ((conv_net, "original_macs"), (small, "compressed_macs")):
        counted = compressor.cost(network, example).macs
        assert sum(row[key] for row in rows.values()) == counted  # type: ignore[literal-required]
    assert all(row["original_ms"] > 0 for name, row in rows.items() if name in layers)
    assert all((row["compressed_ms"] or 0) > 0 for name, row in rows.items() if name in layers)


def test_a_branch_that_is_gone_takes_no_time(tmp_path: Path) -> None:
    example = torch.randn(1, 3, 16, 16)
    whole, without = Residual(), Residual(has_branch=False)
    without.load_state_dict(whole.state_dict())
    rows = rows_of(randomised(whole), randomised(without), example, tmp_path)
    assert {"stem.0", "blocks.0", "blocks.1", "head"} <= set(rows)
    assert rows["blocks.0"]["compressed_ms"] is None
    assert rows["blocks.1"]["compressed_macs"] == 0
    assert rows["stem.0"]["compressed_macs"] == rows["stem.0"]["original_macs"] == 16 * 27 * 256


def test_traced_networks_keep_their_names(
    conv_net: ConvNet, example: Tensor, tmp_path: Path
) -> None:
    """The exporter calls `blocks.0.conv1` of a graph module `conv1`, and the next `conv1_1`."""
    net = nn.Sequential(randomised(Residual()), nn.Linear(4, 2)).eval()
    image = torch.randn(1, 3, 16, 16)
    graph = torch.fx.symbolic_trace(net)
    assert ran(graph, image) == ["0.stem.0", "0.blocks.0", "0.blocks.1", "0.head", "1"]
    content = export_onnx(graph, image, tmp_path / "a.onnx", opset=13).read_bytes()
    with open_device(load_target("host-cpu")) as device:
        model = Profiled(content, device.profile(content), ran(graph, image))
    assert set(ran(graph, image)) <= {row["name"] for row in layer_rows(model, model)}


def test_nothing_is_told_where_nothing_was_measured(
    conv_net: ConvNet, example: Tensor, tmp_path: Path
) -> None:
    content = export_onnx(conv_net, example, tmp_path / "a.onnx").read_bytes()
    with open_device(load_target("raspberry-pi-4", estimate=True)) as device:
        assert device.profile(content) == ()
    assert layer_rows(Profiled(content, ()), Profiled(content, ())) == ()


def test_nodes_that_nobody_knows_lie_between_layers(
    conv_net: ConvNet, example: Tensor, tmp_path: Path
) -> None:
    content = export_onnx(conv_net, example, tmp_path / "a.onnx").read_bytes()
    kernels = (KernelTime("Cast_7", "Cast", 0.1), KernelTime("Cast_8", "Cast", 0.2))
    (row,) = layer_rows(Profiled(content, kernels), Profiled(content, kernels[:1]))
    assert (row["name"], row["original_macs"]) == ("between layers (Cast)", 0)
    assert row["original_ms"] == pytest.approx(0.3)
    assert row["compressed_ms"] == pytest.approx(0.1)
    with pytest.raises(MeasurementError):
        layer_rows(Profiled(b"no model", kernels), Profiled(content, kernels))
