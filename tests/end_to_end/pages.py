"""The pages of the documentation: their blocks of code, links and pictures."""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PYTHON, TOML, YAML, SHELL, OUTPUT = "python", "toml", "yaml", "shell", "text"
KINDS = {
    "python": PYTHON, "toml": TOML, "yaml": YAML, "bash": SHELL, "console": SHELL, "text": OUTPUT,
}  # fmt: skip
# What may begin a block that says nothing of its kind; anything else must say it.
COMMANDS = (
    "compress", "python", "pip", "make", "ssh", "ssh-copy-id", "ssh-keygen", "cd", ".", "tail",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """Code between two fences.

    Attributes:
        page: Path of the page from the repository's root.
        section: Heading of the second level that it stands under.
        line: Of the first fence, from 1.
        info: What stands behind that fence.
        content: The code.
    """

    page: str
    section: str
    line: int
    info: str
    content: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def kind(self) -> str:
        """One of `KINDS`' values.

        Raises:
            ValueError: It says none, and is no command either.
        """
        if self.info in KINDS:
            return KINDS[self.info]
        first = (self.commands().split() or [""])[0]
        if self.info == "" and first in COMMANDS:
            return SHELL
        raise ValueError(
            f"{self}: a block {self.info!r} that begins with {first!r}; expected one of "
            f"{', '.join(KINDS)}, or a known command. What a program prints is `text`."
        )

    @property
    def file(self) -> str | None:
        """The name in its first line, `# NAME.toml`, of a block that is a whole file."""
        found = re.match(r"# ([\w./-]+\.(?:toml|py|yml))\n", self.content)
        return found[1] if found else None

    def commands(self) -> str:
        """The shell's part of it: of a `console` block, what stands behind `$ `."""
        if self.info != "console":
            return self.content
        lines = [line[2:] for line in self.content.splitlines() if line.startswith("$ ")]
        return "\n".join(lines) + "\n"


def tokens(page: Path) -> Iterator[Token]:
    """Every token, those inside of lines too."""
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def blocks(page: Path) -> list[Block]:
    """In order.

    Raises:
        ValueError: One is indented, so that its kind cannot be told.
    """
    name, found, section, is_head = page.relative_to(ROOT).as_posix(), [], "", False
    for token in tokens(page):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "inline" and is_head:
            section = token.content
        is_head = token.type == "heading_open" and token.tag == "h2"
        if token.type == "code_block":
            raise ValueError(f"{name}:{line}: an indented block; fence it.")
        if token.type == "fence":
            found.append(Block(name, section, line, token.info.strip(), token.content))
    return found


def references(page: Path) -> list[str]:
    """What its links and pictures name."""
    named = [token.attrs.get("href") or token.attrs.get("src") for token in tokens(page)]
    return [str(each) for each in named if each]


@cache
def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    found: set[str] = set()
    is_heading = False
    for token in tokens(page):
        if token.type == "inline" and is_heading:
            text = "".join(c.content for c in token.children or () if c.type != "html_inline")
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            n = sum(1 for each in found if each == slug or re.fullmatch(rf"{slug}-\d+", each))
            found.add(f"{slug}-{n}" if n else slug)
        is_heading = token.type == "heading_open"
    return found


def extras() -> set[str]:
    """What `pip install -e '.[...]'` may name."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return set(content["project"]["optional-dependencies"])


def requirements() -> set[str]:
    """Names of the packages that pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    every = chain(project["dependencies"], *project["optional-dependencies"].values())
    return {re.match(r"[\w-]+", each)[0] for each in every}  # type: ignore[index]


def make_targets() -> set[str]:
    """Of the Makefile."""
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
