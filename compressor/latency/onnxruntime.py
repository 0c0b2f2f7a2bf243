"""ONNX Runtime in this process: a model's answers. Its time is `runner`'s business."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from compressor.containers import map_tensors
from compressor.errors import MeasurementError

# Each of ONNX Runtime's exceptions derives from Exception by itself.
ORT_ERRORS = tuple(
    value
    for name, value in vars(onnxruntime.capi.onnxruntime_pybind11_state).items()
    if isinstance(value, type) and issubclass(value, Exception)
)
CPU = "CPUExecutionProvider"
FLOATS = {"tensor(float)": torch.float32, "tensor(double)": torch.float64}


def predictor(model: bytes | Path, *, n_threads: int, like: Any = None) -> Callable[[Tensor], Any]:
    """An ONNX model on the CPU as a function from images to what the network returns.

    Args:
        model: ONNX file or its content, with one input.
        n_threads: Threads of one call.
        like: Something that the network returned: ONNX keeps a plain list of tensors, and they
            are put back where `like` has its own. None stands for a single tensor.

    Raises:
        MeasurementError: The model cannot be loaded, now, or run, when called.
    """
    session = _open(model, n_threads)
    name = session.get_inputs()[0].name

    def predict(images: Tensor) -> Any:
        with _translated("run"):
            outputs = session.run(None, {name: images.numpy()})
        tensors = (torch.from_numpy(np.asarray(each)) for each in outputs)
        return next(tensors) if like is None else map_tensors(lambda _: next(tensors), like)

    return predict


def answers_of(model: bytes | Path, given: Mapping[str, Tensor]) -> list[Tensor]:
    """What an ONNX model returns.

    Args:
        model: ONNX file or its content.
        given: Tensors in the order of its inputs, by names that may be those of the inputs; one
            that the model does not read may be among them.

    Raises:
        MeasurementError: It cannot be loaded or run, or reads what is not there.
    """
    session = _open(model, 1)
    wanted, left = session.get_inputs(), dict(given)
    fed = {}
    for n, each in enumerate(wanted):
        n_more = len(left) - (len(wanted) - n)  # that it does not read
        fits = [name for name, tensor in left.items() if list(tensor.shape) == each.shape]
        name = each.name if each.name in left else next(iter(fits if n_more else left), None)
        if name is None:
            raise MeasurementError(f"the model reads {each.name} {each.shape}, which is not given")
        fed[each.name] = _as(left.pop(name), each.type).numpy()
    with _translated("run"):
        return [torch.from_numpy(np.asarray(each)) for each in session.run(None, fed)]


def _as(tensor: Tensor, kind: str) -> Tensor:
    """Of the floating-point kind that the model reads; a number of Python has none of its own."""
    return tensor.to(FLOATS[kind]) if tensor.is_floating_point() and kind in FLOATS else tensor


def _open(model: bytes | Path, n_threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # measuring follows
    options.log_severity_level = 4  # what goes wrong comes as an exception too
    source = model if isinstance(model, bytes) else str(model)
    with _translated("load"):
        return onnxruntime.InferenceSession(source, options, providers=[CPU])


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except ORT_ERRORS as err:
        raise MeasurementError(f"ONNX Runtime cannot {what} the model: {err}") from err
