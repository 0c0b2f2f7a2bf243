"""Which weights should rank a channel: the filter that writes it, or those that read it?

On the digits sample (run samples/digits/train.py first): every group keeps the same share of its
channels, batch-norm is recalibrated, nothing is trained; accuracy on the search split.

    python benchmarks/importance_side.py
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import compressor
from compressor.datasets import load_data
from compressor.evaluate import accuracy
from compressor.importance import WeightNorm, channel_norms
from compressor.recovery import recalibrate_batch_norm
from compressor.rows import example_of
from compressor.search.space import make_space
from compressor.surgery import remove_channels
from compressor.values import ChannelGroup, Role

SAMPLE = Path(__file__).parents[1] / "samples" / "digits"
KEEP_RATIOS = (0.75, 0.5, 0.375, 0.25)


def main() -> None:
    """Prints one row a keep ratio."""
    data = load_data(SAMPLE / "data.npz", mean=(0.1307,), std=(0.3081,))
    loaded = compressor.load_model(
        SAMPLE / "model.pt", arch="network:digits_resnet", example=example_of(data.fit)
    )
    model, example = loaded.module, loaded.example_input
    groups = compressor.channel_groups(model, example)
    generator = np.random.default_rng(0)

    def by_filters(group: ChannelGroup) -> np.ndarray:
        norms = [channel_norms(model, s) for s in group.slices if s.role is Role.PRODUCER]
        return torch.stack(norms).sum(dim=0).numpy()

    def by_readers(group: ChannelGroup) -> np.ndarray:
        scores: np.ndarray = WeightNorm().scores(model, [group], None)[group.name].numpy()
        return scores

    def by_chance(group: ChannelGroup) -> np.ndarray:
        return generator.random(group.n_channels)

    rankings: dict[str, Callable[[ChannelGroup], np.ndarray]] = {
        "filters (Li 2017)": by_filters,
        "readers (ours, Fan 2022)": by_readers,
        "random": by_chance,
    }
    print(f"{'keep ratio':<12}" + "".join(f"{name:>28}" for name in rankings))
    for keep_ratio in KEEP_RATIOS:
        row = f"{keep_ratio:<12}"
        for score in rankings.values():
            space = make_space(groups, {g.name: score(g) for g in groups}, step=16,
                               min_keep_ratio=0.1)  # fmt: skip
            (widths,) = space.snap(np.full((1, len(space.groups)), keep_ratio))
            pruned = remove_channels(model, groups, space.plan(widths))
            pruned = recalibrate_batch_norm(pruned, data.fit)
            row += f"{accuracy(pruned, data.search, batch_size=50).value:>28.2%}"
        print(row)


if __name__ == "__main__":
    main()
