"""A target as something that can be asked how fast a model is.

    with open_device(load_target("jetson-nano", device="ssh://nano")) as device:
        pair = device.compare(original, candidate)

A device is a host (this machine, or one over SSH) and what runs models there: a runner process
(ONNX Runtime, or TensorRT's Python API), or the `trtexec` program. With `--estimate` it is the
profile's figures and nothing else.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from compressor.errors import DeviceBusyError, DeviceError, DeviceLostError, UnreachableError
from compressor.latency import estimate
from compressor.latency.by_runner import NOTHING, RunnerDevice
from compressor.latency.given import Given
from compressor.latency.host import Host, LocalHost
from compressor.latency.machine import Model, check_is_this_machine, check_same_inputs, content_of
from compressor.latency.schema import TENSORRT, TRTEXEC
from compressor.latency.ssh import SshHost, find_device
from compressor.latency.timing import FINAL, Effort
from compressor.latency.trtexec import TrtexecRunner
from compressor.values import (
    Basis,
    KernelTime,
    PairedLatency,
    Progress,
    ProgressCallback,
    Target,
)

OPENING, TIMING_BOTH = "Opening the device", "Timing both networks"  # phases
PATIENCE_S = 600.0  # a board reboots in one or two minutes; a person comes back in ten
RETRY_S = (5.0, 10.0, 20.0, 30.0)  # pauses between tries; the last one is repeated

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


class Device(Protocol):
    """Something that times models, or estimates their time."""

    def describe(self) -> Mapping[str, Any]:
        """What it is and what runs on it: machine, model, runtime, version, state.

        Raises:
            DeviceError: It does not answer, or not as the profile says.
        """

    def compare(
        self, original: Model, candidate: Model, *, effort: Effort = FINAL, seed: int = 0
    ) -> PairedLatency:
        """Both ONNX models, timed in the same rounds.

        Args:
            original: ONNX file or its content, with static input shapes.
            candidate: ONNX file or its content.
            effort: `timing.TRIAL` or `timing.FINAL`.
            seed: Decides the order of runs.

        Raises:
            MeasurementError: One of the models is at fault.
            DeviceError: The device is.
        """

    def profile(self, model: Model) -> tuple[KernelTime, ...]:
        """What every node of the ONNX model takes there, in order; none where nothing tells.

        Raises:
            MeasurementError: The model is at fault.
            DeviceError: The device is.
        """

    def reconnect(self) -> None:
        """Tries to reach a device that went away.

        Raises:
            DeviceError: It is still away.
        """

    def close(self) -> None:
        """Ends processes and connections."""


@contextmanager
def open_device(target: Target, real: Given = NOTHING) -> Iterator[Device]:
    """The device of `target`, ready to measure; closed at the end of the context.

    Args:
        target: Where, and by which runtime.
        real: Input of the models -> what it is timed with, where that is whole numbers; see
            `given.whole_numbers` for those that are not there.

    Raises:
        DeviceError: It does not answer, has not the runtime, or is in use.
    """
    device = _device(target, real)
    try:
        yield device
    finally:
        device.close()


def compare_latency(
    original: Model,
    candidate: Model,
    target: Target,
    *,
    effort: Effort = FINAL,
    seed: int = 0,
    on_progress: ProgressCallback = lambda _progress: None,
) -> PairedLatency:
    """Both ONNX models timed in the same rounds on the target's device.

    Args:
        original: ONNX file or its content, with static input shapes.
        candidate: ONNX file or its content, which takes the same inputs.
        target: Where, and by which runtime; see `load_target`.
        effort: `timing.TRIAL` or `timing.FINAL`.
        seed: Decides the order of runs.
        on_progress: Told what is done, and how long that may take.

    Raises:
        MeasurementError: One of the models is at fault, or they take other inputs.
        DeviceError: The device does not answer, has not the runtime, or is in use.
    """
    contents = content_of(original), content_of(candidate)
    check_same_inputs(*contents)
    on_progress(Progress(OPENING, 0, 1, expected={TIMING_BOTH: effort.budget_s}))
    with open_device(target) as device:
        on_progress(Progress(TIMING_BOTH, 0, 1))
        return device.compare(*contents, effort=effort, seed=seed)


def patiently(
    device: Device,
    work: Callable[[], Answer],
    *,
    on_wait: Callable[[str], None],
    patience_s: float = PATIENCE_S,
    sleep: Callable[[float], None] = time.sleep,
) -> Answer:
    """What `work` returns; where the device goes away meanwhile, waits for it and works again.

    Args:
        device: What `work` uses.
        work: Repeated from its beginning after each interruption.
        on_wait: Told in words before every pause.
        patience_s: How long the device may be away.
        sleep: Tests pass one that does not wait.

    Raises:
        DeviceLostError: It stayed away.
        CompressorError: What else `work` raises.
    """
    waited_s, n_tries = 0.0, 0
    is_lost: DeviceError | None = None
    while True:
        try:
            if is_lost is not None:
                device.reconnect()
            return work()
        except (DeviceLostError, UnreachableError) as err:  # it was there when it was opened
            is_lost = err
        except DeviceBusyError as err:
            if is_lost is None:
                raise
            is_lost = err  # what is left of ourselves there; it ends when its connection does
        if waited_s >= patience_s:
            raise DeviceLostError(
                f"The device stayed away for {waited_s:.0f} s. {is_lost}"
            ) from is_lost
        pause_s = RETRY_S[min(n_tries, len(RETRY_S) - 1)]
        logger.warning("%s Trying again in %.0f s.", is_lost, pause_s)
        on_wait(f"lost {waited_s:.0f} s ago")
        sleep(pause_s)
        waited_s, n_tries = waited_s + pause_s, n_tries + 1


class EstimateDevice:
    """The profile's figures in place of a device; whatever it says is labelled an estimate."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def describe(self) -> Mapping[str, Any]:
        """See `Device.describe`."""
        return {"host": "none", "basis": Basis.ESTIMATE, "error_factor": estimate.ERROR_FACTOR}

    def compare(
        self, original: Model, candidate: Model, *, effort: Effort = FINAL, seed: int = 0
    ) -> PairedLatency:
        """See `Device.compare`; nothing is run, so `effort` and `seed` change nothing."""
        del effort, seed
        return estimate.estimate_pair(content_of(original), content_of(candidate), self._target)

    def profile(self, model: Model) -> tuple[KernelTime, ...]:
        """See `Device.profile`; nothing is run."""
        del model
        return ()

    def reconnect(self) -> None:
        """See `Device.reconnect`."""

    def close(self) -> None:
        """See `Device.close`."""


def _device(target: Target, real: Given) -> Device:
    if target.basis is Basis.ESTIMATE:
        return EstimateDevice(target)
    if target.device is None:
        check_is_this_machine(target)
    host: Host = SshHost(find_device(target.device)) if target.device else LocalHost()
    try:
        # TensorRT's Python API is asked here only; on another machine its program is enough.
        over_ssh = target.device is not None and target.runtime == TENSORRT
        if target.runtime == TRTEXEC or over_ssh:
            return TrtexecRunner(host, target)
        return RunnerDevice(host, target, real)
    except BaseException:
        host.close()
        raise
