"""The little of CUDA that timing needs, through pycuda where it is installed, else torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from compressor.latency.runner import NS_PER_MS

NO_GPU = "TensorRT is there, but no GPU answers"


@dataclass(frozen=True)
class Cuda:
    """What is needed of CUDA's Python bindings.

    Attributes:
        stream: Not the default one; TensorRT would wait on that.
        handle: Its address.
        errors: What calls raise.
        gpu: Name, compute capability and memory.
        buffer: Memory of some bytes on the GPU, with values where given, and its address.
        event: Makes an event, which has `record(stream)` and `synchronize()`.
        elapsed_ms: Between two events, by the GPU's clock.
    """

    stream: Any
    handle: int
    errors: tuple[type[Exception], ...]
    gpu: dict[str, object]
    buffer: Callable[[int, Any], tuple[object, int]]
    event: Callable[[], Any]
    elapsed_ms: Callable[[Any, Any], float]

    def timed(self, launch: Callable[[], None]) -> Callable[[], int]:
        """`launch` as a function that waits for its end and returns the GPU's nanoseconds."""
        start, end = self.event(), self.event()

        def run() -> int:
            start.record(self.stream)
            launch()
            end.record(self.stream)
            end.synchronize()
            return round(float(self.elapsed_ms(start, end)) * NS_PER_MS)

        return run


def through_pycuda() -> Cuda:
    """On the primary context, which TensorRT and torch use too; `autoinit` makes another."""
    driver = importlib.import_module("pycuda.driver")
    try:
        importlib.import_module("pycuda.autoprimaryctx")
        device, stream = driver.Context.get_device(), driver.Stream()
    except driver.Error as err:
        raise RuntimeError(str(err)) from err

    def buffer(n_bytes: int, values: Any) -> tuple[object, int]:
        memory = driver.mem_alloc(n_bytes)
        if values is not None:
            driver.memcpy_htod(memory, values)
        return memory, int(memory)

    gpu = _gpu(device.name(), device.compute_capability(), device.total_memory())
    return Cuda(
        stream, int(stream.handle), (driver.Error, RuntimeError), gpu, buffer, driver.Event,
        lambda start, end: start.time_till(end),
    )  # fmt: skip


def through_torch() -> Cuda:
    """Tensors as memory, torch's streams and events."""
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise RuntimeError("torch.cuda.is_available() is False")

    def buffer(n_bytes: int, values: Any) -> tuple[object, int]:
        memory = torch.empty(n_bytes, dtype=torch.uint8, device="cuda")
        if values is not None:
            memory.copy_(torch.from_numpy(values.reshape(-1).view(np.uint8)))
        torch.cuda.synchronize()  # that was on another stream
        return memory, int(memory.data_ptr())

    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    stream = torch.cuda.Stream()
    return Cuda(
        stream, int(stream.cuda_stream), (RuntimeError,),  # its OutOfMemoryError is one
        _gpu(found.name, (found.major, found.minor), found.total_memory), buffer,
        lambda: torch.cuda.Event(enable_timing=True), lambda start, end: start.elapsed_time(end),
    )  # fmt: skip


def _gpu(name: str, capability: tuple[int, int], n_bytes: int) -> dict[str, object]:
    major, minor = capability
    memory_mib = n_bytes // 2**20
    return {"name": name, "compute_capability": f"{major}.{minor}", "memory_mib": memory_mib}


def find_cuda() -> tuple[Cuda | None, str]:
    """The GPU, through pycuda where that is installed; or why none answers."""
    problems = []
    for find in (through_pycuda, through_torch):
        try:
            return find(), ""
        except (ImportError, OSError, RuntimeError) as err:
            problems.append(f"{find.__name__}: {err}")
    return None, f"{NO_GPU} ({'; '.join(problems)})."
