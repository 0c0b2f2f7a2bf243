"""Signals before the work begins and while libraries load: the exit code says which, no more."""

import contextlib
import os
import pty
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From here on a signal is ours to heed; before, Python itself is not there yet.
START = "from compressor.cli import main; print('begun', flush=True); main()"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
N_MOMENTS = 8
LIMIT_S = 100


def started(*words: str, cwd: Path, **more: object) -> "subprocess.Popen[bytes]":
    """The command, from the moment on at which `main` is called."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(cwd)}

    def as_in_a_shell() -> None:  # these tests may be a background job, which ignores Ctrl-C
        for number in ENDING:
            signal.signal(number, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-c", START, *words], cwd=cwd, env=environment, stdout=subprocess.PIPE,
        preexec_fn=as_in_a_shell, **({"stderr": subprocess.PIPE} | more),
    )  # type: ignore[call-overload]  # fmt: skip
    assert process.stdout.readline() == b"begun\n"
    return process


def left(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


@pytest.mark.fault("a signal before the work, or while libraries load", n=N_MOMENTS)
@pytest.mark.parametrize("number", ENDING)
def test_a_signal_at_any_moment_of_the_start(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"not a model")
    drawn = random.Random(number)
    for moment in range(N_MOMENTS):
        words = ("inspect", "model.pt", "--input-shape", "3,8,8") if moment % 2 else ("--help",)
        process = started(*words, cwd=tmp_path)
        time.sleep(drawn.uniform(0, 0.3 if words == ("--help",) else 2.5))
        process.send_signal(number)
        _, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode in (128 + number, 0 if words == ("--help",) else 1), err
        assert b"Traceback" not in err
        assert b"ignored" not in err
        assert left(tmp_path) == ["model.pt"]


@pytest.mark.fault("signals that were ignored before", n=2)
def test_what_was_ignored_stays_ignored(tmp_path: Path) -> None:
    """`nohup`, and a shell's job in the background."""
    for number in (signal.SIGHUP, signal.SIGINT):
        script = (
            f"trap '' {number.name.removeprefix('SIG')}; exec {sys.executable} -c \"$1\" init ."
        )
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", START], cwd=tmp_path, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(number)
        assert b"written" in process.communicate(timeout=LIMIT_S)[0]
        assert process.returncode == 0
        (tmp_path / "compress.toml").unlink()


@pytest.mark.fault("a terminal that is closed")
def test_a_terminal_that_is_closed_ends_it_by_the_same_rule(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"not a model")
    ours, its = pty.openpty()
    process = started(
        "inspect", "model.pt", "--input-shape", "3,8,8", cwd=tmp_path, stderr=its, stdin=its,
        start_new_session=True,
    )  # fmt: skip
    os.close(its)
    with contextlib.suppress(OSError):
        assert os.read(ours, 1)  # it draws
    os.close(ours)
    process.send_signal(signal.SIGHUP)  # as the kernel does, where the terminal is its own
    assert process.communicate(timeout=LIMIT_S)[0] == b""
    assert process.returncode == 128 + signal.SIGHUP
    assert left(tmp_path) == ["model.pt"]
