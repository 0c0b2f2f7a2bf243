"""What is kept on disk. Files are written under another name, synced and renamed."""

import contextlib
import io
import itertools
import json
import logging
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import tomli_w
import torch
from pydantic import TypeAdapter, ValidationError

from compressor.errors import ConfigError, RunFolderError
from compressor.files import write_whole
from compressor.values import Data, LoadedModel, Result, Target

VERSION = metadata.version("compressor")
SCHEMA = 1
RESULT, STUDY, CONFIG, LOG = "result.json", "study.db", "config.toml", "log.txt"
MODEL_ONNX, ORIGINAL_ONNX, MODEL_PT = "model.onnx", "original.onnx", "model.pt"

_RESULT = TypeAdapter(Result)


@dataclass(frozen=True)
class RunFolder:
    """One run's files; see `create` and `Result`."""

    path: Path

    @property
    def study(self) -> Path:
        """The Optuna study."""
        return self.path / STUDY

    @property
    def original_onnx(self) -> Path:
        """The original, exported as `model_onnx` is, so that anyone can measure the pair."""
        return self.path / ORIGINAL_ONNX

    @property
    def model_onnx(self) -> Path:
        """The compressed model; there only when it was proven and measured to be faster."""
        return self.path / MODEL_ONNX

    def within(self, name: str, settings: Mapping[str, object]) -> "RunFolder":
        """A new run folder in this one."""
        return create(self.path / name, name, settings)

    @property
    def training(self) -> Path:
        """Where the last fine-tuning stands; gone when the run is finished."""
        return self.path / ".training.pt"

    @contextlib.contextmanager
    def unproven_onnx(self) -> Iterator[Path]:
        """Where the compressed model lies until it is proven; gone at the end of the context."""
        path = self.path / f".{MODEL_ONNX}.unproven"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def write_checkpoint(self, content: Mapping[str, object]) -> None:
        """`model.pt`; loads with `torch.load(..., weights_only=True)`."""
        buffer = io.BytesIO()
        torch.save(dict(content), buffer)
        write_whole(self.path / MODEL_PT, buffer.getvalue())

    def write_result(self, result: Result) -> None:
        """`result.json`; written last, so a folder that has one is complete."""
        text = json.dumps(to_json(result), indent=2, allow_nan=False) + "\n"
        write_whole(self.path / RESULT, text)


def create(wanted: Path | None, default_name: str, settings: Mapping[str, object]) -> RunFolder:
    """An empty run folder holding `config.toml`.

    Args:
        wanted: Folder that the user named; it may exist but must be empty. None takes the first
            free `runs/NAME`, `runs/NAME-2`, ...
        default_name: NAME.
        settings: What the run was asked for.

    Raises:
        ConfigError: `wanted` holds something already.
        RunFolderError: The folder cannot be made or written.
    """
    try:
        if wanted is None:
            path = _first_free(Path("runs"), default_name)
        else:
            check_free(wanted)
            path = wanted
            path.mkdir(parents=True, exist_ok=True)
        write_whole(path / CONFIG, tomli_w.dumps(dict(settings)))
    except OSError as err:
        raise RunFolderError(f"The run folder cannot be written: {err}.") from err
    return RunFolder(path)


def check_free(wanted: Path) -> None:
    """Raises `ConfigError` where the folder `wanted` holds something already."""
    if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
        what = "another run" if (wanted / CONFIG).exists() else "other files"
        if not wanted.is_dir():
            raise ConfigError(f"--out {wanted} is a file; name a folder that is empty or new.")
        raise ConfigError(f"--out {wanted} holds {what}; name a folder that is empty or new.")


@contextlib.contextmanager
def logged(folder: RunFolder) -> Iterator[None]:
    """Everything compressor logs goes to the folder's `log.txt` meanwhile."""
    handler = logging.FileHandler(folder.path / LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    package = logging.getLogger("compressor")
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.setLevel(level)
        package.removeHandler(handler)
        handler.close()


def read_result(path: Path) -> Result:
    """The result of the finished run in the folder `path`.

    Raises:
        RunFolderError: There is none, or it is not one of ours.
    """
    file = path / RESULT
    if not file.is_file():
        raise RunFolderError(f"{path} has no {RESULT}: no run there, or one that is not finished.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = content.pop("schema", None) if isinstance(content, dict) else None
        if found != SCHEMA:
            raise RunFolderError(f"{file} has schema {found}; this version reads {SCHEMA}.")
        return _RESULT.validate_python(content | {"out": path})
    except ValidationError as err:
        fault = err.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise RunFolderError(f"{file} is not a result of compress: {key}: {fault['msg']}") from err
    except ValueError as err:
        raise RunFolderError(f"{file} is not JSON: {err}") from err


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


def to_json(result: Result) -> dict[str, object]:
    """`result` with the stable keys of `result.json`."""
    content: dict[str, object] = _RESULT.dump_python(result, mode="json", exclude={"out"})
    return {"schema": SCHEMA, **content}


def _first_free(parent: Path, name: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = parent / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError
