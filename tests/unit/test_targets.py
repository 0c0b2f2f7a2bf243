"""Device profiles: those that come with the package, users' own, and broken ones."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from compressor.errors import ConfigError
from compressor.latency.profiles import target_names, user_profiles
from compressor.latency.targets import load_target
from compressor.values import Basis

FOLDER = Path(__file__).parents[2] / "hardware_profiles"
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.toml"))
JETSONS = [name for name in SHIPPED if name.startswith("jetson-")]
PROMISED = {
    "host-cpu", "jetson-nano", "jetson-tx2", "jetson-xavier-nx", "jetson-agx-xavier",
    "jetson-orin-nano", "jetson-orin-nano-super", "jetson-orin-nx", "jetson-agx-orin",
    "jetson-agx-thor", "raspberry-pi-4", "raspberry-pi-5", "raspberry-pi-zero-2w", "intel-n100",
    "x86-avx2", "x86-avx512", "nvidia-t4", "nvidia-l4", "nvidia-a10", "nvidia-h100",
}  # fmt: skip
BASES = {"datasheet", "computed", "measured", "unverified"}
SECTIONS = [
    "description", "match", "runtime", "precision", "channels", "onnx", "memory", "limits",
    "power", "sources",
]  # fmt: skip

GOOD = """
description = "a board"
[runtime]
kind = "onnxruntime"
provider = "CPUExecutionProvider"
n_threads = 4
[precision.fp32]
ops_per_s = 1e9
basis = "computed"
source = "one core at 1 GHz"
[precision.fp16]
unsupported = "it has no FP16 arithmetic"
[channels]
step = 4
[onnx]
opset = 13
ir = 8
[memory]
bytes_per_s = 2e9
basis = "unverified"
source = "a guess"
[sources]
board = "a page"
"""


@pytest.fixture(autouse=True)
def config_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No profile of whoever runs the tests is seen."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config"


@pytest.fixture
def board(tmp_path: Path) -> Path:
    path = tmp_path / "board.toml"
    path.write_text(GOOD)
    return path


def content(name: str) -> dict[str, Any]:
    return tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


def test_all_promised_profiles_are_there_and_no_other() -> None:
    assert set(SHIPPED) == PROMISED
    assert target_names() == tuple(sorted(PROMISED))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_profile_loads(name: str) -> None:
    target = load_target(name)
    told = content(name)
    assert target.name == name
    assert target.runtime == told["runtime"]["kind"]
    assert target.precision == told["runtime"].get("precision", "fp32")
    assert target.step % 4 == 0
    assert target.step_source
    assert target.sources


@pytest.mark.parametrize("name", sorted(PROMISED - {"host-cpu"}))
def test_a_board_can_be_estimated_and_every_figure_says_why(name: str) -> None:
    told = content(name)
    figures = [p for p in told["precision"].values() if "unsupported" not in p]
    for figure in (*figures, told["memory"]):
        assert figure["basis"] in BASES
        assert len(figure["source"]) >= len("spec")
    reasons = [p["unsupported"] for p in told["precision"].values() if "unsupported" in p]
    assert all(len(reason.split()) > 3 for reason in reasons)
    target = load_target(name, estimate=True)
    assert target.basis is Basis.ESTIMATE
    assert target.roofline is not None
    assert target.roofline.bytes_per_s.value == told["memory"]["bytes_per_s"]
    assert target.roofline.ops_per_s.value == told["precision"][target.precision]["ops_per_s"]
    assert target.roofline.bytes_per_number == {"fp32": 4, "fp16": 2}[target.precision]


@pytest.mark.parametrize("name", SHIPPED)
def test_profiles_read_alike(name: str) -> None:
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    keys = list(content(name))
    assert text.startswith("# ")
    assert keys == [section for section in SECTIONS if section in keys]
    assert max(map(len, text.splitlines())) <= 99


@pytest.mark.parametrize("name", JETSONS)
def test_a_jetson_is_matched_limited_and_told_how_to_hold_its_clocks(name: str) -> None:
    target = load_target(name)
    assert target.runtime == "trtexec"
    assert target.machines == ("aarch64",)
    assert target.models
    ram_mib = content(name)["memory"]["mib"]
    assert target.memory_mib is not None
    assert target.workspace_mib < target.memory_mib < ram_mib
    assert [line for line in target.power_advice if "nvpmodel" in line]
    assert [line for line in target.power_advice if "jetson_clocks" in line]


@pytest.mark.parametrize("name", ["jetson-nano", "jetson-tx2"])
def test_tensorrt_8_2_is_given_what_it_reads(name: str) -> None:
    target = load_target(name)
    assert target.opset <= 13
    assert target.max_ir <= 7


@pytest.mark.parametrize("name", SHIPPED)
def test_no_profile_asks_for_an_opset_that_its_runtime_does_not_read(name: str) -> None:
    assert load_target(name).opset <= (20 if load_target(name).runtime != "trtexec" else 17)


@pytest.mark.parametrize("name", ["jetson-nano", "jetson-tx2"])
def test_int8_is_refused_where_it_would_be_slower(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} cannot do int8: .*DP4A"):
        load_target(name, precision="int8")


@pytest.mark.parametrize("name", ["raspberry-pi-4", "raspberry-pi-zero-2w", "x86-avx2"])
def test_fp16_is_refused_where_there_is_no_such_arithmetic(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} cannot do fp16: .*FP16"):
        load_target(name, precision="fp16")


def test_int8_is_no_precision_of_this_product() -> None:
    with pytest.raises(ConfigError, match=r"Unknown precision 'int8'.* Known: fp16, fp32"):
        load_target("jetson-agx-orin", precision="int8")


def test_another_precision_has_its_own_peak() -> None:
    half = load_target("jetson-nano", estimate=True).roofline
    single = load_target("jetson-nano", precision="fp32", estimate=True).roofline
    assert half is not None
    assert single is not None
    assert half.ops_per_s.value == pytest.approx(2 * single.ops_per_s.value)
    assert (half.bytes_per_number, single.bytes_per_number) == (2, 4)


def test_this_machine_is_measured_not_estimated() -> None:
    with pytest.raises(ConfigError, match="host-cpu has no figures to estimate from"):
        load_target("host-cpu", estimate=True)


def test_an_unknown_name_gets_the_one_that_was_meant() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'jetson-nano'"):
        load_target("jetson-nanno")


def test_a_profile_by_path(board: Path) -> None:
    target = load_target(str(board), device="ssh://user@board")
    assert (target.name, target.step, target.n_threads) == ("board", 4, 4)
    assert target.device == "ssh://user@board"
    assert target.sources == ("board: a page",)
    with pytest.raises(ConfigError, match=r"No device profile at .*absent\.toml"):
        load_target(str(board.with_name("absent.toml")))


def test_a_profile_of_the_user_s_own_wins(config_home: Path) -> None:
    assert user_profiles() == config_home / "compressor" / "profiles"
    user_profiles().mkdir(parents=True)
    for name in ("board", "jetson-nano"):
        (user_profiles() / f"{name}.toml").write_text(GOOD)
    assert "board" in target_names()
    assert load_target("board").description == "a board"
    assert load_target("jetson-nano").description == "a board"


def test_a_profile_that_is_no_text_is_an_error_about_the_file(board: Path) -> None:
    board.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"board\.toml cannot be read"):
        load_target(str(board))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_threads = 4", "n_thread = 4", r"runtime\.n_thread: Extra inputs are not permitted"),
        ("n_threads = 4", 'n_threads = "four"', r"runtime\.n_threads: .*integer.*'four'"),
        ("n_threads = 4", "n_threads = 0", r"runtime\.n_threads: .*greater than or equal to 1"),
        ("n_threads = 4", 'precision = "int8"', r"runtime\.precision: .*'fp32' or 'fp16'.*'int8'"),
        ('kind = "onnxruntime"', 'kind = "ort"', r"runtime\.kind: .*'onnxruntime'.*'trtexec'"),
        ("[channels]\nstep = 4", "", "channels: Field required"),
        ("opset = 13", "opset = 21", r"onnx\.opset: .*less than or equal to 20"),
        ("opset = 13", "opset = ", "Invalid value .*line"),
        (
            "ops_per_s = 1e9",
            "ops_per_s = -1.0",
            r"fp32\.ops_per_s: .*greater than or equal to 1",
        ),
        ('source = "one core at 1 GHz"', "", r"precision\.fp32: a figure needs its basis and its"),
        ("ops_per_s = 1e9", "", r"precision\.fp32: give either ops_per_s or unsupported"),
        ('basis = "unverified"', 'basis = "hearsay"', r"memory\.basis: .*'datasheet'.*'hearsay'"),
        ("[precision.fp16]", "[precision.fp8]", r"precision\.fp8\.?.*'fp32', 'fp16' or 'int8'"),
    ],
)
def test_a_broken_profile_says_file_key_and_what_is_allowed(
    board: Path, old: str, new: str, message: str
) -> None:
    assert old in GOOD
    board.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError, match=rf"Profile .*board\.toml is broken: .*{message}"):
        load_target(str(board))
