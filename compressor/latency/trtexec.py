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
import json
import logging
import math
import random
import re
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from compressor.errors import (
    MeasurementError,
    OutOfMemoryError,
    RuntimeCrashError,
    RuntimeMissingError,
    TimeLimitError,
    UnstableClockError,
    UnsupportedModelError,
)
from compressor.latency.host import Done, Host
from compressor.latency.timing import Effort
from compressor.values import SessionPair, Target

logger = logging.getLogger(__name__)

WARM_UP_MS = 500
MIN_RUN_S = 2  # starting the process takes a Nano about as long
MIN_ITERATIONS = 10
SHORT_S = 60.0  # limit of commands that should take no time
MAX_ENGINES = 64  # kept on the device, the latest used
COOL_MARGIN_C, COOL_LIMIT_S, COOL_STEP_S = 3.0, 60.0, 2.0
MAX_CLOCK_CHANGE, MAX_WARMING_C = 0.05, 10.0
FP16 = "fp16"
ORIGINAL, CANDIDATE = "original", "candidate"

BANNER = re.compile(r"\[TensorRT v(\d{4,6})\]")
LEVEL = re.compile(r"^(\[[\d/:-]+\] )?\[(?P<level>[A-Z])\] (\[TRT\] )?(ModelImporter\.cpp:\d+: )?")
NODE = re.compile(r"While parsing node number \d+")
NODE_REASON = re.compile(r"ERROR:|Assertion failed|UNSUPPORTED|Invalid Node|no importer", re.I)
OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|bad_alloc|memory .*could not be allocated|^Killed\b", re.I
)
NO_TACTIC = re.compile(r"could not find any implementation|insufficient workspace", re.I)
NOT_PARSED = re.compile(r"failed to parse|parsing model failed|unsupported onnx", re.I)
BROKEN_ENGINE = re.compile(r"deseriali[sz]|invalid engine", re.I)
UNSTABLE = re.compile(r"GPU compute time is unstable.*", re.I)
NO_GRAPH = re.compile(r".*(graph capture failed|not permitted under CUDA graph).*", re.I)
CAPTURING = re.compile(r"capturing CUDA graph", re.I)
CAPTURED = re.compile(r"successfully captured CUDA ?graph", re.I)
GPU_CLOCK = re.compile(r"gpu|\bg[pvab]\d+b", re.I)  # 57000000.gpu, 17000000.gp10b, .gv11b, .ga10b
FIXED_ZONE = re.compile(r"pmic", re.I)  # a Nano's PMIC says 100 C, always

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


@dataclass(frozen=True)
class Capabilities:
    """What one `trtexec --help` shows.

    Attributes:
        version: Of TensorRT, as (8, 2, 1); empty where the banner has none (before 8.2).
        has_mem_pool: Takes `--memPoolSize`.
        has_workspace: Takes `--workspace`.
        has_skip_inference: Takes `--skipInference`.
        has_build_only: Takes `--buildOnly`.
        has_fp16: Takes `--fp16`; 11 wants the ONNX file itself to be half.
        has_timing_cache: Takes `--timingCacheFile`.
    """

    version: tuple[int, ...]
    has_mem_pool: bool
    has_workspace: bool
    has_skip_inference: bool
    has_build_only: bool
    has_fp16: bool
    has_timing_cache: bool

    @classmethod
    def of_help(cls, text: str) -> "Capabilities":
        """Read from the help text and the banner above it."""
        flags = set(re.findall(r"^\s*(--\w+)", text, re.MULTILINE))
        return cls(
            decode_version(text), "--memPoolSize" in flags, "--workspace" in flags,
            "--skipInference" in flags, "--buildOnly" in flags, "--fp16" in flags,
            "--timingCacheFile" in flags,
        )  # fmt: skip

    @property
    def version_text(self) -> str:
        """The version with dots, or "unknown"."""
        return ".".join(map(str, self.version)) or "unknown"


@dataclass(frozen=True)
class MachineState:
    """What can move between two measurements; what a machine lacks is empty.

    Attributes:
        power_mode: As `nvpmodel -q` names it.
        clocks_hz: Device of devfreq -> its clock now.
        unlocked: Those whose clock may move.
        temperatures_c: Thermal zone -> degrees Celsius.
    """

    power_mode: str
    clocks_hz: Mapping[str, int]
    unlocked: tuple[str, ...]
    temperatures_c: Mapping[str, float]

    @property
    def hottest_c(self) -> float | None:
        """The highest temperature, but for zones that always say the same."""
        zones = self.temperatures_c.items()
        return max((c for zone, c in zones if not FIXED_ZONE.search(zone)), default=None)


def decode_version(text: str) -> tuple[int, ...]:
    """(major, minor, patch) of the banner in `text`, empty where it has none.

    Example:
        >>> decode_version("&&&& RUNNING TensorRT.trtexec [TensorRT v8201] # trtexec")
        (8, 2, 1)
        >>> decode_version("[TensorRT v101602]")
        (10, 16, 2)
    """
    found = BANNER.search(text)
    if not found:
        return ()
    number = int(found[1])
    per_minor = 10 if number < 10_000 else 100  # four digits until 8.6, then two for each part
    return number // (100 * per_minor), number // 100 % per_minor, number % 100


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


