"""The spool: what was stored is on disk, is read once in order, and repeats are known; many share one sync."""

import asyncio
import errno
import logging
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from metershipper import segments, spool
from metershipper.bodies import Line
from metershipper.checkpoint import Checkpoint
from metershipper.followed import Block
from metershipper.ledger import Settled
from metershipper.records import Gap, Lost
from metershipper.repeats import DIGEST_BYTES
from metershipper.spool import SPOOL_DIRECTORY, GroupCommit, NoRoom, Spool, Stored
from metershipper.state import make_private_directory

WRITE, TRUNCATE = os.write, os.ftruncate
WINDOW = 900.0
NOW = 1_700_000_000.0


class Memory:
    """What the checkpoint knows of the spool."""

    def __init__(self, position: int | None = None) -> None:
        self.position = position
        self.gaps: list[Gap] = []

    def spool(self) -> tuple[int, int | None]:
        return 7, self.position

    def report_gap(self, gap: Gap) -> None:
        self.gaps.append(gap)


class Clock:
    """`time.time` of the spool."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def time(self) -> float:
        return self.now


@pytest.fixture
def state(tmp_path: Path) -> Path:
    make_private_directory(tmp_path / "state")
    return tmp_path / "state"


@contextmanager
def opened(
    state: Path, memory: Memory | Checkpoint | None = None, *, max_bytes: int = 100_000, window: float = WINDOW
) -> Iterator[Spool]:
    kept = Spool(
        state, memory or Memory(), max_bytes=max_bytes, repeat_window_seconds=window, max_line_bytes=16 * 1024 * 1024
    )
    kept.open()
    try:
        yield kept
    finally:
        kept.close()


def read(kept: Spool) -> list[bytes]:
    """The lines that were not read yet."""
    return [line for block in blocks(kept) for line in block.data.splitlines()]


def blocks(kept: Spool) -> list[Block]:
    found = []
    while (block := kept.next_block()) is not None:
        found.append(block)
    return found


def store(kept: Spool, *lines: Line) -> Stored | NoRoom:
    (result,) = kept.store([lines])
    return result


def files(state: Path, suffix: str = ".ndjson") -> list[str]:
    return sorted(path.name for path in (state / SPOOL_DIRECTORY).iterdir() if path.name.endswith(suffix))


def digest_files(state: Path) -> list[Path]:
    return sorted((state / SPOOL_DIRECTORY).glob("repeats-*"))


def failing(name: str, times: int, code: int = errno.ENOSPC) -> Callable[..., object]:
    function, left = getattr(os, name), [times]

    def fails(*arguments: object) -> object:
        if left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return function(*arguments)

    return fails


# --- one way through it


def test_what_is_stored_is_read_in_order_with_its_place(state: Path) -> None:
    with opened(state) as kept:
        assert kept.store([[b"1", b"22"], [], [b"333"]]) == [Stored(2, 0), Stored(0, 0), Stored(1, 0)]
        (block,) = blocks(kept)
        assert (block.file_id, block.start_offset, block.end_offset, block.data) == (7, 0, 9, b"1\n22\n333\n")
        assert block.format == "ndjson"
        assert kept.next_block() is None
        assert store(kept, b"4") == Stored(1, 0)
        assert [(block.start_offset, block.data) for block in blocks(kept)] == [(9, b"4\n")]


def test_what_is_settled_is_deleted_and_what_is_not_is_read_again(state: Path) -> None:
    """(case 54)"""
    memory = Memory()
    with opened(state, memory) as kept:
        store(kept, b"1", b"2")
        assert read(kept) == [b"1", b"2"]
        kept.settled(2)
    memory.position = 2
    with opened(state, memory) as kept:
        assert read(kept) == [b"2"]
        kept.settled(4)
        assert files(state) == []
    assert not Spool.holds_something(state)


def test_what_a_crash_left_between_checkpoint_and_deletion_is_deleted_by_the_next_start(state: Path) -> None:
    with opened(state) as kept:
        store(kept, b"1")
    assert Spool.holds_something(state)
    with opened(state, Memory(2)) as kept:
        assert files(state) == []
        assert read(kept) == []
        assert store(kept, b"2") == Stored(1, 0)
        assert [block.start_offset for block in blocks(kept)] == [2]


def test_a_fresh_checkpoint_begins_at_the_first_segment(state: Path) -> None:
    """Where the checkpoint was lost: `run --start-over` reads what is still there, and misses nothing."""
    with opened(state, Memory(5000)) as kept:
        store(kept, b"1", b"2")
    memory = Memory(None)
    with opened(state, memory) as kept:
        assert [(block.start_offset, block.data) for block in blocks(kept)] == [(5000, b"1\n2\n")]
    assert memory.gaps == []


def test_a_segment_that_is_missing_is_a_gap_and_what_follows_is_read(
    state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At the next start, and while it runs (case 60)."""
    memory = Memory()
    with opened(state, memory, max_bytes=800) as kept:
        for number in range(3):
            store(kept, b"%0119d" % number)
        (state / SPOOL_DIRECTORY / files(state)[1]).unlink()
        with_hole = [b"%0119d" % number for number in (0, 2)]
        for _ in range(3):
            kept.next_block()
    told = [Gap(7, str(state / SPOOL_DIRECTORY), 120, 240, Lost.VANISHED, memory.gaps[0].found_at)]
    assert memory.gaps == told
    assert "120 bytes are missing that were not delivered" in caplog.text
    with opened(state, memory, max_bytes=800) as kept:
        assert read(kept) == with_hole
    assert [(gap.start_offset, gap.end_offset) for gap in memory.gaps] == [(120, 240)] * 2


