"""What trtexec is told, and what it says: flags by version, times, errors, clocks.

Nothing here runs anything: text in, values out. The formats are those of TensorRT 8.0 to 11.
"""

import json
import math
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compressor.errors import (
    MeasurementError,
    OutOfMemoryError,
    RuntimeCrashError,
    TimeLimitError,
    UnstableClockError,
    UnsupportedModelError,
)
from compressor.files import parsed_json
from compressor.latency.precision import FP16
from compressor.values import KernelTime

WARM_UP_MS = 500
MIN_ITERATIONS = 10
MAX_CLOCK_CHANGE, MAX_WARMING_C = 0.05, 10.0

BANNER = re.compile(r"\[TensorRT v(\d{4,6})\]")
LEVEL = re.compile(r"^(\[[\d/:-]+\] )?\[(?P<level>[A-Z])\] (\[TRT\] )?(ModelImporter\.cpp:\d+: )?")
NODE = re.compile(r"While parsing node number \d+")
NODE_REASON = re.compile(r"ERROR:|Assertion failed|UNSUPPORTED|Invalid Node|no importer", re.I)
OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|bad_alloc|memory .*could not be allocated|^Killed\b", re.I
)
NO_TACTIC = re.compile(r"could not find any implementation|insufficient workspace", re.I)
NOT_PARSED = re.compile(r"failed to parse|parsing model failed|unsupported onnx", re.I)
UNSTABLE = re.compile(r"GPU compute time is unstable.*", re.I)
NO_GRAPH = re.compile(r"graph capture failed|not permitted under CUDA graph", re.I)
CAPTURING = re.compile(r"capturing CUDA graph", re.I)
CAPTURED = re.compile(r"successfully captured CUDA ?graph", re.I)
GPU_CLOCK = re.compile(r"gpu|\bg[pvab]\d+b", re.I)  # 57000000.gpu, 17000000.gp10b, .gv11b, .ga10b
FIXED_ZONE = re.compile(r"pmic", re.I)  # a Nano's PMIC says 100 C, always


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
        flags = set(re.findall(r"^[ \t]*(--\w+)", text, re.MULTILINE))
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


def needs_half_onnx(capabilities: Capabilities, precision: str) -> bool:
    """Whether the ONNX file itself must be half precision for an engine of `precision`."""
    return precision == FP16 and not capabilities.has_fp16


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


def profile_command(path: str, *, engine: str, profile: str, seconds: int) -> list[str]:
    """The command that runs `engine` once more with a profiler and writes the file `profile`.

    A profiler rules out CUDA graphs, so these times add up to more than an inference takes.
    """
    return [
        path, f"--loadEngine={engine}", "--separateProfileRun", "--noDataTransfers",
        f"--warmUp={WARM_UP_MS}", f"--duration={seconds}", f"--iterations={MIN_ITERATIONS}",
        f"--exportProfile={profile}",
    ]  # fmt: skip


def read_profile(text: str) -> tuple[KernelTime, ...]:
    """The layers in the file that `--exportProfile` writes, in the order they run in.

    Before 8.5 it holds no medians, and means are taken.

    Raises:
        MeasurementError: The file is cut off, or is something else.
    """
    try:
        rows = parsed_json(text)
    except ValueError as err:
        raise MeasurementError(f"trtexec's profile is no JSON: {err}.") from err
    if not isinstance(rows, list):
        raise MeasurementError(f"trtexec's profile is {type(rows).__name__}; expected a list.")
    found = []
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            continue  # the first one only counts runs
        ms = _number(row, "medianMs" if "medianMs" in row else "averageMs", number)
        found.append(KernelTime(row["name"], "", max(0.0, ms)))
    return tuple(found)


def read_times(text: str, warm_up_ms: float) -> tuple[float, ...]:
    """Milliseconds of each inference in the file that `--exportTimes` writes.

    Rows that start before `warm_up_ms` are dropped: 8.0 to 8.4 write them too. Later versions
    leave them out and do not shift the rest, so the rule is the same for all.

    Raises:
        MeasurementError: The file is cut off, is something else, or has under two rows left.
        UnstableClockError: A time is not above zero, or the rows run backwards.
    """
    try:
        rows = parsed_json(text)
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
    refused = [line for line in log.splitlines() if NO_GRAPH.search(line)]
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
