"""An ONNX file in half precision, for runtimes that take precision from the file."""

from __future__ import annotations

import os

TAKEN_IN_HALF = {"Max", "Min"}  # onnxruntime's converter would put casts around them


def half_onnx(content: bytes, path: str = "model.onnx") -> bytes:
    """`content` with weights and arithmetic in FP16.

    Inputs and outputs stay FP32, as they do under the builder flag of TensorRT 8 and 10.

    Args:
        content: An ONNX file.
        path: Where it lies, if tensors of it lie beside it.

    Raises:
        ValueError: It cannot be converted.
    """
    import onnx
    from onnxruntime.transformers import float16

    model = onnx.load_from_string(content)
    onnx.load_external_data_for_model(model, os.path.dirname(os.path.abspath(path)))
    blocked = sorted(set(float16.DEFAULT_OP_BLOCK_LIST) - TAKEN_IN_HALF)
    try:
        half = float16.convert_float_to_float16(model, keep_io_types=True, op_block_list=blocked)
    except (ValueError, TypeError, RuntimeError) as err:
        raise ValueError(f"{path} cannot be converted to FP16: {err}. Measure in FP32.") from err
    return bytes(half.SerializeToString())
