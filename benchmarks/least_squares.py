"""Least squares from a Gram matrix beside the direct solve: the same weights, at what cost?

30,000 rows, as in the released code of BOCR, of a 3x3 convolution with 64 input and 64 output
channels, of which half of the inputs stay. The Gram matrix is gathered once for all candidates,
so what a candidate costs is the small solve alone.

    python benchmarks/least_squares.py
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from compressor.least_squares import refit

N_ROWS, N_CHANNELS, N_TAPS, N_KEPT = 30_000, 64, 9, 32
N_CANDIDATES = 5


def main() -> None:
    """Prints seconds a candidate and the largest difference."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(N_CHANNELS * N_TAPS, N_CHANNELS * N_TAPS, generator=generator)
    rows = torch.randn(N_ROWS, N_CHANNELS * N_TAPS, generator=generator) @ mixing / 24
    rows = rows.relu().double()  # what a layer reads: correlated, and not negative
    weight = torch.randn(N_CHANNELS, N_CHANNELS * N_TAPS, generator=generator).double()
    answers = rows @ weight.T
    began = time.perf_counter()
    gram = rows.T @ rows
    answered = gram @ weight.T
    gathered = time.perf_counter() - began
    direct_s, ours_s, errors = [], [], []
    for seed in range(N_CANDIDATES):
        kept = np.sort(np.random.default_rng(seed).permutation(N_CHANNELS)[:N_KEPT])
        features = torch.from_numpy((kept[:, None] * N_TAPS + np.arange(N_TAPS)).ravel())
        picked = rows[:, features]
        direct, seconds = timed(partial(direct_solve, picked, answers))
        direct_s.append(seconds)
        ours, seconds = timed(partial(refit, gram, answered, features))
        ours_s.append(seconds)
        errors.append(float((ours - direct).abs().max() / direct.abs().max()))
    slow, quick = statistics.median(direct_s), statistics.median(ours_s)
    print(f"gathering once   {gathered:8.3f} s")
    print(f"direct solve     {slow:8.4f} s a candidate")
    print(f"from the Gram    {quick:8.4f} s a candidate, {slow / quick:.0f} times faster")
    print(f"largest difference of weights: {max(errors):.1e} of the largest weight")


def direct_solve(rows: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """As the released code does it."""
    solution: torch.Tensor = torch.linalg.lstsq(rows, answers).solution
    return solution.T


def timed(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """What `work` returns, and how long it took."""
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began


if __name__ == "__main__":
    main()
