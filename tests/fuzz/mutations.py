"""What becomes of a good file in a stranger's hands."""

import io
import json
import math
import zipfile
from collections.abc import Callable

import tomli_w
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from compressor.files import parsed_toml

Mutation = Callable[[bytes], SearchStrategy[bytes]]

HOSTILE: tuple[object, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**40, -0.5, 1e-320, 1e308, math.inf, -math.inf,
    math.nan, "", " ", "\0", "-", "../../../etc/passwd", "/etc/passwd", "file:///etc/passwd",
    "http://localhost:1/", "$(touch owned)", "%s%n", "é" * 300, "a" * 20_000, "12ms", "1e5", [],
    {}, [[]], [None], {"": {}}, ["x"] * 50, [1, 2, 3], {"a": "b"},
)  # fmt: skip
DEEP = 40_000  # brackets
# What nobody wrote by mutation, for all kinds of text.
TEXTS = (
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"{" * DEEP, b"[" * DEEP, b"a = " + b"[" * DEEP,
    b"a." * 10_000 + b"b = 1", b"1" * 20_000, b"NaN", b"null", b"[]", b"{}", b'""', b"{}{}",
    b"-" * 5000, b"\n" * 20_000, b" " * 40_000, b'{"a": ' * 2000,
)  # fmt: skip


def of_bytes(good: bytes) -> SearchStrategy[bytes]:
    """Cut off, overwritten, repeated, or with something in between."""

    @st.composite
    def mutated(draw: DrawFn) -> bytes:
        content = bytearray(good)
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(content)))
            how = draw(st.sampled_from(("cut", "set", "insert", "repeat", "drop")))
            if how == "cut":
                del content[at:]
            elif how == "set":
                content[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            elif how == "insert":
                content[at:at] = draw(st.binary(min_size=1, max_size=12))
            elif how == "repeat":
                content[at:at] = content[at : at + draw(st.integers(1, 64))]
            else:
                del content[at : at + draw(st.integers(1, 64))]
        return bytes(content)

    return mutated()


def of_text(good: bytes) -> SearchStrategy[bytes]:
    """The same, or something else altogether."""
    return st.one_of(of_bytes(good), st.sampled_from(TEXTS), st.binary(max_size=60))


def of_json(good: bytes) -> SearchStrategy[bytes]:
    """The same, or with other values in their places."""
    changed = _elsewhere(json.loads(good)).map(lambda content: json.dumps(content).encode())
    return st.one_of(changed, changed, of_text(good))


def of_toml(good: bytes) -> SearchStrategy[bytes]:
    """The same for TOML, which has no null."""

    def dumped(content: object) -> bytes:
        try:
            return tomli_w.dumps(content).encode()  # type: ignore[arg-type]
        except (TypeError, AttributeError, UnicodeEncodeError):
            return repr(content).encode(errors="replace")

    changed = _elsewhere(parsed_toml(good.decode())).map(dumped)
    return st.one_of(changed, changed, of_text(good))


def of_zip(good: bytes) -> SearchStrategy[bytes]:
    """With other content in a member whose check sum is right, other names, or broken as a zip."""
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    @st.composite
    def mutated(draw: DrawFn) -> bytes:
        changed = dict(members)
        name = draw(st.sampled_from(sorted(changed)))
        how = draw(st.sampled_from(("content", "content", "content", "drop", "rename", "add")))
        if how == "content":
            head, tail = changed[name][:256], changed[name][256:]  # where formats say what follows
            changed[name] = draw(of_bytes(head)) + tail
        elif how == "drop":
            del changed[name]
        else:
            other = draw(
                st.sampled_from(("../../owned", "/tmp/owned", "a\\..\\b", "x" * 300, "é"))
            )
            content = changed.pop(name) if how == "rename" else b"owned"
            changed[other] = content
        packed = io.BytesIO()
        packing = draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))
        with zipfile.ZipFile(packed, "w", packing) as archive:
            for each, content in changed.items():
                archive.writestr(each, content)
        return packed.getvalue()

    return st.one_of(mutated(), mutated(), of_bytes(good))


def _elsewhere(good: object) -> SearchStrategy[object]:
    """With a few values exchanged, left out, or under another key."""
    paths = list(_paths(good))

    @st.composite
    def mutated(draw: DrawFn) -> object:
        content = json.loads(json.dumps(good, default=str))
        for _ in range(draw(st.integers(1, 3))):
            path = draw(st.sampled_from(paths))
            value = draw(st.sampled_from(HOSTILE))
            if not path:
                return value
            place = content
            try:
                for key in path[:-1]:
                    place = place[key]
                how = draw(st.sampled_from(("set", "set", "set", "drop", "rename")))
                if how == "set":
                    place[path[-1]] = value
                elif how == "drop":
                    del place[path[-1]]
                else:
                    place["unheard-of"] = place.pop(path[-1])
            except (KeyError, IndexError, TypeError, AttributeError):
                continue  # an earlier change has removed the place
        return content

    return mutated()


def _paths(value: object, before: tuple[str | int, ...] = ()) -> "list[tuple[str | int, ...]]":
    """Ways to every value in nested containers; of long lists, to the first few entries."""
    found = [before]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += _paths(inner, (*before, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value[:3]):
            found += _paths(inner, (*before, i))
    return found
