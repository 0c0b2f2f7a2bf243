"""TensorRT on a machine that has nothing but `trtexec`, as a stock Jetson Nano.

Every step is one command on a `Host`: build an engine, run it, read what it wrote. Two things
differ from the runtimes that time both models in one process. Each model runs in a process of
its own, so run `i` of one has no partner in the other (`SessionPair.interleaved` is False), and
only medians of neighbouring runs are compared. And versions disagree about flags and defaults
(8.x to 10.x time without a CUDA graph, with transfers; 11 the opposite), so every flag that
matters is given, and `--help` is asked which flags there are. A time is `computeMs`: GPU events
around the kernels, without transfers.
"""

import hashlib
import itertools
import logging
import math
import random
import re
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from compressor.errors import (
    DeviceBusyError,
    DeviceError,
    DeviceLostError,
    MeasurementError,
    RuntimeMissingError,
    TimeLimitError,
    UnsupportedModelError,
)
from compressor.latency import timing
from compressor.latency.host import Done, Host, end_group
from compressor.latency.machine import Model, checked_machine, content_of, mismatch
from compressor.latency.precision import half_onnx
from compressor.latency.ssh import SshHost
from compressor.latency.timing import FINAL, Effort
from compressor.latency.trtexec_text import (
    MIN_ITERATIONS,
    WARM_UP_MS,
    Capabilities,
    MachineState,
    build_command,
    changes,
    classify,
    conditions,
    needs_half_onnx,
    profile_command,
    read_profile,
    read_state,
    read_times,
    run_command,
)
from compressor.scratch import PREFIX, Scratch
from compressor.values import KernelTime, PairedLatency, SessionPair, Target

logger = logging.getLogger(__name__)

MIN_PAIRS = 3
LOCK_IS_HELD = 75  # what flock is told to exit with then
MIN_RUN_S = 2  # starting the process takes a Nano about as long
SHORT_S = 60.0  # limit of commands that should take no time
MAX_ENGINES = 64  # kept on the device, the latest used
COOL_MARGIN_C, COOL_LIMIT_S, COOL_STEP_S = 3.0, 60.0, 2.0
ORIGINAL, CANDIDATE = "original", "candidate"
BROKEN_ENGINE = re.compile(r"deseriali[sz]|invalid engine", re.I)

STATE_SCRIPT = """PATH="$PATH:/usr/sbin"; exec 2>/dev/null
nvpmodel -q | sed 's/^/power /'
for d in /sys/class/devfreq/* /sys/devices/gpu.0/devfreq/*; do
  [ -r "$d/cur_freq" ] && echo "clock ${d##*/}" $(cat "$d/cur_freq" "$d/min_freq" "$d/max_freq")
done
for d in /sys/class/thermal/thermal_zone*; do
  [ -r "$d/temp" ] && echo "temp $(cat "$d/temp") $(cat "$d/type")"
done
true"""
MACHINE_SCRIPT = """exec 2>/dev/null; uname -m
tr -d '\\000' < /proc/device-tree/model; echo; nvidia-smi -L; true"""
REUSE_SCRIPT = 'test -s "$1" && touch "$1"'
TIDY_SCRIPT = 'cd "$1" && ls -t | tail -n +"$2" | while read -r f; do rm -f -- "$f"; done'


def find_trtexec(host: Host, candidates: Sequence[str]) -> tuple[str, Capabilities]:
    """The first of `candidates` that runs on `host`, and what it can do.

    Raises:
        RuntimeMissingError: None runs; the message says what became of each.
    """
    tried = []
    for path in candidates:
        try:
            done = host.run([path, "--help"], limit_s=SHORT_S)
        except (OSError, TimeLimitError) as err:
            tried.append(f"{path} ({err})")
            continue
        if "--loadEngine" in done.text:
            return path, Capabilities.of_help(done.text)
        first_line = (done.text.strip().splitlines() or ["no output"])[0]
        tried.append(f"{path} (exit status {done.code}: {first_line})")
    raise RuntimeMissingError(
        f"No trtexec on {host.label}; looked at {'; '.join(tried) or 'no place at all'}. "
        f"Install TensorRT's samples there, or name the program in the profile "
        f"([runtime] trtexec)."
    )


