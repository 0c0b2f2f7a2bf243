"""Files that mean harm run nothing, each shown to do harm to who reads it without our lists."""

import contextlib
import io
import json
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError, ModelError, UntrustedModelError
from compressor.latency.profiles import user_profiles
from compressor.latency.targets import load_target
from compressor.model_io import load_model
from compressor.model_io.program_text import checked_program

Edit = Callable[[dict[str, Any]], None]
SHAPE = (1, 8, 8)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, image: Tensor) -> Tensor:
        return torch.relu(self.conv(image))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "good.pt2"
    torch.export.save(torch.export.export(Small().eval(), (torch.randn(1, *SHAPE),)), path)
    return path


def edited(good: Path, path: Path, edit: Edit) -> Path:
    """The program with its text changed."""
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("models/model.json"):
                program = json.loads(content)
                edit(program)
                content = json.dumps(program).encode()
            new.writestr(name, content)
    return path


def with_member(good: Path, path: Path, name: str, content: bytes) -> Path:
    """The program with one member more, which is packed."""
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w") as new:
        for each in old.namelist():
            new.writestr(each, old.read(each))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that are there twice
            new.writestr(name, content, compress_type=zipfile.ZIP_DEFLATED)
    return path


def run_by_torch(path: Path) -> None:
    """What whoever trusts the file does; it may fail after the harm is done."""
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.load(path).module(check_guards=False)(torch.randn(1, *SHAPE))


