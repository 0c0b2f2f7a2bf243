"""Networks that are no classifiers, data without a fit split, and FP16 files, from end to end."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import compressor
from compressor.errors import ConfigError, DataError, MeasurementError, TaskError
from compressor.values import Verdict
from tests.conftest import ConvNet, blob_images, make_conv_net, training_of

Make = Callable[..., compressor.Config]


class TwoHeads(ConvNet):
    """Answers nested: logits, and beside them what they were made of."""

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return {"logits": logits, "more": (logits.softmax(dim=1), x.mean((2, 3)))}


def make_two_heads() -> TwoHeads:
    return TwoHeads()


class Images(Dataset[tuple[Tensor, Any]]):
    """Blobs with what the trained network answers to them, and a little noise."""

    def __init__(self, seed: int, n: int, weights: Path) -> None:
        images, _ = blob_images(n, np.random.default_rng(seed))
        self.images = torch.from_numpy(images).float() / 255
        net = make_conv_net().eval()
        net.load_state_dict(torch.load(weights, weights_only=True))
        with torch.inference_mode():
            answers = net(self.images)
        noise = torch.randn(answers.shape, generator=torch.Generator().manual_seed(seed))
        self.targets = answers + 0.3 * noise

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.images[row], {"answer": self.targets[row]}


class Regression:
    """Root mean squared error over all images; targets are dicts, outputs nested."""

    name = "RMSE"
    larger_is_better = False
    weights = Path()
    fault = ""

    def dataset(self, split: str) -> Dataset[tuple[Tensor, Any]] | None:
        if split == "fit" and self.fault == "no fit":
            return None
        sizes = {"fit": 300, "search": 120, "test": 120}
        return Images(list(sizes).index(split) + 10, sizes[split], self.weights)

    def loss(self, outputs: Any, targets: list[dict[str, Tensor]]) -> Tensor:
        wanted = torch.stack([target["answer"] for target in targets])
        return (outputs["logits"] - wanted).pow(2).mean()

    def judge(self, outputs: Any, targets: list[dict[str, Tensor]]) -> Sequence[float]:
        wanted = torch.stack([target["answer"] for target in targets])
        return (outputs["logits"] - wanted).pow(2).mean(dim=1).tolist()

    def metric(self, judged: list[float]) -> float:
        if self.fault == "nan":
            return float("nan")
        return (sum(judged) / len(judged)) ** 0.5


@pytest.fixture
def make_config(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., compressor.Config]:
    shutil.copy(trained, tmp_path / "model.pt")
    monkeypatch.setattr(Regression, "weights", trained)
    here = "tests.end_to_end.test_tasks"

    def make(**flags: object) -> compressor.Config:
        small: dict[str, object] = {
            "target": "host-cpu", "arch": f"{here}:make_two_heads", "task": f"{here}:Regression",
            "speedup": 1.05, "trials": 12, "fine_tune_epochs": 2, "out": tmp_path / "run",
        }  # fmt: skip
        settings = {k: v for k, v in (small | flags).items() if v is not None}
        return compressor.load_config(tmp_path / "model.pt", settings)

    return make


def test_a_regression_with_nested_outputs(make_config: Make, tmp_path: Path) -> None:
    """The figure in the result is that of the file, worked out here by other code."""
    result = compressor.compress(make_config())
    assert result.verdict is Verdict.MET
    assert result.compressed is not None
    assert result.search["task"] == "RMSE"
    assert training_of(result)["distillation"] == 0  # the task does not say how far answers are
    assert result.original.accuracy == 1.0
    import onnxruntime

    for side, file in ((result.original, "original.onnx"), (result.compressed, "model.onnx")):
        session = onnxruntime.InferenceSession(tmp_path / "run" / file)
        dataset = Images(12, 120, Regression.weights)
        errors = []
        for row in range(len(dataset)):
            image, target = dataset[row]
            (name,) = [entry.name for entry in session.get_inputs()]
            logits = session.run(None, {name: image[None].numpy()})[0]
            errors.append(((logits[0] - target["answer"].numpy()) ** 2).mean())
        assert side.metric == pytest.approx(float(np.sqrt(np.mean(errors))), rel=1e-4)
    assert result.compressed.metric is not None
    assert result.original.metric is not None
    kept = result.original.metric / result.compressed.metric
    assert result.compressed.accuracy == pytest.approx(kept)
    assert result.accuracy_drop_points == pytest.approx(100 * (1 - kept))
    assert kept > 0.5
    text = compressor.text_report(result)
    assert "test RMSE" in text
    assert "kept of it        100.00%" in text


@pytest.mark.parametrize(
    ("learning_rate", "limit"),
    [(0.001, {"speedup": 1.05}), (1e20, {"speedup": None, "max_drop": 60.0})],
)
def test_training_helps_a_task_or_says_that_it_did_not(
    make_config: Make, learning_rate: float, limit: dict[str, object]
) -> None:
    """Least squares is off, so that there is something to learn."""
    config = make_config(
        least_squares=False, fine_tune_epochs=6, batch_size=16, learning_rate=learning_rate,
        finalists=1, trials=4, **limit,
    )  # fmt: skip
    result = compressor.compress(config)
    trained = training_of(result)
    before, after = trained["search_accuracy_before"], trained["search_accuracy"]
    text = compressor.text_report(result)
    if learning_rate > 1:
        assert after == before
        assert "NOTHING GAINED: try a lower --learning-rate, STOPPED: the loss was" in text
    else:
        assert after > before + 0.02
        assert "NOTHING" not in text


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"data": "images"}, ConfigError, "a task brings its own data; leave data away"),
        ({"mean": [0.5], "std": [1.0]}, ConfigError, "leave mean, std away"),
        ({"augment": ["flip"]}, ConfigError, "leave augment away"),
        ({"search": "genetic"}, ConfigError, "search genetic looks at classes"),
        ({"task": "nowhere:x"}, TaskError, "cannot import nowhere"),
        ({"task": None}, ConfigError, "No images to rank plans by.*--task"),
    ],
)
def test_what_does_not_go_with_a_task(
    make_config: Make, flags: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compressor.compress(make_config(**flags))


def test_a_metric_that_is_no_number_stops_before_the_search(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Regression, "fault", "nan")
    with pytest.raises(MeasurementError, match="the metric of 2 images is nan"):
        compressor.compress(make_config())
    assert not (tmp_path / "run").exists()


def test_a_network_that_is_no_classifier_needs_a_task(make_config: Make, blobs: Path) -> None:
    with pytest.raises(DataError, match=r"it returns dict\. .* needs --task"):
        compressor.compress(make_config(task=None, data=blobs))


@pytest.mark.parametrize("is_task", [True, False])
def test_without_a_fit_split_training_is_skipped_and_told(
    make_config: Make, blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_task: bool
) -> None:
    flags: dict[str, object] = {}
    if is_task:
        monkeypatch.setattr(Regression, "fault", "no fit")
    else:
        with np.load(blobs) as arrays:
            kept = {key: arrays[key] for key in arrays.files if "fit" not in key}
        np.savez(tmp_path / "small.npz", **kept)
        flags = {
            "task": None, "data": tmp_path / "small.npz", "arch": "tests.conftest:make_conv_net",
        }  # fmt: skip
    result = compressor.compress(make_config(trials=3, **flags))
    assert result.training == {"skipped_because": "there is no fit split to learn from"}
    assert "training    SKIPPED: there is no fit split" in compressor.text_report(result)
    assert (tmp_path / "run" / "model.onnx").is_file()


def test_an_fp16_target_gets_an_fp16_file(
    make_config: Make, blobs: Path, trained: Path, tmp_path: Path
) -> None:
    """Half the bytes, FP32 at both ends, and the accuracy is that of this very file."""
    flags = {"task": None, "data": blobs, "arch": "tests.conftest:make_conv_net", "trials": 4}
    result = compressor.compress(
        make_config(target="jetson-nano", estimate=True, fine_tune_epochs=0, **flags)
    )
    assert result.compressed is not None
    for file in ("model.onnx", "original.onnx"):
        graph = onnx.load(tmp_path / "run" / file).graph
        weights = [t for t in graph.initializer if len(t.dims) > 1]
        assert weights
        assert {t.data_type for t in weights} == {onnx.TensorProto.FLOAT16}
        assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    engines = result.equivalence["engines"]
    in_half, in_full = engines["fp16"], engines["onnxruntime"]
    assert isinstance(in_half, float)
    assert isinstance(in_full, float)
    assert in_full < in_half < 0.1
    assert result.original.file_bytes < 0.6 * sum(
        t.numel() * 4 for t in torch.load(trained, weights_only=True).values()
    )
