"""Without labels: what is right is what the original answers, and nothing else enters."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.augmentation import FLIP, suitable
from compressor.chance import check_answers_differ
from compressor.errors import DataError
from compressor.evaluate import accuracy, drop_of, judgements, posed
from compressor.features import fisher_ratios
from compressor.hints import NO_HINTS
from compressor.learner import Learner
from compressor.prunable import make_prunable
from compressor.rows import one_tensor
from compressor.tasks import AGREEMENT, CLASSIFICATION, Agreement, Answered, Criterion
from compressor.training import Recipe, fine_tune
from compressor.trials import features
from compressor.values import LabelledImages, few
from tests.conftest import ConvNet, blob_images, make_conv_net, randomised

N = 7


def images_of(n: int, labels: Tensor | None = None) -> LabelledImages:
    pixels = torch.from_numpy(blob_images(n, np.random.default_rng(3))[0])
    return LabelledImages(pixels, torch.full((n,), -1) if labels is None else labels)


class Table:
    """Answers image i, which is i everywhere, with row i."""

    def __init__(self, logits: list[list[float]]) -> None:
        self.logits = torch.tensor(logits).float()

    def __call__(self, images: Tensor) -> Tensor:
        assert len(images) == 3  # of which the last batch is padded
        return self.logits[images[:, 0, 0, 0].long()]


ORIGINAL: list[list[float]] = [
    [3, 1, 0], [0, 2, 1], [0, 2, 1], [1, 0, 9], [5, 4, 0], [0, 0.5, 0.4], [2, 1, 0],
]  # fmt: skip
OTHER: list[list[float]] = [
    [9, 0, 0], [0, 1, 0], [0, 1, 2], [0, 0, 1], [4, 5, 0], [0, 1, 0], [1, 0, 0],
]  # fmt: skip
ALIKE = [True, True, False, True, False, True, True]


@pytest.fixture
def numbered() -> LabelledImages:
    """Float images that are their own number; the labels are absurd."""
    images = torch.arange(float(N)).view(N, 1, 1, 1).expand(N, 1, 2, 2).clone()
    return LabelledImages(images, torch.full((N,), 10**6))


def test_accuracy_is_the_share_of_the_originals_answers(numbered: LabelledImages) -> None:
    """Oracle: both tables, read by hand."""
    original, other = Table(ORIGINAL), Table(OTHER)
    how: dict[str, Any] = {"batch_size": 3, "criterion": AGREEMENT}
    split = posed(lambda: original, numbered, **how)
    assert isinstance(split, Answered)
    assert split.classes.tolist() == [0, 1, 1, 2, 0, 1, 0]
    images, targets = split.batch(torch.tensor([3, 0]))
    assert one_tensor(images)[:, 0, 0, 0].tolist() == [3, 0]
    assert targets.tolist() == [2, 0]
    assert accuracy(original, split, **how).value == 1
    measured = accuracy(other, split, **how)
    assert (measured.value, measured.n, measured.metric) == (5 / 7, 7, None)
    losses = F.cross_entropy(torch.tensor(OTHER).float(), split.classes, reduction="none")
    assert measured.loss == pytest.approx(losses.mean().item())
    before, after = (judgements(each, split, **how) for each in (original, other))
    assert [is_right for is_right, _ in after] == ALIKE
    drop, error = drop_of(before, after, AGREEMENT)
    assert drop == pytest.approx(2 / 7)
    assert error == pytest.approx(np.sqrt(6 * np.var([(2 - (not a)) / 6 for a in ALIKE])))


def test_with_labels_the_original_is_never_asked(numbered: LabelledImages) -> None:
    def fails() -> Callable[[Tensor], Tensor]:
        raise AssertionError

    assert posed(fails, numbered, batch_size=3, criterion=CLASSIFICATION) is numbered


@pytest.mark.parametrize("criterion", [AGREEMENT, CLASSIFICATION])
def test_labels_change_nothing_in_training(conv_net: ConvNet, criterion: Criterion) -> None:
    """Four trainings that differ in nothing but labels, of which most are impossible."""
    teacher = randomised(make_conv_net(), seed=4)
    labels = [torch.arange(48) % 5, torch.arange(48) % 3]
    if criterion is AGREEMENT:
        labels += [torch.full((48,), -1), torch.full((48,), 99)]
    lesson = criterion.lesson(4.0, 0.0)
    recipe = Recipe(6, 0.01, batch_size=16, distillation=criterion.distillation(0.7))
    ends = []
    for each in labels:
        tuned = fine_tune(
            conv_net, images_of(48, each), recipe, criterion=lesson, teacher=teacher,
            score=_later(), on_progress=_silent,
        )  # fmt: skip
        ends.append(tuned.model.state_dict())
    changed = any(not torch.equal(ends[0][key], end[key]) for end in ends for key in end)
    assert changed == (criterion is CLASSIFICATION)
    assert not torch.equal(ends[0]["stem.weight"], conv_net.stem.weight)


def _later() -> Callable[[nn.Module], float]:
    """A score by which whatever comes later is better."""
    scores = iter(range(100))
    return lambda _model: float(next(scores))


def _silent(_progress: object) -> None: ...


def test_the_loss_is_the_divergence_alone(conv_net: ConvNet) -> None:
    """Oracle: T^2 KL(original || network) of softened answers, by its definition."""
    teacher = randomised(make_conv_net(), seed=4)
    split, t = images_of(12), 3.0
    learner = Learner(
        conv_net, split.model_input(slice(0, 1)), AGREEMENT.lesson(t, 0.0), teacher, NO_HINTS,
        torch.contiguous_format, distillation=AGREEMENT.distillation(0.2), hints_weight=0.0,
        is_compiled=False,
    )  # fmt: skip
    images, labels = split.batch(slice(0, 12))
    loss = learner.checked_loss(images, labels).item()
    with torch.no_grad():
        ours, theirs = ((net(images).double() / t).softmax(1) for net in (conv_net, teacher))
    expected = t**2 * (theirs * (theirs / ours).log()).sum(1).mean().item()
    assert loss == pytest.approx(expected, rel=1e-4)
    assert AGREEMENT.lesson(t, 0.0) == Agreement(t)


@pytest.mark.parametrize("n_others", [0, 1, 4])
def test_an_original_that_answers_all_alike_is_refused(
    n_others: int, caplog: pytest.LogCaptureFixture
) -> None:
    classes = torch.tensor([2] * (20 - n_others) + [1] * n_others)
    split = Answered(images_of(20), classes)
    if not n_others:
        with pytest.raises(DataError, match="answers class 2 to each of the 20 search images"):
            check_answers_differ(split)
        return
    check_answers_differ(split)
    assert ("answers class 2 to 95.0 % of the 20" in caplog.text) == (n_others == 1)


def test_what_looks_at_classes_sees_the_originals(conv_net: ConvNet) -> None:
    """Fisher ratios of channels, and augmentations that the original bears."""
    net, split = conv_net, images_of(60)
    with torch.no_grad():  # else it answers all alike
        net.head.bias.sub_(net(split.model_input(slice(0, 60))).mean(0))
    part = few(split, 40)
    answered = posed(lambda: net, part, batch_size=16, criterion=AGREEMENT)
    images = one_tensor(part.model_input(slice(0, 40)))
    with torch.no_grad():
        classes = net(images).argmax(1)
        pooled = net.stem(images).double().mean((2, 3)).numpy()
    assert isinstance(answered, Answered)
    assert torch.equal(answered.classes, classes)
    assert len(classes.unique()) > 1
    prunable = make_prunable(net, images[:1])
    found = features(prunable, answered)
    (group,) = [g for g in prunable.groups if g.name == "stem"]
    expected = fisher_ratios(pooled, classes.numpy())
    np.testing.assert_allclose(found[group.name].fisher, expected, rtol=1e-4)

    class Dark(nn.Module):
        """Whether an image is dark, however it lies."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.mean((1, 2, 3)), x.new_full((len(x),), 0.25)], dim=1)

    class Side(nn.Module):
        """Which half is brighter."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[..., :4].sum((1, 2, 3)), x[..., 4:].sum((1, 2, 3))], dim=1)

    dark, side = Dark(), Side()
    how: dict[str, Any] = {"batch_size": 16, "criterion": AGREEMENT}
    assert FLIP in suitable(dark, posed(lambda: dark, split, **how))
    assert FLIP not in suitable(side, posed(lambda: side, split, **how))
