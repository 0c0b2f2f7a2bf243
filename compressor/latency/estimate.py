"""Latency of an ONNX model as the roofline of its target has it, for `--estimate`.

A node takes the longer of two times: its arithmetic at the device's peak, and its bytes at the
memory's bandwidth [williams2009]. Both peaks are out of reach in practice, so each is multiplied
by an efficiency; the times of the nodes add up. What comes out says which of two models is faster
and by about how much; it is no measurement, and is never ranked together with one.

Legend: `c_in`, `c_out` channels, `k` length of a dot product, `n` columns. A number is one weight
or activation.

Differences from the paper: channels are rounded up to the target's step, as runtimes pad them, so
that removing one channel of 64 gains nothing; a node takes at least the time to start a kernel;
and what runtimes compute inside the layer before it takes no time.

[williams2009] Williams, Waterman, Patterson: Roofline: an insightful visual performance model for
multicore architectures. Communications of the ACM 52(4), 2009.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx
import onnxruntime
from google.protobuf.message import DecodeError

from compressor.errors import ConfigError, MeasurementError
from compressor.latency.onnxruntime import CPU, ORT_ERRORS
from compressor.scratch import Scratch
from compressor.values import Basis, Latency, PairedLatency, Roofline, Target

# Share of the peak that whole networks reach: reported are 69 % (ResNet-18, Jetson Nano, FP16)
# and 32 % (ResNet-50, Xavier NX, INT8); HPL reaches 41-46 % on a Raspberry Pi. Not fitted to any.
COMPUTE_EFFICIENCY = 0.45
BANDWIDTH_EFFICIENCY = 0.7  # middle of the usual 0.6-0.8
# Between those reports and the efficiency above lies a factor of 1.5, and half of the figures in
# the profiles are computed: an estimate may be wrong by twice, either way.
ERROR_FACTOR = 2.0

GPU_START_MS = 0.007  # one kernel, 5-10 us: unverified
CPU_START_MS = 0.002  # one node of ONNX Runtime: unverified
CPU_PROVIDERS = ("CPUExecutionProvider", "XnnpackExecutionProvider", "OpenVINOExecutionProvider")

CONVOLUTIONS = ("Conv", "ConvTranspose")
PRODUCTS = ("Gemm", "MatMul")
# Computed inside the convolution or product before them, or inside one another.
FUSED = (
    "Add", "BatchNormalization", "Clip", "Elu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mul",
    "PRelu", "Relu", "Sigmoid", "Tanh",
)  # fmt: skip
# Another view of the same memory, or gone once a model is loaded.
FREE = ("Constant", "Dropout", "Flatten", "Identity", "Reshape", "Shape", "Squeeze", "Unsqueeze")
# Arithmetic that the sizes of inputs and outputs do not tell.
UNKNOWN = ("Attention", "Einsum", "GRU", "If", "LSTM", "Loop", "RNN", "Scan")


@dataclass(frozen=True)
class _Graph:
    """A model's nodes and the shape of all they read and write."""

    nodes: tuple[onnx.NodeProto, ...]
    shapes: Mapping[str, tuple[int, ...]]
    weights: frozenset[str]
    unknown: tuple[str, ...]  # nodes whose work cannot be told, in words
    step: int

    def up(self, n_channels: int) -> int:
        """Channels as they are padded."""
        return -(-n_channels // self.step) * self.step

    def volume(self, name: str) -> int:
        """Numbers of a tensor as it lies in memory: channels of activations are padded."""
        shape = self.shapes[name]
        if len(shape) < 2 or name in self.weights:
            return math.prod(shape)
        return shape[0] * self.up(shape[1]) * math.prod(shape[2:])


def estimate_ms(model: bytes, target: Target) -> float:
    """Milliseconds of one inference of `model` on `target`, good to about `ERROR_FACTOR`.

    Args:
        model: Content of an ONNX file whose inputs have static shapes.
        target: A profile with a roofline.

    Raises:
        ConfigError: The profile has no figures to estimate from.
        MeasurementError: The model cannot be read, has a shape that is not known, or a node
            whose work cannot be told from shapes.
    """
    roofline = target.roofline
    if roofline is None:
        raise ConfigError(
            f"Profile {target.name} has no figures to estimate from; measure on the device."
        )
    graph = _read(model, target.step)
    with _fitting():
        works = _works(graph)
    on_cpu = target.provider in CPU_PROVIDERS
    start_ms = CPU_START_MS if on_cpu else GPU_START_MS
    total_ms = sum(max(start_ms, _ms(*work, roofline)) for work in works)
    if total_ms == 0:
        raise MeasurementError("The model has no node that takes time; there is nothing to do.")
    return total_ms


def estimate_pair(original: bytes, candidate: bytes, target: Target) -> PairedLatency:
    """Both models estimated; the interval is what `ERROR_FACTOR` leaves open, not statistics.

    Args:
        original: As `estimate_ms` takes it.
        candidate: The same for the other model.
        target: A profile with a roofline.

    Raises:
        ConfigError: See `estimate_ms`.
        MeasurementError: See `estimate_ms`.
    """
    original_ms, candidate_ms = estimate_ms(original, target), estimate_ms(candidate, target)
    ratio = original_ms / candidate_ms
    return PairedLatency(
        ratio=ratio,
        ci95=(ratio / ERROR_FACTOR, ratio * ERROR_FACTOR),
        original=Latency(median_ms=original_ms, p90_ms=original_ms, n=0),
        candidate=Latency(median_ms=candidate_ms, p90_ms=candidate_ms, n=0),
        session_pairs=(),
        basis=Basis.ESTIMATE,
    )


def _ms(n_macs: int, n_moved: int, roofline: Roofline) -> float:
    compute_s = 2 * n_macs / (roofline.ops_per_s.value * COMPUTE_EFFICIENCY)
    n_bytes = n_moved * roofline.bytes_per_number
    return 1e3 * max(compute_s, n_bytes / (roofline.bytes_per_s.value * BANDWIDTH_EFFICIENCY))


def _read(content: bytes, step: int) -> _Graph:
    try:
        model = onnx.load_from_string(content)
        weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        _drop_large_weights(model.graph)
        graph = _inferred(model, weights, step)
        if graph.unknown:  # sizes that the graph computes: ONNX Runtime computes them
            graph = _inferred(_constants_folded(model), weights, step)
    except (DecodeError, onnx.shape_inference.InferenceError, ValueError, *ORT_ERRORS) as err:
        raise MeasurementError(f"Not a model whose shapes can be inferred: {err}") from err
    if graph.unknown:
        raise MeasurementError(
            f"The time of {graph.unknown[0]} cannot be told from shapes. Export with static "
            f"shapes, or measure on the device, without --estimate."
        )
    return graph


def _drop_large_weights(graph: onnx.GraphProto) -> None:
    """Turns them into inputs: their shapes are all that counts, and copying them is slow."""
    large = [t for t in graph.initializer if math.prod(t.dims) > 4096]
    for tensor in large:
        graph.initializer.remove(tensor)
        new = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        graph.input.append(new)


def _inferred(model: onnx.ModelProto, weights: Mapping[str, tuple[int, ...]], step: int) -> _Graph:
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer} | dict(weights)
    constants = frozenset(shapes)
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        sizes = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
        if tensor.HasField("shape") and min(sizes, default=0) >= 0:
            shapes[value.name] = sizes
    known = {"", *shapes}  # an optional input that is left out has no name
    unknown = tuple(
        f"node {node.name!r} ({node.op_type})"
        for node in graph.node
        if node.op_type in UNKNOWN or not known.issuperset((*node.input, *node.output))
    )
    return _Graph(tuple(graph.node), shapes, constants, unknown, step)


