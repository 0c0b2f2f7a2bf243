"""Sizes written into code or programs follow the widths; layers are nn modules again."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from compressor import prunable
from compressor.errors import GraphError, ModelError
from compressor.graph import channel_groups
from compressor.program import export_program, free_batch, with_layers
from compressor.prunable import MODULE, PROGRAM, Prunable, load_model, make_prunable
from compressor.recovery import recalibrate_batch_norm
from compressor.surgery import masked, remove_channels
from compressor.values import LabelledImages, Plan
from tests.conftest import ConvNet, random_plan, randomised

EXAMPLE = torch.randn(1, 1, 8, 8, dtype=torch.float64)


class Written(nn.Module):
    """Writes its channel numbers into the code, in one way or another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.left = nn.Conv2d(4, 8, 1)
        self.right = nn.Conv2d(12, 8, 1)
        self.second = nn.Conv2d(16, 16, 3, groups=4)
        self.extra = nn.Conv2d(1, 4, 1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.norm(self.first(x)))
        if self.how == "view":
            return self.head(self.second(y).mean((2, 3)).view(-1, 16))
        if self.how == "view of pixels":
            return self.head(F.adaptive_avg_pool2d(self.second(y), 1).view(x.shape[0], 16))
        if self.how == "slices":
            return self.tail(self.left(y[:, :4]) + self.right(y[:, 4:]))
        if self.how == "uneven split":
            a, b = torch.split(y, [4, 12], 1)
            return self.tail(self.left(a) * self.right(b))
        if self.how == "even split":
            a, b = torch.split(y, 8, 1)
            return self.tail(a * b)
        if self.how == "narrow":
            return self.tail(self.left(y.narrow(1, 2, 4)) + self.right(y[:, -12:]))
        if self.how == "shuffle":
            b, _, h, w = y.shape
            return self.tail(y.view(b, 2, 8, h, w).transpose(1, 2).reshape(b, 16, h, w)[:, :8])
        if self.how == "pad":
            return self.tail(F.pad(self.extra(x), (0, 0, 0, 0, 4, 8))[:, :8] + y[:, :8])
        if self.how == "count":
            return self.tail(y[:, :8] * (1.0 / y.shape[1]))
        if self.how == "depthwise by hand":
            kernel = self.second.weight[:, :1] * 0 + self.second.weight[:, :1]
            return self.tail(F.conv2d(y, kernel, groups=16)[:, :8])
        if self.how == "expand":
            return self.tail((y * y.mean((2, 3), keepdim=True).expand(-1, 16, 8, 8))[:, :8])
        raise AssertionError(self.how)

    def tail(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([x, x], 1).mean((2, 3)))


WAYS = [
    "view", "view of pixels", "slices", "uneven split", "even split", "narrow", "shuffle", "pad",
    "count", "expand",
    "depthwise by hand",
]  # fmt: skip


@pytest.mark.parametrize("how", WAYS)
def test_numbers_in_the_code_follow_the_widths(how: str) -> None:
    model = randomised(Written(how).double()).eval()
    prunable = make_prunable(model, EXAMPLE)
    assert isinstance(prunable.module, fx.GraphModule)
    free = [g for g in prunable.groups if not g.locked_because]
    assert free
    for seed in range(3):
        plan = random_plan(prunable.groups, np.random.default_rng(seed))
        compact = remove_channels(prunable.module, prunable.groups, plan)
        for batch in (1, 3):
            images = torch.randn(batch, 1, 8, 8, dtype=torch.float64)
            with torch.no_grad():
                oracle = masked(prunable.module, prunable.groups, plan)
                torch.testing.assert_close(compact(images), oracle(images))
    assert set(compact.state_dict()) <= set(model.state_dict())  # what is used keeps its name


def test_code_that_follows_its_widths_stays_the_users_own(conv_net: ConvNet) -> None:
    assert make_prunable(conv_net, torch.randn(1, 1, 8, 8)).module is conv_net


