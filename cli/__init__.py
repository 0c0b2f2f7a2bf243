"""The command line: parse, call, draw progress on stderr, exit code."""

import os
import signal
from collections.abc import Sequence

__all__ = ["main"]

# Ctrl-C, `kill`, and a terminal that is closed; some systems lack the last.
ENDING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the `compress` command.

    Until the work begins (see `outcome.exit_with`) a signal just ends the process, by the rule
    that always holds: its exit code is 128 and the signal's number. A signal that was ignored
    before, as `nohup` does, stays so.
    """
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)
    from compressor.cli.commands import main as command  # what it imports takes half a second

    command(args)


def _end(number: int, _frame: object) -> None:
    os._exit(128 + number)
