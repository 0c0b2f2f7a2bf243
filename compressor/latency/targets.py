"""Device profile -> Target. A profile is a TOML file in `hardware_profiles`, or the user's own."""

import platform
import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compressor.errors import ConfigError, unknown_name
from compressor.values import Target

AUTO = "auto"


Step = Annotated[int, Field(ge=1, le=1024)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Runtime(_Section):
    kind: Literal["onnxruntime"]
    provider: str = "CPUExecutionProvider"
    n_threads: int = Field(ge=1, le=1024)


class _Channels(_Section):
    step: Literal["auto"] | Step
    step_by_instruction_set: dict[str, Step] = Field(default_factory=dict)


class _Onnx(_Section):
    opset: int = Field(ge=9, le=20)


class _Profile(_Section):
    description: str
    runtime: _Runtime
    channels: _Channels
    onnx: _Onnx
    sources: dict[str, str] = Field(default_factory=dict)


def target_names() -> tuple[str, ...]:
    """Names of the profiles that come with the package, sorted."""
    files = resources.files("compressor.hardware_profiles").iterdir()
    return tuple(sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml")))


def load_target(name: str) -> Target:
    """The profile called `name`, or the one in the TOML file at the path `name`.

    Raises:
        ConfigError: No such profile, or it is broken; the message names the key.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"No device profile at {path}.")
        try:
            text, name = path.read_text(encoding="utf-8"), path.stem
        except (OSError, UnicodeDecodeError) as err:
            raise ConfigError(f"Profile {path} cannot be read: {err}.") from err
    elif name in target_names():
        text = (resources.files("compressor.hardware_profiles") / f"{name}.toml").read_text()
    else:
        raise ConfigError(
            f"{unknown_name('target', name, target_names())} "
            f"A path to your own profile (.toml) works too."
        )
    try:
        profile = _Profile.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ValidationError) as err:
        raise ConfigError(f"Profile {name} is broken: {_first_fault(err)}.") from err
    step, step_source = _step(name, profile.channels)
    return Target(
        name=name,
        description=profile.description,
        runtime=profile.runtime.kind,
        provider=profile.runtime.provider,
        n_threads=profile.runtime.n_threads,
        step=step,
        step_source=step_source,
        opset=profile.onnx.opset,
        sources=tuple(f"{key}: {value}" for key, value in profile.sources.items()),
    )


def instruction_set() -> str:
    """Widest vector instructions of this CPU: "AVX512", "AVX2", "NEON" or "OTHER"."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "NEON"
    capability = torch.backends.cpu.get_cpu_capability()
    return capability if capability in ("AVX512", "AVX2") else "OTHER"


def _step(name: str, channels: _Channels) -> tuple[int, str]:
    if channels.step != AUTO:
        return int(channels.step), "profile"
    found = instruction_set()
    step = channels.step_by_instruction_set.get(found)
    if step is None:
        raise ConfigError(
            f"Profile {name}: channels.step is 'auto' but step_by_instruction_set has no "
            f"entry for this CPU ({found}); it has {sorted(channels.step_by_instruction_set)}."
        )
    return step, f"{found} on this CPU"


def _first_fault(err: tomllib.TOMLDecodeError | ValidationError) -> str:
    if isinstance(err, tomllib.TOMLDecodeError):
        return str(err)
    fault = err.errors()[0]
    return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']} (got {fault['input']!r})"