class WrittenInto(nn.Module):
    """Changes its first channels in place; cut to channels 0 to 3, the wrong code is right."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).clone()
        y[:, :5] = y[:, :5].sigmoid()
        return self.head(y.mean((2, 3)))


def test_a_number_that_fits_one_plan_is_found_by_another() -> None:
    model = randomised(WrittenInto().double()).eval()
    prunable = make_prunable(model, EXAMPLE)
    for seed in range(8):
        plan = random_plan(prunable.groups, np.random.default_rng(seed))
        compact = remove_channels(prunable.module, prunable.groups, plan)
        with torch.no_grad():
            oracle = masked(prunable.module, prunable.groups, plan)
            torch.testing.assert_close(compact(EXAMPLE), oracle(EXAMPLE))
    assert prunable.module is not model


class Kernels(nn.Module):
    """Layers written as functions, with weights that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3)
        self.kernel = nn.Parameter(torch.rand(16, 1, 3, 3))
        self.grouped = nn.Parameter(torch.rand(16, 8, 1, 1))
        self.gain, self.shift = nn.Parameter(torch.rand(16)), nn.Parameter(torch.rand(16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(self.first(x), self.kernel, groups=16)
        y = F.group_norm(F.conv2d(y, self.grouped, groups=2), 4, self.gain, self.shift)
        return self.head(y.mean((2, 3)))


def test_numbers_of_layers_written_as_functions_follow_too() -> None:
    model = randomised(Kernels().double()).eval()
    prunable = make_prunable(model, EXAMPLE)
    assert isinstance(prunable.module, fx.GraphModule)
    for seed in range(3):
        plan = random_plan(prunable.groups, np.random.default_rng(seed))
        compact = remove_channels(prunable.module, prunable.groups, plan)
        with torch.no_grad():
            oracle = masked(prunable.module, prunable.groups, plan)
            torch.testing.assert_close(compact(EXAMPLE), oracle(EXAMPLE))


class Standardised(nn.Conv2d):
    """Normalises every filter before it is used, as BiT and NFNets do."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


@pytest.mark.parametrize(
    "kind", ["standardised", "weight norm", "spectral norm", "old weight norm"]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_weights_that_are_computed_become_numbers(kind: str) -> None:
    def layer(n_in: int, n_out: int) -> nn.Module:
        if kind == "standardised":
            return Standardised(n_in, n_out, 3)
        if kind == "weight norm":
            return nn.utils.parametrizations.weight_norm(nn.Conv2d(n_in, n_out, 3))
        return nn.utils.parametrizations.spectral_norm(nn.Conv2d(n_in, n_out, 3))

    net = nn.Sequential(layer(1, 8), nn.ReLU(), layer(8, 6), nn.Flatten(), nn.Linear(96, 3))
    model = net.double().eval()
    prunable = make_prunable(model, EXAMPLE)
    assert isinstance(prunable.module, fx.GraphModule)
    assert [g.name for g in prunable.groups if not g.locked_because] == ["0", "2"]
    assert isinstance(prunable.module.get_submodule("0"), nn.Conv2d)
    plan = random_plan(prunable.groups, np.random.default_rng(0))
    compact = remove_channels(prunable.module, prunable.groups, plan)
    images = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(prunable.module(images), model(images))
        oracle = masked(prunable.module, prunable.groups, plan)
        torch.testing.assert_close(compact(images), oracle(images))


class Unexportable(nn.Module):
    """Writes a number into its code, and reads a value: no program can be made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3)
        self.second = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.second(self.first(x)).mean((2, 3)).view(-1, 8))
        return y if y.sum().item() > 0 else y + 1


def test_groups_that_code_does_not_follow_are_locked_one_by_one() -> None:
    model = randomised(Unexportable()).eval()
    example = torch.randn(1, 1, 8, 8)
    with pytest.raises(GraphError, match=r"cannot be exported by torch\.export"):
        export_program(model, example)
    prunable = make_prunable(model, example)
    assert prunable.module is model
    reasons = {g.name: g.locked_because for g in prunable.groups}
    assert reasons["first"] is None
    assert "does not follow its width" in (reasons["second"] or "")


