"""What may lie in place of the files that say how: one line that names it, and soon."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from compressor import run_folder
from compressor.config import load_config
from compressor.datasets import load_data
from compressor.errors import CompressorError
from compressor.files import parsed_toml
from compressor.latency.profiles import target_names, user_profiles
from compressor.latency.ssh import find_device
from compressor.latency.targets import load_target

LIMIT_S = 20


def classes_of(path: Path) -> object:
    for name in ("cat", "dog"):
        folder = path.parent / "images" / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(folder / "a.png")
    return load_data(path.parent / "images", classes=path)


# Where the file lies, and what reads it.
DOORS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "--classes": ("names.txt", classes_of),
    "compress.toml": ("compress.toml", lambda path: load_config(path.parent / "model.pt", {})),
    "profile by path": ("board.toml", lambda path: load_target(str(path))),
    "own profile": ("config/compressor/profiles/mine.toml", lambda _path: load_target("mine")),
    "devices.toml": ("config/compressor/devices.toml", lambda _path: find_device("nano")),
    "config.toml of a run": ("config.toml", lambda path: run_folder.read_settings(path.parent)),
    "manifest.json of a run": (
        "manifest.json", lambda path: run_folder.RunFolder(path.parent).read_manifest(),
    ),
    "result.json of a run": ("result.json", lambda path: run_folder.read_result(path.parent)),
}  # fmt: skip


def listen(path: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(path.parent)  # (a socket's path may have 107 characters)
    try:
        server.bind(path.name)
    finally:
        os.chdir(here)
        server.close()


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


PLACES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "socket": listen,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "link to itself": lambda path: path.symlink_to(path),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 100),
    "program": lambda path: path.write_bytes(b"\x7fELF\2\1\1" + bytes(3000)),
    "larger than any disk": sparse,
    "a key of 30,000 parts": lambda path: path.write_text("a." * 30_000 + "b = 1"),
    "a table of 30,000 parts": lambda path: path.write_text("[a" + " . a" * 30_000 + "]"),
    "a line of 200 KB": lambda path: path.write_text("\x1b" * 200_000),
}


@pytest.fixture(autouse=True)
def _soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def too_slow(_number: int, _frame: object) -> None:
        raise AssertionError("it waits")

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    user_profiles().mkdir(parents=True)
    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.bad_input("pipes, devices, binaries and huge files in place of settings")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_file_of_settings_is_one_line(door: str, place: str, tmp_path: Path) -> None:
    name, read = DOORS[door]
    PLACES[place](tmp_path / name)
    with pytest.raises(CompressorError) as told:
        read(tmp_path / name)
    said = str(told.value)
    assert Path(name).name in said
    assert len(said.splitlines()) == 1
    assert len(said) < 1000


def test_a_broken_profile_of_ones_own_harms_no_other(tmp_path: Path) -> None:
    os.mkfifo(user_profiles() / "mine.toml")
    assert "mine" in target_names()
    assert load_target("raspberry-pi-4", device="ssh://pi@nowhere").name == "raspberry-pi-4"


def test_long_lists_of_numbers_are_read() -> None:
    numbers = [i + 0.5 for i in range(500)]
    assert parsed_toml(f"mean = {numbers}")["mean"] == numbers
    assert parsed_toml("a = [" + "1.5e-3, " * 300 + "]")["a"][299] == 1.5e-3
