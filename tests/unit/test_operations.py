"""Operations that torch's first exporter lacks, beside torch, through ONNX Runtime."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import compressor
from compressor.errors import ExportError
from compressor.export import candidate_writer, check_exportable, export_onnx
from compressor.exporter import UnwritableError, Way, written
from compressor.latency.targets import load_target
from compressor.surgery import remove_channels
from compressor.symbolics import SYMBOLICS
from compressor.template import make_template
from tests.conftest import random_plan, randomised

Use = Callable[[Tensor], Tensor]
LINE, IMAGE, VOLUME = (2, 3, 13), (2, 3, 13, 12), (2, 3, 7, 13, 12)


class Used(nn.Module):
    def __init__(self, use: Use) -> None:
        super().__init__()
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x)


def answers_alike(network: nn.Module, file: Path, shape: tuple[int, ...]) -> onnx.ModelProto:
    """Compares on three random inputs; the file."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    for seed in range(3):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            want = network(x.clone()).numpy()
        (got,) = session.run(None, {given.name: x.numpy()})
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
    return onnx.load(file)


def attended(n_keys: int, **kwargs: Any) -> Use:
    """Attention of six heads of a tensor to `n_keys` of them."""

    def use(x: Tensor) -> Tensor:
        heads = x.flatten(3).repeat(1, 2, 1, 1)
        return F.scaled_dot_product_attention(
            heads, heads[:, :n_keys] / 2, heads[:, -n_keys:] * 2, **kwargs
        )

    return use


