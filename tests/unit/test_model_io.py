"""Which model files are taken, and what is said of the others."""

import argparse
import copy
import gzip
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from compressor.errors import ModelError, UntrustedModelError
from compressor.model_io import load_model
from compressor.model_io.architectures import build
from compressor.model_io.weights import load_weights, unwrapped
from tests.conftest import INPUT_SHAPE, ConvNet

ARCH = "tests.conftest:make_conv_net"


@pytest.fixture
def weights(conv_net: ConvNet, tmp_path: Path) -> Path:
    path = tmp_path / "weights.pt"
    torch.save(conv_net.state_dict(), path)
    return path


def load(path: Path, **options: object) -> nn.Module:
    defaults: dict[str, object] = {"arch": ARCH, "input_shape": INPUT_SHAPE}
    return load_model(path, **(defaults | options)).module  # type: ignore[arg-type]


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    want = expected.state_dict()
    assert model.state_dict().keys() == want.keys()
    assert all(torch.equal(want[k], v) for k, v in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "data parallel", "compiled"])
def test_state_dicts_and_checkpoints(wrap: str, conv_net: ConvNet, tmp_path: Path) -> None:
    tensors = conv_net.state_dict()
    content: dict[str, object] = {
        "plain": tensors,
        "state_dict": {"epoch": 3, "state_dict": tensors},
        "model": {"model": tensors, "optimizer": {}},
        "data parallel": {"state_dict": {f"module.{k}": v for k, v in tensors.items()}},
        "compiled": {f"_orig_mod.{k}": v for k, v in tensors.items()},
    }[wrap]
    torch.save(content, tmp_path / "weights.pt")
    assert_same(load(tmp_path / "weights.pt"), conv_net)


def test_arch_beside_the_model_and_its_arguments(weights: Path) -> None:
    source = "from tests.conftest import ConvNet\n\ndef make(width):\n    return ConvNet(width)\n"
    (weights.parent / "my_own_net.py").write_text(source)
    assert_same(
        load(weights, arch="my_own_net:make", arch_args={"width": 32}),
        load(weights),
    )


def test_example_and_provenance(weights: Path) -> None:
    loaded = load_model(weights, arch=ARCH, input_shape=INPUT_SHAPE)
    assert isinstance(loaded.example_input, Tensor)
    assert loaded.example_input.shape == (1, *INPUT_SHAPE)
    assert loaded.provenance["arch"] == ARCH
    assert len(str(loaded.provenance["sha256"])) == 64


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (None, "holds weights only.*--arch"),
        ("tests.conftest", "package.module:factory"),
        ("no_such_module:make", "cannot import no_such_module"),
        ("tests.conftest:make_conv_nett", "Did you mean 'make_conv_net'"),
        ("tests.conftest:INPUT_SHAPE", "is a tuple; expected a function"),
        ("tests.conftest:blob_images", "does not take --arch-arg"),
        ("builtins:dict", "returned a dict, not an nn.Module"),
    ],
)
def test_bad_architectures_are_named(arch: str | None, message: str, weights: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load(weights, arch=arch)


def test_weights_that_do_not_fit_name_their_keys(conv_net: ConvNet, tmp_path: Path) -> None:
    tensors = conv_net.state_dict()
    tensors["stem.weight"] = tensors["stem.weight"][:5]
    tensors["stranger"] = tensors.pop("head.bias")
    torch.save(tensors, tmp_path / "weights.pt")
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "weights.pt")
    message = str(caught.value)
    assert "missing in the file: head.bias" in message
    assert "not in the network: stranger" in message
    assert "stem.weight is (5, 1, 3, 3)" in message
    assert "has (32, 1, 3, 3)" in message


