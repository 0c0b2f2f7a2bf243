"""`compress` in a process of its own, forked from one that has imported everything already.

A new interpreter spends most of a test's time on importing torch. What runs is the same entry
point, with streams, signals and an exit code of its own; `test_command_line.py` also starts it the
long way.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path

import compressor.cli.commands
from compressor.cli import main

import compressor
import compressor.api
import compressor.pipeline  # (for those that are forked)

LIMIT_S = 250


def fork_server() -> ForkServerContext:
    """The one of this test session."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # of no effect once it runs
    return context


def compress(
    *args: str | Path,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    stdout: Path | None = None,
    prepare: Callable[[], None] | None = None,
) -> "subprocess.CompletedProcess[str]":
    """What `compress ARGS` prints in the folder `cwd`, and its exit code.

    Args:
        args: Of the command.
        cwd: Where it is started.
        env: On top of this process's.
        stdout: Where its result goes; it comes back where this is not given.
        prepare: Is called in the process before the command begins.
    """
    words = list(map(str, args))
    with tempfile.TemporaryDirectory() as folder:
        told = [stdout or Path(folder, "stdout"), Path(folder, "stderr")]
        process = fork_server().Process(
            target=_run, args=(words, cwd, dict(os.environ) | dict(env or {}), told, prepare)
        )
        process.start()
        process.join(LIMIT_S)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, LIMIT_S)
        out = "" if stdout else told[0].read_text(encoding="utf-8")
        err = told[1].read_text(encoding="utf-8")
        return subprocess.CompletedProcess(words, process.exitcode, out, err)


def _run(
    words: list[str],
    cwd: Path,
    env: dict[str, str],
    told: list[Path],
    prepare: Callable[[], None] | None,
) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [str(cwd), str(Path(__file__).parents[1])]
    for number, path in zip((1, 2), told, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if prepare is not None:
        prepare()
    try:
        main(words)
    except SystemExit as end:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, AttributeError):  # a disk that is full; closed
                stream.flush()
        os._exit(int(end.code or 0))


def run_or_go_on(model: Path, flags: dict[str, object], out: Path) -> None:
    """Begins the run in `out`, or goes on with it; for processes that are killed."""
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if (out / "manifest.json").is_file():
        compressor.resume(out)
    else:
        compressor.compress(compressor.load_config(model, flags | {"out": out}))
