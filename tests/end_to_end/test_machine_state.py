"""The real command where something is wrong with the machine: one line at most, and no hang."""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from compressor.run_folder import RunFolder
from tests.command import compress
from tests.unit.test_html_report import full_result

ROOT = Path(__file__).parents[2]
MAIN = f"{sys.executable} -c 'from compressor.cli import main; main()'"
LIMIT_S = 100


def sh(script: str, cwd: Path, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a shell script in which `$compress` is the command."""
    script = script.replace("run_it", MAIN)
    done = subprocess.run(
        ["bash", "-c", f"compress() {{ {MAIN} \"$@\"; }}\n{script}"], cwd=cwd,
        capture_output=True, timeout=LIMIT_S,
        env=(dict(os.environ) if env is None else dict(env)) | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    out, err = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    return done.returncode, out, err


def is_one_line(err: str) -> bool:
    return err.startswith("error: ") and err.count("\n") == 1


RUN = "--target host-cpu --speedup 2 --data images"


@pytest.mark.fault("command line on a machine in a bad state")
@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("compress none.pt --target host-cpu $'\\x1b[2J'", 2, "\\x1b[2J"),
        (f"compress $'\\xff.pt' {RUN}", 2, "bytes that are no UTF-8"),
        (f"LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 compress $'\\xff.pt' {RUN}", 2, "UTF-8"),
        (f"compress {'n' * 300}.pt {RUN}", 2, "File name too long"),
        (f"compress m.pt --out {'n' * 300} {RUN}", 2, "File name too long"),
        ("touch m; echo >m; compress measure m --target host-cpu --against m --fail-below inf", 2,
         "--fail-below must be"),
        (f"compress m.pt --learning-rate inf {RUN}", 2, "--learning-rate: Input should be"),
        (f"compress m.pt --learning-rate nan {RUN}", 2, "--learning-rate: Input should be"),
        (f"compress m.pt --time-budget {'9' * 400}h {RUN}", 2, "--time-budget: Input should be"),
        (f"compress m.pt --trials {'9' * 5000} {RUN}", 2, "Invalid value for '--trials'"),
        ("compress dashboard run --port 99999", 2, "less than or equal to 65535"),
        ("mkdir gone && cd gone && rmdir ../gone && compress none.pt " + RUN, 2, "No such file"),
        ("compress targets nano >&-", 2, "Unknown target 'nano'"),
        ("TERM=dumb COLUMNS=1 compress targets nano", 2, "Unknown target 'nano'"),
        ("ulimit -n 12; compress targets nano", 2, "Unknown target 'nano'"),
    ],
)  # fmt: skip
def test_a_fault_is_one_line(script: str, code: int, said: str, tmp_path: Path) -> None:
    got, out, err = sh(script, tmp_path)
    assert (got, out) == (code, "")
    assert is_one_line(err), err
    assert said in err


def test_a_file_may_hold_no_nul(tmp_path: Path) -> None:
    (tmp_path / "compress.toml").write_text('target = "host-cpu"\nspeedup = 2\nout = "a\\u0000"\n')
    code, _, err = sh("compress m.pt --data images", tmp_path)
    assert (code, is_one_line(err)) == (2, True), err
    assert "out: " in err
    assert "has a NUL" in err


@pytest.mark.fault("command line without home, user, output or memory", n=6)
def test_what_is_not_there_is_not_needed(tmp_path: Path) -> None:
    bare = {"PATH": os.environ["PATH"]}
    code, out, err = sh("compress init .", tmp_path, bare)
    assert (code, err) == (0, ""), err
    assert "written" in out
    assert sh("compress init . 2>&- --force", tmp_path)[0] == 0
    assert sh("compress targets nano 2>&-", tmp_path) == (2, "", "")
    assert sh("compress targets nano >&- 2>&- <&-", tmp_path) == (2, "", "")
    code, _, err = sh("compress init . --force >&-", tmp_path)
    assert (code, is_one_line(err)) == (1, True), err
    code, _, err = sh("ulimit -f 0; trap '' XFSZ; compress init . --force", tmp_path)
    assert (code, is_one_line(err)) == (2, True), err
    code, _, err = sh("ulimit -v 400000; compress targets host-cpu", tmp_path)  # torch needs more
    assert code == 1
    assert err.splitlines()[-1].startswith("error: "), err


@pytest.mark.fault("a pipe that nobody reads")
def test_a_pipe_that_nobody_reads_is_one_line(tmp_path: Path) -> None:
    code, _, err = sh(
        "set -o pipefail; (sleep 0.1; compress init . ) | true; exit $?", tmp_path
    )  # fmt: skip
    assert code == 1
    assert is_one_line(err), err
    assert sh("compress --help 2>&1 | head -1", tmp_path)[0] == 0


# A user whom nobody knows: a number without an entry, and no HOME. It may read what root may.
NOBODY = (
    "setpriv --reuid 12345 --regid 12345 --clear-groups --inh-caps=-all,+dac_read_search "
    "--ambient-caps=-all,+dac_read_search env -u HOME"
)
NEEDS_ROOT = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv"
)
# What is said before the command; what `init` ends with, and what `targets nano`.
STATES = {
    f"{NOBODY}": (0, 2), f"TMPDIR=/proc {NOBODY}": (0, 2), "TMPDIR=/nonexistent": (0, 2),
    "TMPDIR=/etc/passwd": (0, 2), "ulimit -n 16;": (0, 2), "ulimit -n 32;": (0, 2),
    "ulimit -n 64;": (0, 2), "ulimit -d 60000;": (0, 2), "ulimit -d 20000;": (1, 1),
    "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 PYTHONIOENCODING=ascii": (0, 2),
    "TERM=dumb COLUMNS=1": (0, 2), "COLUMNS=-5 LINES=x": (0, 2), "NO_COLOR=1": (0, 2),
    "HOME=/nonexistent": (0, 2), "HOME=": (0, 2), "XDG_CONFIG_HOME=/dev/null": (0, 2),
    "XDG_CONFIG_HOME=/etc/passwd": (0, 2), "HOME=$'\\xff'": (0, 2), "ulimit -s 128;": (0, 2),
    "PYTHONOPTIMIZE=2": (0, 2), "PYTHONWARNINGS=error": (0, 2), "PYTHONDEVMODE=1": (0, 2),
    "PYTHONSAFEPATH=1": (0, 2), "TZ=nonsense LANG=tr_TR": (0, 2), "umask 777;": (0, 2),
    f"ulimit -u 1; {NOBODY}": (0, 2),
}  # fmt: skip


@pytest.mark.fault("command line in a strange environment", n=2)
@pytest.mark.parametrize(
    "state", [pytest.param(s, marks=NEEDS_ROOT) if NOBODY in s else s for s in STATES]
)
def test_a_strange_environment_is_worked_in_or_one_line(state: str, tmp_path: Path) -> None:
    """`compress init` and a name that is wrong: nothing heavy is imported."""
    make_open(tmp_path)
    for words, code in zip(("init .", "targets nano"), STATES[state], strict=True):
        got, out, err = sh(f"{state} run_it {words}", tmp_path)
        assert got == code, err
        if code == 0:
            assert "written" in out
            assert (err, "speedup" in (tmp_path / "compress.toml").read_text()) == ("", True)
        else:
            assert (out, is_one_line(err)) == ("", True), err
            assert code == 1 or "Unknown target 'nano'" in err


def make_open(folder: Path) -> None:
    """Any user may write there, and come there."""
    folder.chmod(0o777)
    for parent in folder.parents[:2]:
        parent.chmod(0o755)


@NEEDS_ROOT
@pytest.mark.fault("a working folder that is read-only", n=6)
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    make_open(tmp_path)
    tmp_path.chmod(0o755)
    (tmp_path / "model.pt").write_bytes(b"PK")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    for words in (
        "init .", "init /proc", "model.pt --target host-cpu --speedup 2 --data images",
        "model.pt --target host-cpu --speedup 2 --data images --out run",
        "model.pt --target host-cpu --speedup 2 --data images --out /proc/run",
        "resume .",
    ):  # fmt: skip
        code, out, err = sh(f"{NOBODY} run_it {words}", tmp_path)
        assert (words, code, out, is_one_line(err)) == (words, 2, "", True), err
    assert {each.name for each in tmp_path.iterdir()} == {"model.pt", "images"}


@dataclass(frozen=True)
class State:
    """Of the process that runs the command, from before its first line on."""

    limits: tuple[tuple[int, int], ...] = ()
    closed: tuple[int, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    def __call__(self) -> None:
        os.environ.update(self.environment)
        tempfile.tempdir = None
        for number in self.closed:
            os.close(number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)
        for limit, value in self.limits:
            resource.setrlimit(limit, (value, value))


MIB, DUMB = 2**20, "a dumb terminal of one column"
# What `report` of a finished run comes to: 0, or 1 and one line.
PROCESSES = {
    "no temporary folder": (State(environment=(("TMPDIR", "/nonexistent"),)), 0),
    "32 files": (State(limits=((resource.RLIMIT_NOFILE, 32),)), 0),
    "64 files": (State(limits=((resource.RLIMIT_NOFILE, 64),)), 0),
    "data of 100 MiB": (State(limits=((resource.RLIMIT_DATA, 100 * MIB),)), 1),
    "files of 1 KiB": (State(limits=((resource.RLIMIT_FSIZE, 1024),)), 1),
    "stdin closed": (State(closed=(0,)), 0),
    "stdout closed": (State(closed=(1,)), 1),
    "stderr closed": (State(closed=(2,)), 0),
    "all closed": (State(closed=(0, 1, 2)), 1),
    DUMB: (
        State(environment=(("TERM", "dumb"), ("COLUMNS", "1"), ("FORCE_COLOR", "1"))), 0,
    ),
    "no colour": (State(environment=(("NO_COLOR", "1"), ("TTY_COMPATIBLE", "1"))), 0),
}  # fmt: skip


@pytest.mark.fault("commands that work in a process in a bad state", n=2)
@pytest.mark.parametrize("name", PROCESSES)
def test_work_in_a_bad_state_is_done_or_one_line(name: str, tmp_path: Path) -> None:
    """`report` of a finished run, which reads it and writes report.html; and the same as JSON."""
    state, code = PROCESSES[name]
    run = tmp_path / "run"
    run.mkdir()
    RunFolder(run).write_result(full_result(run))
    for words in (("report", "run"), ("report", "run", "--json")):
        done = compress(*words, cwd=tmp_path, prepare=state)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("Loading")]
        assert "Traceback" not in done.stderr
        assert done.returncode == code, done.stderr
        if 2 not in state.closed and name not in ("no colour", DUMB):
            assert len(lines) == code, done.stderr
        if code == 0:
            assert done.stdout
            assert (run / "report.html").stat().st_size > 10_000


@NEEDS_ROOT
@pytest.mark.slow  # a process that loads torch
@pytest.mark.fault("work as a user without an entry, a home or a temporary folder")
def test_nobody_can_read_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    RunFolder(run).write_result(full_result(run))
    make_open(tmp_path)
    run.chmod(0o777)
    code, out, err = sh(f"TMPDIR=/proc {NOBODY} run_it report run", tmp_path)
    assert (code, "speed-up" in out) == (0, True), err
    assert all(line.startswith("Loading") for line in err.splitlines()), err


def test_every_command_refuses_by_one_rule(tmp_path: Path) -> None:
    """A path, a name or a setting that is wrong is 2, whichever command is given it."""
    for words in (
        f"none.pt {RUN}", "inspect none.pt", "explain none.pt --target host-cpu",
        "measure none.onnx --target host-cpu", "targets nano", "probe --target nano",
        "init none/where", "resume none", "replay none", "report none", "dashboard none",
    ):  # fmt: skip
        code, out, err = sh(f"compress {words}", tmp_path)
        assert (words, code, out, is_one_line(err)) == (words, 2, "", True), err
    _, shown, _ = sh("compress report --help", tmp_path)
    assert "Exit codes: 0" in shown
