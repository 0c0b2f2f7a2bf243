"""How a command ends: its result on stdout, its fault on stderr, its exit code."""

import contextlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator

import typer
from compressor.cli import ENDING

from compressor.errors import CompressorError, ConfigError, InterruptedRunError
from compressor.printable import one_line, printable

EXIT_ERROR, EXIT_USAGE, EXIT_NOT_MET, EXIT_BY_SIGNAL = 1, 2, 3, 128
CODES = (
    "Exit codes: 0 done, and a limit that was asked for is met; 1 what was given was taken, and "
    "the work failed (of replay: another plan follows); 2 what was given is refused: an option, a "
    "name, a path, a file's kind, a setting; 3 the limit is not met; 128 and a signal's "
    "number where it stopped the work: 130 Ctrl-C, 143 SIGTERM, 129 a closed terminal."
)
NO_MEMORY = "This process may have no more memory"
MAX_UNEXPECTED = 400  # characters of an error that nobody worded for people


class _Stopped(KeyboardInterrupt):
    """A signal, which ends a run as Ctrl-C does.

    Attributes:
        number: The signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _stop(number: int, _frame: object) -> None:
    raise _Stopped(number)


def heed_signals() -> None:
    """From now on a signal that ends stops the work, and what is there is kept."""
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)


def exit_with(work: Callable[[], int], *, as_json: bool = False) -> None:
    """Runs `work` and ends the process with its exit code.

    Args:
        work: Returns the exit code.
        as_json: Faults are told as a line of JSON, like progress.
    """
    try:
        heed_signals()
        code = work()
    except (Exception, KeyboardInterrupt) as err:  # noqa: BLE001  the last line of defence
        code = ended_by(err, as_json=as_json)
    raise typer.Exit(code)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Before any work: whatever is found wrong with what was given is wrong usage.

    Raises:
        ConfigError: In place of every other `CompressorError`.
    """
    try:
        yield
    except ConfigError:
        raise
    except CompressorError as err:
        raise ConfigError(str(err)) from err


def ended_by(err: BaseException, *, as_json: bool = False) -> int:
    """Tells what ended a command; returns the exit code."""
    if isinstance(err, InterruptedRunError | KeyboardInterrupt):
        for number in ENDING:  # all is kept; what is left is to exit
            signal.signal(number, signal.SIG_IGN)
        is_told = isinstance(err, InterruptedRunError)
        stopped_by = err.__cause__ if is_told else err
        by = stopped_by.number if isinstance(stopped_by, _Stopped) else signal.SIGINT
        code = EXIT_BY_SIGNAL + by
        _tell("stopped", str(err) if is_told else "Stopped.", code, as_json=as_json)
    elif isinstance(err, CompressorError):
        code = EXIT_USAGE if isinstance(err, ConfigError) else EXIT_ERROR
        _tell("error", str(err), code, as_json=as_json)
    elif isinstance(err, typer.TyperException):  # words that typer cannot take
        code = EXIT_USAGE
        _tell("error", f"{err.format_message()} See --help.", code, as_json=as_json)
    elif isinstance(err, MemoryError):
        code = EXIT_ERROR
        _tell("error", f"{NO_MEMORY}. {one_line(err)}".strip(), code, as_json=as_json)
    else:
        code = EXIT_ERROR
        _tell("error", _unexpected(err), code, as_json=as_json)
    return code


def _unexpected(err: BaseException) -> str:
    """One line on an error that is none of ours, and where its traceback is kept."""
    said = one_line(err)[:MAX_UNEXPECTED].rstrip(".")
    notes = [one_line(note) for note in getattr(err, "__notes__", ())]
    name = type(err).__name__
    return " ".join([f"Unexpected {name}{': ' if said else ''}{said}.", *(notes or _kept(err))])


def _kept(err: BaseException) -> list[str]:
    """Where the traceback is, in a sentence; nothing where no file can be written."""
    with contextlib.suppress(OSError, MemoryError):
        text = printable("".join(traceback.format_exception(err)))
        number, path = tempfile.mkstemp(prefix="compress-", suffix=".txt")
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
        return [f"Its traceback is in {path}; please report it."]
    return []


def _tell(event: str, message: str, code: int, *, as_json: bool) -> None:
    if as_json:
        text = json.dumps({"event": event, "message": printable(message), "exit_code": code})
    else:
        text = f"error: {one_line(message)}" if event == "error" else f"\n{message}"
    tell(text)


def tell(text: str) -> None:
    """A line on stderr, printable; lost where nobody reads that any more."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(f"{printable(text)}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        _forget("stderr", 2)


def print_result(text: str) -> None:
    """Writes `text` to stdout, printable.

    Raises:
        CompressorError: It cannot be written.
    """
    try:
        sys.stdout.write(f"{printable(text)}\n")
        sys.stdout.flush()
    except (OSError, AttributeError, ValueError) as err:  # full, closed, or nobody reads it
        _forget("stdout", 1)
        said = err.strerror if isinstance(err, OSError) else "it is closed"
        raise CompressorError(f"The result cannot be written to stdout: {said}.") from err


def open_streams() -> None:
    """Makes the standard streams safe to use, whatever they were left as.

    A descriptor that is closed would become that of the next file, and what a library prints
    would go into it. A character that the terminal's encoding lacks becomes an escape.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            _to_nowhere(number)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  to the end
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _forget(name: str, number: int) -> None:
    """What is left in a broken stream's buffer would fail once more when Python ends."""
    stream = getattr(sys, name)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if stream.fileno() == number:
            _to_nowhere(number)


def _to_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
    os.set_inheritable(number, True)