def test_nan_weights_are_named(conv_net: ConvNet, tmp_path: Path) -> None:
    conv_net.last.weight.data[3, 2] = float("nan")
    torch.save(conv_net.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=r"9 of \d+ values of last\.weight are NaN"):
        load(tmp_path / "weights.pt")


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path("exploded").write_text, ("boom",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_a_pickle_is_not_run_without_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Bomb(), "zip.pt")
    torch.save(Bomb(), "legacy.pt", _use_new_zipfile_serialization=False)
    Path("plain.pt").write_bytes(pickle.dumps(Bomb()))
    for name in ("zip.pt", "legacy.pt", "plain.pt"):
        with pytest.raises(ModelError):
            load(Path(name))
        assert not Path("exploded").exists()


def test_a_pickled_module_needs_trust(conv_net: ConvNet, tmp_path: Path) -> None:
    path = tmp_path / "module.pt"
    torch.save(conv_net, path)
    with pytest.raises(UntrustedModelError, match=r"state_dict.*--trust"):
        load(path)
    assert_same(load(path, trust=True, arch=None), conv_net)


@pytest.mark.parametrize("name", ["m.onnx", "m.pt2", "m.engine", "m.safetensors"])
def test_other_formats_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"something")
    with pytest.raises(ModelError, match=r"m\.\w+ is (an?|not a) "):
        load(tmp_path / name)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_is_refused_by_name(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "m.pt")
    with pytest.raises(ModelError, match="TorchScript"):
        load(tmp_path / "m.pt")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 half a zip", b"\x80\x02}"])
def test_unreadable_files_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.pt"):
        load(tmp_path / "m.pt")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, torch.zeros(2), "text"])
def test_files_without_a_state_dict_are_named(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(ModelError, match="expected a state_dict"):
        load(tmp_path / "m.pt")


def test_missing_file_and_shape(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No model file at"):
        load(tmp_path / "none.pt")
    with pytest.raises(ModelError, match="--input-shape"):
        load(weights, input_shape=None)


BROKEN = {
    "raises": "def make():\n    raise ValueError('no such depth')\n",
    "typo": "def make(:\n",
    "at_import": "1 / 0\n",
    "sibling": "def make():\n    from no_sibling import thing\n",
    "ends": "import sys\ndef make():\n    sys.exit('usage: make')\n",
    "own": "class Own(Exception): pass\ndef make():\n    raise Own('of its own kind')\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_errors_in_the_users_code_are_told_with_their_line(name: str, weights: Path) -> None:
    (weights.parent / f"broken_{name}.py").write_text(BROKEN[name])
    with pytest.raises(ModelError, match=rf"--arch broken_{name}:make.*broken_{name}\.py"):
        load(weights, arch=f"broken_{name}:make")


def test_a_factory_may_import_its_neighbours(weights: Path) -> None:
    (weights.parent / "neighbour_a.py").write_text("from tests.conftest import ConvNet\n")
    source = "def make():\n    from neighbour_a import ConvNet\n    return ConvNet()\n"
    (weights.parent / "neighbour_b.py").write_text(source)
    assert isinstance(load(weights, arch="neighbour_b:make"), ConvNet)


def test_two_projects_may_have_modules_of_one_name(conv_net: ConvNet, tmp_path: Path) -> None:
    for width in (32, 16):
        folder = tmp_path / str(width)
        folder.mkdir()
        source = (
            f"from tests.conftest import ConvNet\n\ndef make():\n    return ConvNet({width})\n"
        )
        (folder / "namesake.py").write_text(source)
        torch.save(ConvNet(width).state_dict(), folder / "m.pt")
        net = load(folder / "m.pt", arch="namesake:make")
        assert net.get_parameter("stem.weight").shape[0] == width


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to(torch.complex64), "not of real numbers: stem.weight is torch.complex64"),
        (lambda t: t.to(torch.int32), "not of real numbers: stem.weight is torch.int32"),
    ],
)
def test_weights_of_another_kind_are_named(
    change: Callable[[torch.Tensor], torch.Tensor],
    message: str,
    conv_net: ConvNet,
    tmp_path: Path,
) -> None:
    tensors = conv_net.state_dict()
    tensors["stem.weight"] = change(tensors["stem.weight"])
    torch.save(tensors, tmp_path / "m.pt")
    with pytest.raises(ModelError, match=message):
        load(tmp_path / "m.pt")


