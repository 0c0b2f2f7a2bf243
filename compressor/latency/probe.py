"""The staircase of a device: what each width costs there, and the step that follows from it.

A runtime pads channels to blocks, or leaves its fast path where they do not fit, so that a
narrower layer may take as long as a wider one. Where the edges lie depends on the device, the
runtime and the kind of layer, and is measured here with two layers of each kind, every width
beside the widest in the same rounds.
"""

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compressor.files import write_whole
from compressor.latency.device import Device
from compressor.latency.schema import PROBE_SCHEMA, probe_file
from compressor.latency.timing import Effort
from compressor.values import Progress, ProgressCallback, Staircase, Target

# Every multiple of 4 that some step rounds up to, and widths right beside the edges.
WIDTHS = (8, 12, 16, 20, 24, 28, 31, 32, 33, 36, 40, 44, 47, 48, 49, 52, 56, 60, 63, 64)
STEPS = (32, 16, 8, 4)  # the coarsest that fits is taken; 1 where none does
MIN_GAIN = 0.05  # share of time that a width between two edges saves if it is worth having
N_PIXELS = 28
CONV_3X3, CONV_1X1, DEPTHWISE = "conv 3x3", "conv 1x1", "depthwise 3x3"
DECISIVE = (CONV_3X3, CONV_1X1)  # a depthwise layer has the width of those around it
PROBING = "Probing the device"  # a phase
EFFORT = Effort(min_pairs=3, max_pairs=6, budget_s=0.8, half_width=0.015, pair_s=0.1)


def probe(
    device: Device,
    target: Target,
    on_progress: ProgressCallback = lambda _progress: None,
    *,
    effort: Effort = EFFORT,
) -> Staircase:
    """Measures every kind and width on the device.

    Raises:
        MeasurementError: The runtime cannot run one of the layers.
        DeviceError: The device is at fault.
    """
    costs: dict[str, dict[int, float]] = {}
    n_total = len(LAYERS) * len(WIDTHS)
    expected: dict[str, float] = {}
    began = perf_counter()
    for kind in LAYERS:
        widest = layers(kind, WIDTHS[-1], target)
        costs[kind] = {}
        for width in WIDTHS:
            n_done = sum(map(len, costs.values()))
            if n_done == 1:  # the others take about as long, whatever the runtime
                expected = {PROBING: (n_total - 1) * (perf_counter() - began)}
            note = f"{kind}, {width}"
            on_progress(Progress(PROBING, n_done, n_total, note, expected=expected))
            expected = {}
            pair = device.compare(widest, layers(kind, width, target), effort=effort, seed=width)
            costs[kind][width] = 1 / pair.ratio
    on_progress(Progress(PROBING, n_total, n_total))
    kinds = {kind: step_of(cost) for kind, cost in costs.items()}
    return Staircase(max(kinds[kind] for kind in DECISIVE), kinds, costs)


def step_of(costs: Mapping[int, float]) -> int:
    """The coarsest step for which no width between two multiples is worth having.

    It is worth having if it costs clearly less than the straight line between its neighbours on
    the step does. Widths below one step are left aside: runtimes take another path for layers
    that narrow.

    Args:
        costs: Width -> time. Widths whose two neighbours were not measured say nothing.

    Example:
        >>> step_of({8: 0.06, 12: 0.25, 16: 0.25, 24: 0.56, 28: 1.0, 32: 1.0})
        8
    """
    for step in STEPS:
        between = [(w, w // step * step) for w in costs if w % step]
        gains = [
            1 - costs[w] / (costs[low] + (w - low) / step * (costs[low + step] - costs[low]))
            for w, low in between
            if low in costs and low + step in costs
        ]
        if gains and max(gains) < MIN_GAIN:
            return step
    return 1


def save(staircase: Staircase, target: Target, described: Mapping[str, Any]) -> Path:
    """Keeps `staircase` for the target's device; `load_target` takes its step from then on."""
    path = probe_file(target.name, target.device, target.precision)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "schema": PROBE_SCHEMA,
        "target": target.name,
        "device": target.device,
        "model": described.get("model") or described.get("machine"),
        "runtime": f"{described.get('runtime')} {described.get('version')}",
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "step": staircase.step,
        "kinds": dict(staircase.kinds),
        "costs": {kind: dict(costs) for kind, costs in staircase.costs.items()},
    }
    return write_whole(path, json.dumps(content, indent=2) + "\n")


def layers(kind: str, n_channels: int, target: Target) -> bytes:
    """An ONNX file of two layers of `kind`, `n_channels` wide on both sides."""
    n_pixels, is_grouped = LAYERS[kind]
    generator = np.random.default_rng(n_channels)
    shape = (n_channels, 1 if is_grouped else n_channels, n_pixels, n_pixels)
    scale = np.sqrt(2 / np.prod(shape[1:]))
    nodes, tensors, source = [], [], "input"
    for i, output in enumerate(("middle", "output")):
        values = (scale * generator.standard_normal(shape)).astype(np.float32)
        tensors.append(numpy_helper.from_array(values, f"weight{i}"))
        nodes.append(
            helper.make_node(
                "Conv", [source, f"weight{i}"], [output], name=f"conv{i}",
                pads=[n_pixels // 2] * 4, group=n_channels if is_grouped else 1,
            )
        )  # fmt: skip
        source = output
    image = [1, n_channels, N_PIXELS, N_PIXELS]
    graph = helper.make_graph(
        nodes, kind.replace(" ", "_"),
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, image)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, image)],
        tensors,
    )  # fmt: skip
    opset = helper.make_opsetid("", target.opset)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=min(7, target.max_ir))
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


LAYERS: dict[str, tuple[int, bool]] = {  # side of the kernel, one group a channel
    CONV_3X3: (3, False),
    CONV_1X1: (1, False),
    DEPTHWISE: (3, True),
}
