"""Accuracy counted by hand, its standard error, and what it means to agree."""

import pytest
import torch
from torch import Tensor, fx, nn

from compressor.errors import EquivalenceError, MeasurementError
from compressor.evaluate import N_PARTS, accuracy, check_agree, drop_of, memory_format
from compressor.values import Accuracy, LabelledImages


def one_hot_split(n: int = 23) -> LabelledImages:
    """Image `i` is filled with `i`; labels are `i % 4`."""
    images = torch.arange(float(n)).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    return LabelledImages(images, torch.arange(n) % 4)


@pytest.mark.parametrize("batch_size", [1, 5, 23, 50])
def test_accuracy_is_the_share_of_right_answers(batch_size: int) -> None:
    """Right for every image but those divisible by 3; the padded batch must not count."""
    sizes = set[int]()

    def predict(images: Tensor) -> Tensor:
        sizes.add(len(images))
        number = images[:, 0, 0, 0].long()
        guess = torch.where(number % 3 == 0, (number + 1) % 4, number % 4)
        return nn.functional.one_hot(guess, 4).float()

    measured = accuracy(predict, one_hot_split(), batch_size=batch_size)
    assert measured.n == 23
    assert measured.value == pytest.approx(15 / 23)
    assert sizes == {batch_size}


def test_standard_error_is_binomial_and_never_zero() -> None:
    assert Accuracy(0.9, 10_000).standard_error == pytest.approx(0.003, rel=0.01)
    assert Accuracy(1.0, 100).standard_error > 0.005


def test_the_loss_is_torchs() -> None:
    split = one_hot_split()
    torch.manual_seed(0)
    logits = torch.randn(len(split), 4)
    measured = accuracy(lambda x: logits[x[:, 0, 0, 0].long()], split, batch_size=5)
    expected = nn.functional.cross_entropy(logits, split.labels)
    assert measured.loss == pytest.approx(float(expected), rel=1e-5)


class Viewing(nn.Module):
    """Calls `view` on a feature map, which needs it contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.conv(x)
        return answer.view(x.shape[0], -1)


def test_channels_last_is_for_networks_that_can_run_in_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And what cannot is asked in silence: fx prints a traceback of what fails in its graphs."""
    images = torch.rand(2, 3, 8, 8)
    assert memory_format(nn.Conv2d(3, 8, 3), images) is torch.channels_last
    for network in (Viewing(), fx.symbolic_trace(Viewing())):
        assert memory_format(network, images) is torch.contiguous_format
    assert capsys.readouterr().err == ""


def test_agreement_is_relative_to_the_outputs() -> None:
    net, images = nn.Linear(3, 2).eval(), torch.rand(4, 3)
    assert check_agree("same", net, net, images) < 1e-6
    check_agree("rounding", net, lambda x: net(x) + 5e-4, images)
    with pytest.raises(EquivalenceError, match=r"off disagree: outputs differ by up to 0\.01"):
        check_agree("off", net, lambda x: net(x) + 0.01, images)
    check_agree("large", lambda x: 1e4 * net(x), lambda x: 1e4 * net(x) + 0.01, images)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda x: x[:, :1], r"\(4, 2\) and \(4, 1\)"),
        (lambda x: x[:, :2] * float("nan"), "NaN or infinite"),
        (nn.Linear(7, 2), "fails on real images"),
    ],
)
def test_what_cannot_be_compared_does_not_agree(other: nn.Module, message: str) -> None:
    net, images = nn.Linear(3, 2).eval(), torch.rand(4, 3)
    with pytest.raises(EquivalenceError, match=message):
        check_agree("it", net, other, images)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_answers_that_are_not_finite_are_no_accuracy(bad: float) -> None:
    split = LabelledImages(torch.zeros(6, 1, 2, 2), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(MeasurementError, match="not finite"):
        accuracy(lambda x: torch.full((len(x), 3), bad), split, batch_size=4)


def judged(right: Tensor) -> list[tuple[bool, float]]:
    """As `Classification.judge` has it."""
    return [(bool(each), 0.0) for each in right]


@pytest.mark.parametrize(("n", "rel"), [(N_PARTS, 1e-6), (1000, 0.2)])
def test_the_error_of_a_drop_is_that_of_the_difference(n: int, rel: float) -> None:
    """Two networks that are wrong on the same images differ in nothing.

    Leaving out one image at a time gives the textbook's standard error of a mean exactly.
    """
    before = torch.rand(n, generator=torch.Generator().manual_seed(0)) < 0.9
    assert drop_of(judged(before), judged(before)) == (0.0, 0.0)
    after = before.clone()
    after[before.nonzero().flatten()[: n // 10]] = False
    drop, error = drop_of(judged(before), judged(after))
    assert drop == pytest.approx(0.1)
    change = before.double() - after.double()
    assert error == pytest.approx(float(change.std(correction=1)) / n**0.5, rel=rel)
