"""What was done to runs, and what was lost: the tests marked `fault` and `bad_input`, as tables.

    python -m benchmarks.reliability            # some minutes
    python -m benchmarks.reliability --slow     # 200 kills, more than 10,000 spoiled files

A fault is survived where its test passes: every trial that was finished is there, once, and the
run goes on. A test that fails counts all of its cases as lost.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
HEAD = """# What runs survive, and what input does no harm

Made by `{command}`: every row is a group of tests with real parts
(processes that are killed, a full disk, an sshd that goes away), named in its last column. How it
is built: a trial is one transaction of SQLite; files are written under another name, synced and
renamed; models run in a process of their own; nothing is unpickled without `--trust`, which no
file can give.
"""


@dataclass
class Row:
    """One kind of fault or input."""

    n: int = 0
    n_failed: int = 0
    n_skipped: int = 0
    tests: tuple[str, ...] = ()


def main() -> None:
    """Runs the tests and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slow", action="store_true")
    args = parser.parse_args()
    wanted = "fault or bad_input"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", f"({wanted}) and not slow",
                   f"--junitxml={report}", "-o", "junit_family=xunit1",
                   "-n", "2", "--dist", "loadfile"]  # fmt: skip
        if args.slow:
            command[5] = wanted
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=one_thread, check=False)
        suites = ElementTree.parse(report).getroot()
    shown = f"python -m benchmarks.reliability{' --slow' if args.slow else ''}"
    faults, inputs = rows_of(suites, "fault"), rows_of(suites, "bad_input")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join([
        HEAD.format(command=shown),
        *table(("fault", "tried", "survived", "lost"), faults), "",
        *table(("input", "tried", "refused or read", "tracebacks, hangs, harm"), inputs), "",
    ]), encoding="utf-8")  # fmt: skip
    print(PAGE.read_text(encoding="utf-8"))
    raise SystemExit(done.returncode)


def rows_of(suites: ElementTree.Element, kind: str) -> dict[str, Row]:
    """Title -> what its tests came to."""
    rows: dict[str, Row] = {}
    for case in suites.iter("testcase"):
        properties = {p.get("name"): p.get("value") for p in case.iter("property")}
        title = properties.get(kind)
        if title is None:
            continue
        row = rows.setdefault(title, Row())
        n = int(properties["n"] or 1)
        if case.find("skipped") is not None:
            row.n_skipped += n
            continue
        row.n += n
        has_failed = case.find("failure") is not None or case.find("error") is not None
        row.n_failed += n * has_failed
        name = (case.get("name") or "").partition("[")[0]
        if name not in row.tests:
            row.tests = (*row.tests, name)
    return rows


def table(heads: tuple[str, str, str, str], rows: dict[str, Row]) -> list[str]:
    """A row a kind, and their sum."""
    lines = [f"| {' | '.join(heads)} | tests |", "|---|--:|--:|--:|---|"]
    for title, row in rows.items():
        skipped = f" ({row.n_skipped} not tried here)" if row.n_skipped else ""
        tests = ", ".join(f"`{name}`" for name in row.tests)
        lines.append(
            f"| {title}{skipped} | {row.n} | {row.n - row.n_failed} | {row.n_failed} | {tests} |"
        )
    n, n_failed = (sum(getattr(row, key) for row in rows.values()) for key in ("n", "n_failed"))
    return [*lines, f"| **all** | **{n}** | **{n - n_failed}** | **{n_failed}** | |"]


if __name__ == "__main__":
    main()
