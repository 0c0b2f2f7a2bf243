"""What a terminal would obey never reaches one: on its own, in the table, in a log, on a page."""

import io
import json
import logging
import re
from pathlib import Path

import pytest
from compressor.cli import outcome, progress
from rich.console import Console

from compressor import run_folder
from compressor.printable import checked_text, one_line, printable
from compressor.report.html import _safe
from compressor.values import Accuracy, Progress, Trial

HOSTILE = (
    "\x1b[2J\x1b]0;title\x07\x1b]8;;http://evil\x1b\\ \x9b31m \x7f \u202egpj.exe \u2066 \ud8ff "
    "\r\x08 [/Conv_0/act/Mul] [bold red]x[/bold red]"
)
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SGR = re.compile("\x1b\\[[0-9;?]*[A-Za-z]")  # what rich itself sends


def hostile_trial(*, failed: bool) -> Trial:
    accuracy = None if failed else Accuracy(0.9, 100)
    return Trial(
        number=0, widths={HOSTILE: 8}, phase=HOSTILE, accuracy=accuracy,
        speedup=None if failed else 2.0, speedup_ci95=(1.9, 2.1), latency_ms=1.5,
        failed_because=HOSTILE if failed else None,
    )  # fmt: skip


@pytest.mark.bad_input("escape and control characters")
def test_no_character_that_a_terminal_obeys_is_left() -> None:
    assert not OBEYED.search(printable(HOSTILE))
    assert printable("\x1b[2J") == r"\x1b[2J"
    assert printable("\udcff\u202e") == r"\udcff\u202e"
    assert printable("plain\ttext, \u4f60\u597d \U0001f600\r\nmore") == (
        "plain\ttext, \u4f60\u597d \U0001f600\nmore"
    )
    assert one_line("two\n  lines\x1b") == r"two lines\x1b"


def test_json_remains_json() -> None:
    content = {"name": "".join(map(chr, range(0x300))) + "\u202e"}
    assert json.loads(printable(json.dumps(content))) == content


@pytest.mark.bad_input("names with a terminal's markup")
@pytest.mark.parametrize("failed", [True, False])
def test_the_live_table_shows_names_as_they_are(failed: bool) -> None:
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=400)
    table = progress.LiveTable(console)
    trial = hostile_trial(failed=failed)
    table.on_progress(Progress(HOSTILE, 1, 2, note=HOSTILE, best=trial))
    table.on_trial(trial)
    table.close(is_done=True)
    shown = SGR.sub("", drawn.getvalue()).replace("\n", "").replace("\r", "")
    assert "[/Conv_0/act/Mul] [bold red]x[/bold red]" in shown
    assert not OBEYED.search(shown), OBEYED.findall(shown)


def test_lines_and_results_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    lines = progress.PlainLines()
    lines.on_progress(Progress(HOSTILE, 1, 2, note=HOSTILE))
    lines.on_trial(hostile_trial(failed=True))
    outcome.print_result(HOSTILE)
    for said in capsys.readouterr():
        assert said
        assert not OBEYED.search(said)


def test_a_log_is_printable_and_no_text_passes_for_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("compressor"), "propagate", False)  # pytest keeps logs
    with run_folder.logged(run_folder.RunFolder(tmp_path)):
        logging.getLogger("compressor.x").warning("%s\n2026-01-01 ERROR forged", HOSTILE)
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert not OBEYED.search(text)
    assert "\n    2026-01-01 ERROR forged" in text


def test_a_page_holds_no_markup_of_names() -> None:
    said = _safe(f"<script>{HOSTILE}")
    assert "<" not in said
    assert not OBEYED.search(said)


@pytest.mark.parametrize(
    "value", ["a\0b", Path("a\0b"), "\udcff", {"k": ["\0"]}, {"\0": 1}, (Path("\udcff"),)]
)
def test_what_no_file_can_hold_is_no_name(value: object) -> None:
    with pytest.raises(ValueError, match="has a NUL, or bytes that are no UTF-8"):
        checked_text(value)


def test_an_error_that_nobody_expected_is_a_line_and_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> int:
        raise KeyError("three\nlines\x1b")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(Exception, match="1"):
        outcome.exit_with(work)
    (kept,) = tmp_path.iterdir()
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"Its traceback is in {kept}" in err
    assert "KeyError" in kept.read_text(encoding="utf-8")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(Exception, match="1"):
        outcome.exit_with(work)
    err = capsys.readouterr().err
    assert (err.count("\n"), "traceback" in err) == (1, False)
