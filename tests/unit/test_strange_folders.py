"""Run folders of strangers, and what killed processes leave: nothing outside is touched."""

import contextlib
import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compressor import border, run_folder, scratch, sqlite
from compressor.datasets import load_data
from compressor.errors import CompressorError, DataError, ForeignStudyError, RunFolderError
from compressor.report.html import html_report
from compressor.run_folder import RunFolder
from compressor.search.study import Study, read_corrections, read_trials
from compressor.search.study_file import reading_storage
from compressor.values import Accuracy, Trial
from tests.unit.test_html_report import full_result
from tests.unit.test_run_folder import LATENCY
from tests.unit.test_space import space_of

SPACE = space_of([64, 32], step=16)
READERS: dict[str, Callable[[Path], object]] = {
    "read_trials": read_trials,
    "read_corrections": read_corrections,
    "reading_storage": reading_storage,
    "check_reported": lambda path: border.check_reported(path.parent),
    "check_dashboard": lambda path: border.check_dashboard(path.parent),
    "Study.open": lambda path: Study.open(path, SPACE),
    "Study.of_stopped": lambda path: Study.of_stopped(path, SPACE),
}
# Writes so much that pages of the database itself are overwritten before the commit.
KILLED = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size=2")
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE trials SET number = number + 7, state = 'WAITING'")
connection.execute("UPDATE trial_user_attributes SET value_json = '{}'")
for i in range(500):
    connection.execute(
        "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (1, ?, ?)",
        (str(i), "x" * 4000),
    )
