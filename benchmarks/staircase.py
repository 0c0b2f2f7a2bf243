"""What a channel costs on this CPU: why widths stay on the target's step.

Two 3x3 convolutions of `c` channels on 28 x 28 pixels, ONNX Runtime, one thread, each width timed
in the same rounds as 64 channels.

    python benchmarks/staircase.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import compressor

WIDTHS = (16, 17, 31, 32, 33, 47, 48, 49, 56, 63, 64)


def main() -> None:
    """Prints one row a width."""
    target = compressor.load_target("host-cpu")
    print(f"step of {target.name}: {target.step} ({target.step_source})")
    print("channels  median ms  time of 64 channels / this, 95 % interval")
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for c in (*WIDTHS, 64):
            net = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1))
            path = Path(folder) / f"{c}.onnx"
            files[c] = compressor.export_onnx(net.eval(), torch.zeros(1, c, 28, 28), path)
        with compressor.open_device(target) as device:
            for c in WIDTHS:
                pair = device.compare(files[64], files[c])
                low, high = pair.ci95
                print(f"{c:>8}  {pair.candidate.median_ms:>9.3f}  "
                      f"{pair.ratio:>6.2f} [{low:.2f}, {high:.2f}]", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
