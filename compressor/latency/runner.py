"""What runs beside the model on the device: times pairs of sessions, on request.

One file with the standard library only, fit for the Python 3.6 of a stock Jetson Nano: it is a
child process on this machine, and is sent to others as it is. It reads one JSON object a line on
stdin and answers each with one on stdout; what libraries print goes to stderr. The first line
it writes says what it is. It ends when stdin does, busy or not.

    {"do": "pair", "original": PATH, "candidate": PATH, "options": {...}, "seed": 0,
     "seconds": 0.2, "limit_s": 2.0, "min_rounds": 6, "max_rounds": 200, "n_warmup": 8,
     "warmup_s": 0.04}
        -> {"original_ms": [...], "candidate_ms": [...],
            "original_cpu_ms": [...], "candidate_cpu_ms": [...],
            "original_interruptions": [...], "candidate_interruptions": [...], "seconds": 1.3}
    {"do": "state"} -> what the machine says of its clocks, temperatures and load
    any of them     -> {"error": {"kind": KIND, "message": TEXT}}

Options may name an .npz file with "inputs", arrays under the names of the model's inputs: ids of
a table must lie in it. What is not there is drawn.

CPU times are those of the thread that runs the model, where one thread does; interruptions are
the context switches that the process did not ask for, and 1 where a run took longer than its CPU
time without any. What a system cannot tell is missing.

While it measures, the runner wants to be left alone: it asks the system for precedence over other
work (which root gets on Linux) and for long slices of time (which anybody gets from Linux 6.12
on). It waits between requests, so others lose no more than it uses. What it got stands in its
first line.

`tensorrt_runner` speaks the same and adds {"do": "build"}.
"""

import argparse
import ctypes
import glob
import json
import os
import platform
import random
import re
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from typing import IO, Any, Callable, Dict, List, Optional, Tuple

PROTOCOL = 2

# Kinds of errors; what they mean for a search is decided where they are read.
UNSUPPORTED, OUT_OF_MEMORY, FAILED = "unsupported", "out-of-memory", "failed"
RUNTIME_MISSING, BUSY, CLOCK, REQUEST = "runtime-missing", "busy", "clock", "request"

CPU = "CPUExecutionProvider"
PACKAGES = {
    CPU: "onnxruntime",
    "CUDAExecutionProvider": "onnxruntime-gpu",
    "TensorrtExecutionProvider": "onnxruntime-gpu (and TensorRT's libraries)",
    "OpenVINOExecutionProvider": "onnxruntime-openvino",
    "XnnpackExecutionProvider": "an onnxruntime that was built with --use_xnnpack",
    "QNNExecutionProvider": "onnxruntime-qnn",
}
BOUND_DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}
TAKES_PARTS = ("XnnpackExecutionProvider",)  # leaves nodes to the CPU by design
DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}
WHOLE = {  # what whole numbers mean is not known here: they come with the request
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}

NS_PER_MS = 1e6
PRECEDENCE = -20  # niceness: before all ordinary work
PRECEDENCE_VARIABLE = "COMPRESSOR_NICENESS"  # another niceness, of machines that serve meanwhile
SLICE_MS = 20  # a run of 10 ms is interrupted half as often as with the usual 3
SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "arm64": 274}  # number of the system call
MIN_WARMUP = 1  # runs of each, beside the one that a session is opened with
MAX_WAIT, COARSE_MS = 0.1, 0.05  # of a run, and ms: that it may take beside its CPU time
MAX_OTHERS = 0.1  # of one thread's CPU time, that others may take while it does all the work
MAX_RETAKEN = 3  # times the seconds asked for, while rounds are interrupted and taken again
LOCK_WAIT_S = 3.0  # a runner whose host gave it up needs a second to end


Open = Callable[[], Callable[[], int]]  # a fresh session, as a function that returns nanoseconds


