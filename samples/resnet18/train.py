"""Torchvision's ResNet-18 with ImageNet's weights, taught the classes of a folder of images.

    python samples/resnet18/train.py images/
    compress samples/resnet18/model.pt

The folder is what `compress --data` takes: `images/<class>/*.jpg`, or the classes in `train/`,
`val/` and `test/`. Compressor itself reads and splits it, with the size and the seed that
`compress.toml` then names, so the images that rank plans and those that test the result are the
ones that this network has not seen either.

The new head learns alone first, then the whole network, briefly: beside a random head, the
layers below would lose what they know before it has learned anything [kumar2022].

[kumar2022] Kumar et al., Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution, ICLR 2022.
"""

import argparse
import contextlib
import pickle
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from pathlib import Path

import tomli_w
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torchvision import models

import compressor
from compressor.datasets import load_data
from compressor.rows import one_tensor
from compressor.values import Data, Split, batches

HERE = Path(__file__).parent
ARCH = "torchvision:resnet18"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
PRETRAINED = models.ResNet18_Weights.IMAGENET1K_V1
IMAGENET, NONE = "imagenet", "none"  # `--weights`, where it is no file
BATCH_SIZE = 32
HEAD_STEPS, HEAD_BATCH_SIZE = 300, 256
PEAK_RATE, PEAK_RATE_FROM_SCRATCH = 0.01, 0.05
SHIFT_SHARE = 8  # images are shifted by at most an eighth of their side
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DOWNLOAD_FAILURES = (OSError, HTTPException, RuntimeError, EOFError, pickle.UnpicklingError)

HEADER = """\
# Written by train.py. Any flag of `compress` may stand here; one on the command line wins.
# The seed decides which images are held out, where `data` has no val or test folder: with another
# one, or once images are added, some of those would be images that the network was trained on.
# Train again then.
"""


def read_images(folder: Path, image_size: int, seed: int) -> Data:
    """The splits of `folder`, as `compress` will see them.

    Raises:
        SystemExit: There is nothing to learn, or nothing to tell apart.
        CompressorError: As for `load_data`.
    """
    data = load_data(folder, image_size=image_size, mean=MEAN, std=STD, seed=seed)
    if not data.is_trainable:
        raise SystemExit(f"error: {folder} has no train folder; there is nothing to learn from.")
    if len(data.class_names) < 2:
        raise SystemExit(
            f"error: {folder} has one class, {data.class_names[0]}; expected a folder for each "
            f"of two classes or more."
        )
    return data


def make_network(weights: str, n_classes: int) -> models.ResNet:
    """ResNet-18 with a new head.

    Args:
        weights: `IMAGENET`, `NONE`, or the path of a state_dict of torchvision's ResNet-18, which
            may have ImageNet's classes or as many as the folder.
        n_classes: Of the folder.

    Raises:
        SystemExit: ImageNet's weights cannot be downloaded.
        CompressorError: The file cannot be read, or is of another network.
    """
    if weights == NONE:
        net = models.resnet18(weights=None)
    elif weights == IMAGENET:
        try:
            net = models.resnet18(weights=PRETRAINED)
        except DOWNLOAD_FAILURES as err:
            raise SystemExit(
                f"error: ImageNet's weights could not be downloaded ({err}). Bring "
                f"{PRETRAINED.url} here by other means and give it with --weights FILE, or start "
                f"from random weights with --weights none, which takes more images and --epochs."
            ) from err
    else:
        net = read_network(Path(weights), n_classes)
    net.fc = nn.Linear(net.fc.in_features, n_classes)
    return net.to(DEVICE)


def read_network(path: Path, n_classes: int) -> models.ResNet:
    """ResNet-18 with the weights of a file.

    Raises:
        CompressorError: It cannot be read, or is of another network.
    """

    def read(n: int) -> nn.Module:
        return compressor.load_model(path, arch=ARCH, arch_args={"num_classes": n}).module

    try:
        return read(len(PRETRAINED.meta["categories"]))
    except compressor.CompressorError:
        with contextlib.suppress(compressor.CompressorError):
            return read(n_classes)
        raise


