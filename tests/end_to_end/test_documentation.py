"""Every block of every page is done as a reader would do it; links, pictures and tables are true.

Nothing is skipped: a block of an unknown kind is a failure. Blocks that take minutes
(`TAKES_LONG`) are done under the marker `slow`, with all others of their page.
"""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image

import compressor
from benchmarks import peers
from docs.build import COMPARISON, README, cut, demo_report
from docs.draw import PICTURES, draw_all, fingerprint
from tests.conftest import INPUT_SHAPE, ConvNet, randomised
from tests.device.conftest import board, needs_sshd
from tests.end_to_end.pages import PAGES, ROOT, Block, anchors, blocks, references
from tests.end_to_end.reader import (
    MEANT_BY_DOTS,
    SMALL,
    Reader,
    board_tools,
    measuring_in_a_hurry,
)  # fmt: skip

__all__ = ["board"]  # a fixture

TAKES_LONG = re.compile(  # training, and engines that are built over SSH one by one
    r"samples/\w+/train|samples/detection/|compress samples/(segmentation|yolo)|"
    r"probe --target jetson|compress model.pt --target nvidia"
)
NEEDS_DEVICE = re.compile(r"\.local\b|--device my-")
EACH_BY_ITSELF = ("docs/recipes.md",)  # its sections say so
NEEDS_PACKAGE = {"docs/yolo.md": "ultralytics"}  # which is no dependency
QUICK_START = "docs/quick_start.md"
N_CLASSES = 10  # of the quick start
MY_MODULE = """\
from torch import nn

from tests.conftest import make_conv_net


def make_net():  # that of the tests, for image files, which are read as colour
    net = make_conv_net()
    net.stem = nn.Conv2d(3, 32, 3, padding=1)
    return net
"""


def takes_long(block: Block) -> bool:
    """Whether it is done in the long tests only."""
    return TAKES_LONG.search(block.content) is not None


def parts() -> dict[str, list[Block]]:
    """What is read in one go: a page, or a section of one."""
    found: dict[str, list[Block]] = {}
    for page in PAGES:
        for block in blocks(page):
            by_itself = block.page in EACH_BY_ITSELF
            name = f"{block.page}: {block.section}" if by_itself else block.page
            found.setdefault(name, []).append(block)
    return found


PARTS = parts()
LONG = {name: found for name, found in PARTS.items() if any(map(takes_long, found))}


@pytest.fixture(scope="module", autouse=True)
def _hurry() -> Iterator[None]:
    with measuring_in_a_hurry():
        yield


