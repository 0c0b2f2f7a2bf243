"""Optuna's storage of a study: whether its file is one of ours, before Optuna opens it.

What SQL of a stranger could do by itself (triggers, views, generated columns, virtual tables) is
found by comparing every table and index with those that Optuna makes here.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import optuna
from optuna.exceptions import OptunaError
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool, Pool, StaticPool

from compressor import sqlite
from compressor.errors import ForeignStudyError, RunFolderError
from compressor.files import check_json
from compressor.printable import one_line

STUDY_NAME = "compress"
DIRECTIONS = [("MAXIMIZE", 0), ("MAXIMIZE", 1)]
VALUES = {"FINITE", "INF_POS", "INF_NEG"}
STATES = {
    ("trials", "state"): {"RUNNING", "COMPLETE", "PRUNED", "FAIL", "WAITING"},
    ("trial_values", "value_type"): VALUES,
    ("trial_intermediate_values", "intermediate_value_type"): VALUES | {"NAN"},
}
# What Optuna and SQLAlchemy raise where a cell holds something else than its column is for.
NOT_READ = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    OptunaError,
    SQLAlchemyError,
)
MAX_SHOWN = 60  # characters of what a stranger wrote

Objects = dict[tuple[str, str], str]


def trusted_content(path: Path) -> bytes:
    """The study in the file at `path`, as `sqlite.content_of`, which holds what ours hold only.

    Raises:
        ForeignStudyError: It holds something else too.
        RunFolderError: There is no study in it, or not a whole one.
    """
    try:
        content = sqlite.content_of(path)
        with contextlib.closing(sqlite.opened(content)) as connection:
            _check_objects(path, connection)
            fault = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if fault != "ok":
                raise RunFolderError(f"{path} is broken: {fault.splitlines()[0]}.")
            _check_versions(path, connection)
            _check_rows(path, connection)
        _check_is_read(path, content)
    except (sqlite3.Error, UnicodeError) as err:
        raise RunFolderError(f"{path} holds no study of compress: {err}.") from err
    return content


def reading_storage(path: Path, *, is_live: bool = False) -> optuna.storages.RDBStorage:
    """Of the study in the file at `path`, in which nothing can be changed.

    Args:
        path: SQLite; another process may be writing to it.
        is_live: Whether every look at it reads the file again.

    Raises:
        RunFolderError: There is no study in it.
    """
    seen, content, lock = _seen(path), trusted_content(path), threading.Lock()

    def connection() -> sqlite3.Connection:
        nonlocal seen, content
        with lock:  # to close a file lets go of the locks of others in this process
            now = _seen(path) if is_live else seen
            if now != seen:
                seen, content = now, trusted_content(path)
            return sqlite.opened(content)

    return _storage(connection, is_new=False)


def _seen(path: Path) -> tuple[int, int] | None:
    """What of the file changes with its content."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def storage_in(path: Path) -> optuna.storages.RDBStorage:
    """Of the study in the file at `path`, which is made where there is none.

    By a connection, not a URL of SQLAlchemy's: a path may hold `?`, `%` or `#`.
    """
    url = f"{path.resolve().as_uri()}?mode=rwc"
    return _storage(lambda: sqlite3.connect(url, uri=True), is_new=True)


def _storage(
    connection: Callable[[], sqlite3.Connection], *, is_new: bool, pool: type[Pool] = NullPool
) -> optuna.storages.RDBStorage:
    return optuna.storages.RDBStorage(
        "sqlite://",
        engine_kwargs={"creator": connection, "poolclass": pool},
        skip_table_creation=not is_new,
    )


@cache
def _as_made_here() -> tuple[Objects, list[tuple[int, str]]]:
    """Tables and indexes of a new study, and versions of its schema."""
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    _storage(lambda: connection, is_new=True, pool=StaticPool)
    return _objects(connection), _versions(connection)


def _objects(connection: sqlite3.Connection) -> Objects:
    """(kind, name) -> table and SQL of everything in the database, spaces aside."""
    rows = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master")
    return {
        (kind, name): f"{table}: {' '.join((sql or '').split())}"
        for kind, name, table, sql in rows
    }


