"""A network whose training runs more than its evaluation, and losses that teach nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor.errors import CompressorError, TaskError, TrainingError
from compressor.job import prepare
from tests.conftest import ConvNet, training_of
from tests.end_to_end.test_tasks import Regression, TwoHeads

HERE = "tests.end_to_end.test_learning"
Make = Callable[..., compressor.Config]


class Auxiliary(ConvNet):
    """Answers with two heads while it is in training mode, as GoogLeNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 5, 1))

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x.sub_(0.0))  # it writes over its input, too
        return (logits, self.aux(x).mean((2, 3))) if self.training else logits


class Detached(TwoHeads):
    """Of which nothing can be learned."""

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            return super().forward(x)


class NoGradient(Regression):
    def loss(self, outputs: Any, targets: list[dict[str, Tensor]]) -> Tensor:
        return super().loss(outputs, targets).detach()


class NoNumber(Regression):
    def loss(self, outputs: Any, targets: list[dict[str, Tensor]]) -> Tensor:
        return super().loss(outputs, targets) * float("nan")


class NeedsMore(Regression):
    def loss(self, outputs: Any, targets: list[dict[str, Tensor]]) -> Tensor:
        return super().loss(outputs, targets) + outputs["aux"].sum()


def make_auxiliary() -> Auxiliary:
    return Auxiliary()


def make_detached() -> Detached:
    return Detached()


@pytest.fixture
def make_config(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(Regression, "weights", trained)
    net = make_auxiliary()
    net.load_state_dict(torch.load(trained, weights_only=True), strict=False)
    torch.save(net.state_dict(), tmp_path / "auxiliary.pt")
    torch.save(torch.load(trained, weights_only=True), tmp_path / "model.pt")

    def make(file: str = "model.pt", **flags: object) -> compressor.Config:
        small: dict[str, object] = {
            "target": "host-cpu", "arch": "tests.end_to_end.test_tasks:make_two_heads",
            "speedup": 1.05, "trials": 3, "fine_tune_epochs": 1, "out": tmp_path / "run",
        }  # fmt: skip
        return compressor.load_config(tmp_path / file, small | flags)

    return make


def test_a_network_with_a_head_for_training_only(
    make_config: Make, blobs: Path, tmp_path: Path
) -> None:
    config = make_config("auxiliary.pt", arch=f"{HERE}:make_auxiliary", data=blobs)
    result = compressor.compress(config)
    assert training_of(result)["steps"] > 0
    assert training_of(result)["stopped_because"] is None
    saved = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["state_dict"]
    before = torch.load(tmp_path / "auxiliary.pt", weights_only=True)
    for key in (key for key in saved if key.startswith("aux")):
        assert torch.equal(saved[key], before[key])


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ("NoGradient", TaskError, r"NoGradient: loss returned a tensor without a gradient"),
        ("NoNumber", TrainingError, r"The loss of the original is nan on real images"),
        (
            "NeedsMore",
            TaskError,
            r"loss failed: KeyError: 'aux'.* in evaluation mode, a dict with",
        ),
    ],
)
@pytest.mark.bad_input("a loss that nothing can be learned from", 3)
def test_a_loss_that_teaches_nothing_stops_before_the_search(
    make_config: Make, tmp_path: Path, task: str, error: type[CompressorError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        compressor.compress(make_config(task=f"{HERE}:{task}"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_network_that_cannot_learn_stops_before_the_search(
    make_config: Make, tmp_path: Path
) -> None:
    flags = {
        "arch": f"{HERE}:make_detached", "task": "tests.end_to_end.test_tasks:Regression",
        "depth": False,  # a trace of it would not know of no_grad
    }  # fmt: skip
    with pytest.raises(TrainingError, match=r"no gradient.* tried with the original, before"):
        compressor.compress(make_config(**flags))
    assert not (tmp_path / "run").exists()
    assert prepare(make_config(fine_tune_epochs=0, **flags)).n_steps == 0
