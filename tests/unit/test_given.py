"""What inputs of whole numbers are timed with."""

import io
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from compressor import compare_latency, load_target
from compressor.errors import MeasurementError
from compressor.exporter import Way, names_in, whole_inputs, written
from compressor.latency.given import as_file, whole_numbers
from compressor.latency.timing import TRIAL


class Looks(nn.Module):
    """Looks ids up in two tables, of 40 and 30 rows, and kinds in one of 3."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(40, 4), nn.Embedding(30, 4)])
        self.of_kinds = nn.Embedding(3, 4)

    def forward(self, ids: Tensor, kinds: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        x = self.tables[0](ids) + self.tables[1](ids.reshape(1, -1)) + self.of_kinds(kinds)
        return x * mask[..., None].float() * scale


def example() -> tuple[Tensor, ...]:
    ids = torch.tensor([[29, 0, 7, 12]])
    return ids, torch.tensor([[2, 0, 1, 1]], dtype=torch.int32), ids > 5, torch.rand(1, 1, 1)


@pytest.fixture
def content() -> bytes:
    net = Looks().eval()
    return written(net, example(), net(*example()), Way(), fold=True)


def test_ids_are_drawn_from_the_smallest_table_that_they_are_looked_up_in(content: bytes) -> None:
    drawn = whole_numbers(content, {})
    assert {name: each.dtype for name, each in drawn.items()} == {
        "input_0": np.int64, "input_1": np.int32, "input_2": np.bool_
    }  # fmt: skip
    assert 0 <= drawn["input_0"].min() <= drawn["input_0"].max() < 30
    assert 0 <= drawn["input_1"].min() <= drawn["input_1"].max() < 3
    assert drawn["input_2"].all()
    session = onnxruntime.InferenceSession(content)
    (answer,) = session.run(None, drawn | {"input_3": np.ones((1, 1, 1), np.float32)})
    assert np.isfinite(answer).all()


def test_what_is_known_is_taken(content: bytes) -> None:
    real = whole_inputs(Looks(), example())
    assert sorted(real) == ["input_0", "input_1", "input_2"]
    for name, given in whole_numbers(content, real).items():
        np.testing.assert_array_equal(given, real[name])
    with np.load(io.BytesIO(as_file(real))) as archive:
        assert all(np.array_equal(archive[name], real[name]) for name in real)


def test_what_does_not_fit_is_told(content: bytes) -> None:
    with pytest.raises(MeasurementError, match=r"input_0 has the shape \[1, 4\].* \[2, 4\]"):
        whole_numbers(content, {"input_0": np.zeros((2, 4))})
    assert whole_numbers(b"\xff\xff\xff", {}) == {}  # which its runtime refuses


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (torch.zeros(1), ["input"]),
        ((torch.zeros(1), torch.zeros(1)), ["input_0", "input_1"]),
        ({"ids": torch.zeros(1), "mask": torch.zeros(1)}, ["ids", "mask"]),
        (([torch.zeros(1), torch.zeros(1)], None, 3.0), ["input_0_0", "input_0_1", "input_2"]),
    ],
)
def test_names_of_inputs_say_where_they_belong(given: object, names: list[str]) -> None:
    assert names_in(given) == names  # type: ignore[arg-type]


def test_a_file_that_reads_ids_is_measured(content: bytes, tmp_path: Path) -> None:
    """Normal random numbers would be refused; ids drawn at will would lie outside of a table."""
    (tmp_path / "looks.onnx").write_bytes(content)
    pair = compare_latency(content, tmp_path / "looks.onnx", load_target("host-cpu"), effort=TRIAL)
    assert pair.original.n > 10
    assert 0.2 < pair.ratio < 5
