"""Which channels go together, architecture by architecture: a change must be meant.

One line a group in golden/*.txt; `pytest tests/zoo --renew-golden` writes them anew.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision

from compressor.graph import channel_groups
from compressor.values import ChannelGroup, Role

GOLDEN = Path(__file__).parent / "golden"
ARCHITECTURES = (
    "resnet18", "mobilenet_v2", "densenet121", "shufflenet_v2_x0_5", "resnext50_32x4d",
)  # fmt: skip


def listing(groups: tuple[ChannelGroup, ...]) -> Iterator[str]:
    """One line a group, without what changes from one release of torchvision to the next."""
    for group in groups:
        written, read = (", ".join(group.modules(r)) for r in (Role.PRODUCER, Role.CONSUMER))
        because = re.sub(r", line \d+", "", group.locked_because or "")
        yield (
            f"{group.name} | {group.n_channels} channels of {group.unit} | written by {written} "
            f"| read by {read or 'nothing'} | {group.cost.macs} MACs | {group.cost.params} params "
            f"| {f'locked: {because}' if because else 'free'}\n"
        )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_are_those_of_the_golden_file(name: str, renew_golden: bool) -> None:
    model = torchvision.models.get_model(name).eval()
    found = "".join(listing(channel_groups(model, torch.zeros(1, 3, 64, 64))))
    path = GOLDEN / f"{name}.txt"
    if renew_golden:
        path.write_text(found)
    assert found == path.read_text()
