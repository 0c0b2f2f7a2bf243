"""Tasks that are no classification: what is wrong with them is told, and what is kept is right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from compressor.errors import CompressorError, DataError, MeasurementError, TaskError
from compressor.evaluate import N_PARTS, accuracy, drop_of
from compressor.rows import one_tensor
from compressor.tasks import CLASSIFICATION, OwnTask, load_task, task_data
from compressor.values import example_shapes

NOT_A_TASK = "a text"


def samples(seed: int, n: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, 8, 8, generator=generator)
    return TensorDataset(images, images.mean((1, 2, 3)))


@dataclass
class MeanPixel:
    """Regression: the mean of an image's pixels; the metric is the mean absolute error."""

    larger_is_better: Any = False
    sets: dict[str, Any] = field(
        default_factory=lambda: {n: samples(i) for i, n in enumerate(("fit", "search", "test"))}
    )

    def dataset(self, split: str) -> Dataset[tuple[Tensor, Any]] | None:
        found: Dataset[tuple[Tensor, Any]] | None = self.sets[split]
        return found

    def loss(self, outputs: Tensor, targets: list[Tensor]) -> Tensor:
        return (outputs[:, 0] - torch.stack(targets)).pow(2).mean()

    def judge(self, outputs: Tensor, targets: list[Tensor]) -> Sequence[float]:
        return (outputs[:, 0] - torch.stack(targets)).abs().tolist()

    def metric(self, judged: list[float]) -> float:
        return sum(judged) / len(judged)


class Silent:
    """Lacks most."""

    def dataset(self, split: str) -> None: ...
    def loss(self) -> None: ...


def failing() -> MeanPixel:
    raise OSError("no such disk")


def own(**more: Any) -> OwnTask:
    return OwnTask("here:task", MeanPixel(**more))


def without_larger() -> MeanPixel:
    return MeanPixel(larger_is_better="yes")


@pytest.mark.parametrize("name", ["MeanPixel", "own_instance", "make"])
def test_a_task_is_an_object_or_what_makes_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "from tests.unit.test_tasks import MeanPixel\nown_instance = MeanPixel()\n"
    (tmp_path / "mine.py").write_text(text + "def make(): return MeanPixel()\n")
    task = load_task(f"mine:{name}", beside=tmp_path)
    assert task.name == "MeanPixel"
    assert not task.larger_is_better
    assert not task.has_distance
    data = task_data(task)
    assert example_shapes(data.fit.model_input(slice(0, 1))) == "(1, 1, 8, 8) float32"
    assert data.is_trainable
    assert data.fingerprint == task_data(task).fingerprint
    images, targets = data.search.batch(torch.tensor([3, 1]))
    expected = samples(1)
    assert torch.equal(one_tensor(images), torch.stack([expected[3][0], expected[1][0]]))
    assert targets == [expected[3][1], expected[1][1]]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nothing", "package.module:object"),
        ("no_such_module:x", "cannot import no_such_module"),
        ("tests.unit.test_tasks:MeanPixels", "Did you mean 'MeanPixel'"),
        ("tests.unit.test_tasks:NOT_A_TASK", "is a str without dataset, loss, judge, metric"),
        ("tests.unit.test_tasks:Silent", "is a Silent without judge, metric"),
        ("tests.unit.test_tasks:failing", "failed: OSError: no such disk"),
        ("tests.unit.test_tasks:without_larger", "must say larger_is_better"),
    ],
)
def test_what_is_no_task_is_told(reference: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=message):
        load_task(reference, beside=tmp_path)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


def with_first(sample: Any) -> list[Any]:
    return [sample, sample]


@pytest.mark.parametrize(
    ("split", "content", "message"),
    [
        ("search", None, r"dataset\('search'\) is None; plans are ranked by it"),
        ("test", None, "the result is measured on it"),
        ("fit", Endless(), "is a Endless; expected a dataset with __len__"),
        ("fit", samples(9, 1), "has 1 samples"),
        ("fit", with_first(3), "is a int; expected"),
        ("fit", with_first((torch.zeros(1, 8, 8, dtype=torch.uint8), 0)), "torch.uint8"),
        ("fit", with_first((torch.zeros(8, dtype=torch.complex64), 0)), r"complex64 \(8,\); exp"),
        ("fit", with_first(([1], 0)), "the input is a list of a int; expected"),
        ("fit", with_first(((), 0)), "the input is a tuple of nothing"),
        ("fit", with_first(((torch.zeros(3), torch.full((2,), torch.inf)), 0)), "NaN or infinity"),
        ("fit", with_first((torch.full((1, 8, 8), torch.nan), 0)), "NaN or infinity"),
        ("test", with_first((torch.zeros(1, 9, 9), 0)), r"\(1, 9, 9\), others are .*\(1, 8, 8\)"),
        ("test", "search", "is the very dataset of another split"),
    ],
)
def test_bad_samples_are_found_before_anything_starts(
    split: str, content: Any, message: str
) -> None:
    task = MeanPixel()
    task.sets[split] = task.sets["search"] if content == "search" else content
    with pytest.raises(DataError, match=message):
        task_data(OwnTask("here:task", task))


