"""Files that are well-formed but for one field: each mutation keeps lengths and check sums right.

A file that was spoiled byte by byte mostly ends at a check sum. These get past it, to what reads
the field itself.
"""

import contextlib
import io
import json
import pickletools
import random
import sqlite3
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message

from compressor.sqlite import JOURNAL_HEAD, JOURNAL_MAGIC

Change = Callable[[bytes, random.Random], bytes]

NUMBERS = (0, -1, 1, 2, 7, 255, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, -(2**63), 10**30)
FRACTIONS = (0.0, -0.0, 0.5, -1.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "", "\0", "a" * 5000, "../../etc/passwd", "/dev/zero", "file:///etc/passwd", "é\u202e\x1b[2J",
    "__import__('os').system('touch owned')", "[/red]", "%s%n", "1e999", "-1", "None", "{}",
    "os.system", "\\x", "Symbol('s0')", "torch.ops.aten.from_file.default",
)  # fmt: skip


def other(value: object, drawn: random.Random) -> object:
    """Something of the same kind, or, one time in four, of another."""
    if drawn.random() < 0.25:
        return drawn.choice((None, True, [], {}, [[]], {"": None}, *NUMBERS, *FRACTIONS, *TEXTS))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return drawn.choice((-value, value + 1, value * 1000, str(value), *NUMBERS))
    if isinstance(value, float):
        return drawn.choice((-value, value * 1e9, str(value), *FRACTIONS))
    if isinstance(value, str):
        return drawn.choice((value + "x", value[::-1], value.upper(), *TEXTS))
    if isinstance(value, list):
        return drawn.choice((value * 2, value[1:], value[::-1], [value], value * 100))
    if isinstance(value, dict):
        return drawn.choice(({**value, "more": 1}, {}, list(value), {"in": value}))
    return drawn.choice((0, "null", [], {}))


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every field in nested dicts and lists."""
    for key in content if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], dict | list):
            yield from _places(content[key])


def of_json(good: bytes, drawn: random.Random) -> bytes:
    """One field changed, missing, under another key, or there twice."""
    content = json.loads(good)
    place, key = drawn.choice(list(_places(content)))
    how = drawn.choice(("change", "change", "change", "drop", "rename", "twice"))
    if how == "change":
        place[key] = other(place[key], drawn)
    elif how == "drop":
        del place[key]
    elif isinstance(place, list):
        place.append(place[key])
    elif how == "rename":
        place[f"{key}x"] = place.pop(key)
    else:  # JSON lets a key be there twice; the last one counts
        text, value = json.dumps(content), json.dumps(place[key])
        pair = f"{json.dumps(key)}: {value}"
        return text.replace(
            pair, f"{pair}, {json.dumps(key)}: {json.dumps(other(0, drawn))}"
        ).encode()
    return json.dumps(content).encode()


def of_toml(good: bytes, drawn: random.Random) -> bytes:
    """A line with another value, without its line, there twice, or under another table."""
    lines = good.decode().splitlines()
    at = drawn.choice([i for i, line in enumerate(lines) if "=" in line or line.startswith("[")])
    how = drawn.choice(("change", "change", "change", "drop", "twice", "move", "table"))
    if how == "change" and "=" in lines[at]:
        value = drawn.choice((*NUMBERS, "inf", "nan", "-nan", "1979-05-27T07:32:00Z", "[]", "{}",
                              "[[], [{}]]", "true", "0x7fffffffffffffff", "[1, 'a', {b = 2}]",
                              *map(json.dumps, TEXTS)))  # fmt: skip
        lines[at] = f"{lines[at].partition('=')[0]}= {value}"
    elif how == "drop":
        del lines[at]
    elif how == "twice":
        lines.insert(at, lines[at])
    elif how == "move":
        lines.append(lines.pop(at))
    else:
        lines.insert(
            at, drawn.choice(("[other]", "[[other]]", "[runtime]", "[a.b.c]", "x.y.z = 1"))
        )
    return "\n".join(lines).encode()


def members_of(good: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def of_pickle(good: bytes, drawn: random.Random) -> bytes:
    """One operand of one operation changed; the others stand where they stood."""
    operations = list(pickletools.genops(good))
    ends = [position for *_, position in operations[1:]] + [len(good)]
    written: dict[str, Callable[[Any], bytes]] = {
        "BININT1": lambda _: b"K" + bytes([drawn.randrange(256)]),
        "BININT2": lambda _: b"J" + struct.pack("<i", drawn.choice((-1, -5, 0, 2**31 - 1, 10**6))),
        "BININT": lambda _: b"J" + struct.pack("<i", drawn.choice((-1, 0, 3, -(2**31)))),
        "BINUNICODE": lambda said: _text(str(other(said, drawn))),
        "SHORT_BINUNICODE": lambda said: _text(str(other(said, drawn))),
        "GLOBAL": lambda said: b"c" + drawn.choice(
            ("torch\nDoubleStorage", "torch\nByteStorage", "os\nsystem", "builtins\neval",
             "torch._utils\n_rebuild_parameter", "torch._utils\n_rebuild_sparse_tensor",
             "torch._utils\n_rebuild_meta_tensor_no_storage", "torch\nUntypedStorage",
             "torch._utils\n_rebuild_qtensor", "collections\nOrderedDict", "torch\nSize")
        ).encode() + b"\n",
        "NEWTRUE": lambda _: b"\x89", "NEWFALSE": lambda _: b"\x88", "NONE": lambda _: b"K\0",
        "EMPTY_TUPLE": lambda _: b"]", "EMPTY_DICT": lambda _: b"]", "TUPLE2": lambda _: b"\x85",
    }  # fmt: skip
    able = [i for i, (op, *_) in enumerate(operations) if op.name in written]
    at = drawn.choice(able)
    op, said, begin = operations[at]
    assert begin is not None
    return good[:begin] + written[op.name](said) + good[ends[at] :]


def _text(text: str) -> bytes:
    content = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(content)) + content


def of_archive(good: bytes, drawn: random.Random) -> bytes:
    """A .pt or .pt2 in which one operand of a pickle, or one field of its JSON, is another."""
    members = members_of(good)
    able = [name for name in members if name.endswith((".pkl", ".json", ".pt", "byteorder"))]
    name = drawn.choice(able)
    if name.endswith("byteorder"):
        members[name] = drawn.choice((b"big", b"little\n", b"", b"middle"))
    elif name.endswith(".json"):
        members[name] = of_json(members[name], drawn)
    elif name.endswith(".pt"):
        members[name] = of_archive(members[name], drawn)
    else:
        members[name] = of_pickle(members[name], drawn)
    return packed(members)


def of_npz(good: bytes, drawn: random.Random) -> bytes:
    """An array of another type, shape or order, with other numbers, or under another name."""
    members = members_of(good)
    name = drawn.choice(sorted(members))
    array = np.load(io.BytesIO(members[name]))
    kinds = ("<f2", ">f4", "<f8", "<i8", ">i2", "|b1", "<c8", "<U3", "|S4", "<M8[s]", "|V2", "<u8")
    how = drawn.choice(("kind", "shape", "order", "numbers", "name", "claim", "empty"))
    with np.errstate(all="ignore"), contextlib.suppress(ValueError, TypeError):
        if how == "kind":
            array = np.zeros(array.shape, drawn.choice(kinds))
        elif how == "shape":
            array = array.reshape(drawn.choice((-1, (1, *array.shape), array.shape[::-1])))
        elif how == "order":
            array = np.asfortranarray(array[::-1])
        elif how == "numbers":
            array = np.full(array.shape, drawn.choice((*NUMBERS[:-1], *FRACTIONS)))
        elif how == "empty":
            array = array[:0]
    buffer = io.BytesIO()
    if how == "claim":
        shape = drawn.choice(((2**40,), (-1, 3), (0, 2**62), (10**30,), (True,), (1,) * 70))
        head = {
            "descr": drawn.choice(kinds),
            "fortran_order": drawn.random() < 0.5,
            "shape": shape,
        }
        np.lib.format.write_array_header_2_0(buffer, head)
        buffer.write(members[name][128:])
    else:
        np.save(buffer, array)
    if how == "name":
        del members[name]
        name = drawn.choice(
            ("fit_images.npy", "labels.npy", "input_0.npy", "../x.npy", "x", ".npy")
        )
    return packed(members | {name: buffer.getvalue()})


def of_safetensors(good: bytes, drawn: random.Random) -> bytes:
    """One field of the header changed; its length is right."""
    n_bytes = struct.unpack("<Q", good[:8])[0]
    head = of_json(good[8 : 8 + n_bytes], drawn)
    return struct.pack("<Q", len(head)) + head + good[8 + n_bytes :]


def of_onnx(good: bytes, drawn: random.Random) -> bytes:
    """One field of one message changed, cleared, or there twice."""
    model = onnx.load_from_string(good)
    messages = list(_messages(model))
    while True:
        message = drawn.choice(messages)
        fields = message.ListFields()
        if fields:
            break
    field, value = drawn.choice(fields)
    is_many = not isinstance(value, Message | str | bytes | int | float)
    how = drawn.choice(("change", "change", "change", "clear", "twice"))
    if how == "clear":
        message.ClearField(field.name)
    elif is_many and how == "twice":
        value.MergeFrom(list(value))
    elif is_many and field.message_type is None and len(value):
        at = drawn.randrange(len(value))
        with contextlib.suppress(TypeError, ValueError):
            value[at] = other(value[at], drawn)
    elif not isinstance(value, Message) and not is_many:
        with contextlib.suppress(TypeError, ValueError):
            new = drawn.randbytes(9) if isinstance(value, bytes) else other(value, drawn)
            setattr(message, field.name, new)
    return model.SerializeToString()


def _messages(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in (value,) if isinstance(value, Message) else value:
                yield from _messages(each)


def of_study(good: bytes, drawn: random.Random) -> bytes:
    """One cell of another value or kind, a row more or less, or something else in the schema."""
    connection = sqlite3.connect(":memory:")
    connection.deserialize(good)
    tables = [
        name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
        if connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
    ]  # fmt: skip
    table = drawn.choice(tables)
    columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    column = drawn.choice(columns)
    (row,) = drawn.choice(connection.execute(f"SELECT rowid FROM {table}").fetchall())
    (value,) = connection.execute(f"SELECT {column} FROM {table} WHERE rowid={row}").fetchone()
    how = drawn.choice(("cell",) * 6 + ("drop", "copy", "schema"))
    with contextlib.suppress(sqlite3.Error, OverflowError, UnicodeEncodeError):
        if how == "cell":
            if column.endswith("_json") and drawn.random() < 0.6:
                new: object = of_json(f"[{value}]".encode(), drawn).decode()[1:-1]
            else:
                new = drawn.choice((other(value, drawn), drawn.randbytes(3), None))
            if isinstance(new, list | dict):
                new = json.dumps(new)
            connection.execute("PRAGMA ignore_check_constraints=ON")
            connection.execute(f"UPDATE {table} SET {column}=? WHERE rowid=?", (new, row))
        elif how == "drop":
            connection.execute(f"DELETE FROM {table} WHERE rowid=?", (row,))
        elif how == "copy":
            connection.execute(f"INSERT INTO {table} SELECT * FROM {table} WHERE rowid=?", (row,))
        else:
            connection.execute(drawn.choice((
                "CREATE TABLE more (x)", f"CREATE VIEW v AS SELECT * FROM {table}",
                f"CREATE TRIGGER t AFTER UPDATE ON {table} BEGIN DELETE FROM {table}; END",
                f"CREATE INDEX i ON {table} ({column})", f"ALTER TABLE {table} ADD COLUMN y",
                f"ALTER TABLE {table} RENAME COLUMN {column} TO z", f"DROP TABLE {table}",
                "PRAGMA user_version=7", "PRAGMA application_id=7",
                f"CREATE TABLE copied AS SELECT * FROM {table}",
            )))  # fmt: skip
    connection.commit()
    return connection.serialize()


def of_journal(good: bytes, drawn: random.Random) -> bytes:
    """A journal for the study `good`: right but for one field, with or without a page in it."""
    page = struct.unpack(">H", good[16:18])[0]
    head = [JOURNAL_MAGIC, 1, 7, len(good) // page, 512, page]
    at = drawn.randrange(1, 6)
    if drawn.random() < 0.8:
        head[at] = drawn.choice((0, 1, 2, 511, 512, 513, 1024, 4096, 65536, 2**31, 2**32 - 1))
    number = drawn.choice((1, 2, 3, 0, 2**31))
    body = good[:page]
    check = (7 + sum(body[i] for i in range(page - 200, 0, -200))) % 2**32
    record = struct.pack(">I", number) + body + struct.pack(">I", check)
    tail = b""
    if drawn.random() < 0.3:
        name = drawn.choice(("owned", "/tmp/owned", "", "a" * 600, "../study.db")).encode()
        magic = drawn.choice((JOURNAL_MAGIC, JOURNAL_MAGIC, JOURNAL_MAGIC[::-1]))
        length = drawn.choice((len(name), len(name) + 1, 0, 2**31))
        tail = struct.pack(">I", 2**30 // page + 1) + name + struct.pack(">II", length, sum(name))
        tail += magic
    return JOURNAL_HEAD.pack(*head).ljust(512, b"\0") + record + tail


def of_png(good: bytes, drawn: random.Random) -> bytes:
    """One chunk with other content, of another kind, there twice, away, or elsewhere."""
    chunks, at = [], 8
    while at < len(good):
        (n_bytes,) = struct.unpack(">I", good[at : at + 4])
        chunks.append((good[at + 4 : at + 8], good[at + 8 : at + 8 + n_bytes]))
        at += 12 + n_bytes
    i = drawn.randrange(len(chunks))
    kind, content = chunks[i]
    how = drawn.choice(("content", "content", "content", "kind", "twice", "drop", "move", "more"))
    if how == "content" and content:
        place, size = drawn.randrange(len(content)), drawn.choice((1, 1, 4))
        chunks[i] = kind, content[:place] + drawn.randbytes(size) + content[place + size :]
    elif how == "kind":
        chunks[i] = drawn.choice((b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"zTXt")), content
    elif how == "twice":
        chunks.insert(i, chunks[i])
    elif how == "drop":
        del chunks[i]
    elif how == "move":
        chunks.insert(drawn.randrange(len(chunks)), chunks.pop(i))
    else:
        kinds = (b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"eXIf", b"gAMA", b"pHYs", b"tRNS", b"PLTE",
                 b"acTL", b"sRGB", b"cHRM", b"tIME")  # fmt: skip
        swollen = b"a\0\0" + zlib.compress(bytes(2**22))
        more = drawn.choice((b"", drawn.randbytes(30), swollen, b"a\0\1\0\0\0" + swollen[3:]))
        chunks.insert(1, (drawn.choice(kinds), more))
    written = (
        struct.pack(">I", len(content)) + kind + content
        + struct.pack(">I", zlib.crc32(kind + content)) for kind, content in chunks
    )  # fmt: skip
    return good[:8] + b"".join(written)


def of_jpeg(good: bytes, drawn: random.Random) -> bytes:
    """One segment before the pixels changed, there twice or away; its length is right."""
    segments, at = [], 2
    while good[at + 1] != 0xDA:
        (n_bytes,) = struct.unpack(">H", good[at + 2 : at + 4])
        segments.append((good[at + 1], good[at + 4 : at + 2 + n_bytes]))
        at += 2 + n_bytes
    i = drawn.randrange(len(segments))
    kind, content = segments[i]
    how = drawn.choice(("content", "content", "content", "kind", "twice", "drop", "more"))
    if how == "content" and content:
        place = drawn.randrange(len(content))
        segments[i] = kind, content[:place] + drawn.randbytes(1) + content[place + 1 :]
    elif how == "kind":
        segments[i] = drawn.choice((0xC2, 0xC9, 0xC3, 0xE1, 0xE2, 0xEE, 0xFE, 0xDD)), content
    elif how == "twice":
        segments.insert(i, segments[i])
    elif how == "drop":
        del segments[i]
    else:
        resource = b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\xff\xff"
        more = drawn.choice(
            (b"Exif\0\0MM\0*" + b"\xff" * 40, b"ICC_PROFILE\0\1\2", b"MPF\0II*\0", resource)
        )
        segments.insert(0, (drawn.choice((0xE1, 0xE2, 0xED, 0xEE)), more))
    written = (
        bytes((0xFF, kind)) + struct.pack(">H", len(content) + 2) + content
        for kind, content in segments
    )
    return good[:2] + b"".join(written) + good[at:]