@pytest.fixture(scope="module")
def supplies(trained: Path, blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages take for granted: a model, images, the factory, ONNX files, the samples."""
    folder = tmp_path_factory.mktemp("supplies")
    weights = torch.load(trained)
    torch.save(weights | {"stem.weight": weights["stem.weight"].repeat(1, 3, 1, 1) / 3},
               folder / "model.pt")  # fmt: skip
    (folder / "compress.toml").write_text(tomli_w.dumps(SMALL))
    package = folder / "my_package"
    package.mkdir()
    (package / "my_module.py").write_text(MY_MODULE)
    with np.load(blobs) as arrays:
        for split, n in (("fit", 150), ("search", 60), ("test", 60)):
            images, labels = arrays[f"{split}_images"][:n, 0], arrays[f"{split}_labels"][:n]
            write_images(folder / "images" / split, images, labels)
    net, example = randomised(ConvNet()), torch.zeros(1, *INPUT_SHAPE)
    for name in ("original", "shipped"):
        compressor.export_onnx(net, example, folder / f"{name}.onnx")
    small = compressor.prune(net, example, 0.5, step=16)
    for name in ("model", "new"):
        compressor.export_onnx(small, example, folder / f"{name}.onnx")
    leave = shutil.ignore_patterns("*.pt", "*.npz", "__pycache__", "runs")
    shutil.copytree(ROOT / "samples", folder / "samples", ignore=leave)
    digits = folder / "samples" / "digits"  # which `make demo` would train
    shutil.copy(trained, digits / "model.pt")
    settings = SMALL | {"arch": "tests.conftest:make_conv_net", "data": str(blobs)}
    (digits / "compress.toml").write_text(tomli_w.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def finished(supplies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was finished before, for sections that take one for granted."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = compressor.load_config(
        supplies / "model.pt",
        {
            "target": "host-cpu", "speedup": 1.1, "arch": MEANT_BY_DOTS["--arch"],
            "data": supplies / "images", "out": folder,
        },
    )  # fmt: skip
    compressor.compress(config)
    return folder


@pytest.fixture
def reader(
    request: pytest.FixtureRequest, supplies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Reader]:
    """In a new folder, which suits the part of the documentation that the test is about."""
    found = PARTS[request.node.callspec.params["name"]]
    package = NEEDS_PACKAGE.get(found[0].page)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    folder = tmp_path / "folder"
    shutil.copytree(supplies, folder)
    if found[0].page in EACH_BY_ITSELF:
        shutil.copytree(request.getfixturevalue("finished"), folder / "runs" / "model-host-cpu")
    if found[0].page == QUICK_START:
        colourful_images(folder / "images")
        (folder / "model.pt").unlink()
    a_board = None
    if any(NEEDS_DEVICE.search(block.content) for block in found):
        if needs_sshd.mark.args[0]:
            pytest.skip(str(needs_sshd.mark.kwargs["reason"]))
        with monkeypatch.context() as before:
            tools = board_tools(tmp_path / "board-tools", tmp_path / "tools")
            before.setenv("PATH", f"{tools}:{os.environ['PATH']}")
            a_board = request.getfixturevalue("board")
    opened = Reader(folder, monkeypatch)
    if a_board is not None:
        opened.use(a_board)
    yield opened
    opened.close()


def write_images(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """PNG files in class folders."""
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / f"class-{label}" / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def colourful_images(folder: Path) -> None:
    """As many classes as the network of the quick start has, in place of what is in `folder`."""
    shutil.rmtree(folder)
    generator = np.random.default_rng(0)
    for split, n in (("train", 8), ("val", 3), ("test", 3)):
        labels = np.repeat(np.arange(N_CLASSES), n)
        images = generator.integers(0, 256, (len(labels), 40, 40, 3), dtype=np.uint8)
        write_images(folder / split, images, labels)


@pytest.mark.parametrize("name", PARTS)
def test_a_reader_can_do_what_it_says(reader: Reader, name: str) -> None:
    for block in PARTS[name]:
        if not takes_long(block):
            reader.follow(block)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", LONG)
def test_and_what_takes_long(reader: Reader, name: str) -> None:
    for block in LONG[name]:
        reader.follow(block)


def test_a_block_says_what_it_is() -> None:
    for info, content in (("", "latency  0.9 ms\n"), ("ruby", "puts 1\n"), ("", "")):
        with pytest.raises(ValueError, match="a block"):
            _ = Block("page.md", "", 1, info, content).kind
    assert Block("page.md", "", 1, "", "compress targets\n").kind == "shell"
    console = Block("page.md", "", 1, "console", "$ compress targets\nhost-cpu\n")
    assert console.commands() == "compress targets\n"


@pytest.mark.parametrize(
    ("info", "content"),
    [
        ("bash", "false\n"), ("bash", "compress no-such-model.pt --target host-cpu\n"),
        ("bash", "pip install -e '.[no-such-extra]'\n"), ("bash", "make no-such-target\n"),
        ("bash", "pip install no-such-package\n"), ("bash", "python samples/no_such_script.py\n"),
        ("python", "import compressor\n\ncompressor.no_such_name\n"),
        ("toml", "no-such-setting = 1\n"), ("toml", '[my-nano]\naddress = "no address"\n'),
        ("toml", '# my.toml\n[runtime]\nkind = "no such runtime"\n'), ("yaml", "job:\n"),
        ("text", ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", [next(iter(PARTS))])
def test_a_block_that_does_not_work_is_found(
    reader: Reader, name: str, info: str, content: str
) -> None:
    faults = (AssertionError, AttributeError, compressor.CompressorError)
    with pytest.raises(faults):
        reader.follow(Block(name, "", 1, info, content))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for reference in references(page):
        path, _, anchor = reference.partition("#")
        if "://" in reference:
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {reference}"
        assert there.is_relative_to(ROOT), reference
        if anchor:
            assert anchor in anchors(there), f"{page.name}: {reference}"


def test_every_page_is_in_the_index() -> None:
    named = {reference.partition("#")[0] for reference in references(ROOT / "docs" / "README.md")}
    missing = {page.name for page in PAGES if page.parent.name == "docs"} - named - {"README.md"}
    assert not missing


def test_the_reference_has_every_public_name_and_nothing_that_is_gone() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    homes = re.findall(r"^::: (compressor[\w.]*)\.(\w+)$", page, re.M)
    for module, name in homes:
        assert hasattr(importlib.import_module(module), name)
    assert len(homes) == len(set(homes))
    for name in compressor.__all__:
        assert (compressor._HOME_OF[name], name) in homes


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for name in compressor.__all__:
        assert f'id="{compressor._HOME_OF[name]}.{name}"' in page
    assert (tmp_path / "site" / "source" / "samples" / "digits" / "train.py.txt").is_file()


def test_every_picture_is_named_and_there(tmp_path: Path) -> None:
    """And can be drawn again from figures that are kept."""
    folder = ROOT / "docs" / "pictures"
    named = {
        (page.parent / reference).resolve()
        for page in PAGES
        for reference in references(page)
        if reference.endswith((".svg", ".png"))
    }
    there = set(folder.iterdir())
    assert named == there
    assert {path.stem for path in there} == set(PICTURES)
    for path in there:
        assert f"made from {fingerprint()}<" in path.read_text(encoding="utf-8"), "run `make docs`"
    assert sorted(path.name for path in draw_all(tmp_path / "again")) == sorted(
        path.name for path in there
    )


@pytest.mark.parametrize(
    ("page", "made"), [(COMPARISON, peers.report), (README, peers.summary)], ids=["docs", "README"]
)
def test_tables_hold_nothing_that_was_not_measured(
    page: Path, made: Callable[[Path], str]
) -> None:
    _, tables, _ = cut(page)
    rows = [line for line in tables.splitlines() if line.startswith("| ")]
    assert rows
    assert set(rows) <= set(made(peers.RESULTS).splitlines())


@pytest.mark.parametrize("page", ["README.md", QUICK_START])
def test_the_output_of_the_demo_is_that_of_its_result(page: str) -> None:
    assert f"{demo_report()}\n" in {block.content for block in blocks(ROOT / page)}


def test_make_docs_makes_them() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^docs:.*\n\t.*python -m docs.build\n\t.*mkdocs build --strict$", text, re.M)
    assert re.search(r"^\.PHONY:.* docs\b", text, re.M)
