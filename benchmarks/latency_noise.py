"""A model timed against itself on a busy machine: what each way of timing makes of it.

Every ratio should be 1. Printed are the mean and the worst distance from it, how often the 95 %
interval holds 1, and the seconds of a comparison; first with every core kept busy by other
processes, then on the machine as it is. At the end a pair of models of known order is compared in
the time of a trial, ten times, and beside a reference of a minute.

    python benchmarks/latency_noise.py
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

import compressor
from compressor.latency.device import Device
from compressor.latency.timing import FINAL, TRIAL, Effort

N_PIXELS = 40
REFERENCE = Effort(min_pairs=60, max_pairs=400, budget_s=60, half_width=0.0)
BUSY = "import numpy as n\na = n.random.rand(400, 400)\nwhile True: a = a @ a % 1.0"

Ratio = tuple[float, tuple[float, float]]


def network(n_channels: int) -> nn.Module:
    """About 3 ms with 64 channels on one core."""
    body = [nn.Conv2d(n_channels, n_channels, 3, padding=1) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, n_channels, 3, padding=1), nn.ReLU(), *body).eval()


@contextmanager
def busy_cores(n_processes: int) -> Iterator[None]:
    """That many processes that never rest."""
    one = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", BUSY], env=one) for _ in range(n_processes)
    ]
    time.sleep(1)
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def block_timing(path: Path, seed: int, n_runs: int = 200) -> Ratio:
    """First all runs of one session, then all runs of another; a bootstrap over both."""
    times = []
    for _ in range(2):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        image = {"input": np.random.default_rng(0).random((1, 3, N_PIXELS, N_PIXELS), np.float32)}
        for _ in range(10):
            session.run(None, image)
        taken = []
        for _ in range(n_runs):
            began = time.perf_counter()
            session.run(None, image)
            taken.append(time.perf_counter() - began)
        times.append(np.array(taken))
    generator = np.random.default_rng(seed)
    resampled = [
        np.median(generator.choice(times[0], n_runs))
        / np.median(generator.choice(times[1], n_runs))
        for _ in range(1000)
    ]
    low, high = np.percentile(resampled, (2.5, 97.5))
    return float(np.median(times[0]) / np.median(times[1])), (float(low), float(high))


def paired(device: Device, path: Path, effort: Effort, seed: int) -> Ratio:
    """As the product does it."""
    pair = device.compare(path, path, effort=effort, seed=seed)
    return pair.ratio, pair.ci95


def report(name: str, n_repeats: int, compare: Callable[[int], Ratio]) -> None:
    """One row of the table."""
    began = time.perf_counter()
    ratios = [compare(seed) for seed in range(n_repeats)]
    seconds = (time.perf_counter() - began) / n_repeats
    far = [abs(ratio - 1) for ratio, _ in ratios]
    n_covered = sum(low <= 1 <= high for _, (low, high) in ratios)
    print(f"{name:<28} {np.mean(far):>7.2%} {max(far):>7.2%}   {n_covered:>2} of {n_repeats}"
          f"   {seconds:>6.2f}", flush=True)  # fmt: skip


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=20)
    n_repeats = parser.parse_args().repeats
    n_cores = len(os.sched_getaffinity(0))
    target = compressor.load_target("host-cpu")
    with tempfile.TemporaryDirectory() as folder, compressor.open_device(target) as device:
        example = torch.zeros(1, 3, N_PIXELS, N_PIXELS)
        whole, half = (
            compressor.export_onnx(network(n), example, Path(folder, f"{n}.onnx"))
            for n in (64, 48)
        )
        described = device.describe()
        print(f"{described['model']}, {n_cores} cores, ONNX Runtime {described['version']}")
        for load, n_busy in (("every core busy", n_cores), ("as it is", 0)):
            print(f"\n{load:<28} {'mean':>7} {'worst':>7}   covered    seconds")
            with busy_cores(n_busy):
                report("block timing, 200 runs each", n_repeats, lambda s: block_timing(whole, s))
                report("a trial", n_repeats, lambda s: paired(device, whole, TRIAL, s))
                report("a final figure", n_repeats, lambda s: paired(device, whole, FINAL, s))
        reference = device.compare(whole, half, effort=REFERENCE)
        low, high = reference.ci95
        print(f"\n64 against 48 channels, {reference.original.median_ms:.2f} ms: reference of a "
              f"minute {reference.ratio:.4f} [{low:.4f}, {high:.4f}]")  # fmt: skip
        began = time.perf_counter()
        trials = [device.compare(whole, half, effort=TRIAL, seed=s).ratio for s in range(10)]
        seconds = (time.perf_counter() - began) / len(trials)
        far = [abs(ratio / reference.ratio - 1) for ratio in trials]
        print(f"ten trials of {seconds:.2f} s: mean {np.mean(far):.2%}, worst {max(far):.2%} away")


if __name__ == "__main__":
    main()
