"""Runs on what is no image: signals, video, token ids, several inputs, sequences."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import compressor
from compressor.errors import CompressorError, ConfigError, DataError, ModelError
from compressor.values import Result
from tests.end_to_end.scripts import module_of

HERE = "tests.end_to_end.test_inputs"
SLOW = pytest.mark.slow  # the same way as another one
N_CLASSES, N_TOKENS = 4, 40
SIZES = {"fit": 160, "search": 80, "test": 80}


class SignalNet(nn.Module):
    """Reads `(n, 2, 32)`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 48, 5, padding=2)
        self.norm = nn.BatchNorm1d(48)
        self.second = nn.Conv1d(48, 64, 5, padding=2)
        self.head = nn.Linear(64, N_CLASSES)

    def forward(self, signal: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(signal)))
        return self.head(torch.relu(self.second(x)).mean(2))


class VideoNet(nn.Module):
    """Reads `(n, 1, 4, 8, 8)`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 48, 3, padding=1)
        self.norm = nn.BatchNorm3d(48)
        self.second = nn.Conv3d(48, 48, 3, padding=1)
        self.head = nn.Linear(48, N_CLASSES)

    def forward(self, video: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(video)))
        return self.head(torch.relu(self.second(x)).mean((2, 3, 4)))


class TokenNet(nn.Module):
    """Reads ids `(n, 12)`."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(N_TOKENS, 32)
        self.conv = nn.Conv1d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64, 64)
        self.head = nn.Linear(64, N_CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.conv(self.table(ids).transpose(1, 2))).mean(2)
        return self.head(torch.relu(self.hidden(x)))


class PairNet(nn.Module):
    """Reads a signal `(n, 2, 32)`, ids `(n, 12)`, and a third input that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.of_signal, self.of_ids = SignalNet(), TokenNet()

    def forward(self, signal: Tensor, unused: Tensor, ids: Tensor) -> Tensor:
        return self.of_signal(signal) + self.of_ids(ids)


def signals(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Waves whose frequency is the class."""
    time = np.arange(32)
    waves = np.sin(
        (1 + labels[:, None, None]) * 0.4 * time + generator.uniform(0, 6, (len(labels), 2, 1))
    )
    return (waves + generator.normal(0, 0.3, waves.shape)).astype(np.float32)


