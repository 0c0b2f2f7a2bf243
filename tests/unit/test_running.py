"""Networks are run on tensors of their own, and learn in evaluation mode but for some parts."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import DropBlock2d, FrozenBatchNorm2d, StochasticDepth

import compressor
from compressor.errors import GraphError, TaskError, TrainingError
from compressor.evaluate import accuracy, check_agree, memory_format
from compressor.graph import channel_groups, cost, outputs
from compressor.graph.branches import traced
from compressor.hints import NO_HINTS
from compressor.prunable import PROOF_TOLERANCE_FLOAT64, _probe, make_prunable
from compressor.recovery import recalibrate_batch_norm
from compressor.running import is_norm, is_random, learning, ran, work_on_copies
from compressor.tasks import CLASSIFICATION, Classification, Criterion, OwnTask
from compressor.training import Recipe, Tuned, check_step, fine_tune
from compressor.values import LabelledImages, Plan
from tests.conftest import randomised

LAYERS: Any = timm.layers
IMAGE = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def data(n: int = 16, size: int = 12, n_classes: int = 4) -> LabelledImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, 3, size, size, generator=generator)
    return LabelledImages(images, torch.arange(n) % n_classes)


def learned(net: nn.Module, split: LabelledImages, **recipe: Any) -> Tuned:
    return fine_tune(
        net, split, Recipe(2, 0.05, batch_size=8, **recipe),
        teacher=net, score=lambda _model: 1.0, on_progress=lambda _progress: None,
    )  # fmt: skip


def block(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True))


class Auxiliary(nn.Module):
    """Another head that only training runs, and other outputs then."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux_body = block(8), block(8)
        self.drop = nn.Dropout(0.2)
        self.head, self.aux = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.drop(self.body(x).mean((2, 3)))
        if self.training:
            return self.head(y), self.aux(self.aux_body(x).mean((2, 3)))
        return self.head(y)


def unused_stay(before: nn.Module, after: nn.Module, prefix: str) -> bool:
    old, new = before.state_dict(), after.state_dict()
    keys = [key for key in old if key.lower().startswith(prefix)]
    assert keys
    return all(torch.equal(old[key], new[key]) for key in keys)


