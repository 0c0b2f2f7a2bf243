"""Small networks and data in which no two channels are alike."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.graph import channel_groups
from compressor.values import ChannelGroup, LabelledImages, Plan, Result, Split, Trained

collect_ignore = ["plugins"]  # packages of others, as the tests install them


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in eval mode with every parameter and batch-norm statistic random and different.

    Default statistics (mean 0, variance 1) would hide a wrong index into them.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            if name.endswith("running_var"):
                tensor.copy_(noise + 0.5)
            else:
                tensor.copy_(noise - 0.5)
    return model.eval()


class ConvNet(nn.Module):
    """Convolution, batch-norm, pooling, a depthwise layer, a sum, a flatten."""

    def __init__(self, width: int = 32, *, use_flatten: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(2 * width)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.outer = nn.Conv2d(2 * width, width, 1)
        self.pool = nn.MaxPool2d(2)
        self.use_flatten = use_flatten
        n_features = 2 * width
        self.last = nn.Conv2d(width, n_features, 3)
        if use_flatten:
            self.hidden = nn.Linear(n_features * 4, 24)
        else:
            self.hidden = nn.Linear(n_features, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.stem(x))))
        y = torch.relu(self.inner_norm(self.inner(x)))
        x = x + self.outer(self.depthwise(y))
        x = torch.relu(self.last(x))
        x = torch.flatten(x, 1) if self.use_flatten else x.mean((2, 3))
        return self.head(torch.relu(self.hidden(x)))


INPUT_SHAPE = (1, 8, 8)


def training_of(result: Result) -> Trained:
    """How it was trained, which it is known to be."""
    assert result.training is not None
    assert "steps" in result.training
    return result.training


def labelled(split: Split) -> LabelledImages:
    """The split, which is known to hold images and labels."""
    assert isinstance(split, LabelledImages)
    return split


def make_conv_net(width: int = 32) -> ConvNet:
    """A factory that tests name with --arch."""
    return ConvNet(width)


@pytest.fixture(autouse=True)
def _counted(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    """What `benchmarks.reliability` makes its table of."""
    for kind in ("fault", "bad_input"):
        for mark in request.node.iter_markers(kind):
            record_property(kind, mark.args[0])
            record_property("n", mark.kwargs.get("n", 1))


@pytest.fixture
def conv_net() -> ConvNet:
    net = randomised(ConvNet())
    assert isinstance(net, ConvNet)
    return net


@pytest.fixture
def example() -> Tensor:
    return torch.randn(1, *INPUT_SHAPE, generator=torch.Generator().manual_seed(1))


def random_plan(
    groups: tuple[ChannelGroup, ...], generator: np.random.Generator, *, floor: int = 1
) -> Plan:
    """Any kept channels of every free group, at least `floor` of each."""
    kept = {}
    for group in groups:
        if group.locked_because is None:
            n = int(generator.integers(floor, group.n_channels + 1))
            chosen = generator.permutation(group.n_channels)[:n]
            kept[group.name] = tuple(sorted(chosen.tolist()))
    return Plan(kept)


def blob_images(n: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """uint8 `(n, 1, 8, 8)` and 5 classes: a bright patch whose place is the class, in noise."""
    labels = generator.integers(5, size=n)
    images = generator.integers(0, 120, size=(n, 1, 8, 8)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 3)
        image[0, 2 * row + 1 : 2 * row + 4, 2 * column : 2 * column + 3] += 110
    return images, labels.astype(np.int64)


@pytest.fixture(scope="session")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An `.npz` with three splits that a small network learns in seconds."""
    generator = np.random.default_rng(0)
    arrays = {}
    for name, n in (("fit", 600), ("search", 200), ("test", 200)):
        arrays[f"{name}_images"], arrays[f"{name}_labels"] = blob_images(n, generator)
    path = tmp_path_factory.mktemp("data") / "blobs.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="session")
def trained(blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state_dict of `conftest:make_conv_net` trained on `blobs`."""
    torch.manual_seed(0)
    net = ConvNet()
    with np.load(blobs) as arrays:
        images = torch.from_numpy(arrays["fit_images"]).float() / 255
        labels = torch.from_numpy(arrays["fit_labels"])
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(12):
        for rows in torch.randperm(len(labels)).split(50):
            loss = nn.functional.cross_entropy(net(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    path = tmp_path_factory.mktemp("model") / "model.pt"
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture
def groups_of() -> Callable[[nn.Module, Tensor], tuple[ChannelGroup, ...]]:
    return channel_groups
