"""Arguments and data that lead elsewhere: other weights, other folders, more than there is."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from compressor.datasets import load_data
from compressor.errors import DataError, ModelError
from compressor.latency import runner
from compressor.model_io import load_model
from compressor.model_io.architectures import build


class Small(nn.Module):
    """A factory that tests name with --arch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)


@pytest.mark.bad_input("arguments of networks that load other files")
@pytest.mark.parametrize(
    "argument",
    [{"checkpoint_path": "evil.pth"}, {"pretrained": True}, {"pretrained_cfg": {"url": "x"}},
     {"pretrained_cfg_overlay": {"file": "evil.pth"}}, {"weights": "DEFAULT"},
     {"weights_backbone": "DEFAULT"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("arch", ["timm:resnet18", "torchvision:resnet18"])
def test_no_argument_loads_another_file(arch: str, argument: dict[str, object]) -> None:
    """Nor downloads one: an argument may stand in a file, and the network is a library's own."""
    pytest.importorskip(arch.partition(":")[0])
    with pytest.raises(ModelError, match="would load other weights"):
        build(arch, argument, beside=Path())


@pytest.mark.bad_input("an input larger than memory")
def test_an_input_larger_than_memory_is_refused(tmp_path: Path) -> None:
    torch.save(Small().state_dict(), tmp_path / "model.pt")
    with pytest.raises(ModelError, match=r"One input of --input-shape 1,1048576,1048576 has"):
        load_model(
            tmp_path / "model.pt",
            arch="tests.unit.test_strange_arguments:Small",
            input_shape=(1, 2**20, 2**20),
        )


def test_nobody_is_told_of_models() -> None:
    """ONNX Runtime reads this before it is imported."""
    assert os.environ["ORT_DISABLE_TELEMETRY"]
    source = Path(runner.__file__).read_text(encoding="utf-8")
    assert source.index("ORT_DISABLE_TELEMETRY") < source.index("import onnxruntime")


@pytest.mark.bad_input("links to where nobody may look, among images")
def test_a_link_to_processes_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "link").symlink_to("/proc/self/task")
    with pytest.raises(DataError):
        load_data(tmp_path)
