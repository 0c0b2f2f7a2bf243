"""Device profile -> Target. A profile is a TOML file; adding a device is adding a file.

`profiles` says where they lie.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compressor.errors import ConfigError, unknown_name
from compressor.files import parsed_json, parsed_toml, read_text
from compressor.latency import runner
from compressor.latency.host import local_cache
from compressor.latency.profiles import profile_text
from compressor.values import Basis, Figure, Roofline, Target

AUTO = "auto"
PROBE_SCHEMA = 1
ONNXRUNTIME, TENSORRT, TRTEXEC = "onnxruntime", "tensorrt", "trtexec"  # kinds of runtimes
BYTES_PER_NUMBER = {"fp32": 4, "fp16": 2, "int8": 1}

Provider = Literal[
    "CPUExecutionProvider",
    "CUDAExecutionProvider",
    "TensorrtExecutionProvider",
    "OpenVINOExecutionProvider",
    "XnnpackExecutionProvider",
    "QNNExecutionProvider",
]
Precision = Literal["fp32", "fp16"]
Step = Annotated[int, Field(ge=1, le=1024)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Evidence = Literal["datasheet", "computed", "measured", "unverified"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Match(_Section):
    machine: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    instruction_set: tuple[str, ...] = ()


class _Runtime(_Section):
    kind: Literal["onnxruntime", "tensorrt", "trtexec"]
    provider: Provider | None = None
    n_threads: int = Field(default=1, ge=1, le=1024)
    precision: Precision = "fp32"
    trtexec: tuple[str, ...] = ("trtexec", "/usr/src/tensorrt/bin/trtexec")

    @model_validator(mode="after")
    def _fits(self) -> "_Runtime":
        if self.kind != ONNXRUNTIME and self.provider is not None:
            raise ValueError(f"provider belongs to kind {ONNXRUNTIME!r}, and to no other")
        return self


class _Precision(_Section):
    """Either what the device reaches at most, or why it cannot."""

    ops_per_s: Positive | None = None
    basis: Evidence | None = None
    source: str = ""
    unsupported: str = ""

    @model_validator(mode="after")
    def _is_told(self) -> "_Precision":
        if bool(self.unsupported) == (self.ops_per_s is not None):
            raise ValueError("give either ops_per_s or unsupported")
        if self.ops_per_s is not None and not (self.basis and self.source):
            raise ValueError("a figure needs its basis and its source")
        return self


class _Channels(_Section):
    step: Literal["auto"] | Step
    source: str = ""
    step_by_instruction_set: dict[str, Step] = Field(default_factory=dict)


class _Onnx(_Section):
    opset: int = Field(ge=9, le=20)
    ir: int = Field(default=13, ge=3, le=13)


class _Memory(_Section):
    bytes_per_s: Positive
    basis: Evidence
    source: str = Field(min_length=1)
    mib: int | None = Field(default=None, ge=1)


class _Limits(_Section):
    workspace_mib: int = Field(default=512, ge=1)
    memory_mib: int | None = Field(default=None, ge=64)
    build_s: Positive = 900.0
    run_s: Positive = 120.0


class _Power(_Section):
    advice: tuple[str, ...] = ()


class _Profile(_Section):
    description: str
    match: _Match = Field(default_factory=_Match)
    runtime: _Runtime
    precision: dict[Literal["fp32", "fp16", "int8"], _Precision] = Field(default_factory=dict)
    channels: _Channels
    onnx: _Onnx
    memory: _Memory | None = None
    limits: _Limits = Field(default_factory=_Limits)
    power: _Power = Field(default_factory=_Power)
    sources: dict[str, str] = Field(default_factory=dict)


def load_target(
    name: str,
    *,
    device: str | None = None,
    precision: str | None = None,
    estimate: bool = False,
) -> Target:
    """The profile called `name`, or the one in the TOML file at the path `name`.

    Args:
        name: Of a profile, or the path of one (`.toml`).
        device: `ssh://user@host[:port]` where the device is not this machine.
        precision: "fp32" or "fp16" in place of the profile's own.
        estimate: Latency is to be estimated from the profile's figures, not measured.

    Raises:
        ConfigError: No such profile, or it is broken (the message names file, key and what is
            allowed); or the device cannot do `precision`, or has no figures to estimate from.
    """
    text, name, where = profile_text(name)
    try:
        profile = _Profile.model_validate(parsed_toml(text))
    except ValueError as err:
        raise ConfigError(f"Profile {where} is broken: {_first_fault(err)}.") from err
    chosen = _precision(name, profile, precision)
    roofline = _roofline(profile, chosen)
    if estimate and roofline is None:
        raise ConfigError(
            f"Profile {name} has no figures to estimate from ([precision.{chosen}], [memory]); "
            f"measure on the device instead."
        )
    step, step_source = probed(probe_file(name, device, chosen)) or _step(name, profile.channels)
    return Target(
        name=name,
        description=profile.description,
        runtime=profile.runtime.kind,
        provider=_provider(profile.runtime),
        n_threads=profile.runtime.n_threads,
        precision=chosen,
        step=step,
        step_source=step_source,
        opset=profile.onnx.opset,
        max_ir=profile.onnx.ir,
        device=device,
        basis=Basis.ESTIMATE if estimate else Basis.MEASURED,
        machines=profile.match.machine,
        models=profile.match.model,
        instruction_sets=profile.match.instruction_set,
        trtexec=profile.runtime.trtexec,
        workspace_mib=profile.limits.workspace_mib,
        memory_mib=profile.limits.memory_mib,
        build_limit_s=profile.limits.build_s,
        run_limit_s=profile.limits.run_s,
        roofline=roofline,
        power_advice=profile.power.advice,
        sources=tuple(f"{key}: {value}" for key, value in profile.sources.items()),
    )


def _provider(runtime: _Runtime) -> str:
    return (runtime.provider or runner.CPU) if runtime.kind == ONNXRUNTIME else ""


def _precision(name: str, profile: _Profile, wanted: str | None) -> Precision:
    known = get_args(Precision)
    chosen = wanted or profile.runtime.precision
    told = profile.precision.get(chosen)  # type: ignore[call-overload]
    if told is not None and told.unsupported:
        raise ConfigError(f"{name} cannot do {chosen}: {told.unsupported}.")
    if told is None and chosen in known and chosen != profile.runtime.precision:
        raise ConfigError(f"Profile {name} does not say that the device can do {chosen}.")
    for each in known:
        if chosen == each:
            return each  # type: ignore[no-any-return]
    raise ConfigError(
        f"{unknown_name('precision', chosen, known)} Channels are removed; numbers are not "
        f"quantised."
    )


def _roofline(profile: _Profile, precision: Precision) -> Roofline | None:
    peak = profile.precision.get(precision)
    if peak is None or peak.ops_per_s is None or peak.basis is None or profile.memory is None:
        return None
    memory = profile.memory
    return Roofline(
        ops_per_s=Figure(peak.ops_per_s, peak.basis, peak.source),
        bytes_per_s=Figure(memory.bytes_per_s, memory.basis, memory.source),
        bytes_per_number=BYTES_PER_NUMBER[precision],
    )


def probe_file(name: str, device: str | None, precision: str) -> Path:
    """Where the staircase measured on a target's device is kept."""
    here = runner.describe()
    where = device or f"{here['model']} {here['instruction_set']}"
    digest = hashlib.sha256(f"{where} {precision}".encode()).hexdigest()[:12]
    return local_cache() / "probes" / f"{name}-{digest}.json"


