"""Guarantees 1 and 2 across a power cut: after each single fsync, the disk holds a state to go on from (case 32).

`run` is recorded with `synced.c`: what it synced, when, in which order. From that the disk is put together as a power
cut after each sync would leave it: of each file what was synced last, and no name that was not synced with its
directory; and as one in the middle of a sync would: some sectors new, some old.
"""

import gzip
import os
import random
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path

import pytest

from metershipper.books import Books, Count
from metershipper.checkpoint import DATABASE_NAME, Checkpoint
from metershipper.records import Sample, StoredFile
from metershipper.state import StateLock
from metershipper.traffic import Traffic
from tests.integration.support import (
    FaultyEndpoint,
    Sender,
    Site,
    TimedStore,
    append,
    array_of,
    expected_ids,
    stop,
    wait_until,
)

SHIM = Path(__file__).with_name("synced.c")
SECTOR_BYTES = 512
# Enough of these for SQLite to move what is in its log to the database while the process runs (at 4 MB).
LOAD = 60
POISON = [b"not json %d " % number + b"x" * 60_000 + b"\n" for number in range(2 * LOAD)]


@dataclass
class Log:
    """What Kong wrote, content by content: one ends where the log is rotated."""

    path: Path
    lines: list[bytes] = field(default_factory=list)
    contents: list[list[bytes]] = field(default_factory=lambda: [[]])
    _traffic: Traffic = field(default_factory=lambda: Traffic(21, started_at_ms=1_790_000_000_000))

    def write(self, count: int, poison: Iterable[bytes] = ()) -> None:
        lines = [*(self._traffic.line() for _ in range(count)), *poison]
        append(self.path, *lines)
        self.lines += lines
        self.contents[-1] += lines

    def rotate(self, *, copy: bool = False) -> Path:
        rotated = Path(f"{self.path}.{len(self.contents)}")
        if copy:
            shutil.copyfile(self.path, rotated)
            os.truncate(self.path, 0)
        else:
            self.path.rename(rotated)
        self.contents.append([])
        return rotated


@dataclass(frozen=True)
class Sync:
    """One fsync: of a file with its content, or of a directory with the names in it."""

    at: int  # by CLOCK_MONOTONIC, in nanoseconds
    path: Path
    content: bytes
    names: frozenset[str] | None

    @classmethod
    def read(cls, snapshot: Path) -> "Sync":
        first, _, content = snapshot.read_bytes().partition(b"\n")
        kind, _, path = first.decode().partition(" ")
        names = frozenset(content.decode().split("\n")[:-1]) if kind == "directory" else None
        return cls(int(snapshot.name), Path(path), content, names)


@dataclass
class Disk:
    """What a power cut leaves of the state directory."""

    directory: Path
    contents: dict[str, bytes] = field(default_factory=dict)
    names: frozenset[str] = frozenset()

    def sync(self, sync: Sync) -> None:
        if sync.path == self.directory:
            self.names = sync.names or frozenset()
        elif sync.path.parent == self.directory:
            self.contents[sync.path.name] = sync.content

    def cut(self, to: Path, torn: tuple[Sync, random.Random] | None = None) -> None:
        """Put it together in the directory `to`; `torn`: the power went in the middle of this sync."""
        shutil.rmtree(to, ignore_errors=True)
        to.mkdir(mode=0o700, parents=True)
        for name in self.names:
            content = self.contents.get(name, b"")
            if torn is not None and torn[0].path.name == name:
                content = _mixed(content, torn[0].content, torn[1])
            (to / name).write_bytes(content)
            (to / name).chmod(0o600)


def _mixed(old: bytes, new: bytes, luck: random.Random) -> bytes:
    """Each sector as it was or as it should become; what a file grew by and was not written is zero."""
    old = old.ljust(len(new), b"\0") if luck.random() < 0.8 else old[: len(new)]
    share = luck.random()
    starts = range(0, len(old), SECTOR_BYTES)
    return b"".join((new if luck.random() < share else old)[at : at + SECTOR_BYTES] for at in starts)