@pytest.mark.parametrize("free", ["none", "all"])
def test_the_form_in_which_more_can_be_pruned_is_taken(
    free: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code has a number in it; its program may do better than it, or worse."""
    model, example = randomised(Unexportable()).eval(), torch.randn(1, 1, 8, 8)

    def program(network: nn.Module, example: Tensor) -> Prunable:
        groups = channel_groups(network, example)
        if free == "none":
            groups = tuple(replace(group, locked_because="it is unknown") for group in groups)
        return Prunable(network, groups, PROGRAM)

    monkeypatch.setattr(prunable, "_proven_program", program)
    found = make_prunable(model, example)
    assert found.form == (PROGRAM if free == "all" else MODULE)


def test_a_program_answers_like_its_model_and_has_its_layers(conv_net: ConvNet) -> None:
    model = randomised(copy.deepcopy(conv_net))
    program = export_program(model, torch.randn(1, 1, 8, 8))
    images = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(program(images), model(images))
    kinds = {name: type(layer) for name, layer in program.named_modules()}
    for name, layer in model.named_modules():
        if list(layer.parameters(recurse=False)):
            assert kinds[name] is type(layer), name
    for key, value in program.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


def test_a_program_can_be_trained_and_recalibrated() -> None:
    """Batch-norm and dropout follow train() and eval() again."""
    program = export_program(randomised(Written("view")), EXAMPLE.float())
    split = LabelledImages(torch.randn(40, 1, 8, 8), torch.zeros(40, dtype=torch.int64))
    recalibrated = recalibrate_batch_norm(program, split)
    before = program.get_submodule("norm").running_mean
    after = recalibrated.get_submodule("norm").running_mean
    with torch.no_grad():
        expected = program.get_submodule("first")(split.images).mean((0, 2, 3))
    assert isinstance(before, Tensor)
    assert not torch.allclose(before, expected, atol=1e-2)
    torch.testing.assert_close(after, expected, rtol=0.1, atol=0.05)
    program.train()
    assert not torch.equal(program(split.images), program(split.images))
    program.eval()
    assert torch.equal(program(split.images), program(split.images))
    loss = program(split.images).sum()
    loss.backward()
    assert all(p.grad is not None for n, p in program.named_parameters() if "first" in n)


def save_program(model: nn.Module, path: Path, batch: int = 1, *, any_batch: bool = False) -> Path:
    sizes = ({0: torch.export.Dim("batch")},) if any_batch else None
    program = torch.export.export(
        model.eval(), (torch.randn(batch, 1, 8, 8),), dynamic_shapes=sizes
    )
    torch.export.save(program, path)
    return path


@pytest.mark.parametrize(("batch", "any_batch"), [(1, False), (4, False), (4, True)])
def test_a_program_file_is_pruned_for_any_batch(
    batch: int, any_batch: bool, tmp_path: Path
) -> None:
    model = randomised(Written("view of pixels"))
    path = save_program(model, tmp_path / "net.pt2", batch, any_batch=any_batch)
    loaded = load_model(path)
    assert isinstance(loaded.example_input, Tensor)
    assert loaded.example_input.shape == (1, 1, 8, 8)
    images = torch.randn(7, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(images), model(images))
    groups = channel_groups(loaded.module, loaded.example_input)
    plan = random_plan(groups, np.random.default_rng(0))
    compact = remove_channels(loaded.module, groups, plan)
    with torch.no_grad():
        oracle = masked(loaded.module, groups, plan)
        torch.testing.assert_close(compact(images), oracle(images))
    again = torch.export.export(compact, (images,))  # the result is exportable in its turn
    torch.testing.assert_close(again.module()(images), compact(images))


def test_a_core_aten_program_has_layers_too(tmp_path: Path) -> None:
    model = randomised(ConvNet()).eval()
    program = torch.export.export(model, (torch.randn(1, 1, 8, 8),)).run_decompositions()
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = load_model(tmp_path / "net.pt2")
    assert isinstance(loaded.module.get_submodule("inner_norm"), nn.BatchNorm2d)
    groups = channel_groups(loaded.module, loaded.example_input)
    plan = random_plan(groups, np.random.default_rng(0))
    images = torch.randn(4, 1, 8, 8)
    compact = remove_channels(loaded.module, groups, plan)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(images), model(images))
        oracle = masked(loaded.module, groups, plan)
        torch.testing.assert_close(compact(images), oracle(images))


class FixedBatch(nn.Module):
    """Mixes the images of a batch: of its own size only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.mix = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.conv(x).mean((2, 3)).t()).t()


