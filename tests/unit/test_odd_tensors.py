"""State dicts whose tensors are none that a network could be given: a sentence each."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressor.errors import ModelError
from compressor.model_io import load_model

ARCH = "tests.conftest:make_conv_net"


def sparse(tensor: Tensor) -> Tensor:
    return tensor.to_sparse()


def on_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def quantised(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch leaves this kind, which old files still have
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def nested(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([tensor, tensor])


@pytest.mark.bad_input("state dicts of sparse, meta, quantised and nested tensors")
@pytest.mark.parametrize("odd", [sparse, on_meta, quantised, nested])
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_of_another_kind_is_a_sentence(
    odd: object, trained: Path, tmp_path: Path
) -> None:
    assert callable(odd)
    weights = torch.load(trained)
    weights["stem.weight"] = odd(weights["stem.weight"])
    path = tmp_path / "odd.pt"
    torch.save(weights, path)
    with pytest.raises(ModelError) as refused:
        load_model(path, arch=ARCH)
    assert "\n" not in str(refused.value)
