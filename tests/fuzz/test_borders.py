"""Files and answers that anybody could have written: an error of ours, or a value, and no more.

Every border has a good file to start from and what reads it; `mutations` spoils the file. A reader
may raise `CompressorError`, soon. It may not raise anything else, run code of the file, start a
process, or write outside its folder (`guard`).
"""

import contextlib
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image

import compressor
from compressor import run_folder
from compressor.config import Config, load_config, make_config
from compressor.datasets import load_data
from compressor.datasets.files import reader
from compressor.errors import CompressorError
from compressor.export import export_onnx
from compressor.latency import schema, ssh, targets
from compressor.latency.estimate import estimate_ms
from compressor.latency.machine import check_same_inputs
from compressor.latency.process import Runner
from compressor.latency.trtexec_text import (
    Capabilities,
    changes,
    classify,
    conditions,
    read_state,
    read_times,
)
from compressor.report import text_report
from compressor.report.html import html_report
from compressor.run_folder import RunFolder
from compressor.search.study import Study
from compressor.training import Recipe, fine_tune
from compressor.values import Accuracy, LabelledImages, Trial
from tests.conftest import INPUT_SHAPE, ConvNet, blob_images, randomised
from tests.fuzz import mutations
from tests.fuzz.guard import WATCH, guarded
from tests.unit.test_html_report import full_result
from tests.unit.test_run_folder import LATENCY
from tests.unit.test_space import space_of

N_CASES, N_CASES_SLOW = 12, 600  # of every border
ARCH = "tests.conftest:make_conv_net"


@dataclass(frozen=True)
class Border:
    """One kind of file.

    Attributes:
        name: Under which the file is written, in a folder of its own.
        good: Writes a good one to a path.
        read: Reads it.
        spoiled: What becomes of it.
    """

    name: str
    good: Callable[[Path], object]
    read: Callable[[Path], object]
    spoiled: mutations.Mutation


def write_config(path: Path) -> None:
    path.write_text(
        'target = "host-cpu"\ndata = "images"\narch = "torchvision:resnet18"\n'
        'max-latency = "12ms"\ntrials = 60\nmean = [0.5]\nstd = [0.5]\ninput-shape = [3, 8, 8]\n'
        'time-budget = "1h"\naugment = ["flip"]\n'
        "[constraint]\nmacs = 0.5\n[arch-args]\nwidth = 3\n"
    )


def write_settings(path: Path) -> None:
    config = Config(model=Path("model.pt"), target="host-cpu", speedup=2.0)
    path.write_text(tomli_w.dumps(config.as_toml()))


def read_settings(path: Path) -> None:
    make_config(run_folder.read_settings(path.parent) | {"out": path.parent})


def write_profile(path: Path) -> None:
    profiles = Path(compressor.__file__).parent.parent / "hardware_profiles"
    path.write_bytes((profiles / "jetson-orin-nano.toml").read_bytes())


def read_device(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(path.parent.parent))
        ssh.find_device("my-nano")


def write_study(path: Path) -> None:
    space = space_of([64, 32], step=16)
    study = Study.create(path, space)
    study.once("timed before, 0", lambda: LATENCY)
    names = dict(zip(space.names, (32, 16), strict=True))
    done = Trial(0, names, "start", Accuracy(0.5, 100), 2.5, (2.4, 2.6), 2.0, {"surgery": 0.1})
    study.add(done, LATENCY)
    study.add(Trial(1, names, "start", failed_because="it crashed"), None)


def read_study(path: Path) -> None:
    compressor.folder_report(path.parent)
    compressor.folder_report(path.parent, as_json=True)


def write_result(path: Path) -> None:
    RunFolder(path.parent).write_result(full_result(path.parent))


def read_result(path: Path) -> None:
    result = run_folder.read_result(path.parent)
    text_report(result)
    html_report(result, ())


def write_manifest(path: Path) -> None:
    of_nothing = hashlib.sha256(b"").hexdigest()
    content = {"schema": 1, "config_sha256": of_nothing, "versions": {"torch": "2"}}
    path.write_text(json.dumps(content))


def read_manifest(path: Path) -> None:
    (path.parent / "config.toml").write_text("")
    RunFolder(path.parent).check({}, force=False)