def videos(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A bright frame, whose number is the class, in noise; uint8."""
    frames = generator.integers(0, 120, (len(labels), 1, 4, 8, 8))
    frames[np.arange(len(labels)), 0, labels, :, 2 * labels[0] :] += 20
    for video, label in zip(frames, labels, strict=True):
        video[0, :, 2 * label : 2 * label + 2] += 110
    return frames.astype(np.uint8)


def tokens(labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Ids of which most lie in the class's quarter of the table."""
    own = generator.integers(0, N_TOKENS // 4, (len(labels), 12)) + labels[:, None] * N_TOKENS // 4
    any_ = generator.integers(0, N_TOKENS, own.shape)
    return np.where(generator.random(own.shape) < 0.7, own, any_).astype(np.int64)


def arrays(kind: str, labels: np.ndarray, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """What an `.npz` holds of a split of a kind."""
    if kind == "SignalNet":
        return {"signals": signals(labels, generator)}
    if kind == "VideoNet":
        return {"images": videos(labels, generator)}
    if kind == "TokenNet":
        return {"tokens": tokens(labels, generator)}
    several = {
        "signal": signals(labels, generator),
        "unused": np.zeros((len(labels), 3), np.float32),
        "ids": tokens(labels, generator),
    }
    if kind == "PairNet by name":
        return dict(reversed(several.items()))
    return {f"input_{i}": array for i, array in enumerate(several.values())}


def make(kind: str) -> nn.Module:
    """A factory that tests name with --arch."""
    net: nn.Module = globals()[kind.partition(" ")[0]]()
    return net


def write_data(path: Path, kind: str) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    found = {}
    for split, n in SIZES.items():
        labels = np.arange(n) % N_CLASSES
        found[f"{split}_labels"] = labels
        for name, array in arrays(kind, labels, generator).items():
            found[f"{split}_{name}"] = array
    np.savez(path, **found)  # type: ignore[arg-type]
    return found


def write_trained(path: Path, kind: str, data: dict[str, np.ndarray]) -> None:
    torch.manual_seed(0)
    net = make(kind)
    names = arrays(kind, np.zeros(1, np.int64), np.random.default_rng(0))
    given = {name: torch.from_numpy(data[f"fit_{name}"]) for name in names}
    given = {name: t.float() / 255 if t.dtype == torch.uint8 else t for name, t in given.items()}
    labels = torch.from_numpy(data["fit_labels"])
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(25):
        logits = net(**given) if kind == "PairNet by name" else net(*given.values())
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
    torch.save(net.state_dict(), path)


def run(folder: Path, kind: str, **flags: Any) -> Result:
    """A run of seconds: nothing is timed, times are the profile's."""
    data = write_data(folder / "data.npz", kind)
    write_trained(folder / "model.pt", kind, data)
    small = {
        "target": "raspberry-pi-4", "estimate": True, "arch": f"{HERE}:make",
        "arch_args": {"kind": kind}, "data": folder / "data.npz", "speedup": 1.2, "trials": 4,
        "fine_tune_epochs": 1, "finalists": 1, "batch_size": 16, "recalibration_images": 64,
        "out": folder / "run",
    }  # fmt: skip
    return compressor.compress(compressor.load_config(folder / "model.pt", small | flags))


def assert_file_answers_like_torch(folder: Path, given: dict[str, Tensor]) -> None:
    """The ONNX file, fed by name, beside the network that `model.pt` rebuilds."""
    net = compressor.load_compressed(folder / "run" / "model.pt", arch=f"{HERE}:make")
    session = onnxruntime.InferenceSession(folder / "run" / "model.onnx")
    wanted = {each.name for each in session.get_inputs()}
    (answer,) = session.run(None, {n: t.numpy() for n, t in given.items() if n in wanted})
    with torch.no_grad():
        expected = net(**given) if "ids" in given else net(*given.values())
    torch.testing.assert_close(torch.from_numpy(answer), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["SignalNet", pytest.param("VideoNet", marks=SLOW)])
def test_signals_and_video(kind: str, tmp_path: Path) -> None:
    """Least squares, hints, batch-norm and export work on one and three dimensions as on two."""
    result = run(tmp_path, kind)
    assert result.compressed is not None
    assert result.original.accuracy > 0.5
    assert result.compressed.accuracy > 0.5
    assert result.compressed.macs < result.original.macs
    shape = (1, 2, 32) if kind == "SignalNet" else (1, 1, 4, 8, 8)
    example = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    assert_file_answers_like_torch(tmp_path, {"input": example})


def first_of(folder: Path, kind: str) -> dict[str, Tensor]:
    """An input that no run has seen, by the names in the file."""
    given = arrays(kind, np.array([2]), np.random.default_rng(5))
    named = {name: torch.from_numpy(array) for name, array in given.items()}
    return {"input": next(iter(named.values()))} if len(named) == 1 else named


def test_token_ids(tmp_path: Path) -> None:
    """Ids stay whole numbers from the file to the device, and lie in the network's table."""
    result = run(tmp_path, "TokenNet", target="host-cpu", estimate=False, speedup=1.01, trials=3)
    assert result.original.accuracy > 0.5
    (given,) = onnxruntime.InferenceSession(tmp_path / "run" / "original.onnx").get_inputs()
    assert (given.type, given.shape) == ("tensor(int64)", [1, 12])
    if result.compressed is not None:  # so small a network may not come out faster
        assert_file_answers_like_torch(tmp_path, first_of(tmp_path, "TokenNet"))


@pytest.mark.parametrize(
    "kind", ["PairNet by name", pytest.param("PairNet by number", marks=SLOW)]
)
def test_several_inputs(kind: str, tmp_path: Path) -> None:
    """By name in any order, or by number; the one that nothing reads is not in the file."""
    result = run(tmp_path, kind)
    assert result.compressed is not None
    assert result.original.accuracy > 0.5
    session = onnxruntime.InferenceSession(tmp_path / "run" / "model.onnx")
    names = [each.name for each in session.get_inputs()]
    assert names == (["signal", "ids"] if "name" in kind else ["input_0", "input_2"])
    assert_file_answers_like_torch(tmp_path, first_of(tmp_path, kind))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": np.full((160, 12), 40)}, r"run from 40 to 40.*\(rows: of_ids.table has 40\)"),
        ({"ids": np.full((160, 12), -1)}, "run from -1 to -1"),
        ({"unused": None}, r"missing 1 .*was given ids, signal; its .*\(signal: .* ids: "),
        ({"more": np.ones((160, 2), np.float32)}, "unexpected keyword argument 'more'"),
        ({"ids": np.ones((159, 12), np.int64)}, "must be equally long"),
        ({"signal": np.ones((160, 2, 32))}, "signal is float64; expected uint8"),
    ],
)
def test_inputs_that_do_not_fit_are_told_at_once(
    changes: dict[str, np.ndarray | None], message: str, tmp_path: Path
) -> None:
    data = write_data(tmp_path / "whole.npz", "PairNet by name")
    torch.save(make("PairNet").state_dict(), tmp_path / "model.pt")
    for name, array in changes.items():
        for split, n in SIZES.items():
            data.pop(f"{split}_{name}", None)
            if array is not None:
                data[f"{split}_{name}"] = array[: len(array) - (160 - n)]
    np.savez(tmp_path / "data.npz", **data)  # type: ignore[arg-type]
    config = compressor.load_config(tmp_path / "model.pt", {
        "target": "raspberry-pi-4", "estimate": True, "arch": f"{HERE}:make", "speedup": 1.2,
        "arch_args": {"kind": "PairNet"}, "data": tmp_path / "data.npz", "out": tmp_path / "run",
    })  # fmt: skip
    with pytest.raises(CompressorError, match=message):
        compressor.compress(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"augment": ["flip"]}, r"--augment changes images.*here are \(1, 2, 32\) float32"),
        ({"input_shape": [2, 31]}, r"--input-shape is \(2, 31\), but .* \(1, 2, 32\) float32"),
    ],
)
def test_settings_for_images_are_refused(
    flags: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, "SignalNet", **flags)
    assert not (tmp_path / "run").exists()


