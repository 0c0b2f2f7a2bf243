"""A detection task: discs, squares and crosses in noise, and the mean average precision.

Images of 64 x 64 pixels hold one to three shapes; they are made when they are asked for, always
the same ones. `judge` keeps what was found in an image and what was wanted there; `metric` makes
the mean average precision of them, at an intersection over union of 0.5 (mAP50).

    compress samples/yolo/model.pt --arch detector:yolov8n --task boxes:Shapes ...
"""

from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from detector import N_CLASSES, decoded, yolov8n
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import batched_nms, box_convert, box_iou
from ultralytics.utils.loss import v8DetectionLoss

SIDE = 64  # pixels of an image
IMAGES = {"fit": 1200, "search": 200, "test": 300}
GAINS = {"box": 7.5, "cls": 0.5, "dfl": 1.5}  # of the three losses, Ultralytics' own
IS_FOUND = 0.5  # intersection over union
LEAST_SCORE, MOST_OVERLAP, MOST_BOXES = 0.01, 0.6, 30


class Judged(NamedTuple):
    """Of one image.

    Attributes:
        found: (class, score, whether there is such a shape), the surest first.
        wanted: How many shapes there are of every class.
    """

    found: list[tuple[int, float, bool]]
    wanted: list[int]


class Shapes:
    """What `--task boxes:Shapes` names; see `compressor.tasks.Task`."""

    name = "mAP50"
    larger_is_better = True

    def dataset(self, split: str) -> Dataset[tuple[Tensor, Tensor]]:
        """Images of "fit", "search" or "test"."""
        return Drawn(split)

    def loss(self, outputs: dict[str, Tensor], targets: list[Tensor]) -> Tensor:
        """Ultralytics' own: boxes, classes and distributions of distances."""
        corners = box_convert(torch.cat([t[:, 1:] for t in targets]), "xyxy", "cxcywh")
        batch = {
            "batch_idx": torch.cat([torch.full_like(t[:, 0], i) for i, t in enumerate(targets)]),
            "cls": torch.cat([t[:, 0] for t in targets]),
            "bboxes": corners / SIDE,
        }
        maps = [torch.empty(1, 1, SIDE // s, SIDE // s) for s in (8, 16, 32)]
        total, _ = criterion()({**outputs, "feats": maps}, batch)
        return total.sum() / len(targets)

    def judge(self, outputs: dict[str, Tensor], targets: list[Tensor]) -> list[Judged]:
        """What was found in every image, compared with what is there."""
        corners, scores = decoded(outputs, SIDE)
        return [judged(*each) for each in zip(corners, scores, targets, strict=True)]

    def metric(self, judged: list[Judged]) -> float:
        """Mean over the classes of the area under precision over recall."""
        return float(np.mean([average_precision(judged, kind) for kind in range(N_CLASSES)]))


def judged(corners: Tensor, scores: Tensor, target: Tensor) -> Judged:
    """One image: boxes that overlap a surer one are left out; each shape is found once."""
    best, kinds = scores.max(1)
    sure = best > LEAST_SCORE
    corners, best, kinds = corners[sure], best[sure], kinds[sure]
    kept = batched_nms(corners, best, kinds, MOST_OVERLAP)[:MOST_BOXES]
    overlaps = box_iou(corners[kept], target[:, 1:])
    free = torch.ones(len(target), dtype=torch.bool)
    found = []
    for row, i in enumerate(kept.tolist()):
        fits = free & (target[:, 0] == kinds[i]) & (overlaps[row] > IS_FOUND)
        is_there = bool(fits.any())
        if is_there:
            free[int(overlaps[row].masked_fill(~fits, 0).argmax())] = False
        found.append((int(kinds[i]), float(best[i]), is_there))
    return Judged(found, target[:, 0].long().bincount(minlength=N_CLASSES).tolist())


def average_precision(judged: list[Judged], kind: int) -> float:
    """Area under the precision that is reached at every recall or a larger one."""
    n_wanted = sum(image.wanted[kind] for image in judged)
    found = sorted(
        ((score, hit) for image in judged for k, score, hit in image.found if k == kind),
        reverse=True,
    )
    hits = np.cumsum([hit for _, hit in found], dtype=float)
    if not n_wanted or not len(hits):
        return 0.0
    precision = hits / np.arange(1, len(hits) + 1)
    reached = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.diff(hits / n_wanted, prepend=0.0)
    return float((steps * reached).sum())


@cache
def criterion() -> v8DetectionLoss:
    """Ultralytics' loss; it reads strides and numbers of classes from any of its networks."""
    net = yolov8n().eval().net  # all networks of Ultralytics share one activation, and its mode
    net.args = SimpleNamespace(**GAINS)
    return v8DetectionLoss(net)


class Drawn(Dataset[tuple[Tensor, Tensor]]):
    """`(3, 64, 64)` float32 images, and `(shapes, 5)`: class, left, top, right, bottom."""

    def __init__(self, split: str) -> None:
        self.n, self.seed = IMAGES[split], list(IMAGES).index(split)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        generator = np.random.default_rng((self.seed, row))
        image = generator.normal(0.4, 0.1, (3, SIDE, SIDE))
        y, x = np.mgrid[:SIDE, :SIDE]
        shapes = []
        for _ in range(generator.integers(1, 4)):
            kind, half = int(generator.integers(N_CLASSES)), int(generator.integers(6, 14))
            row_, column = generator.integers(half, SIDE - half, 2)
            dy, dx = np.abs(y - row_), np.abs(x - column)
            inside = np.maximum(dy, dx) <= half
            if kind == 0:
                inside = dy**2 + dx**2 <= half**2
            elif kind == 2:
                inside &= np.minimum(dy, dx) <= half // 3
            image[:, inside] = generator.uniform(0, 1, (3, 1)) + generator.choice([-0.5, 0.5])
            shapes.append([kind, column - half, row_ - half, column + half + 1, row_ + half + 1])
        return torch.from_numpy(image).float(), torch.tensor(shapes, dtype=torch.float32)
