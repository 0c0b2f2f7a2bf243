"""What repairs accuracy without training: batch-norm recalibration."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from compressor.rows import arranged
from compressor.running import is_norm, ran
from compressor.values import Split, call, draw


@dataclass(frozen=True)
class Recovery:
    """What is done to a pruned network before its accuracy is taken.

    Attributes:
        least_squares: Layers that read fewer channels are refitted.
        n_recalibration_images: For batch-norm's statistics; 0 leaves them as they were.
    """

    least_squares: bool = True
    n_recalibration_images: int = 256


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
    describe it. They are replaced by the plain mean over a few batches, in all norms that a
    forward pass runs; those of parts that only training runs keep theirs, and so do frozen ones
    (`FrozenBatchNorm2d`). A norm whose parameters are frozen gets new statistics too.

    Args:
        model: Not changed.
        split: The fit split.
        n_images: Drawn at random, always the same ones: splits are often sorted by class.
        batch_size: At least 2; batch-norm of one image has no variance.
        memory_format: In which images go through; what comes back is contiguous.
    """
    recalibrated = nn.Module.to(copy.deepcopy(model), memory_format=memory_format).eval()
    if len(split) < 2 or not any(map(is_norm, recalibrated.modules())):
        return recalibrated
    one = arranged(split.model_input(torch.arange(1)), memory_format)
    norms = [module for module in ran(recalibrated, one) if is_norm(module)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        assert isinstance(norm, nn.modules.batchnorm._NormBase)
        norm.reset_running_stats()
        norm.training = True  # dropout stays off; only the norms look at the batch
    n_batches = 0
    with torch.inference_mode():
        for rows in draw(split, n_images).split(batch_size):
            if len(rows) > 1:
                n_batches += 1
                for norm in norms:
                    norm.momentum = 1 / n_batches  # type: ignore[assignment] # a plain mean
                call(recalibrated, arranged(split.model_input(rows), memory_format))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return nn.Module.to(recalibrated, memory_format=torch.contiguous_format).eval()
