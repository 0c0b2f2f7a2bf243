"""What whole numbers a model is timed with: real ones, or such as its tables have rows for.

A runner draws fractions by itself. Ids drawn like that would lie outside of the table that they
are looked up in, and no other number is safe for every use: 0 may be divided by.
"""

import io
from collections.abc import Mapping
from functools import partial

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from compressor.errors import MeasurementError

Given = Mapping[str, np.ndarray]  # name of an input in the file -> its value

KINDS = {
    onnx.TensorProto.INT64: np.int64,
    onnx.TensorProto.INT32: np.int32,
    onnx.TensorProto.UINT8: np.uint8,
    onnx.TensorProto.BOOL: np.bool_,
}
HANDED_ON = (
    "Cast",
    "Identity",
    "Reshape",
    "Unsqueeze",
    "Squeeze",
    "Flatten",
    "Transpose",
    "Slice",
)


def whole_numbers(content: bytes, real: Given) -> dict[str, np.ndarray]:
    """A value for every input of whole numbers that an ONNX file has.

    Args:
        content: Of the file.
        real: Values of its inputs that are known; those of fractions are not used.

    Returns:
        Of an input that is not in `real`: rows of the tables that it is looked up in, drawn at
        random; 0 to 255 of bytes, and 1 of anything else.

    Raises:
        MeasurementError: A value of `real` has another shape.
    """
    try:
        graph = onnx.load_from_string(content).graph
    except DecodeError:
        return {}  # the runtime says what is wrong with it
    weights = {tensor.name: tensor for tensor in graph.initializer}
    generator = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for value in graph.input:
        kind = KINDS.get(value.type.tensor_type.elem_type)
        if kind is None or value.name in weights:
            continue
        shape = [side.dim_value for side in value.type.tensor_type.shape.dim]
        if value.name in real:
            known = np.asarray(real[value.name])
            if list(known.shape) != shape:
                raise MeasurementError(
                    f"Input {value.name} has the shape {shape}; the value given has "
                    f"{list(known.shape)}."
                )
            found[value.name] = known.astype(kind)
        elif all(shape) or not shape:
            least, end = _range(graph, weights, value.name, kind)
            found[value.name] = generator.integers(least, end, shape).astype(kind)
    return found


def as_file(arrays: Given) -> bytes:
    """The content of an `.npz` file."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: array for name, array in arrays.items()})  # type: ignore[arg-type]
    return buffer.getvalue()


def _range(
    graph: onnx.GraphProto, weights: Mapping[str, onnx.TensorProto], name: str, kind: type
) -> tuple[int, int]:
    """[least, end) of what may be drawn for an input."""
    rows = _table_rows(graph, weights, {name})
    if rows:
        return 0, min(rows)
    return (0, 256) if kind is np.uint8 else (1, 2)


def _table_rows(
    graph: onnx.GraphProto, weights: Mapping[str, onnx.TensorProto], names: set[str]
) -> list[int]:
    """Rows of every table that what is called one of `names` is looked up in."""
    found = []
    sizes = partial(_size_along, graph, weights)
    for node in graph.node:  # in an order in which inputs come first
        if node.op_type in HANDED_ON and node.input[0] in names:
            names.update(node.output)
        elif node.op_type == "Gather" and node.input[1] in names:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            found += sizes(node.input[0], axis)
    return found


def _size_along(
    graph: onnx.GraphProto, weights: Mapping[str, onnx.TensorProto], name: str, axis: int
) -> list[int]:
    """The size of a weight along a dimension; nothing of what is no weight."""
    if name in weights:
        return [weights[name].dims[axis]]
    constants = [
        attribute.t
        for node in graph.node
        if node.op_type == "Constant" and name in node.output
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    return [tensor.dims[axis] for tensor in constants if tensor.dims]
