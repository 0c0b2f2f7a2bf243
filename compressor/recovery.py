"""What repairs accuracy without training: batch-norm recalibration."""

import copy

import torch
from torch import nn

from compressor.values import BATCH_NORMS, Split, draw


def recalibrate_batch_norm(
    model: nn.Module,
    split: Split,
    *,
    n_images: int = 256,
    batch_size: int = 64,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> nn.Module:
    """A copy whose batch-norm statistics are those of the pruned network.

    Removed channels change what the next layers see, so the running statistics no longer
    describe it. They are replaced by the plain mean over a few batches.

    Args:
        model: Not changed.
        split: The fit split.
        n_images: Drawn at random, always the same ones: splits are often sorted by class.
        batch_size: At least 2; batch-norm of one image has no variance.
        memory_format: In which images go through; what comes back is contiguous.
    """
    recalibrated = copy.deepcopy(model).to(memory_format=memory_format)
    norms = [m for m in recalibrated.modules() if isinstance(m, BATCH_NORMS)]
    momenta = [norm.momentum for norm in norms]
    if not norms or len(split) < 2:
        return recalibrated.eval()
    recalibrated.eval()  # dropout stays off; only the norms look at the batch
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
        norm.train()
    with torch.inference_mode():
        for rows in draw(split, n_images).split(batch_size):
            if len(rows) > 1:
                recalibrated(split.model_input(rows).to(memory_format=memory_format))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return recalibrated.to(memory_format=torch.contiguous_format).eval()
