"""Trains YOLOv8n or YOLO11n on drawn shapes and leaves `model.pt` beside this file.

python samples/yolo/train_yolo.py
compress samples/yolo/model.pt --target host-cpu --speedup 2
"""

import argparse
import time
from pathlib import Path

import detector
import torch
from boxes import Judged, Shapes
from torch import Tensor
from torch.utils.data import DataLoader

HERE = Path(__file__).parent


def together(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """Images in one tensor; their boxes, of which each has its own number, in a list."""
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), list(targets)


def train(model: detector.RawHeads, n_epochs: int, batch_size: int = 16) -> None:
    """From scratch: AdamW, one-cycle learning rate."""
    task = Shapes()
    batches = DataLoader(task.dataset("fit"), batch_size, shuffle=True, collate_fn=together)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=n_epochs * len(batches)
    )
    started = time.perf_counter()
    model.train()
    for epoch in range(n_epochs):
        for images, targets in batches:
            loss = task.loss(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            schedule.step()
        seconds = time.perf_counter() - started
        left = seconds / (epoch + 1) * (n_epochs - epoch - 1)
        print(f"epoch {epoch + 1}/{n_epochs}  loss {loss.item():.3f}  "
              f"{seconds:.0f} s, {left:.0f} s left", flush=True)  # fmt: skip
    model.eval()


def main() -> None:
    """Writes `model.pt`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=["yolov8n", "yolo11n"], default="yolov8n")
    parser.add_argument("--epochs", type=int, default=12)
    given = parser.parse_args()
    torch.manual_seed(0)
    model = getattr(detector, given.arch)()
    train(model, given.epochs)
    torch.save(model.state_dict(), HERE / "model.pt")
    task = Shapes()
    judged: list[Judged] = []
    with torch.inference_mode():
        for images, targets in DataLoader(task.dataset("test"), 50, collate_fn=together):
            judged += task.judge(model(images), targets)
    print(f"test mAP50 {task.metric(judged):.3f}; wrote model.pt")


if __name__ == "__main__":
    main()
