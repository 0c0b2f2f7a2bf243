"""A detector of torchvision's, compressed up to its raw heads: where is the bright square?

torchvision's detectors take lists of images and answer lists of boxes. What lies in between is
code that no runtime compiles: resizing before the layers, picking boxes behind them. `network`
names what is compressed: `Heads`, the layers from a tensor to what every anchor says. The rest is
the detector's own, here in the task and later where it is served:

    found = detector.postprocess_detections(heads, anchors, sizes)

`model.onnx` answers `heads` as two tensors, box regressions and class logits.

    python samples/detection/boxes.py
    compress samples/detection/model.pt --target host-cpu --speedup 1.5
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

SIDE = 96  # pixels of an image; torchvision's own transform would make them 320
SIZES = {"fit": 96, "search": 40, "test": 40}


def make() -> nn.Module:
    """The whole detector, as torchvision builds it; class 0 is the background."""
    return ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2)


class Heads(nn.Module):
    """The layers of a detector: `(n, 3, h, w)` -> what each anchor says, as a dict."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images: Tensor) -> Any:
        """Box regressions and class logits."""
        return self.head(list(self.backbone(images).values()))


class Boxes:
    """What `--task boxes:Boxes` names; the metric is the mean overlap of the surest box."""

    name = "overlap"
    larger_is_better = True

    def network(self, model: nn.Module) -> nn.Module:
        """What is compressed of the detector."""
        return Heads(model)

    def dataset(self, split: str) -> Dataset[tuple[Tensor, Any]]:
        """Squares in noise."""
        return Squares(SIZES[split], seed=list(SIZES).index(split))

    def loss(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> Tensor:
        """Torchvision's own, of the anchors that lie over the boxes."""
        detector, corners = whole(), anchors()
        matched = [detector.proposal_matcher(box_iou(t["boxes"], corners)) for t in targets]
        every = [corners] * len(targets)
        parts = detector.compute_loss(targets, outputs, every, matched)
        return torch.stack(list(parts.values())).sum()

    def judge(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> list[float]:
        """How far the surest box of every image lies over the right one."""
        corners, n = anchors(), len(targets)
        found = whole().postprocess_detections(outputs, [corners] * n, [(SIDE, SIDE)] * n)
        return [
            float(box_iou(f["boxes"][:1], t["boxes"]).sum())
            for f, t in zip(found, targets, strict=True)
        ]

    def metric(self, judged: list[float]) -> float:
        """Mean over the images."""
        return sum(judged) / len(judged)


@cache
def whole() -> Any:
    """A detector for all that is no layer of it; its weights are not looked at."""
    return make().eval()


@cache
def anchors() -> Tensor:
    """`(n_anchors, 4)` corners in pixels; the same for all images of one size."""
    images = torch.zeros(1, 3, SIDE, SIDE)
    with torch.no_grad():
        maps = list(whole().backbone(images).values())
    (found,) = whole().anchor_generator(ImageList(images, [(SIDE, SIDE)]), maps)
    assert isinstance(found, Tensor)
    return found


class Squares(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """`(3, 96, 96)` noise with one bright square, and where it is."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, row: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(100_000 * self.seed + row)
        image = 0.3 * torch.randn(3, SIDE, SIDE, generator=generator)
        side = int(torch.randint(24, 64, (1,), generator=generator))
        top, left = torch.randint(0, SIDE - side, (2,), generator=generator).tolist()
        image[:, top : top + side, left : left + side] += 1
        box = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
        return image, {"boxes": box, "labels": torch.ones(1, dtype=torch.int64)}


def train(path: Path, *, n_steps: int = 150, batch_size: int = 16) -> None:
    """Trains the heads and their backbone from scratch; writes the whole detector's weights."""
    torch.manual_seed(0)
    detector, task = make(), Boxes()
    network, data = task.network(detector).train(), task.dataset("fit")
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(n_steps):
        samples = [data[row] for row in torch.randperm(SIZES["fit"])[:batch_size].tolist()]
        outputs = network(torch.stack([image for image, _ in samples]))
        loss = task.loss(outputs, [target for _, target in samples])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(detector.state_dict(), path)


if __name__ == "__main__":
    train(Path(__file__).with_name("model.pt"))
