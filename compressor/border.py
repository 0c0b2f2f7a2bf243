"""What the command line was given, checked before anything heavy is imported.

Each function raises what the work itself would raise later, by the same rules: those of `config`,
`inputs`, `latency.schema` and `run_folder`. A test holds that none of them imports torch.
"""

import os
from pathlib import Path

from compressor import run_folder
from compressor.config import Config, make_config
from compressor.errors import ConfigError
from compressor.files import write_whole
from compressor.goals import MAX_SPEEDUP
from compressor.inputs import (
    check_arch,
    check_data,
    check_file,
    check_has_dashboard,
    check_model_file,
    check_task,
    check_writable,
)
from compressor.latency.schema import choose
from compressor.latency.ssh import find_device
from compressor.sqlite import check_database


def check_target(
    name: str, *, device: str | None = None, precision: str | None = None, estimate: bool = False
) -> None:
    """Whether there is such a target, and such a device; see `load_target`.

    Raises:
        ConfigError: There is not, or they do not fit each other.
    """
    if device is not None:
        find_device(device)
    choose(name, device=device, precision=precision, estimate=estimate)


def check_model(config: Config) -> None:
    """Whether model, architecture, images and target of `config` are there, as far as is told.

    Raises:
        CompressorError: One is not.
    """
    check_target(
        config.target, device=config.device, precision=config.precision, estimate=config.estimate
    )
    check_model_file(config.model, config.arch)
    beside = config.model.parent
    if config.arch is not None:
        check_arch(config.arch, beside=beside)
    if config.task is not None:
        check_task(config.task, beside=beside)
    if config.data is not None:
        n_channels = config.input_shape[0] if config.input_shape else None
        check_data(
            config.data,
            image_size=config.image_size,
            n_channels=n_channels,
            classes=config.classes,
        )


def check_run(config: Config, *, is_new: bool = True) -> None:
    """Whether a run can begin.

    Args:
        config: What is asked for.
        is_new: Whether its folder must be free; not where a run goes on.

    Raises:
        CompressorError: It cannot.
    """
    config.check_goal()
    if is_new:
        run_folder.check_free(config.out)
    check_model(config)


def check_resumed(path: Path, *, trust: bool = False) -> None:
    """Whether the run in the folder `path` can go on, or has ended.

    Raises:
        CompressorError: It cannot; or no run was begun there.
    """
    config = config_of(path, trust=trust)
    if (path / run_folder.RESULT).is_file():
        return
    check_writable(path)
    run_folder.RunFolder(path).read_manifest()
    check_run(config, is_new=False)


def check_replayed(path: Path, *, trust: bool = False) -> None:
    """Whether the run in the folder `path` has left what it can be searched again with.

    Raises:
        CompressorError: It has not; or no run was begun there.
    """
    config = config_of(path, trust=trust)
    run_folder.RunFolder(path).read_manifest()
    check_database(path / run_folder.STUDY)
    check_run(config, is_new=False)


def config_of(path: Path, *, trust: bool) -> Config:
    """What the run in the folder `path` was asked for; trust is not kept there.

    Raises:
        CompressorError: There is no run, or its settings are none.
    """
    return make_config(run_folder.read_settings(path) | {"out": path, "trust": trust})


def check_reported(path: Path) -> None:
    """Whether the run in the folder `path` has left trials, or a result.

    Raises:
        RunFolderError: It has not.
    """
    if not (path / run_folder.RESULT).is_file():
        check_database(path / run_folder.STUDY)


def check_dashboard(path: Path) -> None:
    """Whether the run in the folder `path` can be shown in a browser.

    Raises:
        CompressorError: There is no study, or optuna-dashboard is not installed.
    """
    check_database(path / run_folder.STUDY)
    check_has_dashboard()


def write_settings(path: Path, text: str, *, force: bool) -> None:
    """Writes `text` to the new file at `path`.

    Args:
        path: The file.
        text: Its content.
        force: Replace what is there; a link is replaced, not followed.

    Raises:
        ConfigError: Something is there and is not to be replaced; or it cannot be written.
    """
    if os.path.lexists(path) and not force:
        raise ConfigError(f"{path} is there already; give --force to replace it.")
    try:
        write_whole(path, text)
    except OSError as err:
        raise ConfigError(f"{path} cannot be written: {err}.") from err


def check_measured(onnx: Path, against: Path | None, *, fail_below: float | None = None) -> None:
    """Whether two ONNX files are there to be compared, or one by itself.

    Raises:
        ConfigError: One is not; or a limit is given with nothing to compare with.
    """
    for path in filter(None, (onnx, against)):
        check_file(path, "ONNX", ConfigError)
    if fail_below is None:
        return
    if against is None:
        raise ConfigError("--fail-below compares with --against; give that file too.")
    if not 0 < fail_below <= MAX_SPEEDUP:
        raise ConfigError(
            f"--fail-below must be a speed-up above 0, {MAX_SPEEDUP:g} at most; got {fail_below}."
        )
