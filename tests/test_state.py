"""The state directory: private, locked for one process, and never taken for a new one when its checkpoint is lost."""

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from metershipper.books import Books, Count
from metershipper.checkpoint import DATABASE_NAME, Checkpoint
from metershipper.config import FileInput
from metershipper.errors import StateError, StateInUse
from metershipper.files import FileSet
from metershipper.ledger import Settled
from metershipper.records import NewFile, Sample
from metershipper.schema import SCHEMA_VERSION
from metershipper.state import LOCK_NAME, REPLAY_LOCK_NAME, StateLock, holder_of, make_private_directory
from metershipper.traffic import Traffic
from tests.integration.support import FaultyEndpoint, Site, append, expected_ids, stop
from tests.test_checkpoint import database, settled

NOBODY = 65534
HOLD = """
import sys, time
from pathlib import Path
from metershipper.state import StateLock
with StateLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_private_directory(tmp_path / "state")
    return tmp_path / "state"


# Who may see it


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_state_is_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    """Guarantee 7: 0700 and 0600."""
    before = os.umask(umask)
    try:
        with StateLock(tmp_path / "deep" / "state") as lock, Checkpoint(tmp_path / "deep" / "state") as checkpoint:
            assert isinstance(lock, StateLock)
            checkpoint.register([NewFile("/logs/usage.log", 7, 1, Sample())])
            modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "deep" / "state").iterdir()}
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "deep" / "state").stat().st_mode) == 0o700
    assert {DATABASE_NAME, f"{DATABASE_NAME}-wal", LOCK_NAME} <= set(modes)
    assert set(modes.values()) == {0o600}


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


def test_a_state_of_another_user_is_told(directory: Path) -> None:
    """Wrong owner (case 33): the directory is ours, what is in it is not."""
    with StateLock(directory), Checkpoint(directory):
        pass
    with (
        refused_to_others(directory),
        pytest.raises(StateError, match=f"{LOCK_NAME}: can't be opened: Permission denied"),
    ):
        StateLock(directory).__enter__()
    with refused_to_others(directory), pytest.raises(StateError, match=r"sqlite: can't be opened: Permission denied"):
        Checkpoint(directory).__enter__()


@contextlib.contextmanager
def refused_to_others(directory: Path) -> Iterator[None]:
    """The files in a directory refuse this user; root steps down, because nothing refuses it."""
    parents = [path for path in directory.parents if path.stat().st_uid == os.geteuid() and path != Path("/")]
    modes = {path: path.stat().st_mode for path in (*parents, *directory.iterdir())}
    if os.geteuid() == 0:
        os.chown(directory, NOBODY, NOBODY)
        for path in parents:
            path.chmod(path.stat().st_mode | stat.S_IXGRP | stat.S_IXOTH)
        os.setresuid(NOBODY, NOBODY, 0)
    else:
        for path in directory.iterdir():
            path.chmod(0o000)
    try:
        yield
    finally:
        if os.getresuid()[2] == 0:
            os.setresuid(0, 0, 0)
            os.chown(directory, 0, 0)
        for path, mode in modes.items():
            path.chmod(stat.S_IMODE(mode))


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


def test_a_replay_that_holds_it_is_told_to_be_one_that_ends(directory: Path) -> None:
    told = f"process {os.getpid()} is replaying .* will come to its end"
    with StateLock(directory, REPLAY_LOCK_NAME), StateLock(directory), pytest.raises(StateInUse, match=told):
        StateLock(directory).__enter__()


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


def test_the_id_is_written_in_place(directory: Path) -> None:
    """A shorter one leaves nothing of a longer one, and the mark behind it stays (case 34)."""
    (directory / LOCK_NAME).write_text("99999999999\n")
    for _ in range(2):
        with StateLock(directory) as lock:
            lock.mark_used()
            assert (directory / LOCK_NAME).read_text() == f"{os.getpid():<20}\nused\n"
            assert holder_of(directory) == os.getpid()


def test_an_id_that_another_process_has_by_now_holds_nothing(directory: Path) -> None:
    """A pod starts with the id of the one that was killed: only the kernel's lock counts (case 34)."""
    for other in (os.getpid(), os.getppid(), 1):
        (directory / LOCK_NAME).write_text(f"{other:<20}\nused\n")
        assert holder_of(directory) is None
        with StateLock(directory) as lock:
            assert lock.was_used