def write_images(path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {}
    for name, n in (("fit", 30), ("search", 20), ("test", 20)):
        arrays[f"{name}_images"], arrays[f"{name}_labels"] = blob_images(n, generator)
    np.savez(path, **arrays)  # type: ignore[arg-type]


def write_png(path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def read_png(path: Path) -> None:
    for n_channels in (1, 3):
        reader(4, n_channels)(path)


def write_weights(path: Path) -> None:
    torch.save(randomised(ConvNet(8)).state_dict(), path)


def read_weights(path: Path) -> None:
    compressor.load_model(path, arch=ARCH, arch_args={"width": 8}, input_shape=INPUT_SHAPE)


def write_legacy(path: Path) -> None:
    state = randomised(ConvNet(8)).state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=False)


def write_program(path: Path) -> None:
    program = torch.export.export(randomised(ConvNet(8)), (torch.zeros(1, *INPUT_SHAPE),))
    torch.export.save(program, path)


def write_compressed(path: Path) -> None:
    net = randomised(ConvNet(8))
    torch.save(
        {"state_dict": net.state_dict(), "plan": {}, "arch": ARCH, "arch_args": {"width": 8},
         "input_shape": list(INPUT_SHAPE), "dropped": [], "form": "module"}, path,
    )  # fmt: skip


def read_compressed(path: Path) -> None:
    compressor.load_compressed(path, arch=ARCH)


def train(path: Path) -> None:
    """One step, or what is left of it."""
    images, labels = map(torch.from_numpy, blob_images(8, np.random.default_rng(0)))
    fine_tune(
        randomised(ConvNet(8)), LabelledImages(images, labels, (), ()),
        Recipe(n_steps=1, learning_rate=0.1, batch_size=8), checkpoint=path,
        teacher=None, score=lambda _: 0.5, on_progress=lambda _: None,
    )  # fmt: skip


UNKNOWN_FIELD = b"\xc0\x3e\x01"  # number 1000, which protobuf leaves aside


def write_onnx(path: Path) -> None:
    export_onnx(randomised(ConvNet(8)), torch.zeros(1, *INPUT_SHAPE), path, opset=13)


def read_onnx(path: Path) -> None:
    content = path.read_bytes()
    check_same_inputs(content, content + UNKNOWN_FIELD)
    estimate_ms(content, targets.load_target("raspberry-pi-4", estimate=True))


TIMES = [
    {
        "startInMs": i,
        "endInMs": i + 1,
        "startComputeMs": i,
        "endComputeMs": i + 1,
        "computeMs": 0.5,
    }
    for i in range(600, 640)
]
LOG = (
    "&&&& RUNNING TensorRT.trtexec [TensorRT v8201] # trtexec --onnx=m.onnx\n"
    "[11/22/2026-10:00:00] [I] Capturing CUDA graph for the current execution context\n"
    "[11/22/2026-10:00:00] [E] [TRT] ModelImporter.cpp:773: While parsing node number 3 [Conv]\n"
    "[11/22/2026-10:00:00] [E] [TRT] ERROR: out of memory\n  --memPoolSize\n  --fp16\n"
    "power NV Power Mode: MAXN\nclock 57000000.gpu 921600000 76800000 921600000\ntemp 45000 GPU\n"
)


def read_log(path: Path) -> None:
    text = path.read_bytes().decode(errors="replace")
    capabilities, state = Capabilities.of_help(text), read_state(text)
    assert capabilities.version_text
    for code in (1, -9, 124, 137, 139, -500, 70_000):
        assert str(classify(text, code))
    conditions(text)
    changes(state, state)


ANSWERS = (
    '[ $(wc -l < "$0") -gt 1 ] || exec cat "$0"; head -n 1 "$0"; read -r asked; tail -n +2 "$0"'
)


def read_answer(path: Path) -> None:
    """Of a process whose first line is its hello, and that says the rest whatever it is asked."""

    def start(log: Path) -> subprocess.Popen[bytes]:
        log.touch()
        with WATCH.looking_away():
            return subprocess.Popen(
                ["sh", "-c", ANSWERS, str(path)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip

    runner = Runner(start, "a device")
    try:
        runner.ask({"do": "pair"}, limit_s=5)
    finally:
        runner.close()


def write_answer(path: Path) -> None:
    lines = [{"protocol": 2, "runtime": "onnxruntime"}, {"original_ms": [1, 2], "clock": 1.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


BORDERS: dict[str, Border] = {
    "compress.toml": Border(
        "compress.toml", write_config, lambda path: load_config(path.parent / "model.pt", {}),
        mutations.of_toml,
    ),
    "config.toml of a run": Border(
        "config.toml", write_settings, read_settings, mutations.of_toml
    ),
    "device profile": Border(
        "nano.toml", write_profile, lambda path: targets.load_target(str(path)), mutations.of_toml
    ),
    "devices.toml": Border(
        "compressor/devices.toml",
        lambda path: path.write_text('[my-nano]\naddress = "ssh://user@host:22"\npython = "p"\n'),
        read_device, mutations.of_toml,
    ),
    "probe": Border(
        "probe.json",
        lambda path: path.write_text('{"schema": 1, "step": 16, "date": "2026-01-01"}'),
        schema.probed, mutations.of_json,
    ),
    "study.db": Border("study.db", write_study, read_study, mutations.of_bytes),
    "result.json": Border("result.json", write_result, read_result, mutations.of_json),
    "manifest.json": Border("manifest.json", write_manifest, read_manifest, mutations.of_json),
    "images in an .npz": Border("images.npz", write_images, load_data, mutations.of_zip),
    "an image file": Border("image.png", write_png, read_png, mutations.of_bytes),
    "state_dict": Border("model.pt", write_weights, read_weights, mutations.of_zip),
    "state_dict of old": Border("model.pt", write_legacy, read_weights, mutations.of_bytes),
    "program": Border(
        "model.pt2", write_program, lambda path: compressor.load_model(path), mutations.of_zip
    ),
    "model.pt of a run": Border("model.pt", write_compressed, read_compressed, mutations.of_zip),
    "half-trained network": Border(
        "training.pt", train, train, mutations.of_zip
    ),
    "ONNX file": Border("model.onnx", write_onnx, read_onnx, mutations.of_bytes),
    "trtexec's times": Border(
        "times.json", lambda path: path.write_text(json.dumps(TIMES)),
        lambda path: read_times(path.read_bytes().decode(errors="replace"), 610.0),
        mutations.of_json,
    ),
    "trtexec's log": Border(
        "log.txt", lambda path: path.write_text(LOG), read_log, mutations.of_text
    ),
    "a runner's answers": Border("answer", write_answer, read_answer, mutations.of_text),
}  # fmt: skip


@pytest.fixture(scope="module")
def goods(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Border -> content of a good file, which is read without an error."""
    contents = {}
    for i, (what, border) in enumerate(BORDERS.items()):
        path = tmp_path_factory.mktemp(f"good{i}") / border.name
        path.parent.mkdir(exist_ok=True)
        border.good(path)
        contents[what] = path.read_bytes()
    return contents


def check(border: Border, good: bytes, n_cases: int) -> None:
    """So many spoiled files."""

    @settings(
        max_examples=n_cases, deadline=None, database=None, derandomize=True,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(content=border.spoiled(good))
    def survives(content: bytes) -> None:
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "in" / border.name
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
            with guarded(path.parent), contextlib.suppress(CompressorError):
                border.read(path)

    survives()


@pytest.mark.parametrize("what", BORDERS)
def test_a_good_file_is_read(what: str, goods: dict[str, bytes], tmp_path: Path) -> None:
    """Else nothing would be shown by the spoiled ones."""
    border = BORDERS[what]
    path = tmp_path / border.name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(goods[what])
    with guarded(tmp_path):
        border.read(path)


@pytest.mark.bad_input("spoiled files, of 19 kinds", n=N_CASES)
@pytest.mark.parametrize("what", BORDERS)
def test_a_spoiled_file_is_an_error(what: str, goods: dict[str, bytes]) -> None:
    check(BORDERS[what], goods[what], N_CASES)


@pytest.mark.bad_input("spoiled files, of 19 kinds", n=N_CASES_SLOW)
@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("what", BORDERS)
def test_many_spoiled_files(what: str, goods: dict[str, bytes]) -> None:
    """More than 10,000 of all kinds together."""
    assert N_CASES_SLOW * len(BORDERS) >= 10_000
    check(BORDERS[what], goods[what], N_CASES_SLOW)
