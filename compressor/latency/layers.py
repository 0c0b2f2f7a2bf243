"""What each layer of a network takes, of what a runtime says of the nodes that it made of them.

ONNX Runtime fuses a convolution with what follows, lays tensors out in blocks, and calls the
result after the last tensor that it makes. TensorRT calls what it fused after all of its nodes:
`/conv1/Conv + PWN(/relu/Relu)`. Here each is led back to the layer it came from.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from compressor.latency.device import Device
from compressor.latency.estimate import CONVOLUTIONS, PRODUCTS, macs_by_node
from compressor.values import KernelTime, LayerRow

BLOCKED = "_nchwc"  # what ONNX Runtime appends where channels lie in blocks
FUSED = "fused "  # and what it puts before
BETWEEN = "between layers"
REFORMAT = "Reformatting CopyNode"  # TensorRT's change of layout, named after what reads it
JOINTS = re.compile(r" \+ |, |PWN\(|[()]|\{ForeignNode\[|\.\.\.|\]\}")  # of names it puts together


@dataclass(frozen=True)
class Profiled:
    """An exported network as a runtime runs it.

    Attributes:
        onnx: The file's content.
        kernels: What its nodes take; none where nothing tells.
        layers: Names of its convolutions and linear layers in the order they run in; without
            them layers are called as the exporter calls them.
    """

    onnx: bytes
    kernels: Sequence[KernelTime]
    layers: Sequence[str] = ()


def profiled(device: Device, file: Path, layers: Sequence[str]) -> Profiled:
    """The ONNX file as the device runs it; see `Profiled` for `layers`.

    Raises:
        MeasurementError: The model is at fault.
        DeviceError: The device is.
    """
    content = file.read_bytes()
    return Profiled(content, device.profile(content), layers)


def layer_rows(original: Profiled, compressed: Profiled) -> tuple[LayerRow, ...]:
    """Every layer of the original, in the order it runs in; empty where nothing was told.

    Args:
        original: Before.
        compressed: After. Layers of one name are the same layer.

    Raises:
        MeasurementError: See `macs_by_node`.
    """
    before, after = _layers(original), _layers(compressed)
    if not before or not after:
        return ()
    return tuple(
        LayerRow(
            name=name, kind=kind, original_ms=ms, original_macs=macs,
            compressed_ms=after[name][1] if name in after else None,
            compressed_macs=after[name][2] if name in after else 0,
        )
        for name, (kind, ms, macs) in {**_absent(after, before), **before}.items()
    )  # fmt: skip


_Layer = tuple[str, float, int]  # kind, milliseconds, MACs


def _absent(after: Mapping[str, _Layer], before: Mapping[str, _Layer]) -> dict[str, _Layer]:
    """What only the compressed network has, such as a change of layout."""
    return {name: (kind, 0.0, 0) for name, (kind, _, _) in after.items() if name not in before}


def _layers(model: Profiled) -> dict[str, _Layer]:
    if not model.kernels:
        return {}
    macs = macs_by_node(model.onnx)
    graph = onnx.load_from_string(model.onnx).graph
    weighted = [node.name for node in graph.node if _has_weights(node)]
    are_known = len(weighted) == len(model.layers)
    called = dict(zip(weighted, model.layers, strict=True)) if are_known else {}
    makers = {output: node for node in graph.node for output in node.output}
    named = {node.name: node for node in graph.node}
    found: dict[str, _Layer] = {}
    for kernel in model.kernels:
        nodes = _nodes_of(kernel, named, makers)
        kind = kernel.kind or " + ".join(node.op_type for node in nodes) or REFORMAT
        node = next(filter(_has_weights, nodes), next(iter(nodes), None))
        layer = _with_weights(node, makers) if node is not None else None
        if node is not None and layer is not None and _multiplies(kind):
            name = called.get(layer.name) or module_of(layer)
            n_macs = macs[layer.output[0]]
        else:
            name, n_macs = (module_of(node) if node is not None else f"{BETWEEN} ({kind})"), 0
        kind, ms, known = found.get(name, (kind, 0.0, 0))
        found[name] = kind, ms + kernel.ms, known + n_macs
    return found


def _nodes_of(
    kernel: KernelTime, named: Mapping[str, onnx.NodeProto], makers: Mapping[str, onnx.NodeProto]
) -> list[onnx.NodeProto]:
    """The nodes that a runtime made a kernel of, as far as its name tells."""
    label = kernel.name.removesuffix(BLOCKED).removeprefix(FUSED)
    whole = named.get(label) or makers.get(label)
    if whole is not None:
        return [whole]
    if label.startswith(REFORMAT):
        return []
    return [named[part] for part in JOINTS.split(label) if part in named]


def _multiplies(kind: str) -> bool:
    return any(each in kind for each in CONVOLUTIONS + PRODUCTS)


def _has_weights(node: onnx.NodeProto) -> bool:
    return node.op_type in CONVOLUTIONS + PRODUCTS


def _with_weights(
    node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]
) -> onnx.NodeProto | None:
    """The nearest convolution or product that `node` is computed from; itself, if it is one."""
    seen = [node]
    while seen:
        current = seen.pop(0)
        if _has_weights(current):
            return current
        seen += [makers[name] for name in current.input if name in makers]
    return None


def module_of(node: onnx.NodeProto) -> str:
    """The module that a node was exported from.

    Example:
        >>> module_of(onnx.helper.make_node("Conv", [], [], name="/layer1/layer1.0/conv1/Conv"))
        'layer1.0.conv1'
    """
    path: list[str] = []
    for part in node.name.split("/")[1:-1]:
        if path and part.startswith(f"{path[-1]}."):
            path.pop()
        path.append(part)
    return ".".join(path) or node.name or node.op_type
