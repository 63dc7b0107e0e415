"""The schema: an older one is brought up to date in one step, with all that is in it, a newer one left alone (36)."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from metershipper import checkpoint as checkpoint_module
from metershipper.books import Books, Count
from metershipper.checkpoint import DATABASE_NAME, Checkpoint
from metershipper.errors import StateError
from metershipper.records import Gap, Lost, NewFile, Sample, StoredFile
from metershipper.schema import MIGRATIONS, SCHEMA_VERSION
from metershipper.state import make_private_directory
from tests.test_checkpoint import contents, database, settled

# As metershipper wrote it when this was the newest schema; never to be changed.
SCHEMA_1 = """
CREATE TABLE inputs (path TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE files (
    file_id INTEGER PRIMARY KEY,
    path TEXT NOT NULL,              -- where it was last seen
    device INTEGER, inode INTEGER,   -- both NULL once other content took its place
    head_bytes INTEGER NOT NULL DEFAULT 0, head_hash TEXT NOT NULL DEFAULT '',
    tail_bytes INTEGER NOT NULL DEFAULT 0, tail_hash TEXT NOT NULL DEFAULT '',
    position INTEGER NOT NULL,       -- in bytes: everything before it is settled
    history INTEGER NOT NULL         -- 1: there before its log was followed, and never read
);
CREATE TABLE books (file_id INTEGER NOT NULL, name TEXT NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (file_id, name)) WITHOUT ROWID;
CREATE TABLE dead_letters (
    dead_letter_id INTEGER PRIMARY KEY,
    file_id INTEGER NOT NULL, start_offset INTEGER NOT NULL, end_offset INTEGER NOT NULL,
    reason TEXT NOT NULL, detail TEXT NOT NULL, line BLOB NOT NULL, kept_at REAL NOT NULL
);
CREATE TABLE recipes (name TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO recipes VALUES ('event_id', 1);
"""
LOG, HEAD, TAIL = "/logs/usage.log", Sample.of(b"first\n"), Sample.of(b"last\n")
FILES = [  # path, device, inode, position, history
    (LOG, 7, 11, 500, 0),
    (LOG, None, None, 300, 0),
    (LOG, 7, 12, 80, 1),
    (LOG, 7, 13, 900, 0),
    ("/logs/other.log", 7, 14, 40, 0),
]
BOOKS = Books({"lines": 25, "entries": 25, "billed": 20, "skipped.no_subject": 3, "dead_letters.not_json": 2})
# Killed by its own hand before the n-th statement of the second migration, with everything written out before.
KILLED = """
import os, signal, sys
from pathlib import Path
from metershipper import checkpoint
class Killing(str):
    def split(self, separator):
        for number, statement in enumerate(str.split(self, separator)):
            if number == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)
            yield statement
checkpoint.MIGRATIONS = (checkpoint.MIGRATIONS[0], Killing("PRAGMA cache_size = 1;\\n" + checkpoint.MIGRATIONS[1]))
checkpoint.Checkpoint(Path(sys.argv[1])).__enter__()
"""
STATEMENTS = len(MIGRATIONS[1].split(";\n"))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A state directory of schema 1, in use."""
    make_private_directory(tmp_path / "state")
    with database(tmp_path / "state") as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(SCHEMA_1)
        db.execute("INSERT INTO inputs VALUES (?)", (LOG,))
        samples = (HEAD.length, HEAD.digest, TAIL.length, TAIL.digest)
        insert = "INSERT INTO files VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        db.executemany(insert, [(*file[:3], *samples, *file[3:]) for file in FILES])
        for file_id in (1, 2):
            halves = [(file_id, name, count // 2 + (file_id == 1) * (count % 2)) for name, count in BOOKS.items()]
            db.executemany("INSERT INTO books VALUES (?, ?, ?)", halves)
        for offset in (0, 10):
            letter = (1, offset, offset + 5, "not_json", "no JSON", b"\xff\x00{", 1.5)
            db.execute("INSERT INTO dead_letters VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", letter)
        db.execute("PRAGMA user_version = 1")
    return tmp_path / "state"


def version_of(directory: Path) -> int:
    with database(directory) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def check_that_all_is_there(directory: Path) -> None:
    with Checkpoint(directory) as checkpoint:
        assert checkpoint.books() == BOOKS
        assert checkpoint.books().balanced
        assert checkpoint.inputs() == {LOG}
        assert checkpoint.gaps() == []
        assert not checkpoint.starts_over
        assert [(f.path, f.device, f.inode, f.position, int(f.history)) for f in checkpoint.files()] == FILES
        assert all((f.head, f.tail, f.compressed, f.stamp) == (HEAD, TAIL, False, None) for f in checkpoint.files())
    with database(directory) as db:
        letters = db.execute(
            "SELECT dead_letter_id, file_id, start_offset, end_offset, reason, detail, line, kept_at FROM dead_letters"
        ).fetchall()
        assert letters == [(n + 1, 1, 10 * n, 10 * n + 5, "not_json", "no JSON", b"\xff\x00{", 1.5) for n in range(2)]
        assert db.execute("SELECT value FROM facts WHERE name = 'event_id'").fetchone() == (1,)
    assert version_of(directory) == SCHEMA_VERSION


def test_the_first_schema_is_what_was_released() -> None:
    """A released schema is never edited: there are files that have it."""
    with (
        contextlib.closing(sqlite3.connect(":memory:")) as ours,
        contextlib.closing(sqlite3.connect(":memory:")) as then,
    ):
        ours.executescript(MIGRATIONS[0])
        then.executescript(SCHEMA_1)
        assert list(ours.iterdump()) == list(then.iterdump())


def test_an_older_checkpoint_is_brought_up_to_date_with_all_that_is_in_it(directory: Path) -> None:
    check_that_all_is_there(directory)
    check_that_all_is_there(directory)  # a second start changes nothing


def test_nobody_is_alarmed_about_files_that_were_rotated_long_ago(directory: Path) -> None:
    """Schema 1 did not know whether a file was complete: only the last one of each log may have had more."""
    with Checkpoint(directory) as checkpoint:
        assert [file.file_id for file in checkpoint.files() if not file.is_complete] == [4, 5]


def test_a_migrated_checkpoint_works_like_a_new_one(directory: Path) -> None:
    with Checkpoint(directory) as checkpoint:
        (young,) = checkpoint.register([NewFile(LOG, 7, 13, HEAD, supersedes=4)], ["/logs/*.log"])
        checkpoint.update(StoredFile(5, "/logs/other.log", 8, 15, HEAD, TAIL, 0, compressed=True, seen_bytes=40))
        checkpoint.commit([settled(4, 950, 5), settled(young, 60, 2, letters=1)])
        checkpoint.report_gap(Gap(4, LOG, 950, None, Lost.TRUNCATED, 2.0))
        assert [(f.file_id, f.inode, f.position) for f in checkpoint.files()[3:]] == [
            (4, None, 950),
            (5, 15, 40),
            (young, 13, 60),
        ]
        assert checkpoint.books()[Count.LINES] == BOOKS[Count.LINES] + 7
        assert checkpoint.gaps() == [Gap(4, LOG, 950, None, Lost.TRUNCATED, 2.0)]


def test_a_migrated_checkpoint_has_the_schema_of_a_new_one(directory: Path, tmp_path: Path) -> None:
    make_private_directory(tmp_path / "new")
    with Checkpoint(directory), Checkpoint(tmp_path / "new"):
        pass
    schemas = []
    for each in (directory, tmp_path / "new"):
        with database(each) as db:
            schemas.append(db.execute("SELECT type, name, sql FROM sqlite_schema ORDER BY name").fetchall())
    assert schemas[0] == schemas[1]


@pytest.mark.parametrize("statement", range(STATEMENTS))
def test_a_migration_that_fails_anywhere_leaves_the_checkpoint_as_it_was(
    directory: Path, monkeypatch: pytest.MonkeyPatch, statement: int
) -> None:
    """One transaction: then the older version still runs, and the next start tries again."""
    before = contents(directory)
    statements = MIGRATIONS[1].split(";\n")
    statements.insert(statement, "INSERT INTO no_such_table VALUES (1)")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "MIGRATIONS", (MIGRATIONS[0], ";\n".join(statements)))
        with pytest.raises(StateError, match="no such table"):
            Checkpoint(directory).__enter__()
    assert contents(directory) == before
    assert version_of(directory) == 1
    check_that_all_is_there(directory)


@pytest.mark.parametrize("statement", range(1, STATEMENTS + 1, 3))
def test_a_migration_that_is_killed_leaves_the_checkpoint_as_it_was(directory: Path, statement: int) -> None:
    """(cases 30, 36)"""
    many = 5000  # more than is kept in memory: it is in SQLite's log by then, not committed
    with database(directory) as db, contextlib.suppress(sqlite3.Error):
        db.execute("BEGIN")
        rows = [("/logs/many.log", 9, inode, 0) for inode in range(many)]
        db.executemany("INSERT INTO files (path, device, inode, position, history) VALUES (?, ?, ?, ?, 1)", rows)
        db.execute("COMMIT")
    before = contents(directory)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(directory), str(statement)], env=environment, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert contents(directory) == before
    assert version_of(directory) == 1
    with Checkpoint(directory) as checkpoint:
        assert len(checkpoint.files()) == len(FILES) + many
        assert checkpoint.books() == BOOKS
    assert version_of(directory) == SCHEMA_VERSION


def test_a_reader_of_an_older_checkpoint_says_what_to_do_and_changes_nothing(directory: Path) -> None:
    before = contents(directory)
    with pytest.raises(StateError, match="of an older metershipper; `metershipper run` brings it up to date"):
        Checkpoint(directory, read_only=True).__enter__()
    assert contents(directory) == before
    assert version_of(directory) == 1


@pytest.mark.parametrize("read_only", [False, True], ids=["run", "status"])
def test_a_newer_schema_is_refused(tmp_path: Path, read_only: bool) -> None:
    """An older version does not touch what it does not know (case 36)."""
    make_private_directory(tmp_path / "new")
    directory = tmp_path / "new"
    with Checkpoint(directory), database(directory) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    data = (directory / DATABASE_NAME).read_bytes()
    with pytest.raises(StateError, match="written by a newer metershipper"):
        Checkpoint(directory, read_only=read_only).__enter__()
    assert (directory / DATABASE_NAME).read_bytes() == data


def test_what_an_older_run_read_counts_as_delivered_by_it_from_the_beginning(directory: Path) -> None:
    """Schema 4 tells `run` and `replay` apart: what is there is of `run`, unfiltered, and being replayed by nobody."""
    with Checkpoint(directory) as checkpoint:
        assert {(f.origin, f.scope, f.replaying, f.start_offset) for f in checkpoint.files()} == {
            ("run", None, None, 0)
        }
        with checkpoint.reading():
            assert len(checkpoint.replays.about([HEAD], (0, 0))) == len(FILES)
