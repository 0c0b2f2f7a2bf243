"""A machine that commands run on: this one, or (in `ssh`) another."""

import contextlib
import hashlib
import os
import select
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from compressor.errors import ProtocolError, TimeLimitError
from compressor.files import home
from compressor.scratch import Scratch

THIS_MACHINE = "this machine"
MAX_ANSWER_BYTES = 128 * 2**20  # of one command; trtexec's times of a long run have about 10 MiB


@dataclass(frozen=True)
class Done:
    """A command that has ended.

    Attributes:
        code: Exit status; negative where a signal ended it.
        stdout: What it printed.
        stderr: What it complained of.
    """

    code: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Both outputs, for messages and for tools that mix them."""
        return (self.stdout + self.stderr).decode("utf-8", "replace")


class Host(Protocol):
    """A machine that files can be put on and commands run on.

    Attributes:
        label: What to call it in messages.
        cache: Folder on it that keeps files from one run to the next.
    """

    label: str
    cache: str

    def run(self, command: Sequence[str], *, limit_s: float, stdin: bytes = b"") -> Done:
        """Runs `command` to its end.

        Raises:
            TimeLimitError: It took longer than `limit_s` seconds; it was ended.
            DeviceError: The machine cannot be reached.
        """

    def start(self, command: Sequence[str], *, log: Path) -> "subprocess.Popen[bytes]":
        """A process with pipes for stdin and stdout; its stderr goes to `log`."""

    def put(self, content: bytes, name: str) -> str:
        """Path of a file with `content` on the machine; uploaded only where it is missing.

        Args:
            content: What the file holds; its SHA-256 becomes part of the path.
            name: The end of the path.
        """

    def get(self, path: str) -> bytes:
        """Content of a file on the machine."""

    def remove(self, path: str) -> None:
        """Deletes a file that `put` made; no error where it is gone."""

    def python(self) -> Sequence[str]:
        """The command that runs Python there."""

    def close(self) -> None:
        """Ends connections and removes what is not to be kept."""


def local_cache() -> Path:
    """Where this machine keeps engines, timing caches and probes; follows XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache") / "compressor"


class LocalHost:
    """The machine that compress runs on."""

    label = THIS_MACHINE

    def __init__(self) -> None:
        self.cache = str(local_cache())
        self._work = Scratch()

    def run(self, command: Sequence[str], *, limit_s: float, stdin: bytes = b"") -> Done:
        """See `Host.run`; the command's whole process group ends with it."""
        process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        try:
            stdout, stderr = answer_of(process, self.label, stdin, limit_s=limit_s)
        except subprocess.TimeoutExpired as err:
            raise TimeLimitError(
                f"{command[0]} did not end in {limit_s:.0f} s on {self.label}."
            ) from err
        return Done(process.returncode, stdout, stderr)

    def start(self, command: Sequence[str], *, log: Path) -> "subprocess.Popen[bytes]":
        """See `Host.start`."""
        with log.open("wb") as errors:
            return subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                start_new_session=True, env={**os.environ, "TMPDIR": self._work.name},
            )  # fmt: skip

    def put(self, content: bytes, name: str) -> str:
        """See `Host.put`; the file is gone after `close`."""
        path = Path(self._work.name) / f"{hashlib.sha256(content).hexdigest()[:32]}-{name}"
        if not path.is_file():
            path.write_bytes(content)
        return str(path)

    def get(self, path: str) -> bytes:
        """See `Host.get`."""
        return Path(path).read_bytes()

    def remove(self, path: str) -> None:
        """See `Host.remove`."""
        Path(path).unlink(missing_ok=True)

    def python(self) -> Sequence[str]:
        """The interpreter that runs compress."""
        return (sys.executable,)

    def close(self) -> None:
        """See `Host.close`."""
        self._work.cleanup()


def answer_of(
    process: "subprocess.Popen[bytes]", label: str, stdin: bytes = b"", *, limit_s: float
) -> tuple[bytes, bytes]:
    """What `process`, which has ended then, has written to its pipes: stdout and stderr.

    As `communicate`, which would keep whatever a machine sends.

    Args:
        process: With pipes, unbuffered or not yet used; it ends with whatever is raised here.
        label: What to call its machine in messages.
        stdin: What it is given.
        limit_s: Seconds it may take.

    Raises:
        subprocess.TimeoutExpired: It took longer.
        ProtocolError: It wrote more than `MAX_ANSWER_BYTES`.
    """
    until = time.monotonic() + limit_s
    told = bytearray(), bytearray()
    left = memoryview(stdin)
    try:
        with selectors.DefaultSelector() as waiting:
            if process.stdin is not None:
                waiting.register(process.stdin, selectors.EVENT_WRITE, process.stdin)
            for pipe in filter(None, (process.stdout, process.stderr)):
                waiting.register(pipe, selectors.EVENT_READ, pipe)
            while waiting.get_map():
                ready = waiting.select(max(0.0, until - time.monotonic()))
                if not ready and time.monotonic() >= until:
                    raise subprocess.TimeoutExpired(process.args, limit_s)
                for key, _ in ready:
                    if key.data is process.stdin:
                        left = _after_writing(key.fd, left)
                        is_open = bool(left)
                    else:
                        is_open = _read(key.fd, told[key.data is process.stderr], label)
                    if not is_open:
                        waiting.unregister(key.fd)
                        _close(key.data)
        process.wait(max(0.0, until - time.monotonic()))
    except BaseException:
        end_group(process)
        raise
    return bytes(told[0]), bytes(told[1])


def _after_writing(descriptor: int, content: memoryview) -> memoryview:
    """What of `content` a pipe that has room has not taken; nothing where nobody reads it."""
    try:
        return content[os.write(descriptor, content[: select.PIPE_BUF]) :]
    except BrokenPipeError:
        return content[:0]


def _read(descriptor: int, told: bytearray, label: str) -> bool:
    """Whether a pipe that was read had something, or has not ended."""
    part = os.read(descriptor, 2**16)
    told += part
    if len(told) > MAX_ANSWER_BYTES:
        raise ProtocolError(
            f"{label} sent more than {MAX_ANSWER_BYTES // 2**20} MiB, which is no answer: "
            f"{bytes(told[:120])!r}..."
        )
    return bool(part)


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """Kills the process and its children, and waits for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            _close(pipe)


def _close(pipe: IO[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError):  # a request that nobody will read
        pipe.close()
