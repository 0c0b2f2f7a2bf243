"""Every way that images and labels can be wrong, and the splits when they are right."""

import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from compressor.datasets import load_data
from compressor.datasets.files import ImageFiles
from compressor.datasets.folders import class_folders, image_files
from compressor.errors import DataError
from compressor.rows import one_tensor
from compressor.values import Data, draw
from tests.conftest import blob_images, labelled


def digests(data: Data) -> dict[str, set[bytes]]:
    return {
        name: {image.tobytes() for image in getattr(data, name).images.numpy()}
        for name in ("fit", "search", "test")
    }


def assert_disjoint(data: Data) -> None:
    seen = digests(data)
    assert not seen["fit"] & seen["search"]
    assert not seen["fit"] & seen["test"]
    assert not seen["search"] & seen["test"]


def write_images(root: Path, classes: Mapping[str, int], size: tuple[int, int] = (9, 7)) -> None:
    generator = np.random.default_rng(zlib.crc32(root.name.encode()))
    for name, n in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(n):
            pixels = generator.integers(0, 255, size=(*size, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")


def test_given_splits_are_kept(blobs: Path) -> None:
    data = load_data(blobs)
    assert [len(s) for s in (data.fit, data.search, data.test)] == [600, 200, 200]
    assert labelled(data.fit).images.shape[1:] == (1, 8, 8)
    assert data.class_names == ("0", "1", "2", "3", "4")
    assert_disjoint(data)


def test_missing_splits_are_held_out_by_class(tmp_path: Path) -> None:
    images, labels = blob_images(500, np.random.default_rng(1))
    np.savez(tmp_path / "all.npz", images=images, labels=labels)
    data = load_data(tmp_path / "all.npz", seed=3)
    assert len(data.fit) + len(data.search) + len(data.test) == 500
    assert 90 <= len(data.test) <= 110
    share = np.bincount(labelled(data.test).labels) / np.bincount(labels)
    np.testing.assert_allclose(share, 0.2, atol=0.02)
    assert_disjoint(data)
    again = load_data(tmp_path / "all.npz", seed=3)
    other = load_data(tmp_path / "all.npz", seed=4)
    assert data.fingerprint == again.fingerprint != other.fingerprint


def test_normalisation_has_the_closed_form(tmp_path: Path) -> None:
    images, labels = blob_images(100, np.random.default_rng(1))
    images = np.concatenate([images, 255 - images, images], axis=1)
    np.savez(tmp_path / "rgb.npz", images=images, labels=labels)
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    data = load_data(tmp_path / "rgb.npz", mean=mean, std=std)
    got = one_tensor(data.fit.model_input(slice(0, 5)))
    raw = labelled(data.fit).images[:5].double() / 255
    for channel in range(3):
        expected = (raw[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(got[:, channel].double(), expected, rtol=1e-5, atol=1e-5)


def test_float_images_are_taken_as_they_are(tmp_path: Path) -> None:
    images, labels = blob_images(100, np.random.default_rng(1))
    np.savez(tmp_path / "f.npz", images=images.astype(np.float32) - 7, labels=labels)
    split = load_data(tmp_path / "f.npz").fit
    assert torch.equal(one_tensor(split.model_input(slice(0, 9))), labelled(split).images[:9])


def test_class_folders(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"cat": 10, "dog": 15})
    write_images(tmp_path / "val", {"cat": 3, "dog": 2})
    write_images(tmp_path / "test", {"cat": 4, "dog": 4})
    data = load_data(tmp_path)
    assert [len(s) for s in (data.fit, data.search, data.test)] == [25, 5, 8]
    assert data.class_names == ("cat", "dog")
    assert labelled(data.fit).labels.tolist() == [0] * 10 + [1] * 15
    assert labelled(data.fit).images.shape[1:] == (3, 9, 7)


def test_plain_class_folders_are_split_and_resized(tmp_path: Path) -> None:
    write_images(tmp_path, {"cat": 10, "dog": 10})
    (tmp_path / ".cache").mkdir()
    data = load_data(tmp_path, image_size=6, n_channels=1)
    assert labelled(data.fit).images.shape[1:] == (1, 6, 6)
    assert [len(s) for s in (data.fit, data.search, data.test)] == [12, 4, 4]
    assert_disjoint(data)


def arrays(**changes: object) -> dict[str, np.ndarray]:
    images, labels = blob_images(100, np.random.default_rng(0))
    content: dict[str, object] = {"images": images, "labels": labels}
    content |= changes
    return {k: np.asarray(v) for k, v in content.items() if v is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            arrays(labels=None, fit_images=np.zeros((9, 1, 8, 8), np.uint8), fit_labels=[1] * 9),
            "has images but no labels, beside fit_labels.*--labels none",
        ),
        ({"x": np.zeros(3)}, "has x but no labels, beside nothing else.*--labels none"),
        ({"labels": np.zeros(3, int)}, "needs the arrays images and labels"),
        (arrays(images=np.zeros((100, 1, 8, 8))), "images is float64; expected uint8"),
        (arrays(images=np.zeros((100, 3), complex)), "images is complex128; expected uint8"),
        (arrays(images=np.array([["a"]] * 100)), "images is <U1; expected uint8"),
        (arrays(images=np.zeros((100, 0, 3), np.int64)), r"images has the shape \(100, 0, 3\)"),
        (arrays(images=np.float32(3)), r"images has the shape \(\); expected \(n, ...\)"),
        (arrays(labels=np.zeros(99, int)), "equally long.* images 100, labels 99"),
        (arrays(labels=np.zeros(100)), "must be integers, one an example; got float64"),
        (arrays(images=None, input_1=np.zeros((100, 3), np.float32)), "from 0 without gaps"),
        (
            arrays(images=None, ids=np.ones((100, 3), int), mask=np.ones((98, 3), bool)),
            "equally long.* ids 100, mask 98, labels 100",
        ),
        (arrays(labels=np.arange(100) - 1), r"must lie in 0\.\..*run from -1"),
        (arrays(images=np.zeros((0, 1, 8, 8), np.uint8), labels=np.zeros(0, int)), "no images"),
        (arrays(images=np.full((100, 1, 8, 8), np.nan, np.float32)), "NaN"),
        (arrays(images=np.zeros((100, 1, 8, 8), np.uint8)), "the splits must not overlap"),
        (
            arrays(test_images=np.ones((4, 1, 8, 8), np.uint8), test_labels=[0, 1, 2, 5])
            | {"fit_images": arrays()["images"], "fit_labels": arrays()["labels"]}
            | {"images": np.zeros(0)},
            r"labels must lie in 0\.\.4.*run from 0 to 5",
        ),
        (arrays(fit_images=arrays()["images"]), "has fit_images but no fit_labels"),
        (arrays(labels=None, split=3), "has images but no labels, beside split"),
    ],
)
def test_bad_arrays_are_named(
    content: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    if content.get("images") is not None and content["images"].ndim == 1:
        del content["images"], content["labels"]
    np.savez(tmp_path / "bad.npz", **content)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / "bad.npz")


def several(n: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(n)
    return {
        "ids": generator.integers(0, 9, (n, 5)),
        "mask": generator.random((n, 5)) < 0.5,
        "scale": generator.random(n).astype(np.float32),
        "labels": np.arange(n) % 4,
    }


@pytest.mark.parametrize("how", ["by name", "numbered", "in splits"])
def test_several_inputs_keep_their_rows_together(how: str, tmp_path: Path) -> None:
    """Whole numbers stay what they are; every split holds rows as they stood in the file."""
    stored = several(200)
    names = ["ids", "mask", "scale"]
    if how == "numbered":
        names = [f"input_{i}" for i in range(3)]
        stored = dict(zip((*names, "labels"), stored.values(), strict=True))
    content = stored
    if how == "in splits":
        content = {f"train_{n}": a[:160] for n, a in stored.items()}
        content |= {f"test_{n}": a[160:] for n, a in stored.items()}
    if how == "numbered":
        content = {**stored, "remark": np.ones(1)}  # what is neither input nor label is left
    np.savez(tmp_path / "several.npz", **content)  # type: ignore[arg-type]
    data = load_data(tmp_path / "several.npz")
    whole = {
        tuple(stored[n][row].tobytes() for n in names): stored["labels"][row] for row in range(200)
    }
    n_seen = 0
    for split in (data.fit, data.search, data.test):
        given, labels = split.batch(torch.arange(len(split)))
        assert isinstance(given, tuple if how == "numbered" else dict)
        tensors = given if isinstance(given, tuple) else tuple(given[n] for n in names)
        assert [t.dtype for t in tensors] == [torch.int64, torch.bool, torch.float32]
        for *row, label in zip(*tensors, labels, strict=True):
            n_seen += 1
            assert whole[tuple(t.numpy().tobytes() for t in row)] == label
    assert n_seen == 200


def test_one_input_of_another_name_and_layout_is_one_tensor(tmp_path: Path) -> None:
    signals = np.random.default_rng(0).random((100, 2, 30)).astype(np.float32)
    np.savez(tmp_path / "s.npz", signals=signals, labels=np.arange(100) % 2)
    given = load_data(tmp_path / "s.npz").fit.model_input(slice(0, 3))
    assert isinstance(given, torch.Tensor)
    assert given.shape == (3, 2, 30)


def test_uint8_of_any_layout_is_scaled_and_normalised(tmp_path: Path) -> None:
    video = np.random.default_rng(0).integers(0, 255, (100, 2, 3, 4, 5)).astype(np.uint8)
    np.savez(tmp_path / "v.npz", images=video, labels=np.arange(100) % 2)
    data = load_data(tmp_path / "v.npz", mean=[0.1, 0.2], std=[0.5, 0.4])
    given = data.fit.model_input(slice(0, 3))
    raw = labelled(data.fit).images
    assert isinstance(raw, torch.Tensor)
    mean, std = (torch.tensor(v).view(2, 1, 1, 1) for v in ((0.1, 0.2), (0.5, 0.4)))
    torch.testing.assert_close(given, (raw[:3] / 255 - mean) / std)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("ids",), r"mean and std are for one input of uint8 or float32; .*int64 \(5,\)"),
        (("ids", "mask"), "for one input of uint8 or float32; .*mask torch.bool"),
        (("scale",), r"channels in dimension 1 of \(.*,\)"),
    ],
)
def test_a_mean_is_for_one_input_with_channels(
    names: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    content = {name: array for name, array in several(90).items() if name in (*names, "labels")}
    np.savez(tmp_path / "m.npz", **content)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / "m.npz", mean=[0.5], std=[0.5])