def _versions(connection: sqlite3.Connection) -> list[tuple[int, str]]:
    return connection.execute(
        "SELECT schema_version, version_num FROM version_info, alembic_version"
    ).fetchall()


def _check_objects(path: Path, connection: sqlite3.Connection) -> None:
    found, ours = _objects(connection), _as_made_here()[0]
    for (kind, name), sql in found.items():
        if (kind, name) not in ours:
            what = "holds no study of compress" if not found.keys() & ours.keys() else "is foreign"
            raise ForeignStudyError(
                f"{path} {what}: it has the {kind} {_shown(name)}, and no study of compress has."
            )
        if sql != ours[kind, name]:
            raise ForeignStudyError(
                f"{path} is foreign: its {kind} {name} is not as Optuna {optuna.__version__} "
                f"makes it. If it was made by another version of Optuna, use that one."
            )
    missing = sorted(name for _, name in ours.keys() - found.keys())
    if missing:
        raise RunFolderError(f"{path} holds no study of compress: it has no {missing[0]}.")


def _check_versions(path: Path, connection: sqlite3.Connection) -> None:
    found, ours = _versions(connection), _as_made_here()[1]
    if not found:
        raise RunFolderError(f"{path} holds no study of compress: it was never finished.")
    if found != ours:
        raise ForeignStudyError(
            f"{path} has the schema {_shown(found)} of Optuna; the one that is installed, "
            f"{optuna.__version__}, has {ours}. Use the version that wrote it."
        )


def _check_rows(path: Path, connection: sqlite3.Connection) -> None:
    names = connection.execute("SELECT study_name FROM studies").fetchall()
    if (STUDY_NAME,) not in names:
        raise RunFolderError(f"{path} holds no study of compress, but {_shown(names)}.")
    if len(names) > 1:
        raise ForeignStudyError(f"{path} holds {len(names)} studies; a run has one.")
    directions = connection.execute(
        "SELECT direction, objective FROM study_directions ORDER BY objective"
    ).fetchall()
    if not directions:
        raise RunFolderError(f"{path} holds no study of compress: it was never finished.")
    if directions != DIRECTIONS:
        raise ForeignStudyError(
            f"{path} has the directions {_shown(directions)}; a run has {DIRECTIONS}."
        )
    for (table, column), known in STATES.items():
        for (value,) in connection.execute(f"SELECT DISTINCT {column} FROM {table}"):
            if value not in known:
                raise ForeignStudyError(
                    f"{path} has {_shown(value)} as {column} of {table}; known: "
                    f"{', '.join(sorted(known))}."
                )
    for table, column in _columns(connection):
        (n_binary,) = connection.execute(
            f'SELECT count(*) FROM {table} WHERE typeof("{column}") = ?', ("blob",)
        ).fetchone()
        if n_binary:
            raise ForeignStudyError(
                f"{path} has binary values as {column} of {table}; a run writes text and numbers."
            )
        if column.endswith("_json"):
            for (text,) in connection.execute(f'SELECT "{column}" FROM {table}'):
                _check_text(path, f"{column} of {table}", text)


def _check_is_read(path: Path, content: bytes) -> None:
    """Whether Optuna takes every cell for what its column is for: no time without a number."""
    storage = _storage(lambda: sqlite.opened(content), is_new=False)
    try:
        for study in storage.get_all_studies():
            storage.get_all_trials(study._study_id)
    except NOT_READ as err:
        raise ForeignStudyError(
            f"{path} has trials that Optuna cannot read: {type(err).__name__} {one_line(err):.200}"
        ) from err


def _columns(connection: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    """Of the tables that a study has."""
    for kind, table in _as_made_here()[0]:
        if kind == "table":
            for row in connection.execute(f"PRAGMA table_info({table})").fetchall():
                yield table, row[1]


def _check_text(path: Path, where: str, text: object) -> None:
    try:
        check_json(str(text))
    except ValueError as err:
        raise ForeignStudyError(f"{path} has as {where} what is not JSON of ours: {err}.") from err


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