def test_networks_that_cannot_be_measured_are_named(tmp_path: Path) -> None:
    half = nn.Conv2d(1, 4, 3).half()
    torch.save(half, tmp_path / "half.pt")
    with pytest.raises(ModelError, match=r"weight is torch\.float16; expected float32"):
        load(tmp_path / "half.pt", trust=True, arch=None)
    for norm in (nn.BatchNorm2d, nn.SyncBatchNorm):
        stateless = nn.Sequential(nn.Conv2d(1, 4, 3), norm(4, track_running_stats=False))
        torch.save(stateless, tmp_path / "stateless.pt")
        with pytest.raises(ModelError, match="1 has no running statistics"):
            load(tmp_path / "stateless.pt", trust=True, arch=None)


@pytest.mark.parametrize(
    ("arch", "args", "shape"),
    [
        ("torchvision:squeezenet1_1", {"num_classes": 7}, (3, 224, 224)),
        ("timm:lcnet_050", {"num_classes": 7, "in_chans": 1}, (3, 224, 224)),
    ],
)
def test_networks_of_libraries_by_name(
    arch: str, args: dict[str, object], shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Without any source of the user's; the input's shape is the architecture's own."""
    if arch.startswith("timm"):
        pytest.importorskip("timm")
    original = build(arch, args, beside=tmp_path)
    torch.save(original.state_dict(), tmp_path / "weights.pt")
    loaded = load_model(tmp_path / "weights.pt", arch=arch, arch_args=args)
    assert isinstance(loaded.example_input, Tensor)
    assert loaded.example_input.shape == (1, *shape)
    assert_same(loaded.module, original)


def test_a_checkpoint_may_name_a_library_network_and_no_other(tmp_path: Path) -> None:
    original = build("torchvision:squeezenet1_1", {}, beside=tmp_path)
    path = tmp_path / "weights.pt"
    torch.save({"arch": "torchvision:squeezenet1_1", "state_dict": original.state_dict()}, path)
    assert_same(load_model(path).module, original)
    for arch in ("os:system", "resnet18", "tests.conftest:make_conv_net"):
        torch.save({"arch": arch, "state_dict": original.state_dict()}, path)
        with pytest.raises(ModelError, match=rf"it says arch='{arch}'.*--arch torchvision:NAME"):
            load_model(path)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (
            "torchvision:resnet81",
            r"has no network 'resnet81'\. Did you mean .*resnet18",
        ),
        ("timm:resnet81", r"timm has no network 'resnet81'\. Did you mean"),
        ("torchvision:squeezenet1_1", r"have 7 classes: give --arch-arg num_classes=7"),
    ],
)
def test_library_names_are_helped_with(arch: str, message: str, tmp_path: Path) -> None:
    if arch.startswith("timm"):
        pytest.importorskip("timm")
    original = build("torchvision:squeezenet1_1", {"num_classes": 7}, beside=tmp_path)
    torch.save(original.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / "weights.pt", arch=arch)


def test_arguments_that_a_library_does_not_take_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not take --arch-arg {'wings': 2}.*wings"):
        build("torchvision:resnet18", {"wings": 2}, beside=tmp_path)


# --- programs --------------------------------------------------------------------------------


@pytest.fixture
def program(conv_net: ConvNet, tmp_path: Path) -> Path:
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(conv_net, (torch.randn(1, *INPUT_SHAPE),)), path)
    return path


