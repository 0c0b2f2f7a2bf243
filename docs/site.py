"""What the site has beside the pages: the files of the repository that they link to.

A link such as `../samples/digits/train.py` leads out of `docs/`. Those files are copied into the
site as they are, below `source/`, and the links lead there.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files that pages link to.

    Raises:
        FileNotFoundError: A page links to what is not there.
    """
    pages = [file.content_string for file in files.documentation_pages()]
    for path in sorted({match[1] for page in pages for match in OUTSIDE.finditer(page)}):
        content = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, _place(path), content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`markdown` with links to those copies."""
    return OUTSIDE.sub(lambda match: f"]({_place(match[1])})", markdown)


def _place(path: str) -> str:
    """As plain text, so that pages of the repository are not taken for pages of the site."""
    return f"source/{path}.txt"
