"""Times ONNX models through TensorRT's Python API on this machine's GPU, on request.

A child process like `runner`, which says what it reads and answers; a pair names engine files:

    {"do": "build", "model": PATH, "engine": PATH,
     "options": {"precision": "fp16", "workspace_mib": 512, "timing_cache": PATH}}
        -> {"engine": PATH, "built_seconds": 9.1, "layers": {"fp16": 20, "fp32": 2},
            "fp16_by": "flag" or "onnx", "precision_verified": true, "timing_cache": "kept",
            "warnings": [...], "seconds": 9.3}

TensorRT 8.2 to 11 and TensorRT-RTX differ in what they have; each branch asks for the thing it
needs, never for a version. A network's FP16 is a builder flag up to 10; 11 and RTX take types from
the ONNX file, which is then converted. Timed is the GPU between two CUDA events around one
execution, on a stream of our own; inputs and outputs stay on the GPU.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from compressor.latency.cuda import Cuda, find_cuda
from compressor.latency.precision import (
    FP16,
    FP32,
    count_logged_precisions,
    count_precisions,
    half_onnx,
)
from compressor.latency.runner import (
    FAILED,
    OUT_OF_MEMORY,
    REQUEST,
    RUNTIME_MISSING,
    UNSUPPORTED,
    RunnerError,
    given_inputs,
    serve,
)  # fmt: skip

MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")  # the first that imports
BY_FLAG, BY_ONNX = "flag", "onnx"
NEW, KEPT, REFUSED, NO_CACHES = "new", "kept", "refused", "unsupported"  # timing caches
INPUT_TYPES = {"FLOAT": np.float32, "HALF": np.float16}
ITEM_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT32": 4, "INT64": 8, "INT8": 1, "BOOL": 1}

ERROR, WARNING = 1, 2  # severities of ILogger; 0 is an internal error
N_LINES_QUOTED = 4

# How TensorRT words a lack of memory: its error code, CUDA's, and the allocator's.
NO_MEMORY = re.compile(
    r"out.?of.?memory|mem.{0,4}alloc|could not be allocated|bad_alloc|insufficient memory",
    re.I,
)


def find_tensorrt() -> Any:
    """The first of TensorRT's modules that can be imported."""
    problems = []
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as err:  # OSError: a wheel without its libraries
            problems.append(f"{name}: {err}")
    raise RunnerError(
        RUNTIME_MISSING,
        f"No TensorRT at {sys.executable} ({'; '.join(problems)}). Install it: "
        f"{sys.executable} -m pip install tensorrt (a Jetson has it in its system's Python).",
    )


def make_log(trt: Any) -> Any:
    """An ILogger that keeps the last errors and the layers; TensorRT takes one a process."""

    class Log(trt.ILogger):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 wants it by name
            self.clear()

        def clear(self) -> None:
            self.errors: deque[str] = deque(maxlen=50)
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= WARNING:
                sys.stderr.write(f"TensorRT: {message}\n")
            if int(severity) <= ERROR:
                self.errors.append(message.strip())
            elif "LayerType: " in message:
                self.layers = message

    return Log()


