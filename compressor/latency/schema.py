"""What a device profile may say, and what follows from it for one run.

This is apart from `targets`, whose values need torch, so that a profile is checked without it.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from compressor.errors import ConfigError, unknown_name
from compressor.files import parsed_json, parsed_toml, read_text
from compressor.latency import runner
from compressor.latency.host import local_cache
from compressor.latency.profiles import is_path, profile_text, user_profiles
from compressor.printable import checked_text

AUTO = "auto"
PROBE_SCHEMA = 1
ONNXRUNTIME, TENSORRT, TRTEXEC = "onnxruntime", "tensorrt", "trtexec"  # kinds of runtimes
TRTEXEC_AT = ("trtexec", "/usr/src/tensorrt/bin/trtexec")  # on the PATH, and where NVIDIA puts it
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
Rate = Annotated[float, Field(ge=1, le=1e18)]  # a second
LimitS = Annotated[float, Field(gt=0, le=1e6)]
MiB = Annotated[int, Field(ge=1, le=2**30)]
Text = Annotated[str, AfterValidator(checked_text)]
Evidence = Literal["datasheet", "computed", "measured", "unverified"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Match(_Section):
    machine: tuple[str, ...] = ()
    model: tuple[str, ...] = ()
    instruction_set: tuple[str, ...] = ()


class Runtime(_Section):
    """What measures and serves on the device."""

    kind: Literal["onnxruntime", "tensorrt", "trtexec"]
    provider: Provider | None = None
    n_threads: int = Field(default=1, ge=1, le=1024)
    precision: Precision = "fp32"
    trtexec: tuple[Text, ...] = TRTEXEC_AT

    @model_validator(mode="after")
    def _fits(self) -> "Runtime":
        if self.kind != ONNXRUNTIME and self.provider is not None:
            raise ValueError(f"provider belongs to kind {ONNXRUNTIME!r}, and to no other")
        return self


class Reach(_Section):
    """Either what the device reaches at most, or why it cannot."""

    ops_per_s: Rate | None = None
    basis: Evidence | None = None
    source: str = ""
    unsupported: str = ""

    @model_validator(mode="after")
    def _is_told(self) -> "Reach":
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
    max_opset: int | None = Field(default=None, ge=9, le=20)
    ir: int = Field(default=13, ge=3, le=13)

    @model_validator(mode="after")
    def _fits(self) -> "_Onnx":
        if self.max_opset is not None and self.max_opset < self.opset:
            raise ValueError(f"max_opset must be opset or more; got {self.max_opset}")
        return self


class Memory(_Section):
    """How fast the main memory is, and how large."""

    bytes_per_s: Rate
    basis: Evidence
    source: str = Field(min_length=1)
    mib: MiB | None = None


class _Limits(_Section):
    workspace_mib: MiB = 512
    memory_mib: int | None = Field(default=None, ge=64, le=2**30)
    build_s: LimitS = 900.0
    run_s: LimitS = 120.0


class _Power(_Section):
    advice: tuple[str, ...] = ()


class Profile(_Section):
    """One TOML file."""

    description: str
    match: _Match = Field(default_factory=_Match)
    runtime: Runtime
    precision: dict[Literal["fp32", "fp16", "int8"], Reach] = Field(default_factory=dict)
    channels: _Channels
    onnx: _Onnx
    memory: Memory | None = None
    limits: _Limits = Field(default_factory=_Limits)
    power: _Power = Field(default_factory=_Power)
    sources: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Chosen:
    """A profile, and what it comes to on one device.

    Attributes:
        name: Of the profile.
        profile: What it says.
        precision: The one that is measured.
        figures: What latency can be estimated from; None where the profile lacks it.
        step: Channel granularity that runs fast.
        step_source: Why it is that step, in words.
    """

    name: str
    profile: Profile
    precision: Precision
    figures: tuple[Reach, Memory] | None
    step: int
    step_source: str


def choose(
    name: str, *, device: str | None = None, precision: str | None = None, estimate: bool = False
) -> Chosen:
    """What `load_target` makes a target of, for the same arguments.

    Raises:
        ConfigError: As `load_target`.
    """
    is_by_path = is_path(name)
    text, name, where = profile_text(name)
    try:
        profile = Profile.model_validate(parsed_toml(text))
    except ValueError as err:
        raise ConfigError(f"Profile {where} is broken: {_first_fault(err)}.") from err
    if is_by_path and not set(profile.runtime.trtexec) <= set(TRTEXEC_AT):
        raise ConfigError(
            f"Profile {where} names a program that would be run: trtexec = "
            f"{list(profile.runtime.trtexec)}. If you trust it, copy the profile to "
            f"{user_profiles()} and give its name, {name}; only profiles there may."
        )
    chosen = _precision(name, profile, precision)
    figures = _figures(profile, chosen)
    if estimate and figures is None:
        raise ConfigError(
            f"Profile {name} has no figures to estimate from ([precision.{chosen}], [memory]); "
            f"measure on the device instead."
        )
    step, step_source = probed(probe_file(name, device, chosen)) or _step(name, profile.channels)
    return Chosen(name, profile, chosen, figures, step, step_source)


def _precision(name: str, profile: Profile, wanted: str | None) -> Precision:
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


def _figures(profile: Profile, precision: Precision) -> tuple[Reach, Memory] | None:
    reach = profile.precision.get(precision)
    if reach is None or reach.ops_per_s is None or profile.memory is None:
        return None
    return reach, profile.memory


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
    return f"{'.'.join(map(str, fault['loc']))}: {message} (got {fault['input']!r:.120})"
