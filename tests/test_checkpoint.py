"""The checkpoint: all or nothing, private, one process at a time, and never overwritten when it is damaged."""

import contextlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from metershipper.books import Books, Count, Dead
from metershipper.checkpoint import DATABASE_NAME, Checkpoint
from metershipper.errors import StateError, StateInUse
from metershipper.events import DeadLetter
from metershipper.ledger import Settled
from metershipper.records import NewFile, Sample, StoredFile
from metershipper.schema import SCHEMA_VERSION
from metershipper.state import LOCK_NAME, StateLock, holder_of, make_private_directory

NOBODY = 65534
HEAD, TAIL = Sample.of(b"first\n"), Sample.of(b"last\n")
HOLD = """
import sys, time
from pathlib import Path
from metershipper.state import StateLock
with StateLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
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
            StoredFile(second, "/logs/usage.log", 7, 2, HEAD, Sample(), 5, history=True),
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


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_state_is_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    """Guarantee 7: 0700 and 0600."""
    before = os.umask(umask)
    try:
        with StateLock(tmp_path / "deep" / "state") as lock, Checkpoint(tmp_path / "deep" / "state") as checkpoint:
            assert isinstance(lock, StateLock)
            checkpoint.register([new(1)])
            modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "deep" / "state").iterdir()}
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "deep" / "state").stat().st_mode) == 0o700
    assert {DATABASE_NAME, f"{DATABASE_NAME}-wal", LOCK_NAME} <= set(modes)
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize(("name", "opens"), [(DATABASE_NAME, Checkpoint), (LOCK_NAME, StateLock)])
def test_a_symbolic_link_in_the_place_of_the_state_is_refused(
    directory: Path, tmp_path: Path, name: str, opens: type[Checkpoint] | type[StateLock]
) -> None:
    """It would be written somewhere else."""
    (directory / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateError, match="can't be opened"), opens(directory):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_directory_that_can_not_be_made_is_told_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"file/state: can't be created: Not a directory; create it for this user or"):
        make_private_directory(tmp_path / "file" / "state")


def test_a_directory_of_another_user_is_told_with_what_to_do(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    real, effective, _ = os.getresuid()
    if effective == 0:
        os.setresuid(NOBODY, 0, 0)  # whether a directory is writable is asked for the real user
    try:
        with pytest.raises(StateError, match="not writable by this user; change its owner or set"):
            make_private_directory(tmp_path)
    finally:
        if effective == 0:
            os.setresuid(real, 0, 0)


def test_a_directory_that_refuses_everybody_is_told_with_what_to_do() -> None:
    """Also for root: nothing can be written in /proc/1."""
    with pytest.raises(StateError, match=r"/proc/1.*set state.directory"):
        make_private_directory(Path("/proc/1/state"))


# One process at a time


def test_a_second_process_is_refused_and_told_who_holds_the_state(directory: Path) -> None:
    """(case 34)"""
    before = len(os.listdir("/proc/self/fd"))
    with StateLock(directory):
        with pytest.raises(StateInUse) as refused, StateLock(directory):
            pass
        assert str(directory) in str(refused.value)
        assert f"in use by process {os.getpid()};" in str(refused.value)
        assert holder_of(directory) == os.getpid()
    assert holder_of(directory) is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_kill_leaves_no_stale_lock(directory: Path) -> None:
    """The kernel lets go of it, whatever is written in the file (case 34)."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(directory)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert holder_of(directory) == process.pid
        with pytest.raises(StateInUse, match=f"process {process.pid};"), StateLock(directory):
            pass
        process.send_signal(signal.SIGKILL)
    assert (directory / LOCK_NAME).read_text().rstrip() == str(process.pid)
    assert holder_of(directory) is None
    with StateLock(directory):
        assert holder_of(directory) == os.getpid()


def test_the_lock_waits_out_a_look_at_it(directory: Path) -> None:
    """`status` holds it for an instant to see whether it is free."""
    with contextlib.ExitStack() as held:
        held.enter_context(StateLock(directory))
        threading.Timer(0.1, held.close).start()
        with StateLock(directory):
            assert holder_of(directory) == os.getpid()


def test_a_holder_that_wrote_no_id_yet_is_still_a_holder(directory: Path) -> None:
    with StateLock(directory):
        (directory / LOCK_NAME).write_bytes(b"")
        assert holder_of(directory) == 0
        with pytest.raises(StateInUse, match="in use by process unknown"), StateLock(directory):
            pass


def test_nobody_holds_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert holder_of(tmp_path / "state") is None


# Damage, other versions, full disks


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


@pytest.mark.parametrize("read_only", [False, True], ids=["run", "status"])
def test_a_newer_schema_is_refused(directory: Path, read_only: bool) -> None:
    """An older version does not touch what it does not know (case 36)."""
    with Checkpoint(directory), database(directory) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    data = (directory / DATABASE_NAME).read_bytes()
    with pytest.raises(StateError, match="written by a newer metershipper"):
        Checkpoint(directory, read_only=read_only).__enter__()
    assert (directory / DATABASE_NAME).read_bytes() == data


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
