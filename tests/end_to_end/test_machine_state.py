"""The real command where something is wrong with the machine: one line at most, and no hang."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAIN = f"{sys.executable} -c 'from compressor.cli import main; main()'"
LIMIT_S = 100


def sh(script: str, cwd: Path, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a shell script in which `$compress` is the command."""
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
