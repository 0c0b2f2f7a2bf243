"""A device whose models a runner process runs: ONNX Runtime anywhere, or TensorRT here."""

import logging
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from compressor.errors import (
    DeviceLostError,
    MeasurementError,
    ProtocolError,
    UnreachableError,
)
from compressor.latency import runner, timing
from compressor.latency.given import Given, as_file, whole_numbers
from compressor.latency.host import Host, LocalHost
from compressor.latency.machine import Model, checked_machine, content_of, mismatch
from compressor.latency.process import Runner
from compressor.latency.schema import TENSORRT
from compressor.latency.ssh import SshHost
from compressor.latency.timing import FINAL, Effort
from compressor.values import KernelTime, PairedLatency, SessionPair, Target

NOTHING: Given = {}
N_PROFILED = 50  # runs; the profiler slows each node by microseconds
# A GPU's clocks take longer to rise than a CPU's caches to fill.
N_WARMUP_GPU, WARMUP_GPU_S = 50, 10.0
START_S = 30.0  # of small requests, which may find the runner not yet started

_KERNELS, _PAIR = TypeAdapter(tuple[KernelTime, ...]), TypeAdapter(SessionPair)
_MEASURED = tuple(field.name for field in fields(SessionPair) if field.name != "interleaved")

Count = Annotated[int, Field(ge=0, lt=2**63)]
Figure = Annotated[float, Field(allow_inf_nan=False)]
T = TypeVar("T")


# What is read of these answers; more may stand in them.
class _Gpu(TypedDict, total=False):
    name: str


class _Hello(TypedDict, total=False):
    version: str
    machine: str
    model: str
    instruction_set: str
    gpu: _Gpu | None


class _State(TypedDict, total=False):
    clocks: dict[str, Figure]
    governor: str
    power_mode: str
    throttled: str
    busy_ticks: Count
    stolen_ticks: Count


class _Built(TypedDict, total=False):
    warnings: list[str]


_HELLO, _STATE, _BUILT = TypeAdapter(_Hello), TypeAdapter(_State), TypeAdapter(_Built)

logger = logging.getLogger(__name__)


