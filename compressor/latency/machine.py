"""Whether a machine is the one that a profile is for."""

import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import onnx
from google.protobuf.message import DecodeError, Message

from compressor.errors import MeasurementError, UnreachableError, UnsupportedModelError
from compressor.files import check_size, read_whole
from compressor.latency import runner
from compressor.latency.host import Host, LocalHost
from compressor.latency.schema import TENSORRT
from compressor.values import Target

Model = bytes | Path
_T = TypeVar("_T", bound=Message)
MAX_ONNX_BYTES = 2 * 2**30  # of one message of protobuf
# Domains of operators that ONNX Runtime and TensorRT have built in.
DOMAINS = frozenset(
    {
        "",
        "ai.onnx",
        "ai.onnx.ml",
        "com.microsoft",
        "com.microsoft.nchwc",
        "com.ms.internal.nhwc",
        "trt.plugins",
    }
)
# Of them, what loads another file, or a function of Python.
LOADING = frozenset({"EPContext", "PythonOp", "PythonOpGrad"})

logger = logging.getLogger(__name__)


def check_is_this_machine(target: Target) -> None:
    """Raises `UnreachableError` where the profile's device is not the machine we run on."""
    here = runner.describe()
    fault = mismatch(target, here)
    if target.runtime == TENSORRT and sys.platform == "linux" and not _has_gpu():
        fault = "it has no NVIDIA GPU"
    if fault is not None and target.runtime == TENSORRT and fault.startswith(MODEL):
        return  # the GPU's name is asked for by the runner
    if fault is not None:
        raise UnreachableError(_ELSEWHERE.format(fault=fault))


def _has_gpu() -> bool:
    """Whether NVIDIA's driver is there, on a PC or a Jetson."""
    return any(Path("/dev", name).exists() for name in ("nvidiactl", "nvhost-ctrl-gpu", "dxg"))


MODEL = "its model"
_ELSEWHERE = (
    "The target is not this machine: {fault}. Name the device: --device ssh://user@host, or take "
    "--estimate for a rough figure without it."
)


def checked_machine(
    host: Host, described: Mapping[str, Any], fault: str | None
) -> Mapping[str, Any]:
    """`described`; with a warning where another machine than the profile's was named.

    Raises:
        UnreachableError: It is this machine, and nobody named it.
    """
    if fault is None:
        return described
    if isinstance(host, LocalHost):
        raise UnreachableError(f"{_ELSEWHERE.format(fault=fault)}")
    logger.warning("%s is not what the profile is for: %s.", host.label, fault)
    return {**described, "unlike_profile": fault}


def mismatch(
    target: Target, machine: Mapping[str, Any], *, only_model: bool = False
) -> str | None:
    """How a machine differs from what the profile is for; None where it does not.

    Args:
        target: With `machines`, `models` and `instruction_sets`.
        machine: What `runner.describe` says.
        only_model: Nothing else is known of the machine.
    """
    wanted = (
        ("its processor", target.machines, str(machine.get("machine", ""))),
        ("its instruction set", target.instruction_sets, str(machine.get("instruction_set", ""))),
    )
    for what, allowed, found in wanted:
        if allowed and found not in allowed and not only_model:
            return f"{what} is {found or 'unknown'}, not {' or '.join(allowed)}"
    gpu = machine.get("gpu") or {}  # of a runner that has one
    name = f"{machine.get('model', '')} {gpu.get('name', '')}".strip()
    words = (rf"(?<![0-9a-z]){re.escape(model.lower())}(?![0-9a-z])" for model in target.models)
    if target.models and not any(re.search(word, name.lower()) for word in words):
        return f"{MODEL} is {name or 'unknown'!r}, not {' or '.join(target.models)}"
    return None


