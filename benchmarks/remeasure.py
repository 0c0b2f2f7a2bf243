"""Measures the two ONNX files of a run again, with other code than compressor's own.

Nothing of compressor is imported: numpy and onnxruntime only. Every round opens no session; each
of the pairs does, in a process of its own, so that memory layout is drawn afresh. Prints the ratio
original / compressed with a bootstrap interval over the pairs.

    python benchmarks/remeasure.py runs/model-host-cpu
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort


def open_session(path: Path, n_threads: int) -> ort.InferenceSession:
    """A session as a service would open it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def time_pair(folder: Path, n_threads: int, n_rounds: int, seed: int) -> list[float]:
    """Ratios original / compressed of `n_rounds` rounds in one pair of sessions."""
    generator = np.random.default_rng(seed)
    paths = [folder / "original.onnx", folder / "model.onnx"]
    if generator.random() < 0.5:
        sessions = [open_session(path, n_threads) for path in paths]
    else:
        sessions = [open_session(path, n_threads) for path in reversed(paths)][::-1]
    argument = sessions[0].get_inputs()[0]
    inputs = {argument.name: generator.standard_normal(argument.shape).astype(np.float32)}
    for session in sessions * 20:
        session.run(None, inputs)
    ratios = []
    for _ in range(n_rounds):
        seconds = [0.0, 0.0]
        for which in generator.permutation(2):
            before = time.perf_counter()
            sessions[which].run(None, inputs)
            seconds[which] = time.perf_counter() - before
        ratios.append(seconds[0] / seconds[1])
    return ratios


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # the child's part
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(time_pair(args.folder, args.threads, args.rounds, args.one)))
        return
    logs = []
    for pair in range(args.pairs):
        command = [sys.executable, __file__, *sys.argv[1:], "--one", str(pair)]
        child = subprocess.run(command, check=True, capture_output=True, text=True)
        logs.append(float(np.median(np.log(json.loads(child.stdout)))))
    drawn = np.random.default_rng(0).choice(logs, size=(10_000, len(logs)))
    low, high = np.exp(np.percentile(drawn.mean(axis=1), [2.5, 97.5]))
    print(
        f"{args.folder}: {np.exp(np.mean(logs)):.3f}x, 95 % interval [{low:.3f}, {high:.3f}], "
        f"{args.pairs} session pairs of {args.rounds} rounds, {args.threads} thread(s)"
    )


if __name__ == "__main__":
    main()
