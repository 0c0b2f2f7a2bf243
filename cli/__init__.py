"""The command line: parse, call, draw progress on stderr, exit code."""

from compressor.cli.main import main

__all__ = ["main"]
