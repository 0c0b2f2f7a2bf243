"""Whether a machine is the one that a profile is for."""

import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from compressor.errors import MeasurementError, UnreachableError, UnsupportedModelError
from compressor.files import check_size
from compressor.latency import runner
from compressor.latency.host import Host, LocalHost
from compressor.latency.schema import TENSORRT
from compressor.values import Target

Model = bytes | Path
MAX_ONNX_BYTES = 2 * 2**30  # of one message of protobuf
EXTERNAL_KEY = b"location"  # of a tensor that lies in another file

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

    As ONNX Runtime does, onnx reads such files from the model's own folder only.

    Raises:
        MeasurementError: It cannot be read, or it is too large for one file.
    """
    if isinstance(model, bytes):
        return model
    try:
        check_size(model, MAX_ONNX_BYTES)
        content = model.read_bytes()
        if EXTERNAL_KEY not in content:
            return content
        names = _files_beside(content)
        if not names:
            return content
        n_bytes = len(content) + sum((model.parent / name).stat().st_size for name in names)
        if n_bytes > MAX_ONNX_BYTES:
            raise MeasurementError(
                f"{model} and {', '.join(sorted(names))} have {n_bytes / 2**30:.1f} GiB; models "
                f"are measured from one file of at most {MAX_ONNX_BYTES / 2**30:.0f} GiB."
            )
        whole: bytes = onnx.load(model).SerializeToString()
        return whole
    except (OSError, ValueError, DecodeError, onnx.checker.ValidationError) as err:
        said = str(err).splitlines()[0]
        raise MeasurementError(f"{model} cannot be read: {said.rstrip('.')}.") from err


def _files_beside(content: bytes) -> set[str]:
    """Names of the files that hold tensors of an ONNX file."""
    graph = onnx.load_from_string(content)
    return {
        entry.value
        for tensor in onnx.external_data_helper._get_all_tensors(graph)
        if onnx.external_data_helper.uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }


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
