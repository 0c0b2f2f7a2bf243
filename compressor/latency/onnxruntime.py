"""ONNX Runtime: options that make a CPU figure honest, and one session as a function."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from compressor.errors import MeasurementError
from compressor.latency import timing
from compressor.values import PairedLatency, Target

# Each of ONNX Runtime's exceptions derives from Exception by itself.
ORT_ERRORS = tuple(
    value
    for name, value in vars(onnxruntime.capi.onnxruntime_pybind11_state).items()
    if isinstance(value, type) and issubclass(value, Exception)
)
CPU = "CPUExecutionProvider"
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def compare_latency(
    original: bytes | Path,
    candidate: bytes | Path,
    target: Target,
    *,
    effort: timing.Effort = timing.FINAL,
    seed: int = 0,
) -> PairedLatency:
    """Both ONNX models timed in the same rounds on this machine.

    Args:
        original: ONNX file or its content.
        candidate: ONNX file or its content, with inputs of its own static shapes.
        target: Provider and threads.
        effort: `timing.TRIAL` or `timing.FINAL`.
        seed: Decides the order of runs.

    Raises:
        MeasurementError: A model cannot be loaded or run, or the provider is not there.
    """
    return timing.compare(
        lambda: open_session(original, target),
        lambda: open_session(candidate, target),
        effort,
        seed=seed,
    )


def open_session(model: bytes | Path, target: Target) -> Callable[[], object]:
    """A fresh session on fixed random inputs, as a function that runs it once.

    Raises:
        MeasurementError: The provider is missing, or the model cannot be loaded or run, or has
            inputs without a static shape.
    """
    session = _open(model, target.provider, target.n_threads)
    inputs = _fixed_inputs(session)
    outputs = [output.name for output in session.get_outputs()]
    with _translated("run"):
        session.run(outputs, inputs)

    def run() -> object:
        return session.run(outputs, inputs)

    return run


def predictor(model: bytes | Path, *, n_threads: int) -> Callable[[Tensor], Tensor]:
    """An ONNX model on the CPU as a function from images to its first output.

    Args:
        model: ONNX file or its content, with one input.
        n_threads: Threads of one call.

    Raises:
        MeasurementError: The model cannot be loaded, now, or run, when called.
    """
    session = _open(model, CPU, n_threads)
    name = session.get_inputs()[0].name

    def predict(images: Tensor) -> Tensor:
        with _translated("run"):
            outputs = session.run(None, {name: images.numpy()})
        return torch.from_numpy(np.asarray(outputs[0]))

    return predict


def _open(model: bytes | Path, provider: str, n_threads: int) -> onnxruntime.InferenceSession:
    available = onnxruntime.get_available_providers()
    if provider not in available:  # ONNX Runtime itself would silently take the CPU
        raise MeasurementError(
            f"The profile asks for {provider}; this onnxruntime has {', '.join(available)}. "
            f"Install the build of onnxruntime that ships it."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # two share cores
    options.add_session_config_entry("session.set_denormal_as_zero", "1")  # both models alike
    options.log_severity_level = 4  # what goes wrong comes as an exception too
    source = model if isinstance(model, bytes) else str(model)
    with _translated("load"):
        session = onnxruntime.InferenceSession(source, options, providers=[provider])
    if provider not in session.get_providers():
        raise MeasurementError(
            f"ONNX Runtime fell back to {session.get_providers()}; {provider} was asked."
        )
    return session


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except ORT_ERRORS as err:
        raise MeasurementError(f"ONNX Runtime cannot {what} the model: {err}") from err


def _fixed_inputs(session: onnxruntime.InferenceSession) -> dict[str, np.ndarray]:
    """Normal random numbers, the same for every session; zeros would hide slow paths."""
    generator = np.random.default_rng(0)
    inputs = {}
    for argument in session.get_inputs():
        if not all(isinstance(side, int) for side in argument.shape):
            raise MeasurementError(
                f"Input {argument.name} has the shape {argument.shape}; latency is measured at "
                f"a static shape. Export with a fixed batch size."
            )
        if argument.type not in DTYPES:
            raise MeasurementError(
                f"Input {argument.name} is {argument.type}; expected {', '.join(DTYPES)}."
            )
        values = generator.standard_normal(argument.shape)
        inputs[argument.name] = values.astype(DTYPES[argument.type])
    return inputs
