"""The samples ResNet-18 on a folder and CIFAR-10: the real scripts on small real files.

Nothing is fetched from outside: what the scripts download is served on this machine. ImageNet's
weights are stood in for by random ones, CIFAR-10 by generated images in its own file format, under
checksums of their own.
"""

import hashlib
import http.server
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.datasets import CIFAR10

import compressor
from compressor.job import read_data
from compressor.values import Data
from tests.conftest import labelled
from tests.end_to_end.scripts import module_of
from tests.end_to_end.test_release_pipelines import run_script

ROOT = Path(__file__).parents[2]
RESNET18, CIFAR = ROOT / "samples" / "resnet18", ROOT / "samples" / "cifar10"
SIDE = 32  # pixels
SMALL = ("--image-size", str(SIDE))
NOWHERE = "http://127.0.0.1:9/"  # the discard port, which nobody serves


def refusal(script: ModuleType, *arguments: str | Path) -> str:
    """What the script ends with: Python prints a text as it is, and exits with 1."""
    with pytest.raises(SystemExit) as ended:
        script.main([str(argument) for argument in arguments])
    said = ended.value.code
    assert isinstance(said, str)
    assert said.startswith("error: ")
    assert "\n" not in said
    return said


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder and its address on this machine."""
    folder = tmp_path_factory.mktemp("served")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def coloured(n: int, n_classes: int, generator: np.random.Generator) -> np.ndarray:
    """uint8 `(n, 3, 32, 32)`, noise whose tint is the class `i % n_classes`, of 27 at most."""
    images = generator.integers(0, 100, (n, 3, SIDE, SIDE))
    for i, image in enumerate(images):
        label = i % n_classes
        image += 70 * np.array([label % 3, label // 3 % 3, label // 9]).reshape(3, 1, 1)
    return images.astype(np.uint8)


def digest_of(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in state.values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def weights_in(path: Path) -> str:
    """Digest of every number in a `model.pt`."""
    return digest_of(torch.load(path, weights_only=True))


def pixels_of(data: Data, name: str) -> set[bytes]:
    images = labelled(getattr(data, name)).images[:]
    return {image.numpy().tobytes() for image in images}


# --- ResNet-18 on a folder of images ---------------------------------------------------------


def as_file(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.transpose(1, 2, 0)).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 PNG files of 3 classes."""
    folder = tmp_path_factory.mktemp("photos")
    for i, image in enumerate(coloured(120, 3, np.random.default_rng(0))):
        as_file(folder / ("cat", "dog", "fox")[i % 3] / f"{i:03}.png", image)
    return folder


@pytest.fixture(scope="module")
def resnet18() -> ModuleType:
    return module_of(RESNET18 / "train.py")