def test_a_program_describes_itself(conv_net: ConvNet, program: Path) -> None:
    loaded = load_model(program)
    assert isinstance(loaded.example_input, Tensor)
    assert loaded.example_input.shape == (1, *INPUT_SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.module(loaded.example_input), conv_net(loaded.example_input)
        )
    with pytest.raises(ModelError, match="describes itself; leave --arch away"):
        load_model(program, arch=ARCH)


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return (Path.touch, (self.proof,))


def rewritten(path: Path, change: Callable[[str, bytes], bytes], **extra: bytes) -> None:
    """The archive with every entry passed through `change`, and `extra` entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(entries)).partition("/")[0]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))
        for name, content in extra.items():
            archive.writestr(f"{root}/{name.replace('__', '/')}", content)


@pytest.mark.bad_input("pickles that run code, in place of every file")
@pytest.mark.parametrize("where", ["sample inputs", "a weight", "an object"])
def test_pickles_in_a_program_run_no_code(where: str, program: Path, tmp_path: Path) -> None:
    """torch.export.load itself would run them: it falls back to the unrestricted unpickler."""
    proof = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save({"a": Payload(proof)}, buffer)
    if where == "sample inputs":
        rewritten(program, lambda n, old: buffer.getvalue() if n.endswith(".pt") else old)
    elif where == "a weight":

        def flag(name: str, old: bytes) -> bytes:
            if not name.endswith("weights_config.json"):
                return buffer.getvalue() if name.endswith("weights/weight_0") else old
            content = json.loads(old)
            for payload in content["config"].values():
                payload["use_pickle"] |= payload["path_name"] == "weight_0"
            return json.dumps(content).encode()

        rewritten(program, flag)
    else:
        rewritten(
            program, lambda _, old: old, data__constants__opaque_obj_0=pickle.dumps(Payload(proof))
        )
    with pytest.raises(UntrustedModelError, match=r"would run code from the file.*--trust"):
        load_model(program)
    assert not proof.exists()


def test_a_program_that_calls_something_else_is_refused(program: Path, tmp_path: Path) -> None:
    """The graph names what is called; names that are no operation on tensors are not followed."""

    def call_system(name: str, old: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return old
        return old.replace(b"torch.ops.aten.relu.default", b"torch.os.system")

    rewritten(program, call_system)
    with pytest.raises(UntrustedModelError, match=r"'torch\.os\.system' where an operator on"):
        load_model(program)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short"])
def test_what_is_no_program_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.pt2").write_bytes(content)
    message = r"not a program that torch\.export\.save wrote" if content else "is empty"
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / "net.pt2")


def wrapped(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def without_counters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}


OPTIMIZER = {
    "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.rand(3)}},
    "param_groups": [],
}

ONE_SET: dict[str, Callable[[Any], Any]] = {
    "plain": lambda s: s,
    "old code": without_counters,
    "DataParallel": lambda s: wrapped("module.", s),
    "compiled": lambda s: wrapped("_orig_mod.", s),
    "compiled DataParallel": lambda s: wrapped("_orig_mod.module.", s),
    "DataParallel of compiled": lambda s: wrapped("module._orig_mod.", s),
    "Lightning": lambda s: {"state_dict": wrapped("model.", s), "epoch": 3, "loops": {"a": {}}},
    "Lightning, compiled": lambda s: {"state_dict": wrapped("model._orig_mod.", s)},
    "Lightning with a loss": lambda s: {
        "state_dict": {**wrapped("net.", s), "criterion.weight": torch.rand(5)}
    },
    "net": lambda s: {"net": s, "acc": 91.2, "epoch": 4},
    "deep": lambda s: {"checkpoint": {"student": {"weights": s}}},
    "a part compiled": lambda s: {n.replace(".", "._orig_mod.", 1): t for n, t in s.items()},
    "parts of FSDP": lambda s: {
        "model": {n.replace(".", "._fsdp_wrapped_module.", 1): t for n, t in s.items()}
    },
    "a part of DataParallel that keeps no activations": lambda s: wrapped(
        "model.",
        {n.replace(".", ".module._checkpoint_wrapped_module.", 1): t for n, t in s.items()},
    ),
    "averaged": lambda s: {"n_averaged": torch.tensor(5), **wrapped("module.", s)},
    "compiled averaged": lambda s: {
        "_orig_mod.n_averaged": torch.tensor(5),
        **wrapped("_orig_mod.module.", s),
    },
    "a tuple": lambda s: (s, 7),
    "averages of figures": lambda s: {"model": s, "avg_loss": torch.tensor(0.3)},
    "torchvision's and timm's arguments": lambda s: {
        "model": s,
        "args": argparse.Namespace(lr=0.1, sizes=[1, 2]),
    },
    "NumPy figures": lambda s: {"model": s, "acc": np.float64(0.9), "is_best": np.bool_(True)},
    "with optimizer": lambda s: {"model": s, "optimizer": OPTIMIZER, "scheduler": {"gamma": 0.1}},
    "no averaged ones yet": lambda s: {"state_dict": s, "state_dict_ema": None, "ema_decay": 0.9},
    "averaged ones are the same": lambda s: {"model": s, "model_ema": wrapped("module.", s)},
}


@pytest.mark.parametrize("name", ONE_SET)
def test_what_torch_takes_after_its_wrappers_is_taken(
    conv_net: ConvNet, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pt"
    torch.save(ONE_SET[name](conv_net.state_dict()), path)
    assert_same(load(path), conv_net)


SEVERAL: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "raw beside EMA": (lambda raw, ema: {"model": raw, "ema": ema}, "ema"),
    "timm": (lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema}, "state_dict_ema"),
    "DeiT": (lambda raw, ema: {"model": raw, "model_ema": wrapped("module.", ema)}, "model_ema"),
    "Lightning": (
        lambda raw, ema: {"state_dict": wrapped("model.", raw) | wrapped("ema.", ema)},
        "state_dict.ema",
    ),
    "best and last": (lambda raw, ema: {"last": {"net": raw}, "best": {"net": ema}}, "best.net"),
}


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.bad_input("a checkpoint with several sets of weights")
def test_of_several_sets_of_weights_none_is_guessed(
    conv_net: ConvNet, name: str, tmp_path: Path
) -> None:
    make, key = SEVERAL[name]
    path, raw = tmp_path / "weights.pt", copy.deepcopy(conv_net)
    for tensor in raw.state_dict().values():
        tensor.add_(1)
    torch.save(make(raw.state_dict(), conv_net.state_dict()), path)
    with pytest.raises(ModelError, match=rf"several sets of weights.*{key}.*--weights-key"):
        load(path)
    assert_same(load(path, weights_key=key), conv_net)
    with pytest.raises(ModelError, match="Unknown --weights-key"):
        load(path, weights_key="nothing")


@pytest.mark.bad_input("averaged weights in a form of their own")
def test_averaged_weights_that_do_not_fit_are_not_passed_over(
    conv_net: ConvNet, tmp_path: Path
) -> None:
    path, weights = tmp_path / "weights.pt", conv_net.state_dict()
    torch.save({"model": weights, "ema": {"shadow_params": list(weights.values())}}, path)
    with pytest.raises(ModelError, match=r"others under ema.*--weights-key model"):
        load(path)
    assert_same(load(path, weights_key="model"), conv_net)


def test_safetensors_hold_tensors_and_tied_ones_once(conv_net: ConvNet, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(conv_net.state_dict(), path)
    assert_same(load(path), conv_net)
    path.write_bytes(b"\x08" + path.read_bytes()[1:])
    with pytest.raises(ModelError, match="not a safetensors file"):
        load(path)


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, torch.compile])
def test_a_pickled_network_comes_out_of_its_wrapper(
    conv_net: ConvNet, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    assert type(unwrapped(wrap(nn.DataParallel(conv_net)))) is ConvNet


def test_a_network_in_a_checkpoint_is_taken_in_float32(conv_net: ConvNet, tmp_path: Path) -> None:
    path, half = tmp_path / "last.pt", copy.deepcopy(conv_net).half()
    torch.save({"model": half, "ema": None, "optimizer": OPTIMIZER, "epoch": 3}, path)
    assert_same(load(path, trust=True, arch=None), half.float())
    raw = copy.deepcopy(half)
    raw.head.weight.data.add_(1)
    torch.save({"ema": half, "model": raw}, path)
    with pytest.raises(ModelError, match=r"several networks: ema, model.*--weights-key ema"):
        load(path, trust=True, arch=None)
    assert_same(load(path, trust=True, arch=None, weights_key="ema"), half.float())
    torch.save({"model": raw, "ema": half.state_dict()}, path)
    with pytest.raises(ModelError, match=r"weights under ema that may be what is shipped"):
        load(path, trust=True, arch=None)


@pytest.mark.parametrize("key", ["ema_0.9999", "modelEMA", "EMAModel", "avg_model", "a.ema.b"])
@pytest.mark.bad_input("averaged weights in a form of their own")
def test_averaged_weights_are_seen_by_any_name_and_at_any_depth(
    conv_net: ConvNet, key: str, tmp_path: Path
) -> None:
    path, weights = tmp_path / "weights.pt", conv_net.state_dict()
    averaged = {name: p + 1 for name, p in conv_net.named_parameters()}  # no statistics: no fit
    for content in ({key: averaged}, {"callbacks": [{"x": {key: {"state": averaged}}}]}):
        torch.save({"model": weights, **content}, path)
        with pytest.raises(ModelError, match="may be what is shipped"):
            load(path)
    torch.save({"state_dict": wrapped("model.", weights) | wrapped("ema.", averaged)}, path)
    with pytest.raises(ModelError, match="others under ema that do not fit"):
        load(path)
    torch.save(weights | wrapped("teacher.", {n: t + 1 for n, t in weights.items()}), path)
    with pytest.raises(ModelError, match="several sets of weights"):
        load(path)
    assert_same(load(path, weights_key="."), conv_net)


def test_what_hooks_of_the_network_rename_is_taken(tmp_path: Path) -> None:
    """Oracle: torch's own load_state_dict, which knows weight_g and weight_v of old."""
    net = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    state = net.state_dict()
    old = {
        "weight_g": state["parametrizations.weight.original0"],
        "weight_v": state["parametrizations.weight.original1"], "bias": state["bias"],
    }  # fmt: skip
    for prefix in ("", "module.", "module.net."):
        fresh = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
        load_weights(tmp_path / "x.pt", fresh, {"state_dict": wrapped(prefix, old)}, "it")
        assert all(torch.equal(value, state[name]) for name, value in fresh.state_dict().items())


def test_safetensors_are_known_by_what_they_hold(conv_net: ConvNet, tmp_path: Path) -> None:
    save_file(conv_net.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same(load(tmp_path / "pytorch_model.bin"), conv_net)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab", "Git LFS; fetch"),
        (b"<!DOCTYPE html><title>404</title>", "a web page; download"),
        (gzip.compress(b"weights", mtime=0), "packed with gzip"),
        (b"\x89HDF\r\n\x1a\n", "Keras"),
        (b'{"weight_map": {}}', "JSON"),
        (b"\x08\x07\x12\x07pytorch\x1a", "not a file that torch.save wrote"),
    ],
)
@pytest.mark.bad_input("a file that is no pickle at all")
def test_what_is_no_pickle_is_not_asked_to_be_trusted(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as told:
        load(path)
    assert "--trust" not in str(told.value)


def test_what_needs_trust_is_named(conv_net: ConvNet, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"model": conv_net.state_dict(), "out": argparse.Namespace(to=tmp_path)}, path)
    with pytest.raises(UntrustedModelError, match=r"more than tensors \(pathlib\.\w+\)"):
        load(path)
