"""What a reader of hostile files may do: raise an error of ours, soon, and touch nothing else."""

import contextlib
import os
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

LIMIT_S = 20
MORE_MEMORY = 6 * 2**30  # bytes of address space beyond what the process has
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events of the interpreter, https://docs.python.org/3/library/audit_events.html
FORBIDDEN = (
    "pickle.find_class", "socket.connect", "socket.bind", "os.system", "os.exec", "os.spawn",
    "os.posix_spawn", "os.fork", "subprocess.Popen", "os.symlink", "os.link", "os.chmod",
    "os.chown", "shutil.unpack_archive", "urllib.Request", "ctypes.dlopen",
)  # fmt: skip
# What the pickle of a tensor names. torch.load(weights_only=True) has let it through by then;
# torch.export.load of older versions reads it once more with the other unpickler.
TENSORS = {
    ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
    ("torch", "FloatStorage"), ("torch", "LongStorage"), ("collections", "OrderedDict"),
}  # fmt: skip
MOVING = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")


class Watch:
    """An audit hook, which cannot be removed, only told not to look."""

    def __init__(self) -> None:
        self.allowed: Path | None = None
        self.seen: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event == "pickle.find_class" and args[:2] in TENSORS:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {args[:2]}")
        elif event == "open":
            path, mode, flags = args
            is_writing = (isinstance(mode, str) and set(mode) & set("wax+")) or (
                isinstance(flags, int) and flags & WRITING
            )
            if is_writing and isinstance(path, str | bytes):
                self._check(path, "written")
        elif event in MOVING and isinstance(args[0], str | bytes | os.PathLike):
            if args[-1] not in (-1, None) and isinstance(args[-1], int):
                return  # relative to an open folder, as tempfile cleans its own
            self._check(os.fspath(args[0]), event)

    @contextlib.contextmanager
    def looking_away(self) -> Iterator[None]:
        """What the test itself does."""
        before, self.allowed = self.allowed, None
        yield
        self.allowed = before

    def _check(self, path: str | bytes, what: str) -> None:
        assert self.allowed is not None
        there = Path(os.fsdecode(path)).resolve()
        if not there.is_relative_to(self.allowed) and there != Path(os.devnull):
            self.seen.append(f"{there} was {what}")


WATCH = Watch()
sys.addaudithook(WATCH)


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Fails where what is done meanwhile takes long, or does more than read, but in `folder`."""

    def too_slow(_number: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"it took more than {LIMIT_S} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = signal.signal(signal.SIGALRM, too_slow)
    WATCH.allowed, WATCH.seen = folder.resolve(), []
    elsewhere, tempfile.tempdir = tempfile.tempdir, str(folder)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_MEMORY, hard))
    signal.alarm(LIMIT_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as the command line does
            yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        WATCH.allowed, tempfile.tempdir = None, elsewhere
        signal.signal(signal.SIGALRM, before)
    assert not WATCH.seen, WATCH.seen
