"""Makes what is generated under `docs/`: the pictures, figures inside of pages.

python -m docs.build
python -m docs.build pictures comparison
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = DOCS / "pictures"
QUICK_START, COMPARISON = DOCS / "quick_start.md", DOCS / "comparison.md"
README = ROOT / "README.md"
MARKERS = {  # of what is made inside a page: where it begins and ends
    QUICK_START: ("<!-- made by `make docs` from the demo's result -->", "<!-- end of it -->"),
    COMPARISON: ("<!-- made by `python -m benchmarks.peers report` -->", "<!-- end of it -->"),
    README: ("<!-- made by `python -m benchmarks.peers summary` -->", "<!-- end of it -->"),
}


def make_pictures() -> None:
    """Every picture from the figures in `benchmarks/results`."""
    from docs.draw import draw_all

    draw_all(PICTURES)


def make_demo() -> None:
    """What the demo printed, in `quick_start.md`."""
    put_into(QUICK_START, f"```text\n{demo_report()}\n```")


def make_comparison() -> None:
    """The tables of `comparison.md`, as sections of the level below its own, and the README's."""
    lines = printed_by("benchmarks.peers", "report").splitlines()
    deeper = (f"#{line}" if line.startswith("#") else line for line in lines)
    put_into(COMPARISON, "\n".join(deeper))
    put_into(README, printed_by("benchmarks.peers", "summary"))


def printed_by(module: str, command: str) -> str:
    """What a command of a benchmark prints."""
    done = subprocess.run(
        [sys.executable, "-m", module, command],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def demo_report() -> str:
    """What `make demo` prints in the end, without the line that names the folder."""
    import compressor

    with tempfile.TemporaryDirectory() as folder:
        result = RESULTS / "demo-result.json"
        shutil.copy(result, Path(folder) / "result.json")
        text = compressor.text_report(compressor.read_result(Path(folder)))
    return text.rpartition("\n")[0]


def put_into(page: Path, content: str) -> None:
    """Puts `content` between the markers of `page`."""
    before, _, after = cut(page)
    begin, end = MARKERS[page]
    page.write_text(f"{before}{begin}\n\n{content}\n\n{end}{after}", encoding="utf-8")


def cut(page: Path) -> tuple[str, str, str]:
    """What stands before, between and behind the markers of `page`.

    Raises:
        ValueError: It has not both of them, in order.
    """
    begin, end = MARKERS[page]
    before, has_begin, rest = page.read_text(encoding="utf-8").partition(begin)
    between, has_end, after = rest.partition(end)
    if not has_begin or not has_end:
        raise ValueError(f"{page.name} needs the lines {begin!r} and {end!r}.")
    return before, between, after


MAKERS: dict[str, Callable[[], None]] = {
    "pictures": make_pictures, "demo": make_demo, "comparison": make_comparison,
}  # fmt: skip


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="*", choices=[*MAKERS, []], help="default all")
    wanted = parser.parse_args().what or list(MAKERS)
    for name in wanted:
        MAKERS[name]()
        print(f"made {name}", flush=True)


if __name__ == "__main__":
    main()