def teach_head(net: models.ResNet, fit: Split) -> None:
    """Teaches the last layer alone, in place; what it reads is computed once."""
    head, net.fc = net.fc, nn.Identity()
    net.eval()
    pairs = []
    with torch.inference_mode():
        for images, labels in batches(fit, BATCH_SIZE):
            pairs.append((net(one_tensor(images).to(DEVICE)), labels.to(DEVICE)))
    features, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    net.fc = head
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2, weight_decay=1e-3)
    for _ in range(HEAD_STEPS):
        rows = torch.randperm(len(labels))[:HEAD_BATCH_SIZE]
        loss = F.cross_entropy(head(features[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"head  loss {loss.item():.3f}", flush=True)


def teach(
    net: nn.Module, fit: Split, n_epochs: int, peak_rate: float, *, is_flipped: bool
) -> None:
    """Teaches the whole network, in place: SGD, one-cycle learning rate.

    The norms' running averages are then taken anew: over the few batches of a small folder, they
    would not have come to what the final weights answer.
    """
    n_batches = max(1, len(fit) // BATCH_SIZE)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=peak_rate, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=peak_rate, total_steps=n_epochs * n_batches
    )

    def shuffled() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(fit))[: n_batches * BATCH_SIZE].split(BATCH_SIZE):
            images, labels = fit.batch(rows)
            yield one_tensor(images), labels

    started = time.perf_counter()
    net.train()
    for epoch in range(n_epochs):
        for images, labels in shuffled():
            images = augmented(images, is_flipped=is_flipped)
            loss = F.cross_entropy(net(one_tensor(images).to(DEVICE)), labels.to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds = time.perf_counter() - started
        left = seconds / (epoch + 1) * (n_epochs - epoch - 1)
        print(f"epoch {epoch + 1}/{n_epochs}  loss {loss.item():.3f}  "
              f"{seconds:.0f} s, {left:.0f} s left", flush=True)  # fmt: skip
    update_bn(shuffled(), net, device=torch.device(DEVICE))


def augmented(images: Tensor, *, is_flipped: bool) -> Tensor:
    """The batch shifted, with the mean colour at its edge, and every second image mirrored."""
    side = images.shape[-1]
    by = side // SHIFT_SHARE
    down, right = torch.randint(0, 2 * by + 1, (2,)).tolist()
    images = F.pad(images, (by, by, by, by))[:, :, down : down + side, right : right + side]
    if is_flipped:
        mirrored = torch.rand(len(images)) < 0.5
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    return images


def accuracy(net: nn.Module, split: Split) -> float:
    """Share of right answers."""
    net.eval()
    n_right = 0
    with torch.inference_mode():
        for images, labels in batches(split, BATCH_SIZE):
            n_right += int(
                (net(one_tensor(images).to(DEVICE)).argmax(dim=1).cpu() == labels).sum()
            )
    return n_right / len(split)


def settings(args: argparse.Namespace, n_classes: int) -> str:
    """What `compress.toml` says, so that `compress model.pt` needs no flag."""
    return HEADER + tomli_w.dumps(
        {
            "target": "host-cpu", "speedup": 2.0, "arch": ARCH, "data": str(args.images.resolve()),
            "image-size": args.image_size, "mean": list(MEAN), "std": list(STD),
            "seed": args.seed, "trials": 40, "batch-size": BATCH_SIZE,
            "arch-args": {"num_classes": n_classes},
        }
    )  # fmt: skip


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, metavar="IMAGES", help="a folder of class folders")
    parser.add_argument(
        "--weights", default=IMAGENET, metavar="FILE",
        help="a state_dict of torchvision's ResNet-18 to start from; none for random weights; "
        "by default torchvision downloads ImageNet's",
    )  # fmt: skip
    parser.add_argument(
        "--epochs", type=natural, default=5, help="of the whole network; %(default)s"
    )
    parser.add_argument(
        "--learning-rate", type=float,
        help=f"peak; {PEAK_RATE} by default, {PEAK_RATE_FROM_SCRATCH} from random weights",
    )  # fmt: skip
    parser.add_argument(
        "--image-size", type=positive, default=224, help="side in pixels; %(default)s"
    )
    parser.add_argument("--no-flip", action="store_true", help="for text, or whatever has a left")
    parser.add_argument("--seed", type=natural, default=0, help="of the splits and of training")
    parser.add_argument(
        "--out", type=Path, default=HERE,
        help="folder for model.pt and compress.toml, which are replaced; by default the script's",
    )  # fmt: skip
    return parser.parse_args(arguments)


def natural(text: str) -> int:
    """A whole number, 0 or more."""
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes `model.pt` and `compress.toml`."""
    args = parsed(arguments)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        data = read_images(args.images, args.image_size, args.seed)
        torch.manual_seed(args.seed)
        net = make_network(args.weights, len(data.class_names))
    except (compressor.CompressorError, OSError) as err:
        raise SystemExit(f"error: {err}") from err
    n_fit, n_search, n_test = (len(split) for split in (data.fit, data.search, data.test))
    print(f"{len(data.class_names)} classes; {n_fit} images to learn from, {n_search} to search "
          f"with, {n_test} to test with", flush=True)  # fmt: skip
    is_new = args.weights == NONE
    if not is_new:
        teach_head(net, data.fit)
    if args.epochs:
        rate = args.learning_rate or (PEAK_RATE_FROM_SCRATCH if is_new else PEAK_RATE)
        teach(net, data.fit, args.epochs, rate, is_flipped=not args.no_flip)
    torch.save(net.cpu().state_dict(), args.out / "model.pt")
    text = settings(args, len(data.class_names))
    (args.out / "compress.toml").write_text(text, encoding="utf-8")
    right = accuracy(net.to(DEVICE), data.test)
    print(f"test accuracy {right:.2%}; wrote model.pt and compress.toml into {args.out}")


if __name__ == "__main__":
    main()
