"""Networks as people write them: none of torchvision's or timm's, each small and of one use.

They are what users bring: functional calls, views, chunks, assignments into slices, branches by
`self.training`, dicts of answers, several inputs, token numbers. `python -m benchmarks.zoo own`
asks of each what it asks of every architecture: pruned like masked, ONNX Runtime like torch.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks.networks import detection, gates, pixels, recognition, signals
from compressor.values import Example


def _image(
    make: Callable[[], nn.Module], channels: int, height: int, width: int | None = None
) -> tuple[nn.Module, Example]:
    return make(), torch.rand(1, channels, height, width or height)


def _tensors(make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> tuple[nn.Module, Example]:
    given = tuple(torch.randn(shape) for shape in shapes)
    return make(), given if len(given) > 1 else given[0]


def _image_and_table() -> tuple[nn.Module, Example]:
    return recognition.ImageAndTable(), {
        "image": torch.rand(1, 3, 32, 32),
        "numbers": torch.randn(1, 6),
        "category": torch.tensor([3]),
    }


def _generator() -> tuple[nn.Module, Example]:
    return gates.Generator(), (torch.randn(1, 24), torch.tensor([2]))


def _denoising_unet() -> tuple[nn.Module, Example]:
    return pixels.DenoisingUNet(), (torch.randn(1, 3, 16, 16), torch.tensor([37]))


def _text() -> tuple[nn.Module, Example]:
    return gates.TextTransformer(), torch.tensor(
        [[5, 8, 31, 49, 2, 7, 1, 12, 9, 3, 0, 0, 0, 0, 0, 0]]
    )


Make = Callable[[], tuple[nn.Module, Example]]
NETWORKS: dict[str, Make] = {
    "yolo-fpn-pan": partial(_image, detection.Yolo, 3, 64, 96),
    "yolo-anchors": partial(_image, detection.YoloV3, 3, 64),
    "ssd": partial(_image, detection.Ssd, 3, 64),
    "centernet": partial(_image, detection.CenterNet, 3, 64),
    "hourglass": partial(_image, detection.Hourglass, 3, 64),
    "hrnet-keypoints": partial(_image, detection.HRNet, 3, 64, 48),
    "crnn": partial(_image, recognition.Crnn, 1, 32, 64),
    "svtr": partial(_image, recognition.Svtr, 3, 32, 64),
    "mobilefacenet": partial(_image, recognition.MobileFaceNet, 3, 56),
    "image-and-table": _image_and_table,
    "many-heads": partial(_image, recognition.ManyHeads, 3, 32),
    "siamese": partial(_tensors, recognition.Siamese, (1, 1, 32, 32), (1, 1, 32, 32)),
    "triplet": partial(_tensors, recognition.Triplet, *[(1, 3, 32, 32)] * 3),
    "siamfc": partial(_tensors, recognition.SiamFC, (1, 3, 47, 47), (1, 3, 79, 79)),
    "siamrpn": partial(_tensors, recognition.SiamRPN, (1, 3, 31, 31), (1, 3, 63, 63)),
    "edsr": partial(_image, pixels.Edsr, 3, 16),
    "rcan": partial(_image, pixels.Rcan, 3, 16),
    "dncnn": partial(_image, pixels.DnCnn, 1, 24),
    "denoising-unet": _denoising_unet,
    "depth": partial(_image, pixels.Depth, 3, 64, 80),
    "deeplab": partial(_image, pixels.DeepLab, 3, 64),
    "segnet": partial(_image, pixels.SegNet, 3, 32),
    "pspnet": partial(_image, pixels.PspNet, 3, 48),
    "bisenet": partial(_image, pixels.BiSeNet, 3, 64),
    "attention-unet": partial(_image, pixels.AttentionUNet, 1, 32),
    "gates-se": partial(_image, partial(gates.Gated, gates.Se), 3, 16),
    "gates-cbam": partial(_image, partial(gates.Gated, gates.Cbam), 3, 16),
    "gates-eca": partial(_image, partial(gates.Gated, gates.Eca), 3, 16),
    "gates-gc": partial(_image, partial(gates.Gated, gates.GcBlock), 3, 16),
    "vae": partial(_image, gates.Vae, 1, 28),
    "gan-generator": _generator,
    "pointnet": partial(_tensors, gates.PointNet, (1, 3, 64)),
    "mlp-mixer": partial(_image, gates.Mixer, 3, 32),
    "skeleton-graph": partial(_tensors, gates.SkeletonGraph, (1, 3, 12, 9)),
    "text-transformer": _text,
    "raw-wave": partial(_tensors, signals.RawWave, (1, 1, 4000)),
    "spectrogram": partial(_tensors, signals.Spectrogram, (1, 1, 32, 32)),
    "ds-cnn": partial(_tensors, signals.DsCnn, (1, 49, 10)),
    "tc-resnet": partial(_tensors, signals.TcResNet, (1, 20, 64)),
    "conv-tasnet": partial(_tensors, signals.ConvTasNet, (1, 400)),
    "ecg": partial(_tensors, signals.EcgNet, (1, 12, 256), (1, 2)),
    "eegnet": partial(_tensors, signals.EegNet, (1, 16, 128)),
    "tcn": partial(_tensors, signals.Tcn, (1, 32, 6)),
    "cnn-lstm": partial(_tensors, signals.CnnLstm, (1, 4, 3, 32, 32)),
    "r2plus1d": partial(_tensors, signals.R2Plus1d, (1, 3, 8, 24, 24)),
    "tsm": partial(_tensors, signals.Tsm, (4, 3, 32, 32)),
    "slowfast": partial(_tensors, signals.SlowFast, (1, 3, 8, 32, 32)),
}
