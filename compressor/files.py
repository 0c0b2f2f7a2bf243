"""Files that are written whole or not at all, and read as if a stranger had written them."""

import json
import math
import os
import pickle
import struct
import tokenize
import tomllib
import zipfile
import zlib
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")

# What libraries raise for files that are not what they say they are.
UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError,
    MemoryError, NotImplementedError, OSError, RuntimeError, SyntaxError, TypeError, ValueError,
    pickle.PickleError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
MAX_DEPTH = 64  # of tables in tables; ours have six
MAX_TEXT_BYTES = 64 * 2**20  # of JSON and TOML; a result with every raw time has about 0.1 MiB


def read_text(path: Path) -> str:
    """The file's content.

    Raises:
        OSError: It cannot be read.
        ValueError: It is larger than any of ours, or not UTF-8.
    """
    with path.open("rb") as file:
        content = file.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise ValueError(f"larger than {MAX_TEXT_BYTES // 2**20} MiB")
    return content.decode("utf-8")


def check_size(path: Path, at_most: int | None = None) -> None:
    """Whether what is in the file fits into memory; an archive may hold far more than it shows.

    Args:
        path: The file.
        at_most: Bytes; None for those of this machine's memory.

    Raises:
        ValueError: It does not fit.
    """
    n_bytes = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            n_bytes = max(n_bytes, sum(member.file_size for member in archive.infolist()))
    if at_most is not None and n_bytes > at_most:
        raise ValueError(
            f"it holds {n_bytes / 2**30:.1f} GiB; at most {at_most / 2**30:.0f} can be"
        )
    if n_bytes > memory_bytes():
        raise ValueError(
            f"it holds {n_bytes / 2**30:.1f} GiB, and this machine has "
            f"{memory_bytes() / 2**30:.1f} GiB of memory"
        )


def memory_bytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def parsed_json(text: str | bytes) -> Any:
    """What `text` says.

    Raises:
        ValueError: It is no JSON, nested deeper than Python follows, or has numbers that are none.
    """
    try:
        return _not_too_deep(json.loads(text, parse_constant=_finite, parse_float=_finite))
    except RecursionError as err:
        raise ValueError("nested too deeply") from err


def _not_too_deep(content: _T) -> _T:
    """`content`, which others may follow by recursion."""
    level: list[object] = [content]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return content
    raise ValueError("nested too deeply")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no finite number")
    return value


def parsed_toml(text: str) -> dict[str, Any]:
    """What `text` says.

    Raises:
        ValueError: It is no TOML, or nested deeper than Python follows.
    """
    try:
        return _not_too_deep(tomllib.loads(text))
    except RecursionError as err:
        raise ValueError("nested too deeply") from err


def write_whole(path: Path, content: bytes | str) -> Path:
    """Writes to another name, has it on disk, and renames: nobody ever sees half a file.

    Args:
        path: Replaced where it exists.
        content: Text is written as UTF-8.

    Returns:
        `path`.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    if os.name == "posix":  # the new name is on disk too; elsewhere folders cannot be synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return path