class TrtexecRunner:
    """The `trtexec` program of a host: each model runs by itself, the two in turn."""

    def __init__(self, host: Host, target: Target) -> None:
        self._host = host
        self._target = target
        self._logs = Scratch(f"{PREFIX}lock-")
        self._lock: subprocess.Popen[bytes] | None = None
        try:
            if isinstance(host, SshHost):
                self._lock = self._locked(host)
            self._program = TrtexecDevice(host, target)
        except BaseException:
            self._unlock()
            self._logs.cleanup()
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
            min_pairs=MIN_PAIRS,
            max_pairs=max(MIN_PAIRS, effort.max_pairs // 4),
            budget_s=effort.budget_s * 20,
        )
        contents = content_of(original), content_of(candidate)
        self._program.take_conditions()
        numbers = itertools.count()  # opposite orders in turn; see `TrtexecDevice.time_pair`

        def time_pair(drawn: int) -> SessionPair:
            del drawn
            seed_of_order = 2 * seed + next(numbers)
            times = self._program.time_pair(*contents, seed=seed_of_order, effort=slower)
            self._check_lock()
            return times

        pair = timing.compare(time_pair, slower, seed=seed)
        return timing.with_conditions(pair, self._program.take_conditions())

    def profile(self, model: Model) -> tuple[KernelTime, ...]:
        """See `Device.profile`."""
        return self._program.profile(content_of(model))

    def reconnect(self) -> None:
        """See `Device.reconnect`."""
        self._unlock()
        if isinstance(self._host, SshHost):
            self._host.reconnect()
            self._lock = self._locked(self._host)

    def close(self) -> None:
        """See `Device.close`."""
        self._unlock()
        self._logs.cleanup()
        self._host.close()

    def _locked(self, host: SshHost) -> "subprocess.Popen[bytes]":
        """A process that holds the device's lock until its stdin ends."""
        hold = "echo held; exec cat > /dev/null"
        script = f'mkdir -p "$1" && exec flock -w 3 -E {LOCK_IS_HELD} "$1/lock" sh -c "{hold}"'
        log = Path(self._logs.name) / "lock.txt"
        process = host.start(["sh", "-c", script, "sh", host.cache], log=log)
        assert process.stdout is not None
        if process.stdout.readline().strip() == b"held":
            return process
        code = process.wait(timeout=SHORT_S)
        end_group(process)
        said = log.read_text(encoding="utf-8", errors="replace").strip()
        if code == LOCK_IS_HELD:
            raise DeviceBusyError(f"Another search uses {host.label} ({host.cache}/lock is held).")
        raise host.refusal(code, said) or DeviceError(
            f"{host.cache}/lock cannot be taken on {host.label}: {said or f'exit status {code}'}"
        )

    def _check_lock(self) -> None:
        """Raises `DeviceLostError` where the lock went with its connection: others may run now."""
        if self._lock is not None and self._lock.poll() is not None:
            raise DeviceLostError(
                f"The connection to {self._host.label} that held its lock was lost."
            )

    def _unlock(self) -> None:
        if self._lock is not None:
            end_group(self._lock)
            self._lock = None