def test_what_was_used_is_remembered_through_kills(directory: Path) -> None:
    with StateLock(directory) as lock:
        assert not lock.was_used
    with StateLock(directory) as lock:
        assert not lock.was_used
        lock.mark_used()
        lock.mark_used()
        assert lock.was_used
    with subprocess.Popen([sys.executable, "-c", HOLD, str(directory)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        process.kill()
    with StateLock(directory) as lock:
        assert lock.was_used


# A checkpoint that is lost or damaged


def make_used(directory: Path) -> None:
    """A state directory as a run leaves it."""
    with StateLock(directory) as lock, Checkpoint(directory) as checkpoint:
        lock.mark_used()
        (file_id,) = checkpoint.register([NewFile("/logs/usage.log", 7, 1, Sample.of(b"first\n"))], ["/logs/usage.log"])
        checkpoint.commit([settled(file_id, 40, 3)])


def damage(directory: Path) -> dict[str, bytes]:
    """Garbage in the place of the database, with the log of the last commits still beside it; returns both.

    The third file, -shm, is an index of that log in shared memory, which SQLite makes anew: nothing is lost with it.
    """
    with Checkpoint(directory) as checkpoint:
        checkpoint.register([NewFile("/logs/usage.log", 7, 1, Sample.of(b"first\n"))], ["/logs/usage.log"])
        log = (directory / f"{DATABASE_NAME}-wal").read_bytes()
    parts = {DATABASE_NAME: b"this is not a database\n" * 500, f"{DATABASE_NAME}-wal": log}
    for name, data in parts.items():
        (directory / name).write_bytes(data)
    return parts


def test_a_checkpoint_that_is_gone_is_refused_and_told_with_what_to_do(directory: Path) -> None:
    """Never taken for a first start: with read_from = "end" that would lose everything in between (case 32)."""
    make_used(directory)
    for path in directory.glob(f"{DATABASE_NAME}*"):
        path.unlink()
    with StateLock(directory) as lock, pytest.raises(StateError) as refused:
        Checkpoint(directory, expected=lock.was_used).__enter__()
    words = str(refused.value)
    assert words.startswith(f"{directory / DATABASE_NAME}: gone or empty, though this directory was in use.")
    assert "metershipper run --start-over" in str(refused.value)
    assert os.listdir(directory) == [LOCK_NAME]


def test_an_emptied_checkpoint_is_not_taken_for_a_new_one(directory: Path) -> None:
    """Zero bytes are what a power cut or a full disk leaves of a file (case 32)."""
    make_used(directory)
    (directory / DATABASE_NAME).write_bytes(b"")
    with StateLock(directory) as lock, pytest.raises(StateError, match="--start-over"):
        Checkpoint(directory, expected=lock.was_used).__enter__()
    assert (directory / DATABASE_NAME).read_bytes() == b""


def test_starting_over_with_an_emptied_checkpoint_starts_over(directory: Path) -> None:
    """So also after a kill between the new file and its first commit (cases 30, 32)."""
    make_used(directory)
    (directory / DATABASE_NAME).write_bytes(b"")
    with StateLock(directory) as lock, Checkpoint(directory, expected=lock.was_used, start_over=True) as checkpoint:
        assert checkpoint.starts_over


def test_starting_over_sets_the_damaged_files_aside_byte_for_byte(directory: Path) -> None:
    """They may be all that is left of the books; a second time does not overwrite the first (case 32)."""
    make_used(directory)
    for number in (1, 2):
        parts = damage(directory)
        with Checkpoint(directory, expected=True, start_over=True) as checkpoint:
            assert (checkpoint.starts_over, checkpoint.files(), checkpoint.books()) == (True, [], Books())
            kept = {f"{DATABASE_NAME}.damaged-{number}{suffix}" for suffix in ("", "-wal")}
            assert kept <= {path.name for path in checkpoint.set_aside}
        for name, data in parts.items():
            assert (directory / name.replace(DATABASE_NAME, f"{DATABASE_NAME}.damaged-{number}")).read_bytes() == data


@pytest.mark.parametrize("read_only", [False, True], ids=["run", "status"])
def test_a_damaged_checkpoint_that_is_refused_keeps_the_log_of_its_last_commits(
    directory: Path, read_only: bool
) -> None:
    """Somebody may repair it, or restore the database; looking at it must not take the rest away (case 32)."""
    make_used(directory)
    parts = damage(directory)
    with pytest.raises(StateError, match="can't be read"):
        Checkpoint(directory, read_only=read_only, expected=True).__enter__()
    assert {name: (directory / name).read_bytes() for name in parts if (directory / name).exists()} == parts


def test_starting_over_with_a_sound_checkpoint_changes_nothing(directory: Path) -> None:
    """The option may be left in a unit file."""
    make_used(directory)
    with Checkpoint(directory, expected=True, start_over=True) as checkpoint:
        assert not checkpoint.starts_over
        assert checkpoint.set_aside == []
        assert checkpoint.books()[Count.LINES] == 3
        assert [file.position for file in checkpoint.files()] == [40]
    assert {path.name for path in directory.iterdir()} == {LOCK_NAME, DATABASE_NAME}


def test_starting_over_does_not_set_a_newer_checkpoint_aside(directory: Path) -> None:
    """It is not damaged (case 36)."""
    make_used(directory)
    with database(directory) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    data = (directory / DATABASE_NAME).read_bytes()
    with pytest.raises(StateError, match="written by a newer metershipper"):
        Checkpoint(directory, expected=True, start_over=True).__enter__()
    assert (directory / DATABASE_NAME).read_bytes() == data


def test_a_disk_that_fails_is_no_reason_to_set_anything_aside(directory: Path) -> None:
    make_used(directory)
    (directory / DATABASE_NAME).unlink()
    (directory / DATABASE_NAME).mkdir()
    with pytest.raises(StateError, match="can't be opened: Is a directory"):
        Checkpoint(directory, start_over=True).__enter__()
    assert (directory / DATABASE_NAME).is_dir()


@dataclass
class Reader:
    """The part of `run` that reads and settles, over one log; `start_over` and `expected` as `run` passes them."""

    root: Path
    read_from: Literal["beginning", "end"] = "beginning"
    files: FileSet = field(init=False)

    def __post_init__(self) -> None:
        self.log, self.state = self.root / "logs" / "usage.log", self.root / "state"
        self.log.parent.mkdir()

    @contextlib.contextmanager
    def started(self, *, start_over: bool = False) -> Iterator[Checkpoint]:
        with (
            StateLock(self.state) as lock,
            Checkpoint(self.state, expected=lock.was_used, start_over=start_over) as checkpoint,
        ):
            lock.mark_used()
            inputs = [FileInput(path=str(self.log), read_from=self.read_from)]
            self.files = FileSet(inputs, checkpoint, lambda: 1000.0)
            self.files.load()
            try:
                yield checkpoint
            finally:
                self.files.close()

    def read(self, checkpoint: Checkpoint) -> bytes:
        """Scan, read everything and settle it."""
        self.files.scan()
        data = b""
        while (block := self.files.next_block()) is not None:
            data += block.data
            books = Books({Count.LINES: block.data.count(b"\n")})
            checkpoint.commit([Settled(block.file_id, block.end_offset, block.tail, books)])
        return data


def lose(state: Path, how: str) -> None:
    for path in state.glob(f"{DATABASE_NAME}*"):
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(b"garbage\n" * 1000)


@pytest.mark.parametrize("how", ["gone", "damaged"])
@pytest.mark.parametrize("read_from", ["beginning", "end"])
def test_starting_over_reads_everything_again_also_what_was_rotated(
    tmp_path: Path, how: str, read_from: Literal["beginning", "end"]
) -> None:
    """Also with read_from = "end", which speaks of files never seen before; then on as always (case 32)."""
    reader = Reader(tmp_path, read_from)
    append(reader.log, b"1\n")
    with reader.started() as checkpoint:
        assert reader.read(checkpoint) == (b"1\n" if read_from == "beginning" else b"")
        append(reader.log, b"2\n")
        assert reader.read(checkpoint) == b"2\n"
        reader.log.rename(f"{reader.log}.1")
        append(reader.log, b"3\n")
        assert reader.read(checkpoint) == b"3\n"
    lose(reader.state, how)
    append(reader.log, b"4\n")
    with pytest.raises(StateError, match="--start-over"), reader.started():
        pass
    with reader.started(start_over=True) as checkpoint:
        assert sorted(reader.read(checkpoint).split()) == [b"1", b"2", b"3", b"4"]
        assert not checkpoint.starts_over
        assert checkpoint.books()[Count.LINES] == 4
    append(reader.log, b"5\n")
    with reader.started() as checkpoint:
        assert reader.read(checkpoint) == b"5\n"


@pytest.mark.parametrize("how", ["gone", "damaged"])
@pytest.mark.parametrize("scans", [0, 1])
def test_starting_over_is_finished_by_the_next_start(tmp_path: Path, how: str, scans: int) -> None:
    """Killed before or during the first look around; the next start need not be told again (cases 30, 32)."""
    reader = Reader(tmp_path, "end")
    append(reader.log, b"1\n")
    with reader.started() as checkpoint:
        reader.read(checkpoint)
    reader.log.rename(f"{reader.log}.1")
    append(reader.log, b"2\n")
    lose(reader.state, how)
    with reader.started(start_over=True) as checkpoint:
        assert checkpoint.starts_over
        for _ in range(scans):
            with database(reader.state) as db:
                fails = "CREATE TRIGGER fails BEFORE DELETE ON facts BEGIN SELECT RAISE(ABORT, 'killed'); END"
                db.execute(fails)
            with contextlib.suppress(Exception):
                reader.files.scan()
            with database(reader.state) as db:
                db.execute("DROP TRIGGER fails")
    with reader.started() as checkpoint:
        assert sorted(reader.read(checkpoint).split()) == [b"1", b"2"]
        assert not checkpoint.starts_over


def test_run_with_a_lost_state_is_refused_and_starts_over_when_told_to(tmp_path: Path) -> None:
    """As an operator meets it: one line, exit code 1; then everything again, under the same ids (cases 32, 36)."""
    traffic = Traffic(12, started_at_ms=1_790_000_000_000)
    lines = [traffic.line() for _ in range(60)]
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        append(site.log, *lines[:40])
        with site.running() as process:
            site.wait_for_lines(process, 40)
            assert stop(process) == 0
        shutil.move(site.log, f"{site.log}.1")
        append(site.log, *lines[40:])
        garbage = b"no database at all\n" * 100
        (site.state / DATABASE_NAME).write_bytes(garbage)
        requests = endpoint.requests
        said = len(site.errors.read_text().splitlines())
        with site.running() as process:
            assert process.wait(30) == 1
        (line,) = site.errors.read_text().splitlines()[said:]
        assert line.startswith(f"metershipper: {site.state / DATABASE_NAME}: can't be read (")
        assert "metershipper run --start-over" in line
        assert endpoint.requests == requests
        with site.running("--start-over") as process:
            site.wait_for_lines(process, 60)
            assert stop(process) == 0
        told = site.errors.read_text()
        assert f"{site.state}: was damaged; kept for inquiry as {DATABASE_NAME}.damaged-1" in told
        assert "starting over: every log and its rotated files are read from the beginning" in told
        assert (site.state / f"{DATABASE_NAME}.damaged-1").read_bytes() == garbage
        assert Counter(endpoint.ids()) == Counter(expected_ids(lines))
        assert site.books()[Count.LINES] == 60
        before = endpoint.store.counts()["received"]
        with site.running("--start-over") as process:  # a sound state: nothing happens
            append(site.log, *lines[:1])
            site.wait_for_lines(process, 61)
            assert stop(process) == 0
        assert endpoint.store.counts()["received"] - before == len(expected_ids(lines[:1]))


# Another configuration over the same state


CHANGES = {
    "subject": ('field = "username"', 'field = "id"'),
    "source": ("[metering.subject]", '[metering]\nsource = "other"\nmeter_ai_token_usage = false\n[metering.subject]'),
    "pattern": ("usage.log", "usage*.log"),
    "line length": ("[[inputs.files]]", "[inputs]\nmax_line_bytes = 100000\n[[inputs.files]]"),
    "path": ("usage.log", "kong.log"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_configuration_bills_nothing_again(tmp_path: Path, change: str) -> None:
    """What was settled stays settled, whatever it would become now; new lines follow the new rules (case 36)."""
    traffic = Traffic(13, started_at_ms=1_790_000_000_000)
    lines = [traffic.line() for _ in range(60)]
    with FaultyEndpoint() as endpoint:
        site = Site(tmp_path, endpoint.url)
        append(site.log, *lines[:20])
        with site.running() as process:
            site.wait_for_lines(process, 20)
            site.log.rename(f"{site.log}.1")
            append(site.log, *lines[20:40])
            site.wait_for_lines(process, 40)
            assert stop(process) == 0
        config = site.config.read_text()
        old, new = CHANGES[change]
        assert old in config
        site.config.write_text(config.replace(old, new))
        if change == "path":
            for suffix in ("", ".1"):
                Path(f"{site.log}{suffix}").rename(tmp_path / f"kong.log{suffix}")
            site.log = tmp_path / "kong.log"
        received = endpoint.store.counts()["received"]
        append(site.log, *lines[40:])
        with site.running() as process:
            site.wait_for_lines(process, 60)
            assert stop(process) == 0
        counts = endpoint.store.counts()
        assert counts["repeats"] == 0
        assert 0 < counts["received"] - received <= len(expected_ids(lines[40:]))
        assert set(endpoint.ids()) <= set(expected_ids(lines))
        books = site.books()
        assert books.balanced
        assert books[Count.LINES] == 60