def needs_half_onnx(capabilities: Capabilities, precision: str) -> bool:
    """Whether the ONNX file itself must be half precision for an engine of `precision`."""
    return precision == FP16 and not capabilities.has_fp16


def half_onnx(model: bytes) -> bytes:
    """`model` in half precision; inputs and outputs stay float32, as `--fp16` leaves them."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    half = convert_float_to_float16(onnx.load_model_from_string(model), keep_io_types=True)
    return bytes(half.SerializeToString())


def build_command(
    path: str,
    capabilities: Capabilities,
    *,
    onnx: str,
    engine: str,
    timing_cache: str,
    workspace_mib: int,
    precision: str,
) -> list[str]:
    """The command that builds `engine` and does not run it.

    The workspace is always given: 8.x takes 16 MiB otherwise, too little for fast kernels.
    """
    command = [path, f"--onnx={onnx}", f"--saveEngine={engine}"]
    if capabilities.has_timing_cache:
        command.append(f"--timingCacheFile={timing_cache}")
    if precision == FP16 and capabilities.has_fp16:
        command.append("--fp16")
    if capabilities.has_mem_pool:
        command.append(f"--memPoolSize=workspace:{workspace_mib}")
    elif capabilities.has_workspace:
        command.append(f"--workspace={workspace_mib}")
    if capabilities.has_skip_inference:
        command.append("--skipInference")
    elif capabilities.has_build_only:
        command.append("--buildOnly")
    return command


def run_command(
    path: str,
    *,
    engine: str,
    times: str,
    seconds: int,
    warm_up_ms: int = WARM_UP_MS,
    min_iterations: int = MIN_ITERATIONS,
) -> list[str]:
    """The command that times `engine` and writes the file `times`; one for all versions.

    8.x and 10.x need the first three flags, 11 takes them for its defaults.
    """
    return [
        path, f"--loadEngine={engine}", "--useCudaGraph", "--useSpinWait", "--noDataTransfers",
        f"--warmUp={warm_up_ms}", f"--duration={seconds}", f"--iterations={min_iterations}",
        "--avgRuns=1", f"--exportTimes={times}",
    ]  # fmt: skip


def read_times(text: str, warm_up_ms: float) -> tuple[float, ...]:
    """Milliseconds of each inference in the file that `--exportTimes` writes.

    Rows that start before `warm_up_ms` are dropped: 8.0 to 8.4 write them too. Later versions
    leave them out and do not shift the rest, so the rule is the same for all.

    Raises:
        MeasurementError: The file is cut off, is something else, or has under two rows left.
        UnstableClockError: A time is not above zero, or the rows run backwards.
    """
    try:
        rows = json.loads(text)
    except ValueError as err:
        raise MeasurementError(
            f"trtexec's times are no JSON, or were cut off after {len(text)} characters: {err}."
        ) from err
    if not isinstance(rows, list):
        raise MeasurementError(f"trtexec's times are {type(rows).__name__}; expected a list.")
    times_ms, latest_ms = [], -math.inf
    for number, row in enumerate(rows):
        start_ms = _number(row, "startComputeMs", number)
        compute_ms = _number(row, "computeMs", number)
        if not (math.isfinite(compute_ms) and compute_ms > 0):
            raise UnstableClockError(f"Row {number} of trtexec's times took {compute_ms:g} ms.")
        if not start_ms >= latest_ms:  # a NaN is not either
            raise UnstableClockError(
                f"Row {number} of trtexec's times starts at {start_ms:g} ms, the one before at "
                f"{latest_ms:g} ms: the clock ran backwards."
            )
        latest_ms = start_ms
        if start_ms >= warm_up_ms:
            times_ms.append(compute_ms)
    if len(times_ms) < 2:
        raise MeasurementError(
            f"trtexec wrote {len(rows)} rows, {len(times_ms)} of them after the warm-up of "
            f"{warm_up_ms:g} ms; at least 2 are needed."
        )
    return tuple(times_ms)


def _number(row: object, key: str, number: int) -> float:
    value = row.get(key) if isinstance(row, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise MeasurementError(
            f"Row {number} of trtexec's times has no number {key}, but {json.dumps(row)[:200]}."
        )
    return float(value)


def classify(text: str, code: int) -> MeasurementError:
    """Why trtexec failed, told by its log and its exit status.

    Args:
        text: All that it printed.
        code: Exit status; negative, or 128 and more, where a signal ended it.
    """
    levels = [(LEVEL.match(line), line.strip()) for line in text.splitlines()]
    told = [LEVEL.sub("", line) for level, line in levels if not level or level["level"] == "E"]
    errors = [LEVEL.sub("", line) for level, line in levels if level and level["level"] == "E"]
    last = "; ".join(errors[-3:]) or (told[-1] if told else "it printed nothing")
    number = -code if code < 0 else code - 128
    if number == signal.SIGKILL:
        return OutOfMemoryError(
            f"trtexec was killed (exit status {code}), as Linux does when memory runs out. Last "
            f"words: {last}. Lower [limits] workspace_mib, or stop what else runs there."
        )
    if any(OUT_OF_MEMORY.search(line) for line in told):
        return OutOfMemoryError(f"The device's memory is too small for the model: {last}.")
    if any(NODE.search(line) for line in told) or any(NOT_PARSED.search(line) for line in errors):
        return UnsupportedModelError(f"TensorRT does not take the model: {_parser_lines(told)}")
    if any(NO_TACTIC.search(line) for line in errors):
        return UnsupportedModelError(
            f"TensorRT has no kernel for a layer in this workspace: {last}. A larger [limits] "
            f"workspace_mib may help."
        )
    if code == 124:  # of `timeout`
        return TimeLimitError(f"trtexec took longer than it may: {last}.")
    if 0 < number < signal.NSIG:
        return RuntimeCrashError(
            f"trtexec crashed by {signal.Signals(number).name} (exit status {code}): {last}."
        )
    return MeasurementError(f"trtexec failed with exit status {code}: {last}.")


def _parser_lines(lines: Sequence[str]) -> str:
    """The node that was refused, and why; of 11, too, that writes fewer lines."""
    at = next((i for i, line in enumerate(lines) if NODE.search(line)), None)
    if at is None:
        return "; ".join(line for line in lines if NOT_PARSED.search(line))
    reasons = [line for line in lines[at + 1 :] if NODE_REASON.search(line)]
    return " ".join([lines[at], *reasons[:2]])


def conditions(log: str) -> tuple[str, ...]:
    """What in the log of a run makes its times doubtful, in words.

    Many versions are silent about a CUDA graph unless its capture fails.
    """
    found = [match[0].strip() for match in [UNSTABLE.search(log)] if match]
    refused = NO_GRAPH.search(log)
    if refused or (CAPTURING.search(log) and not CAPTURED.search(log)):
        why = f": {LEVEL.sub('', refused[0].strip())}" if refused else ""
        found.append(f"it ran without a CUDA graph{why}")
    return tuple(found)


def read_state(text: str) -> MachineState:
    """What `STATE_SCRIPT` printed."""
    power, unlocked = "", set()
    clocks: dict[str, int] = {}
    temperatures: dict[str, float] = {}
    for line in text.splitlines():
        kind, _, rest = line.partition(" ")
        words = rest.split()
        if kind == "power" and (mode := re.match(r"NV Power Mode:\s*(\S+)", rest)):
            power = mode[1]
        elif kind == "clock" and len(words) > 1 and all(word.isdigit() for word in words[1:]):
            clocks[words[0]] = int(words[1])
            if len(set(words[2:])) > 1:
                unlocked.add(words[0])
        elif kind == "temp" and words and words[0].isdigit():  # a zone that is off is negative
            temperatures[" ".join(words[1:]) or f"zone {len(temperatures)}"] = int(words[0]) / 1e3
    return MachineState(power, clocks, tuple(sorted(unlocked)), temperatures)


def changes(before: MachineState, after: MachineState) -> tuple[str, ...]:
    """What moved while a pair was measured, in words; empty where the machine kept still."""
    found = []
    if before.power_mode != after.power_mode:
        found.append(f"the power mode went from {before.power_mode} to {after.power_mode}")
    for name in sorted(set(before.clocks_hz) & set(after.clocks_hz)):
        was, now = before.clocks_hz[name] / 1e6, after.clocks_hz[name] / 1e6
        if not GPU_CLOCK.search(name):
            continue
        if abs(now - was) > MAX_CLOCK_CHANGE * was:
            found.append(f"the GPU's clock went from {was:.0f} to {now:.0f} MHz")
        elif name in before.unlocked:
            found.append("the GPU's clock is not locked; run sudo jetson_clocks")
    if before.hottest_c is not None and after.hottest_c is not None:
        warming = after.hottest_c - before.hottest_c
        if warming > MAX_WARMING_C:
            found.append(f"the device grew {warming:.0f} C warmer, to {after.hottest_c:.0f} C")
    return tuple(found)


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
        onnx = self._host.put(half_onnx(model) if half else model, "model.onnx")
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

    def _times(self, engine: str, effort: Effort) -> tuple[float, ...]:
        times = f"{self._host.cache}/times-{uuid.uuid4().hex}.json"
        command = run_command(
            self.path, engine=engine, times=times,
            seconds=max(MIN_RUN_S, math.ceil(effort.pair_s)),
            min_iterations=max(MIN_ITERATIONS, effort.min_rounds),
        )  # fmt: skip
        try:
            done = self._trtexec(command, self._target.run_limit_s / 2, "run_s")
            self._note(conditions(done.text))
            written = self._must(["cat", times]).stdout.decode("utf-8", "replace")
        except MeasurementError as err:
            if BROKEN_ENGINE.search(str(err)):  # the next try builds anew
                self._host.run(["rm", "-f", engine], limit_s=SHORT_S)
            raise
        finally:
            self._host.run(["rm", "-f", times], limit_s=SHORT_S)
        return read_times(written, WARM_UP_MS)

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
