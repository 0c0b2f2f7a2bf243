"""Files that are written whole or not at all, and read as if a stranger had written them."""

import json
import math
import os
import pickle
import re
import stat
import struct
import tokenize
import tomllib
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, TypeVar

_T = TypeVar("_T")

# What libraries raise for files that are not what they say they are.
UNREADABLE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError,
    MemoryError, NotImplementedError, OSError, RuntimeError, SyntaxError, TypeError, ValueError,
    pickle.PickleError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
# Of POSIX only; Windows has neither pipes among its files nor, as a rule, links.
NOT_WAITING, NOT_FOLLOWING = getattr(os, "O_NONBLOCK", 0), getattr(os, "O_NOFOLLOW", 0)
PARTIAL = ".*.partial"  # what `write_whole` writes until it is whole
MAX_BITS = 64  # of a whole number
LEAST, MOST = 1e-30, 1e18  # of what is measured, but for 0
MAX_DEPTH = 64  # of tables in tables; ours have six
MAX_TEXT_BYTES = 64 * 2**20  # of JSON; a result with every raw time has about 0.1 MiB
MAX_TOML_BYTES = 256 * 2**10  # the longest profile has 3 KiB
_DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?:[eE][+-]?\d+)?(?![\w.])")


def home() -> Path:
    """The user's folder; where there is none, a place at which nothing is and nothing can be.

    A process in a container may have neither HOME nor an entry in the list of users.
    """
    try:
        return Path.home()
    except RuntimeError:
        return Path(os.devnull)


def opened(path: Path) -> IO[bytes]:
    """The file at `path`, to be read; never a pipe or a device, which might wait for ever.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is not a file.
    """
    descriptor = os.open(path, os.O_RDONLY | NOT_WAITING)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("not a file, but a folder, a pipe or a device")
    return os.fdopen(descriptor, "rb")


def read_whole(path: Path, at_most: int, *, whole: bool = True) -> bytes:
    """The file's content.

    Args:
        path: The file.
        at_most: Bytes.
        whole: False for the beginning of a file that may be longer.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not a file, or longer.
    """
    with opened(path) as file:
        content = file.read(at_most + 1)
    if whole and len(content) > at_most:
        unit, name = (2**20, "MiB") if at_most >= 2**20 else (2**10, "KiB")
        raise ValueError(f"larger than {at_most // unit} {name}")
    return content[:at_most]


def read_text(path: Path, at_most: int = MAX_TEXT_BYTES) -> str:
    """The file's content.

    Args:
        path: The file.
        at_most: Bytes.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no file, larger than any of ours, or not UTF-8.
    """
    return read_whole(path, at_most).decode("utf-8")


def read_toml(path: Path) -> dict[str, Any]:
    """What the file says.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no file, larger than any of ours, or see `parsed_toml`.
    """
    return parsed_toml(read_text(path, MAX_TOML_BYTES))


def check_own_file(path: Path) -> None:
    """Whether what is written to `path` is written there only.

    Raises:
        OSError: It cannot be looked at.
        ValueError: It is a link, not a file, or a file that has other names too.
    """
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise ValueError(f"{path} is a link; what is written there could go anywhere. Remove it")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is not a file, but a folder, a pipe or a device. Remove it")
    if found.st_nlink > 1:
        raise ValueError(
            f"{path} has {found.st_nlink} names (hard links); what is written there would change "
            f"the others. Put a copy in its place"
        )


def check_own_files(folder: Path) -> None:
    """Whether what is written to the files in `folder`, and in folders in it, stays in it.

    Raises:
        OSError: They cannot be looked at.
        ValueError: See `check_own_file`.
    """
    for found in folder.rglob("*"):
        if found.is_symlink() or not found.is_dir():
            check_own_file(found)


def open_to_append(path: Path) -> IO[str]:
    """The text file at `path`, made where there is none; what is written goes to its end.

    Raises:
        OSError: It cannot be opened; links are not followed.
        ValueError: See `check_own_file`.
    """
    descriptor = os.open(
        path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NOT_FOLLOWING | NOT_WAITING, 0o666
    )
    try:
        check_own_file(path)
        return os.fdopen(descriptor, "a", encoding="utf-8")
    except BaseException:
        os.close(descriptor)
        raise


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
    return _loaded(text, parse_constant=_finite, parse_float=_finite)


def check_json(text: str) -> None:
    """Whether `text` is JSON that can be read by anyone; NaN and infinity may be in it.

    Raises:
        ValueError: It is no JSON, nested too deeply, or has numbers that do not fit anywhere.
    """
    _loaded(text)


def _loaded(text: str | bytes, **how: Any) -> Any:
    try:
        return _holdable(json.loads(text, **how))
    except RecursionError as err:
        raise ValueError("nested too deeply") from err


def _holdable(content: _T) -> _T:
    """`content`, which others may follow by recursion, and whose numbers others may convert."""
    level: list[object] = [content]
    for _ in range(MAX_DEPTH):
        for value in level:
            if isinstance(value, int) and value.bit_length() > MAX_BITS:
                raise ValueError(f"a whole number of {value.bit_length()} bits")
            for text in value if isinstance(value, dict) else (value,):
                if isinstance(text, str):
                    text.encode()  # raises ValueError where it is half a character
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return content
    raise ValueError("nested too deeply")


def check_numbers(content: object) -> None:
    """Whether all numbers in `content` can be multiplied and divided by one another.

    Raises:
        ValueError: One is not finite, or of no size that anything measured has.
    """
    if isinstance(content, dict | list | tuple):
        for inner in content.values() if isinstance(content, dict) else content:
            check_numbers(inner)
    elif isinstance(content, float) and content and not LEAST <= abs(content) <= MOST:
        raise ValueError(f"{content} is no number that anything measured has")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no finite number")
    return value


def parsed_toml(text: str) -> dict[str, Any]:
    """What `text` says.

    Raises:
        ValueError: It is no TOML, nested deeper than Python follows, or has numbers that are none.
    """
    for line in text.split("\n"):  # tomllib takes time by the square of a key's parts
        if line.count(".") > MAX_DEPTH and _DECIMAL.sub("", line).count(".") > MAX_DEPTH:
            raise ValueError(f"a line with more than {MAX_DEPTH} dots")
    try:
        return _holdable(tomllib.loads(text, parse_float=_finite))
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
