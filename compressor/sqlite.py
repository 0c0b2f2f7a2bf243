"""SQLite files that a stranger may have written: looked at before they are opened, read as copies.

Opening a database in place may already write: SQLite rolls back what a journal beside it says, and
deletes the file that the journal names as its super-journal [sqlite-format]. So the files are
looked at first, and whoever only reads gets the content in memory.

[sqlite-format] https://www.sqlite.org/fileformat2.html#the_rollback_journal
"""

import contextlib
import os
import sqlite3
import struct
from pathlib import Path

from compressor.errors import ForeignStudyError, RunFolderError
from compressor.files import check_own_file, read_whole
from compressor.scratch import PREFIX, Scratch

BEGINNING = b"SQLite format 3\0"
JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")
JOURNAL_HEAD = struct.Struct(">8s5I")  # magic, records, nonce, pages before, sector, page size
BESIDE = ("-journal", "-wal", "-shm")
WAL_VERSION = 2  # of the file format, at bytes 18 and 19
MAX_BYTES = 2**30  # of a study; one of 40 trials has 2 MiB
BUSY_S = 30.0  # that another process may write


def check_database(path: Path) -> None:
    """Whether the file at `path`, and those beside it, are such as a run leaves, even if killed.

    Nothing is opened by SQLite.

    Raises:
        ForeignStudyError: It, its journal or its neighbours are such as no run leaves.
        RunFolderError: There is none, it is not of SQLite, or it cannot be read.
    """
    try:
        if not os.path.lexists(path):
            raise RunFolderError(f"No study at {path}: no run was begun in {path.parent}.")
        check_own_file(path)
        head = read_whole(path, len(BEGINNING) + 4, whole=False)
        if head[: len(BEGINNING)] != BEGINNING:  # Optuna would make a study of an empty file
            raise RunFolderError(f"{path} holds no study of compress: it is not an SQLite file.")
        if path.stat().st_size > MAX_BYTES:
            raise RunFolderError(f"{path} is larger than {MAX_BYTES // 2**30} GiB.")
        beside = [name for name in BESIDE[1:] if _beside(path, name)]
        if beside or WAL_VERSION in head[len(BEGINNING) + 2 :]:
            what = f"{path}{beside[0]} lies beside it" if beside else f"{path} says so"
            raise ForeignStudyError(
                f"{path} is to be written through a write-ahead log ({what}); compress writes "
                f"none. Close what has opened it, or run `PRAGMA journal_mode=DELETE` on a study "
                f"that you trust."
            )
        if _beside(path, "-journal"):
            _check_journal(path)
    except OSError as err:
        raise RunFolderError(f"{path} cannot be read: {err.strerror or err}.") from err
    except ValueError as err:
        raise ForeignStudyError(f"{err}.") from err


def check_free(path: Path) -> None:
    """Whether a new database can be made at `path`, where SQLite finds nothing of an older one.

    Raises:
        RunFolderError: Something is there.
    """
    for suffix in ("", *BESIDE):
        if _beside(path, suffix):
            raise RunFolderError(f"{path}{suffix} is there already; remove it to go on.")


def _beside(path: Path, suffix: str) -> bool:
    return os.path.lexists(path.with_name(path.name + suffix))


def _check_journal(path: Path) -> None:
    """Whether the journal of the database at `path` is one that SQLite wrote for it alone.

    Raises:
        ForeignStudyError: It is not.
        OSError: It cannot be read.
        ValueError: It is no file of its own.
    """
    journal = path.with_name(f"{path.name}-journal")
    refused = (
        f"SQLite would change files by what it says. Remove it if you do not trust the folder: "
        f"{path.name} is then as it lies there."
    )
    try:
        check_own_file(journal)
        content = read_whole(journal, MAX_BYTES)
    except FileNotFoundError:  # of a run that goes on
        return
    if not content[: JOURNAL_HEAD.size].strip(b"\0"):  # (not hot: nothing follows from it)
        return
    if content.endswith(JOURNAL_MAGIC) and len(content) >= 2 * len(JOURNAL_MAGIC):
        raise ForeignStudyError(f"{journal} names another file to be deleted; {refused}")
    if len(content) < JOURNAL_HEAD.size:
        if JOURNAL_MAGIC.startswith(content[: len(JOURNAL_MAGIC)]):
            return  # the disk was full
        raise ForeignStudyError(f"{journal} is not a journal of SQLite; {refused}")
    magic, _, _, n_pages, sector, page = JOURNAL_HEAD.unpack_from(content)
    if magic != JOURNAL_MAGIC or not _is_power_of_2(sector, 32) or not _is_power_of_2(page, 512):
        raise ForeignStudyError(f"{journal} is not a journal of SQLite; {refused}")
    if n_pages * page > MAX_BYTES:
        raise ForeignStudyError(
            f"{journal} makes {n_pages * page / 2**30:.0f} GiB of {path.name}; {refused}"
        )


def _is_power_of_2(number: int, least: int) -> bool:
    return least <= number <= 65536 and number.bit_count() == 1


def content_of(path: Path) -> bytes:
    """The database at `path` as it is after its last commit; nothing is written beside it.

    Another process may be writing to it. What one that was killed left half-written is taken
    back in a copy.

    Raises:
        RunFolderError: See `check_database`.
        sqlite3.DatabaseError: It is broken.
    """
    check_database(path)
    try:
        return _serialized(path, "ro")
    except sqlite3.OperationalError as err:
        if err.sqlite_errorname != "SQLITE_READONLY_ROLLBACK":
            raise
    with Scratch(f"{PREFIX}study-") as folder:
        copied = Path(folder) / path.name
        for suffix in ("", "-journal"):
            with contextlib.suppress(FileNotFoundError):  # another process has taken it back
                content = read_whole(path.with_name(path.name + suffix), MAX_BYTES)
                copied.with_name(copied.name + suffix).write_bytes(content)
        return _serialized(copied, "rw")


def _serialized(path: Path, mode: str) -> bytes:
    url = f"{path.absolute().as_uri()}?mode={mode}"
    with contextlib.closing(sqlite3.connect(url, uri=True, timeout=BUSY_S)) as connection:
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()  # others wait now
        return connection.serialize()


def opened(content: bytes) -> sqlite3.Connection:
    """A connection to a copy of `content` in memory; nothing can be changed by it."""
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    if content:  # (empty is what a database is that was never written)
        connection.deserialize(content)
    connection.execute("PRAGMA trusted_schema=OFF")
    connection.execute("PRAGMA query_only=ON")
    return connection
