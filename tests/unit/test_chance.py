"""An original that is right by chance only is refused, with what would explain it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.chance import check_better_than_chance
from compressor.datasets import load_data
from compressor.errors import DataError
from compressor.values import LabelledImages
from tests.unit.test_datasets import image_at

N_CLASSES = 12
NAMES = sorted(map(str, range(N_CLASSES)))  # as text: 0, 1, 10, 11, 2, ...


def judged(
    answers: np.ndarray, labels: np.ndarray, names: list[str] = NAMES, is_folder: bool = True
) -> None:
    """Checks a network that gives `answers`, one an image, for images with `labels`."""
    images = torch.from_numpy(np.arange(len(labels), dtype=np.float32)).reshape(-1, 1, 1, 1)
    split = LabelledImages(images, torch.from_numpy(labels), (), ())

    def predict(batch: Tensor) -> Tensor:
        rows = batch.reshape(-1).long().numpy()
        return torch.nn.functional.one_hot(torch.from_numpy(answers[rows]), len(names)).float()

    n_right = int((answers == labels).sum())
    check_better_than_chance(
        predict, split, names, n_right=n_right, batch_size=32, is_folder=is_folder
    )


def labels_of(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, N_CLASSES, n)


@pytest.mark.parametrize("n_right", [120, 400, 500])
def test_what_is_better_than_chance_is_taken(n_right: int) -> None:
    labels = labels_of(500)
    answers = labels_of(500, seed=1)
    answers[:n_right] = labels[:n_right]
    judged(answers, labels)


def test_on_few_images_a_good_network_is_taken() -> None:
    judged(np.array([0, 1, 2, 3, 4, 0, 1, 2, 3, 9]), np.array([0, 1, 2, 3, 4, 0, 1, 2, 3, 4]))


def test_unequal_classes_are_no_excuse_and_no_reason() -> None:
    """Nine of ten images are of one class: taking all for it is chance, and 95 % is not."""
    labels = np.where(np.arange(1000) % 10 == 0, 1, 0)
    with pytest.raises(DataError, match=r"90\.0% of the 1000 .* chance has 90\.0%"):
        judged(np.zeros(1000, dtype=np.int64), labels, ["a", "b"])
    answers = labels.copy()
    answers[:50] = 1 - answers[:50]
    judged(answers, labels, ["a", "b"])


@pytest.mark.parametrize(
    ("n", "n_positive", "n_found", "n_false"),
    [(1000, 1, 1, 0), (500, 5, 3, 4), (200, 4, 3, 3), (100, 2, 2, 1)],
)
def test_a_screen_for_what_is_rare_is_taken(
    n: int, n_positive: int, n_found: int, n_false: int
) -> None:
    """Its accuracy is hardly above that of "none", but no such answers come by chance."""
    labels = (np.arange(n) < n_positive).astype(np.int64)
    answers = np.zeros(n, dtype=np.int64)
    answers[:n_found] = 1
    answers[n - n_false :] = 1
    judged(answers, labels, ["no", "yes"])


def test_where_few_images_cannot_tell_it_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    labels = np.arange(20) % 2
    answers = np.where(np.arange(20) < 14, labels, 1 - labels)
    judged(answers, labels, ["a", "b"])
    assert "give more images" in caplog.text


@pytest.mark.bad_input("an original that is right by chance")
def test_a_network_without_training_is_refused_with_the_usual_causes() -> None:
    with pytest.raises(DataError) as caught:
        judged(labels_of(500, seed=1), labels_of(500))
    for cause in ("--classes", "--mean", "--image-size", "not the trained weights"):
        assert cause in str(caught.value)
    assert "another order of the classes" not in str(caught.value)


@pytest.mark.bad_input("class folders in another order than the network's outputs")
@pytest.mark.parametrize("order", ["as numbers", "at random"])
def test_an_order_that_explains_it_is_named(order: str) -> None:
    """The network was trained with one order of the names, the data has the text's."""
    names = [str(i) for i in range(N_CLASSES)]
    if order == "at random":
        names = [str(i) for i in np.random.default_rng(5).permutation(N_CLASSES)]
    labels = labels_of(600)
    answers = np.array([names.index(NAMES[label]) for label in labels])
    answers[np.random.default_rng(7).random(600) < 0.1] = 0
    with pytest.raises(DataError, match=r"another order of the classes 9\d% would be right") as e:
        judged(answers, labels)
    if order == "as numbers":
        assert "0, 1, 2, 3, 4, 5, ..., as numbers are sorted" in str(e.value)
    else:
        assert f"output 1 is {names[1]}, output 2 is {names[2]}" in str(e.value)
    with pytest.raises(DataError, match=r"renumber the labels.*Renumber the labels") as e:
        judged(answers, labels, is_folder=False)  # for which there is no --classes
    assert "--classes" not in str(e.value)


def test_the_order_of_class_folders_can_be_given(tmp_path: Path) -> None:
    for i in range(12):
        for name in ("0", "2", "10"):
            image_at(tmp_path / "images" / name / f"{i}.png", hash((i, name)) % 2**32)
    given = tmp_path / "classes.txt"
    given.write_text("0\n2\n\n10\n")
    assert load_data(tmp_path / "images").class_names == ("0", "10", "2")
    data = load_data(tmp_path / "images", classes=given)
    assert data.class_names == ("0", "2", "10")
    plain = load_data(tmp_path / "images")
    of = {image.tobytes(): int(label) for image, label in pairs(data.fit)}
    for image, label in pairs(plain.fit):
        if image.tobytes() in of:
            assert data.class_names[of[image.tobytes()]] == plain.class_names[int(label)]


def pairs(split: object) -> list[tuple[np.ndarray, int]]:
    assert isinstance(split, LabelledImages)
    return list(zip(split.images[:].numpy(), split.labels.tolist(), strict=True))


@pytest.mark.bad_input("an order of classes that does not name the folders")
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"0\n10\n", "not in the file: 2"),
        (b"0\n10\n2\n2\n", "there twice: 2"),
        (b"0\n10\n2\ncat\n", "no class folder: cat"),
        (b"", "is empty"),
        (b"\xff\xfe\x00", "cannot be read as text"),
    ],
)
def test_an_order_that_is_wrong_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    for name in ("0", "2", "10"):
        image_at(tmp_path / "images" / name / "1.png", int(name))
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(DataError, match=says):
        load_data(tmp_path / "images", classes=tmp_path / "classes.txt")