def halved(net: nn.Module, size: int) -> nn.Module:
    prunable = make_prunable(net, torch.rand(1, 3, size, size))
    free = [g for g in prunable.groups if g.locked_because is None]
    return prunable.without(Plan({g.name: tuple(range(g.n_channels // 2)) for g in free}))


def test_parts_that_only_training_runs_are_neither_run_nor_changed() -> None:
    small = halved(randomised(Auxiliary()), 12)
    recalibrated = recalibrate_batch_norm(small, data(), n_images=16, batch_size=8)
    tuned = learned(recalibrated, data(), distillation=0.5)
    for network in (recalibrated, tuned.model):
        assert unused_stay(small, network, "aux")
    key = "body.1.running_mean"
    tensors = [n.state_dict()[key] for n in (small, recalibrated, tuned.model)]
    assert not torch.equal(tensors[0], tensors[1])
    assert not torch.equal(tensors[1], tensors[2])
    assert not torch.equal(
        tuned.model.get_parameter("head.weight"), small.get_parameter("head.weight")
    )


@pytest.mark.parametrize(
    ("name", "size", "is_cut"),
    [
        ("googlenet", 48, False),
        pytest.param("googlenet", 64, True, marks=pytest.mark.slow),
        pytest.param("inception_v3", 80, True, marks=pytest.mark.slow),
    ],
)
def test_networks_with_auxiliary_heads_learn(name: str, size: int, is_cut: bool) -> None:
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, num_classes=4, init_weights=False).eval()
    small, split = halved(net, size) if is_cut else net, data(4, size)
    recalibrated = recalibrate_batch_norm(small, split, n_images=4, batch_size=2)
    tuned = learned(recalibrated, split, distillation=0.5)
    assert unused_stay(small, tuned.model, "aux")


def as_task(name: str, task: Any) -> OwnTask:
    """Of which only the loss is asked."""
    return OwnTask(name, task)


class Pixels:
    """The loss of segmentation, of a network that answers with a dictionary."""

    larger_is_better = True

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return F.cross_entropy(
            outputs["out"], torch.stack([outputs["out"][0].argmax(0)] * len(targets))
        )


@pytest.mark.slow
def test_a_segmentation_network_with_an_auxiliary_classifier_learns() -> None:
    torch.manual_seed(0)
    net = torchvision.models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=4, aux_loss=True
    ).eval()
    small, split = halved(net, 64), data(4, 64)
    recalibrated = recalibrate_batch_norm(small, split, n_images=4, batch_size=2)
    tuned = fine_tune(
        recalibrated, split, Recipe(1, 0.01, batch_size=2), criterion=as_task("own", Pixels()),
        score=lambda _model: 1.0, on_progress=lambda _progress: None,
    )  # fmt: skip
    before, after = small.state_dict(), tuned.model.state_dict()
    assert not torch.equal(before["classifier.0.weight"], after["classifier.0.weight"])


class Copied(nn.Module):
    """A DropPath as people copy it."""

    def forward(self, x: Tensor) -> Tensor:
        return x if not self.training else x * 0


class DropPathCopy(Copied):
    pass


class OwnNorm(nn.Module):
    """Checks the mode itself, for reasons that nobody here knows."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise AssertionError("not to be run in this mode")
        return x


LEARN = [
    nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3), nn.SyncBatchNorm(3),
    LAYERS.BatchNormAct2d(3), nn.InstanceNorm2d(3, track_running_stats=True), nn.Dropout(0.1),
    nn.Dropout2d(0.1), nn.AlphaDropout(0.1), nn.RReLU(), StochasticDepth(0.1, "row"),
    LAYERS.DropPath(0.1), DropBlock2d(0.1, 3), DropPathCopy(),
    nn.MultiheadAttention(4, 2, dropout=0.1),
]  # fmt: skip
STAY = [
    FrozenBatchNorm2d(3), nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3), OwnNorm(),
    Copied(), nn.BatchNorm2d(3, track_running_stats=False), nn.Linear(3, 3), block(3),
    nn.MultiheadAttention(4, 2), LAYERS.GroupNorm(3, 1),
]  # fmt: skip


@pytest.mark.parametrize("module", LEARN, ids=lambda m: type(m).__name__)
def test_norms_and_what_drops_at_random_learn(module: nn.Module) -> None:
    assert is_norm(module) or is_random(module)


@pytest.mark.parametrize("module", STAY, ids=lambda m: type(m).__name__)
def test_all_else_stays_in_evaluation_mode(module: nn.Module) -> None:
    assert not is_random(module)
    assert not is_norm(module)


def test_frozen_norms_stay_frozen() -> None:
    net = nn.Sequential(
        *block(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), FrozenBatchNorm2d(4),
        nn.Flatten(1), nn.Linear(4 * 6 * 6, 4), OwnNorm(),
    )  # fmt: skip
    randomised(net)
    net[4].requires_grad_(False)
    tuned = learned(net, data())
    before, after = net.state_dict(), tuned.model.state_dict()
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"0", "1", "3", "5", "8"}
    # In a network that is frozen as a whole, as for inference, nothing is meant by it.
    whole = learned(copy.deepcopy(net).requires_grad_(False), data()).model.state_dict()
    assert not torch.equal(before["4.running_mean"], whole["4.running_mean"])


def test_statistics_of_instance_norm_are_recalibrated_too() -> None:
    net = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True), nn.Flatten())
    split = data()
    recalibrated = recalibrate_batch_norm(net.eval(), split, n_images=16, batch_size=8)
    torch.testing.assert_close(
        recalibrated.get_buffer("0.running_mean"), split.images.mean((0, 2, 3)) if isinstance(
            split.images, Tensor) else None, rtol=1e-4, atol=1e-5
    )  # fmt: skip


def test_transformer_layers_are_seen_and_their_dropout_learns() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True).eval()
    seen = learning(layer, torch.rand(2, 5, 8))
    assert {type(m) for m in seen} == {nn.Dropout, nn.MultiheadAttention}
    assert layer.linear1 in ran(layer, torch.rand(2, 5, 8))
    assert nn.GRU in {type(m) for m in learning(nn.GRU(3, 4).eval(), torch.rand(5, 2, 3))}


def test_norms_and_drops_of_other_packages_are_layers_of_a_trace() -> None:
    net = timm.create_model("test_resnet", drop_path_rate=0.1).eval()
    kinds = {type(m).__name__ for m in traced(net).modules()}
    assert {"BatchNorm2d", "DropPath"} <= kinds
    mixed = timm.create_model("test_efficientnet").eval()
    graph = traced(mixed)
    assert {"BatchNormAct2d"} <= {type(m).__name__ for m in graph.modules()}
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(graph(image), mixed(image))
    assert len(learning(graph, image)) == len(learning(mixed, image))


class Writing(nn.Module):
    """Changes the images that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = block(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).div_(0.2)
        return self.head(self.body(x).mean((2, 3)))


def test_a_network_that_writes_over_its_images_spoils_nobody_elses() -> None:
    net, split = randomised(Writing()), data()
    before, image = split.images[:].clone(), IMAGE.clone()
    with torch.no_grad():
        want = net(image.clone())
    channel_groups(net, image)
    torch.testing.assert_close(outputs(net, image), want)
    cost(net, image)
    ran(net, image)
    memory_format(net, image)
    check_agree("the network and itself", net, net, image)
    halved(net, 12)
    accuracy(net, split, batch_size=5)
    accuracy(net, split, batch_size=8)
    recalibrate_batch_norm(net, split, n_images=16, batch_size=8)
    learned(net, split, distillation=0.5)
    assert torch.equal(image, IMAGE)
    assert torch.equal(split.images[:], before)


def test_the_teacher_gets_the_images_that_the_student_got() -> None:
    net, split = randomised(Writing()), data()
    recipe = Recipe(1, 0.1, batch_size=16, distillation=1.0)
    with torch.no_grad():
        student, teacher = copy.deepcopy(net).train(), net
        wanted = teacher(split.images[:].clone())
        apart = CLASSIFICATION.distance(student(split.images[:].clone()), wanted)
    losses = []

    class Told(Classification):
        def distance(self, outputs: Tensor, wanted: Tensor) -> Tensor:
            losses.append(super().distance(outputs, wanted))
            return losses[-1]

    fine_tune(
        net, split, recipe, criterion=Told(), teacher=net, score=lambda _model: 1.0,
        on_progress=lambda _progress: None,
    )  # fmt: skip
    torch.testing.assert_close(losses[0].detach(), apart)


def test_modules_work_on_copies_where_that_changes_nothing() -> None:
    class Relying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            self.relu(x)
            return x

    plain, relying = block(8).eval(), Relying()
    work_on_copies(plain, IMAGE)
    assert not plain[2].inplace
    work_on_copies(relying, IMAGE - 0.5)
    assert relying.relu.inplace


class Loss:
    """A task whose loss is what a test says."""

    larger_is_better = True

    def __init__(self, loss: Any) -> None:
        self.loss = loss


def one_step(net: nn.Module, criterion: Criterion = CLASSIFICATION, **recipe: Any) -> float:
    return check_step(
        net, data(), Recipe(10, 0.1, **recipe), criterion=criterion, teacher=net, hints=NO_HINTS,
        memory_format=torch.contiguous_format,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda y, _t: y.detach().sum(), "loss returned a tensor without a gradient"),
        (
            lambda y, _t: torch.tensor(float(y.detach().sum())),
            "loss returned a tensor without a gradient",
        ),
        (lambda y, _t: float(y.detach().sum()), "loss returned float"),
        (lambda y, _t: y.detach().numpy().sum(), "loss returned float32"),
        (lambda y, _t: y.sum(dim=1), r"loss returned Tensor\(2,\)"),
        (lambda y, _t: y["aux"], "loss failed: "),
        (lambda y, _t: y[:, 9].sum(), "loss failed: IndexError"),
    ],
)
@pytest.mark.bad_input("a loss that nothing can be learned from", 7)
def test_a_loss_that_nothing_can_be_learned_from_is_told(loss: Any, says: str) -> None:
    with pytest.raises(TaskError, match=f"^--task own:loss: {says}") as caught:
        one_step(randomised(Auxiliary()), as_task("own:loss", Loss(loss)))
    assert "\n" not in str(caught.value)


def test_a_network_that_cannot_learn_is_told() -> None:
    class Detached(Auxiliary):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Any:
            return super().forward(x)

    class Broken(Auxiliary):
        def forward(self, x: Tensor) -> Any:
            if torch.is_grad_enabled():
                raise ValueError("not today")
            return super().forward(x)

    assert one_step(randomised(Auxiliary()), distillation=0.3) > 0
    with pytest.raises(TrainingError, match="Detached cannot be trained: its answers have no"):
        one_step(randomised(Detached()))
    with pytest.raises(TrainingError, match=r"cannot be trained: ValueError: not today \(.*line"):
        one_step(randomised(Broken()))
    with pytest.raises(TrainingError, match="more than 1 value per channel"):
        one_step(randomised(nn.Sequential(*block(4), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4),
                                          nn.Flatten())), batch_size=1)  # fmt: skip