@dataclass(frozen=True)
class State:
    """What `run` would start from."""

    files: dict[int, StoredFile]
    books: Books
    inputs: set[str]
    dead_letters: int

    @classmethod
    def of(cls, directory: Path) -> "State":
        with StateLock(directory) as lock, Checkpoint(directory, expected=lock.was_used) as checkpoint:
            files = {file.file_id: file for file in checkpoint.files()}
            books, inputs = checkpoint.books(), checkpoint.inputs()
        with closing(sqlite3.connect(directory / DATABASE_NAME)) as db:
            (letters,) = db.execute("SELECT count(*) FROM dead_letters").fetchone()
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return cls(files, books, inputs, letters)

    def is_followed_by(self, later: "State") -> bool:
        """Whether nothing that was durable is lost later, and nothing goes backwards."""
        return (
            self.inputs <= later.inputs
            and self.files.keys() <= later.files.keys()
            and all(file.position <= later.files[key].position for key, file in self.files.items())
            and all(count <= later.books[name] for name, count in self.books.items())
        )


@dataclass
class Record:
    """A recorded run: what was written, what was synced, and what the endpoint had accepted when."""

    log: Log
    state: Path
    syncs: list[Sync]
    accepted: dict[str, int]

    def __post_init__(self) -> None:
        self._lines: dict[Sample, dict[int, int]] = {}  # by the head of a content: position -> lines before it
        self._ids: dict[Sample, list[list[str]]] = {}
        for content in filter(None, self.log.contents):
            head = Sample.of(content[0])
            self._lines[head] = {end: n for n, end in enumerate(accumulate(map(len, content), initial=0))}
            self._ids[head] = [expected_ids([line]) for line in content]

    def check(self, state: State, at: int) -> None:
        """The state is one of the order of the world: accepted, acknowledged, then recorded, and exactly counted."""
        lines, ids = self.settled_by(state)
        assert state.books.balanced
        assert state.books[Count.LINES] == lines
        assert state.books[Count.EVENTS] == len(ids)
        assert state.books.dead_letters == state.dead_letters
        assert all(self.accepted.get(each, at) < at for each in ids)

    def settled_by(self, state: State) -> tuple[int, set[str]]:
        """The lines before the positions, and the ids of their events."""
        lines, ids = 0, set[str]()
        read = [file for file in state.files.values() if file.position]
        assert len({file.head for file in read}) == len(read)
        for file in read:
            count = self._lines[file.head][file.position]  # a position is the end of a line
            lines += count
            ids.update(each for of_line in self._ids[file.head][:count] for each in of_line)
        return lines, ids


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc here to compile synced.c with")
    library = tmp_path_factory.mktemp("shim") / "synced.so"
    flags = ["-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(library), str(SHIM), "-ldl", "-lpthread"], check=True)
    return library


@pytest.fixture(scope="module")
def record(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Record]:
    """Some seconds of load with every kind of rotation, a clean stop, a kill, and starts in between."""
    directory, snapshots = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("snapshots")
    variables = {"LD_PRELOAD": str(shim), "SYNCED_ROOT": str(directory), "SYNCED_SNAPSHOTS": str(snapshots)}
    store = TimedStore()
    with FaultyEndpoint(rate=0.1, store=store) as endpoint:
        site = Site(directory, endpoint.url, environment=os.environ | variables)
        log = Log(site.log)
        log.write(100)
        with site.running() as process:
            site.wait_for_lines(process, len(log.lines))
            for round_ in range(LOAD):
                log.write(20, POISON[round_::LOAD])
                if round_ in (10, 40):
                    log.rotate()
                elif round_ in (20, 50):
                    log.rotate(copy=True)
                time.sleep(0.1)
            log.write(10)
            site.wait_for_lines(process, len(log.lines))
            assert stop(process) == 0
        log.write(50)
        rotated = log.rotate()
        log.write(50)
        with site.running() as process:
            with rotated.open("rb") as source, gzip.open(f"{rotated}.gz", "wb") as target:
                shutil.copyfileobj(source, target)
            rotated.unlink()
            for _ in range(20):
                log.write(20)
                time.sleep(0.1)
            wait_until(lambda: site.books()[Count.LINES] >= len(log.lines) - 100, lambda: site.story(process))
            process.kill()
        log.rotate()
        log.write(50)
        with site.running() as process:
            site.wait_for_lines(process, len(log.lines))
            assert stop(process) == 0
    syncs = [Sync.read(path) for path in sorted(snapshots.glob("[0-9]*"))]
    yield Record(log, site.state, syncs, store.accepted)
    shutil.rmtree(snapshots)


def test_after_a_power_cut_at_any_sync_the_state_is_whole_and_nothing_of_it_goes_back(
    record: Record, tmp_path: Path
) -> None:
    """Case 32: it opens, its books are exact to the line, and it only holds what the endpoint had accepted by then."""
    disk, before, filled = Disk(record.state), State({}, Books(), set(), 0), 0
    for sync in record.syncs:
        disk.sync(sync)
        disk.cut(tmp_path / "state")
        state = State.of(tmp_path / "state")
        record.check(state, sync.at)
        assert before.is_followed_by(state)
        filled += state != before
        before = state
    assert filled > 30
    assert before.books[Count.LINES] == len(record.log.lines)
    assert len([sync for sync in record.syncs if sync.path.name == DATABASE_NAME]) > 3


def test_a_power_cut_in_the_middle_of_a_sync_leaves_the_state_before_or_after_it(
    record: Record, tmp_path: Path
) -> None:
    """Case 32: whichever sectors were written, in whichever order."""
    luck = random.Random(32)
    disk = Disk(record.state)
    for sync, following in pairwise(record.syncs):
        disk.sync(sync)
        if following.names is not None:
            continue
        disk.cut(tmp_path / "state")
        before = State.of(tmp_path / "state")
        disk.cut(tmp_path / "state", (following, luck))
        state = State.of(tmp_path / "state")
        record.check(state, following.at)
        assert before.is_followed_by(state)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
def test_a_run_after_a_power_cut_ends_with_exactly_what_was_written(
    record: Record, tmp_path: Path, share: float
) -> None:
    """Case 32: what was accepted before and what is sent now are all events; what was recorded is not sent again."""
    disk, directory, known = Disk(record.state), tmp_path / "state", list[int]()
    # Before the log is known what was rotated beside it is history; here, all of it was rotated since.
    for number, sync in enumerate(record.syncs):
        disk.sync(sync)
        disk.cut(directory)
        if State.of(directory).inputs:
            known.append(number)
    disk = Disk(record.state)
    cut = known[int(share * len(known))]
    for sync in record.syncs[: cut + 1]:
        disk.sync(sync)
    disk.cut(directory)
    _, settled = record.settled_by(State.of(directory))
    store = TimedStore()
    with FaultyEndpoint(store=store) as endpoint:
        site = Site(tmp_path, endpoint.url)
        site.config.write_text(site.config.read_text().replace(str(site.log), str(record.log.path)))
        with site.running() as process:
            site.wait_for_lines(process, len(record.log.lines))
            assert stop(process) == 0
        books = site.books()
    accepted = {each for each, at in record.accepted.items() if at < record.syncs[cut].at}
    expected = expected_ids(record.log.lines)
    assert accepted | set(store.received) == set(expected)
    assert len(set(store.received)) == len(store.received)
    assert not settled & set(store.received)
    assert books.balanced
    assert books[Count.LINES] == len(record.log.lines)
    assert books[Count.EVENTS] == len(expected)


def test_the_name_of_a_new_state_directory_is_durable_before_anything_is_recorded(record: Record) -> None:
    """Otherwise a power cut may take all of it, and the next start takes itself for the first one (case 32)."""
    first_record = next(n for n, sync in enumerate(record.syncs) if sync.path.parent == record.state)
    parent = (sync for sync in record.syncs[: first_record + 1] if sync.path == record.state.parent)
    assert any(record.state.name in (sync.names or ()) for sync in parent)


# What the http-log receiver answered (case 54)


@dataclass
class Reception:
    """A recorded run of the receiver: what it answered with 200 and when, what it synced, what was accepted when."""

    state: Path
    answered: list[tuple[int, list[bytes]]]  # CLOCK_MONOTONIC in nanoseconds, and the entries
    syncs: list[Sync]
    accepted: dict[str, int]


@pytest.fixture(scope="module")
def reception(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reception]:
    """Batches one after the other, through several segments, while a failing endpoint takes them; a kill in between."""
    directory, snapshots = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("snapshots")
    variables = {"LD_PRELOAD": str(shim), "SYNCED_ROOT": str(directory), "SYNCED_SNAPSHOTS": str(snapshots)}
    traffic = Traffic(54, started_at_ms=1_790_000_000_000)
    answered: list[tuple[int, list[bytes]]] = []
    with FaultyEndpoint(rate=0.1, store=TimedStore()) as endpoint:
        site = Site(directory, endpoint.url, SMALL_SPOOL, environment=os.environ | variables)
        for _ in range(2):
            with site.receiving() as (process, port), Sender(port) as kong:
                for _ in range(60):
                    lines = [traffic.line() for _ in range(5)]
                    while kong.post(array_of(lines)).status != 200:  # the spool is full: as Kong does
                        time.sleep(0.05)
                    answered.append((time.monotonic_ns(), lines))
                process.kill()
        store = endpoint.store
        assert isinstance(store, TimedStore)
        accepted = dict(store.accepted)
    syncs = [Sync.read(path) for path in sorted(snapshots.glob("[0-9]*"))]
    yield Reception(site.state, answered, syncs, accepted)
    shutil.rmtree(snapshots)


SMALL_SPOOL = """
[inputs.http_log]
listen = "127.0.0.1:0"
max_body_bytes = 65_536
spool_max_bytes = 524_288
"""


def test_an_answer_comes_after_the_entries_and_the_name_of_their_file_are_synced(reception: Reception) -> None:
    """Case 54: at each 200, a file of the spool that a power cut leaves holds every entry of the request."""
    spool = Disk(reception.state / "spool")
    syncs = iter([*reception.syncs, Sync(2**63, Path("/"), b"", None)])
    sync = next(syncs)
    for at, lines in reception.answered:
        while sync.at < at:
            spool.sync(sync)
            sync = next(syncs)
        synced = b"".join(content for name, content in spool.contents.items() if name in spool.names)
        assert all(line in synced for line in lines)
    assert len([name for name in spool.contents if name.endswith(".ndjson")]) > 3


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_run_after_a_power_cut_delivers_all_that_was_answered(
    reception: Reception, tmp_path: Path, share: float
) -> None:
    """Case 54: what was answered with 200 before was accepted before, or is sent now; segments come back, or not."""
    cut = int(share * len(reception.syncs))
    state, spool = Disk(reception.state), Disk(reception.state / "spool")
    for sync in reception.syncs[: cut + 1]:
        state.sync(sync)
        spool.sync(sync)
    at = reception.syncs[cut].at
    answered = [line for when, lines in reception.answered if when <= at for line in lines]
    state.cut(tmp_path / "state")
    if (named := tmp_path / "state" / "spool").exists():
        named.unlink()
        spool.cut(named)
    store = TimedStore()
    with FaultyEndpoint(store=store) as endpoint:
        site = Site(tmp_path, endpoint.url, SMALL_SPOOL)
        accepted = {each for each, when in reception.accepted.items() if when < at}
        wanted = set(expected_ids(answered)) - accepted
        with site.receiving() as (process, _):
            wait_until(lambda: wanted <= store.accepted.keys(), lambda: site.story(process))
            wait_until(lambda: not site.segments(), lambda: site.story(process))
            assert stop(process) == 0
        assert len(set(store.received)) == len(store.received)
        assert site.books().balanced
        with Checkpoint(site.state, read_only=True) as checkpoint:
            assert checkpoint.gaps() == []
