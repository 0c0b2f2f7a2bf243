"""Precision: an ONNX file made half, and what an engine's layers turned out to be."""

from __future__ import annotations

import json
import os
import re
from collections import Counter

FP32, FP16 = "fp32", "fp16"
TAKEN_IN_HALF = {"Max", "Min"}  # onnxruntime's converter would put casts around them

# "Half" (TensorRT-RTX, 11), "Row major linear FP16 format" (8, 10); BF16 before the FP16 in it.
PRECISIONS = (
    ("bf16", re.compile(r"bf16|bfloat16", re.I)),
    ("fp16", re.compile(r"fp16|half", re.I)),
    ("fp8", re.compile(r"fp8", re.I)),
    ("fp32", re.compile(r"fp32|float", re.I)),
    ("int", re.compile(r"int|bool", re.I)),
)
LOGGED_LAYER = re.compile(r"^Name: .*?LayerType: .*?Outputs: \[(.*?)\}\]", re.M)
LOGGED_TYPE = re.compile(r"Datatype: ([^,}]+)")


def half_onnx(content: bytes, path: str = "model.onnx") -> bytes:
    """`content` with weights and arithmetic in FP16.

    Inputs and outputs stay FP32, as they do under the builder flag of TensorRT 8 and 10.

    Args:
        content: An ONNX file; one that is in FP16 already comes back as it is.
        path: Where it lies, if tensors of it lie beside it.

    Raises:
        ValueError: It cannot be converted.
    """
    import onnx
    from onnxruntime.transformers import float16

    model = onnx.load_from_string(content)
    if any(each.data_type == onnx.TensorProto.FLOAT16 for each in model.graph.initializer):
        return content
    onnx.load_external_data_for_model(model, os.path.dirname(os.path.abspath(path)))
    blocked = sorted(set(float16.DEFAULT_OP_BLOCK_LIST) - TAKEN_IN_HALF)
    try:
        half = float16.convert_float_to_float16(model, keep_io_types=True, op_block_list=blocked)
    except (ValueError, TypeError, RuntimeError) as err:
        raise ValueError(f"{path} cannot be converted to FP16: {err}. Measure in FP32.") from err
    return bytes(half.SerializeToString())


def count_precisions(information: str) -> dict[str, int]:
    """How many layers put out which type, from what an EngineInspector says in JSON."""
    counts: Counter[str] = Counter()
    for layer in json.loads(information).get("Layers", []):
        outputs = layer.get("Outputs", []) if isinstance(layer, dict) else []  # else: names only
        types = [str(v) for output in outputs for k, v in output.items() if "Datatype" in k]
        counts.update(_precision(text) for text in types[:1])
    return dict(counts)


def count_logged_precisions(text: str) -> dict[str, int]:
    """The same, from the list of layers that TensorRT logs when it has built an engine."""
    outputs = LOGGED_LAYER.findall(text)
    types = [found.group(1) for found in map(LOGGED_TYPE.search, outputs) if found]
    return dict(Counter(map(_precision, types)))


def _precision(text: str) -> str:
    return next((name for name, pattern in PRECISIONS if pattern.search(text)), "other")