class TrtexecDevice:
    """One machine with trtexec: builds engines there, once each, and times pairs of them.

    Attributes:
        path: The program on the machine.
        capabilities: What it can do.
    """

    def __init__(
        self, host: Host, target: Target, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.path, self.capabilities = find_trtexec(host, target.trtexec)
        self._host, self._target, self._sleep = host, target, sleep
        self._engines = f"{host.cache}/engines"
        self._conditions: dict[str, None] = {}  # an ordered set

    def describe(self) -> dict[str, object]:
        """What measures, and on what: for the report."""
        return {
            "runtime": "trtexec",
            "version": self.capabilities.version_text,
            "path": self.path,
            "host": self._host.label,
            "machine": self._machine,
            "precision": self._target.precision,
            "half_onnx": needs_half_onnx(self.capabilities, self._target.precision),
            "state": asdict(self.state()),
        }

    def state(self) -> MachineState:
        """Power mode, clocks and temperatures, now."""
        done = self._host.run(["sh", "-c", STATE_SCRIPT], limit_s=SHORT_S)
        return read_state(done.stdout.decode("utf-8", "replace"))

    def take_conditions(self) -> tuple[str, ...]:
        """What made measurements doubtful since the last call, each once."""
        taken = tuple(self._conditions)
        self._conditions = {}
        return taken

    def build(self, model: bytes) -> str:
        """Path of the engine of an ONNX file on the device; built only where it is missing.

        After a build it waits until the device is about as cool as before.

        Raises:
            UnsupportedModelError: TensorRT does not take the model.
            OutOfMemoryError: The device has not enough memory to build it.
            TimeLimitError: It took longer than the target's `build_limit_s`.
            MeasurementError: It failed in another way.
        """
        before = self.state()
        engine = f"{self._engines}/{self._key(model, before.power_mode)}.plan"
        if self._shell(REUSE_SCRIPT, engine).code == 0:
            return engine
        self._must(["mkdir", "-p", self._engines])
        half = needs_half_onnx(self.capabilities, self._target.precision)
        try:
            content = half_onnx(model) if half else model
        except ValueError as err:
            raise UnsupportedModelError(str(err)) from err
        onnx = self._host.put(content, "model.onnx")
        part = f"{engine}.{uuid.uuid4().hex[:8]}.part"
        logger.info("Building an engine with trtexec on %s", self._host.label)
        try:
            self._trtexec(self._build_command(onnx, part), self._target.build_limit_s, "build_s")
            self._must(["mv", "-f", part, engine])
        except MeasurementError:
            self._host.run(["rm", "-f", part], limit_s=SHORT_S)
            raise
        finally:
            self._host.remove(onnx)
        self._shell(TIDY_SCRIPT, self._engines, str(MAX_ENGINES + 1))
        self._cool_down(before.hottest_c)
        return engine

    def time_pair(
        self, original: bytes, candidate: bytes, seed: int, effort: Effort
    ) -> SessionPair:
        """Times of both ONNX files, each in one run of its own; not equally many of both.

        Args:
            original: Content of an ONNX file with static shapes.
            candidate: The same.
            seed: Decides who runs first. Seeds `2 i` and `2 i + 1` give opposite orders, so
                that a series of pairs gives nobody the cooler device.
            effort: `pair_s` for each model, rounded up to whole seconds, 2 at least.

        Raises:
            MeasurementError: See `build` and `read_times`.
        """
        engines = {ORIGINAL: self.build(original), CANDIDATE: self.build(candidate)}
        order = [ORIGINAL, CANDIDATE]
        random.Random(seed // 2).shuffle(order)
        if seed % 2:
            order.reverse()
        before = self.state()
        times_ms = {name: self._times(engines[name], effort) for name in order}
        self._note(changes(before, self.state()))
        return SessionPair(times_ms[ORIGINAL], times_ms[CANDIDATE], interleaved=False)

    def profile(self, model: bytes) -> tuple[KernelTime, ...]:
        """What every layer of an ONNX file takes, as TensorRT has fused them.

        Raises:
            MeasurementError: See `build` and `read_profile`.
        """
        engine = self.build(model)
        command = partial(profile_command, self.path, engine=engine, seconds=MIN_RUN_S)
        return read_profile(self._written(lambda file: command(profile=file), engine)[0])

    def _times(self, engine: str, effort: Effort) -> tuple[float, ...]:
        command = partial(
            run_command, self.path, engine=engine,
            seconds=max(MIN_RUN_S, math.ceil(effort.pair_s)),
            min_iterations=max(MIN_ITERATIONS, effort.min_rounds),
        )  # fmt: skip
        written, said = self._written(lambda file: command(times=file), engine)
        self._note(conditions(said))
        return read_times(written, WARM_UP_MS)

    def _written(self, command: Callable[[str], list[str]], engine: str) -> tuple[str, str]:
        """What a run of `engine` writes into the file that `command` names, and its log."""
        file = f"{self._host.cache}/written-{uuid.uuid4().hex}.json"
        try:
            done = self._trtexec(command(file), self._target.run_limit_s / 2, "run_s")
            written = self._must(["cat", file]).stdout.decode("utf-8", "replace")
        except MeasurementError as err:
            if BROKEN_ENGINE.search(str(err)):  # the next try builds anew
                self._host.run(["rm", "-f", engine], limit_s=SHORT_S)
            raise
        finally:
            self._host.run(["rm", "-f", file], limit_s=SHORT_S)
        return written, done.text

    def _build_command(self, onnx: str, engine: str) -> list[str]:
        digest = hashlib.sha256(self._machine.encode()).hexdigest()[:8]
        return build_command(
            self.path, self.capabilities, onnx=onnx, engine=engine,
            timing_cache=f"{self._host.cache}/timing-{self.capabilities.version_text}-{digest}",
            workspace_mib=self._target.workspace_mib, precision=self._target.precision,
        )  # fmt: skip

    def _key(self, model: bytes, power_mode: str) -> str:
        """Changes with all that the engine depends on, so that no stale one is run."""
        parts = [
            hashlib.sha256(model).hexdigest(), self.capabilities.version_text, power_mode,
            self._target.precision, *self._build_command("", ""),
        ]  # fmt: skip
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @cached_property
    def _machine(self) -> str:
        done = self._host.run(["sh", "-c", MACHINE_SCRIPT], limit_s=SHORT_S)
        return " ".join(done.stdout.decode("utf-8", "replace").split())

    def _trtexec(self, command: Sequence[str], limit_s: float, limit: str) -> Done:
        try:
            done = self._host.run(command, limit_s=limit_s)
        except TimeLimitError as err:
            raise TimeLimitError(
                f"trtexec did not end in {limit_s:g} s on {self._host.label}: "
                f"{' '.join(command)}. Raise [limits] {limit} if it needs longer."
            ) from err
        if done.code != 0:
            raise classify(done.text, done.code)
        return done

    def _cool_down(self, start_c: float | None) -> None:
        """Waits until the device is about as cool as `start_c`, for a minute at most."""
        waited_s, now_c = 0.0, self.state().hottest_c
        while start_c is not None and now_c is not None and now_c >= start_c + COOL_MARGIN_C:
            if waited_s >= COOL_LIMIT_S:
                self._note([f"{now_c - start_c:.0f} C warmer than before a build, a minute later"])
                return
            self._sleep(COOL_STEP_S)
            waited_s += COOL_STEP_S
            now_c = self.state().hottest_c

    def _note(self, found: Iterable[str]) -> None:
        self._conditions |= dict.fromkeys(found)

    def _shell(self, script: str, *arguments: str) -> Done:
        return self._host.run(["sh", "-c", script, "sh", *arguments], limit_s=SHORT_S)

    def _must(self, command: Sequence[str]) -> Done:
        done = self._host.run(command, limit_s=SHORT_S)
        if done.code != 0:
            raise MeasurementError(
                f"{' '.join(command)} failed on {self._host.label} with exit status "
                f"{done.code}: {done.text.strip()[:500]}"
            )
        return done