class SequenceFirst(nn.Module):
    """`(n, 2, 32)` and ids `(n, 12)` -> `(32, n, 4)`: the batch is second."""

    def __init__(self) -> None:
        super().__init__()
        self.of_signal, self.of_ids = nn.Conv1d(2, 48, 5, padding=2), TokenNet()
        self.hidden, self.head = nn.Linear(48, 64), nn.Linear(64, N_CLASSES)

    def forward(self, signal: Tensor, ids: Tensor) -> Tensor:
        steps = torch.relu(self.of_signal(signal)).permute(2, 0, 1)
        return self.head(torch.relu(self.hidden(steps))) + self.of_ids(ids)


class Chooses(nn.Module):
    """A model that ends in what picks results, around the layers that can be compressed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = SequenceFirst()

    def forward(self, signal: Tensor, ids: Tensor) -> list[Tensor]:
        scores = self.layers(signal, ids).mean(0).softmax(1)
        return [each[each > 0.5].nonzero() for each in scores]


def make_chooses() -> Chooses:
    """A factory that tests name with --arch."""
    torch.manual_seed(0)
    return Chooses()


class Wave(Dataset[tuple[Any, int]]):
    """Items as a task may give them: a tuple of inputs, and the class."""

    def __init__(self, seed: int, n: int) -> None:
        generator = np.random.default_rng(seed)
        self.labels = np.arange(n) % N_CLASSES
        self.signals = torch.from_numpy(signals(self.labels, generator))
        self.ids = torch.from_numpy(tokens(self.labels, generator))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return (self.signals[row], self.ids[row]), int(self.labels[row])


class Steps:
    """The class at every step of a sequence; the metric falls with the cross-entropy."""

    larger_is_better = True

    def network(self, model: Chooses) -> nn.Module:
        return model.layers

    def dataset(self, split: str) -> Dataset[tuple[Any, int]]:
        return Wave(list(SIZES).index(split), 70)  # no multiple of a batch

    def loss(self, outputs: Tensor, targets: list[int]) -> Tensor:
        assert outputs.shape[1:] == (len(targets), N_CLASSES)
        return F.cross_entropy(
            outputs.permute(1, 2, 0), torch.tensor(targets)[:, None].expand(-1, 32)
        )

    def judge(self, outputs: Tensor, targets: list[int]) -> list[float]:
        right = outputs.log_softmax(2).mean(0)[torch.arange(len(targets)), torch.tensor(targets)]
        return right.exp().tolist()

    def metric(self, judged: list[float]) -> float:
        return sum(judged) / len(judged)

    def distance(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        return (outputs - wanted).square().mean()


class Whole(Steps):
    """The same without saying which part is compressed."""

    def __getattribute__(self, name: str) -> Any:
        if name == "network":
            raise AttributeError(name)
        return super().__getattribute__(name)


def of_task(folder: Path, task: str, **flags: Any) -> compressor.Config:
    torch.save(make_chooses().state_dict(), folder / "model.pt")
    small = {
        "target": "raspberry-pi-4", "estimate": True, "arch": f"{HERE}:make_chooses",
        "task": f"{HERE}:{task}", "speedup": 1.2, "trials": 3, "fine_tune_epochs": 1,
        "finalists": 1, "batch_size": 16, "out": folder / "run",
    }  # fmt: skip
    return compressor.load_config(folder / "model.pt", small | flags)


def test_a_part_of_the_model_with_the_batch_second(tmp_path: Path) -> None:
    """The file is the part's; the metric in the result is worked out here by other code."""
    result = compressor.compress(of_task(tmp_path, "Steps"))
    assert result.compressed is not None
    session = onnxruntime.InferenceSession(tmp_path / "run" / "model.onnx")
    data, shares = Wave(2, 70), []
    for row in range(len(data)):
        (signal, ids), label = data[row]
        fed = {"input_0": signal[None].numpy(), "input_1": ids[None].numpy()}
        (answer,) = session.run(None, fed)
        assert answer.shape == (32, 1, N_CLASSES)
        odds = np.exp(answer - answer.max(2, keepdims=True))
        shares.append(np.exp(np.log(odds / odds.sum(2, keepdims=True)).mean(0))[0, label])
    assert result.compressed.metric == pytest.approx(np.mean(shares), rel=1e-4)

    checkpoint = tmp_path / "run" / "model.pt"
    with pytest.raises(ModelError, match="the one that `network` of the task"):
        compressor.load_compressed(checkpoint, arch=f"{HERE}:make_chooses")
    net = compressor.load_compressed(checkpoint, original=make_chooses().layers.eval())
    with torch.no_grad():
        torch.testing.assert_close(
            net(signal[None], ids[None]), torch.from_numpy(answer), rtol=1e-3, atol=1e-3
        )
    kept = torch.load(checkpoint, weights_only=True)["example"]
    assert all(len(each.unique()) == 1 for each in kept)  # nothing of the data but one id


