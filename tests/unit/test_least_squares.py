"""Least squares through Gram matrices against the direct solve, and what it is good for."""

import copy

import pytest
import torch
from torch import nn

from compressor import least_squares
from compressor.least_squares import gather, sampled_rows
from compressor.prunable import make_prunable
from compressor.values import Plan


class Net(nn.Module):
    """Convolutions of every padding, and a linear layer behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 12, 3, stride=2, padding=(1, 0))
        self.third = nn.Conv2d(12, 8, 3, dilation=2, padding="same")
        self.last = nn.Linear(8 * 8 * 7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.third(self.second(self.first(x).relu()).relu()).relu()
        return self.last(x.flatten(1))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(50, 3, 16, 16, generator=generator) for _ in range(40)]


PLAN = Plan({"first": tuple(range(0, 16, 2)), "second": (0, 1, 2, 7, 9), "third": (1, 2, 6)})


def rows_read(net: Net, name: str) -> torch.Tensor:
    """The same rows that `gather` sees, kept whole."""
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, list[torch.Tensor]] = {}

    def watch(key: str, layer: nn.Module) -> None:
        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            rows.setdefault(key, []).append(sampled_rows(layer, inputs[0], generator))

        layer.register_forward_pre_hook(add)

    watched = copy.deepcopy(net)
    for key in ("second", "third", "last"):
        watch(key, watched.get_submodule(key))
    with torch.inference_mode():
        for batch in batches():
            watched(batch)
    return torch.cat(rows[name]).double()


@pytest.mark.parametrize("name", ["second", "third", "last"])
def test_weights_are_those_of_the_direct_solve(net: Net, name: str) -> None:
    prunable = make_prunable(net, torch.randn(1, 3, 16, 16))
    pruned = prunable.without(PLAN)
    kept = prunable.kept_positions(PLAN)
    gather(net, prunable.groups, batches()).repair(pruned, kept)
    x, weight = rows_read(net, name), net.get_parameter(f"{name}.weight").detach().double()
    y = x @ weight.flatten(1).T
    inputs = torch.from_numpy(kept[f"{name}.weight", 1])
    columns = inputs.repeat_interleave(weight[0, 0].numel())
    direct = torch.linalg.lstsq(x[:, columns], y).solution.T
    if name != "last":
        direct = direct[torch.from_numpy(kept[f"{name}.weight", 0])]
    ours = pruned.get_parameter(f"{name}.weight").detach().double().flatten(1)
    assert float((ours - direct).abs().max() / direct.abs().max()) < 1e-4


def test_rows_are_what_the_layer_multiplies(net: Net) -> None:
    """Every row times the weight is one of the layer's outputs."""
    read = torch.randn(2, 16, 9, 9)
    with torch.no_grad():
        outputs = net.second(read) - net.get_parameter("second.bias")[:, None, None]
    outputs = outputs.permute(0, 2, 3, 1).reshape(-1, 12)
    rows = sampled_rows(net.second, read, torch.Generator().manual_seed(0))
    for answer in rows @ net.second.weight.detach().flatten(1).T:
        assert float((outputs - answer).abs().amax(dim=1).min()) < 1e-5


def test_the_repaired_network_is_nearer_to_the_original(net: Net) -> None:
    prunable = make_prunable(net, torch.randn(1, 3, 16, 16))
    x = torch.randn(64, 3, 16, 16)
    plain, repaired = prunable.without(PLAN), prunable.without(PLAN)
    before = copy.deepcopy(net.state_dict())
    fitted = gather(net, prunable.groups, batches())
    fitted.repair(repaired, prunable.kept_positions(PLAN))
    with torch.no_grad():
        errors = [float((m(x) - net(x)).norm()) for m in (plain, repaired)]
    assert errors[1] < 0.7 * errors[0]
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_nothing_removed_changes_nothing(net: Net) -> None:
    prunable = make_prunable(net, torch.randn(1, 3, 16, 16))
    whole = prunable.without(Plan({}))
    gather(net, prunable.groups, batches()[:1]).repair(whole, {})
    assert all(torch.equal(net.state_dict()[k], v) for k, v in whole.state_dict().items())


@pytest.mark.parametrize("n_bytes", [2**28, 5000, 1])
def test_what_was_solved_before_is_solved_alike(
    net: Net, monkeypatch: pytest.MonkeyPatch, n_bytes: int
) -> None:
    """In any order of plans, with room for all solutions, for some and for one."""
    monkeypatch.setattr(least_squares, "MAX_SOLVED_BYTES", n_bytes)
    prunable = make_prunable(net, torch.randn(1, 3, 16, 16))
    narrow, wide = ({"first": tuple(range(n)), "third": (0, 1, 2)} for n in (4, 9))
    plans = [Plan({**PLAN.kept, **kept}) for kept in (narrow, wide, {}, narrow, {}, wide)]
    one = gather(net, prunable.groups, batches())
    for plan in plans:
        kept = prunable.kept_positions(plan)
        often, once = prunable.without(plan), prunable.without(plan)
        one.repair(often, kept)
        gather(net, prunable.groups, batches()).repair(once, kept)
        assert all(torch.equal(once.state_dict()[k], v) for k, v in often.state_dict().items())
