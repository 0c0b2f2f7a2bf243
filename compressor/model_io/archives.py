"""A `.pt2` archive, read member by member and written anew: torch gets nothing else of the file.

Two programs that read one ZIP file may see different members in it. So the archive that torch is
given is ours: the members on the list, each checked; tensors that lay in pickles are pickled
again. Compiled code (AOTInductor) and objects of other classes are on no list.
"""

import io
import json
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import ModelError, UntrustedModelError
from compressor.files import MAX_TEXT_BYTES, parsed_json
from compressor.model_io.program_text import DOTTED, checked_program, refused

MAX_MEMBERS = 100_000
MAX_RATIO = 100  # of what a member holds to what it takes; torch stores them as they are
FORMAT, VERSION, BYTE_ORDER = "archive_format", "archive_version", "byteorder"
EXPECTED = {FORMAT: b"pt2", VERSION: b"0", BYTE_ORDER: b"little"}
PROGRAM, SAMPLE = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = "data/weights/", "data/constants/"
CONFIGS = {
    WEIGHTS: f"{WEIGHTS}model_weights_config.json",
    CONSTANTS: f"{CONSTANTS}model_constants_config.json",
}
PAYLOADS = {WEIGHTS: re.compile(r"weight_\d+"), CONSTANTS: re.compile(r"tensor_\d+")}
LEGACY = (f"{WEIGHTS}model.pt", f"{CONSTANTS}model.pt")  # of older versions of torch
LEFT_OUT = re.compile(r"\.data/\w+|\.format_version|\.storage_alignment|extra/.*")
ROOT, ZIP_VERSION = "model", (".data/version", b"6\n")  # of the archive that torch is given


