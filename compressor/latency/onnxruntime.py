"""ONNX Runtime in this process: a model's answers. Its time is `runner`'s business."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
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
MAX_WAYS = 50  # to leave inputs out
FLOATS = {"tensor(float)": torch.float32, "tensor(double)": torch.float64}


def predictor(
    model: bytes | Path, *, n_threads: int | None = None, like: Any = None
) -> Callable[..., Any]:
    """An ONNX model on the CPU, to be called as the network is, which returns what that does.

    Args:
        model: ONNX file or its content. Several inputs by position are called `input_0`,
            `input_1`, ... in it (see `exporter.names_in`); what it does not read is left out.
        n_threads: Threads of one call; None for as many as torch works with.
        like: Something that the network returned: ONNX keeps a plain list of tensors, and they
            are put back where `like` has its own. None stands for a single tensor.

    Raises:
        MeasurementError: The model cannot be loaded, now, or run, when called.
    """
    session = _open(model, n_threads or torch.get_num_threads())
    wanted = [each.name for each in session.get_inputs()]

    def predict(*given: Tensor, **named: Tensor) -> Any:
        if len(given) == 1 and len(wanted) == 1:
            fed = {wanted[0]: given[0]}
        else:
            fed = {f"input_{i}": tensor for i, tensor in enumerate(given)} | named
        with _translated("run"):
            outputs = session.run(
                None, {name: tensor.numpy() for name, tensor in fed.items() if name in wanted}
            )
        tensors = (torch.from_numpy(np.asarray(each)) for each in outputs)
        return next(tensors) if like is None else map_tensors(lambda _: next(tensors), like)

    return predict


def answers_of(model: bytes | Path, given: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """What an ONNX model returns; once for every way in which it may read what is given.

    Args:
        model: ONNX file or its content.
        given: Tensors in the order of its inputs; there may be some among them that the network
            does not use, which the exporter leaves out without saying which.

    Raises:
        MeasurementError: It cannot be loaded or run, or reads what is not there.
    """
    session = _open(model, 1)
    wanted = session.get_inputs()
    ways = itertools.combinations(given, len(wanted))
    fitting = (
        way
        for way in ways
        if all(list(t.shape) == each.shape for t, each in zip(way, wanted, strict=True))
    )
    n_ways = 0
    for way in itertools.islice(fitting, MAX_WAYS):
        n_ways += 1
        pairs = zip(wanted, way, strict=True)
        fed = {each.name: _as(tensor, each.type).numpy() for each, tensor in pairs}
        with _translated("run"):
            found = session.run(None, fed)
        yield [torch.from_numpy(np.asarray(each)) for each in found]
    if not n_ways:
        reads = ", ".join(f"{each.name} {each.shape}" for each in wanted)
        raise MeasurementError(f"the model reads {reads}, which is not given")


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
