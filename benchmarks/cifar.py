"""ResNet-56 and CIFAR-10, for benchmarks: the network, and images out of a zip."""

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from compressor.importance import scores_by
from compressor.prunable import Prunable, make_prunable, with_branches
from compressor.search.space import SearchSpace, make_space
from compressor.values import Data, LabelledImages

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions; the shortcut takes every second pixel and pads channels with zeros."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.stride, self.n_more = stride, n_out - n_in

    def forward(self, x: Tensor) -> Tensor:
        """`(n, n_in, h, w)` to `(n, n_out, h / stride, w / stride)`."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.n_more:
            half = self.n_more // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(out + x)


class ResNet56(nn.Module):
    """Three stages of nine blocks, 16, 32 and 64 channels wide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(
                Block(n // 2 if not i and n > 16 else n, n, 2 if not i and n > 16 else 1)
                for i in range(9)
            ))
            for n in (16, 32, 64)
        )  # fmt: skip
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 3, 32, 32)` to `(n, 10)`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """The two files that every benchmark on ResNet-56 needs."""
    parser.add_argument("--data", type=Path, required=True, help="zip; see `load_cifar`")
    parser.add_argument("--model", type=Path, required=True, help="see `load_resnet56`")


def searched_resnet56(path: Path, example: Tensor, step: int) -> tuple[Prunable, SearchSpace]:
    """The network of `load_resnet56` with its branches, and what searches choose from."""
    prunable = with_branches(make_prunable(load_resnet56(path), example), example)
    scores = scores_by("l1", prunable.module, prunable.groups, None)
    space = make_space(
        prunable.groups, scores,
        step=step, min_keep_ratio=0.1, branches=prunable.branches,
    )  # fmt: skip
    return prunable, space


def load_resnet56(path: Path) -> nn.Module:
    """The network with the weights of the state_dict at `path`."""
    model = ResNet56()
    content = torch.load(path, weights_only=True)
    state = content.get("state_dict", content)
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return model.eval()


def load_cifar(
    zip_path: Path, n_fit: int, n_search: int, n_test: int, *, seed: int = 0, side: int = 32
) -> Data:
    """Some images of a zip with `train/<class>/*.jpg` and `test/<class>/*.jpg`.

    Fit and search images are disjoint, both of `train`; all are drawn at random. Search images are
    the last of the draw: whatever `n_fit` is, a network that learned from fit images knows none.
    """
    with zipfile.ZipFile(zip_path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        classes = sorted({name.split("/")[1] for name in names})
        generator = np.random.default_rng(seed)
        train = generator.permutation([n for n in names if n.startswith("train/")])
        test = generator.permutation([n for n in names if n.startswith("test/")])
        drawn = (train[:n_fit], train[max(n_fit, len(train) - n_search) :], test[:n_test])

        def opened(content: bytes) -> Image.Image:
            image = Image.open(io.BytesIO(content))
            return image if side == image.width else image.resize((side, side))

        def split(chosen: np.ndarray) -> LabelledImages:
            images = [np.array(opened(archive.read(str(n)))) for n in chosen]
            labels = [classes.index(str(name).split("/")[1]) for name in chosen]
            stacked = (
                np.stack(images).transpose(0, 3, 1, 2) if images else np.zeros((0, 3, side, side))
            )
            return LabelledImages(
                torch.from_numpy(np.ascontiguousarray(stacked, dtype=np.uint8)),
                torch.tensor(labels, dtype=torch.int64), MEAN, STD,
            )  # fmt: skip

        fit, search, tests = map(split, drawn)
    return Data(fit, search, tests, tuple(classes), f"{zip_path.name}, seed {seed}")


def as_npz(data: Data, folder: Path) -> Path:
    """The splits in a file."""
    arrays = {}
    for name in ("fit", "search", "test"):
        split = getattr(data, name)
        assert isinstance(split, LabelledImages)
        arrays[f"{name}_images"] = split.images[:].numpy()
        arrays[f"{name}_labels"] = split.labels.numpy()
    file = folder / "cifar.npz"
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file
