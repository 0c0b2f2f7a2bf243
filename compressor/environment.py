"""What a run depended on beside its inputs: versions, machine, commit."""

import contextlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from compressor import __version__
from compressor.values import Data, LoadedModel, Target

VERSION = __version__


def describe_environment(target: Target, loaded: LoadedModel, data: Data) -> dict[str, object]:
    """Versions, machine, and hashes of model and data, for `result.json`."""
    packages = ("torch", "onnx", "onnxruntime", "nni", "botorch", "optuna", "numpy")
    versions = {name: metadata.version(name) for name in packages}
    return {
        "versions": {"compressor": VERSION, "python": platform.python_version(), **versions},
        "cpu": cpu_name(),
        "threads": target.n_threads,
        "channel_step": f"{target.step} ({target.step_source})",
        "git": _git_commit(),
        "model_sha256": loaded.provenance["sha256"],
        "data_fingerprint": data.fingerprint,
    }


def cpu_name() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the project that the run was started in; None outside a repository."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=5
        )
        return done.stdout.strip()
    return None
