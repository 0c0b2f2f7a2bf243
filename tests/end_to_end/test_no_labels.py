"""Images without labels, from end to end: accuracy is agreement, to the last digit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import compressor
from compressor.errors import ConfigError, DataError, InterruptedRunError
from compressor.job import N_RANKING_IMAGES, posed_part, prepare
from compressor.search.study import read_trials
from compressor.values import Trial
from tests.conftest import blob_images, training_of

Make = Callable[..., compressor.Config]
N_TEST = 150


def write_images(folder: Path, images: np.ndarray, classes: list[str] | None = None) -> None:
    for i, image in enumerate(images):
        place = folder / classes[i] if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(place / f"{i:04}.png")


@pytest.fixture
def make(trained: Path, tmp_path: Path) -> Make:
    """The small network of the samples' tests, pruned until it answers otherwise now and then."""
    shutil.copy(trained, tmp_path / "model.pt")
    small: dict[str, object] = {
        "target": "raspberry-pi-5", "estimate": True, "arch": "tests.conftest:make_conv_net",
        "input_shape": [1, 8, 8], "constraint": {"macs": 0.08}, "min_keep_ratio": 0.05,
        "trials": 3, "finalists": 1, "fine_tune_epochs": 1, "batch_size": 16,
        "learning_rate": 1e-4, "least_squares": False, "recalibration_images": 0,
        "out": tmp_path / "run",
    }  # fmt: skip

    def make(**flags: object) -> compressor.Config:
        return compressor.load_config(tmp_path / "model.pt", small | flags)

    return make


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Three splits, each a folder of images and nothing else."""
    for seed, (name, n) in enumerate((("train", 160), ("val", 80), ("test", N_TEST))):
        write_images(tmp_path / "images" / name, blob_images(n, np.random.default_rng(seed))[0])
    return tmp_path / "images"


def answers(file: Path, images: list[Path]) -> np.ndarray:
    """The class of each image file, by ONNX Runtime and Pillow alone."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (name,) = [entry.name for entry in session.get_inputs()]
    found = []
    for path in images:
        pixels = np.asarray(Image.open(path), np.float32)[None, None] / 255
        found.append(session.run(None, {name: pixels})[0].argmax())
    return np.array(found)


