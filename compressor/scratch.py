"""Temporary folders that do not outlive their process for long, even where it is killed.

Each holds a lock that its owner has as long as it lives; the next process that wants such a folder
removes those whose lock nobody has.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path
from types import TracebackType

PREFIX = "compressor-"
SHORT = "cmp"  # where a path may have few characters
LOCK = "owner.lock"
READING = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK


class Scratch:
    """A new temporary folder, which is removed by `cleanup` or at the end of the context.

    Attributes:
        name: Its path.
    """

    def __init__(self, prefix: str = PREFIX, parent: str | None = None) -> None:
        """Makes it, and removes what processes that were killed have left.

        Args:
            prefix: What its name begins with: `PREFIX`, perhaps with more, or `SHORT`.
            parent: Where it is made; None for the system's place.
        """
        sweep(Path(parent or tempfile.gettempdir()))
        while True:
            self._folder = tempfile.TemporaryDirectory(prefix=prefix, dir=parent)
            lock = Path(self._folder.name) / LOCK
            self._lock = os.open(lock, READING | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if lock.exists():
                break
            self.cleanup()  # another process took it for one that nobody has
        self.name = self._folder.name

    def __enter__(self) -> str:
        return self.name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cleanup()

    def cleanup(self) -> None:
        """Removes the folder; also a second time."""
        with contextlib.suppress(FileNotFoundError):
            self._folder.cleanup()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def sweep(parent: Path) -> None:
    """Removes the folders of ours in `parent` whose owner has died, and no others.

    They are folders of this user with a lock in them that nobody has.
    """
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if entry.name.startswith((PREFIX, SHORT)):
                with contextlib.suppress(OSError):  # in use, another's, or gone by now
                    _sweep_one(Path(entry.path))


def _sweep_one(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return
    lock = os.open(folder / LOCK, READING)
    try:
        is_ours = os.fstat(lock)
        if stat.S_ISREG(is_ours.st_mode) and is_ours.st_uid == os.geteuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
