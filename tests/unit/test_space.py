"""Widths on the step, ties, floors, and the original always allowed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import GraphError
from compressor.search.space import SearchSpace, make_space
from compressor.values import ChannelGroup


def space_of(n_channels: list[int], step: int, min_keep_ratio: float = 0.1) -> SearchSpace:
    groups = [ChannelGroup(f"g{i}", n, ()) for i, n in enumerate(n_channels)]
    scores = {g.name: np.random.default_rng(i).random(g.n_channels) for i, g in enumerate(groups)}
    return make_space(groups, scores, step=step, min_keep_ratio=min_keep_ratio)


def test_choices_are_multiples_and_the_original() -> None:
    space = space_of([64, 100, 24], step=16)
    assert space.choices == ((16, 32, 48, 64), (16, 32, 48, 64, 80, 96, 100), (16, 24))
    assert space_of([64], step=16, min_keep_ratio=0.5).choices == ((32, 48, 64),)


channels = st.lists(st.integers(2, 300), min_size=1, max_size=5)


@given(channels, st.integers(1, 32), st.integers(0, 2**32 - 1))
def test_snap_is_the_nearest_choice(n_channels: list[int], step: int, seed: int) -> None:
    """Against brute force over all choices of every group."""
    if max(n_channels) <= step:
        return
    space = space_of(n_channels, step)
    ratios = np.random.default_rng(seed).uniform(0, 1.2, size=(4, len(space.groups)))
    for row, widths in zip(ratios, space.snap(ratios), strict=True):
        for wanted, width, choice, n in zip(row, widths, space.choices, space.sizes, strict=True):
            assert abs(width - wanted * n) == min(abs(w - wanted * n) for w in choice)
    assert space.snap(space.ratios([space.narrowest])) == [space.narrowest]


@given(channels, st.integers(0, 2**32 - 1))
def test_plans_keep_the_best_channels(n_channels: list[int], seed: int) -> None:
    space = space_of(n_channels, step=1)
    (widths,) = space.snap(np.random.default_rng(seed).random((1, len(space.groups))))
    plan = space.plan(widths)
    for group, scores, width in zip(space.groups, space.scores, widths, strict=True):
        kept = plan.kept[group.name]
        assert len(kept) == width == plan.width(group)
        assert list(kept) == sorted(set(kept))
        dropped = set(range(group.n_channels)) - set(kept)
        assert not dropped or min(scores[list(kept)]) >= max(scores[list(dropped)])
    assert space.from_names(space.by_name(widths)) == widths


def test_neighbours_are_all_one_step_away() -> None:
    space = space_of([32, 48], step=16)
    assert sorted(space.neighbours((16, 32))) == [(16, 16), (16, 48), (32, 32)]


def test_nothing_to_prune_says_why() -> None:
    groups = [ChannelGroup("head", 10, (), "its channels are the model's output"),
              ChannelGroup("thin", 8, ())]  # fmt: skip
    scores = {"head": np.ones(10), "thin": np.ones(8)}
    with pytest.raises(GraphError, match=r"head: its channels.*thin: 8 channels, the step is 16"):
        make_space(groups, scores, step=16, min_keep_ratio=0.1)