def checked_archive(path: Path) -> io.BytesIO:
    """The program in `path`, as torch.export.load may read it.

    Raises:
        ModelError: It is no archive of torch.export.save, or one of another version.
        UntrustedModelError: It holds what torch would run, import or unpickle.
    """
    with zipfile.ZipFile(path) as archive:
        members = _members(path, archive)
        read: dict[str, bytes] = {}
        for name in (*EXPECTED, PROGRAM, SAMPLE, *CONFIGS.values(), *LEGACY):
            if name in members:
                if name.endswith(".json") and members[name].file_size > MAX_TEXT_BYTES:
                    raise ModelError(f"{path}: {name} is larger than {MAX_TEXT_BYTES} bytes.")
                read[name] = archive.read(members[name])
        _check_version(path, read)
        clean: dict[str, bytes] = {name: read[name] for name in EXPECTED if name in read}
        program = checked_program(f"{path}: {PROGRAM}", read[PROGRAM])
        clean[PROGRAM] = json.dumps(program).encode()
        for name in (SAMPLE, *LEGACY):
            if name in read:
                clean[name] = _pickled_again(path, name, read[name])
        for folder, config in CONFIGS.items():
            if config in read:
                payloads = _payloads(path, folder, read[config])
                clean |= _tensors(path, archive, members, folder, payloads)
                clean[config] = json.dumps({"config": payloads}).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as written:
        for name, content in (ZIP_VERSION, *clean.items()):
            written.writestr(f"{ROOT}/{name}", content)
    buffer.seek(0)
    return buffer


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Name below the archive's one folder -> member.

    Raises:
        ModelError: Too many, too densely packed, twice the same, or outside the folder.
        UntrustedModelError: One is not on the list.
    """
    infos = [info for info in archive.infolist() if not info.is_dir()]
    if not infos or len(infos) > MAX_MEMBERS:
        raise ModelError(f"{path} has {len(infos)} members; expected 1 to {MAX_MEMBERS}.")
    root = infos[0].filename.partition("/")[0]
    found: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        folder, _, name = info.filename.partition("/")
        if folder != root or ".." in name or "\\" in name or name.startswith("/"):
            raise ModelError(f"{path}: {info.filename!r} does not lie in its folder {root!r}.")
        if name in found:
            raise ModelError(f"{path} has {name} twice.")
        if info.file_size > MAX_RATIO * max(info.compress_size, 1024):
            raise ModelError(
                f"{path}: {name} holds {info.file_size} bytes packed into {info.compress_size}; "
                f"torch.export.save does not pack."
            )
        found[name] = info
    known = {*EXPECTED, PROGRAM, SAMPLE, *CONFIGS.values(), *LEGACY}
    for name in found:
        folder, stem = name[: name.rfind("/") + 1], name[name.rfind("/") + 1 :]
        is_payload = folder in PAYLOADS and PAYLOADS[folder].fullmatch(stem)
        if name not in known and not is_payload and not LEFT_OUT.fullmatch(name):
            raise UntrustedModelError(
                f"{path}: {name!r} is not a member that a program of tensors has; reading it "
                f"would run code from the file. Save the program again with torch.export.save "
                f"(torch 2.9 or later), or give --trust if you wrote the file."
            )
    return found


def _check_version(path: Path, read: Mapping[str, bytes]) -> None:
    for name, expected in EXPECTED.items():
        came = read.get(name, b"" if name != BYTE_ORDER else expected)
        if came.strip() != expected:
            raise ModelError(
                f"{path}: {name} is {came[:20].decode(errors='replace')!r}; expected "
                f"{expected.decode()!r}. Save the program again with torch.export.save."
            )
    if PROGRAM not in read:
        raise ModelError(f"{path} holds no program: it lacks {PROGRAM}.")


def _payloads(path: Path, folder: str, content: bytes) -> dict[str, Any]:
    """Tensor's name -> what the config says of it.

    Raises:
        UntrustedModelError: One is not a tensor.
    """
    payloads: dict[str, Any] = parsed_json(content)["config"]
    for name, payload in payloads.items():
        if not PAYLOADS[folder].fullmatch(payload["path_name"]):
            raise refused(f"{path}: {CONFIGS[folder]}", payload["path_name"], "a tensor's file")
        if not DOTTED.fullmatch(name):
            raise refused(f"{path}: {CONFIGS[folder]}", name, "the name of a tensor")
        for size in ("sizes", "strides"):
            for number in (payload.get("tensor_meta") or {}).get(size, ()):
                if type(number.get("as_int")) is not int:
                    raise refused(f"{path}: {CONFIGS[folder]}", str(number), f"{size} of {name}")
    return payloads


def _tensors(
    path: Path,
    archive: zipfile.ZipFile,
    members: Mapping[str, zipfile.ZipInfo],
    folder: str,
    payloads: Mapping[str, Any],
) -> dict[str, bytes]:
    """Member -> content; what any payload says is a pickle is one of ours."""
    found: dict[str, bytes] = {}
    pickled = {each["path_name"] for each in payloads.values() if each.get("use_pickle")}
    for payload in payloads.values():
        name = folder + payload["path_name"]
        if name in found:
            continue
        if name not in members:
            raise ModelError(f"{path} lacks {name}, which {CONFIGS[folder]} names.")
        content = archive.read(members[name])
        if payload["path_name"] in pickled:
            content = _pickled_again(path, name, content, kind=Tensor)
        elif not content:
            _check_empty(path, name, payload)
        found[name] = content
    return found


def _check_empty(path: Path, name: str, payload: Mapping[str, Any]) -> None:
    """Raises `ModelError` where torch would make up a tensor for a member without content."""
    if math.prod(size["as_int"] for size in payload["tensor_meta"]["sizes"]):
        raise ModelError(f"{path}: {name} is empty, and its config says that it holds numbers.")


def _pickled_again(path: Path, name: str, content: bytes, kind: Any = object) -> bytes:
    """The same tensors and plain containers in a pickle of ours.

    torch.export.load reads these with the unrestricted unpickler, some always and some where the
    restricted one fails.
    """
    if not content:
        return content
    try:
        value = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as err:
        raise UntrustedModelError(
            f"{path}: {name} holds more than tensors; reading it would run code from the file. "
            f"Give --trust if you wrote it."
        ) from err
    if not isinstance(value, kind):
        raise ModelError(f"{path}: {name} holds a {type(value).__name__}; expected a tensor.")
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
