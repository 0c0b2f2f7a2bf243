"""Files made to harm: code in pickles, archives that swell, links that lead elsewhere."""

import ast
import io
import pickle
import resource
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import compressor
from compressor import files
from compressor.config import load_config
from compressor.datasets import load_data
from compressor.datasets.files import reader
from compressor.errors import (
    CompressorError,
    ConfigError,
    DataError,
    MeasurementError,
    ModelError,
    RunFolderError,
    UntrustedModelError,
)
from compressor.latency.machine import content_of
from compressor.run_folder import RunFolder, read_result
from compressor.search.study import Study
from tests.fuzz.guard import guarded
from tests.fuzz.test_borders import BORDERS, write_images
from tests.unit.test_space import space_of

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "compressor").rglob("*.py"), *(ROOT / "cli").rglob("*.py")])
NETWORK = {
    "socket", "ssl", "urllib", "http", "requests", "httpx", "ftplib", "smtplib", "telnetlib",
    "xmlrpc", "aiohttp", "urllib3", "paramiko", "webbrowser",
}  # fmt: skip
RUNS_CODE = {"eval", "exec", "compile", "__import__"}


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return (Path.touch, (self.proof,))


def saved(content: object, *, is_zip: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=is_zip)
    return buffer.getvalue()


def object_array(payload: Payload) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, images=np.array([payload], dtype=object), labels=np.zeros(1, np.int64))
    return buffer.getvalue()


PICKLES: dict[str, Callable[[Payload], bytes]] = {
    "plain": pickle.dumps,
    "zip": lambda payload: saved({"state_dict": {"a": payload}}, is_zip=True),
    "legacy": lambda payload: saved({"state_dict": {"a": payload}}, is_zip=False),
    "object array": object_array,
}


@pytest.mark.bad_input("pickles that run code, in place of every file")
@pytest.mark.parametrize(
    ("border", "kind"),
    [
        (border, kind)
        for border, each in BORDERS.items()
        for kind in (PICKLES if each.name.endswith((".pt", ".pt2", ".npz")) else ("plain",))
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_no_pickle_runs_code_anywhere(border: str, kind: str, tmp_path: Path) -> None:
    """Whatever is read, a pickle in its place is an error, or begins anew, and runs nothing."""
    proof = tmp_path / "in" / "proof"
    path = tmp_path / "in" / BORDERS[border].name
    path.parent.mkdir(parents=True)
    path.write_bytes(PICKLES[kind](Payload(proof)))
    with guarded(tmp_path / "in"):
        try:
            BORDERS[border].read(path)
        except CompressorError:
            refused = True
        else:
            refused = False
    assert not proof.exists()
    assert refused or border in ("half-trained network", "trtexec's log")


def test_the_payload_would_have_run(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(tmp_path / "proof")))
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert (tmp_path / "proof").exists()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_unpickles_runs_text_or_speaks_to_the_network(path: Path) -> None:
    """But for `--trust`, in one place."""
    unsafe: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            unsafe += [str(name) for name in names if str(name).partition(".")[0] in NETWORK]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        is_unsafe = (
            called in RUNS_CODE
            or called.split(".")[-1] in ("Unpickler", "unpack_archive", "extractall")
            or called in ("pickle.load", "pickle.loads", "os.system", "os.popen")
            or (called == "torch.load" and keywords.get("weights_only") != "True")
            or (called == "np.load" and keywords.get("allow_pickle") != "False")
            or keywords.get("shell") == "True"
        )
        if is_unsafe:
            unsafe.append(f"{called} in line {node.lineno}")
    if path.name == "dashboard.py":  # which serves this machine alone, and is asked for by name
        unsafe.remove("socket")
    trusted = path.parent.name == "model_io" and path.name == "__init__.py"
    assert len(unsafe) == (1 if trusted else 0), unsafe


@pytest.mark.bad_input("files that ask to be trusted")
def test_a_file_cannot_ask_to_be_trusted(tmp_path: Path) -> None:
    """Whoever wrote it may have written the model."""
    (tmp_path / "compress.toml").write_text('target = "host-cpu"\ntrust = true\n')
    with pytest.raises(ConfigError, match="cannot ask to be trusted"):
        load_config(tmp_path / "model.pt", {})
    torch.save({"a": Payload(tmp_path / "proof")}, tmp_path / "model.pt")
    (tmp_path / "config.toml").write_text(
        f'target = "host-cpu"\nmodel = "{tmp_path}/model.pt"\ntrust = true\nspeedup = 2.0\n'
        f'data = "{tmp_path}/images.npz"\n'
    )
    write_images(tmp_path / "images.npz")
    with pytest.raises(UntrustedModelError, match="would run code"):
        compressor.resume(tmp_path)
    assert not (tmp_path / "proof").exists()


def swollen(member: str, n_bytes: int) -> bytes:
    """A zip file of a few bytes whose only member says that it unpacks to so many."""
    name, packed = member.encode(), zlib.compress(b"\0" * 1000)[2:-4]
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 8, 0, 0, 0, len(packed), n_bytes,
                        len(name), 0) + name + packed  # fmt: skip
    central = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 8, 0, 0, 0, len(packed), n_bytes,
                          len(name), 0, 0, 0, 0, 0, 0) + name  # fmt: skip
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(central), len(local), 0)
    return local + central + end


