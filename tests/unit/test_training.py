"""Fine-tuning learns, from labels or a teacher, never makes worse, and can be taken up again."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.augmentation import CROP, ERASE, FLIP, JITTER, augmented, suitable
from compressor.errors import MeasurementError
from compressor.tasks import CLASSIFICATION, Classification, Criterion
from compressor.training import (
    MAX_NORM,
    Recipe,
    Tuned,
    _rate_at,
    fine_tune,
    halving,
)
from compressor.values import LabelledImages, Progress
from tests.conftest import INPUT_SHAPE, ConvNet

Score = Callable[[nn.Module], float]


def split(n: int = 64) -> LabelledImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, *INPUT_SHAPE, generator=generator) + 2.0
    return LabelledImages(images, torch.randint(0, 5, (n,), generator=generator))


def loss(model: nn.Module, data: LabelledImages) -> float:
    with torch.no_grad():
        return -F.cross_entropy(model(data.images), data.labels).item()


def tune(
    model: nn.Module,
    data: LabelledImages,
    *,
    score: Score | None = None,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    seen: list[Progress] | None = None,
    n_steps: int = 32,
    learning_rate: float = 0.02,
    criterion: Criterion = CLASSIFICATION,
    **more: object,
) -> Tuned:
    recipe = Recipe(n_steps, learning_rate, batch_size=16, **more)  # type: ignore[arg-type]
    return fine_tune(
        model, data, recipe,
        criterion=criterion,
        score=score or (lambda m: loss(m, data)),
        teacher=teacher,
        checkpoint=checkpoint,
        on_progress=(seen if seen is not None else []).append,
    )  # fmt: skip


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("ema", [0.0, 0.8])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_learns_and_reports(
    conv_net: ConvNet, ema: float, memory_format: torch.memory_format
) -> None:
    data, seen = split(), list[Progress]()
    recipe = Recipe(32, 0.02, batch_size=16, ema_decay=ema)
    tuned = fine_tune(
        conv_net, data, recipe, score=lambda m: loss(m, data), on_progress=seen.append,
        memory_format=memory_format,
    )  # fmt: skip
    assert loss(tuned.model, data) > loss(conv_net, data) + 0.1
    assert tuned.score == loss(tuned.model, data)
    assert (seen[-1].n_done, seen[-1].n_total) == (32, 32)
    assert not tuned.model.training
    assert tuned.stopped_because is None
    assert set(tuned.model.state_dict()) == set(conv_net.state_dict())


def test_training_that_only_hurts_gives_back_what_came(conv_net: ConvNet) -> None:
    before = copy.deepcopy(conv_net)
    scores = iter([1.0, 0.5, 0.4])
    tuned = tune(conv_net, split(), score=lambda _m: next(scores), n_steps=8, learning_rate=0.1)
    assert same(tuned.model, before)
    assert same(conv_net, before)
    assert tuned.score == 1.0


def test_of_equals_the_one_that_learned_is_kept(conv_net: ConvNet) -> None:
    """What came was chosen for its score on these images, which flatters it."""
    scores = iter([1.0, 1.0, 0.4])
    tuned = tune(conv_net, split(), score=lambda _m: next(scores), n_steps=8)
    assert tuned.score == tuned.score_before == 1.0
    assert not same(tuned.model, conv_net)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_step_goes_no_further_than_the_longest_gradient(conv_net: ConvNet, scale: float) -> None:
    """Closed form: a first step with Nesterov momentum is `lr (1 + momentum)` gradients long."""
    data = split(16)

    class Scaled(Classification):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return scale * super().loss(outputs, targets)

    network = copy.deepcopy(conv_net).train()
    before = torch.cat([p.detach().flatten() for p in network.parameters()])
    (scale * F.cross_entropy(network(data.images), data.labels)).backward()
    gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    scores = iter([0.0, 1.0])
    tuned = tune(
        conv_net, data, score=lambda _m: next(scores), n_steps=1, learning_rate=0.01,
        criterion=Scaled(), weight_decay=0.0,
    )  # fmt: skip
    after = torch.cat([p.detach().flatten() for p in tuned.model.parameters()])
    length = min(MAX_NORM, float(gradient.norm())) * 0.01 * 1.9
    assert float((after - before).norm()) == pytest.approx(length, rel=1e-3)
    assert (float(gradient.norm()) > MAX_NORM) == (scale > 1)


def test_no_steps_no_training(conv_net: ConvNet) -> None:
    assert same(tune(conv_net, split(), n_steps=0).model, conv_net)


def test_a_teacher_alone_is_enough(conv_net: ConvNet) -> None:
    """Labels are wrong on purpose; with all weight on the teacher, its answers are learned."""
    torch.manual_seed(1)
    data, teacher = split(128), ConvNet().eval()

    def likeness(model: nn.Module) -> float:
        with torch.no_grad():
            return -float(Classification(4.0).distance(model(data.images), teacher(data.images)))

    tuned = tune(
        conv_net, data, score=likeness, teacher=teacher, distillation=1.0, n_steps=120,
        learning_rate=0.005,
    )  # fmt: skip
    assert likeness(tuned.model) > likeness(conv_net) / 4
    ignored = tune(conv_net, data, teacher=teacher, distillation=0.0, n_steps=8)
    assert same(ignored.model, tune(conv_net, data, n_steps=8).model)


def test_the_distance_is_the_divergence_times_the_squared_temperature() -> None:
    torch.manual_seed(0)
    logits, wanted = torch.randn(6, 4), torch.randn(6, 4)
    for temperature in (1.0, 4.0):
        p, q = (wanted / temperature).softmax(1), (logits / temperature).softmax(1)
        by_hand = (p * (p / q).log()).sum(dim=1).mean() * temperature**2
        torch.testing.assert_close(Classification(temperature).distance(logits, wanted), by_hand)
    assert float(Classification(4.0).distance(wanted, wanted)) == pytest.approx(0, abs=1e-6)
    # At high temperatures the gradient is that of matching logits, whatever the temperature.
    logits.requires_grad_(True)
    (hot,) = torch.autograd.grad(Classification(50.0).distance(logits, wanted), logits)
    (hotter,) = torch.autograd.grad(Classification(100.0).distance(logits, wanted), logits)
    torch.testing.assert_close(hot, hotter, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("bad_step", [1, 5, 9])
def test_a_loss_that_is_no_number_ends_training_and_keeps_the_best(
    conv_net: ConvNet, bad_step: int
) -> None:
    class Failing(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net, self.calls = net, 0

        def forward(self, x: Tensor) -> Tensor:
            learns = torch.is_grad_enabled()
            self.calls += learns
            answer: Tensor = self.net(x)
            is_bad = learns and self.calls == bad_step
            return answer * (float("nan") if is_bad else 1.0)

    data = split()
    tuned = tune(Failing(conv_net), data, n_steps=12)
    epoch = (bad_step - 1) // 4 + 1
    assert tuned.stopped_because == f"the loss was nan in epoch {epoch}"
    assert all(torch.isfinite(v).all() for v in tuned.model.state_dict().values())
    assert tuned.score >= loss(conv_net, data)


def test_answers_that_are_no_numbers_end_training_too(conv_net: ConvNet) -> None:
    data, calls = split(), list[int]()

    def score(model: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise MeasurementError("The network's answers to real images are not finite.")
        return loss(model, data)

    tuned = tune(conv_net, data, score=score, n_steps=12)
    assert tuned.stopped_because is not None
    assert "are not finite. (after epoch 2)" in tuned.stopped_because
    assert tuned.score >= loss(conv_net, data)


class Killed(Exception):
    """In place of the end of the process."""


@pytest.mark.parametrize("ema", [0.0, 0.8])
@pytest.mark.parametrize("killed_in", [1, 2, 3])
def test_training_that_was_killed_goes_on_as_if_it_had_not_been(
    conv_net: ConvNet, tmp_path: Path, ema: float, killed_in: int
) -> None:
    data, checkpoint = split(), tmp_path / "training.pt"
    options = {"ema_decay": ema, "augmentations": (FLIP, CROP), "n_steps": 14}
    whole = tune(conv_net, data, **options)  # type: ignore[arg-type]
    calls = 0

    def score(model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == killed_in + 1:
            raise Killed
        return loss(model, data)

    with pytest.raises(Killed):
        tune(conv_net, data, score=score, checkpoint=checkpoint, **options)  # type: ignore[arg-type]
    resumed = tune(conv_net, data, checkpoint=checkpoint, **options)  # type: ignore[arg-type]
    assert same(resumed.model, whole.model)
    assert resumed.score == whole.score
    # A finished one is not trained again.
    seen = list[Progress]()
    again = tune(conv_net, data, checkpoint=checkpoint, seen=seen, **options)  # type: ignore[arg-type]
    assert not seen
    assert same(again.model, whole.model)


def test_a_checkpoint_of_another_recipe_is_not_used(conv_net: ConvNet, tmp_path: Path) -> None:
    data, checkpoint = split(), tmp_path / "training.pt"
    tune(conv_net, data, n_steps=8, checkpoint=checkpoint)
    fresh = tune(conv_net, data, n_steps=12)
    assert same(tune(conv_net, data, n_steps=12, checkpoint=checkpoint).model, fresh.model)


def test_same_seed_same_weights_other_seed_others(conv_net: ConvNet) -> None:
    one, other = tune(conv_net, split(), seed=7), tune(conv_net, split(), seed=7)
    assert same(one.model, other.model)
    assert not same(one.model, tune(conv_net, split(), seed=8).model)


def test_flips_and_shifts_move_pixels_and_change_none() -> None:
    images = torch.arange(1.0, 1 + 40 * 2 * 16 * 16).view(40, 2, 16, 16)
    generator = torch.Generator().manual_seed(0)
    flipped = augmented(images, (FLIP,), generator)
    kept = [torch.equal(a, b) for a, b in zip(images, flipped, strict=True)]
    turned = [torch.equal(a.flip(2), b) for a, b in zip(images, flipped, strict=True)]
    assert all(a != b for a, b in zip(kept, turned, strict=True))
    assert 8 < sum(kept) < 32
    shifted = augmented(images, (CROP,), generator)
    places = set()
    for image, moved in zip(images, shifted, strict=True):
        found = [
            (dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)
            if torch.equal(F.pad(image, [2] * 4)[:, 2 + dy : 18 + dy, 2 + dx : 18 + dx], moved)
        ]  # fmt: skip
        assert len(found) == 1
        places.update(found)
    assert len(places) > 12
    assert augmented(images, (), generator) is images


def test_jitter_changes_contrast_and_brightness_of_each_image() -> None:
    """Every pixel of an image goes through the same line, and no two images through one."""
    images = torch.randn(50, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    changed = augmented(images, (JITTER,), torch.Generator().manual_seed(0))
    means = images.mean(dim=(1, 2, 3), keepdim=True)
    brightness = changed.mean(dim=(1, 2, 3), keepdim=True) - means
    contrast = (changed - means - brightness) / (images - means)
    torch.testing.assert_close(contrast, contrast[:, :1, :1, :1].expand_as(contrast))
    for factors, middle in ((contrast[:, 0, 0, 0], 1), (brightness[:, 0, 0, 0], 0)):
        assert len(factors.unique()) == 50
        assert 0.1 < (factors - middle).abs().max() <= 0.2


def test_erasing_blanks_a_rectangle_in_half_of_the_images() -> None:
    images = torch.ones(60, 2, 12, 15)
    erased = augmented(images, (ERASE,), torch.Generator().manual_seed(0))
    assert torch.equal(images, torch.ones_like(images))
    places = set()
    for image in erased:
        rows, columns = (image[0] == 0).any(dim=1), (image[0] == 0).any(dim=0)
        assert torch.equal(image[0], image[1])
        if rows.any():
            assert (int(rows.sum()), int(columns.sum())) == (4, 5)
            top, left = int(rows.nonzero()[0]), int(columns.nonzero()[0])
            assert not image[:, top : top + 4, left : left + 5].any()
            assert int(image.sum()) == 2 * (12 * 15 - 20)
            places.add((top, left))
    assert 15 < len(places) <= 45


def test_an_augmentation_suits_what_the_network_bears() -> None:
    """Classes are which half of the picture is bright: left or right, or top or bottom."""
    images = torch.zeros(200, 1, 16, 16)
    images[:100, :, :, :8] = 1  # left
    images[100:, :, :, 8:] = 1  # right
    sides = LabelledImages(images, torch.arange(200) // 100)

    class Sides(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[..., :4].sum((1, 2, 3)), x[..., -4:].sum((1, 2, 3))], dim=1)

    class Top(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[..., :4, :].sum((1, 2, 3)), x[..., -4:, :].sum((1, 2, 3))], 1)

    assert suitable(Sides(), sides) == (CROP,)
    assert suitable(Top(), LabelledImages(images.mT.contiguous(), sides.labels)) == (FLIP, CROP)


@pytest.mark.parametrize("n_plans", [1, 2, 3, 4, 5, 8])
def test_halving_spends_a_fifth_and_ends_with_two(n_plans: int) -> None:
    rounds = halving(n_plans, 100_000)
    spent = sum(n * steps for n, steps in rounds)
    assert spent <= 20_000
    if n_plans == 1:
        assert not rounds
    else:
        assert spent > 19_900
        assert rounds[0][0] == n_plans
        assert rounds[-1][0] == 2


@pytest.mark.parametrize(
    ("n_steps", "rounds"),
    [(0, []), (499, []), (500, [(2, 50)]), (1499, [(2, 149)]), (1500, [(3, 50), (2, 75)])],
)
def test_no_plan_is_judged_by_a_handful_of_steps(
    n_steps: int, rounds: list[tuple[int, int]]
) -> None:
    assert halving(3, n_steps) == rounds


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("n_steps", [1, 2, 9, 10, 11, 500])
def test_the_rate_rises_for_a_tenth_and_falls_to_nothing(n_steps: int, schedule: str) -> None:
    rates = [_rate_at(step, n_steps=n_steps, schedule=schedule) for step in range(n_steps + 1)]
    top = max(1, n_steps // 10)
    assert max(rates) == rates[top] == 1
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert all(rate > 0 for rate in rates[:n_steps])
    assert rates[n_steps] == pytest.approx(0) or n_steps == 1


@pytest.mark.parametrize(
    ("schedule", "at_half"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)]
)
def test_the_rate_goes_down_as_it_is_said_to(schedule: str, at_half: float) -> None:
    rates = [_rate_at(step, n_steps=1000, schedule=schedule) for step in range(1001)]
    assert rates[50] == pytest.approx(0.51)
    assert rates[550] == pytest.approx(at_half)
    quarter = {"cosine": 0.5 + 0.5 * 0.5**0.5, "linear": 0.75, "constant": 1.0}[schedule]
    assert rates[325] == pytest.approx(quarter)
