"""The tailer's waiting: it wakes on changes, polls without them, stops at once, and never blocks the event loop."""

import asyncio
import contextlib
import errno
import os
import resource
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from metershipper import followed
from metershipper.checkpoint import DATABASE_NAME, Checkpoint
from metershipper.config import FileInput
from metershipper.errors import StateError
from metershipper.files import FileSet
from metershipper.followed import Block
from metershipper.state import make_private_directory
from metershipper.tailer import Tailer

PATIENCE_SECONDS = 5.0
NEVER_SECONDS = 3600.0  # a poll that does not come in the time of a test


class Site:
    """Files below one directory, and tailers over them."""

    def __init__(self, root: Path) -> None:
        self.logs = root / "logs"
        self.state = root / "state"
        self.logs.mkdir()
        make_private_directory(self.state)
        self.log = self.logs / "usage.log"
        self.checkpoint = Checkpoint(self.state).__enter__()
        self.files = FileSet([FileInput(path=str(self.logs / "**" / "*.log"))], self.checkpoint, time.monotonic)

    def close(self) -> None:
        self.files.close()
        self.checkpoint.__exit__()

    def append(self, data: bytes) -> None:
        with self.log.open("ab") as file:
            file.write(data)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with contextlib.closing(Site(tmp_path)) as site:
        yield site


async def next_data(tailer: Tailer) -> bytes:
    """The next block's bytes, however often there is none before."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            block = await tailer.next_block(None)
            if block is not None:
                return block.data


@contextlib.asynccontextmanager
async def watching(tailer: Tailer) -> AsyncIterator["asyncio.Task[None]"]:
    """With what runs beside the reader."""
    async with looking_around(tailer):
        watcher = asyncio.create_task(tailer.watch())
        try:
            yield watcher
        finally:
            watcher.cancel()
            await asyncio.wait({watcher})


@contextlib.asynccontextmanager
async def looking_around(tailer: Tailer) -> AsyncIterator[None]:
    """Where the kernel reports nothing."""
    looking = asyncio.create_task(tailer.look_around())
    try:
        yield
    finally:
        looking.cancel()
        await asyncio.wait({looking})


def test_lines_are_found_by_polling_alone(site: Site) -> None:
    """Where the kernel reports no changes: existing lines, new lines, a rotation, a new file (cases 1, 6, 19)."""

    async def follow() -> None:
        tailer = Tailer(site.files, poll_seconds=0.01)
        await tailer.start()
        assert await tailer.next_block(0) is None
        async with looking_around(tailer):
            site.append(b"1\n")
            assert await next_data(tailer) == b"1\n"
            site.append(b"2\n")
            site.log.rename(f"{site.log}.1")
            site.append(b"3\n")
            assert [await next_data(tailer) for _ in range(2)] == [b"2\n", b"3\n"]

    asyncio.run(follow())


def test_a_change_wakes_the_reader_without_a_poll(site: Site) -> None:
    """(case 1: well below 5 s)"""
    site.append(b"1\n")

    async def write_until_read(tailer: Tailer) -> Block:
        reading = asyncio.create_task(tailer.next_block(NEVER_SECONDS))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not reading.done():  # the watch may not be there yet
                await asyncio.wait({reading}, timeout=0.1)
                site.append(b"2\n")
        block = await reading
        assert block is not None
        return block

    async def follow() -> None:
        tailer = Tailer(site.files, poll_seconds=NEVER_SECONDS)
        await tailer.start()
        assert await next_data(tailer) == b"1\n"
        async with watching(tailer):
            assert set((await write_until_read(tailer)).data) == set(b"2\n")

    asyncio.run(follow())


def test_a_directory_that_appears_later_is_watched(site: Site) -> None:
    """A glob that matches nothing has no directory to watch until it does (case 19)."""

    async def follow() -> None:
        tailer = Tailer(site.files, poll_seconds=0.01)
        await tailer.start()
        async with watching(tailer) as watcher:
            for name in ("usage.log", "other.log", "deeper/usage.log"):
                site.log = site.logs / name
                site.log.parent.mkdir(exist_ok=True)
                site.append(b"%s\n" % name.encode())
                assert await next_data(tailer) == b"%s\n" % name.encode()
            assert not watcher.done()

    asyncio.run(follow())


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """This process may open nothing more, so the kernel gives it no watch either."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = [os.open(os.devnull, os.O_RDONLY)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (held[0] + 1, hard))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(held[0]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)


