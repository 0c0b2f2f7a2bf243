"""A model timed against itself, and against one of known speed, on a busy machine.

Models of about 1, 3 and 10 ms, with the effort of a trial. Printed are, for a model against
itself, the mean and the worst distance of the ratio from 1 and how often the 95 % interval holds
1; for a pair, the mean and the worst distance from its ratio on the quiet machine; the seconds of
a comparison; and the clock that decided. Beside the machine as it is, as many busy processes as
there are cores, and six times as many, each in a session of its own (`benchmarks/busy.py`).

Root's runner has precedence over other work; rows "as a user" are those of a runner without it.
At the end, what each part is for: ratios by the wall's clock, and one session after the other.

    python -m benchmarks.latency_noise
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

import compressor
from benchmarks.busy import busy_sessions
from compressor.latency import runner
from compressor.latency.device import Device
from compressor.latency.timing import TRIAL, Effort, paired_ratio
from compressor.values import Clock, PairedLatency

N_PIXELS = {"1 ms": 24, "3 ms": 40, "10 ms": 72}
WHOLE, CUT = 64, 48  # channels
REFERENCE = Effort(min_pairs=40, max_pairs=80, budget_s=15, half_width=0.002)

Files = Mapping[int, Path]


def network(n_channels: int) -> nn.Module:
    """Four convolutions."""
    body = [nn.Conv2d(n_channels, n_channels, 3, padding=1) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, n_channels, 3, padding=1), nn.ReLU(), *body).eval()


@contextmanager
def device_of(*, is_root: bool) -> Iterator[Device]:
    """This machine; its runner, where it is not root's, asks for no precedence."""
    niceness = str(runner.PRECEDENCE if is_root else 0)
    target = compressor.load_target("host-cpu")
    with (
        mock.patch.dict(os.environ, {runner.PRECEDENCE_VARIABLE: niceness}),
        compressor.open_device(target) as device,
    ):
        device.describe()
        yield device


def block_ratio(path: Path, n_runs: int = 100) -> float:
    """First all runs of one session, then all runs of another."""
    medians = []
    for _ in range(2):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name, shape = session.get_inputs()[0].name, session.get_inputs()[0].shape
        image = {name: np.random.default_rng(0).random(shape, np.float32)}
        taken = []
        for _ in range(n_runs):
            began = time.perf_counter()
            session.run(None, image)
            taken.append(time.perf_counter() - began)
        medians.append(np.median(taken[n_runs // 10 :]))
    return float(medians[0] / medians[1])


def far(ratios: Sequence[float], right: float) -> str:
    """Mean and worst distance."""
    distances = [abs(ratio / right - 1) for ratio in ratios]
    return f"{np.mean(distances):6.2%} {max(distances):7.2%}"


def row(
    name: str, compare: Callable[[int, int], PairedLatency], n_repeats: int, right: float
) -> str:
    """What `n_repeats` comparisons of either kind came to."""
    began = time.perf_counter()
    same = [compare(WHOLE, seed) for seed in range(n_repeats)]
    known = [compare(CUT, seed) for seed in range(n_repeats)]
    seconds = (time.perf_counter() - began) / (2 * n_repeats)
    n_covered = sum(pair.ci95[0] <= 1 <= pair.ci95[1] for pair in same)
    n_by_cpu = sum(pair.clock is Clock.THREAD_CPU for pair in (*same, *known))
    interrupted = np.mean([pair.interrupted or 0.0 for pair in (*same, *known)])
    mean = np.exp(np.mean([np.log(pair.ratio) for pair in known])) / right - 1
    wall = [paired_ratio(pair.session_pairs, Clock.WALL)[0] for pair in same]
    return (
        f"{name:<34} {far([p.ratio for p in same], 1)}  {n_covered:>2} of {n_repeats}  "
        f"{far([p.ratio for p in known], right)} {mean:+7.2%}  {seconds:5.2f}  "
        f"{interrupted:5.0%}  {n_by_cpu:>2} of {2 * n_repeats}   {far(wall, 1)}"
    )


def compared(device: Device, files: Files, n_channels: int, seed: int) -> PairedLatency:
    """The whole network against the one of so many channels, as a trial does it."""
    return device.compare(files[WHOLE], files[n_channels], effort=TRIAL, seed=seed)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=20)
    n_repeats = parser.parse_args().repeats
    n_cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        models: dict[str, Files] = {
            name: {
                n: compressor.export_onnx(
                    network(n), torch.zeros(1, 3, side, side), Path(folder, f"{n}-{side}.onnx")
                )
                for n in (WHOLE, CUT)
            }
            for name, side in N_PIXELS.items()
        }
        with device_of(is_root=True) as device:
            described = device.describe()
            print(f"{described['model']}, {n_cores} cores, ONNX Runtime {described['version']}; "
                  f"{n_repeats} comparisons of each kind")  # fmt: skip
            right = {}
            for name, files in models.items():
                pair = device.compare(files[WHOLE], files[CUT], effort=REFERENCE)
                right[name] = pair.ratio
                print(f"{name}: {pair.original.median_ms:.2f} ms, quiet ratio {pair.ratio:.4f} "
                      f"[{pair.ci95[0]:.4f}, {pair.ci95[1]:.4f}]")  # fmt: skip
        print(f"\n{'':<34} {'against itself':>14}  {'holds 1':>8}  {'a known pair':>14} "
              f"{'bias':>7}  {'secs':>5}  {'inter':>5}  {'CPU clock':>8}  {'by the wall':>14}",
              flush=True)  # fmt: skip
        for n_busy, is_root in (
            (0, True), (n_cores, True), (6 * n_cores, True), (6 * n_cores, False)
        ):  # fmt: skip
            with device_of(is_root=is_root) as device, busy_sessions(n_busy):
                for name, files in models.items():
                    label = f"{n_busy} busy, {name}{'' if is_root else ', as a user'}"
                    compare = partial(compared, device, files)
                    print(row(label, compare, n_repeats, right[name]), flush=True)
        with busy_sessions(6 * n_cores):
            ratios = [block_ratio(models["3 ms"][WHOLE]) for _ in range(max(2, n_repeats // 4))]
        print(f"\n{6 * n_cores} busy, 3 ms, one session after the other: {far(ratios, 1)}")


if __name__ == "__main__":
    main()