def content_of(model: Model) -> bytes:
    """The ONNX file's content, with the tensors that lie in files beside it.

    As ONNX Runtime does, onnx reads such files from the model's own folder only. Nothing in what
    comes back makes a runtime load another file.

    Raises:
        UnsupportedModelError: A node would load a file or a library.
        MeasurementError: It cannot be read, or it is too large for one file.
    """
    if isinstance(model, bytes):
        return model
    try:
        check_size(model, MAX_ONNX_BYTES)
        content = read_whole(model, MAX_ONNX_BYTES)
        read = onnx.load_from_string(content)
        _check_loads_nothing(model, read)
        names = {_location(tensor) for tensor in _tensors_elsewhere(read)}
        if not names:
            return content
        n_bytes = len(content) + sum((model.parent / name).stat().st_size for name in names)
        if n_bytes > MAX_ONNX_BYTES:
            raise MeasurementError(
                f"{model} and {', '.join(sorted(names))} have {n_bytes / 2**30:.1f} GiB; models "
                f"are measured from one file of at most {MAX_ONNX_BYTES / 2**30:.0f} GiB."
            )
        onnx.load_external_data_for_model(read, str(model.parent))
        for tensor in _tensors_elsewhere(read):  # where onnx looks for none
            raise MeasurementError(
                f"{model} has the tensor {tensor.name!r:.60} in {_location(tensor)!r:.60}, and in "
                f"a place where no exporter writes one."
            )
        whole: bytes = read.SerializeToString()
        return whole
    except (OSError, ValueError, DecodeError, onnx.checker.ValidationError) as err:
        said = str(err).splitlines()[0]
        raise MeasurementError(f"{model} cannot be read: {said.rstrip('.')}.") from err


def _check_loads_nothing(path: Path, model: onnx.ModelProto) -> None:
    """Raises `UnsupportedModelError` where a node is not one of plain operators."""
    own = {function.domain for function in model.functions}
    for node in _parts(model, onnx.NodeProto):
        name = f"{node.domain}.{node.op_type}".lstrip(".")
        if node.op_type in LOADING:
            raise UnsupportedModelError(
                f"{path} has a node of {name:.60}, which makes the runtime load another file. "
                f"Give the network itself, not what was compiled of it."
            )
        if node.domain not in DOMAINS | own:
            raise UnsupportedModelError(
                f"{path} has a node of {name:.60}, which no runtime has built in: it would take a "
                f"library of its own. Known domains: {', '.join(sorted(DOMAINS - {''}))}."
            )


def _tensors_elsewhere(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Tensors whose numbers lie in another file."""
    for tensor in _parts(model, onnx.TensorProto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            yield tensor


def _location(tensor: onnx.TensorProto) -> str:
    """File that holds a tensor's numbers."""
    return next((each.value for each in tensor.external_data if each.key == "location"), "")


def _parts(message: Message, kind: type[_T]) -> Iterator[_T]:
    """Every message of that kind in `message`, wherever it may stand."""
    if isinstance(message, kind):
        yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in value if isinstance(value, Sequence) else (value,):
                yield from _parts(each, kind)


def check_same_inputs(original: bytes, candidate: bytes) -> None:
    """Raises `MeasurementError` where two ONNX files' content takes inputs of other shapes."""
    if original == candidate:
        return
    of_original = _input_shapes(original, "original")
    of_candidate = _input_shapes(candidate, "candidate")
    if of_original != of_candidate:
        raise MeasurementError(
            f"The original takes inputs of shape {of_original}, the candidate of {of_candidate}; "
            f"only models of the same inputs can be compared. Export both from one example."
        )


def _input_shapes(content: bytes, name: str) -> list[tuple[int | str, ...]]:
    try:
        graph = onnx.load_from_string(content).graph
    except DecodeError as err:
        raise UnsupportedModelError(f"The {name} is no ONNX file: {err}.") from err
    given = {tensor.name for tensor in graph.initializer}
    return [
        tuple(d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim)
        for value in graph.input
        if value.name not in given
    ]
