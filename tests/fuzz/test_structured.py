"""Well-formed files of strangers with one field of another value: an error of ours, or a reading.

As in `test_borders`: nothing else is raised, run, started or written, and all of it soon.
"""

import contextlib
import random
import shutil
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
from PIL import Image
from safetensors.torch import save_file

from compressor import border, run_folder
from compressor.datasets import load_data
from compressor.errors import CompressorError
from compressor.latency.estimate import estimate_ms
from compressor.latency.machine import check_same_inputs, content_of
from compressor.latency.targets import load_target
from compressor.search.study import Study, read_corrections, read_trials
from compressor.search.study_file import reading_storage
from tests.conftest import ConvNet, randomised
from tests.fuzz import structured, test_borders
from tests.fuzz.guard import guarded
from tests.fuzz.test_borders import BORDERS
from tests.unit.test_space import space_of

N_CASES, N_CASES_SLOW = 6, 250  # of every kind
SPACE = space_of([64, 32], step=16)


@dataclass(frozen=True)
class Kind:
    """One kind of file, and what opens it.

    Attributes:
        name: Of the file that is changed.
        good: Writes a good one, and what lies beside it.
        read: Every door that reads it.
        changed: What becomes of it.
    """

    name: str
    good: Callable[[Path], object]
    read: Callable[[Path], object]
    changed: structured.Change


def of_border(name: str, changed: structured.Change) -> Kind:
    border_ = BORDERS[name]
    return Kind(border_.name, border_.good, border_.read, changed)


def write_safetensors(path: Path) -> None:
    save_file(dict(randomised(ConvNet(8)).state_dict()), path, {"format": "pt"})


def write_split_onnx(path: Path) -> None:
    test_borders.write_onnx(path)
    onnx.save(
        onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0
    )


def read_onnx(path: Path) -> None:
    content = content_of(path)
    check_same_inputs(content, content + test_borders.UNKNOWN_FIELD)
    estimate_ms(content, load_target("raspberry-pi-4", estimate=True))


def write_jpeg(path: Path) -> None:
    test_borders.write_png(path)
    with Image.open(path) as image:
        image.load()
    image.save(path, "JPEG", quality=90, exif=Image.Exif())


def write_run(path: Path) -> None:
    """A folder as a run leaves that was stopped."""
    test_borders.write_study(path.with_name("study.db"))
    test_borders.write_settings(path.with_name("config.toml"))
    test_borders.write_manifest(path.with_name("manifest.json"))


def read_run(path: Path) -> None:
    """By report, replay, resume and the dashboard."""
    study = path.with_name("study.db")
    doors: list[Callable[[], object]] = []
    doors.append(lambda: test_borders.read_study(study))
    doors.append(lambda: read_trials(study))
    doors.append(lambda: read_corrections(study))
    doors.append(lambda: border.check_resumed(path.parent))
    doors.append(lambda: border.check_replayed(path.parent))
    doors.append(lambda: reading_storage(study).get_all_trials(1))
    doors.append(lambda: Study.of_stopped(study, SPACE))
    doors.append(lambda: Study.open(study, SPACE).trials)
    told = []
    for door in doors:
        try:
            door()
        except CompressorError as err:
            told.append(err)
    if told:
        raise told[0]


def go_on(path: Path) -> None:
    """As resume and replay begin."""
    with contextlib.suppress(CompressorError):
        border.check_resumed(path.parent)
    border.check_replayed(path.parent)


def of_beside(path: Path) -> None:
    write_run(path)
    path.write_bytes(path.with_name("study.db").read_bytes())  # which a journal is made of