@pytest.mark.bad_input("archives, arrays, texts and pictures that swell")
@pytest.mark.parametrize(
    ("name", "read", "error"),
    [
        ("images.npz", load_data, DataError),
        ("model.pt", BORDERS["state_dict"].read, ModelError),
        ("model.pt2", BORDERS["program"].read, ModelError),
    ],
)
def test_archives_that_swell_are_refused_unread(
    name: str,
    read: Callable[[Path], object],
    error: type[CompressorError],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kilobyte that says it holds 4 GiB, on a machine that has 1."""
    monkeypatch.setattr(files, "memory_bytes", lambda: 2**30)
    path = tmp_path / name
    path.write_bytes(swollen("archive/data.pkl" if name != "images.npz" else "a.npy", 2**32 - 2))
    with pytest.raises(error, match=r"4\.0 GiB, and this machine has 1\.0 GiB"):
        read(path)


@pytest.mark.bad_input("archives, arrays, texts and pictures that swell")
def test_an_array_that_is_all_claim_takes_no_memory(tmp_path: Path) -> None:
    """Its header says 64 GiB; the file ends after it."""
    header = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (2**12, 1, 2**12, 2**12)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(tmp_path / "images.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
        archive.writestr("labels.npy", header.getvalue())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load_data(tmp_path / "images.npz")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@pytest.mark.bad_input("archives, arrays, texts and pictures that swell")
def test_text_that_never_ends_is_not_read(tmp_path: Path) -> None:
    """1 TiB, of which the disk holds nothing."""
    for name in ("compress.toml", "result.json", "model.onnx"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**40)
    with pytest.raises(ConfigError, match="larger than 256 KiB"):
        load_config(tmp_path / "model.pt", {})
    with pytest.raises(RunFolderError, match="larger than 64 MiB"):
        read_result(tmp_path)
    with pytest.raises(MeasurementError, match=r"1024\.0 GiB; at most 2 can be"):
        content_of(tmp_path / "model.onnx")


@pytest.mark.bad_input("archives, arrays, texts and pictures that swell")
def test_a_picture_of_a_billion_pixels_is_not_decoded(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = struct.pack(">2I5B", 40_000, 40_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 10_000)
    content = chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(DataError, match="decompression bomb"):
        reader(None, 3)(tmp_path / "a.png")


@pytest.mark.bad_input("links in a run folder")
@pytest.mark.parametrize("name", ["study.db", "log.txt", ".unfinished", "result.json"])
def test_links_in_a_run_folder_are_not_followed(name: str, tmp_path: Path) -> None:
    """They could lead anywhere: what is logged there would be, too."""
    run, elsewhere = tmp_path / "run", tmp_path / "precious"
    run.mkdir()
    elsewhere.write_text("mine")
    (run / name).symlink_to(elsewhere)
    with (
        pytest.raises(RunFolderError, match=f"{name} is a link"),
        RunFolder(run).locked(),
    ):
        pass
    assert elsewhere.read_text() == "mine"


@pytest.mark.bad_input("links in a run folder")
def test_a_link_in_the_way_is_replaced_not_written_through(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in ("result.json", ".result.json.partial"):
        (tmp_path / name).symlink_to(precious)
    files.write_whole(tmp_path / "result.json", "ours")
    assert precious.read_text() == "mine"
    assert (tmp_path / "result.json").read_text() == "ours"


def test_a_broken_study_is_kept_beside_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    path.write_bytes(b"SQLite format 3\0 and then nothing of use")
    assert Study.of_stopped(path, space_of([64], step=16)) is None
    assert (tmp_path / "study.db.broken").read_bytes().endswith(b"nothing of use")


def test_durations_are_taken_from_clocks_that_nobody_sets() -> None:
    """A clock that is set, or daylight saving, must not end a wait or a budget."""
    for path in SOURCES:
        assert "time.time(" not in path.read_text(encoding="utf-8"), path


@pytest.mark.fault("the clock goes back an hour at every look")
def test_a_clock_that_jumps_changes_no_trial(
    trained: Path, blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour back at every look."""
    now = [time.time()]

    def jumping() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", jumping)
    flags = {
        "target": "host-cpu", "arch": "tests.conftest:make_conv_net", "data": blobs,
        "constraint": {"macs": 0.6}, "trials": 3, "fine_tune_epochs": 1, "finalists": 1,
        "time_budget": 120, "out": tmp_path / "run",
    }  # fmt: skip
    result = compressor.compress(load_config(trained, flags))
    assert (result.search["n_trials"], result.search["n_failed"]) == (3, 0)
    assert 0 < result.search["seconds"] < 120
