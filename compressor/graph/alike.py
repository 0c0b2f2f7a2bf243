"""Whether two networks answer alike, each asked with tensors of its own."""

import torch
from torch import Tensor, nn

from compressor.containers import map_tensors, tensors_in
from compressor.running import buffers_kept, cloned, unfused_attention
from compressor.values import FORWARD_FAILURES, Example, call

TOLERANCE = 1e-6  # of the largest output; nothing but another order of additions may differ


def _twice(example: Example) -> Example:
    """The example and its mirror image, along the batch."""
    doubled: Example = map_tensors(lambda t: torch.cat([t, t.flip(-1)]) if t.ndim else t, example)
    return doubled


def answers_alike(network: nn.Module, other: nn.Module, example: Example) -> bool:
    """Whether both networks answer the example alike, and two of it at once.

    Two are asked for where `network` takes them: with one image some views look like others.
    """
    return _alike(network, other, example) and _alike(network, other, _twice(example))


def _alike(network: nn.Module, other: nn.Module, example: Example) -> bool:
    try:
        expected = _answers(network, example)
    except FORWARD_FAILURES:
        return True
    got = _answers(other, example)
    if [(t.shape, t.dtype) for t in expected] != [(t.shape, t.dtype) for t in got]:
        return False
    pairs = list(zip(expected, got, strict=True))
    return all(
        torch.allclose(h, w, rtol=0, atol=TOLERANCE * _largest(w), equal_nan=True)
        if w.is_floating_point() and w.numel() else torch.equal(h, w)
        for w, h in pairs
    )  # fmt: skip


def _largest(values: Tensor) -> float:
    return float(values.nan_to_num().abs().max())


def _answers(network: nn.Module, example: Example) -> list[Tensor]:
    copied = cloned(example)
    with torch.no_grad(), unfused_attention(), buffers_kept(network):
        return list(tensors_in(call(network, copied)))