print("written", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def _soon() -> Iterator[None]:
    """Nothing here waits for a pipe."""

    def too_slow(_number: int, _frame: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """The file of a study with two trials, in a folder of its own."""
    path = tmp_path / "run" / "study.db"
    path.parent.mkdir()
    made = Study.create(path, SPACE)
    widths = dict(zip(SPACE.names, (32, 16), strict=True))
    done = Trial(0, widths, "start", Accuracy(0.5, 100), 2.5, (2.4, 2.6), 2.0, {"surgery": 0.1})
    made.add(done, LATENCY)
    made.add(Trial(1, widths, "start", failed_because="it crashed"), None)
    return path


def content_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def journal_naming(outside: Path, study: Path) -> bytes:
    page = struct.unpack(">H", study.read_bytes()[16:18])[0]
    n_pages = study.stat().st_size // page
    head = sqlite.JOURNAL_MAGIC + struct.pack(">5I", 0, 1, n_pages, 512, page)
    name = str(outside).encode()
    tail = struct.pack(">I", 0x40000000 // page + 1) + name
    return head.ljust(512, b"\0") + tail + (
        struct.pack(">II", len(name), sum(name)) + sqlite.JOURNAL_MAGIC
    )  # fmt: skip


@pytest.mark.bad_input("a journal that names another file")
@pytest.mark.parametrize("reader", READERS)
def test_a_journal_deletes_nothing(reader: str, study: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    (study.parent / "study.db-journal").write_bytes(journal_naming(outside, study))
    before = content_of(study.parent)
    with pytest.raises(ForeignStudyError, match=r"study\.db-journal names another file"):
        READERS[reader](study)
    assert outside.read_text() == "mine"
    assert content_of(study.parent) == before


def test_such_a_journal_would_have_deleted_it(study: Path, tmp_path: Path) -> None:
    """The oracle of the test before."""
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    (study.parent / "study.db-journal").write_bytes(journal_naming(outside, study))
    with contextlib.closing(sqlite3.connect(study)) as connection:
        connection.execute("SELECT count(*) FROM trials")
    assert not outside.exists()


@pytest.mark.bad_input("what is not a journal")
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"not a journal at all, but text that is longer than a head", "not a journal"),
        (b"short", "not a journal"),
        (sqlite.JOURNAL_MAGIC + struct.pack(">5I", 0, 1, 2**31, 512, 4096), "GiB"),
        (sqlite.JOURNAL_MAGIC + struct.pack(">5I", 0, 1, 3, 513, 4096), "not a journal"),
        (sqlite.JOURNAL_MAGIC + struct.pack(">5I", 0, 1, 3, 512, 0), "not a journal"),
    ],
)
def test_what_is_no_journal_is_refused(content: bytes, says: str, study: Path) -> None:
    (study.parent / "study.db-journal").write_bytes(content)
    before = content_of(study.parent)
    for reader in READERS.values():
        with pytest.raises(ForeignStudyError, match=says):
            reader(study)
    assert content_of(study.parent) == before


@pytest.mark.parametrize("content", [b"", b"\0" * 512, sqlite.JOURNAL_MAGIC[:5]])
def test_journals_that_say_nothing_are_no_obstacle(content: bytes, study: Path) -> None:
    (study.parent / "study.db-journal").write_bytes(content)
    assert len(read_trials(study)) == 2
    assert len(Study.open(study, SPACE).trials) == 2


@pytest.mark.fault("SIGKILL in the middle of a commit")
def test_a_killed_writer_leaves_the_trials_before(study: Path) -> None:
    trials = read_trials(study)
    before = study.read_bytes()
    with subprocess.Popen([sys.executable, "-c", KILLED, study], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        writer.kill()
    assert study.read_bytes()[: len(before)] != before  # half-written, indeed
    left = content_of(study.parent)
    assert set(left) == {"study.db", "study.db-journal"}
    assert read_trials(study) == trials
    assert reading_storage(study).get_all_studies()[0].study_name == "compress"
    assert content_of(study.parent) == left  # whoever reads changes nothing
    assert Study.open(study, SPACE).trials == trials
    assert set(content_of(study.parent)) == {"study.db"}
    assert study.read_bytes()[100:] == before[100:]


@pytest.mark.bad_input("a write-ahead log")
def test_a_write_ahead_log_is_refused(study: Path) -> None:
    for name in ("study.db-wal", "study.db-shm"):
        (study.parent / name).write_bytes(b"x")
        with pytest.raises(ForeignStudyError, match=f"write-ahead log.*{name}"):
            read_trials(study)
        (study.parent / name).unlink()
    with contextlib.closing(sqlite3.connect(study)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    with pytest.raises(ForeignStudyError, match="write-ahead log"):
        Study.open(study, SPACE)
    assert set(content_of(study.parent)) == {"study.db"}


FOREIGN = {
    "CREATE TRIGGER t AFTER INSERT ON trials BEGIN DELETE FROM trials; END": "trigger 't'",
    "CREATE VIEW v AS SELECT * FROM trials": "view 'v'",
    "CREATE TABLE extra (x)": "table 'extra'",
    "CREATE INDEX i ON trials (abs(number))": "index 'i'",
    "CREATE VIRTUAL TABLE f USING fts5(x)": "table 'f",
    "ALTER TABLE trials ADD COLUMN g AS (abs(number))": "table trials is not as Optuna",
    "UPDATE trials SET state = 'LOST'": "'LOST' as state of trials",
    "UPDATE trial_values SET value_type = 'HUGE'": "'HUGE' as value_type",
    "UPDATE study_directions SET direction = 'MINIMIZE'": "directions",
    "DELETE FROM study_directions WHERE objective = 1": "directions",
    "UPDATE version_info SET schema_version = 99": "schema .*99",
    "UPDATE alembic_version SET version_num = 'v9'": "schema .*v9",
    "INSERT INTO studies VALUES (2, 'other')": "2 studies",
    "UPDATE trial_user_attributes SET value_json = x'8004952e'": "binary values as value_json",
    "UPDATE trial_values SET value = x'00'": "binary values as value of trial_values",
    "UPDATE trial_user_attributes SET value_json = '1' || hex(zeroblob(200))": "whole number",
    "UPDATE trial_params SET distribution_json = 'IntDistribution'": "not JSON",
    "INSERT INTO study_user_attributes VALUES (9, 1, 'before', "
    "replace(hex(zeroblob(50000)), '0', '['))": "nested too deeply",
}


@pytest.mark.bad_input("a study that holds more than ours")
@pytest.mark.parametrize("sql", FOREIGN)
def test_what_no_study_of_ours_holds_is_named(sql: str, study: Path) -> None:
    with contextlib.closing(sqlite3.connect(study)) as connection, connection:
        connection.execute(sql)
    before = content_of(study.parent)
    for name in ("read_trials", "reading_storage", "Study.open", "Study.of_stopped"):
        with pytest.raises(ForeignStudyError, match=FOREIGN[sql]):
            READERS[name](study)
    assert content_of(study.parent) == before


@pytest.mark.bad_input("pipes in place of files")
@pytest.mark.parametrize("name", ["study.db", "study.db-journal", "config.toml", "manifest.json"])
def test_pipes_are_not_waited_for(name: str, study: Path) -> None:
    (study.parent / name).unlink(missing_ok=True)
    os.mkfifo(study.parent / name)
    doors = {
        "config.toml": lambda: run_folder.read_settings(study.parent),
        "manifest.json": RunFolder(study.parent).read_manifest,
    }
    with pytest.raises(RunFolderError, match=f"{name}.*not a file, but"):
        doors.get(name, lambda: read_trials(study))()


@pytest.mark.bad_input("pipes and links where a run writes")
@pytest.mark.parametrize("kind", ["pipe", "link", "hard link"])
@pytest.mark.parametrize("name", ["log.txt", "study.db", "report.html", ".unfinished/lock"])
def test_nothing_is_written_through(kind: str, name: str, tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    (run / ".unfinished").mkdir(parents=True)
    outside.write_text("mine")
    if kind == "pipe":
        os.mkfifo(run / name)
    elif kind == "link":
        (run / name).symlink_to(outside)
    else:
        (run / name).hardlink_to(outside)
    with pytest.raises(RunFolderError, match=Path(name).name), RunFolder(run).locked():
        pass
    if name == "log.txt":
        with pytest.raises(RunFolderError, match=r"log\.txt"), run_folder.logged(RunFolder(run)):
            pass
    if name == "study.db":
        with pytest.raises(RunFolderError, match=r"study\.db is there already"):
            Study.create(run / name, SPACE)
    if name == "report.html":
        RunFolder(run).write_report("ours")
        assert (run / name).read_text() == "ours"
    assert outside.read_text() == "mine"


@pytest.mark.bad_input("numbers and nesting that fit nowhere")
@pytest.mark.parametrize(
    "text",
    ["1" + "0" * 400, "²", "NaN", "1e999", "[" * 100_000, "[" * 90 + "]" * 90,
     '{"schema": 1' + "0" * 400 + "}"],
)  # fmt: skip
def test_results_of_strangers_are_one_line_of_error(text: str, tmp_path: Path) -> None:
    for name in (run_folder.RESULT, run_folder.MANIFEST, run_folder.CONFIG):
        (tmp_path / name).write_text(text if name != run_folder.CONFIG else f"trials = {text}")
    for read in (run_folder.read_result, run_folder.read_settings):
        with pytest.raises(RunFolderError) as fault:
            read(tmp_path)
        assert len(str(fault.value).splitlines()) == 1
    with pytest.raises(RunFolderError):
        RunFolder(tmp_path).read_manifest()


def test_files_that_swell_are_refused_unread(study: Path) -> None:
    os.truncate(study, 2**40)
    with pytest.raises(RunFolderError, match="larger than 1 GiB"):
        read_trials(study)


def test_init_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "compress.toml").symlink_to(tmp_path / "outside")
    with pytest.raises(CompressorError, match="is there already"):
        border.write_settings(tmp_path / "compress.toml", "ours", force=False)
    border.write_settings(tmp_path / "compress.toml", "ours", force=True)
    assert not (tmp_path / "outside").exists()


OWNER = """
import sys, time
from compressor.scratch import Scratch
folder = Scratch("compressor-test-", sys.argv[1])
print(folder.name, flush=True)
time.sleep(600)
"""


@pytest.mark.fault("SIGKILL of a process with a temporary folder")
def test_what_killed_processes_leave_is_swept(tmp_path: Path) -> None:
    others = [tmp_path / "compressor-foreign", tmp_path / "else"]
    for other in others:
        other.mkdir()
    (tmp_path / "else" / scratch.LOCK).write_text("")
    (tmp_path / "compressor-link").symlink_to(tmp_path / "else")
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, tmp_path], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        with scratch.Scratch(parent=str(tmp_path)) as mine:
            assert folder.is_dir()  # in use
        assert not Path(mine).exists()
        owner.kill()
    assert folder.is_dir()
    with scratch.Scratch(parent=str(tmp_path)):
        assert not folder.exists()
    assert all(other.is_dir() for other in others)
    assert (tmp_path / "else" / scratch.LOCK).exists()


def test_a_run_that_was_killed_at_its_end_is_tidied(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (folder.unfinished / "x.pt").write_text("")
    (tmp_path / ".result.json.partial").write_text("")
    folder.tidy()
    assert list(tmp_path.iterdir()) == []


def full(folder: Path) -> dict[str, Any]:
    """A result with everything that there may be in one, as it stands in the file."""
    content: dict[str, Any] = json.loads(json.dumps(run_folder.to_json(full_result(folder))))
    return content


@pytest.mark.bad_input("numbers that nothing measured has, half characters")
@pytest.mark.parametrize("value", [1e308, 5e-324, "1" * 5000, "\ud800"])
def test_what_no_result_says_is_refused(value: object, tmp_path: Path) -> None:
    content = full(tmp_path)
    content["speedup"]["session_pairs"][0]["original_ms"][0] = value
    (tmp_path / "result.json").write_text(json.dumps(content))
    with pytest.raises(RunFolderError, match="is not a result of compress"):
        run_folder.read_result(tmp_path)


@pytest.mark.bad_input("digits that are no number")
@pytest.mark.parametrize("step", ["\u00b2", "0", "9" * 5000, "16 (probed)"])
def test_a_report_is_made_whatever_the_step_says(step: str, tmp_path: Path) -> None:
    content = full(tmp_path)
    content["environment"]["channel_step"] = step
    (tmp_path / "result.json").write_text(json.dumps(content))
    assert "<html" in html_report(run_folder.read_result(tmp_path), ())


def test_a_result_of_thousands_of_groups_is_reported(tmp_path: Path) -> None:
    content = full(tmp_path)
    group = {"channels": 64, "kept": 48, "locked_because": None}
    content["groups"] = [{"name": f"g{i}", **group} for i in range(3000)]
    (tmp_path / "result.json").write_text(json.dumps(content))
    assert "g2999" in html_report(run_folder.read_result(tmp_path), ())


@pytest.mark.bad_input("pipes among images")
def test_pipes_among_images_are_passed_over(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        os.mkfifo(tmp_path / name / "image.png")
    os.mkfifo(tmp_path / "loose.png")
    with pytest.raises(DataError):
        load_data(tmp_path)


CELLS = (
    "UPDATE trial_params SET param_value = NULL",
    "UPDATE trial_params SET param_value = 'wide'",
    "UPDATE trial_values SET value = NULL",
    "UPDATE trial_values SET value = 'small'",
    "UPDATE trials SET number = 'first'",
    "UPDATE trials SET datetime_start = 'yesterday'",
    "UPDATE trials SET datetime_complete = 7",
    'UPDATE trial_params SET distribution_json = \'{"name": "os.system", "attributes": {}}\'',
    "UPDATE trial_params SET distribution_json = '[]'",
    "DELETE FROM trial_values WHERE objective = 0",
    "UPDATE trials SET study_id = 7",
)


@pytest.mark.bad_input("a study whose cells are of another kind")
@pytest.mark.parametrize("sql", CELLS)
def test_cells_of_another_kind_are_one_error(sql: str, study: Path) -> None:
    with contextlib.closing(sqlite3.connect(study)) as connection, connection:
        connection.execute(sql)
    before = content_of(study.parent)
    for name in ("read_trials", "reading_storage", "Study.open"):
        with contextlib.suppress(RunFolderError):
            READERS[name](study)
            reading_storage(study).get_all_trials(1)
    assert content_of(study.parent) == before