KINDS = {
    "state_dict": of_border("state_dict", structured.of_archive),
    "model.pt of a run": of_border("model.pt of a run", structured.of_archive),
    "half-trained network": of_border("half-trained network", structured.of_archive),
    "program": of_border("program", structured.of_archive),
    ".safetensors": Kind(
        "model.safetensors", write_safetensors, test_borders.read_weights,
        structured.of_safetensors,
    ),
    ".npz": Kind("images.npz", test_borders.write_images, load_data, structured.of_npz),
    "ONNX": Kind("model.onnx", test_borders.write_onnx, read_onnx, structured.of_onnx),
    "ONNX in two files": Kind("model.onnx", write_split_onnx, read_onnx, structured.of_onnx),
    "study.db": Kind("study.db", write_run, read_run, structured.of_study),
    "journal": Kind("study.db-journal", of_beside, read_run, structured.of_journal),
    "PNG": Kind("a.png", test_borders.write_png, test_borders.read_png, structured.of_png),
    "JPEG": Kind("a.jpg", write_jpeg, test_borders.read_png, structured.of_jpeg),
    "config.toml of a run": Kind("config.toml", write_run, go_on, structured.of_toml),
    "manifest.json of a run": Kind("manifest.json", write_run, go_on, structured.of_json),
    **{name: of_border(name, structured.of_json) for name in ("result.json", "probe")},
    **{
        name: of_border(name, structured.of_toml)
        for name in ("compress.toml", "device profile", "devices.toml")
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def goods(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> folder with a good file."""
    folders = {}
    for i, (what, kind) in enumerate(KINDS.items()):
        folders[what] = tmp_path_factory.mktemp(f"good{i}")
        path = folders[what] / kind.name
        path.parent.mkdir(exist_ok=True)
        kind.good(path)
    return folders


def check(what: str, good: Path, n_cases: int, first: int = 0) -> None:
    """So many changed files; every failure is told, with the seed that makes it again."""
    kind, failures, n_read = KINDS[what], [], 0
    content = (good / kind.name).read_bytes()
    for seed in range(first, first + n_cases):
        changed = kind.changed(content, random.Random(f"{what} {seed}"))
        with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
            outside = Path(name, "owned")
            outside.write_text("mine")
            shutil.copytree(good, Path(name, "in"))
            path = Path(name, "in", kind.name)
            path.write_bytes(changed)
            try:
                with guarded(path.parent), contextlib.suppress(CompressorError):
                    kind.read(path)
                    n_read += 1
            except (Exception, RecursionError):  # noqa: BLE001  each is a failure, and told
                failures.append(f"seed {seed}: {traceback.format_exc()[-1500:]}")
            if outside.read_text() != "mine" or len(list(Path(name).iterdir())) != 2:
                failures.append(f"seed {seed}: something outside was touched")
    assert not failures, f"{len(failures)} of {n_cases}:\n" + "\n".join(failures[:4])
    assert n_read < n_cases or n_cases <= N_CASES or what in ("JPEG", "half-trained network"), what


@pytest.mark.parametrize("what", KINDS)
def test_a_good_file_is_read(what: str, goods: dict[str, Path], tmp_path: Path) -> None:
    """Else nothing would be shown by the changed ones."""
    shutil.copytree(goods[what], tmp_path / "in")
    path = tmp_path / "in" / KINDS[what].name
    if what == "journal":
        path.unlink()
    with guarded(path.parent):
        if KINDS[what].read in (read_run, go_on):
            assert len(read_trials(path.with_name("study.db"))) == 2
            assert run_folder.read_settings(path.parent)["target"] == "host-cpu"
        else:
            KINDS[what].read(path)


@pytest.mark.bad_input("well-formed files with one field changed, of 19 kinds", n=N_CASES)
@pytest.mark.parametrize("what", KINDS)
def test_a_changed_field_is_an_error_or_read(what: str, goods: dict[str, Path]) -> None:
    check(what, goods[what], N_CASES)


@pytest.mark.bad_input("well-formed files with one field changed, of 19 kinds", n=N_CASES_SLOW)
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("what", KINDS)
def test_many_changed_fields(what: str, goods: dict[str, Path]) -> None:
    check(what, goods[what], N_CASES_SLOW, first=N_CASES)
