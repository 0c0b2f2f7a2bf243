"""The host's end of a runner: starts it, asks it, and outlives it.

A runtime that crashes, hangs or eats all memory takes the runner's process with it and nothing
else; the next request starts a fresh one.
"""

import contextlib
import json
import logging
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compressor.errors import (
    CompressorError,
    DeviceBusyError,
    MeasurementError,
    OutOfMemoryError,
    ProtocolError,
    RuntimeCrashError,
    RuntimeMissingError,
    TimeLimitError,
    UnstableClockError,
    UnsupportedModelError,
)
from compressor.files import parsed_json
from compressor.latency import runner
from compressor.latency.host import end_group
from compressor.scratch import PREFIX, Scratch

START_LIMIT_S = 90.0  # a board with a slow card needs this long to import numpy
MAX_LINE_BYTES = 16 * 2**20
N_UNREAD = 2  # lines that wait; an answer, and the end
N_LOG_CHARACTERS = 2000  # of what a runner complains of; it may be any amount

ERRORS: Mapping[str, type[CompressorError]] = {
    runner.UNSUPPORTED: UnsupportedModelError,
    runner.OUT_OF_MEMORY: OutOfMemoryError,
    runner.FAILED: MeasurementError,
    runner.RUNTIME_MISSING: RuntimeMissingError,
    runner.BUSY: DeviceBusyError,
    runner.CLOCK: UnstableClockError,
    runner.REQUEST: ProtocolError,
}

Start = Callable[[Path], "subprocess.Popen[bytes]"]  # takes the file for stderr
LostBecause = Callable[[int, str], CompressorError | None]

logger = logging.getLogger(__name__)


class Runner:
    """A runner's process, started when it is first needed and again after it died.

    Attributes:
        hello: What the runner said of itself; empty before the first start.
    """

    def __init__(
        self, start: Start, label: str, lost_because: LostBecause = lambda _code, _log: None
    ) -> None:
        """Takes what starts the process, and what its end may mean.

        Args:
            start: Starts it with pipes.
            label: What to call the machine in messages.
            lost_because: From exit status and stderr: the error of a connection that was lost,
                or None where it was the runner itself that ended.
        """
        self.hello: Mapping[str, Any] = {}
        self._start = start
        self._label = label
        self._lost_because = lost_because
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: queue.Queue[bytes] = queue.Queue(N_UNREAD)
        self._folder = Scratch(f"{PREFIX}runner-")

    def begin(self) -> Mapping[str, Any]:
        """Starts the process where none runs; returns what it says of itself.

        Raises:
            DeviceError: It cannot be started there.
        """
        if self._process is None:
            self._process = self._start(self._log)
            self._lines = queue.Queue(N_UNREAD)
            assert self._process.stdout is not None
            threading.Thread(
                target=_pump, args=(self._process.stdout, self._lines), daemon=True
            ).start()
            try:
                self.hello = self._answer(START_LIMIT_S, "starting")
            except CompressorError:
                self.stop()
                raise
            if self.hello.get("protocol") != runner.PROTOCOL:
                self.stop()
                raise ProtocolError(
                    f"{self._label} speaks protocol {self.hello.get('protocol')!r}, not "
                    f"{runner.PROTOCOL}; remove its ~/.cache/compressor and try again."
                )
        return self.hello

    def ask(self, request: Mapping[str, object], *, limit_s: float) -> Mapping[str, Any]:
        """The runner's answer.

        Raises:
            TimeLimitError: None came in `limit_s` seconds; the process was ended.
            RuntimeCrashError: The process died of the request.
            MeasurementError: The model is at fault.
            DeviceError: The device is.
        """
        self.begin()
        self._check_is_quiet()
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(dict(request)).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            logger.debug("the runner ended before it was asked")  # `_answer` finds out why
        return self._answer(limit_s, str(request["do"]))

    def stop(self) -> None:
        """Ends the process, if one runs."""
        if self._process is not None:
            end_group(self._process)
            self._process = None
            with contextlib.suppress(queue.Empty):  # `_pump` may wait for room
                while True:
                    self._lines.get_nowait()

    def close(self) -> None:
        """Ends the process and removes its log."""
        self.stop()
        self._folder.cleanup()

    @property
    def _log(self) -> Path:
        return Path(self._folder.name) / "stderr.txt"

    def _check_is_quiet(self) -> None:
        """Raises `ProtocolError` where the runner says something that nobody asked for."""
        try:
            line = self._lines.get_nowait()
        except queue.Empty:
            return
        if not line.endswith(b"\n"):  # its end, which the request will find
            self._lines.put(line)
            return
        self.stop()
        raise ProtocolError(
            f"{self._label} sent {line[:120]!r}, and nothing was asked; does something else "
            f"print there?"
        )

    def _answer(self, limit_s: float, what: str) -> Mapping[str, Any]:
        try:
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            self.stop()
            raise TimeLimitError(
                f"The runtime on {self._label} gave no answer in {limit_s:.0f} s ({what}); its "
                f"process was ended."
            ) from None
        except BaseException:
            self.stop()  # Ctrl-C: the answer to this request must not be taken for the next one's
            raise
        if len(line) >= MAX_LINE_BYTES:
            self.stop()
            raise ProtocolError(
                f"{self._label} sent a line of more than {MAX_LINE_BYTES // 2**20} MiB, which is "
                f"no answer ({what}): {line[:120]!r}..."
            )
        if not line.endswith(b"\n"):
            raise self._death(what, line)
        try:
            content = parsed_json(line)
            if not isinstance(content, dict):
                raise ValueError("not an object")
            error = content.get("error")
            kind, message = (error["kind"], error["message"]) if error is not None else ("", "")
            if not isinstance(kind, str) or not isinstance(message, str):
                raise ValueError("an error of another form")
        except (ValueError, KeyError, TypeError) as err:
            self.stop()
            raise ProtocolError(
                f"{self._label} answered with {line[:120]!r}, which is no answer ({what}). Does "
                f"its shell print something when it starts?"
            ) from err
        if error is not None:
            said = message[:N_LOG_CHARACTERS]
            raise ERRORS.get(kind, MeasurementError)(f"{said} [{self._label}]")
        return content

    def _death(self, what: str, rest: bytes) -> CompressorError:
        """What it means that the process has ended."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = 0
        self.stop()
        log = _tail(self._log)
        lost = self._lost_because(code, log)
        if lost is not None:
            return lost
        if what == "starting":
            said = rest[:N_LOG_CHARACTERS].decode("utf-8", "replace")
            return RuntimeMissingError(
                f"The runner did not start on {self._label}: "
                f"{log or said or f'exit status {code}'}"
            )
        if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
            return OutOfMemoryError(
                f"The runtime's process was killed on {self._label} ({what}); most often that is "
                f"the system taking back memory. Free memory there, or set limits.memory_mib."
            )
        name = signal.Signals(-code).name if -64 < code < 0 else f"exit status {code}"
        return RuntimeCrashError(
            f"The runtime's process died on {self._label} ({what}): {name}. {log}".strip()
        )


def _pump(pipe: Any, lines: "queue.Queue[bytes]") -> None:
    """Every line of `pipe`; then what is left without an end, or nothing."""
    while True:
        try:
            line = pipe.readline(MAX_LINE_BYTES)
        except (OSError, ValueError):  # closed under our hands
            line = b""
        lines.put(line)
        if not line.endswith(b"\n"):
            return


def _tail(log: Path) -> str:
    """What the file ends with."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4 * N_LOG_CHARACTERS))  # UTF-8 has 4 bytes at most
        return file.read().decode("utf-8", "replace").strip()[-N_LOG_CHARACTERS:]
