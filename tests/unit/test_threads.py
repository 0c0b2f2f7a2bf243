"""How many threads torch works with."""

import time
from collections.abc import Iterator

import pytest
import torch

from compressor.threads import restored, settle


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with restored():
        yield


def work_of(alone_s: float, together_s: float) -> None:
    time.sleep(alone_s if torch.get_num_threads() == 1 else together_s)


@pytest.mark.parametrize(
    ("alone_s", "together_s", "n_threads"),
    [(0.02, 0.01, 4), (0.02, 0.021, 4), (0.01, 0.05, 1)],
    ids=["all are sooner done", "as soon", "they wait for one another"],
)
def test_one_thread_where_several_wait_for_one_another(
    alone_s: float, together_s: float, n_threads: int
) -> None:
    assert settle(lambda: work_of(alone_s, together_s), 4) == n_threads
    assert torch.get_num_threads() == n_threads


def test_they_come_back_when_the_machine_is_free_again() -> None:
    settle(lambda: work_of(0.01, 0.05), 4)
    assert settle(lambda: work_of(0.02, 0.01), 4) == 4


def test_where_torch_may_have_one_nothing_is_timed() -> None:
    torch.set_num_threads(1)
    settle(lambda: pytest.fail("was run"), 1)
    assert torch.get_num_threads() == 1


def test_threads_are_restored() -> None:
    torch.set_num_threads(2)
    with restored():
        torch.set_num_threads(1)
    assert torch.get_num_threads() == 2