def test_a_program_of_one_batch_size_is_refused(tmp_path: Path) -> None:
    path = save_program(FixedBatch(), tmp_path / "net.pt2", 2)
    with pytest.raises(ModelError, match=r"takes batches of 2 only.*dynamic_shapes"):
        load_model(path)


def test_a_program_in_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).train()
    program = torch.export.export(model, (torch.randn(2, 1, 8, 8),))
    with pytest.raises(ModelError, match=r"training mode: call model.eval\(\)"):
        with_layers(program.module())


def test_freeing_the_batch_changes_a_copy_only() -> None:
    program = torch.export.export(Written("view of pixels").eval(), (torch.randn(1, 1, 8, 8),))
    layered = with_layers(program.module(check_guards=False))
    code = layered.code
    free_batch(layered, torch.randn(1, 1, 8, 8))
    assert layered.code == code


def test_surgery_leaves_the_program_alone() -> None:
    program = export_program(randomised(Written("slices")), EXAMPLE.float())
    before, code = copy.deepcopy(program.state_dict()), program.code
    groups = channel_groups(program, EXAMPLE.float())
    remove_channels(program, groups, Plan({"first": (0, 3)}))
    assert program.code == code
    assert all(torch.equal(before[k], v) for k, v in program.state_dict().items())


class Converting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).float().to(torch.float32) * torch.tensor([2.0])
        answer: Tensor = self.second(y)
        return answer


def test_conversions_keep_a_program_free_and_the_result_can_be_converted() -> None:
    """torch.export writes an assertion of dtypes for each, which pruning need not keep."""
    images = torch.randn(1, 1, 8, 8)
    program = with_layers(torch.export.export(Converting().eval(), (images,)).module())
    groups = channel_groups(program, images)
    assert {g.name: g.locked_because for g in groups}["first"] is None
    plan = Plan({"first": tuple(range(0, 16, 3))})
    compact = remove_channels(program, groups, plan)
    with torch.no_grad():
        torch.testing.assert_close(compact(images), masked(program, groups, plan)(images))
    assert not any("assert" in str(node.target) for node in compact.graph.nodes)  # type: ignore[union-attr]


class Patches(nn.Module):
    """Reads the number of pixels from its tensor, which a program of one size writes out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 16, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = (y := self.conv(x)).shape
        return self.head(y.reshape(b, c, h * w).mean(2))


@pytest.mark.parametrize(("limit", "is_free"), [(0.0, False), (100.0, True)])
def test_free_sizes_have_a_time_limit(
    limit: float, is_free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With it the program has the size it was exported with, and answers as before."""
    network, other = Patches().double().eval(), torch.randn(2, 1, 13, 9, dtype=torch.float64)
    for name in ("FREE_SIZES_TIME", "FREE_SIZES_AT_LEAST_S"):
        monkeypatch.setattr(f"compressor.program.{name}", limit)
    program = export_program(network, EXAMPLE)
    with torch.no_grad():
        torch.testing.assert_close(program(EXAMPLE), network(EXAMPLE))
        if is_free:
            torch.testing.assert_close(program(other), network(other))
        else:
            with pytest.raises(RuntimeError, match="shape"):
                program(other)


def test_a_program_without_written_sizes_is_exported_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exported: list[object] = []
    export = torch.export.export

    def counted(*args: Any, **options: Any) -> Any:
        exported.append(args)
        return export(*args, **options)

    monkeypatch.setattr(torch.export, "export", counted)
    network, other = ConvNet().eval(), torch.randn(2, 1, 13, 9)
    program = export_program(network, torch.randn(1, 1, 8, 8))
    with torch.no_grad():
        torch.testing.assert_close(program(other), network(other))
    assert len(exported) == 1