def probed(path: Path) -> tuple[int, str] | None:
    """(step, why) where the device was probed and the file at `path` says so.

    Raises:
        ConfigError: The file is there but says nothing that can be used.
    """
    if not path.is_file():
        return None
    try:
        content = parsed_json(read_text(path))
        step, date = content["step"], content["date"]
        if content["schema"] != PROBE_SCHEMA or not isinstance(step, int) or not 1 <= step <= 1024:
            raise ValueError(f"schema {content['schema']!r}, step {step!r}")
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ConfigError(f"{path} is no probe ({err}); delete it, or probe again.") from err
    return step, f"probed {date}"


def _step(name: str, channels: _Channels) -> tuple[int, str]:
    if channels.step != AUTO:
        return int(channels.step), channels.source or "profile"
    found = runner.instruction_set()
    step = channels.step_by_instruction_set.get(found)
    if step is None:
        raise ConfigError(
            f"Profile {name}: channels.step is 'auto' but step_by_instruction_set has no "
            f"entry for this CPU ({found}); it has {sorted(channels.step_by_instruction_set)}."
        )
    return step, f"{found} on this CPU"


def _first_fault(err: ValueError) -> str:
    if not isinstance(err, ValidationError):
        return str(err)
    fault = err.errors()[0]
    message = fault["msg"].removeprefix("Value error, ")
    return f"{'.'.join(map(str, fault['loc']))}: {message} (got {fault['input']!r})"
