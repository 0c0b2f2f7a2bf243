"""What is kept on disk. Files are written under another name, synced and renamed.

torch is imported where it is used: whether a folder can be written is told before.
"""

import contextlib
import hashlib
import io
import itertools
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import tomli_w
from pydantic import TypeAdapter, ValidationError

from compressor import files
from compressor.errors import ConfigError, RunFolderError
from compressor.goals import MAX_LATENCY
from compressor.inputs import check_writable
from compressor.printable import PrintableFormatter

if TYPE_CHECKING:
    from compressor.values import Result, Side

SCHEMA = 1
RESULT, STUDY, CONFIG, LOG = "result.json", "study.db", "config.toml", "log.txt"
MODEL_ONNX, ORIGINAL_ONNX, MODEL_PT = "model.onnx", "original.onnx", "model.pt"
REPORT = "report.html"
MANIFEST, UNFINISHED, LOCK = "manifest.json", ".unfinished", "lock"
ASIDE, SPENT = "aside", "spent.json"
# Of what a run follows from; with another one it would not be the same run.
IDENTITIES = {
    "model_sha256": "the model file",
    "data_fingerprint": "the data",
    "config_sha256": CONFIG,
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """One run's files; see `create` and `Result`."""

    path: Path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """No other process works in the folder meanwhile; a process that died holds no lock.

        Raises:
            RunFolderError: One does; or there are links in it, that lead out of it perhaps, or
                what is neither file nor folder.
        """
        try:
            files.check_own_files(self.path)
            lock = filelock.FileLock(self.unfinished / LOCK, timeout=0)
            lock.acquire()
        except filelock.Timeout as err:
            raise RunFolderError(
                f"{self.path} is in use: another process works in it. Wait for it, or stop it."
            ) from err
        except OSError as err:
            raise RunFolderError(f"{self.path} cannot be locked: {err}.") from err
        except ValueError as err:
            raise RunFolderError(f"{err}.") from err
        try:
            for partial in (*self.path.glob(files.PARTIAL), *self.unfinished.glob(files.PARTIAL)):
                partial.unlink(missing_ok=True)  # of a process that was killed
            yield
        finally:
            lock.release()

    @property
    def unfinished(self) -> Path:
        """Folder of what is needed to go on; gone when the run is finished."""
        path = self.path / UNFINISHED
        path.mkdir(exist_ok=True)
        return path

    def set_aside(self, result: "Result") -> None:
        """Keeps a finished model while a better one is looked for; its result is written last."""
        path = self.unfinished / ASIDE
        path.mkdir(exist_ok=True)
        for name in (MODEL_ONNX, MODEL_PT):
            if (self.path / name).is_file():
                (self.path / name).replace(path / name)
        RunFolder(path).write_result(result)

    @property
    def aside(self) -> "Result | None":
        """The result of the model that `set_aside` keeps; None where there is none."""
        path = self.unfinished / ASIDE
        return read_result(path) if (path / RESULT).is_file() else None

    def take_back(self) -> None:
        """Puts the model that `set_aside` keeps in place of the later one; also a second time."""
        for name in (MODEL_ONNX, MODEL_PT):
            kept = self.unfinished / ASIDE / name
            if kept.is_file():
                files.write_whole(self.path / name, kept.read_bytes())
            else:
                (self.path / name).unlink(missing_ok=True)

    def forget_unfinished(self) -> None:
        """Removes what is only needed to go on."""
        shutil.rmtree(self.path / UNFINISHED, ignore_errors=True)

    def tidy(self) -> None:
        """Removes from a finished run what one that was killed in its last moment has left.

        Raises:
            RunFolderError: See `locked`.
        """
        if (self.path / UNFINISHED).exists():
            with self.locked():
                self.forget_unfinished()

    def write_manifest(self, environment: Mapping[str, object]) -> None:
        """What the run follows from, so that `check` can tell whether it still does."""
        content = {"schema": SCHEMA, **self._with_config(environment)}
        files.write_whole(self.path / MANIFEST, json.dumps(content, indent=2) + "\n")

    def check(self, environment: Mapping[str, object], *, force: bool) -> None:
        """Whether a run that goes on is still the run that was begun.

        Raises:
            RunFolderError: The model, the data or the configuration is another one, and `force`
                is not set.
        """
        begun = self.read_manifest()
        now = self._with_config(environment)
        changed = [what for key, what in IDENTITIES.items() if begun.get(key) != now.get(key)]
        if changed and not force:
            raise RunFolderError(
                f"{' and '.join(changed)} changed since the run in {self.path} was begun; its "
                f"trials say nothing of the new one. Start a new run, or give --force."
            )
        if changed:
            for file in self.unfinished.iterdir():
                if file.is_dir():  # a network of what it was
                    shutil.rmtree(file)
                elif file.name not in (LOCK, SPENT):  # half-trained ones
                    file.unlink()
        if begun.get("versions") != now.get("versions"):
            logger.warning(
                "begun with %s, goes on with %s", begun.get("versions"), now.get("versions")
            )

    def _with_config(self, environment: Mapping[str, object]) -> dict[str, object]:
        config = hashlib.sha256((self.path / CONFIG).read_bytes()).hexdigest()
        return {"config_sha256": config, **environment}

    def read_manifest(self) -> dict[str, Any]:
        """What `write_manifest` wrote.

        Raises:
            RunFolderError: It is not there, not readable, or of another version of the format.
        """
        file = self.path / MANIFEST
        try:
            content = files.parsed_json(files.read_text(file))
        except FileNotFoundError as err:
            raise RunFolderError(
                f"{self.path} has no {MANIFEST}: no run was begun there, or it was stopped before "
                f"its first measurement. Start it anew."
            ) from err
        except (OSError, ValueError) as err:
            raise RunFolderError(f"{file} cannot be read: {err}.") from err
        found = content.get("schema") if isinstance(content, dict) else None
        if found != SCHEMA:
            raise RunFolderError(
                f"{file} has schema {found}; this version goes on with {SCHEMA} only. Use the "
                f"version of compress that began the run."
            )
        return dict(content)

    @property
    def points(self) -> list[Path]:
        """The results of a front's models."""
        return sorted(self.path.glob(f"point-*/{RESULT}"))

    @property
    def is_finished_front(self) -> bool:
        """Whether a front was finished here: it has models, and nothing is needed to go on."""
        return bool(self.points) and not (self.path / UNFINISHED).exists()

    @property
    def spent(self) -> Path:
        """What of the time budget was spent."""
        return self.unfinished / SPENT

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
        """A run folder in this one, new or as it was left."""
        path = self.path / name
        return RunFolder(path) if path.exists() else create(path, name, settings)

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
        import torch

        buffer = io.BytesIO()
        torch.save(dict(content), buffer)
        files.write_whole(self.path / MODEL_PT, buffer.getvalue())

    def write_report(self, page: str) -> None:
        """`report.html`."""
        files.write_whole(self.path / REPORT, page)

    def write_result(self, result: "Result") -> None:
        """`result.json`; written last, so a folder that has one is complete."""
        text = json.dumps(to_json(result), indent=2, allow_nan=False) + "\n"
        files.write_whole(self.path / RESULT, text)


def create(wanted: Path | None, default_name: str, settings: Mapping[str, object]) -> RunFolder:
    """An empty run folder holding `config.toml`.

    Args:
        wanted: Folder that the user named; it may exist but must be empty. None takes the first
            free `runs/NAME`, `runs/NAME-2`, ...
        default_name: NAME.
        settings: What the run was asked for.

    Raises:
        ConfigError: `wanted` holds something already, or is or lies under a file.
        RunFolderError: The folder cannot be made or written.
    """
    check_free(wanted)
    try:
        if wanted is None:
            path = _first_free(Path("runs"), default_name)
        else:
            path = wanted
            path.mkdir(parents=True, exist_ok=True)
        files.write_whole(path / CONFIG, tomli_w.dumps(dict(settings)))
    except OSError as err:
        raise RunFolderError(f"The run folder cannot be written: {err}.") from err
    return RunFolder(path)


def read_settings(path: Path) -> dict[str, object]:
    """What the run in the folder `path` was asked for: field of `Config` -> value.

    Raises:
        RunFolderError: There is no run, or its `config.toml` cannot be read.
    """
    file = path / CONFIG
    try:
        content = files.read_toml(file)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise RunFolderError(f"{path} has no {CONFIG}: no run was begun there.") from err
    except (OSError, ValueError) as err:
        raise RunFolderError(f"{file} cannot be read: {err}.") from err
    return {key.replace("-", "_"): value for key, value in content.items()}


def check_free(wanted: Path | None) -> None:
    """Whether a new run can leave its files in the folder `wanted`; nothing is made or written.

    Args:
        wanted: As for `create`.

    Raises:
        ConfigError: `wanted` holds something already, or is or lies under a file.
        RunFolderError: It cannot be written.
    """
    check_writable(wanted or Path("runs"))
    if wanted is not None and wanted.is_dir() and any(_listed(wanted)):
        what = "another run" if (wanted / CONFIG).exists() else "other files"
        raise ConfigError(f"--out {wanted} holds {what}; name a folder that is empty or new.")


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as err:
        raise RunFolderError(f"--out {folder} cannot be read: {err.strerror}.") from err


@contextlib.contextmanager
def logged(folder: RunFolder) -> Iterator[None]:
    """Everything compressor logs goes to the folder's `log.txt` meanwhile."""
    try:
        file = files.open_to_append(folder.path / LOG)
    except (OSError, ValueError) as err:
        raise RunFolderError(f"{folder.path / LOG} cannot be written: {err}.") from err
    handler = logging.StreamHandler(file)
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
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
        with contextlib.suppress(OSError):  # a full disk
            file.close()


def read_result(path: Path) -> "Result":
    """The result of the finished run in the folder `path`.

    Raises:
        RunFolderError: There is none, or it is not one of ours.
    """
    file = path / RESULT
    if not file.is_file():
        raise RunFolderError(f"{path} has no {RESULT}: no run there, or one that is not finished.")
    try:
        content = files.parsed_json(files.read_text(file))
        found = content.pop("schema", None) if isinstance(content, dict) else None
        if found != SCHEMA:
            raise RunFolderError(f"{file} has schema {found}; this version reads {SCHEMA}.")
        result = _as_json().validate_python(content | {"out": path})
        files.check_numbers(to_json(result))
        if not all(_are_positive(side) for side in (result.original, result.compressed) if side):
            raise ValueError("a network of no size, or of no time")
        if result.compressed and (result.original.metric is None) != (
            result.compressed.metric is None
        ):
            raise ValueError("one network has a metric of a task, the other has none")
        if any(c.value < 0 or (c.kind == MAX_LATENCY and not c.value) for c in result.constraints):
            raise ValueError("a limit below zero, or of no time")
        if result.speedup.ratio <= 0:
            raise ValueError(f"a speed-up of {result.speedup.ratio}")
        return result
    except OSError as err:
        raise RunFolderError(f"{file} cannot be read: {err}.") from err
    except ValidationError as err:
        fault = err.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise RunFolderError(f"{file} is not a result of compress: {key}: {fault['msg']}") from err
    except ValueError as err:
        raise RunFolderError(f"{file} is not a result of compress: {err}.") from err


@cache
def _as_json() -> "TypeAdapter[Result]":
    from compressor.values import Result

    return TypeAdapter(Result)


def _are_positive(side: "Side") -> bool:
    return min(side.macs, side.params, side.file_bytes, side.latency_ms.median_ms) > 0


def to_json(result: "Result") -> dict[str, object]:
    """`result` with the stable keys of `result.json`."""
    content: dict[str, object] = _as_json().dump_python(result, mode="json", exclude={"out"})
    return {"schema": SCHEMA, **content}


def _first_free(parent: Path, name: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = parent / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError
