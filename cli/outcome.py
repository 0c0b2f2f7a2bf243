"""How a command ends: its result on stdout, its fault on stderr, its exit code."""

import json
import signal
import sys
from collections.abc import Callable

import typer

from compressor.errors import CompressorError, ConfigError, InterruptedRunError

EXIT_ERROR, EXIT_USAGE, EXIT_NOT_MET, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 3, 130, 143


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does, but for the exit code."""


def _terminate(_number: int, _frame: object) -> None:
    raise _Terminated


def end_on_sigterm() -> None:
    """From now on SIGTERM is Ctrl-C, but for the exit code."""
    signal.signal(signal.SIGTERM, _terminate)


def exit_with(work: Callable[[], int], *, as_json: bool = False) -> None:
    """Runs `work` and ends the process with its exit code.

    Args:
        work: Returns the exit code.
        as_json: Faults are told as a line of JSON, like progress.
    """
    try:
        code = work()
    except (InterruptedRunError, KeyboardInterrupt) as err:
        for number in (signal.SIGINT, signal.SIGTERM):  # all is kept; what is left is to exit
            signal.signal(number, signal.SIG_IGN)
        is_told = isinstance(err, InterruptedRunError)
        stopped_by = err.__cause__ if is_told else err
        code = EXIT_TERMINATED if isinstance(stopped_by, _Terminated) else EXIT_INTERRUPTED
        _tell("stopped", str(err) if is_told else "Stopped.", code, as_json=as_json)
    except CompressorError as err:
        code = EXIT_USAGE if isinstance(err, ConfigError) else EXIT_ERROR
        _tell("error", str(err), code, as_json=as_json)
    raise typer.Exit(code)


def _tell(event: str, message: str, code: int, *, as_json: bool) -> None:
    if as_json:
        text = json.dumps({"event": event, "message": message, "exit_code": code})
    else:
        text = f"error: {message}" if event == "error" else f"\n{message}"
    typer.echo(text, err=True)


def print_result(text: str) -> None:
    """Writes `text` to stdout.

    Raises:
        CompressorError: It cannot be written.
    """
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except (OSError, AttributeError) as err:  # full, closed, or a pipe that nobody reads
        raise CompressorError(f"The result cannot be written to stdout: {err}.") from err