@pytest.mark.parametrize("fails", ["network", "loss", "task"])
def test_training_that_fails_while_it_runs_is_one_kind_of_error(fails: str) -> None:
    calls = []

    class Failing(Auxiliary):
        def forward(self, x: Tensor) -> Any:
            calls.append(torch.is_grad_enabled())
            if fails == "network" and sum(calls) == 2:
                raise RuntimeError("out of luck")
            return super().forward(x)

    def loss(outputs: Tensor, targets: Any) -> Tensor:
        if sum(calls) == 2 and fails == "task":
            raise KeyError("out of luck")
        if sum(calls) == 2 and fails == "loss":
            outputs = outputs.detach()
        return F.cross_entropy(outputs, targets)

    net = randomised(Failing())
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(TrainingError, match="failed while it was trained: "):
        fine_tune(
            net, data(), Recipe(3, 0.1, batch_size=4), criterion=as_task("own", Loss(loss)),
            score=lambda _model: 1.0, on_progress=lambda _progress: None,
        )  # fmt: skip
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


class Shared(nn.Module):
    """As in Ultralytics: every network's layers share one activation."""

    act = nn.SiLU()

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Shared.act
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.norm(self.conv(x))).mean((2, 3)))


def test_what_another_network_shares_is_not_in_training_mode() -> None:
    first = Shared().eval()
    Shared().train()
    assert first.act.training
    small = compressor.prune(first, IMAGE[:1], 0.5)
    assert small.get_parameter("conv.weight").shape == (4, 3, 3, 3)