class RunnerDevice:
    """A runner process on a host: ONNX Runtime anywhere, or TensorRT's Python API here."""

    def __init__(self, host: Host, target: Target, real: Given = NOTHING) -> None:
        self._host = host
        self._target = target
        self._real = real
        self._inputs: dict[str, str] = {}  # file of a model -> file of what it is given
        self._is_tensorrt = target.runtime == TENSORRT
        self._runner = Runner(self._start, host.label, getattr(host, "refusal", _never))
        self._engines: dict[str, str] = {}

    def describe(self) -> Mapping[str, Any]:
        """See `Device.describe`."""
        hello = self._runner.begin()
        self._checked(_HELLO, hello)
        state = self._state()
        described = {"host": self._host.label, **hello, "state": state}
        return checked_machine(self._host, described, mismatch(self._target, hello))

    def compare(
        self, original: Model, candidate: Model, *, effort: Effort = FINAL, seed: int = 0
    ) -> PairedLatency:
        """See `Device.compare`."""
        contents = content_of(original), content_of(candidate)
        files = [self._host.put(content, "model.onnx") for content in contents]
        try:
            prepared = [self._built(file) if self._is_tensorrt else file for file in files]
            request = {
                "do": "pair",
                "original": prepared[0],
                "candidate": prepared[1],
                "options": self._options() | self._given(contents[0], files[0]),
                "seconds": effort.pair_s,
                "limit_s": effort.pair_limit_s,
                "min_rounds": effort.min_rounds,
                "max_rounds": effort.max_rounds,
                "n_warmup": N_WARMUP_GPU if self._on_gpu else effort.n_warmup,
                "warmup_s": WARMUP_GPU_S if self._on_gpu else effort.warmup_s,
            }
            before = self._state()
            pair = timing.compare(partial(self._time_pair, request), effort, seed=seed)
            after = self._state()
        finally:
            if files[1] != files[0]:
                self._forget(files[1])
        return timing.with_conditions(pair, timing.state_changes(before, after))

    def profile(self, model: Model) -> tuple[KernelTime, ...]:
        """See `Device.profile`; of ONNX Runtime only."""
        if self._is_tensorrt:
            return ()
        content = content_of(model)
        file = self._host.put(content, "model.onnx")
        request = {
            "do": "profile",
            "model": file,
            "options": self._options() | self._given(content, file),
            "n_runs": N_PROFILED,
        }
        try:
            answer = self._runner.ask(request, limit_s=self._target.run_limit_s)
            return _KERNELS.validate_python(
                [{"name": name, "kind": kind, "ms": ms} for name, kind, ms in answer["nodes"]]
            )
        except (KeyError, TypeError, ValueError) as err:
            raise MeasurementError(f"{self._host.label} answered without a profile.") from err
        finally:
            self._forget(file)

    def reconnect(self) -> None:
        """See `Device.reconnect`."""
        self._runner.stop()
        if isinstance(self._host, SshHost):
            self._host.reconnect()
        self._runner.begin()

    def close(self) -> None:
        """See `Device.close`."""
        self._runner.close()
        self._host.close()

    @property
    def _on_gpu(self) -> bool:
        return self._is_tensorrt or self._target.provider in runner.BOUND_DEVICES

    def _start(self, log: Path) -> Any:
        arguments = []
        if not self._on_gpu:  # a GPU's driver reserves far more addresses than it uses
            arguments = ["--memory-mib", str(self._target.memory_mib or 0)]
        if isinstance(self._host, LocalHost):
            module = "tensorrt_runner" if self._is_tensorrt else "runner"
            command = [*self._host.python(), "-m", f"compressor.latency.{module}"]
        else:
            path = self._host.put(Path(runner.__file__).read_bytes(), "runner.py")
            command = [*self._host.python(), "-u", path]
            arguments += ["--lock", f"{self._host.cache}/lock"]
        return self._host.start([*command, *arguments], log=log)

    def _options(self) -> dict[str, object]:
        target = self._target
        if not self._is_tensorrt:
            return {"provider": target.provider, "n_threads": target.n_threads}
        version = str(self._runner.hello.get("version", ""))
        return {
            "precision": target.precision,
            "workspace_mib": target.workspace_mib,
            "timing_cache": f"{self._host.cache}/timing-{target.name}-{version}.cache",
        }

    def _given(self, content: bytes, file: str) -> dict[str, object]:
        """The option that names what inputs of whole numbers get; none where there are none."""
        if file not in self._inputs:
            values = whole_numbers(content, self._real)
            self._inputs[file] = self._host.put(as_file(values), "inputs.npz") if values else ""
        return {"inputs": self._inputs[file]} if self._inputs[file] else {}

    def _time_pair(self, request: Mapping[str, object], seed: int) -> SessionPair:
        answer = self._runner.ask({**request, "seed": seed}, limit_s=self._target.run_limit_s)
        try:
            return _PAIR.validate_python({key: answer[key] for key in _MEASURED})
        except (KeyError, TypeError, ValueError) as err:
            raise MeasurementError(
                f"{self._host.label} answered without times: {sorted(answer)!r:.200}"
            ) from err

    def _state(self) -> Mapping[str, Any]:
        state = self._runner.ask({"do": "state"}, limit_s=START_S)
        self._checked(_STATE, state)
        return state

    def _checked(self, form: TypeAdapter[T], answer: Mapping[str, Any]) -> T:
        """What is read of an answer.

        Raises:
            ProtocolError: It has another form.
        """
        try:
            return form.validate_python(answer)
        except ValidationError as err:
            fault = err.errors()[0]
            raise ProtocolError(
                f"{self._host.label} answered {'.'.join(map(str, fault['loc']))} = "
                f"{fault['input']!r:.120}: {fault['msg']}."
            ) from err

    def _built(self, file: str) -> str:
        """The engine of an ONNX file, built where it was not yet."""
        if file not in self._engines:
            self._runner.begin()
            engine = f"{file}.engine"
            reply = self._runner.ask(
                {"do": "build", "model": file, "engine": engine, "options": self._options()},
                limit_s=self._target.build_limit_s,
            )
            for remark in self._checked(_BUILT, reply).get("warnings", ()):
                logger.warning("%s", remark)
            self._engines[file] = engine
        return self._engines[file]

    def _forget(self, file: str) -> None:
        """A board has no room for every candidate of a search."""
        try:
            self._host.remove(file)
            engine = self._engines.pop(file, None)
            if engine is not None:
                self._host.remove(engine)
        except (DeviceLostError, UnreachableError):
            logger.debug("%s is left on %s", file, self._host.label)


def _never(_code: int, _log: str) -> None:
    """A process on this machine has no connection to lose."""
