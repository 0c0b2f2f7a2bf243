#!/usr/bin/env python3
"""An imitation of trtexec: speaks the formats of TensorRT 8.2, 8.5, 10.3 and 11.4, needs no GPU.

Flags, banner, log lines and files are those of the real program as far as they were found in its
source and in logs that people published; it has never been compared with a real one on a device.
Its times are made up: proportional to the size of the ONNX file, with 2 % of noise. Standard
library only. `install` writes a program that is this one at one version.

What the ONNX file contains makes it fail (only the first marker counts):
    imitate:unsupported  a node that the parser refuses
    imitate:oom          killed while it builds, as by Linux when memory runs out
    imitate:cuda-oom     CUDA says that memory ran out
    imitate:no-tactic    no kernel fits into the workspace
    imitate:segfault     crashes
    imitate:build-hang   never ends to build
and, once built, the runs of its engine:
    imitate:run-hang     never end
    imitate:half-json    write half of their times
    imitate:no-json      write no times
    imitate:zero         write a time of zero
    imitate:backwards    write times that start before the ones before
    imitate:unstable     find their own times unstable
    imitate:no-graph     cannot capture a CUDA graph
    imitate:stale        cannot read the engine
"""

import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO

BANNERS = {"8.2": "8201", "8.5": "8502", "10": "100300", "11": "110400"}
COMMON = [
    "onnx", "saveEngine", "loadEngine", "timingCacheFile", "iterations", "warmUp", "duration",
    "avgRuns", "exportTimes", "useCudaGraph", "useSpinWait", "noDataTransfers", "verbose",
    "percentile", "help", "exportProfile", "separateProfileRun",
]  # fmt: skip
OWN = {
    "8.2": ["workspace", "buildOnly", "fp16", "int8", "best", "streams"],
    "8.5": ["workspace", "memPoolSize", "buildOnly", "fp16", "int8", "best", "streams"],
    "10": ["memPoolSize", "skipInference", "fp16", "int8", "best", "infStreams"],
    "11": ["memPoolSize", "skipInference", "noCudaGraph", "noSpinWait", "infStreams"],
}
WITH_WARM_UP_ROWS = ("8.2",)
SILENT_CAPTURE = ("8.2", "8.5")  # they speak of a CUDA graph only when it fails
MS_PER_BYTE = 1e-3
MARKER = re.compile(rb"imitate:([a-z-]+)")
NODE = re.compile(
    rb"(?:/[\w.]+)*/(?:Conv|Gemm|Relu|Add|MaxPool|ReduceMean|Flatten)(?:_\d+)?(?=\W)"
)
STAMP = "[11/22/2026-05:44:42] "


def install(folder: Path, version: str, name: str = "trtexec") -> str:
    """Writes the program `name` into `folder`, this one at `version`; returns its path."""
    path = folder / name
    here = Path(__file__).resolve()
    path.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{here}' --as={version} \"$@\"\n")
    path.chmod(0o755)
    return str(path)


def say(line: str, stream: TextIO = sys.stdout) -> None:
    stream.write(line + "\n")
    stream.flush()


def info(line: str) -> None:
    say(f"{STAMP}[I] {line}")


def warning(line: str) -> None:
    say(f"{STAMP}[W] {line}", sys.stderr)


def error(line: str) -> None:
    say(f"{STAMP}[E] {line}", sys.stderr)


def help_text(version: str) -> str:
    flags = "\n".join(f"  --{flag:<26}As the real one" for flag in COMMON + OWN[version])
    return f"=== Model and Build Options ===\n{flags}"


def hang() -> None:
    while True:
        time.sleep(60)


