"""A disk that is full or read-only: a clear error, nothing lost, and the run goes on later."""

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import compressor
from compressor.errors import InterruptedRunError, RunFolderError
from compressor.search.study import read_trials
from compressor.values import Progress, Trial


def mount(*options: str) -> None:
    subprocess.run(["mount", *options], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a small disk here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path) -> None:
    """Leaves no byte."""
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass


def flags_of(blobs: Path, out: Path) -> dict[str, object]:
    return {
        "target": "host-cpu", "arch": "tests.conftest:make_conv_net", "data": blobs,
        "constraint": {"macs": 0.6}, "trials": 3, "fine_tune_epochs": 2, "finalists": 1,
        "out": out,
    }  # fmt: skip


@pytest.mark.fault("disk full in search, training, export")
@pytest.mark.parametrize("when", ["search", "training", "export"])
def test_a_full_disk_costs_nothing(trained: Path, blobs: Path, disk: Path, when: str) -> None:
    flags = flags_of(blobs, disk / "run")
    broken: list[str] = []

    def break_once(now: str) -> None:
        if now == when and not broken:
            fill(disk)
            broken.append(now)

    def on_trial(trial: Trial) -> None:
        if trial.number == 1:
            break_once("search")

    def on_progress(progress: Progress) -> None:
        if progress.phase == "Fine-tuning":
            break_once("training")
        if progress.phase == "Measuring the exported files":
            break_once("export")

    with pytest.raises(RunFolderError, match=r"cannot be written.*compress resume .* goes on"):
        compressor.compress(
            compressor.load_config(trained, flags), on_trial=on_trial, on_progress=on_progress
        )
    assert broken == [when]
    assert not (disk / "run" / "result.json").exists()
    kept = read_trials(disk / "run" / "study.db")
    assert len(kept) == (2 if when == "search" else 3)
    (disk / "filler").unlink()
    result = compressor.resume(disk / "run")
    assert isinstance(result, compressor.Result)
    trials = read_trials(disk / "run" / "study.db")
    assert [(t.number, t.widths) for t in trials[: len(kept)]] == [
        (t.number, t.widths) for t in kept
    ]
    assert len(trials) == 3


@pytest.mark.fault("disk turned read-only")
def test_a_read_only_disk_is_named(trained: Path, blobs: Path, disk: Path) -> None:
    """From the start, and when a run is to go on."""
    config = compressor.load_config(trained, flags_of(blobs, disk / "run"))
    mount("-o", "remount,ro", str(disk))
    with pytest.raises(RunFolderError, match=r"cannot be written: .*Read-only file system"):
        compressor.compress(config)
    mount("-o", "remount,rw", str(disk))

    def stop(_trial: Trial) -> None:
        raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError):
        compressor.compress(config, on_trial=stop)
    (disk / "run" / ".unfinished" / "lock").unlink()
    mount("-o", "remount,ro", str(disk))
    with pytest.raises(RunFolderError, match=r"cannot be locked: .*Read-only file system"):
        compressor.resume(disk / "run")
    mount("-o", "remount,rw", str(disk))
    assert isinstance(compressor.resume(disk / "run"), compressor.Result)