class RunnerError(Exception):
    """A request that cannot be met; `kind` says why."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def clock_ns() -> int:
    """A monotonic clock in nanoseconds (`time.perf_counter_ns` is younger than Python 3.6)."""
    return int(time.perf_counter() * 1e9)


def timed(
    run_once: Callable[[], object], clock: Callable[[], int] = clock_ns
) -> Callable[[], int]:
    """`run_once` as a function that returns the nanoseconds it took."""

    def run() -> int:
        before = clock()
        run_once()
        return clock() - before

    return run


class Meter:
    """What other work does not move: the CPU time of this thread, and who interrupted us.

    Attributes:
        has_thread_clock: Whether one thread does all the work, and the system has its clock.
    """

    def __init__(self, one_thread: bool) -> None:
        self.has_thread_clock = one_thread and hasattr(time, "CLOCK_THREAD_CPUTIME_ID")
        try:
            import resource
        except ImportError:  # not a Unix
            self._usage: Optional[Callable[[], Any]] = None
        else:
            self._usage = lambda: resource.getrusage(resource.RUSAGE_SELF)

    def cpu_ns(self) -> int:
        """CPU time of this thread in nanoseconds; 0 where there is no clock for it."""
        if not self.has_thread_clock:
            return 0
        return int(time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID) * 1e9)

    def others_ns(self) -> int:
        """CPU time of all other threads of this process in nanoseconds."""
        return int(time.process_time() * 1e9) - self.cpu_ns()

    def n_interruptions(self) -> Optional[int]:
        """Context switches that this process did not ask for; None where nobody counts them."""
        return None if self._usage is None else int(self._usage().ru_nivcsw)


class Samples:
    """What the runs of one model took.

    Attributes:
        ms: By the clock on the wall, or that of a GPU.
        cpu_ms: CPU time of the thread; empty without its clock.
        interruptions: Of every run; empty where nobody counts them.
    """

    def __init__(self) -> None:
        self.ms: List[float] = []
        self.cpu_ms: List[float] = []
        self.interruptions: List[int] = []

    def take(self, run: Callable[[], int], meter: Any) -> bool:
        """Adds one run; whether nothing interrupted it, as far as anybody knows."""
        before, cpu_before = meter.n_interruptions(), meter.cpu_ns()
        took_ns = run()
        cpu_ns, after = meter.cpu_ns() - cpu_before, meter.n_interruptions()
        if took_ns <= 0:
            raise RunnerError(CLOCK, f"one inference took {took_ns} ns by the clock")
        self.ms.append(took_ns / NS_PER_MS)
        if meter.has_thread_clock:
            self.cpu_ms.append(cpu_ns / NS_PER_MS)
        if before is None or after is None:
            return True
        self.interruptions.append(after - before)
        return bool(after == before)

    def settle(self, has_all: bool) -> None:
        """Forgets CPU times that miss what other threads did; else counts what nobody counted.

        A process that is stopped (SIGSTOP, a frozen container), or waits for memory, was not
        switched off: its run takes longer than its CPU time.
        """
        if not has_all:
            self.cpu_ms = []
        elif self.interruptions:
            for i, ms in enumerate(self.ms):
                if ms - self.cpu_ms[i] > MAX_WAIT * ms + COARSE_MS:
                    self.interruptions[i] = max(1, self.interruptions[i])


def time_pair(
    open_original: Open,
    open_candidate: Open,
    seed: int,
    seconds: float,
    limit_s: float,
    min_rounds: int,
    max_rounds: int,
    n_warmup: int,
    warmup_s: float,
    clock: Callable[[], int] = clock_ns,
    meter: Any = None,
) -> Tuple[Samples, Samples]:
    """Times of both models: they run once each in every round, in random order.

    Where one thread does the work, its own clock says when the time is spent, so that a busy
    machine gets as many rounds as a quiet one, within `limit_s`. Elsewhere rounds that were
    interrupted are taken again, for `MAX_RETAKEN` times as long as was asked for.

    Args:
        open_original: Opens a fresh session; returns a function that runs it once and returns
            the nanoseconds that took.
        open_candidate: Does so for the candidate.
        seed: Of the order.
        seconds: Time of all rounds, warm-up apart.
        limit_s: Time of the pair by the clock on the wall, `min_rounds` apart.
        min_rounds: At least this many, however slow the models.
        max_rounds: At most this many, however quick.
        n_warmup: Untimed runs of each, at most.
        warmup_s: It ends after this long, too, but for `MIN_WARMUP` runs.
        clock: Monotonic, in nanoseconds.
        meter: What tells CPU time and interruptions; None for those of this process.

    Returns:
        Of the original and the candidate, equally long; run `i` of both is of the same round.
    """
    meter = meter or Meter(one_thread=False)
    order = random.Random(seed)
    began = clock()
    if order.random() < 0.5:  # who is opened first gets the better memory
        run_original = open_original()
        run_candidate = open_candidate()
    else:
        run_candidate = open_candidate()
        run_original = open_original()
    busy_ns = meter.cpu_ns if meter.has_thread_clock else clock
    started = busy_ns()
    for i in range(n_warmup):
        if i >= MIN_WARMUP and busy_ns() - started >= warmup_s * 1e9:
            break
        run_original()
        run_candidate()
    original, candidate = Samples(), Samples()
    runs = [(run_original, original), (run_candidate, candidate)]
    _take_rounds(runs, order, seconds, limit_s, min_rounds, max_rounds, began, clock, meter)
    return original, candidate


def _take_rounds(
    runs: List[Tuple[Callable[[], int], Samples]],
    order: random.Random,
    seconds: float,
    limit_s: float,
    min_rounds: int,
    max_rounds: int,
    began: int,
    clock: Callable[[], int],
    meter: Any,
) -> None:
    """Fills the samples of both `runs`, round by round; see `time_pair`."""
    samples = [each for _, each in runs]
    n_rounds, n_clean, clean_ms = 0, 0, 0.0  # clean: nothing interrupted them
    started = meter.cpu_ns()
    others = meter.others_ns() if meter.has_thread_clock else 0
    while n_rounds < max_rounds:
        if meter.has_thread_clock:
            n_done, spent_s, most_s = n_rounds, (meter.cpu_ns() - started) / 1e9, limit_s
        else:
            n_done, spent_s = n_clean, clean_ms / 1e3
            most_s = min(limit_s, MAX_RETAKEN * seconds)
        is_spent = spent_s > seconds - 1e-9 and n_done >= min_rounds
        is_late = clock() - began >= most_s * 1e9 and n_rounds >= min_rounds
        if is_spent or is_late:
            break
        order.shuffle(runs)
        n_rounds += 1
        if all([each.take(run, meter) for run, each in runs]):  # both are run in any case
            n_clean, clean_ms = n_clean + 1, clean_ms + sum(each.ms[-1] for each in samples)
    if meter.has_thread_clock:
        spent_ns, others_ns = meter.cpu_ns() - started, meter.others_ns() - others
        for each in samples:
            each.settle(has_all=others_ns <= MAX_OTHERS * spent_ns)


def precedence() -> Dict[str, Any]:
    """Asks the system to be left alone while measuring; what it granted.

    Linux shares cores by session ("autogroup") before it looks at niceness, so both are asked for.
    """
    wanted = os.environ.get(PRECEDENCE_VARIABLE, str(PRECEDENCE))
    if not re.fullmatch(r"-?[0-9]{1,2}", wanted) or not -20 <= int(wanted) <= 19:
        raise RunnerError(
            REQUEST, f"{PRECEDENCE_VARIABLE} is {wanted!r}; expected a niceness from -20 to 19."
        )
    niceness, slice_ms = 0, 0
    if hasattr(os, "setpriority"):
        try:
            os.setpriority(os.PRIO_PROCESS, 0, int(wanted))
            if os.getsid(0) != os.getpid():
                os.setsid()  # precedence is for this process, not for who started it
            with open("/proc/self/autogroup", "w") as file:
                file.write(wanted)
        except OSError:  # an ordinary user, or a system that does not share by session
            pass
        niceness = os.getpriority(os.PRIO_PROCESS, 0)
    if _with_slices(SLICE_MS, niceness):
        slice_ms = SLICE_MS
    return {"niceness": niceness, "slice_ms": slice_ms}


def _with_slices(ms: int, niceness: int) -> bool:
    """Asks for slices of time that are this long; whether the system knows how to."""
    number = SCHED_SETATTR.get(platform.machine())
    release = [int(part) for part in re.findall(r"\d+", platform.release())[:2]]
    if platform.system() != "Linux" or number is None or release < [6, 12]:
        return False

    class Attributes(ctypes.Structure):
        _fields_ = [
            ("size", ctypes.c_uint32),
            ("policy", ctypes.c_uint32),
            ("flags", ctypes.c_uint64),
            ("niceness", ctypes.c_int32),
            ("priority", ctypes.c_uint32),
            ("runtime_ns", ctypes.c_uint64),
            ("deadline_ns", ctypes.c_uint64),
            ("period_ns", ctypes.c_uint64),
        ]

    size = ctypes.sizeof(Attributes)
    wanted = Attributes(size, 0, 0, niceness, 0, ms * 1000000, 0, 0)
    return bool(ctypes.CDLL(None).syscall(number, 0, ctypes.byref(wanted), 0) == 0)


class OnnxRuntime:
    """ONNX Runtime as a backend: what `serve` needs to know of a runtime."""

    def __init__(self) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # else it tells of the models it runs
        try:
            import numpy
            import onnxruntime
        except ImportError as err:
            raise RunnerError(
                RUNTIME_MISSING,
                f"Python {platform.python_version()} at {sys.executable} has no onnxruntime "
                f"({err}); install it: {sys.executable} -m pip install onnxruntime",
            ) from err
        self.numpy = numpy
        self.ort = onnxruntime

    def hello(self) -> Dict[str, Any]:
        """What the host is told of this runtime."""
        return {
            "runtime": "onnxruntime",
            "version": self.ort.__version__,
            "providers": list(self.ort.get_available_providers()),
        }

    def open(self, path: str, options: Dict[str, Any]) -> Callable[[], int]:
        """A fresh session on fixed inputs, as a function that runs it once.

        The graph is optimised anew for this CPU each time; a file that ONNX Runtime has
        optimised elsewhere may hold that CPU's layout.
        """
        session = self._session(path, options, self._settings(options))
        run = self._runs(session, options)
        return timed(run)

    def runs_in_one_thread(self, options: Dict[str, Any]) -> bool:
        """Whether the thread that asks does all the work, so that its own clock tells of it."""
        provider = options.get("provider", CPU)
        return bool(provider == CPU and int(options.get("n_threads", 1)) == 1)

    def profile(self, path: str, options: Dict[str, Any], n_runs: int) -> List[List[Any]]:
        """[name, kind, milliseconds] of every node as it runs, in order; medians of `n_runs`.

        A node of the optimised graph is called after the tensor or node that it makes.
        """
        folder = tempfile.mkdtemp()
        try:
            settings = self._settings(options)
            settings.enable_profiling = True
            settings.profile_file_prefix = os.path.join(folder, "nodes")
            session = self._session(path, options, settings)
            run = self._runs(session, options)
            for _ in range(n_runs):
                run()
            with open(session.end_profiling()) as file:
                events = json.load(file)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        times: Dict[Tuple[str, str], List[float]] = {}
        suffix = "_kernel_time"
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(suffix):
                key = event["name"][: -len(suffix)], event["args"].get("op_name", "")
                times.setdefault(key, []).append(event["dur"] / 1000.0)
        medians = []
        for (name, kind), each in times.items():
            last = sorted(each[-n_runs:])  # the first run is a warm-up
            medians.append([name, kind, last[len(last) // 2]])
        return medians

    def _settings(self, options: Dict[str, Any]) -> Any:
        provider = options.get("provider", CPU)
        settings = self.ort.SessionOptions()
        settings.intra_op_num_threads = int(options.get("n_threads", 1))
        settings.inter_op_num_threads = 1
        settings.execution_mode = self.ort.ExecutionMode.ORT_SEQUENTIAL
        settings.log_severity_level = 4  # what goes wrong comes as an exception too
        if hasattr(settings, "add_session_config_entry"):
            add = settings.add_session_config_entry
            add("session.intra_op.allow_spinning", "0")  # two sessions share the cores
            add("session.set_denormal_as_zero", "1")  # both models alike
            if provider != CPU and provider not in TAKES_PARTS:
                add("session.disable_cpu_ep_fallback", "1")
        return settings

    def _session(self, path: str, options: Dict[str, Any], settings: Any) -> Any:
        provider = options.get("provider", CPU)
        self._check_provider(provider)
        try:
            session = self.ort.InferenceSession(path, settings, providers=[provider])
        except Exception as err:  # each of its errors is one by itself
            raise RunnerError(kind_of(err), f"ONNX Runtime cannot load the model: {err}") from err
        if provider not in session.get_providers():
            raise RunnerError(
                FAILED,
                f"ONNX Runtime fell back to {', '.join(session.get_providers())}; {provider} was "
                f"asked.",
            )
        return session

    def _runs(self, session: Any, options: Dict[str, Any]) -> Callable[[], object]:
        """What runs `session` once; it has done so once."""
        bound_to = BOUND_DEVICES.get(options.get("provider", CPU))
        run = self._bound(session, self._inputs(session, options.get("inputs")), bound_to)
        try:
            run()
        except Exception as err:
            raise RunnerError(kind_of(err), f"ONNX Runtime cannot run the model: {err}") from err
        return run

    def _check_provider(self, provider: str) -> None:
        available = self.ort.get_available_providers()
        if provider not in available:  # ONNX Runtime itself would silently take the CPU
            raise RunnerError(
                RUNTIME_MISSING,
                f"The profile asks for {provider}; this onnxruntime has {', '.join(available)}. "
                f"Install {PACKAGES.get(provider, 'a build that has it')}.",
            )

    def _inputs(self, session: Any, path: Optional[str]) -> Dict[str, Any]:
        """What the file at `path` holds, else normal random numbers, the same for every session.

        Zeros would hide slow paths.
        """
        generator = self.numpy.random.RandomState(0)
        given = given_inputs(self.numpy, path)
        inputs = {}
        for argument in session.get_inputs():
            if not all(isinstance(side, int) for side in argument.shape):
                raise RunnerError(
                    UNSUPPORTED,
                    f"Input {argument.name} has the shape {argument.shape}; latency is measured "
                    f"at a static shape. Export with a fixed batch size.",
                )
            kind = DTYPES.get(argument.type) or WHOLE.get(argument.type)
            if kind is None or (argument.type in WHOLE and argument.name not in given):
                raise RunnerError(
                    UNSUPPORTED,
                    f"Input {argument.name} is {argument.type}; expected "
                    f"{', '.join(sorted(DTYPES))}.",
                )
            if argument.name in given:
                values = given[argument.name].reshape(argument.shape)
                inputs[argument.name] = values.astype(kind)
                continue
            values = generator.standard_normal(argument.shape)
            inputs[argument.name] = values.astype(kind)
        return inputs

    def _bound(
        self, session: Any, inputs: Dict[str, Any], device: Optional[str]
    ) -> Callable[[], object]:
        """A function that runs the session; a GPU has its inputs and outputs in its memory."""
        outputs = [output.name for output in session.get_outputs()]
        if device is None:
            return lambda: session.run(outputs, inputs)
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, self.ort.OrtValue.ortvalue_from_numpy(value, device))
        for name in outputs:
            binding.bind_output(name, device)

        def run() -> None:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run


def given_inputs(numpy: Any, path: Optional[str]) -> Dict[str, Any]:
    """The arrays of an .npz file; none without one."""
    if path is None:
        return {}
    with numpy.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def kind_of(err: BaseException) -> str:
    """Whether the runtime could not read the model, had no memory, or failed otherwise."""
    text, name = str(err).lower(), type(err).__name__
    if isinstance(err, MemoryError) or "bad_alloc" in text or "failed to allocate" in text:
        return OUT_OF_MEMORY
    if "out of memory" in text or "bfc_arena" in text:
        return OUT_OF_MEMORY
    if name in ("NotImplemented", "InvalidGraph", "InvalidProtobuf", "NoSuchFile"):
        return UNSUPPORTED
    if "opset" in text or "not implemented" in text or "unsupported model ir" in text:
        return UNSUPPORTED
    return FAILED


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(100000).replace(b"\0", b"").decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _output(command: List[str]) -> str:
    """What a small program prints; "" where there is none."""
    try:
        done = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        return done.communicate(timeout=5)[0].decode("utf-8", "replace").strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def instruction_set() -> str:
    """Widest vector instructions of this CPU: "AVX512", "AVX2", "NEON" or "OTHER"."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "NEON"
    flags = set(cpu_flags().split())
    if set(["avx512f", "avx512bw", "avx512vl"]) <= flags:
        return "AVX512"
    return "AVX2" if "avx2" in flags else "OTHER"