def refuse_node(version: str) -> int:
    """What the parser says of a node that it does not know, in the words of `version`."""
    if version == "11":
        error('While parsing node number 12 [Gelu -> "x"]:\nInvalid Node - /act/Gelu')
    else:
        at = {"8.2": 773, "8.5": 771, "10": 949}[version]
        file = "builtin_op_importers.cpp:4870" if version == "8.2" else "onnxOpImporters.cpp:6281"
        for number, line in enumerate(
            (
                'While parsing node number 12 [Gelu -> "x"]:',
                "--- Begin node ---",
                'input: "w"\noutput: "x"\nname: "/act/Gelu"\nop_type: "Gelu"\n',
                "--- End node ---",
                f"ERROR: {file} In function importFallbackPluginImporter:\n[8] Assertion failed: "
                'creator && "Plugin not found, are the plugin name, version, and namespace '
                'correct?"',
            )
        ):
            error(f"[TRT] ModelImporter.cpp:{at + number}: {line}")
    error("Failed to parse onnx file")
    error("Parsing model failed")
    error("Failed to create engine from model or file.")
    error("Engine set up failed")
    return 1


def build(version: str, options: dict[str, str]) -> int:
    """Writes an engine that holds the size of the ONNX file and what is wrong with it."""
    with open(options["onnx"], "rb") as file:
        model = file.read()
    found = MARKER.search(model)
    marker = found.group(1).decode() if found else ""
    warning("[TRT] Some tactics do not have sufficient workspace memory to run: out of memory")
    if marker == "unsupported":
        return refuse_node(version)
    if marker == "oom":
        os.kill(os.getpid(), signal.SIGKILL)
    if marker == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if marker == "cuda-oom":
        error(
            "Error[1]: [defaultAllocator.cpp::allocate::20] Error Code 1: Cuda Runtime "
            "(out of memory)"
        )
        error("Engine could not be created from network")
        return 1
    if marker == "no-tactic":
        error(
            "Error[10]: [optimizer.cpp::computeCosts::2011] Error Code 10: Internal Error "
            "(Could not find any implementation for node Conv_0.)"
        )
        return 1
    if marker == "build-hang":
        hang()
    divisor = 2 if "fp16" in options else 1
    engine: dict[str, object] = {
        "n_bytes": len(model) / divisor,
        "marker": marker,
        "banner": BANNERS[version],
        "nodes": list(dict.fromkeys(name.decode() for name in NODE.findall(model))),
    }
    with open(options["saveEngine"], "w") as file:
        json.dump(engine, file)
    if "timingCacheFile" in options:
        with open(options["timingCacheFile"], "a") as file:
            file.write("built\n")
    info("Engine built in 0.1 sec.")
    return 0


def row(start_ms: float, took_ms: float, with_end_to_end: bool) -> dict[str, float]:
    end_ms = start_ms + took_ms
    found = {
        "startEnqMs": start_ms - 0.01, "endEnqMs": start_ms, "startH2dMs": start_ms,
        "endH2dMs": start_ms, "startComputeMs": start_ms, "endComputeMs": end_ms,
        "startD2hMs": end_ms, "endD2hMs": end_ms, "h2dMs": 0, "computeMs": took_ms, "d2hMs": 0,
        "latencyMs": took_ms,
    }  # fmt: skip
    if with_end_to_end:
        found["endToEndMs"] = 2 * took_ms  # double-buffered: no latency of one inference
    return found


def profile(version: str, engine: dict[str, Any]) -> str:
    """The layers, an activation fused into the convolution before it; all take the same."""
    layers: list[str] = []
    for name in engine["nodes"]:
        if layers and "/Relu" in name and re.search(r"/(Conv|Add)(_\d+)?$", layers[-1]):
            layers[-1] += f" + PWN({name})" if version.startswith("8") else f" + {name}"
        else:
            layers.append(name)
    layers.insert(0, f"Reformatting CopyNode for Input Tensor 0 to {layers[0] if layers else ''}")
    average_ms = engine["n_bytes"] * MS_PER_BYTE / len(layers)
    rows: list[dict[str, object]] = [{"count": 100}]
    for layer in layers:
        row = {"name": layer, "timeMs": 100 * average_ms, "averageMs": average_ms}
        median = {} if version == "8.2" else {"medianMs": average_ms}
        rows.append({**row, **median, "percentage": 100 / len(layers)})
    return "[\n  " + "\n, ".join(json.dumps(row) for row in rows) + "\n]\n"


