"""Device profile -> Target. A profile is a TOML file; adding a device is adding a file.

`profiles` says where they lie, `schema` what they may say.
"""

from compressor.latency import runner
from compressor.latency.schema import BYTES_PER_NUMBER, ONNXRUNTIME, Chosen, Runtime, choose
from compressor.values import Basis, Figure, Roofline, Target


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
    chosen = choose(name, device=device, precision=precision, estimate=estimate)
    profile = chosen.profile
    return Target(
        name=chosen.name,
        description=profile.description,
        runtime=profile.runtime.kind,
        provider=_provider(profile.runtime),
        n_threads=profile.runtime.n_threads,
        precision=chosen.precision,
        step=chosen.step,
        step_source=chosen.step_source,
        opset=profile.onnx.opset,
        max_opset=profile.onnx.max_opset or profile.onnx.opset,
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
        roofline=_roofline(chosen),
        power_advice=profile.power.advice,
        sources=tuple(f"{key}: {value}" for key, value in profile.sources.items()),
    )


def _provider(runtime: Runtime) -> str:
    return (runtime.provider or runner.CPU) if runtime.kind == ONNXRUNTIME else ""


def _roofline(chosen: Chosen) -> Roofline | None:
    if chosen.figures is None:
        return None
    reach, memory = chosen.figures
    assert reach.ops_per_s is not None
    assert reach.basis is not None
    return Roofline(
        ops_per_s=Figure(reach.ops_per_s, reach.basis, reach.source),
        bytes_per_s=Figure(memory.bytes_per_s, memory.basis, memory.source),
        bytes_per_number=BYTES_PER_NUMBER[chosen.precision],
    )