@pytest.fixture(scope="module")
def imagenet(served: tuple[Path, str]) -> Path:
    """A stand-in for ImageNet's weights: random ones, under a name with their own hash.

    Their batch-norms have seen some noise.
    """
    torch.manual_seed(0)
    folder, _ = served
    path, net = folder / "weights.pth", models.resnet18(weights=None)
    with torch.inference_mode():
        for _ in range(20):
            net(torch.randn(16, 3, SIDE, SIDE))
    torch.save(net.state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.rename(folder / f"resnet18-{digest[:8]}.pth")


@pytest.fixture(scope="module")
def taught(
    photos: Path,
    resnet18: ModuleType,
    imagenet: Path,
    served: tuple[Path, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:
    """What a run with downloaded weights leaves, and the last line that it prints."""
    out = tmp_path_factory.mktemp("taught") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet18.PRETRAINED.value, "url", served[1] + imagenet.name)
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
        said: list[str] = []
        patch.setattr("builtins.print", lambda *text, **_: said.append(" ".join(map(str, text))))
        resnet18.main([str(photos), "--out", str(out), *SMALL])
    return out, said[-1]


def test_what_resnet18_leaves_is_what_compress_reads(
    taught: tuple[Path, str], photos: Path
) -> None:
    """No flag is needed; the splits and the accuracy are those that the script told."""
    out, said = taught
    config = compressor.load_config(out / "model.pt", {})
    assert (config.target, config.speedup, config.data) == ("host-cpu", 2.0, photos)
    loaded, prunable = compressor.inspect_model(config)
    assert loaded.provenance["arch_args"] == {"num_classes": 3}
    assert loaded.example_input.shape == (1, 3, SIDE, SIDE)  # type: ignore[union-attr]
    assert len([g for g in prunable.groups if g.locked_because is None]) > 8
    data = read_data(config, photos)
    assert [len(split) for split in (data.fit, data.search, data.test)] == [78, 18, 24]
    with torch.inference_mode():
        images, labels = data.test.batch(slice(None))
        share = (loaded.module(images).argmax(dim=1) == labels).float().mean().item()
    assert share > 0.9
    assert f"test accuracy {share:.2%}" in said


def test_resnet18_learns_from_no_image_that_is_held_out(
    taught: tuple[Path, str], photos: Path, resnet18: ModuleType, imagenet: Path, tmp_path: Path
) -> None:
    """With other images in the place of those, the very same network; and from a file as well."""
    data = read_data(compressor.load_config(taught[0] / "model.pt", {}), photos)
    copy, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos, copy)
    held_out = pixels_of(data, "search") | pixels_of(data, "test")
    files = {
        np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes(): path
        for path in copy.rglob("*.png")
    }
    noise = np.random.default_rng(1).integers(0, 256, (120, 3, SIDE, SIDE)).astype(np.uint8)
    for other, pixels in zip(noise, sorted(held_out), strict=False):
        as_file(files[pixels], other)

    arguments = (copy, "--weights", imagenet, "--out", out, *SMALL)
    resnet18.main([str(argument) for argument in arguments])
    assert weights_in(out / "model.pt") == weights_in(taught[0] / "model.pt")


def test_resnet18_goes_on_from_its_own_model(
    taught: tuple[Path, str], photos: Path, resnet18: ModuleType, tmp_path: Path
) -> None:
    """With no epochs only the head is learned, whatever the file's number of classes."""
    before = torch.load(taught[0] / "model.pt", weights_only=True)
    arguments = (photos, "--weights", taught[0] / "model.pt", "--epochs", "0", "--out", tmp_path)
    resnet18.main([str(argument) for argument in (*arguments, *SMALL)])
    after = torch.load(tmp_path / "model.pt", weights_only=True)
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert changed == {"fc.weight", "fc.bias"}


def test_what_resnet18_cannot_use_is_one_line(
    photos: Path, resnet18: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = partial(refusal, resnet18)
    assert "has one class, cat" in bad(_with(tmp_path / "one", photos / "cat", "cat"), *SMALL)
    val_alone = _with(tmp_path / "val", photos, "val")
    assert "has no train folder" in bad(val_alone, *SMALL)
    assert "No model file at" in bad(photos, "--weights", tmp_path / "none.pth", *SMALL)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    wrong = bad(photos, "--weights", tmp_path / "linear.pth", *SMALL)
    assert "linear.pth does not fit torchvision:resnet18" in wrong
    assert "Not a directory" in bad(photos, "--out", tmp_path / "linear.pth" / "x", *SMALL)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(resnet18.PRETRAINED.value, "url", NOWHERE + "resnet18-f37072fd.pth")
    failed = bad(photos, *SMALL)
    assert f"Bring {NOWHERE}resnet18-f37072fd.pth here" in failed
    assert "--weights FILE" in failed
    assert "--weights none" in failed


def _with(folder: Path, content: Path, name: str) -> Path:
    """`folder`, holding `content` under `name`."""
    shutil.copytree(content, folder / name)
    return folder


def test_a_refusal_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The line on stderr and nothing else, and an exit code that stops a script."""
    done = subprocess.run(
        [sys.executable, RESNET18 / "train.py", tmp_path / "none", "--out", tmp_path],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    expected = (
        f"error: No data at {tmp_path / 'none'}; expected an .npz file or a folder (--data)."
    )
    assert (done.returncode, done.stdout, done.stderr.strip()) == (1, "", expected)


# --- CIFAR-10 ----------------------------------------------------------------------------------

Labelled = tuple[np.ndarray, np.ndarray]  # uint8 (n, 3, 32, 32) and int64 (n,)


def standing_in(n_train: int, n_test: int) -> tuple[Labelled, Labelled]:
    """Generated images in the place of CIFAR-10's, and of its test images."""
    generator = np.random.default_rng(0)
    return tuple(  # type: ignore[return-value]
        (coloured(n, 10, generator), np.arange(n) % 10) for n in (n_train, n_test)
    )


def lay_out(root: Path, train: Labelled, test: Labelled, patch: pytest.MonkeyPatch) -> None:
    """The files that CIFAR-10 consists of, and torchvision's checksums for them.

    The archive of them lies beside their folder.
    """
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name, _ in CIFAR10.train_list]
    parts = np.array_split(np.arange(len(train[1])), len(names))
    batches = {
        name: (train[0][rows], train[1][rows]) for name, rows in zip(names, parts, strict=True)
    }
    for name, (images, labels) in {**batches, "test_batch": test}.items():
        content = {"data": images.reshape(len(images), -1), "labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("0123456789")}))

    def md5(path: Path) -> str:
        return hashlib.md5(path.read_bytes()).hexdigest()

    patch.setattr(CIFAR10, "train_list", [[name, md5(folder / name)] for name in names])
    patch.setattr(CIFAR10, "test_list", [["test_batch", md5(folder / "test_batch")]])
    patch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(folder / "batches.meta")})
    with tarfile.open(root / CIFAR10.filename, "w:gz") as archive:
        archive.add(folder, arcname=CIFAR10.base_folder)
    patch.setattr(CIFAR10, "tgz_md5", md5(root / CIFAR10.filename))


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """A copy of the sample, which leaves its files beside itself."""
    ignored = shutil.ignore_patterns("*.pt", "*.npz", "__pycache__", "download")
    return Path(shutil.copytree(CIFAR, tmp_path / "cifar10", ignore=ignored))


