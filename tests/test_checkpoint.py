"""The checkpoint: all or nothing, private, one process at a time, and never overwritten when it is damaged."""

import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from metershipper.books import Books, Count, Dead, Received
from metershipper.checkpoint import DATABASE_NAME, Checkpoint
from metershipper.errors import StateError
from metershipper.events import DeadLetter
from metershipper.ledger import Settled
from metershipper.records import NewFile, Sample, StoredFile
from metershipper.state import LOCK_NAME, StateLock, make_private_directory
from tests.test_files import Site, append, lines, rotate

DAY = 86400.0
HEAD, TAIL = Sample.of(b"first\n"), Sample.of(b"last\n")
# A disk on which nothing more can be written: files may not grow, in this process.
FULL_DISK = """
import resource, sys
from pathlib import Path
from metershipper.checkpoint import Checkpoint
from metershipper.state import StateLock
from metershipper.errors import StateError
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
try:
    with globals()[sys.argv[1]](Path(sys.argv[2])):
        pass
except StateError as error:
    print(error)
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_private_directory(tmp_path / "state")
    return tmp_path / "state"


@pytest.fixture
def checkpoint(directory: Path) -> Iterator[Checkpoint]:
    with Checkpoint(directory) as checkpoint:
        yield checkpoint


@contextlib.contextmanager
def database(directory: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(directory / DATABASE_NAME, isolation_level=None)) as db:
        yield db


def new(inode: int, position: int = 0, supersedes: int | None = None, history: bool = False) -> NewFile:
    return NewFile("/logs/usage.log", 7, inode, HEAD, position, supersedes, history)


def settled(file_id: int, end: int, lines: int, letters: int = 0) -> Settled:
    books = Books({Count.LINES: lines, Count.ENTRIES: lines, Count.BILLED: lines - letters})
    kept = [DeadLetter(n, n + 1, Dead.NOT_JSON, "no JSON", b"\xff\x00{") for n in range(letters)]
    books.update({"dead_letters.not_json": letters})
    return Settled(file_id, end, b"last\n", books, kept)


def contents(directory: Path) -> list[str]:
    with database(directory) as db:
        return list(db.iterdump())


# What is recorded


def test_what_is_committed_is_there_when_the_file_is_opened_again(directory: Path) -> None:
    with Checkpoint(directory) as checkpoint:
        first, second = checkpoint.register([new(1), new(2, position=5, history=True)], ["/logs/*.log"])
        checkpoint.commit([settled(first, 40, 3, letters=1)])
        checkpoint.commit([settled(first, 90, 2)])
    with Checkpoint(directory) as checkpoint:
        assert checkpoint.files() == [
            StoredFile(first, "/logs/usage.log", 7, 1, HEAD, TAIL, 90),
            StoredFile(second, "/logs/usage.log", 7, 2, HEAD, Sample(), 5, history=True, start_offset=5),
        ]
        assert checkpoint.inputs() == {"/logs/*.log"}
        assert checkpoint.books() == Books(lines=5, entries=5, billed=4, **{"dead_letters.not_json": 1})
        assert checkpoint.books().balanced
    with database(directory) as db:
        letters = db.execute("SELECT file_id, start_offset, end_offset, reason, detail, line FROM dead_letters")
        assert letters.fetchall() == [(first, 0, 1, "not_json", "no JSON", b"\xff\x00{")]


def test_inputs_are_remembered_once(checkpoint: Checkpoint) -> None:
    checkpoint.register([], ["/a", "/b"])
    assert checkpoint.register([], ["/b", "/c"]) == []
    assert checkpoint.inputs() == {"/a", "/b", "/c"}


def test_the_spool_is_one_file_that_nobody_sees_as_a_log(directory: Path) -> None:
    """Its position is committed as that of any file; before the first commit it has none (case 54)."""
    with Checkpoint(directory) as checkpoint:
        (log,) = checkpoint.register([new(1)])
        spool, position = checkpoint.spool()
        assert position is None
        assert checkpoint.spool() == (spool, None)
        checkpoint.commit([settled(spool, 0, 1)])
        assert checkpoint.spool() == (spool, 0)
        checkpoint.commit([settled(spool, 90, 2), settled(log, 7, 1)])
    with Checkpoint(directory) as checkpoint:
        assert checkpoint.spool() == (spool, 90)
        assert [file.file_id for file in checkpoint.files()] == [log]
        assert checkpoint.books()[Count.LINES] == 4


def test_the_spool_is_never_forgotten(directory: Path, checkpoint: Checkpoint) -> None:
    """However long nothing came: its position would be given to other lines."""
    (log,) = checkpoint.register([new(1)])
    spool, _ = checkpoint.spool()
    checkpoint.commit([settled(spool, 90, 2)])
    assert checkpoint.forget([], time.time() + 1000 * DAY) == [log]
    assert checkpoint.spool() == (spool, 90)


def test_what_belongs_to_no_file_is_counted(directory: Path) -> None:
    with Checkpoint(directory) as checkpoint:
        checkpoint.count(Books({Received.REQUESTS: 2, Received.REPEATS: 0}))
        checkpoint.count(Books({Received.REQUESTS: 3, Received.NO_ROOM: 1}))
    with Checkpoint(directory) as checkpoint:
        assert checkpoint.books() == Books({Received.REQUESTS: 5, Received.NO_ROOM: 1})
        assert checkpoint.books().balanced


def test_other_content_leaves_the_place_of_a_file_to_its_successor(checkpoint: Checkpoint) -> None:
    """What was read of the old content still settles under the old record (case 12)."""
    (old,) = checkpoint.register([new(1)])
    (young,) = checkpoint.register([new(1, supersedes=old)])
    checkpoint.commit([settled(old, 50, 1), settled(young, 10, 1)])
    assert [(f.file_id, f.device, f.inode, f.position) for f in checkpoint.files()] == [
        (old, None, None, 50),
        (young, 7, 1, 10),
    ]


def test_a_file_that_is_followed_is_no_history(checkpoint: Checkpoint) -> None:
    (file_id,) = checkpoint.register([new(1, history=True)])
    checkpoint.update(StoredFile(file_id, "/logs/usage.log.1", 8, 9, TAIL, Sample(), 0))
    assert checkpoint.files() == [StoredFile(file_id, "/logs/usage.log.1", 8, 9, TAIL, Sample(), 0)]


@pytest.mark.parametrize("table", ["files", "books", "dead_letters"])
def test_a_commit_records_everything_or_nothing(directory: Path, checkpoint: Checkpoint, table: str) -> None:
    """Wherever it fails, positions, books and dead letters stay as they were; then it can be tried again (case 33)."""
    first, second = checkpoint.register([new(1), new(2)])
    checkpoint.commit([settled(first, 10, 1), settled(second, 10, 1)])
    before = contents(directory)
    with database(directory) as db:
        event = "UPDATE" if table == "files" else "INSERT"
        db.execute(
            f"CREATE TRIGGER fails BEFORE {event} ON {table} WHEN NEW.file_id = {second}"
            " BEGIN SELECT RAISE(ABORT, 'no more'); END"
        )
    ground = [settled(first, 20, 3, letters=2), settled(second, 30, 2, letters=1)]
    with pytest.raises(sqlite3.IntegrityError, match="no more"):
        checkpoint.commit(ground)
    with database(directory) as db:
        db.execute("DROP TRIGGER fails")
    assert contents(directory) == before
    checkpoint.commit(ground)
    assert [file.position for file in checkpoint.files()] == [20, 30]
    assert checkpoint.books()[Count.LINES] == 7


def test_a_commit_that_ends_without_a_transaction_still_tells_why(directory: Path, checkpoint: Checkpoint) -> None:
    """SQLite may have rolled back by itself, as it does when the disk is full (case 33)."""
    (file_id,) = checkpoint.register([new(1)])
    with database(directory) as db:
        db.execute("CREATE TRIGGER fails BEFORE UPDATE ON files BEGIN SELECT RAISE(ROLLBACK, 'all gone'); END")
    with pytest.raises(sqlite3.IntegrityError, match="all gone"):
        checkpoint.commit([settled(file_id, 20, 3)])
    assert [file.position for file in checkpoint.files()] == [0]


def test_registering_records_everything_or_nothing(directory: Path, checkpoint: Checkpoint) -> None:
    (old,) = checkpoint.register([new(1)])
    before = contents(directory)
    with database(directory) as db:
        db.execute("CREATE TRIGGER fails BEFORE INSERT ON files BEGIN SELECT RAISE(ABORT, 'no more'); END")
    with pytest.raises(sqlite3.IntegrityError):
        checkpoint.register([new(1, supersedes=old)], ["/a"])
    with database(directory) as db:
        db.execute("DROP TRIGGER fails")
    assert contents(directory) == before


def test_threads_take_turns(checkpoint: Checkpoint) -> None:
    """The reader registers while the committer commits."""
    (file_id,) = checkpoint.register([new(1)])

    def commit() -> None:
        for end in range(30):
            checkpoint.commit([settled(file_id, end, 1)])

    threads = [threading.Thread(target=commit) for _ in range(3)]
    for thread in threads:
        thread.start()
    for inode in range(30):
        checkpoint.register([new(inode)])
        checkpoint.books()
    for thread in threads:
        thread.join()
    assert (checkpoint.books()[Count.LINES], len(checkpoint.files())) == (90, 31)


def test_every_commit_is_synced_to_the_disk(checkpoint: Checkpoint) -> None:
    """Power loss takes nothing that was committed (case 32)."""
    assert checkpoint._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert checkpoint._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


# Who may see it


@pytest.mark.parametrize(("name", "opens"), [(DATABASE_NAME, Checkpoint), (LOCK_NAME, StateLock)])
def test_a_symbolic_link_in_the_place_of_the_state_is_refused(
    directory: Path, tmp_path: Path, name: str, opens: type[Checkpoint] | type[StateLock]
) -> None:
    """It would be written somewhere else."""
    (directory / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateError, match="can't be opened"), opens(directory):
        pass
    assert not (tmp_path / "elsewhere").exists()


# Months of rotations, and clocks that are wrong


@dataclass
class Clock:
    """The wall clock of every module that looks at it."""

    now: float = 1_790_000_000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        raise AssertionError("not for these modules")


@pytest.fixture
def wall_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("checkpoint", "known", "listing"):
        monkeypatch.setattr(f"metershipper.{module}.time", clock)
    return clock


def rows(directory: Path, table: str) -> int:
    with database(directory) as db:
        return int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def test_years_of_rotations_leave_a_state_of_bounded_size_and_exact_books(
    directory: Path, checkpoint: Checkpoint, wall_clock: Clock
) -> None:
    """Case 37: a file is dropped when it is gone and no server would know its events again; its counts stay."""
    checkpoint._db.execute("PRAGMA synchronous = OFF")  # it is not about this
    most = 0
    for day in range(3000):
        (file_id,) = checkpoint.register([new(day)])
        checkpoint.commit([settled(file_id, 40, 3, letters=day % 2)])
        wall_clock.now += DAY
        checkpoint.forget({file_id}, wall_clock.now)
        if day % 100 == 0:
            most = max(most, rows(directory, "files"))
    assert 45 <= most <= 47
    assert rows(directory, "files") <= most
    assert rows(directory, "books") <= most * len(checkpoint.books()) + len(checkpoint.books())
    books = checkpoint.books()
    assert books.balanced
    assert (books[Count.LINES], books.dead_letters) == (9000, 1500)


def test_months_of_rotations_leave_nothing_behind_in_memory_and_on_disk(tmp_path: Path, wall_clock: Clock) -> None:
    """Case 37, with real files: logrotate keeps two, and the process runs on."""
    site = Site(tmp_path).start()
    most = 0
    for day in range(200):
        append(site.log, lines(day * 3, 3))
        assert site.read() == lines(day * 3, 3)
        rotate(site.log)
        Path(f"{site.log}.3").unlink(missing_ok=True)
        wall_clock.now += DAY
        site.pass_time(DAY)
        assert site.read() == b""
        most = max(most, len(site.files._known.records()))
    assert most <= 50
    assert rows(site.state, "files") <= 50
    assert len(site.files.followed()) <= 2
    assert site.checkpoint.books() == Books(lines=600)
    site.restart()
    assert site.read() == b""
    site.stop()


@pytest.mark.parametrize("jump_days", [1, -1, 100, -10_000, 10_000])
def test_a_jump_of_the_wall_clock_reads_nothing_again(tmp_path: Path, wall_clock: Clock, jump_days: int) -> None:
    """Case 35: nothing that is there is forgotten, whatever the time is said to be, then and after it was set right."""
    site = Site(tmp_path).start()
    append(site.log, lines(0, 3))
    assert site.read() == lines(0, 3)
    rotate(site.log)
    append(site.log, lines(3, 3))
    assert site.read() == lines(3, 3)
    for jump in (jump_days, -jump_days):
        wall_clock.now += jump * DAY
        site.pass_time(DAY)  # often enough to forget what is to be forgotten
        assert site.read() == b""
        site.restart()
        assert site.read() == b""
        site.pass_time(DAY)
        assert site.read() == b""
    append(site.log, lines(6, 3))
    assert site.read() == lines(6, 3)
    assert len(site.checkpoint.files()) == 2
    assert site.checkpoint.books() == Books(lines=9)
    site.stop()


@pytest.mark.parametrize("days", [-20_000, -1, 1, 3650])
def test_times_of_files_that_are_wrong_read_nothing_again(tmp_path: Path, days: int) -> None:
    """Case 35: modified in the future, or before there was Kong; only content says what was read."""
    site = Site(tmp_path).start()
    for number in range(0, 9, 3):
        append(site.log, lines(number, 3))
        for path in site.logs.iterdir():
            os.utime(path, (1_790_000_000 + days * DAY,) * 2)
        assert site.read() == lines(number, 3)
        rotate(site.log)
    for path in site.logs.iterdir():
        os.utime(path, (1_790_000_000 - days * DAY,) * 2)
    site.pass_time(DAY)
    assert site.read() == b""
    site.restart()
    assert site.read() == b""
    site.stop()


def test_a_log_that_is_not_configured_for_a_while_is_not_forgotten_as_long_as_it_is_there(
    tmp_path: Path, wall_clock: Clock
) -> None:
    """Cases 36, 37: a file is dropped only when it is gone. No server would know its events again by then."""
    site = Site(tmp_path)
    other = site.logs / "other.log"
    site.paths = [str(site.log), str(other)]
    site.start()
    append(site.log, lines(0, 3))
    append(other, lines(100, 3))
    assert sorted(site.read().splitlines()) == sorted((lines(0, 3) + lines(100, 3)).splitlines())
    site.paths = [str(site.log)]
    site.restart()
    wall_clock.now += 100 * DAY
    site.pass_time(100 * DAY)
    assert site.read() == b""
    site.paths = [str(site.log), str(other)]
    site.restart()
    assert site.read() == b""
    site.stop()


# Damage, full disks


def damaged(data: bytes, kind: str) -> bytes:
    return {
        "garbage": b"this is not a database\n" * 500,
        "zeros": bytes(len(data)),
        "half": data[: len(data) // 2],
        "torn page": data[:4096] + os.urandom(len(data) - 4096),
    }[kind]


@pytest.mark.parametrize("kind", ["garbage", "zeros", "half", "torn page"])
@pytest.mark.parametrize("read_only", [False, True], ids=["run", "status"])
def test_a_damaged_file_is_refused_and_left_as_it_is(directory: Path, kind: str, read_only: bool) -> None:
    """The message names it and says what to do; nothing is started over silently (case 32)."""
    with Checkpoint(directory) as checkpoint:
        (file_id, *_) = checkpoint.register([new(inode) for inode in range(300)])
        checkpoint.commit([settled(file_id, 9, 2, letters=300)])
    path = directory / DATABASE_NAME
    data = damaged(path.read_bytes(), kind)
    path.write_bytes(data)
    with pytest.raises(StateError) as refused, Checkpoint(directory, read_only=read_only):
        pass
    assert str(refused.value).startswith(f"{path}: can't be read (")
    assert "run --start-over" in str(refused.value)
    assert path.read_bytes() == data


def test_damage_that_can_still_be_read_is_refused(directory: Path) -> None:
    """Values that the schema does not allow: the message says which (case 32)."""
    with Checkpoint(directory) as checkpoint, database(directory) as db:
        (old,) = checkpoint.register([new(1)])
        checkpoint.register([new(1, supersedes=old)])
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_schema SET sql = replace(sql, 'device INTEGER', 'device INTEGER NOT NULL')")
    with pytest.raises(StateError, match=r"can't be read \(NULL value in files.device\)"), Checkpoint(directory):
        pass


def test_a_start_that_was_killed_while_the_file_was_made_is_finished_by_the_next(directory: Path) -> None:
    """(case 30)"""
    (directory / DATABASE_NAME).touch(0o600)
    with pytest.raises(StateError, match="nothing was recorded yet"), Checkpoint(directory, read_only=True):
        pass
    with Checkpoint(directory) as checkpoint:
        assert checkpoint.files() == []


@pytest.mark.parametrize("read_only", [False, True], ids=["run", "status"])
def test_a_directory_in_the_place_of_the_file_is_told(directory: Path, read_only: bool) -> None:
    """Nothing is damaged, so nobody is told to move the state away."""
    (directory / DATABASE_NAME).mkdir()
    with pytest.raises(StateError) as refused, Checkpoint(directory, read_only=read_only):
        pass
    assert str(directory / DATABASE_NAME) in str(refused.value)
    assert "move it away" not in str(refused.value)


@pytest.mark.parametrize("opens", ["StateLock", "Checkpoint"])
def test_a_full_disk_at_the_start_is_told_in_one_line(directory: Path, opens: str) -> None:
    """And it is not mistaken for damage: moving the state away would read everything again (case 33)."""
    if opens == "Checkpoint":
        (directory / DATABASE_NAME).touch(0o600)
    told = subprocess.run(
        [sys.executable, "-c", FULL_DISK, opens, str(directory)], capture_output=True, text=True, check=True
    )
    assert told.stderr == ""
    assert told.stdout.startswith(f"{directory}/")
    assert told.stdout.count("\n") == 1
    assert "move it away" not in told.stdout


# Reading beside the writer


def test_a_reader_beside_the_writer_sees_what_is_committed(directory: Path, checkpoint: Checkpoint) -> None:
    (file_id,) = checkpoint.register([new(1)])
    with Checkpoint(directory, read_only=True) as reader:
        checkpoint.commit([settled(file_id, 10, 1)])
        assert reader.books()[Count.LINES] == 1
        checkpoint.commit([settled(file_id, 20, 1)])
        assert [file.position for file in reader.files()] == [20]
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.commit([settled(file_id, 30, 1)])


def test_a_reader_works_when_no_one_writes_and_is_told_when_nothing_was_recorded(directory: Path) -> None:
    with pytest.raises(StateError, match="nothing was recorded yet; start `metershipper run` first"):
        Checkpoint(directory, read_only=True).__enter__()
    assert list(directory.iterdir()) == []
    with Checkpoint(directory) as checkpoint:
        checkpoint.register([new(1)])
    with Checkpoint(directory, read_only=True) as reader:
        assert len(reader.files()) == 1


def test_a_path_with_special_characters_is_only_a_path(tmp_path: Path) -> None:
    directory = tmp_path / "a?b#c %41"
    make_private_directory(directory)
    with Checkpoint(directory) as checkpoint:
        checkpoint.register([new(1)])
    with Checkpoint(directory, read_only=True) as reader:
        assert len(reader.files()) == 1
