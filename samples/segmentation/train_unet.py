"""Trains the U-Net and leaves `model.pt` beside this file.

python samples/segmentation/train_unet.py
compress samples/segmentation/model.pt --target host-cpu --speedup 2
"""

import argparse
import time
from pathlib import Path

import torch
from masks import DigitMasks
from torch.utils.data import DataLoader, default_collate
from unet import UNet, make

HERE = Path(__file__).parent


def train(n_epochs: int, batch_size: int = 32) -> UNet:
    """From scratch: SGD, one-cycle learning rate."""
    torch.manual_seed(0)
    task, model = DigitMasks(), make()
    batches = DataLoader(task.dataset("fit"), batch_size, shuffle=True, collate_fn=default_collate)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.2, total_steps=n_epochs * len(batches)
    )
    started = time.perf_counter()
    for epoch in range(n_epochs):
        for scenes, masks in batches:
            loss = task.loss(model(scenes), list(masks))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds = time.perf_counter() - started
        left = seconds / (epoch + 1) * (n_epochs - epoch - 1)
        print(f"epoch {epoch + 1}/{n_epochs}  loss {loss.item():.3f}  "
              f"{seconds:.0f} s, {left:.0f} s left", flush=True)  # fmt: skip
    return model.eval()


def main() -> None:
    """Writes `model.pt`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    model = train(parser.parse_args().epochs)
    torch.save(model.state_dict(), HERE / "model.pt")
    task = DigitMasks()
    judged: list[tuple[int, int]] = []
    with torch.inference_mode():
        for scenes, masks in DataLoader(task.dataset("test"), 50):
            judged += task.judge(model(scenes), list(masks))
    print(f"test IoU {task.metric(judged):.3f}; wrote model.pt")


if __name__ == "__main__":
    main()