def cpu_flags() -> str:
    """What the kernel says that this CPU can do; empty where it says nothing."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith(("flags", "Features")):
            return line.partition(":")[2].strip()
    return ""


def describe() -> Dict[str, Any]:
    """What the machine is: everything that a profile can be matched with, and that stays."""
    cpu = ""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith(("model name", "Model")):
            cpu = line.partition(":")[2].strip()
            break
    memory_mib = 0
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemTotal"):
            memory_mib = int(line.split()[1]) // 1024
    return {
        "machine": platform.machine(),
        "model": _read("/proc/device-tree/model") or cpu or platform.processor(),
        "instruction_set": instruction_set(),
        "cpu_flags": cpu_flags(),
        "n_cores": os.cpu_count(),
        "memory_mib": memory_mib,
        "boot_id": _read("/proc/sys/kernel/random/boot_id"),
        "l4t": _read("/etc/nv_tegra_release").split("\n")[0],
    }


def state() -> Dict[str, Any]:
    """What the machine says of its clocks, temperatures, throttling and load, now."""
    temperatures = {}
    for zone in glob.glob("/sys/class/thermal/thermal_zone*"):
        value = _read(zone + "/temp")
        if value.lstrip("-").isdigit():
            temperatures[_read(zone + "/type") or os.path.basename(zone)] = int(value) / 1000.0
    clocks = {}
    for pattern in (
        "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq",
        "/sys/class/devfreq/*/cur_freq",
    ):
        for path in glob.glob(pattern):
            value = _read(path)
            if value.isdigit():
                clocks[path.split("/")[-3 if "cpufreq" in path else -2]] = int(value)
    found: Dict[str, Any] = {
        "temperatures_c": temperatures,
        "clocks": clocks,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "power_mode": _output(["nvpmodel", "-q"]),
        "throttled": _output(["vcgencmd", "get_throttled"]),
    }
    if hasattr(os, "getloadavg"):
        found["load"] = os.getloadavg()[0]
    ticks = _read("/proc/stat").split("\n")[0].split()[1:9]
    if len(ticks) == 8:
        counts = [int(each) for each in ticks]
        idle = counts[3] + counts[4]
        found["busy_ticks"], found["stolen_ticks"] = sum(counts) - idle, counts[7]
    return found


def serve(make_backend: Callable[[], Any], arguments: Optional[List[str]] = None) -> int:
    """Answers requests until stdin ends; returns the exit code."""
    parser = argparse.ArgumentParser(description="Times ONNX models on request; see the source.")
    parser.add_argument("--lock", help="file that only one runner may hold")
    parser.add_argument("--memory-mib", type=int, help="of this process; 0 for all there is")
    given = parser.parse_args(arguments)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print

    def answer(content: Dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        kept = _locked(given.lock) if given.lock else None
        if given.lock:
            _take_temporary_folder(given.lock)
        if given.memory_mib is not None:
            _limit_memory(given.memory_mib or describe()["memory_mib"])
        backend = make_backend()
        hello = {"protocol": PROTOCOL, "python": platform.python_version()}
        hello.update(backend.hello())
        hello.update(describe())
        hello.update(precedence())
    except RunnerError as err:
        answer({"error": {"kind": err.kind, "message": str(err)}})
        return 1
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    answer(hello)
    for line in sys.stdin:
        began = time.monotonic()
        try:
            reply = _reply(backend, line)
            reply["seconds"] = time.monotonic() - began
            answer(reply)
        except RunnerError as err:
            answer({"error": {"kind": err.kind, "message": str(err)}})
        except MemoryError:
            answer({"error": {"kind": OUT_OF_MEMORY, "message": "no memory left"}})
    del kept
    return 0


def _reply(backend: Any, line: str) -> Dict[str, Any]:
    try:
        request = json.loads(line)
        what = request["do"]
    except (ValueError, KeyError, TypeError) as err:
        raise RunnerError(REQUEST, f"not a request: {line[:200]!r}") from err
    if what == "state":
        return state()
    if what == "pair":
        options = request.get("options", {})
        original, candidate = time_pair(
            lambda: backend.open(request["original"], options),
            lambda: backend.open(request["candidate"], options),
            request["seed"],
            request["seconds"],
            request["limit_s"],
            request["min_rounds"],
            request["max_rounds"],
            request["n_warmup"],
            request["warmup_s"],
            meter=Meter(backend.runs_in_one_thread(options)),
        )
        return {
            "original_ms": original.ms,
            "candidate_ms": candidate.ms,
            "original_cpu_ms": original.cpu_ms,
            "candidate_cpu_ms": candidate.cpu_ms,
            "original_interruptions": original.interruptions,
            "candidate_interruptions": candidate.interruptions,
        }
    if what == "profile" and hasattr(backend, "profile"):
        options = request.get("options", {})
        return {"nodes": backend.profile(request["model"], options, request["n_runs"])}
    if what == "build" and hasattr(backend, "build"):
        built = backend.build(request["model"], request["engine"], request.get("options", {}))
        return dict(built)
    raise RunnerError(REQUEST, f"unknown request {what!r}")


def _locked(path: str) -> "IO[str]":
    """The open lock file; it is free again when this process is gone, however it went."""
    import fcntl

    folder = os.path.dirname(path)
    if folder and not os.path.isdir(folder):
        os.makedirs(folder)
    file = open(path, "a+")  # noqa: SIM115  the lock lives as long as it is open
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as err:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            file.seek(0)
            holder = file.read(200).strip()
            raise RunnerError(BUSY, f"another search uses this device: {holder}") from err
    file.truncate(0)
    file.write(f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file


def _take_temporary_folder(lock: str) -> None:
    """From now on temporary files lie beside the lock; what runners that were killed left goes.

    Whoever has the lock is the only one that has such files there.
    """
    folder = os.path.abspath(lock) + ".tmp"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        os.mkdir(folder, 0o700)
    except OSError:
        return  # a link in its place, or a full disk: the system's own folder serves too
    tempfile.tempdir = os.environ["TMPDIR"] = folder


def _limit_memory(mib: int) -> None:
    """More than this fails as an allocation, before the system kills somebody for it."""
    if not mib:
        return  # a system without /proc
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (mib * 2**20, mib * 2**20))


def _end_with_stdin() -> None:
    """Ends this process, whatever it is busy with, when nobody can ask it any more."""
    poll = select.poll()
    poll.register(0, 0)  # asks for nothing but the end
    while True:
        if any(what & (select.POLLHUP | select.POLLERR) for _, what in poll.poll()):
            time.sleep(1)  # an idle process ends by itself
            os._exit(1)


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path = [folder for folder in sys.path if folder != here]  # it has an `onnxruntime` too
    sys.exit(serve(OnnxRuntime))
