r"""What comes from outside, made fit for a terminal and a log.

A file, a layer's name or a device's answer may hold characters that a terminal obeys: it would
move the cursor, rename the window, hide text behind a link (OSC 8) or turn its direction around.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import PurePath

# C0 but tab and new line, DEL, C1, what breaks lines or turns their direction, and halves of
# surrogate pairs, which stand for bytes that are no UTF-8.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

_NO_TEXT = re.compile("[\ud800-\udfff]")


def printable(text: object) -> str:
    r"""`text`, with an escape in place of every character that a terminal obeys.

    JSON remains JSON: the only such character that `json.dumps` lets through is DEL, whose escape
    here is JSON's.

    Example:
        >>> print(printable("layer\x1b[2J \x7f"))
        layer\x1b[2J \u007f
    """
    return _OBEYED.sub(_escape, str(text).replace("\r\n", "\n"))


def one_line(text: object) -> str:
    """`printable`, without new lines and other runs of blanks."""
    return " ".join(printable(text).split())


def checked_text(value: object) -> object:
    """`value`, in which no text and no path holds what neither a file nor TOML can.

    Raises:
        ValueError: One has NUL, or bytes that are no UTF-8.
    """
    if isinstance(value, str | PurePath):
        if "\0" in str(value) or _NO_TEXT.search(str(value)):
            raise ValueError(f"{printable(value)!s:.200} has a NUL, or bytes that are no UTF-8")
    elif isinstance(value, Mapping):
        for each in (*value.keys(), *value.values()):
            checked_text(each)
    elif isinstance(value, list | tuple):
        for each in value:
            checked_text(each)
    return value


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x20 or 0x7F < code < 0xA0 else f"\\u{code:04x}"


class PrintableFormatter(logging.Formatter):
    """Of log records: printable, and what follows their first line is indented.

    So no text from outside can pass for a record of its own.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record's lines."""
        return printable(super().format(record)).replace("\n", "\n    ")