def test_what_picks_results_is_told_where_to_go(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"network\(model\) returns the part before it"):
        compressor.compress(of_task(tmp_path, "Whole"))


@pytest.mark.slow
def test_a_detector_of_torchvisions(tmp_path: Path) -> None:
    """ssdlite with random weights, up to its raw heads; the file is the heads'."""
    pytest.importorskip("torchvision")
    sample = Path(__file__).parents[2] / "samples" / "detection"
    boxes = module_of(sample / "boxes.py")
    for name in ("boxes.py", "compress.toml"):
        shutil.copy(sample / name, tmp_path / name)
    boxes.train(tmp_path / "model.pt", n_steps=20)
    flags = {
        "target": "raspberry-pi-4", "estimate": True, "speedup": 1.2, "trials": 3,
        "fine_tune_epochs": 1, "finalists": 1, "out": tmp_path / "run",
    }  # fmt: skip
    result = compressor.compress(compressor.load_config(tmp_path / "model.pt", flags))
    assert result.compressed is not None
    assert result.search["task"] == "overlap"
    heads = boxes.Heads(boxes.make()).eval()
    net = compressor.load_compressed(tmp_path / "run" / "model.pt", original=heads)
    image, _ = boxes.Squares(1, seed=9)[0]
    with torch.no_grad():
        expected = net(image[None])
    session = onnxruntime.InferenceSession(tmp_path / "run" / "model.onnx")
    found = session.run(None, {"input": image[None].numpy()})
    for answer, wanted in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(answer), wanted, rtol=1e-3, atol=1e-3)
