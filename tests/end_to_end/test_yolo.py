"""The sample with Ultralytics' YOLO, where that package is; it is no dependency.

`docs/yolo.md` is followed as every page is, in test_documentation.py.
"""

import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

import compressor
from tests.end_to_end.pages import PYTHON, ROOT, blocks
from tests.end_to_end.scripts import module_of

SAMPLE = ROOT / "samples" / "yolo"
PAGE = ROOT / "docs" / "yolo.md"


@pytest.fixture(scope="module")
def detector() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    return module_of(SAMPLE / "detector.py")


@pytest.fixture(scope="module")
def boxes(detector: ModuleType) -> ModuleType:
    return module_of(SAMPLE / "boxes.py")


def test_the_page_quotes_the_sample() -> None:
    quoted = [block.content for block in blocks(PAGE) if block.kind == PYTHON]
    assert quoted
    assert all(content in (SAMPLE / "detector.py").read_text() for content in quoted)


def test_boxes_are_those_of_ultralytics(detector: ModuleType) -> None:
    model = detector.yolov8n().eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        theirs = model.net(images)[0]  # centres and sizes, then scores
        corners, scores = detector.decoded(model(images), 64)
    sizes, middles = corners[..., 2:] - corners[..., :2], (corners[..., 2:] + corners[..., :2]) / 2
    torch.testing.assert_close(torch.cat([middles, sizes, scores], 2).transpose(1, 2), theirs)


def test_average_precision_of_a_list_by_hand(boxes: ModuleType) -> None:
    """Right, wrong, right, and one that is never found: 1/3 at 1, 1/3 at 2/3."""
    found = [(0, 0.9, True), (0, 0.8, False), (0, 0.7, True), (1, 0.95, False)]
    judged = [boxes.Judged(found, [3, 1, 0])]
    assert boxes.average_precision(judged, 0) == pytest.approx(1 / 3 + 1 / 3 * 2 / 3)
    assert boxes.average_precision(judged, 1) == 0
    assert boxes.average_precision([boxes.Judged([(0, 0.9, True)], [1, 0, 0])] * 4, 0) == 1


def test_a_shape_is_found_once(boxes: ModuleType) -> None:
    corners = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 14], [30, 30, 50, 50]])
    scores = torch.tensor([[0.9, 0, 0], [0.8, 0, 0], [0, 0.7, 0]])
    target = torch.tensor([[0.0, 0, 0, 10, 11], [2, 30, 30, 50, 50]])
    found, wanted = boxes.judged(corners, scores, target)
    assert [(kind, hit) for kind, _, hit in found] == [(0, True), (1, False)]
    assert wanted == [1, 0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
def test_half_of_all_channels_go(detector: ModuleType, name: str, tmp_path: Path) -> None:
    """`prune` and `export_onnx` prove their results themselves."""
    model, example = getattr(detector, name)().eval(), torch.rand(1, 3, 64, 64)
    small = compressor.prune(model, example, 0.5)
    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, small))
    assert after < 0.3 * before
    compressor.export_onnx(small, example, tmp_path / "small.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
def test_images_of_other_sizes_go_too(detector: ModuleType, name: str) -> None:
    model = getattr(detector, name)().eval()
    small = compressor.prune(model, torch.rand(1, 3, 64, 64), 0.5)
    other = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        shapes = [{key: t.shape for key, t in each(other).items()} for each in (model, small)]
    assert shapes[0] == shapes[1]