def nodes(program: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = program["graph_module"]["graph"]["nodes"]
    return found


def call_in_a_size(mark: Path) -> Edit:
    def edit(program: dict[str, Any]) -> None:
        (value, *_) = program["graph_module"]["graph"]["tensor_values"].values()
        call = f"__import__('pathlib').Path({str(mark)!r}).touch()"
        value["sizes"][0] = {"as_expr": {"expr_str": call, "hint": {"as_int": 1}}}

    return edit


def call_in_a_name(mark: Path) -> Edit:
    def edit(program: dict[str, Any]) -> None:
        text = json.dumps(program)
        call = json.dumps(f"image=__import__('pathlib').Path({str(mark)!r}).touch()")
        program |= json.loads(text.replace('"image"', call))

    return edit


def import_by_an_enum(mark: Path) -> Edit:
    (mark.parent / "harm_by_import.py").write_text(
        f"import enum, pathlib\npathlib.Path({str(mark)!r}).touch()\nclass E(enum.Enum): A = 1\n"
    )

    def edit(program: dict[str, Any]) -> None:
        leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
        context = json.dumps([{"__enum__": True, "fqn": "harm_by_import:E", "name": "A"}])
        spec = {"type": "builtins.dict", "context": context, "children_spec": [leaf]}
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        signature["out_spec"] = json.dumps([1, spec])

    return edit


def write_by_an_operator(mark: Path) -> Edit:
    arguments = {"filename": {"as_string": str(mark)}, "shared": {"as_bool": True},
                 "size": {"as_int": 72}}  # fmt: skip

    def edit(program: dict[str, Any]) -> None:
        nodes(program)[-1]["target"] = "torch.ops.aten.from_file.default"
        nodes(program)[-1]["inputs"] = [
            {"name": name, "arg": arg, "kind": 1} for name, arg in arguments.items()
        ]

    return edit


@pytest.fixture
def importable_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("harm_by_import", None)


@pytest.mark.bad_input("programs whose text runs code")
@pytest.mark.usefixtures("importable_here")
@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (call_in_a_size, "where a size"),
        (call_in_a_name, "where a name"),
        (import_by_an_enum, "where the name of an input"),
        (write_by_an_operator, "where an operator on tensors"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_no_text_of_a_program_runs(
    harm: Callable[[Path], Edit], says: str, good: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "it-ran"
    path = edited(good, tmp_path / "edited.pt2", harm(mark))
    with pytest.raises(UntrustedModelError, match=rf"model\.json says .*{says}.*--trust"):
        load_model(path)
    assert not mark.exists()
    run_by_torch(path)
    assert mark.exists(), "the file does no harm, so its refusal shows nothing"


def program_of(good: Path) -> dict[str, Any]:
    with zipfile.ZipFile(good) as archive:
        name = next(name for name in archive.namelist() if name.endswith("models/model.json"))
        content: dict[str, Any] = json.loads(archive.read(name))
    return content


def with_size(good: Path, size: object) -> bytes:
    program = program_of(good)
    (value, *_) = program["graph_module"]["graph"]["tensor_values"].values()
    value["sizes"][0] = {"as_expr": {"expr_str": size}}
    return json.dumps(program).encode()


SIZES = (
    "Symbol('s77', positive=True, integer=True)",
    "Add(FloorDiv(Add(Symbol('s0', integer=True), Integer(-3)), Integer(2)), Integer(1))",
    "Max(Integer(1), Min(Integer(4), Mod(Symbol('u3'), Integer(2))))",
    "Pow(Symbol('s1'), Integer(2))",
    "GreaterThan(Symbol('u0', integer=True), Integer(0))",
    "Mul(Rational(1, 2), Float('1.5', precision=53))",
    "2*s0 + (s1 - 3)//2 % 4 >= 1",
)
NOT_SIZES = (
    "os.system('x')", "().__class__", "Symbol('x')", "Symbol('s1', cls=print)",
    "Symbol(Symbol('s1'))", "Integer('9')", "print(1)", "eval('1')", "lambda: 1",
    "[s0 for s0 in s1]", "s0 if s1 else s2", "s0[0]", "f'{s0}'", "'s0'", "s0; s1", "s0\ns1",
    "s0 # s1", "Add(*s0)", "Add(s0, evaluate=False)", "Pow(Integer(9), Integer(99))",
    "Pow(Pow(9, 8), 8)", "9**9**9", "1" * 40, "(" * 5000, "S(1)", "sympify('1')", "factorial(9)",
    "9!", "Float('1e9999')", "\u017f1", ["s0"], 5, None,
)  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_sizes_that_torch_writes_are_read(size: str, good: Path) -> None:
    assert checked_program("f", with_size(good, size))


@pytest.mark.bad_input("programs whose text runs code")
@pytest.mark.parametrize("size", NOT_SIZES, ids=lambda size: str(size)[:20])
def test_sizes_that_are_more_than_arithmetic_are_refused(size: object, good: Path) -> None:
    with pytest.raises(UntrustedModelError, match="where a size"):
        checked_program("f", with_size(good, size))


def test_sizes_of_a_program_for_any_batch_are_read(tmp_path: Path) -> None:
    """Oracle: the module that was exported."""
    module, batch = Small().eval(), torch.export.Dim("batch", max=64)
    side = torch.export.Dim("side", min=8, max=64)
    shapes = ({0: batch, 2: side, 3: side},)
    program = torch.export.export(module, (torch.randn(2, *SHAPE),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "any.pt2")
    loaded = load_model(tmp_path / "any.pt2")
    image = torch.randn(3, 1, 12, 12)
    torch.testing.assert_close(loaded.module(image), module(image))


def _set(key: str, value: object) -> Edit:
    def edit(program: dict[str, Any]) -> None:
        program[key] = value

    return edit


def _target(target: str) -> Edit:
    return lambda program: nodes(program)[-1].update(target=target)


def _argument(**argument: object) -> Edit:
    return lambda program: nodes(program)[-1]["inputs"][0].update(arg=argument)


@pytest.mark.bad_input("programs whose text runs code")
@pytest.mark.parametrize(
    "edit",
    [
        _set("range_constraints", {"s0": {"min_val": "os", "max_val": 3}}),
        _set("range_constraints", {"print(1)": {"min_val": 1, "max_val": 3}}),
        _set("verifiers", ["OTHER"]),
        _target("torch.load"),
        _target("_operator.call"),
        _target("math.sumprod"),
        _target("torch.ops.load_library"),
        _target("torch.ops.aten.__class__.default"),
        _target("torch.ops.aten.save.default"),
        _target("torch.ops.aten.relu.no_such"),
        _target("torch.ops.inductor.resize_storage_bytes_.default"),
        _target("torch.ops.higher_order.call_torchbind"),
        _target("#aoti:x"),
        _argument(as_operator="torch.hub.load"),
        _argument(as_custom_obj={"name": "a", "class_fqn": "b"}),
        _argument(as_tensor={"name": "a.b"}),
        _argument(as_graph={"name": "a()", "graph": {}}),
        _argument(as_int="__import__('os')"),
    ],
)
def test_what_is_on_no_list_is_refused(edit: Edit, good: Path, tmp_path: Path) -> None:
    with pytest.raises(UntrustedModelError, match=r"says .* was expected.*--trust"):
        load_model(edited(good, tmp_path / "edited.pt2", edit))


def test_code_for_guards_is_dropped(good: Path) -> None:
    """torch compiles these lines into a function where a module is asked for with guards."""
    program = program_of(good)
    program["guards_code"] = ["print(1)"]
    assert checked_program("f", json.dumps(program).encode())["guards_code"] == []


@pytest.mark.bad_input("archives with members that torch would run or that are not what they seem")
@pytest.mark.parametrize(
    ("name", "content", "error", "says"),
    [
        ("good/data/aotinductor/model/a.so", b"", UntrustedModelError, "run code.*--trust"),
        ("good/data/constants/custom_obj_0", b"", UntrustedModelError, "run code.*--trust"),
        ("good/models/other.json", b"{}", UntrustedModelError, "run code.*--trust"),
        ("good/archive_version", b"9", ModelError, "twice"),
        ("../evil", b"", ModelError, "does not lie in its folder"),
        ("good/../../evil", b"", ModelError, "does not lie in its folder"),
        ("other/byteorder", b"", ModelError, "does not lie in its folder"),
        ("good/extra/zeros", b"\0" * 2**20, ModelError, "packed into"),
    ],
)
def test_members_that_are_on_no_list_are_refused(
    name: str, content: bytes, error: type[ModelError], says: str, good: Path, tmp_path: Path
) -> None:
    path = with_member(good, tmp_path / "net.pt2", name, content)
    with pytest.raises(error, match=says):
        load_model(path)


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return (Path.touch, (self.mark,))


@pytest.mark.bad_input("pickles that run code, in place of every file")
@pytest.mark.parametrize("is_first", [True, False])
def test_a_pickle_that_is_called_plain_beside_runs_nothing(
    is_first: bool, good: Path, tmp_path: Path
) -> None:
    """Two weights in one member, of which one says that it is a pickle."""
    mark, buffer = tmp_path / "it-ran", io.BytesIO()
    torch.save(Payload(mark), buffer)
    content = buffer.getvalue() + b"\0" * (-len(buffer.getvalue()) % 4)
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(tmp_path / "net.pt2", "w") as new:
        for name in old.namelist():
            text = old.read(name)
            if name.endswith("weights_config.json"):
                config = json.loads(text)["config"]
                for i, payload in enumerate(config.values()):
                    payload |= {"path_name": "weight_0", "use_pickle": (i == 0) is is_first}
                text = json.dumps({"config": config}).encode()
            new.writestr(name, content if name.endswith("weights/weight_0") else text)
    with pytest.raises(UntrustedModelError, match="weight_0 holds more than tensors"):
        load_model(tmp_path / "net.pt2")
    assert not mark.exists()
    run_by_torch(tmp_path / "net.pt2")
    assert mark.exists(), "the file does no harm, so its refusal shows nothing"


def test_a_weight_in_a_pickle_is_read(good: Path, tmp_path: Path) -> None:
    """torch.export.save pickles tensors that are no plain rows of numbers."""
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(tmp_path / "net.pt2", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("weights_config.json"):
                config = json.loads(content)["config"]
                (which, *_) = (k for k, v in config.items() if v["path_name"] == "weight_0")
                config[which]["use_pickle"] = True
                content = json.dumps({"config": config}).encode()
            elif name.endswith("weights/weight_0"):
                plain = dict(load_model(good).module.named_parameters())
                buffer = io.BytesIO()
                torch.save(plain["conv.weight"], buffer)
                content = buffer.getvalue()
            new.writestr(name, content)
    loaded, expected = load_model(tmp_path / "net.pt2"), load_model(good)
    image = torch.randn(1, *SHAPE)
    torch.testing.assert_close(loaded.module(image), expected.module(image))


def test_a_program_of_another_version_is_refused(good: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(tmp_path / "net.pt2", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"1" if name.endswith("archive_version") else old.read(name))
    with pytest.raises(ModelError, match="archive_version is '1'; expected '0'"):
        load_model(tmp_path / "net.pt2")


# --- profiles --------------------------------------------------------------------------------


@pytest.mark.bad_input("profiles that name programs")
def test_only_installed_profiles_name_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    profile = (
        'description = "a board"\n[runtime]\nkind = "trtexec"\ntrtexec = ["./harm"]\n'
        '[channels]\nstep = 8\nsource = "guessed"\n[onnx]\nopset = 13\n'
    )
    (tmp_path / "board.toml").write_text(profile)
    with pytest.raises(ConfigError, match=r"names a program.*\./harm.*profiles and give its name"):
        load_target(str(tmp_path / "board.toml"))
    user_profiles().mkdir(parents=True)
    (user_profiles() / "board.toml").write_text(profile)
    assert load_target("board").trtexec == ("./harm",)
    (tmp_path / "usual.toml").write_text(profile.replace("./harm", "trtexec"))
    assert load_target(str(tmp_path / "usual.toml")).trtexec == ("trtexec",)