class TensorRT:
    """TensorRT as a backend: what `serve` needs to know of a runtime."""

    def __init__(self, trt: Any = None, cuda: Cuda | None = None) -> None:
        self.trt = find_tensorrt() if trt is None else trt
        self.log = make_log(self.trt)
        if hasattr(self.trt, "init_libnvinfer_plugins"):  # 8.x parses InstanceNorm into one
            self.trt.init_libnvinfer_plugins(self.log, "")
        self.cuda, self.no_gpu = (cuda, "") if cuda else find_cuda()  # building may do without

    def hello(self) -> dict[str, object]:
        """What the host is told of this runtime."""
        return {
            "runtime": "tensorrt-rtx" if _is_rtx(self.trt) else "tensorrt",
            "version": self.trt.__version__,
            "providers": [],
            "gpu": self.cuda.gpu if self.cuda else {},
            "gpu_problem": self.no_gpu,
        }

    def runs_in_one_thread(self, options: Mapping[str, Any]) -> bool:
        """The GPU does the work."""
        del options
        return False

    def open(self, path: str, options: Mapping[str, Any]) -> Callable[[], int]:
        """A fresh engine on fixed inputs, as a function that runs it once; see `runner`."""
        if self.cuda is None:
            raise RunnerError(RUNTIME_MISSING, self.no_gpu)
        self.log.clear()
        content, cuda, given = _read(path), self.cuda, given_inputs(np, options.get("inputs"))
        try:
            runtime = self._made(lambda: self.trt.Runtime(self.log), "a Runtime")
            engine = runtime.deserialize_cuda_engine(content)
            if engine is None:
                raise self._failed(f"TensorRT cannot load the engine {path}")
            context = engine.create_execution_context()
            if context is None:
                raise self._failed(f"TensorRT cannot make an execution context for {path}")
            buffers = self._buffers(engine, context, cuda, given)
            timed = cuda.timed(self._launcher(context, buffers, cuda))
            timed()
        except cuda.errors as err:
            raise self._failed(f"{path} cannot be run", err) from err

        def run() -> int:
            try:
                return timed()
            except cuda.errors as err:
                raise self._failed(f"{path} cannot be run", err) from err

        return run

    def build(self, model: str, engine: str, options: Mapping[str, Any]) -> dict[str, object]:
        """Builds the engine of an ONNX file; says what it is made of."""
        began = time.perf_counter()
        precision = options.get("precision", FP32)
        if precision not in (FP32, FP16):
            raise RunnerError(REQUEST, f"precision is {precision!r}; expected {FP32} or {FP16}.")
        self.log.clear()
        content, fp16_by = _read(model), None
        if precision == FP16:
            fp16_by = BY_FLAG if hasattr(self.trt.BuilderFlag, "FP16") else BY_ONNX
        builder = self._made(lambda: self.trt.Builder(self.log), "a Builder")
        network, _parser = self._parsed(builder, content, model)  # the parser holds the weights
        if fp16_by == BY_ONNX:  # after the original was read: errors are about the user's file
            try:
                content = half_onnx(content, model)
            except ValueError as err:
                raise RunnerError(UNSUPPORTED, str(err)) from err
            network, _parser = self._parsed(builder, content, model)
        config = builder.create_builder_config()
        configure(self.trt, config, options.get("workspace_mib"), fp16=fp16_by == BY_FLAG)
        cache_path = options.get("timing_cache")
        cache_state = load_timing_cache(self.trt, config, cache_path)
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise self._failed(f"TensorRT cannot build {model}")
        _write(engine, serialized)
        timings = config.get_timing_cache() if cache_state in (NEW, KEPT, REFUSED) else None
        if timings is not None:
            _write(str(cache_path), timings.serialize())
        built_s = time.perf_counter() - began
        layers = self._layers(serialized)
        warnings = []
        if cache_state == REFUSED:
            warnings.append(f"{cache_path} was not made by this TensorRT and GPU; replaced.")
        if fp16_by and layers and FP16 not in layers:
            warnings.append(f"fp16 was asked; no layer of {engine} is half, but {layers}.")
        return {
            "engine": engine,
            "built_seconds": built_s,
            "layers": layers,
            "precision_verified": (precision in layers) if layers else None,
            "fp16_by": fp16_by,
            "timing_cache": cache_state,
            "warnings": warnings,
        }

    def _parsed(self, builder: Any, content: bytes, path: str) -> tuple[Any, Any]:
        """Network and parser of an ONNX file; `path` tells where its tensors lie, if outside."""
        flags = 0
        if hasattr(self.trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH"):
            flags = 1 << int(self.trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
        network = builder.create_network(flags)
        parser = self.trt.OnnxParser(network, self.log)
        if not parser.parse(content, path):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            lines = [_parser_error(error, content) for error in errors] or self._last_lines()
            text = "; ".join(lines)
            raise RunnerError(
                OUT_OF_MEMORY if NO_MEMORY.search(text) else UNSUPPORTED,
                f"TensorRT cannot read {path}: {text}. Change or replace what it names, or "
                f"measure with another runtime.",
            )
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            _check_static(tensor.name, tensor.shape)
        return network, parser

    def _buffers(
        self, engine: Any, context: Any, cuda: Cuda, given: Mapping[str, np.ndarray]
    ) -> list[tuple[object, int]]:
        """Memory and address of every input and output; freed with the list."""
        buffers = []
        generator = np.random.RandomState(0)
        by_name = hasattr(context, "execute_async_v3")
        for name, shape, dtype, is_input in _tensors(self.trt, engine, by_name=by_name):
            _check_static(name, shape)
            values = given.get(name) if is_input else None
            if values is not None:  # whole numbers
                values = values.reshape(shape).astype(dtype.lower())
            elif is_input:
                values = _random(generator, name, shape, dtype)
            n_bytes = int(np.prod(shape)) * ITEM_BYTES.get(dtype, 8)
            buffers.append(cuda.buffer(max(n_bytes, 1), values))
            if by_name:
                context.set_tensor_address(name, buffers[-1][1])
        return buffers

    def _launcher(
        self, context: Any, buffers: list[tuple[object, int]], cuda: Cuda
    ) -> Callable[[], None]:
        """What starts one execution, and holds the buffers; it looks nothing up when timed."""
        if hasattr(context, "execute_async_v3"):
            execute = partial(context.execute_async_v3, cuda.handle)
        else:
            addresses = [address for _, address in buffers]
            execute = partial(context.execute_async_v2, addresses, cuda.handle)

        def launch(_held: object = buffers) -> None:
            if not execute():
                raise self._failed("TensorRT did not start the engine")

        return launch

    def _layers(self, serialized: Any) -> dict[str, int]:
        """How many layers put out which type; as logged where no engine can be loaded."""
        logged = self.log.layers
        if hasattr(self.trt, "EngineInspector") and self.cuda:
            engine = self.trt.Runtime(self.log).deserialize_cuda_engine(serialized)
            if engine is not None:
                inspector = engine.create_engine_inspector()
                as_json = self.trt.LayerInformationFormat.JSON
                return count_precisions(inspector.get_engine_information(as_json))
        return count_logged_precisions(logged)

    def _made(self, make: Callable[[], Any], what: str) -> Any:
        """What `make` makes; pybind11 raises TypeError where TensorRT returned nothing."""
        try:
            return make()
        except TypeError as err:
            text = f"{what} cannot be made ({err})"
            if self.cuda is None:
                raise RunnerError(RUNTIME_MISSING, f"{self.no_gpu} {text}.") from err
            raise self._failed(text) from err

    def _last_lines(self) -> list[str]:
        return list(self.log.errors)[-N_LINES_QUOTED:]

    def _failed(self, what: str, err: Exception | None = None) -> RunnerError:
        lines = ([str(err)] if err else []) + self._last_lines()
        no_memory = NO_MEMORY.search("\n".join([*lines, *self.log.errors]))
        return RunnerError(OUT_OF_MEMORY if no_memory else FAILED, f"{what}: {'; '.join(lines)}")


def _is_rtx(trt: Any) -> bool:
    return bool(trt.__name__.startswith("tensorrt_rtx"))


def configure(trt: Any, config: Any, workspace_mib: int | None, *, fp16: bool) -> None:
    """Sets what to build with; the inspector knows types only of an engine built DETAILED."""
    if workspace_mib is not None and hasattr(config, "set_memory_pool_limit"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(workspace_mib) * 2**20)
    elif workspace_mib is not None:
        config.max_workspace_size = int(workspace_mib) * 2**20
    if hasattr(trt, "ProfilingVerbosity") and hasattr(trt.ProfilingVerbosity, "DETAILED"):
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if fp16:
        config.set_flag(trt.BuilderFlag.FP16)


def load_timing_cache(trt: Any, config: Any, path: str | None) -> str | None:
    """Lets `config` use the timings in `path`, or new ones; returns which, None if not asked.

    TensorRT-RTX times nothing while it builds: its caches are there in name, and do nothing.
    """
    if path is None:
        return None
    if not hasattr(config, "create_timing_cache") or _is_rtx(trt):
        return NO_CACHES
    content = _read(path) if os.path.isfile(path) else b""
    if content:
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):  # False: no mismatch
            return KEPT
    config.set_timing_cache(config.create_timing_cache(b""), False)
    return REFUSED if content else NEW


def _tensors(
    trt: Any, engine: Any, *, by_name: bool
) -> Iterator[tuple[str, tuple[int, ...], str, bool]]:
    """Name, shape, type and whether it is an input, in the order of bindings."""
    if by_name:
        for name in [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]:
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            shape = tuple(engine.get_tensor_shape(name))
            yield name, shape, engine.get_tensor_dtype(name).name, is_input
    else:
        for i in range(engine.num_bindings):
            shape, is_input = tuple(engine.get_binding_shape(i)), engine.binding_is_input(i)
            yield engine.get_binding_name(i), shape, engine.get_binding_dtype(i).name, is_input


def _random(
    generator: np.random.RandomState, name: str, shape: tuple[int, ...], dtype: str
) -> np.ndarray:
    """Normal random numbers; zeros would hide slow paths."""
    if dtype not in INPUT_TYPES:
        raise RunnerError(
            UNSUPPORTED, f"Input {name} is {dtype}; expected {', '.join(sorted(INPUT_TYPES))}."
        )
    return generator.standard_normal(shape).astype(INPUT_TYPES[dtype])


def _check_static(name: str, shape: Any) -> None:
    sides = list(shape)
    if any(side < 0 for side in sides):
        raise RunnerError(
            UNSUPPORTED,
            f"{name} has the shape {sides}; latency is measured at a static shape. Export with "
            f"a fixed batch size.",
        )


def _parser_error(error: Any, content: bytes) -> str:
    """One error of the ONNX parser with its node; 8.x only tells the node's position."""
    position, name, operator = error.node(), "", ""
    if hasattr(error, "node_name"):
        name, operator = error.node_name(), error.node_operator()
    elif position >= 0:
        import onnx

        nodes = onnx.load_from_string(content).graph.node
        if position < len(nodes):
            name, operator = nodes[position].name, nodes[position].op_type
    where = f"node {position} {name!r} ({operator}): " if position >= 0 else ""
    return f"{where}{error.desc()} [{error.code()}]"


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as err:
        raise RunnerError(FAILED, f"{path} cannot be read: {err}") from err


def _write(path: str, content: Any) -> None:
    """Whole or not at all; `content` is anything with a buffer."""
    partial = f"{path}.{os.getpid()}.partial"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(content)
            os.replace(partial, path)
        finally:
            if os.path.exists(partial):
                os.remove(partial)
    except OSError as err:
        raise RunnerError(FAILED, f"{path} cannot be written: {err}") from err


if __name__ == "__main__":
    sys.exit(serve(TensorRT))