@pytest.mark.parametrize("where", ["norm", "act", "head"])
def test_what_the_mode_may_matter_to_is(where: str) -> None:
    """A norm, a class of the user's, and a layer whose hook looks at the mode."""
    net = Shared().eval()
    if where == "act":
        net.act = type("Act", (nn.ReLU,), {})()
    if where == "head":
        net.head = torch.nn.utils.spectral_norm(net.head)
    net.get_submodule(where).train()
    with pytest.raises(GraphError, match=rf"Shared \({where}\) is in training mode"):
        channel_groups(net, IMAGE[:1])


class Homonyms(Shared):
    """Its methods mean other things than torch's of these names."""

    def double(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * x

    def float(self) -> str:  # type: ignore[override]
        return "no network"

    def to(self, other: str) -> str:  # type: ignore[override]
        return other

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.double(x))


def test_methods_named_as_torchs_are_the_users_own() -> None:
    net = randomised(Homonyms().eval())
    assert _probe(net, IMAGE[:1]).tolerance == PROOF_TOLERANCE_FLOAT64
    small = compressor.prune(net, IMAGE[:1], 0.5)
    assert memory_format(small, IMAGE) == torch.channels_last
    recalibrate_batch_norm(small, data(), memory_format=torch.channels_last)
    assert learned(small, data()).score == 1.0