def test_a_task_without_fit_split_is_not_trained() -> None:
    task = MeanPixel()
    task.sets["fit"] = None
    data = task_data(OwnTask("here:task", task))
    assert not data.is_trainable
    assert data.fit is data.search


@pytest.mark.parametrize(
    ("part", "answer", "error", "message"),
    [
        ("loss", 3.0, TaskError, "loss returned float"),
        ("loss", torch.zeros(2), TaskError, r"loss returned Tensor\(2,\)"),
        ("judge", [1.0], TaskError, "1 judgements of 2 images"),
        ("metric", "good", TaskError, "metric returned str"),
        ("metric", float("nan"), MeasurementError, "metric of 2 images is nan"),
    ],
)
def test_bad_answers_of_a_task_are_told(
    part: str, answer: Any, error: type[CompressorError], message: str
) -> None:
    task = MeanPixel()
    setattr(task, part, lambda *_: answer)
    outputs, targets = torch.zeros(2, 1), [torch.tensor(0.0)] * 2
    asked = OwnTask("here:task", task)
    calls: dict[str, Callable[[], object]] = {
        "loss": lambda: asked.loss(outputs, targets),
        "judge": lambda: asked.judge(outputs, targets),
        "metric": lambda: asked.metric([1.0, 2.0]),
    }
    with pytest.raises(error, match=message):
        calls[part]()


def test_a_failing_part_names_its_line() -> None:
    with pytest.raises(TaskError, match=r"loss failed: .*test_tasks.py, line \d+"):
        own().loss(torch.zeros(2, 1), [torch.zeros(3), torch.zeros(1)])


def offset(by: float) -> Callable[[Tensor], Tensor]:
    """The true means, plus or minus an error that differs from image to image."""

    def predict(images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))[:, None] + by * (1 + images[:, :, 0, 0].abs())

    return predict


@pytest.mark.parametrize("larger_is_better", [True, False])
def test_what_is_kept_is_a_share_of_the_originals_metric(larger_is_better: bool) -> None:
    """Half the error is twice as good, or half as good where large errors are what is wanted."""
    task = own(larger_is_better=larger_is_better)
    search = task_data(task).search
    original = accuracy(offset(0.4), search, batch_size=16, criterion=task)
    assert original.value == 1.0
    assert original.metric is not None
    better = accuracy(offset(0.2), search, batch_size=7, criterion=task, original=original.metric)
    assert better.metric == pytest.approx(original.metric / 2)
    assert better.value == pytest.approx(0.5 if larger_is_better else 2.0)
    assert better.n == 40


def test_the_spread_of_a_mean_is_the_textbooks() -> None:
    """With no more images than parts, the jackknife leaves out one at a time, and is exact."""
    task = own(larger_is_better=True)
    search = task_data(task).search
    assert len(search) <= N_PARTS
    measured = accuracy(offset(0.4), search, batch_size=40, criterion=task)
    errors = torch.tensor(
        task.judge(
            offset(0.4)(one_tensor(search.model_input(slice(None)))), search.batch(slice(None))[1]
        ),
        dtype=torch.float64,
    )
    expected = errors.std(correction=1) / len(errors) ** 0.5 / errors.mean()
    assert measured.standard_error == pytest.approx(float(expected), rel=1e-6)


def test_a_drop_is_a_share_and_alike_networks_have_none() -> None:
    task = own()
    before, after = [1.0, 2.0, 3.0] * 20, [2.0, 4.0, 6.0] * 20
    assert drop_of(before, before, task) == (0.0, 0.0)
    drop, error = drop_of(before, after, task)
    assert drop == pytest.approx(0.5)
    assert error == pytest.approx(0.0, abs=1e-12)  # twice the error on every image alike


def test_an_original_that_scores_nothing_is_an_error() -> None:
    task = own()
    with pytest.raises(TaskError, match="expected a metric above 0"):
        accuracy(lambda x: x.mean((1, 2, 3))[:, None], task_data(task).search,
                 batch_size=8, criterion=task)  # fmt: skip


def test_distance_is_relative_unless_the_task_has_its_own() -> None:
    """Twice the scale of answers leaves it as it is; nested answers are averaged."""
    wanted = torch.randn(50, 3)
    outputs = wanted + 0.1
    plain = own().distance(outputs, wanted)
    assert float(plain) == pytest.approx(0.01 / float(wanted.var()), rel=1e-4)
    assert float(own().distance(2 * outputs, 2 * wanted)) == pytest.approx(float(plain), rel=1e-4)
    nested = own().distance({"a": outputs, "b": (wanted,)}, {"a": wanted, "b": (wanted,)})
    assert float(nested) == pytest.approx(float(plain) / 2, rel=1e-4)
    task = MeanPixel()
    task.distance = lambda a, b: (a - b).abs().sum()  # type: ignore[attr-defined]
    assert float(OwnTask("here:task", task).distance(outputs, wanted)) == pytest.approx(
        15, rel=0.1
    )


def test_classes_judge_themselves() -> None:
    logits, labels = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
    judged = CLASSIFICATION.judge(logits, labels)
    assert [right for right, _ in judged] == [True, False]
    assert CLASSIFICATION.metric(judged) == 0.5
    mean = sum(loss for _, loss in judged) / 2
    assert mean == pytest.approx(float(CLASSIFICATION.loss(logits, labels)))