def run(version: str, options: dict[str, str]) -> int:
    """Writes made-up times; those of the warm-up are three times as long."""
    with open(options["loadEngine"]) as file:
        engine = json.load(file)
    if engine["marker"] == "stale" or engine["banner"] != BANNERS[version]:
        error(
            "Error[4]: [runtime.cpp::deserializeCudaEngine::50] Internal Error (Engine "
            "deserialization failed.)"
        )
        error("Engine deserialization failed")
        error("Got invalid engine!")
        error("Inference set up failed")
        return 1
    if engine["marker"] == "run-hang":
        hang()
    is_graph = "useCudaGraph" in options or version == "11"
    if is_graph and version not in SILENT_CAPTURE:
        info("Capturing CUDA graph for the current execution context")
    if is_graph and engine["marker"] == "no-graph":
        warning(
            "The built TensorRT engine contains operations that are not permitted under CUDA "
            "graph capture mode."
        )
    elif is_graph and version not in SILENT_CAPTURE:
        info("Successfully captured CUDA graph for the current execution context")
    warm_up_ms, n_least = float(options.get("warmUp", 200)), int(options.get("iterations", 10))
    end_ms = warm_up_ms + 1000 * int(options.get("duration", 3))
    noise, start_ms, n_timed = random.Random(), 0.5, 0
    rows: list[dict[str, float]] = []
    while start_ms < end_ms or n_timed < n_least:
        is_warm = start_ms >= warm_up_ms
        took_ms = engine["n_bytes"] * MS_PER_BYTE * noise.uniform(0.98, 1.02)
        took_ms *= 1 if is_warm else 3
        n_timed += is_warm
        if is_warm or version in WITH_WARM_UP_ROWS:
            rows.append(row(start_ms, took_ms, version == "8.2"))
        start_ms += took_ms
    if engine["marker"] == "zero":
        rows[-1]["computeMs"] = 0
    if engine["marker"] == "backwards":
        rows[-1]["startComputeMs"] = rows[0]["startComputeMs"] - 1
    text = "[\n  " + "\n, ".join(json.dumps(one) for one in rows) + "\n]\n"
    if engine["marker"] == "half-json":
        text = text[: len(text) // 2]
    if "exportTimes" in options and engine["marker"] != "no-json":
        with open(options["exportTimes"], "w") as file:
            file.write(text)
    if "exportProfile" in options:
        with open(options["exportProfile"], "w") as file:
            file.write(profile(version, engine))
    info("GPU Compute Time: min = 1 ms, max = 1 ms, mean = 1 ms, median = 1 ms")
    if engine["marker"] == "unstable":
        warning("* GPU compute time is unstable, with coefficient of variance = 4.75734%.")
        warning(
            "  If not already in use, locking GPU clock frequency or adding --useSpinWait may "
            "improve the stability."
        )
    return 0


def main(arguments: list[str]) -> int:
    """Does what the real one does with `arguments`; the first says which version that is."""
    version = os.environ.get("IMITATION_TRTEXEC", "8.2")
    if arguments and arguments[0].startswith("--as="):
        version = arguments.pop(0)[len("--as=") :]
    banner = f"TensorRT.trtexec [TensorRT v{BANNERS[version]}] # trtexec {' '.join(arguments)}"
    say(f"&&&& RUNNING {banner}")
    options = {}
    for argument in arguments:
        flag, _, value = argument.partition("=")
        options[flag[2:]] = value
    unknown = [flag for flag in options if flag not in COMMON + OWN[version]]
    if unknown or not options or "help" in options:
        for flag in unknown:
            error(f"Unknown option: --{flag} {options[flag]}")
        say(help_text(version))
        code = 1 if unknown else 0
    else:
        code = 0
        if "onnx" in options:
            code = build(version, options)
        if not code and "buildOnly" not in options and "skipInference" not in options:
            code = run(version, options)
    if code:
        say(f"&&&& FAILED {banner}", sys.stderr)
    else:
        say(f"&&&& PASSED {banner}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