def test_pickled_arrays_are_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", images=np.array([{"a": 1}], dtype=object), labels=[0])
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load_data(tmp_path / "bad.npz")


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No data at"):
        load_data(tmp_path / "nothing")
    (tmp_path / "images.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"\.npz file or a folder"):
        load_data(tmp_path / "images.csv")
    (tmp_path / "broken.npz").write_bytes(b"PK nonsense")
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load_data(tmp_path / "broken.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="one folder per class"):
        load_data(tmp_path / "empty")


def test_bad_image_folders_are_named(tmp_path: Path) -> None:
    write_images(tmp_path / "a", {"cat": 5, "dog": 5})
    (tmp_path / "a" / "eel").mkdir()
    with pytest.raises(DataError, match="no image of class eel"):
        load_data(tmp_path / "a")
    write_images(tmp_path / "b" / "train", {"cat": 5, "dog": 5})
    write_images(tmp_path / "b" / "test", {"cat": 5, "dog": 5, "fox": 2})
    with pytest.raises(DataError, match=r"classes that the fit split lacks: \['fox'\]"):
        load_data(tmp_path / "b")
    write_images(tmp_path / "c", {"cat": 5})
    write_images(tmp_path / "c", {"dog": 5}, size=(8, 8))
    with pytest.raises(DataError, match=r"of one size.*--image-size"):
        load_data(tmp_path / "c")
    write_images(tmp_path / "d", {"cat": 5, "dog": 5})
    (tmp_path / "d" / "cat" / "0.png").write_text("no image")
    with pytest.raises(DataError, match=r"0\.png cannot be read as an image"):
        load_data(tmp_path / "d")
    write_images(tmp_path / "e", {"cat": 5, "dog": 1})
    with pytest.raises(DataError, match="class dog has 1 images left"):
        load_data(tmp_path / "e")


@pytest.mark.bad_input("classes that are called like splits")
@pytest.mark.parametrize("use_labels", [True, False])
def test_classes_that_are_called_like_splits_are_refused(tmp_path: Path, use_labels: bool) -> None:
    write_images(tmp_path / "x", {"cat": 9, "dog": 9, "fit": 9, "test": 9})
    with pytest.raises(DataError, match=r"in fit, test and in cat, dog; .*put them into .*train"):
        load_data(tmp_path / "x", use_labels=use_labels)


def test_training_and_testing_are_splits(tmp_path: Path) -> None:
    for name, n in (("training", 9), ("validation", 5), ("testing", 6)):
        write_images(tmp_path / "x" / name, {"cat": n, "dog": n})
    data = load_data(tmp_path / "x")
    assert n_images(data) == [18, 10, 12]
    assert data.is_trainable


def test_arrays_that_are_not_needed_are_not_read(tmp_path: Path) -> None:
    """Names as Python objects, beside the images, cannot be read without running code."""
    images, labels = blob_images(60, np.random.default_rng(1))
    names = np.array(["a"] * 60, dtype=object)
    np.savez(tmp_path / "a.npz", images=images, labels=labels, names=names)
    assert load_data(tmp_path / "a.npz").class_names
    np.savez(tmp_path / "b.npz", images=images, labels=names)
    assert sum(n_images(load_data(tmp_path / "b.npz", use_labels=False))) == 60
    with pytest.raises(DataError, match=r"cannot be read as \.npz: Object arrays"):
        load_data(tmp_path / "b.npz")


def test_split_folders_are_never_taken_for_classes(tmp_path: Path) -> None:
    for name in ("Train", "TEST"):
        write_images(tmp_path / "capital" / name, {"cat": 5, "dog": 5})
    data = load_data(tmp_path / "capital")
    assert (data.class_names, len(data.test)) == (("cat", "dog"), 10)
    write_images(tmp_path / "lacking" / "test", {"cat": 5, "dog": 5})
    with pytest.raises(DataError, match="holds test but no train folder"):
        load_data(tmp_path / "lacking")
    for name in ("train", "val", "validation"):
        write_images(tmp_path / "double" / name, {"cat": 5, "dog": 5})
    with pytest.raises(DataError, match="two search splits; 'validation' is the second"):
        load_data(tmp_path / "double")


def test_two_names_for_one_split_are_refused(tmp_path: Path) -> None:
    images, labels = blob_images(60, np.random.default_rng(0))
    np.savez(tmp_path / "x.npz", fit_images=images, fit_labels=labels, train_images=images,
             train_labels=labels)  # fmt: skip
    with pytest.raises(DataError, match="two fit splits"):
        load_data(tmp_path / "x.npz")


def test_sixteen_bit_images_are_refused(tmp_path: Path) -> None:
    """Pillow would clip them to white."""
    write_images(tmp_path, {"cat": 5, "dog": 5})
    pixels = np.full((9, 7), 30_000, dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "cat" / "0.png")
    with pytest.raises(DataError, match=r"0\.png has I;16 pixels"):
        load_data(tmp_path)


def test_options_that_do_not_fit_the_source_are_refused(tmp_path: Path, blobs: Path) -> None:
    with pytest.raises(DataError, match="--image-size resizes image files"):
        load_data(blobs, image_size=16)
    write_images(tmp_path, {"cat": 5, "dog": 5})
    with pytest.raises(DataError, match="1 or 3 channels; --input-shape asks 2"):
        load_data(tmp_path, n_channels=2)


def test_foreign_byte_order_is_read_and_huge_labels_are_named(tmp_path: Path) -> None:
    images, labels = blob_images(60, np.random.default_rng(0))
    np.savez(tmp_path / "big.npz", images=images.astype(">f4"), labels=labels.astype(">i8"))
    assert labelled(load_data(tmp_path / "big.npz").fit).images.dtype == torch.float32
    np.savez(tmp_path / "huge.npz", images=images, labels=labels.astype(np.uint64) + 2**63)
    with pytest.raises(DataError, match=r"must lie in 0\.\.999999"):
        load_data(tmp_path / "huge.npz")


@pytest.mark.parametrize("is_split", [True, False])
def test_images_on_disk_are_those_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_split: bool
) -> None:
    """The same splits, pixels and labels, whether a folder fits into memory or not."""
    splits = ("train", "val", "test") if is_split else ("",)
    for n, split in enumerate(splits):
        write_images(tmp_path / "images" / split, {"cat": 11 + n, "dog": 9 + n})
    in_memory = load_data(tmp_path / "images", image_size=6, mean=(0.5,), std=(0.2,))
    monkeypatch.setattr("compressor.datasets.MAX_BYTES", 500)
    on_disk = load_data(tmp_path / "images", image_size=6, mean=(0.5,), std=(0.2,))
    assert isinstance(labelled(on_disk.fit).images, ImageFiles)
    for name in ("fit", "search", "test"):
        one, other = getattr(in_memory, name), getattr(on_disk, name)
        assert torch.equal(one.labels, other.labels)
        assert one.images.shape == other.images.shape
        rows = draw(one, 5)
        assert torch.equal(one.model_input(rows), other.model_input(rows))
        assert torch.equal(one.model_input(slice(None)), other.model_input(slice(None)))
        assert len(other.model_input(slice(0, 0))) == 0
    assert labelled(on_disk.fit).images.shape[1:] == (3, 6, 6)
    with pytest.raises(DataError, match="give --image-size"):
        load_data(tmp_path / "images")


def test_files_in_two_splits_are_found_on_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.datasets.MAX_BYTES", 500)
    write_images(tmp_path / "train", {"cat": 11, "dog": 9})
    write_images(tmp_path / "val", {"cat": 11, "dog": 9})
    for name in ("cat", "dog"):
        for file in (tmp_path / "train" / name).iterdir():
            (tmp_path / "val" / name / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match="must not overlap"):
        load_data(tmp_path, image_size=6)


def test_a_broken_file_on_disk_is_named_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.datasets.MAX_BYTES", 500)
    write_images(tmp_path, {"cat": 15, "dog": 15})
    files = sorted((tmp_path / "dog").iterdir())
    files[7].write_bytes(b"no image")
    data = load_data(tmp_path, image_size=6)
    with pytest.raises(DataError, match=f"{files[7].name} cannot be read as an image"):
        _ = [split.model_input(slice(None)) for split in (data.fit, data.search, data.test)]


@pytest.mark.parametrize("has_test", [True, False])
def test_without_a_fit_split_nothing_is_learned(tmp_path: Path, has_test: bool) -> None:
    """The search split repairs; where the test split is missing too, it is cut from that."""
    for name in ("val", "test") if has_test else ("val",):
        write_images(tmp_path / name, {"cat": 10, "dog": 10})
    data = load_data(tmp_path)
    assert data.fit is data.search
    assert not data.is_trainable
    assert (len(data.search), len(data.test)) == ((20, 20) if has_test else (16, 4))
    images, labels = blob_images(60, np.random.default_rng(0))
    np.savez(tmp_path / "x.npz", search_images=images, search_labels=labels)
    assert not load_data(tmp_path / "x.npz").is_trainable


def test_classes_without_images_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A few are usual in small splits; half of them are a split that was cut off sorted data."""
    images, labels = blob_images(200, np.random.default_rng(0))
    others, theirs = blob_images(200, np.random.default_rng(1))

    def load(n_classes: int) -> Data:
        kept = theirs < n_classes
        np.savez(tmp_path / "x.npz", images=images, labels=labels,
                 search_images=others[kept], search_labels=theirs[kept])  # fmt: skip
        return load_data(tmp_path / "x.npz")

    load(4)
    assert "no image of class 4" in caplog.text
    with pytest.raises(DataError, match=r"search split: 3 of 5 classes have no image \(2, "):
        load(2)


def image_at(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, size=(7, 7, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def test_a_folder_is_read_as_torchvision_reads_it(tmp_path: Path) -> None:
    """Oracle: ImageFolder, with its order of classes and files, and its way with links."""
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "images"
    for i, name in enumerate(["10/b.png", "10/deep/c.JPG", "2/x.bmp", "2/a/y.webp", "2/b.jpeg"]):
        image_at(root / name, i)
    for i in range(5):
        image_at(elsewhere / f"{i}.png", 100 + i)
    (root / "10" / "linked").symlink_to(elsewhere, target_is_directory=True)
    (root / "7").symlink_to(elsewhere, target_is_directory=True)
    (root / "2" / "linked.png").symlink_to(elsewhere / "0.png")
    expected = ImageFolder(str(root))
    found = class_folders(root)
    assert list(found) == expected.classes == ["10", "2", "7"]
    files = [str(path) for path in found.values() for path in image_files(path)]
    assert files == [path for path, _ in expected.samples]
    assert len(files) == 16


def test_what_is_hidden_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["a/1.png", "a/._1.png", "a/.ipynb_checkpoints/1-x.png", ".cache/1.png"]
    for i, name in enumerate(names):
        image_at(tmp_path / name, i)
    assert list(class_folders(tmp_path)) == ["a"]
    assert [path.name for path in image_files(tmp_path / "a")] == ["1.png"]
    assert "2 hidden files or folders are left out" in caplog.text


def test_links_to_nothing_and_pipes_are_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image_at(tmp_path / "a" / "1.png", 0)
    (tmp_path / "a" / "2.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "a" / "3.png")
    assert [path.name for path in image_files(tmp_path / "a")] == ["1.png"]
    assert "2.png is no file (a link to nothing, or a pipe); 2 such are left out" in caplog.text


def test_a_link_to_the_folder_around_it_ends(tmp_path: Path) -> None:
    image_at(tmp_path / "a" / "1.png", 0)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a", target_is_directory=True)
    assert [path.name for path in image_files(tmp_path / "a")] == ["1.png"]


def test_accents_are_one_name_however_they_are_encoded(tmp_path: Path) -> None:
    nfc, nfd = "caf\u00e9", "cafe\u0301"
    for i in range(6):
        for split, name in (("train", nfc), ("val", nfd), ("test", nfc)):
            image_at(tmp_path / split / name / f"{i}.png", hash((split, i)) % 2**32)
            image_at(tmp_path / split / "tea" / f"{i}.png", hash((split, i, 1)) % 2**32)
    data = load_data(tmp_path)
    assert data.class_names == (nfc, "tea")
    assert len(data.search) == 12
    image_at(tmp_path / "val" / nfc / "0.png", 5)
    with pytest.raises(DataError, match="encoded in two ways"):
        load_data(tmp_path)


UNTOLD = {-1}


def classes_of(data: Data) -> set[int]:
    return {label for name in ("fit", "search", "test")
            for label in labelled(getattr(data, name)).labels.tolist()}  # fmt: skip


def n_images(data: Data) -> list[int]:
    return [len(split) for split in (data.fit, data.search, data.test)]


def test_images_without_labels_are_split_at_random_by_the_seed(tmp_path: Path) -> None:
    """A flat folder: every image is in one split, and which one the seed alone decides."""
    for i in range(50):
        image_at(tmp_path / "flat" / f"{i}.png", i)
    (tmp_path / "flat" / "notes.txt").write_text("none")
    data, again, other = (load_data(tmp_path / "flat", seed=seed) for seed in (1, 1, 2))
    assert n_images(data) == [32, 8, 10]
    assert data.class_names == ()
    assert classes_of(data) == UNTOLD
    assert_disjoint(data)
    assert len(set.union(*digests(data).values())) == 50
    assert data.fingerprint == again.fingerprint != other.fingerprint
    assert digests(data)["test"] != digests(other)["test"]


def test_splits_without_class_folders_are_kept(tmp_path: Path) -> None:
    for i, name in enumerate(["train"] * 20 + ["val"] * 4 + ["test"] * 5):
        image_at(tmp_path / name / f"{i}.png", i)
    data = load_data(tmp_path)
    assert n_images(data) == [20, 4, 5]
    assert classes_of(data) == UNTOLD
    image_at(tmp_path / "test" / "cat" / "1.png", 1000)
    with pytest.raises(DataError, match=r"test has class folders \(cat, ...\), other splits"):
        load_data(tmp_path)
    assert n_images(load_data(tmp_path, use_labels=False)) == [20, 4, 6]
    image_at(tmp_path / "train" / "cat" / "1.png", 1001)
    for path in [*(tmp_path / "train").glob("*.png"), *(tmp_path / "test").glob("*.png")]:
        path.unlink()
    with pytest.raises(DataError, match=r"val holds 4 images itself .* beside no class folder"):
        load_data(tmp_path)


@pytest.mark.parametrize("names", [("images",), ("fit_images", "test_images")])
def test_an_npz_with_images_alone_has_no_labels(tmp_path: Path, names: tuple[str, ...]) -> None:
    content = {name: blob_images(40, np.random.default_rng(i))[0] for i, name in enumerate(names)}
    np.savez(tmp_path / "x.npz", **content)  # type: ignore[arg-type]
    data = load_data(tmp_path / "x.npz")
    assert sum(n_images(data)) == 40 * len(names)
    assert classes_of(data) == UNTOLD
    assert data.class_names == ()


def test_a_thousand_classes_of_one_image_have_a_way(tmp_path: Path) -> None:
    """The error names the flag; with it labels are not looked at, in arrays or in folders."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 255, size=(1000, 1, 4, 4)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(1000))
    with pytest.raises(DataError, match=r"class 0 has 1 images left.*Or give --labels none, for"):
        load_data(tmp_path / "x.npz")
    data = load_data(tmp_path / "x.npz", use_labels=False)
    assert n_images(data) == [640, 160, 200]
    assert classes_of(data) == UNTOLD
    np.savez(tmp_path / "y.npz", images=images, labels=np.full((3, 7), 0.5))
    assert load_data(tmp_path / "y.npz", use_labels=False).fingerprint == data.fingerprint
    write_images(tmp_path / "folders", {f"n{i:02d}": 1 for i in range(20)})
    with pytest.raises(DataError, match="Or give --labels none"):
        load_data(tmp_path / "folders")
    assert n_images(load_data(tmp_path / "folders", use_labels=False)) == [13, 3, 4]


def test_splits_that_lack_most_classes_have_a_way(tmp_path: Path) -> None:
    images, labels = blob_images(200, np.random.default_rng(0))
    others, theirs = blob_images(200, np.random.default_rng(1))
    np.savez(tmp_path / "x.npz", images=images, labels=labels,
             search_images=others[theirs < 2], search_labels=theirs[theirs < 2])  # fmt: skip
    with pytest.raises(DataError, match=r"3 of 5 classes have no image.*--labels none"):
        load_data(tmp_path / "x.npz")
    load_data(tmp_path / "x.npz", use_labels=False)


def test_images_beside_class_folders_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A few are left out with a word; more are images whose class nobody has told."""
    write_images(tmp_path / "x", {"cat": 60, "dog": 60})
    image_at(tmp_path / "x" / "preview.png", 1)
    data = load_data(tmp_path / "x", image_size=7)
    assert sum(n_images(data)) == 120
    assert "1 images beside cat, dog are left out" in caplog.text
    image_at(tmp_path / "x" / "more.png", 2)
    with pytest.raises(DataError, match=r"x holds 2 images itself \(more.png, .*--labels none"):
        load_data(tmp_path / "x", image_size=7)
    assert sum(n_images(load_data(tmp_path / "x", image_size=7, use_labels=False))) == 122


def test_too_few_images_without_labels_are_told(tmp_path: Path) -> None:
    image_at(tmp_path / "one" / "1.png", 1)
    with pytest.raises(DataError, match="there are 1 images left") as told:
        load_data(tmp_path / "one")
    assert "--labels" not in str(told.value)
    image_at(tmp_path / "none" / "train" / "1.png", 1)
    (tmp_path / "none" / "test").mkdir()
    with pytest.raises(DataError, match="test has no image"):
        load_data(tmp_path / "none")
