"""Whole searches whose device is another machine: a real sshd, the real ONNX Runtime there."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import compressor
from compressor.config import Config
from compressor.errors import DeviceLostError, UnreachableError
from compressor.latency.device import patiently
from compressor.latency.ssh import devices_file
from compressor.search.study import read_trials
from compressor.values import Progress, Trial, Verdict
from tests.device.conftest import Board, needs_sshd

ROOT = Path(__file__).parents[2]
COMPRESS = (sys.executable, "-c", "from compressor.cli import main; main()")

Make = Callable[..., Config]


@pytest.fixture
def make_config(trained: Path, blobs: Path, tmp_path: Path) -> Make:
    """A run of seconds in an empty folder."""
    shutil.copy(trained, tmp_path / "model.pt")

    def make(**flags: object) -> Config:
        small: dict[str, object] = {
            "target": "host-cpu", "arch": "tests.conftest:make_conv_net", "data": blobs,
            "speedup": 1.05, "trials": 5, "fine_tune_epochs": 0, "out": tmp_path / "run",
        }  # fmt: skip
        return compressor.load_config(tmp_path / "model.pt", small | flags)

    return make


@pytest.fixture
def named(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the board is called in the user's devices.toml."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    devices_file().parent.mkdir(parents=True)
    address = board.address
    devices_file().write_text(
        f'[my-board]\naddress = "ssh://{address.user}@{address.host}:{address.port}"\n'
        f'ssh_config = "{address.ssh_config}"\npython = "{address.python}"\n'
    )
    return "my-board"


def run_folder_of(config: Config) -> Path:
    assert config.out is not None
    return config.out


@needs_sshd
def test_a_search_measures_on_its_device(make_config: Make, board: Board, named: str) -> None:
    config = make_config(device=named)
    result = compressor.compress(config)

    assert result.verdict is Verdict.MET
    written = json.loads((run_folder_of(config) / "result.json").read_text())
    assert written["basis"] == "measured"
    assert written["environment"]["device"]["host"] == board.address.label
    assert written["environment"]["device"]["runtime"] == "onnxruntime"
    assert written["speedup"]["ci95"][0] > 1
    assert 'device = "my-board"' in (run_folder_of(config) / "config.toml").read_text()
    left = list((board.home / ".cache/compressor/work").glob("*model.onnx"))
    assert len(left) <= 2  # a board has no room for every candidate of a search


@pytest.mark.fault("sshd goes away in a search and comes back")
@needs_sshd
def test_a_board_that_reboots_costs_a_search_no_trial(
    make_config: Make, board: Board, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes away while the second plan is measured and comes back at the second try."""
    monkeypatch.setattr("compressor.latency.device.RETRY_S", (0.2,))
    trials, waits = list[Trial](), list[str]()

    def on_trial(trial: Trial) -> None:
        trials.append(trial)
        if trial.number == 0:
            threading.Timer(0.2, board.power_off).start()

    def on_progress(progress: Progress) -> None:
        if progress.phase == "Waiting for the device":
            waits.append(progress.note)
            if len(waits) == 2:
                board.boot()

    config = make_config(device=named)
    result = compressor.compress(config, on_trial=on_trial, on_progress=on_progress)

    assert len(waits) == 2
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert all(trial.speedup and trial.accuracy for trial in trials)
    kept = read_trials(run_folder_of(config) / "study.db")
    assert [(t.number, t.speedup) for t in kept] == [(t.number, t.speedup) for t in trials]
    assert result.search["n_trials"] >= 5  # more where finalists send the search on
    assert result.search["n_failed"] == 0
    assert result.verdict is Verdict.MET


@pytest.mark.fault("sshd goes away for good")
@needs_sshd
def test_a_board_that_stays_away_leaves_the_trials_that_were_measured(
    make_config: Make, board: Board, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.latency.device.RETRY_S", (0.2,))
    assert patiently.__kwdefaults__ is not None
    monkeypatch.setitem(patiently.__kwdefaults__, "patience_s", 0.5)

    def on_trial(trial: Trial) -> None:
        if trial.number == 1:
            board.power_off()

    config = make_config(device=named, trials=10)
    folder = run_folder_of(config)
    with pytest.raises(DeviceLostError, match="stayed away for 1 s") as caught:
        compressor.compress(config, on_trial=on_trial)

    assert f"`compress resume {folder}` goes on" in str(caught.value)
    assert not {"result.json", "model.onnx", "model.pt"} & {p.name for p in folder.iterdir()}
    shown = compressor.folder_report(folder)
    assert "was not finished. Trials measured: 2, failed: 0." in shown
    assert len([line for line in shown.splitlines() if line.endswith(" ms")]) == 2


@needs_sshd
def test_a_device_that_is_off_from_the_start_leaves_nothing(
    make_config: Make, board: Board, named: str
) -> None:
    board.power_off()
    config = make_config(device=named)
    with pytest.raises(UnreachableError, match="Is the device on"):
        compressor.compress(config)
    assert not run_folder_of(config).exists()


def command(*args: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """The real command in a real process, for the small network beside it."""
    return subprocess.run(
        [*COMPRESS, *args], cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.fixture
def folder(trained: Path, blobs: Path, tmp_path: Path) -> Path:
    """A user's folder."""
    made = tmp_path / "project"
    made.mkdir()
    shutil.copy(trained, made / "model.pt")
    (made / "compress.toml").write_text(
        f'target = "host-cpu"\narch = "tests.conftest:make_conv_net"\ndata = "{blobs}"\n'
        "trials = 5\nfine-tune-epochs = 0\nspeedup = 1.05\n"
    )
    return made


@needs_sshd
def test_the_command_says_in_one_line_that_nobody_answers(
    folder: Path, board: Board, named: str
) -> None:
    board.power_off()
    done = command("model.pt", "--device", named, "--out", "run", cwd=folder)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert f"error: {board.address.label}: " in done.stderr
    assert "Is the device on?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "run").exists()


@needs_sshd
def test_the_command_measures_on_the_device(folder: Path, board: Board, named: str) -> None:
    done = command("model.pt", "--device", named, "--out", "run", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["environment"]["device"]["host"] == board.address.label
    assert printed["basis"] == "measured"


def test_a_hostile_device_is_a_usage_error(folder: Path) -> None:
    before = sorted(folder.iterdir())
    done = command("model.pt", "--device=ssh://-oProxyCommand=touch pwned", cwd=folder)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "error: Expected --device ssh://user@host[:port], got" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(folder.iterdir()) == before


def test_an_estimate_is_never_taken_for_a_measurement(make_config: Make) -> None:
    config = make_config(target="raspberry-pi-4", estimate=True)
    result = compressor.compress(config)

    written = json.loads((run_folder_of(config) / "result.json").read_text())
    assert written["basis"] == "estimate"
    assert written["environment"]["device"]["basis"] == "estimate"
    assert written["speedup"]["original"]["n"] == 0
    text = compressor.text_report(result)
    assert text == compressor.folder_report(run_folder_of(config))
    (speedup,) = (line for line in text.splitlines() if line.startswith("speed-up"))
    assert "ESTIMATE" in speedup
    assert "95 %" not in speedup  # its interval is the estimate's error
    assert "runs" not in speedup  # there were none
