"""How many threads torch works with: all of them, or one where those wait for one another.

Torch splits every operation among its threads and waits for the last one. Where other work has the
cores, one of them is always late: beside eight busy processes on two cores, a pass of ResNet-18
took 3.5 s with two threads and 0.6 s with one, a step of training 9 s and 2 s. How many threads
torch has is its own default, or what `OMP_NUM_THREADS` says.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from compressor.running import cloned
from compressor.values import Example, call

logger = logging.getLogger(__name__)

MIN_GAIN = 1.25  # of one thread over all, before it is preferred
N_TIMED = 2  # passes with each, of which the quicker one counts
LONG_S = 2.0  # no second pass where the first took so long


@contextmanager
def restored() -> Iterator[None]:
    """Torch has as many threads afterwards as before, whatever `settle` found."""
    n_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def settling(model: nn.Module, images: Example) -> Callable[[], int]:
    """Settles the threads by a pass of `model`; what does so again when it is called.

    Args:
        model: In eval mode.
        images: As it takes them; not changed.
    """
    most = torch.get_num_threads()

    def work() -> None:
        with torch.inference_mode():
            call(model, cloned(images))

    again = partial(settle, work, most)
    again()
    return again


def settle(work: Callable[[], object], most: int) -> int:
    """Gives torch one thread where `work` is sooner done by one, or else `most`.

    Args:
        work: A pass of a network, or its like.
        most: Threads that torch may have.

    Returns:
        How many it has now.
    """
    if most > 1:
        work()  # the first pass also prepares
        alone_s, together_s = (_seconds(work, n_threads) for n_threads in (1, most))
        torch.set_num_threads(1 if together_s > MIN_GAIN * alone_s else most)
        logger.info("torch works with %d of %d threads", torch.get_num_threads(), most)
    return torch.get_num_threads()


def _seconds(work: Callable[[], object], n_threads: int) -> float:
    """Of the quicker pass."""
    torch.set_num_threads(n_threads)
    taken: list[float] = []
    while len(taken) < N_TIMED and sum(taken) < LONG_S:
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)
