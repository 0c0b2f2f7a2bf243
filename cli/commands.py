"""`compress MODEL ...` and its sister commands.

Progress goes to stderr; stdout has the result and nothing else. Exit codes: `outcome.CODES`.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from compressor.cli import looks, runs
from compressor.cli.outcome import CODES, ended_by, open_streams
from typer.core import TyperGroup

from compressor import __version__
from compressor.errors import unknown_name
from compressor.printable import PrintableFormatter

RUN = "run"

EPILOG = f"""{CODES}

Other commands, each with its own --help:

compress inspect MODEL      channel groups, and which are locked and why

compress explain MODEL      which layers cost time on a target, and what can be gained at most

compress measure M.onnx     times a model, or two against each other

compress targets            device profiles, and which of them answer

compress probe              what each width costs on a device

compress init               a compress.toml with every setting and its meaning

compress resume RUN         goes on with a run that was stopped, however that was

compress replay RUN         does the plan follow from the measurements that were kept

compress report RUN         the result of a run, or what an unfinished one has

compress dashboard RUN      its trials in a browser, also while it runs

compress --version          which one this is

compress --install-completion      TAB then knows commands, options and targets
"""


class Commands(TyperGroup):
    """`compress MODEL ...` needs no command word: what names no command is a model to run."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts the word in where it is not given."""
        own = {name for param in self.params for name in param.opts} - {"--help"}
        first = args[0] if args else ""
        if first in self.commands or first in own or (ctx.resilient_parsing and not args):
            return super().parse_args(ctx, args)
        if first and not first.startswith("-") and not os.path.exists(first):
            said = unknown_name("command", first, self.commands)
            if "Did you mean" in said:
                ctx.fail(said)
        return super().parse_args(ctx, [RUN, *(args or ["--help"])])

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Commands, and the options of `run`, whose word need not be typed."""
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            found += self.commands[RUN].shell_complete(ctx, incomplete)
        return found


app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"compressor {__version__}")
        raise typer.Exit


@app.callback()
def _group(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    pass


app.command(epilog=EPILOG)(runs.run)
for _command in (
    looks.inspect, looks.explain, looks.measure, looks.targets, looks.probe, looks.init,
    runs.resume, runs.replay, runs.report, runs.dashboard,
):  # fmt: skip
    app.command(epilog=CODES)(_command)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command that `args`, or those of the process, say, and ends the process."""
    open_streams()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # what libraries tell each other; ours are errors or logs
    if logging.lastResort is not None:  # what goes to stderr where nobody set up logging
        logging.lastResort.setFormatter(PrintableFormatter())
    words = list(sys.argv[1:] if args is None else args)
    try:
        code = app(args=words, prog_name="compress", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as err:  # noqa: BLE001  the last line of defence
        code = ended_by(err, as_json="--json-progress" in words)
    sys.exit(code)