def _constants_folded(model: onnx.ModelProto) -> onnx.ModelProto:
    with Scratch() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = f"{folder}/folded.onnx"
        options.log_severity_level = 4
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[CPU])
        return onnx.load(options.optimized_model_filepath)


def macs_by_node(model: bytes) -> dict[str, int]:
    """Multiply-accumulates of every convolution and product, by the name of what it makes.

    Raises:
        MeasurementError: See `estimate_ms`.
    """
    graph = _read(model, step=1)
    nodes = [node for node in graph.nodes if node.op_type in CONVOLUTIONS + PRODUCTS]
    with _fitting():
        return {node.output[0]: _work(node, graph)[0] for node in nodes}


@contextlib.contextmanager
def _fitting() -> Iterator[None]:
    """Raises `MeasurementError` where shapes do not fit the operators: a group of 0, say."""
    try:
        yield
    except (ArithmeticError, LookupError, ValueError) as err:
        raise MeasurementError(
            f"The shapes of the model do not fit its operators ({err}); no runtime can take it."
        ) from err


def _works(graph: _Graph) -> list[tuple[int, int]]:
    """Multiply-accumulates, and numbers moved, of every node that takes time, in graph order."""
    works = []
    constants = set(graph.weights)
    inside: set[str] = set()  # results of convolutions and products, and of what they absorb
    for node in graph.nodes:
        if node.op_type == "Shape" or constants.issuperset(filter(None, node.input)):
            constants |= set(node.output)  # computed once, when the model is loaded
        elif node.op_type in (*FUSED, *FREE) and not inside.isdisjoint(node.input):
            inside |= set(node.output)
        elif node.op_type in CONVOLUTIONS + PRODUCTS:
            inside |= set(node.output)
            works.append(_work(node, graph))
        elif node.op_type not in FREE:
            names = filter(None, (*node.input, *node.output))
            works.append((0, sum(graph.volume(name) for name in names)))
    return works


def _work(node: onnx.NodeProto, graph: _Graph) -> tuple[int, int]:
    return (_product if node.op_type in PRODUCTS else _convolution)(node, graph)


def _convolution(node: onnx.NodeProto, graph: _Graph) -> tuple[int, int]:
    image, weight = (graph.shapes[name] for name in node.input[:2])
    out = graph.shapes[node.output[0]]
    group = next((a.i for a in node.attribute if a.name == "group"), 1)
    c_in = image[1] // group
    c_in = c_in if c_in == 1 else graph.up(c_in)  # depthwise (or grey): no padding
    n_weights = graph.up(out[1]) * c_in * math.prod(weight[2:])
    places = image if node.op_type == "ConvTranspose" else out  # a filter is laid on each pixel
    n_moved = graph.volume(node.input[0]) + graph.volume(node.output[0]) + n_weights
    return (places[0] * math.prod(places[2:]) * n_weights, n_moved)


def _product(node: onnx.NodeProto, graph: _Graph) -> tuple[int, int]:
    left, right = (graph.shapes[name] for name in node.input[:2])
    out = graph.shapes[node.output[0]]
    flipped = {a.name for a in node.attribute if a.name in ("transA", "transB") and a.i}
    left = left[::-1] if "transA" in flipped else left
    right = right[::-1] if "transB" in flipped else right
    k = graph.up(left[-1])
    n = graph.up(right[-1]) if len(right) > 1 else 1
    n_rows = math.prod(out[:-1] if len(right) > 1 else out)
    n_moved = math.prod(left[:-1]) * k + math.prod(right[:-2]) * k * n + n_rows * n
    return (n_rows * k * n, n_moved)