def test_a_stopped_run_goes_on_and_tells_the_agreement(
    make: Make, flat: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: both files' answers to the test images, by other code."""

    def stop(trial: Trial) -> None:
        if trial.number == 1:
            raise KeyboardInterrupt

    out = tmp_path / "run"
    with pytest.raises(InterruptedRunError):
        compressor.compress(make(data=flat), on_trial=stop)
    assert "images has no labels: accuracy is agreement with the original's" in caplog.text
    assert 'labels = "none"' in (out / "config.toml").read_text()
    measured = read_trials(out / "study.db")
    result = compressor.resume(out)
    assert isinstance(result, compressor.Result)
    again = read_trials(out / "study.db")
    assert again[: len(measured)] == measured
    assert len(again) == 3

    test_images = sorted((flat / "test").iterdir())
    original, pruned = (answers(out / f, test_images) for f in ("original.onnx", "model.onnx"))
    agreement = float((original == pruned).mean())
    assert 0.3 < agreement < 1  # else it would show nothing
    assert result.compressed is not None
    assert result.original.accuracy == 1
    assert result.compressed.accuracy == pytest.approx(agreement, abs=1e-12)
    assert result.accuracy_drop_points == pytest.approx(100 * (1 - agreement))
    assert result.compressed.metric is None
    assert training_of(result)["distillation"] == 1

    told = json.loads((out / "result.json").read_text())
    assert told["search"]["task"] == "agreement"
    for text in (compressor.text_report(result), (out / "report.html").read_text()):
        assert "test agreement" in text
        assert "o label was used: accuracy is the share" in text
        assert "test accuracy" not in text
    page = (out / "report.html").read_text()
    assert f"answers as it does to {agreement:.2%} of the test images" in page
    assert "agreement with the original, %" in page
    assert "no label was used" in compressor.front_report([result])
    found = compressor.replay(out)
    assert (found.n_trials, found.differs_at) == (3, None)
    assert found.shipped is not None
    assert compressor.resume(out) == compressor.read_result(out)


def test_one_image_a_class_runs_with_the_flag(make: Make, tmp_path: Path) -> None:
    """Sixty classes of one image each: refused with the way out in the error, which is one."""
    images, _ = blob_images(60, np.random.default_rng(5))
    write_images(tmp_path / "images", images, [f"n{i:02}" for i in range(60)])
    flags: dict[str, object] = {"data": tmp_path / "images", "trials": 1, "fine_tune_epochs": 0}
    with pytest.raises(DataError, match="--labels none, for accuracy that is agreement"):
        compressor.compress(make(**flags))
    assert not (tmp_path / "run").exists()
    result = compressor.compress(make(labels="none", **flags))
    assert result.search["task"] == "agreement"
    assert result.original.accuracy == 1
    assert result.training is None
    shown = compressor.inspect_model(make(**flags))  # which needs the shape alone
    assert shown[0].example_input.shape == (1, 1, 8, 8)  # type: ignore[union-attr]


@pytest.mark.parametrize("importance", ["taylor", "l1"])
def test_labels_that_are_there_are_not_looked_at(
    make: Make, tmp_path: Path, importance: str
) -> None:
    """Other labels, impossible ones among them: the same splits, ranking and search space."""
    images, labels = blob_images(120, np.random.default_rng(6))
    jobs = []
    for i, each in enumerate((labels, labels[::-1] + 90)):
        np.savez(tmp_path / f"{i}.npz", images=images, labels=each)
        jobs.append(
            prepare(make(data=tmp_path / f"{i}.npz", labels="none", importance=importance))
        )
    one, other = jobs
    assert one.data.fingerprint == other.data.fingerprint
    assert one.augmentations == other.augmentations
    assert len(one.space.scores) > 1
    for mine, theirs in zip(one.space.scores, other.space.scores, strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert (np.asarray(mine) > 0).any()  # at the original a divergence has no gradient
    part = posed_part(one.data.fit, N_RANKING_IMAGES, one.model, one.criterion)
    pixels, targets = part.batch(slice(0, 50))
    with torch.inference_mode():
        assert torch.equal(one.model(pixels).argmax(1), targets)


def test_an_original_that_knows_one_answer_is_refused(make: Make, flat: Path) -> None:
    config = make(data=flat)
    weights = torch.load(config.model, weights_only=True)
    weights["head.weight"].zero_()
    torch.save(weights, config.model)
    with pytest.raises(DataError, match="to each of the 80 search images, and a network that"):
        compressor.compress(config)
    assert config.out is not None
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"label_smoothing": 0.1}, ConfigError, "without labels, leave label-smoothing away"),
        ({"arch": "tests.end_to_end.test_no_labels:make_one"}, DataError, "needs at least 2"),
    ],
)
def test_what_needs_labels_or_classes_is_refused(
    make: Make, flat: Path, flags: dict[str, object], error: type[Exception], message: str
) -> None:
    config = make(data=flat, **flags)
    if "arch" in flags:
        weights = torch.load(config.model, weights_only=True)
        weights |= {key: weights[key][:1] for key in ("head.weight", "head.bias")}
        torch.save(weights, config.model)
    with pytest.raises(error, match=message):
        prepare(config)


def make_one() -> torch.nn.Module:
    """A network with one logit."""
    from tests.conftest import ConvNet

    net = ConvNet()
    net.head = torch.nn.Linear(24, 1)
    return net


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("view", "takes one input, and fails for 2"),
        ("reshape", r"returns .*\(1, 10\) for 2 images"),
    ],
)
@pytest.mark.bad_input("a batch size that is written into the code")
def test_a_batch_size_in_the_code_is_named(make: Make, flat: Path, kind: str, says: str) -> None:
    with pytest.raises(DataError, match=rf"{says}.*seems to be written into its code"):
        prepare(make(data=flat, arch=f"tests.end_to_end.test_no_labels:make_{kind}"))


def make_view() -> torch.nn.Module:
    """A network whose code has a batch of one in it."""
    from tests.conftest import ConvNet

    class Viewed(ConvNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).view(1, 5)

    return Viewed()


def make_reshape() -> torch.nn.Module:
    """As `make_view`, without an error."""
    from tests.conftest import ConvNet

    class Reshaped(ConvNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).reshape(1, -1)

    return Reshaped()