STATIC: dict[str, tuple[Use, tuple[int, ...]]] = {
    "avg 1-D": (lambda x: F.adaptive_avg_pool1d(x, 5), LINE),
    "avg 2-D": (lambda x: F.adaptive_avg_pool2d(x, (5, 7)), IMAGE),
    "avg as a module": (nn.AdaptiveAvgPool2d((17, None)), IMAGE),
    "avg of a program": (lambda x: torch.ops.aten._adaptive_avg_pool2d(x, [5, 5]), IMAGE),
    "avg 3-D": (lambda x: F.adaptive_avg_pool3d(x, (3, 5, 7)), VOLUME),
    "avg of a single image": (lambda x: F.adaptive_avg_pool2d(x, 5), IMAGE[1:]),
    "max 1-D": (lambda x: F.adaptive_max_pool1d(x, 5), LINE),
    "max 2-D": (nn.AdaptiveMaxPool2d((5, 7)), IMAGE),
    "max 3-D": (lambda x: F.adaptive_max_pool3d(x, (3, 5, 20)), VOLUME),
    "max of a single image": (lambda x: F.adaptive_max_pool2d(x, 5), IMAGE[1:]),
    "rms norm": (lambda x: F.rms_norm(x, (13, 12), torch.arange(156.0).reshape(13, 12)), IMAGE),
    "rms norm without weight": (lambda x: F.rms_norm(x, (12,), eps=0.1), IMAGE),
    "squeeze": (lambda x: F.max_pool2d(x[:, None], 2)[:, :, :1].squeeze(1).squeeze(1), LINE),
    "squeeze nothing": (lambda x: F.max_pool2d(x, 2).squeeze(1), IMAGE),
    "causal attention": (attended(6, is_causal=True), IMAGE),
    "causal attention, scaled": (attended(6, is_causal=True, scale=0.3), IMAGE),
    "heads that share keys": (attended(2, enable_gqa=True), IMAGE),
    "causal, sharing": (attended(3, is_causal=True, enable_gqa=True), IMAGE),
    "divisor": (lambda x: F.avg_pool2d(x, (2, 3), padding=1, divisor_override=5), IMAGE),
    "divisor 3-D": (lambda x: F.avg_pool3d(x, 2, stride=1, divisor_override=3), VOLUME),
    "padding not counted": (
        lambda x: F.avg_pool2d(x, 3, 2, (1, 0), ceil_mode=True, count_include_pad=False), IMAGE,
    ),
    "even avg": (lambda x: F.adaptive_avg_pool2d(x, (13, 6)), IMAGE),
    "even max": (lambda x: F.adaptive_max_pool2d(x, (1, 6)), IMAGE),
    "nearest-exact 1-D": (lambda x: F.interpolate(x, 17, mode="nearest-exact"), LINE),
    "nearest-exact by factors": (
        lambda x: F.interpolate(x, scale_factor=(1.7, 2), mode="nearest-exact"), IMAGE,
    ),
    "nearest-exact 3-D": (lambda x: F.interpolate(x, (9, 9, 30), mode="nearest-exact"), VOLUME),
    "antialiased": (
        lambda x: F.interpolate(x, (7, 20), mode="bilinear", antialias=True), IMAGE,
    ),
    "antialiased by a factor": (
        lambda x: F.interpolate(x, scale_factor=0.45, mode="bicubic", antialias=True), IMAGE,
    ),
    "antialiased, aligned": (
        lambda x: F.interpolate(
            x, (7, 20), mode="bilinear", antialias=True, align_corners=True
        ), IMAGE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STATIC)
def test_what_is_static_is_written_in_opset_13(name: str, tmp_path: Path) -> None:
    use, shape = STATIC[name]
    network = Used(use).eval()
    file = export_onnx(network, torch.zeros(shape), tmp_path / "x.onnx", opset=13)
    assert answers_alike(network, file, shape).opset_import[0].version == 13


@pytest.mark.parametrize("opset", [17, 18])
def test_rms_norm_is_written_in_every_opset(opset: int, tmp_path: Path) -> None:
    """Axes are an attribute of means, and an input from opset 18 on."""
    network = Used(STATIC["rms norm"][0]).eval()
    file = export_onnx(network, torch.zeros(IMAGE), tmp_path / "x.onnx", opset=opset)
    means = [
        n for n in answers_alike(network, file, IMAGE).graph.node if n.op_type == "ReduceMean"
    ]
    assert [len(mean.input) for mean in means] == [1 + (opset >= 18)]


class Skip(nn.Module):
    """As in MViT: pooling of images that are put in by a dimension of one channel."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.transpose(1, 2).shape
        rows = x.transpose(1, 2).unsqueeze(1)
        first, rows = torch.tensor_split(rows, indices=(1,), dim=2)
        images = rows.transpose(2, 3).reshape(b, c, n // 4, 4)
        images = F.max_pool2d(images, 2).reshape(b, 1, c, -1).transpose(2, 3)
        return torch.cat([first, images], 2).squeeze(1)


def test_squeeze_never_asks_for_sizes(tmp_path: Path) -> None:
    network = Skip().eval()
    file = export_onnx(network, torch.zeros(LINE), tmp_path / "x.onnx", opset=13)
    assert "If" not in {n.op_type for n in answers_alike(network, file, LINE).graph.node}


def windowed(x: Tensor) -> Tensor:
    window = torch.hann_window(16)
    return torch.stft(x.flatten(1), 16, hop_length=8, window=window, return_complex=True).abs()


def unpooled(x: Tensor) -> Tensor:
    largest, indices = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(largest, indices, (2, 2))


def warped(x: Tensor) -> Tensor:
    moves = torch.tanh(x.mean((2, 3))).repeat(1, 2).view(-1, 2, 3)
    return F.grid_sample(
        x, F.affine_grid(moves, list(x.shape), align_corners=False), align_corners=False
    )


def sampled(x: Tensor) -> Tensor:
    return F.grid_sample(x, torch.tanh(x[:, :2]).permute(0, 2, 3, 1), align_corners=False)


NEWER: dict[str, tuple[Use, int, int]] = {  # newest opset that may be taken, and the one taken
    "sampling grid": (sampled, 20, 16),
    "fold": (lambda x: F.fold(F.unfold(x, 3, padding=1), (12, 12), 3, padding=1), 20, 18),
    "affine grid, first exporter": (warped, 20, 20),
    "affine grid, second exporter": (warped, 18, 18),
    "STFT": (windowed, 20, 18),
    "unpooled": (unpooled, 20, 18),
    "unpooled, converted": (unpooled, 17, 17),
    "Fourier": (lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 2, s=(12, 12)), 20, 18),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEWER)
def test_what_opset_13_lacks_is_written_in_a_newer_one(name: str, tmp_path: Path) -> None:
    use, newest, taken = NEWER[name]
    network, shape = Used(use).eval(), (2, 3, 12, 12)
    target = profile(tmp_path, opset=13, max_opset=newest)
    path = export_onnx(network, torch.rand(shape), tmp_path / "x.onnx", target=target)
    file = answers_alike(network, path, shape)
    assert [(each.domain, each.version) for each in file.opset_import] == [("", taken)]
    assert file.ir_version <= {16: 8, 17: 8, 18: 8, 20: 9}[taken]
    assert not any(tensor.external_data for tensor in file.graph.initializer)
    assert sorted(each.name for each in tmp_path.glob("x*")) == ["x.onnx"]


def test_a_failure_within_the_exporter_names_the_operation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def vague(*_: Any) -> None:
        raise ValueError("'NoneType' object is not subscriptable")

    monkeypatch.setitem(SYMBOLICS, "rms_norm", vague)
    network, x = Used(STATIC["rms norm"][0]).eval(), torch.rand(IMAGE)
    with pytest.raises(UnwritableError) as told:
        written(network, x, network(x), Way(13), fold=True)
    assert told.value.operation == "aten::rms_norm"


def profile(folder: Path, *, opset: int, max_opset: int) -> Any:
    path = folder / "board.toml"
    path.write_text(
        'description = "a board"\n[runtime]\nkind = "onnxruntime"\n[channels]\nstep = 8\n'
        f"[onnx]\nopset = {opset}\nmax_opset = {max_opset}\n"
    )
    return load_target(str(path))


def test_an_operation_newer_than_the_target_is_refused_by_both_names(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bend = Used(sampled)

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.bend(x)
            return answer

    target = profile(tmp_path, opset=13, max_opset=13)
    said = r"opset 13, the newest that board reads: grid_sampler in bend \(test_operations.py"
    for write in (
        lambda: check_exportable(Net().eval(), torch.rand(1, 3, 6, 6), target),
        lambda: export_onnx(
            Net().eval(), torch.rand(1, 3, 6, 6), tmp_path / "x.onnx", target=target
        ),
    ):
        with pytest.raises(ExportError, match=said + r".*needs opset 16"):
            write()
    with pytest.raises(ExportError, match="board reads opset 13 at most; got opset=16"):
        export_onnx(
            Net().eval(), torch.rand(1, 3, 6, 6), tmp_path / "x.onnx", target=target, opset=16
        )
    assert not (tmp_path / "x.onnx").exists()
    written = export_onnx(Net().eval(), torch.rand(1, 3, 6, 6), tmp_path / "x.onnx")
    assert answers_alike(Net(), written, (1, 3, 6, 6)).opset_import[0].version == 16


class Bent(nn.Module):
    """A network of the second exporter: its batch-norm stays in templates."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.head = nn.Conv2d(16, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = unpooled(self.second(torch.relu(self.norm(self.first(x)))))
        answer: Tensor = self.head(x.mean((2, 3)))
        return answer


@pytest.mark.slow
def test_candidates_of_the_second_exporter_answer_like_torch(tmp_path: Path) -> None:
    network, example = randomised(Bent()), torch.rand(1, 3, 10, 10)
    groups = compressor.channel_groups(network, example)
    plans = [random_plan(groups, np.random.default_rng(seed)) for seed in range(2)]
    pruned = [remove_channels(network, groups, plan) for plan in plans]
    write = candidate_writer(network, example, pruned[0])
    for each in pruned:
        path = tmp_path / "x.onnx"
        path.write_bytes(write(each))
        answers_alike(each, path, tuple(example.shape))


class Folded(nn.Module):
    """No sizes in its graph follow its widths, by whichever exporter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.head = nn.Conv2d(16, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = self.second(F.fold(F.unfold(x, 3, padding=1), (8, 8), 3, padding=1))
        answer: Tensor = self.head(x.mean((2, 3)))
        return answer


@pytest.mark.slow
def test_templates_of_the_second_exporter_are_its_files_byte_for_byte() -> None:
    network, example = randomised(Folded()), torch.rand(1, 3, 8, 8)
    groups = compressor.channel_groups(network, example)
    plans = [random_plan(groups, np.random.default_rng(seed)) for seed in range(2)]
    pruned = [remove_channels(network, groups, plan) for plan in plans]
    way = Way(18, is_second=True)
    template = make_template(network, example, way=way)
    for each in pruned:
        assert template.fill(each) == make_template(each, example, way=way).fill(each)


class Pyramid(nn.Module):
    """PSPNet's module: pooled to 1, 2, 3 and 6, none of which but 1 divides 13."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 16, 3, padding=1)
        self.parts = nn.ModuleList(nn.Conv2d(16, 8, 1) for _ in range(4))
        self.head = nn.Conv2d(16 + 32, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(x))
        pooled = [
            F.interpolate(
                torch.relu(part(F.adaptive_avg_pool2d(x, size))), x.shape[2:], mode="bilinear"
            )
            for part, size in zip(self.parts, (1, 2, 3, 6), strict=True)
        ]
        answer: Tensor = self.head(torch.cat([x, *pooled], 1))
        return answer


def test_a_pyramid_is_pruned_and_exported(tmp_path: Path) -> None:
    network, example = randomised(Pyramid()), torch.rand(1, 3, 13, 13)
    for each in (network, compressor.prune(network, example, 0.5)):
        file = export_onnx(each, example, tmp_path / "x.onnx", opset=13)
        answers_alike(each, file, tuple(example.shape))


@pytest.mark.slow
def test_alexnet_at_256_pixels_is_pruned_and_exported(tmp_path: Path) -> None:
    network, example = torchvision.models.alexnet().eval(), torch.rand(1, 3, 256, 256)
    for each in (network, compressor.prune(network, example, 0.25)):
        file = export_onnx(each, example, tmp_path / "x.onnx", opset=13)
        answers_alike(each, file, tuple(example.shape))


class Pair(NamedTuple):
    image: Tensor
    scale: Tensor


class Takes(nn.Module):
    def forward(self, x: Any, *, factor: Any = 2.0) -> Any:
        image = x.image * x.scale if isinstance(x, Pair) else x
        return image * factor, image.shape[1]


@pytest.mark.parametrize(
    ("example", "n_inputs"),
    [
        (torch.rand(1, 3), 1), ((Pair(torch.rand(1, 3), torch.rand(1, 3)),), 2),
        ({"x": torch.rand(1, 3), "factor": 3.0}, 1),
        ({"factor": torch.rand(1, 1), "x": torch.rand(1, 3)}, 2),
        ({"factor": torch.rand(1, 1), "x": Pair(torch.rand(1, 3), torch.rand(1, 1))}, 3),
    ],
)  # fmt: skip
def test_named_tuples_and_keywords_are_inputs_and_numbers_are_constants(
    example: Any, n_inputs: int, tmp_path: Path
) -> None:
    file = onnx.load(export_onnx(Takes().eval(), example, tmp_path / "x.onnx"))  # which compares
    assert len(file.graph.input) == n_inputs
    assert len(file.graph.output) == 1  # not the number


def test_numbers_that_follow_the_input_are_refused(tmp_path: Path) -> None:
    class Lists(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x + 1, x.tolist()

    with pytest.raises(ExportError, match="returns numbers of Python that follow its input"):
        export_onnx(Lists().eval(), torch.rand(1, 3), tmp_path / "x.onnx")
