"""Images that mean harm, and those that are promised to be read."""

import contextlib
import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from compressor.datasets.files import FORMATS, reader
from compressor.errors import DataError
from compressor.inputs import IMAGE_SUFFIXES

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def chunk(kind: bytes, content: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + crc


def png(*chunks: bytes, side: int = 8) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join((header, *chunks)) + chunk(b"IEND", b"")


PIXELS = chunk(b"IDAT", zlib.compress(b"\0" * 9 * 8))
SWOLLEN_TEXT = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * 2**23))
BAD_IMAGES = {
    "truncated header": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0\0"),
    "text that swells": png(SWOLLEN_TEXT, PIXELS),
    "text that swells many times": png(*[SWOLLEN_TEXT] * 20, PIXELS),
    "more pixels than memory": png(PIXELS, side=2**17),
    "broken chunk": png(struct.pack(">I", 2**31 - 1) + b"IDAT"),
    "PostScript": EPS,
}


@pytest.mark.bad_input("images that swell, break off, or are programs")
@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_images_that_mean_harm_are_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(BAD_IMAGES[kind])
    with pytest.raises(DataError, match=r"image\.png cannot be read as an image: ") as told:
        reader(None, 3)(path)
    assert "\n" not in str(told.value)


@pytest.mark.bad_input("images that swell, break off, or are programs")
def test_no_program_is_started_for_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostScript is a language, and Pillow has Ghostscript run it, whatever the file is called."""
    program, mark, path = tmp_path / "gs", tmp_path / "it-ran", tmp_path / "image.png"
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looked for once
    path.write_bytes(EPS)
    with pytest.raises(DataError, match="cannot be read as an image"):
        reader(None, 3)(path)
    assert not mark.exists()
    with contextlib.suppress(OSError), Image.open(path) as image:
        image.load()
    assert mark.exists(), "Pillow ran nothing either, so the refusal shows nothing"


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_kind_of_image_that_is_promised_is_read(suffix: str, tmp_path: Path) -> None:
    assert Image.registered_extensions()[suffix] in FORMATS
    Image.new("L", (8, 6), 77).save(tmp_path / f"image{suffix}")
    assert reader(None, 1)(tmp_path / f"image{suffix}").shape == (1, 6, 8)