def test_what_is_stored_meanwhile_is_read_over_the_hole_of_a_failed_write(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was there: no gap."""
    memory = Memory()
    with opened(state, memory) as kept:
        store(kept, b"1")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", failing("fdatasync", 1))
            patch.setattr(os, "ftruncate", failing("ftruncate", 1))
            assert isinstance(store(kept, b"lost"), NoRoom)
        assert read(kept) == [b"1"]
        store(kept, b"2")
        assert read(kept) == [b"2"]
    with opened(state, memory) as kept:
        assert read(kept) == [b"1", b"2"]
    assert memory.gaps == []


def test_a_line_above_the_limit_is_stepped_over_and_described(state: Path) -> None:
    with ExitStack() as stack:
        kept = Spool(state, Memory(), max_bytes=2**22, repeat_window_seconds=WINDOW, max_line_bytes=4096)
        kept.open()
        stack.callback(kept.close)
        store(kept, b"1", b"x" * 2**21, b"2")
        found = blocks(kept)
    overlong = [block.overlong.length for block in found if block.overlong]
    assert (overlong, b"".join(block.data for block in found)) == ([2**21], b"1\n2\n")


def test_with_a_real_checkpoint_positions_and_gaps_are_kept(state: Path) -> None:
    with Checkpoint(state) as checkpoint:
        with opened(state, checkpoint) as kept:
            store(kept, b"1", b"2")
            (block,) = blocks(kept)
            checkpoint.commit([Settled(block.file_id, 2, b"1\n")])
        with opened(state, checkpoint) as kept:
            assert read(kept) == [b"2"]
            (state / SPOOL_DIRECTORY / files(state)[0]).unlink()
        with opened(state, checkpoint) as kept:
            kept.store([[b"3"]])
            assert read(kept) == [b"3"]
        assert checkpoint.files() == []


# --- repeats


def test_a_repeat_is_not_stored_again(state: Path) -> None:
    """What Kong sends again after an answer that was slow or lost (case 56)."""
    with opened(state) as kept:
        assert store(kept, b"1", b"2") == Stored(2, 0)
        assert store(kept, b"1", b"2") == Stored(0, 2)
        assert store(kept, b"2", b"3", b"3") == Stored(1, 2)
        assert read(kept) == [b"1", b"2", b"3"]


def test_a_repeat_in_the_same_group_waits_for_the_first(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is told that it was received, of him it was."""
    with opened(state) as kept:
        assert kept.store([[b"1"], [b"1"]]) == [Stored(1, 0), Stored(0, 1)]
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", failing("fdatasync", 1))
            assert [type(result) for result in kept.store([[b"2"], [b"2"], []])] == [NoRoom, NoRoom, Stored]
        assert kept.store([[b"2"], [b"2"]]) == [Stored(1, 0), Stored(0, 1)]
        assert read(kept) == [b"1", b"2"]


def test_what_could_not_be_written_is_no_repeat(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not after a restart (case 60)."""
    with opened(state) as kept:
        store(kept, b"1")
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", failing("write", 1))
            failed = store(kept, b"1", b"2", b"3")
        assert str(failed) == "the spool can't be written: No space left on device"
    with opened(state) as kept:
        assert store(kept, b"1", b"2", b"3") == Stored(2, 1)


def test_what_there_was_no_room_for_is_no_repeat(state: Path) -> None:
    with opened(state, max_bytes=1024) as kept:
        assert isinstance(store(kept, b"x" * 1023, b"y"), NoRoom)
        assert store(kept, b"y") == Stored(1, 0)
        assert store(kept, b"y") == Stored(0, 1)


@pytest.mark.parametrize("keep_segment", [True, False])
def test_repeats_are_known_after_a_restart(keep_segment: bool, state: Path) -> None:
    with opened(state) as kept:
        store(kept, b"1", b"2")
        if not keep_segment:
            kept.settled(4)
    with opened(state, Memory(0 if keep_segment else 4)) as kept:
        assert store(kept, b"2", b"3") == Stored(1, 1)
    with opened(state, Memory(0 if keep_segment else 4)) as kept:
        assert store(kept, b"1", b"2", b"3") == Stored(0, 3)


def test_repeats_are_forgotten_with_their_window_and_so_are_their_files(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(time.time())
    monkeypatch.setattr(spool, "time", clock)
    with opened(state) as kept:
        store(kept, b"1")
        (first,) = digest_files(state)
        assert first.stat().st_mode & 0o777 == 0o600
        clock.now += WINDOW * 1.5
        assert store(kept, b"1") == Stored(1, 0)
        assert len(digest_files(state)) == 1
        assert not first.exists()
    clock.now += WINDOW * 1.5
    with opened(state) as kept:
        assert digest_files(state) == []
        assert store(kept, b"1") == Stored(1, 0)


def test_torn_digests_only_let_a_repeat_pass(state: Path) -> None:
    with opened(state) as kept:
        store(kept, b"1")
        store(kept, b"2")
        kept.settled(4)
    (path,) = digest_files(state)
    path.write_bytes(path.read_bytes()[: DIGEST_BYTES + 5])
    with opened(state, Memory(4)) as kept:
        assert store(kept, b"1", b"2") == Stored(1, 1)


def test_digests_that_can_not_be_written_or_deleted_cost_nobody_an_answer(
    state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(time.time())
    monkeypatch.setattr(spool, "time", clock)

    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with opened(state) as kept:
        assert store(kept, b"1") == Stored(1, 0)
        monkeypatch.setattr(Path, "unlink", unlink)
        clock.now += WINDOW * 1.5
        monkeypatch.setattr(os, "open", failing("open", 1, errno.EROFS))
        assert store(kept, b"2") == Stored(1, 0)
        assert store(kept, b"2") == Stored(0, 1)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "can't be deleted" in caplog.text
    assert "repeats may pass" in caplog.text


def test_foreign_files_are_left_alone(state: Path) -> None:
    directory = state / SPOOL_DIRECTORY
    with opened(state) as kept:
        store(kept, b"1")
    for name in ("repeats-1.swp", "repeats-000000000001~", "notes"):
        (directory / name).write_bytes(b"x" * 30)
    with opened(state) as kept:
        assert store(kept, b"1") == Stored(0, 1)
    assert {"repeats-1.swp", "repeats-000000000001~", "notes"} < {path.name for path in directory.iterdir()}


# --- room


def test_a_request_without_room_costs_the_others_of_its_group_nothing(state: Path) -> None:
    with opened(state, max_bytes=1024) as kept:
        results = kept.store([[b"a" * 500], [b"b" * 600], [b"c" * 500], [], [b"a" * 500]])
        assert [type(result) for result in results] == [Stored, NoRoom, Stored, Stored, Stored]
        assert str(results[1]) == "the spool holds inputs.http_log.spool_max_bytes = 1024"
        assert read(kept) == [b"a" * 500, b"c" * 500]
        assert store(kept) == Stored(0, 0)  # `[]` is always welcome
        assert store(kept, b"a" * 500) == Stored(0, 1)
        assert isinstance(store(kept, b"d" * 30), NoRoom)
        kept.settled(1002)
        assert store(kept, b"b" * 600) == Stored(1, 0)


def test_a_spool_that_fills_up_is_told_once_and_again_after_it_was_below(
    state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At 80 % (case 60)."""
    caplog.set_level(logging.INFO)
    with opened(state, max_bytes=1000) as kept:
        store(kept, b"1" * 798)
        assert caplog.records == []
        store(kept, b"2")
        store(kept, b"3")
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert caplog.records[0].getMessage().startswith("the spool is 80 % full: when it is full, Kong is told to")
        assert isinstance(store(kept, b"4" * 500), NoRoom)
        read(kept)
        kept.settled(803)
        store(kept, b"5")
        assert caplog.messages[1:] == ["the spool is below 80 % again"]
        store(kept, b"6" * 900)
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "WARNING"]


def test_what_is_settled_makes_room_also_when_a_write_failed_meanwhile(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full of what is settled would never have room again (case 60)."""
    reached, go_on = threading.Event(), threading.Event()

    def fdatasync(fd: int) -> None:
        reached.set()
        assert go_on.wait(10)
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(state) as kept:
        store(kept, b"1")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fdatasync)
            storing = threading.Thread(target=store, args=(kept, b"2"))
            storing.start()
            assert reached.wait(10)
            kept.settled(2)
            assert len(files(state)) == 1
            go_on.set()
            storing.join()
        assert files(state) == []


def test_what_can_not_be_deleted_is_told(
    state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with opened(state) as kept:
        store(kept, b"1")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink)
            kept.settled(2)
        assert "what is settled can't be deleted (Read-only file system)" in caplog.text
        kept.settled(2)
        assert files(state) == []


# --- group commit


class Disk:
    """In the place of a spool: stores when the test lets it."""

    def __init__(self) -> None:
        self.groups: list[list[Sequence[Line]]] = []
        self.may_sync = threading.Event()
        self.began = threading.Event()

    def store(self, requests: Sequence[Sequence[Line]]) -> list[Stored | NoRoom]:
        self.began.set()
        assert self.may_sync.wait(10)
        self.groups.append(list(requests))
        return [NoRoom("full") if b"too much" in lines else Stored(len(lines), 0) for lines in requests]


@contextmanager
def in_background(task: "asyncio.Task[None]") -> Iterator[None]:
    try:
        yield
    finally:
        task.cancel()


async def stored_by(disk: Disk, requests: list[list[bytes]]) -> list[Stored | BaseException]:
    """One request first, and all others while it is being synced."""
    told: list[None] = []
    commit = GroupCommit(disk, lambda: told.append(None))  # type: ignore[arg-type]
    with in_background(asyncio.create_task(commit.run())):
        first = asyncio.create_task(commit.store(requests[0]))
        await asyncio.to_thread(disk.began.wait, 10)
        others = [asyncio.create_task(commit.store(lines)) for lines in requests[1:]]
        await asyncio.sleep(0)
        disk.may_sync.set()
        results = await asyncio.gather(first, *others, return_exceptions=True)
    assert len(told) == len(disk.groups)
    return results


def test_what_comes_during_a_sync_shares_the_next_one() -> None:
    disk, requests = Disk(), [[b"%d" % number] for number in range(200)]
    assert asyncio.run(stored_by(disk, requests)) == [Stored(1, 0)] * 200
    assert disk.groups == [requests[:1], requests[1:]]


def test_only_who_had_no_room_is_told_so() -> None:
    disk = Disk()
    results = asyncio.run(stored_by(disk, [[b"1"], [b"too much"], [b"3"], []]))
    assert isinstance(results.pop(1), NoRoom)
    assert results == [Stored(1, 0), Stored(1, 0), Stored(0, 0)]


def test_who_goes_away_disturbs_nobody() -> None:
    async def run() -> None:
        disk = Disk()
        commit = GroupCommit(disk, lambda: None)  # type: ignore[arg-type]
        with in_background(asyncio.create_task(commit.run())):
            waiting = [asyncio.create_task(commit.store([b"%d" % number])) for number in range(4)]
            await asyncio.to_thread(disk.began.wait, 10)
            late = asyncio.create_task(commit.store([b"4"]))
            await asyncio.sleep(0)
            for task in (waiting[1], late):
                task.cancel()
            disk.may_sync.set()
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert isinstance(results.pop(1), asyncio.CancelledError)
            assert results == [Stored(1, 0)] * 3
            assert await commit.store([b"5"]) == Stored(1, 0)

    asyncio.run(run())


def test_an_answer_comes_after_the_sync(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a spool and a checkpoint that are real (case 54)."""
    syncs: list[int] = []

    def fdatasync(fd: int) -> None:
        real_sync(fd)
        syncs.append(os.fstat(fd).st_size)

    real_sync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", fdatasync)

    async def run(kept: Spool) -> None:
        commit = GroupCommit(kept, lambda: None)

        async def post(number: int) -> None:
            line = b"%099d" % number
            assert await commit.store([line]) == Stored(1, 0)
            assert b"".join(path.read_bytes() for path in (state / SPOOL_DIRECTORY).glob("*.ndjson")).count(line) == 1
            assert syncs

        with in_background(asyncio.create_task(commit.run())):
            await asyncio.gather(*map(post, range(300)))

    with opened(state) as kept:
        asyncio.run(run(kept))
        assert len(syncs) < 30
        assert sorted(read(kept)) == [b"%099d" % number for number in range(300)]


# --- a model: nothing that was acknowledged is ever lost


class SpoolModel(RuleBasedStateMachine):
    """Requests, readers, settling, crashes and a disk that fails, in any order. Lines are numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.cleanup = ExitStack()
        self.state = Path(self.cleanup.enter_context(tempfile.TemporaryDirectory()))
        self.patch = self.cleanup.enter_context(pytest.MonkeyPatch.context())
        self.patch.setattr(segments, "sync_directory", lambda _: None)
        self.patch.setattr(os, "fsync", lambda _: None)
        self.patch.setattr(os, "fdatasync", self._sync)
        self.patch.setattr(os, "write", self._write)
        self.patch.setattr(os, "ftruncate", self._truncate)
        self.faults: set[str] = set()
        self.memory = Memory()
        self.next_number = 0
        self.acknowledged: list[int] = []
        self.refused: list[int] = []
        self.reads: Counter[int] = Counter()
        self.unsettled: list[tuple[int, list[int]]] = []  # end of a block and the numbers in it
        self.settled_numbers: set[int] = set()
        self._open()

    def teardown(self) -> None:
        self.kept.close()
        self.cleanup.close()

    def _sync(self, fd: int) -> None:
        if "sync" in self.faults:
            raise OSError(errno.EIO, "Input/output error")

    def _write(self, fd: int, data: bytes) -> int:
        if "write" in self.faults:
            if len(data) > 8:
                return WRITE(fd, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return WRITE(fd, data)

    def _truncate(self, fd: int, length: int) -> None:
        if "truncate" in self.faults:
            raise OSError(errno.EIO, "Input/output error")
        TRUNCATE(fd, length)

    def _open(self) -> None:
        self.kept = Spool(
            self.state, self.memory, max_bytes=2000, repeat_window_seconds=WINDOW, max_line_bytes=16 * 1024 * 1024
        )
        self.kept.open()

    def _line(self, number: int) -> bytes:
        return b"%d %s" % (number, b"x" * (number * 7 % 90))

    @rule(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4), faults=st.sets(st.sampled_from(["sync", "write"])))
    def store(self, sizes: list[int], faults: set[str]) -> None:
        self._store([self._new_numbers(size) for size in sizes], faults)

    @rule(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=2))
    def store_and_leave_torn(self, sizes: list[int]) -> None:
        """Neither durable nor taken back."""
        self._store([self._new_numbers(size) for size in sizes], {"sync", "truncate"})

    @precondition(lambda self: bool(self.acknowledged))
    @rule(data=st.data())
    def send_again(self, data: st.DataObject) -> None:
        numbers = data.draw(st.lists(st.sampled_from(self.acknowledged), min_size=1, max_size=5))
        self._store([numbers], set())

    @precondition(lambda self: bool(self.refused))
    @rule()
    def send_again_what_was_refused(self) -> None:
        numbers, self.refused = self.refused[:5], self.refused[5:]
        self._store([numbers], set())

    def _new_numbers(self, size: int) -> list[int]:
        self.next_number += size
        return list(range(self.next_number - size, self.next_number))

    def _store(self, requests: list[list[int]], faults: set[str]) -> None:
        self.faults = faults
        results = self.kept.store([[self._line(number) for number in numbers] for numbers in requests])
        self.faults = set()
        for numbers, result in zip(requests, results, strict=True):
            if isinstance(result, Stored):
                assert result.lines + result.repeats == len(numbers)
                new = set(numbers) - set(self.acknowledged)
                if not new:
                    assert result.lines == 0
                self.acknowledged += sorted(new)
            else:
                self.refused += [number for number in numbers if number not in self.acknowledged]

    @rule()
    def read(self) -> None:
        block = self.kept.next_block()
        if block is not None:
            assert block.overlong is None
            numbers = [int(line.split(b" ")[0]) for line in block.data.splitlines()]
            assert block.data == b"".join(self._line(number) + b"\n" for number in numbers)
            self.reads.update(numbers)
            self.unsettled.append((block.end_offset, numbers))

    @precondition(lambda self: bool(self.unsettled))
    @rule(data=st.data(), crash=st.booleans())
    def settle(self, data: st.DataObject, crash: bool) -> None:
        count = data.draw(st.integers(1, len(self.unsettled)))
        position = self.unsettled[count - 1][0]
        assert position > (self.memory.position or 0)
        self.memory.position = position
        for _, numbers in self.unsettled[:count]:
            self.settled_numbers.update(numbers)
        self.unsettled = self.unsettled[count:]
        if crash:  # between the commit and the deletion
            self.crash_and_restart()
        else:
            self.kept.settled(position)

    @rule()
    def crash_and_restart(self) -> None:
        self.kept.close()
        self.unsettled = []
        self._open()

    @rule(torn=st.binary(min_size=1, max_size=20).filter(lambda data: b"\n" not in data))
    def crash_in_the_middle_of_a_write(self, torn: bytes) -> None:
        self.kept.close()
        for path in sorted((self.state / SPOOL_DIRECTORY).glob("*.ndjson"))[-1:]:
            with path.open("ab") as file:
                file.write(torn)
        self.unsettled = []
        self._open()

    @rule()
    def read_and_settle_everything(self) -> None:
        while True:
            before = len(self.unsettled)
            self.read()
            if len(self.unsettled) == before:
                break
        if self.unsettled:
            self.memory.position = self.unsettled[-1][0]
            for _, numbers in self.unsettled:
                self.settled_numbers.update(numbers)
            self.unsettled = []
            self.kept.settled(self.memory.position)
        assert self.settled_numbers >= set(self.acknowledged)
        assert self.memory.gaps == []

    @invariant()
    def what_is_acknowledged_is_settled_or_on_disk(self) -> None:
        paths = sorted((self.state / SPOOL_DIRECTORY).glob("*.ndjson"))
        lines = [line for path in paths for line in path.read_bytes().split(b"\n")]
        on_disk = {int(line.split(b" ")[0]) for line in lines if line[:1].isdigit()}
        assert on_disk | self.settled_numbers >= set(self.acknowledged)

    @invariant()
    def only_what_is_not_settled_is_on_disk(self) -> None:
        for segment in self.kept._segments._segments:
            if segment.end > segment.start:
                assert segment.end > (self.memory.position or 0)
        held = {segment.path for segment in self.kept._segments._segments}
        assert set((self.state / SPOOL_DIRECTORY).glob("*.ndjson")) == held


def test_model() -> None:
    """(cases 54, 56, 60)"""
    run_state_machine_as_test(SpoolModel, settings=settings(max_examples=80, stateful_step_count=30, deadline=None))