def test_without_kernel_events_the_poll_goes_on(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """No watches left: told, not fatal, and tried again when other directories are followed."""
    site.append(b"1\n")

    async def follow() -> None:
        tailer = Tailer(site.files, poll_seconds=0.01)
        await tailer.start()
        watcher = asyncio.create_task(tailer.watch())
        with site.log.open("ab", buffering=0) as kong, no_descriptor_left():
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not caplog.messages:
                    await asyncio.wait({watcher}, timeout=0.005)
            assert await next_data(tailer) == b"1\n"
            kong.write(b"2\n")
            assert await next_data(tailer) == b"2\n"
        async with looking_around(tailer):
            (site.logs / "deeper").mkdir()
            site.log = site.logs / "deeper" / "usage.log"
            site.append(b"3\n")
            assert await next_data(tailer) == b"3\n"
        await asyncio.wait({watcher}, timeout=0.05)
        assert not watcher.done()
        watcher.cancel()
        await asyncio.wait({watcher})

    asyncio.run(follow())
    assert "Too many open files (os error 24)); looking every 0.2 s" in "".join(caplog.messages)


def test_a_stop_ends_the_waiting_at_once_and_nothing_more_is_read(site: Site) -> None:
    async def follow() -> None:
        tailer = Tailer(site.files, poll_seconds=NEVER_SECONDS)
        await tailer.start()
        reading = asyncio.create_task(tailer.next_block(None))
        await asyncio.wait({reading}, timeout=0.05)
        assert not reading.done()
        site.append(b"1\n")
        tailer.stop()
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await reading is None
            assert await tailer.next_block(None) is None

    asyncio.run(follow())


def test_the_wait_is_as_short_as_it_is_told(site: Site) -> None:
    """A batch that is due does not wait for lines."""

    async def follow() -> None:
        tailer = Tailer(site.files, poll_seconds=NEVER_SECONDS)
        await tailer.start()
        began = time.monotonic()
        assert await tailer.next_block(0.02) is None
        assert 0.01 < time.monotonic() - began < PATIENCE_SECONDS

    asyncio.run(follow())


def test_a_quiet_log_costs_next_to_nothing(site: Site) -> None:
    """No loop burns the processor while there is nothing to do."""
    site.append(b"1\nhalf")

    async def follow() -> int:
        tailer = Tailer(site.files, poll_seconds=0.05)
        await tailer.start()
        turns = 0
        async with watching(tailer):
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                await tailer.next_block(None)
                turns += 1
        return turns

    assert asyncio.run(follow()) < 20


def test_reading_does_not_block_the_event_loop(site: Site) -> None:
    """A search through a line of 64 MiB happens elsewhere (case 21)."""
    site.log.write_bytes(b"x" * 64 * 1024 * 1024)

    async def follow() -> int:
        tailer = Tailer(site.files, poll_seconds=NEVER_SECONDS)
        await tailer.start()
        reading = asyncio.create_task(tailer.next_block(0))
        turns = 0
        while not reading.done():
            await asyncio.sleep(0)
            turns += 1
        assert await reading is None
        return turns

    assert asyncio.run(follow()) > 50


def test_a_state_that_can_not_be_written_is_tried_again(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Another process holds the database: told, nothing stepped over, and no busy loop (case 33)."""

    async def follow() -> None:
        tailer = Tailer(site.files, poll_seconds=0.01)
        await tailer.start()
        site.checkpoint._db.execute("PRAGMA busy_timeout=0")
        with contextlib.closing(sqlite3.connect(site.state / DATABASE_NAME, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            site.append(b"1\n")
            async with looking_around(tailer), asyncio.timeout(PATIENCE_SECONDS):
                while len(caplog.messages) < 2:
                    assert await tailer.next_block(None) is None
        async with looking_around(tailer):
            assert await next_data(tailer) == b"1\n"

    asyncio.run(follow())
    assert "files can't be recorded (database is locked); nothing is lost, trying again" in caplog.messages


def test_a_damaged_state_ends_the_start(site: Site) -> None:
    """(case 32)"""
    site.append(b"1\n")
    with contextlib.closing(sqlite3.connect(site.state / DATABASE_NAME, isolation_level=None)) as db:
        db.execute("DROP TABLE files")
    with pytest.raises(sqlite3.OperationalError):
        asyncio.run(Tailer(site.files).start())
    with pytest.raises(StateError, match="no such table"), Checkpoint(site.state):
        pass


def test_no_descriptor_is_left_behind(site: Site) -> None:
    before = len(os.listdir("/proc/self/fd"))
    site.append(b"1\n")

    async def follow() -> None:
        tailer = Tailer(site.files, poll_seconds=0.01)
        await tailer.start()
        async with watching(tailer):
            assert await next_data(tailer) == b"1\n"

    asyncio.run(follow())
    site.files.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # the database's write-ahead log and its index


# Two sources: the files, and the spool


class Source:
    """In the place of the spool: some blocks, then whatever the test puts in."""

    def __init__(self, *blocks: Block | OSError) -> None:
        self.blocks = list(blocks)

    def next_block(self) -> Block | None:
        block = self.blocks.pop(0) if self.blocks else None
        if isinstance(block, OSError):
            raise block
        return block


def block_of(data: bytes) -> Block:
    return Block(99, 0, len(data), data, data[-256:], format="ndjson")


def test_files_and_spool_are_read_in_turn(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backlog in one of them makes the other one wait for one block, and no more."""
    monkeypatch.setattr(followed, "BLOCK_BYTES", 4)
    site.append(b"f1\nf2\nf3\nf4\n")
    spool = Source(*(block_of(b"s%d\n" % number) for number in range(3)))

    async def follow() -> list[bytes]:
        tailer = Tailer(site.files, spool)
        await tailer.start()
        return [await next_data(tailer) for _ in range(7)]

    found = asyncio.run(follow())
    assert sorted(found) == [b"f1\n", b"f2\n", b"f3\n", b"f4\n", b"s0\n", b"s1\n", b"s2\n"]
    assert [data[:1] for data in found[:6]] in ([b"f", b"s"] * 3, [b"s", b"f"] * 3)


def test_who_stores_wakes_the_reader(site: Site) -> None:
    spool = Source()

    async def follow() -> None:
        tailer = Tailer(site.files, spool, poll_seconds=NEVER_SECONDS)
        await tailer.start()
        reading = asyncio.create_task(tailer.next_block(NEVER_SECONDS))
        await asyncio.sleep(0.01)
        spool.blocks.append(block_of(b"1\n"))
        tailer.wake()
        async with asyncio.timeout(PATIENCE_SECONDS):
            block = await reading
        assert block is not None
        assert block.data == b"1\n"

    asyncio.run(follow())


def test_a_spool_that_can_not_be_read_is_told_and_files_are_still_read(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """(case 60)"""
    site.append(b"f\n")
    spool = Source(*(OSError(errno.EIO, "Input/output error") for _ in range(2)), block_of(b"s\n"))

    async def follow() -> set[bytes]:
        tailer = Tailer(site.files, spool, poll_seconds=0.001)
        await tailer.start()
        async with looking_around(tailer):
            return {await next_data(tailer) for _ in range(2)}

    assert asyncio.run(follow()) == {b"f\n", b"s\n"}
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert errors == ["the spool can't be read (Input/output error); nothing is lost, trying again"] * 2
