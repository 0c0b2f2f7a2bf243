"""Ultralytics' YOLOv8n and YOLO11n, as `--arch detector:yolov8n` makes them."""

import torch
from torch import Tensor, nn
from ultralytics.nn.tasks import DetectionModel

N_CLASSES = 3


class RawHeads(nn.Module):
    """A YOLO network that answers with what its heads say, before boxes are made of it.

    In evaluation Ultralytics' own answer has the features of the neck too. As answers they would
    have to stay as they are, and so would the neck.
    """

    def __init__(self, config: str) -> None:
        super().__init__()
        self.net = DetectionModel(config, nc=N_CLASSES, verbose=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """{"boxes": `(n, 4 * 16, anchors)`, "scores": `(n, classes, anchors)`}, both logits."""
        answer = self.net(images)
        raw = answer[1] if isinstance(answer, tuple) else answer
        return {"boxes": raw["boxes"], "scores": raw["scores"]}


def anchors(side: int) -> tuple[Tensor, Tensor]:
    """(centres `(2, anchors)` in cells, pixels of a cell `(anchors,)`) of a square image."""
    centres, strides = [], []
    for stride in (8, 16, 32):
        n = side // stride
        y, x = torch.meshgrid(torch.arange(n) + 0.5, torch.arange(n) + 0.5, indexing="ij")
        centres.append(torch.stack([x.flatten(), y.flatten()]))
        strides.append(torch.full((n * n,), float(stride)))
    return torch.cat(centres, 1), torch.cat(strides)


def decoded(outputs: dict[str, Tensor], side: int) -> tuple[Tensor, Tensor]:
    """(corners `(n, anchors, 4)` in pixels, scores `(n, anchors, classes)` from 0 to 1)."""
    centres, strides = anchors(side)
    n, _, n_anchors = outputs["boxes"].shape
    shares = outputs["boxes"].view(n, 4, -1, n_anchors).softmax(2)
    distances = (shares * torch.arange(shares.shape[2]).view(1, 1, -1, 1)).sum(2)
    left_top, right_bottom = centres - distances[:, :2], centres + distances[:, 2:]
    corners = torch.cat([left_top, right_bottom], 1) * strides
    return corners.transpose(1, 2), outputs["scores"].sigmoid().transpose(1, 2)


def yolov8n() -> RawHeads:
    """YOLOv8n with random weights."""
    return RawHeads("yolov8n.yaml")


def yolo11n() -> RawHeads:
    """YOLO11n with random weights."""
    return RawHeads("yolo11n.yaml")
