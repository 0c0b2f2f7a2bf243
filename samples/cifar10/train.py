"""Makes the sample: CIFAR-10, and a ResNet-20 trained on it.

Leaves `data.npz` and `model.pt` beside this file, which its `compress.toml` names. Of the 50,000
images to train with, a tenth of every class is kept for the search, as the paper keeps it for
validation [he2016, sec. 4.2]; the network learns from none of them.

    python samples/cifar10/train.py
    compress samples/cifar10/model.pt --target host-cpu --speedup 2

[he2016] He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, CVPR 2016.
"""

import argparse
import time
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from cifar_resnet import resnet20
from torch import Tensor, nn
from torchvision.datasets import CIFAR10

HERE = Path(__file__).parent
SEARCH_SHARE = 0.1  # of the images to train with, by class
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # as in compress.toml
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def read_cifar10(root: Path, *, is_train: bool) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images `(n, 3, 32, 32)` and labels `(n,)`, downloaded into `root` if not there.

    Raises:
        SystemExit: They are not there and cannot be downloaded.
    """
    try:
        found = CIFAR10(root, train=is_train, download=True)
    except (OSError, HTTPException, RuntimeError) as err:
        raise SystemExit(
            f"error: CIFAR-10 is not in {root} and could not be downloaded ({err}). Bring "
            f"{CIFAR10.url} into a folder by other means and give that with --root."
        ) from err
    return found.data.transpose(0, 3, 1, 2), np.array(found.targets, dtype=np.int64)


def make_data(root: Path, path: Path) -> dict[str, np.ndarray]:
    """Cuts the images into splits and writes them."""
    images, labels = read_cifar10(root, is_train=True)
    test_images, test_labels = read_cifar10(root, is_train=False)
    generator = np.random.default_rng(0)
    is_search = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        of_class = generator.permutation(np.flatnonzero(labels == label))
        is_search[of_class[: round(SEARCH_SHARE * len(of_class))]] = True
    arrays = {
        "fit_images": images[~is_search], "fit_labels": labels[~is_search],
        "search_images": images[is_search], "search_labels": labels[is_search],
        "test_images": test_images, "test_labels": test_labels,
    }  # fmt: skip
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return arrays


def train(arrays: dict[str, np.ndarray], n_epochs: int, batch_size: int = 128) -> nn.Module:
    """From scratch: SGD, one-cycle learning rate, images shifted and mirrored."""
    torch.manual_seed(0)
    model = resnet20().to(DEVICE)
    images, labels = torch.from_numpy(arrays["fit_images"]), torch.from_numpy(arrays["fit_labels"])
    n_batches = max(1, len(labels) // batch_size)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.2, total_steps=n_epochs * n_batches
    )
    started = time.perf_counter()
    for epoch in range(n_epochs):
        model.train()
        for rows in torch.randperm(len(labels))[: n_batches * batch_size].split(batch_size):
            answers = model(augmented(normalised(images[rows])).to(DEVICE))
            loss = F.cross_entropy(answers, labels[rows].to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds = time.perf_counter() - started
        left = seconds / (epoch + 1) * (n_epochs - epoch - 1)
        print(f"epoch {epoch + 1}/{n_epochs}  loss {loss.item():.3f}  "
              f"{seconds:.0f} s, {left:.0f} s left", flush=True)  # fmt: skip
    return model.cpu().eval()


def normalised(images: Tensor) -> Tensor:
    """uint8 -> what the network takes."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def augmented(images: Tensor, by: int = 4) -> Tensor:
    """The batch shifted by up to `by` pixels each way, and every second image mirrored."""
    down, right = torch.randint(0, 2 * by + 1, (2,)).tolist()
    padded = F.pad(images, (by, by, by, by))
    images = padded[:, :, down : down + images.shape[2], right : right + images.shape[3]]
    mirrored = torch.rand(len(images)) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)


def accuracy(model: nn.Module, arrays: dict[str, np.ndarray], split: str) -> float:
    """Share of right answers on a split."""
    images = torch.from_numpy(arrays[f"{split}_images"])
    with torch.inference_mode():
        parts = [model(normalised(batch)).argmax(dim=1).numpy() for batch in images.split(250)]
    return float((np.concatenate(parts) == arrays[f"{split}_labels"]).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes `data.npz` and `model.pt`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument(
        "--root", type=Path, default=HERE / "download",
        help="where cifar-10-batches-py/ or cifar-10-python.tar.gz lies, or is to be downloaded",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    if args.epochs < 1:
        parser.error(f"--epochs must be 1 or more, not {args.epochs}")
    arrays = make_data(args.root, HERE / "data.npz")
    model = train(arrays, args.epochs)
    torch.save(model.state_dict(), HERE / "model.pt")
    print(f"test accuracy {accuracy(model, arrays, 'test'):.2%}; wrote data.npz and model.pt")


if __name__ == "__main__":
    main()
