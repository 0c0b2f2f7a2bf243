"""A device whose models its `trtexec` program runs."""

import itertools
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compressor.errors import DeviceBusyError
from compressor.latency import timing
from compressor.latency.host import Host, end_group
from compressor.latency.machine import Model, checked_machine, content_of, mismatch
from compressor.latency.ssh import SshHost
from compressor.latency.timing import FINAL, Effort
from compressor.latency.trtexec import TrtexecDevice
from compressor.values import PairedLatency, SessionPair, Target

MIN_PAIRS_TRTEXEC = 3


class TrtexecRunner:
    """The `trtexec` program of a host: each model runs by itself, the two in turn."""

    def __init__(self, host: Host, target: Target) -> None:
        self._host = host
        self._target = target
        self._logs = tempfile.TemporaryDirectory(prefix="compressor-lock-")
        self._lock = self._locked() if isinstance(host, SshHost) else None
        try:
            self._program = TrtexecDevice(host, target)
        except BaseException:
            self._unlock()
            raise

    def describe(self) -> Mapping[str, Any]:
        """See `Device.describe`."""
        described = self._program.describe()
        fault = mismatch(self._target, {"model": described["machine"]}, only_model=True)
        return checked_machine(self._host, described, fault)

    def compare(
        self, original: Model, candidate: Model, *, effort: Effort = FINAL, seed: int = 0
    ) -> PairedLatency:
        """See `Device.compare`; a start of trtexec takes seconds, so it is started less often."""
        slower = replace(
            effort,
            min_pairs=MIN_PAIRS_TRTEXEC,
            max_pairs=max(MIN_PAIRS_TRTEXEC, effort.max_pairs // 4),
            budget_s=effort.budget_s * 20,
        )
        contents = content_of(original), content_of(candidate)
        self._program.take_conditions()
        numbers = itertools.count()  # opposite orders in turn; see `TrtexecDevice.time_pair`

        def time_pair(drawn: int) -> SessionPair:
            del drawn
            return self._program.time_pair(*contents, seed=2 * seed + next(numbers), effort=slower)

        pair = timing.compare(time_pair, slower, seed=seed)
        return timing.with_conditions(pair, self._program.take_conditions())

    def reconnect(self) -> None:
        """See `Device.reconnect`."""
        self._unlock()
        if isinstance(self._host, SshHost):
            self._host.reconnect()
            self._lock = self._locked()

    def close(self) -> None:
        """See `Device.close`."""
        self._unlock()
        self._logs.cleanup()
        self._host.close()

    def _locked(self) -> "subprocess.Popen[bytes]":
        """A process that holds the device's lock until its stdin ends."""
        script = 'mkdir -p "$1" && exec flock -n "$1/lock" sh -c "echo held; exec cat"'
        process = self._host.start(
            ["sh", "-c", script, "sh", self._host.cache], log=Path(self._logs.name) / "lock.txt"
        )
        assert process.stdout is not None
        if process.stdout.readline().strip() != b"held":
            end_group(process)
            raise DeviceBusyError(
                f"Another search uses {self._host.label} ({self._host.cache}/lock is held)."
            )
        return process

    def _unlock(self) -> None:
        if self._lock is not None:
            end_group(self._lock)
            self._lock = None