@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")  # torchvision unpacks
def test_cifar10_is_downloaded_split_and_read_by_compress(
    cifar: Path, served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then, with its files at hand, other images in the place of those that are held out."""
    folder, address = served
    train, test = standing_in(200, 40)
    lay_out(folder, train, test, monkeypatch)
    monkeypatch.setattr(CIFAR10, "url", address + CIFAR10.filename)
    script = module_of(cifar / "train.py")
    arguments = ["--epochs", "1", "--root", str(tmp_path / "downloaded")]
    script.main(arguments)
    first = weights_in(cifar / "model.pt")

    config = compressor.load_config(cifar / "model.pt", {"target": "host-cpu", "speedup": 2.0})
    assert (config.mean, config.std) == (script.MEAN, script.STD)
    loaded, prunable = compressor.inspect_model(config)
    assert compressor.cost(loaded.module, loaded.example_input).params == 272_474
    assert len(prunable.branches) == 9
    assert config.data is not None
    data = read_data(config, config.data)
    counts = {
        name: np.bincount(labelled(getattr(data, name)).labels) for name in ("fit", "search")
    }
    assert (counts["fit"].tolist(), counts["search"].tolist()) == ([18] * 10, [2] * 10)
    assert pixels_of(data, "test") == {image.tobytes() for image in test[0]}
    assert pixels_of(data, "fit") | pixels_of(data, "search") == {i.tobytes() for i in train[0]}

    noise = np.random.default_rng(1).integers(0, 256, train[0].shape).astype(np.uint8)
    searched = pixels_of(data, "search")
    is_search = np.array([image.tobytes() in searched for image in train[0]])
    images = np.where(is_search[:, None, None, None], noise, train[0])
    monkeypatch.setattr(CIFAR10, "url", NOWHERE)
    arguments[-1] = str(tmp_path / "there")
    lay_out(tmp_path / "there", (images, train[1]), (noise[:40], test[1]), monkeypatch)
    script.main(arguments)
    assert weights_in(cifar / "model.pt") == first
    images[np.flatnonzero(~is_search)[0]] = noise[0]
    lay_out(tmp_path / "there", (images, train[1]), test, monkeypatch)
    script.main(arguments)
    assert weights_in(cifar / "model.pt") != first


def test_cifar10_that_cannot_be_had_is_one_line(
    cifar: Path, served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody answers; then, what answers has another file."""
    script = module_of(cifar / "train.py")
    monkeypatch.setattr(CIFAR10, "url", NOWHERE)
    said = refusal(script, "--root", tmp_path / "empty")
    assert f"CIFAR-10 is not in {tmp_path / 'empty'} and could not be downloaded" in said
    assert "--root" in said
    folder, address = served
    (folder / "broken.tar.gz").write_bytes(b"<html>moved</html>")
    monkeypatch.setattr(CIFAR10, "url", address + "broken.tar.gz")
    assert "corrupted" in refusal(script, "--root", tmp_path / "broken")
    assert not list(cifar.glob("*.npz"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_cifar10_from_its_files_to_a_model(
    cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample learns images in which there is something to learn, and bears compression."""
    lay_out(tmp_path / "root", *standing_in(2000, 200), monkeypatch)
    module_of(cifar / "train.py").main(["--epochs", "4", "--root", str(tmp_path / "root")])
    asked = "--target host-cpu --speedup 1.5 --trials 8 --fine-tune-epochs 4 --out run"
    done = run_script(f"compress {cifar / 'model.pt'} {asked}", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["original"]["accuracy"] > 0.9
    assert result["accuracy_drop_points"] < 5
