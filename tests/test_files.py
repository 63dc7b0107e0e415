"""Following files: real files, a real checkpoint and a clock that the test moves. Numbers are those of the cases."""

import contextlib
import logging
import os
import shutil
import sqlite3
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal

import pytest

from metershipper.books import Books, Count
from metershipper.checkpoint import DATABASE_NAME, Checkpoint
from metershipper.config import FileInput
from metershipper.content import BLOCK_BYTES
from metershipper.files import ROTATED_IDLE_SECONDS, STALE_SIZE_SECONDS, FileSet
from metershipper.followed import Block
from metershipper.ledger import Settled
from metershipper.lines import KEPT_OF_OVERLONG_LINE_BYTES, Overlong
from metershipper.listing import LISTING_SECONDS
from metershipper.state import make_private_directory

NOBODY = 65534


def lines(first: int, count: int = 1, width: int = 0) -> bytes:
    """Numbered lines, each unlike any other."""
    return b"".join(b'{"number":%d,"padding":"%s"}\n' % (n, b"x" * width) for n in range(first, first + count))


def overlong(line: bytes) -> Overlong:
    """What is told of a line above the limit."""
    return Overlong(len(line), sha256(line).hexdigest(), line[:KEPT_OF_OVERLONG_LINE_BYTES])


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def rewrite(path: Path, data: bytes) -> None:
    """Truncate in place and write again; the modification time tells, however coarse the clock of the file system."""
    before = path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.truncate(0)
        file.write(data)
    os.utime(path, ns=(before + 10**9, before + 10**9))


def copytruncate(path: Path, copy: Path, data: bytes = b"") -> None:
    shutil.copyfile(path, copy)
    rewrite(path, data)


def rotate(path: Path, count: int = 1) -> None:
    """What logrotate does: usage.log.1 becomes usage.log.2, usage.log becomes usage.log.1."""
    for _ in range(count):
        numbers = sorted((int(p.suffix[1:]) for p in path.parent.glob(f"{path.name}.*")), reverse=True)
        for number in numbers:
            Path(f"{path}.{number}").rename(f"{path}.{number + 1}")
        path.rename(f"{path}.1")


@dataclass
class Site:
    """A directory of logs and one state directory, with the part of `run` that reads and settles."""

    root: Path
    paths: list[str] = field(default_factory=list)
    read_from: Literal["beginning", "end"] = "beginning"
    max_line_bytes: int = 16 * 1024 * 1024
    now: float = 1000.0
    on_clock: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.logs = self.root / "logs"
        self.state = self.root / "state"
        self.logs.mkdir(exist_ok=True)
        make_private_directory(self.state)
        self.log = self.logs / "usage.log"
        self.paths = self.paths or [str(self.log)]
        self._stack = contextlib.ExitStack()

    def _clock(self) -> float:
        if self.on_clock is not None:
            hook, self.on_clock = self.on_clock, None
            hook()
        return self.now

    def start(self) -> "Site":
        """A new process: nothing but the state directory is remembered."""
        self.checkpoint = self._stack.enter_context(Checkpoint(self.state))
        inputs = [FileInput(path=path, read_from=self.read_from) for path in self.paths]
        self.files = FileSet(inputs, self.checkpoint, self._clock, max_line_bytes=self.max_line_bytes)
        self._stack.callback(self.files.close)
        self.files.load()
        return self

    def stop(self) -> None:
        self._stack.close()
        assert not self.open_logs()

    def restart(self) -> None:
        self.stop()
        self.start()

    def open_logs(self) -> list[str]:
        """Descriptors of this process that hold a log."""
        held = []
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                held.append(os.readlink(f"/proc/self/fd/{fd}"))
        return sorted(path for path in held if path.startswith(str(self.logs)) and path != str(self.logs))

    def blocks(self) -> list[Block]:
        """Scan, and all blocks that there are."""
        self.files.scan()
        found: list[Block] = []
        while (block := self.files.next_block()) is not None:
            found.append(block)
        return found

    def settle(self, blocks: list[Block]) -> None:
        self.checkpoint.commit(
            [Settled(b.file_id, b.end_offset, b.tail, Books({Count.LINES: b.data.count(b"\n")})) for b in blocks]
        )

    def read(self, *, settle: bool = True) -> bytes:
        """What is read now, in the order in which it is read; settled unless told otherwise."""
        blocks = self.blocks()
        if settle:
            self.settle(blocks)
        return b"".join(block.data for block in blocks)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def positions(self) -> dict[str, int]:
        """By the path recorded; of content that is still where it was read."""
        return {file.path: file.position for file in self.checkpoint.files() if file.inode is not None}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.stop()


# Reading


def test_lines_are_read_once_and_in_order(site: Site) -> None:
    """Every line once, while the file grows (case 1)."""
    append(site.log, lines(0, 3))
    site.start()
    assert site.read() == lines(0, 3)
    append(site.log, lines(3, 2))
    assert site.read() == lines(3, 2)
    assert site.read() == b""
    assert site.positions() == {str(site.log): len(lines(0, 5))}


def test_a_large_file_is_read_in_large_blocks_of_whole_lines(site: Site) -> None:
    data = lines(0, 3000, width=900)
    append(site.log, data)
    blocks = site.start().blocks()
    assert b"".join(block.data for block in blocks) == data
    assert len(blocks) == len(data) // BLOCK_BYTES + 1
    assert all(block.data.endswith(b"\n") for block in blocks)
    assert [block.start_offset for block in blocks[1:]] == [block.end_offset for block in blocks[:-1]]


def test_a_partial_last_line_is_held_however_long_it_takes(site: Site) -> None:
    """A line is emitted with its newline and never on a timer (case 2)."""
    whole = lines(1)
    append(site.log, lines(0) + whole[:9])
    site.start()
    assert site.read() == lines(0)
    for _ in range(5):
        site.pass_time(ROTATED_IDLE_SECONDS + 1)
        assert site.read() == b""
    append(site.log, whole[9:])
    (block,) = site.blocks()
    assert (block.data, block.start_offset) == (whole, len(lines(0)))


def test_a_partial_line_across_a_restart_is_completed_once(site: Site) -> None:
    """(case 2)"""
    append(site.log, lines(0, 2)[:-5])
    site.start()
    assert site.read() == lines(0)
    site.restart()
    assert site.read() == b""
    append(site.log, lines(0, 2)[-5:])
    assert site.read() == lines(1)


def test_one_short_line_is_read_at_once(site: Site) -> None:
    """A tiny file needs no minimum length (case 16)."""
    append(site.log, b"{}\n")
    assert site.start().read() == b"{}\n"
    site.restart()
    assert site.read() == b""
    append(site.log, lines(0))
    assert site.read() == lines(0)


def test_files_are_read_in_turn(tmp_path: Path) -> None:
    """One busy log does not keep another from being read."""
    logs = tmp_path / "logs"
    site = Site(tmp_path, [str(logs / "busy.log"), str(logs / "calm.log")])
    append(logs / "busy.log", lines(0, 5000, width=900))
    append(logs / "calm.log", lines(9000))
    order = [block.data for block in site.start().blocks()]
    assert order[1] == lines(9000)
    site.stop()


def test_a_line_above_the_limit_is_one_block_in_bounded_memory(tmp_path: Path) -> None:
    """Its beginning is kept, its length told, and the next line is intact (case 21)."""
    site = Site(tmp_path, max_line_bytes=BLOCK_BYTES)
    append(site.log, lines(0) + b"x" * (32 * BLOCK_BYTES) + b"\n" + lines(1))
    site.start()
    tracemalloc.start()
    try:
        first, long, last = site.blocks()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * BLOCK_BYTES
    assert (first.data, first.overlong) == (lines(0), None)
    assert (long.data, long.overlong) == (b"", overlong(b"x" * 32 * BLOCK_BYTES))
    assert long.end_offset - long.start_offset == 32 * BLOCK_BYTES + 1
    assert (last.data, last.start_offset, last.overlong) == (lines(1), long.end_offset, None)
    site.settle([first, long, last])
    site.restart()
    assert site.read() == b""
    append(site.log, lines(2))
    assert site.read() == lines(2)
    site.stop()


def test_a_line_above_the_limit_that_is_not_finished_is_held(tmp_path: Path) -> None:
    """(cases 2, 21)"""
    site = Site(tmp_path, max_line_bytes=BLOCK_BYTES)
    append(site.log, b"x" * (2 * BLOCK_BYTES))
    assert site.start().blocks() == []
    append(site.log, b"x" * BLOCK_BYTES)
    assert site.blocks() == []
    append(site.log, b"\n" + lines(0))
    long, last = site.blocks()
    assert (long.end_offset, last.data) == (3 * BLOCK_BYTES + 1, lines(0))
    assert long.overlong == overlong(b"x" * 3 * BLOCK_BYTES)
    site.stop()


def test_a_line_of_several_blocks_below_the_limit_is_read_whole(site: Site) -> None:
    """(case 21)"""
    long = lines(0, width=5 * BLOCK_BYTES)
    append(site.log, long + lines(1))
    assert site.start().read() == long + lines(1)


# Rotation by renaming


def test_the_rest_of_a_renamed_file_is_read_first(site: Site) -> None:
    """Live: the old tail in full, then the new file from its beginning (case 6)."""
    append(site.log, lines(0, 2))
    site.start()
    assert site.read() == lines(0, 2)
    append(site.log, lines(2, 2))
    rotate(site.log)
    append(site.log, lines(4, 2))
    assert site.read() == lines(2, 4)


def test_a_rotation_while_stopped_is_followed(site: Site) -> None:
    """The old file goes on at its position, then the new one from its beginning (case 8)."""
    append(site.log, lines(0, 2))
    site.start()
    assert site.read() == lines(0, 2)
    site.stop()
    append(site.log, lines(2))
    rotate(site.log)
    append(site.log, lines(3))
    site.start()
    assert site.read() == lines(2, 2)
    site.restart()
    assert site.read() == b""


@pytest.mark.parametrize("stopped", [False, True], ids=["live", "stopped"])
def test_several_rotations_between_two_looks_lose_nothing(site: Site, stopped: bool) -> None:
    """Files never seen under the log's own name are found by the name that rotation gave them (cases 7, 9)."""
    append(site.log, lines(0, 2))
    site.start()
    assert site.read() == lines(0, 2)
    if stopped:
        site.stop()
    for number in range(2, 7):
        append(site.log, lines(number))
        os.utime(site.log, ns=(number * 10**9, number * 10**9))
        rotate(site.log)
    append(site.log, lines(7))
    if stopped:
        site.start()
    assert site.read() == lines(2, 6)
    site.restart()
    assert site.read() == b""


def test_an_old_inode_that_grows_after_the_rotation_is_read(site: Site) -> None:
    """Kong keeps writing to the renamed file until it reopens it, which is off by default (case 5)."""
    append(site.log, lines(0))
    site.start()
    assert site.read() == lines(0)
    rotate(site.log)
    append(site.log, lines(1))
    assert site.read() == lines(1)
    for number in range(2, 6):
        site.pass_time(ROTATED_IDLE_SECONDS - 1)
        append(Path(f"{site.log}.1"), lines(number))
        assert site.read() == lines(number)
    assert len(site.open_logs()) == 2


def test_an_old_inode_that_grows_without_a_new_file_is_read(site: Site) -> None:
    """(case 5)"""
    append(site.log, lines(0))
    site.start()
    assert site.read() == lines(0)
    rotate(site.log)
    append(Path(f"{site.log}.1"), lines(1))
    assert site.read() == lines(1)
    site.stop()
    append(Path(f"{site.log}.1"), lines(2))
    site.start()
    assert site.read() == lines(2)


def test_a_quiet_rotated_file_is_let_go_and_found_again_if_it_grows(site: Site) -> None:
    """No descriptor is held for ever, and no line lost for it (case 5)."""
    append(site.log, lines(0))
    site.start()
    site.read()
    rotate(site.log)
    append(site.log, lines(1))
    assert site.read() == lines(1)
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    assert site.read() == b""
    assert site.open_logs() == [str(site.log)]
    os.utime(site.logs, ns=(0, 0))
    site.read()
    append(Path(f"{site.log}.1"), lines(2))
    assert site.read() == b""  # the directory did not change
    site.pass_time(LISTING_SECONDS)
    assert site.read() == lines(2)
    assert len(site.open_logs()) == 2


def test_a_file_found_again_is_read_before_the_current_one(site: Site) -> None:
    """Of each log the oldest file first."""
    append(site.log, lines(0))
    site.start()
    site.read()
    rotate(site.log)
    append(site.log, lines(1))
    site.read()
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    site.read()
    append(Path(f"{site.log}.1"), lines(2))
    append(site.log, lines(3))
    site.pass_time(LISTING_SECONDS)
    assert site.read() == lines(2, 2)


def test_the_unterminated_last_line_of_a_rotated_file_is_delivered_when_it_is_quiet(site: Site) -> None:
    """A file that is rotated, read to its end and quiet is final (case 3)."""
    append(site.log, lines(0) + lines(1)[:-1])
    site.start()
    assert site.read() == lines(0)
    rotate(site.log)
    append(site.log, lines(2))
    assert site.read() == lines(2)
    site.pass_time(ROTATED_IDLE_SECONDS - 1)
    assert site.read() == b""
    site.pass_time(2)
    (rest,) = site.blocks()
    assert (rest.data, rest.start_offset, rest.overlong) == (lines(1)[:-1], len(lines(0)), None)
    site.settle([rest])
    site.restart()
    assert site.read() == b""


def test_a_rest_that_was_not_settled_is_delivered_again_after_a_crash(site: Site) -> None:
    """(cases 3, 30)"""
    append(site.log, lines(0) + b"torn")
    site.start()
    site.read()
    rotate(site.log)
    site.read()
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    assert site.read(settle=False) == b"torn"
    site.restart()
    assert site.read() == b""
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    assert site.read() == b"torn"


def test_an_unfinished_line_that_still_grows_keeps_a_rotated_file_open(site: Site) -> None:
    """Quiet means that nothing is written, not that no line is finished (cases 2, 5)."""
    append(site.log, lines(0))
    site.start()
    site.read()
    rotate(site.log)
    old = Path(f"{site.log}.1")
    for byte in lines(1)[:-1]:
        append(old, bytes([byte]))
        assert site.read() == b""
        site.pass_time(ROTATED_IDLE_SECONDS - 1)
        assert site.read() == b""
    append(old, b"\n")
    assert site.read() == lines(1)


def test_an_unterminated_last_line_above_the_limit_is_one_overlong_block(tmp_path: Path) -> None:
    """(cases 3, 21)"""
    site = Site(tmp_path, max_line_bytes=BLOCK_BYTES)
    append(site.log, lines(0) + b"x" * (3 * BLOCK_BYTES))
    site.start()
    assert site.read() == lines(0)
    rotate(site.log)
    assert site.read() == b""
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    (rest,) = site.blocks()
    assert rest.overlong == overlong(b"x" * 3 * BLOCK_BYTES)
    assert rest.end_offset == len(lines(0)) + 3 * BLOCK_BYTES
    site.pass_time(LISTING_SECONDS)
    assert site.blocks() == []
    site.stop()


def test_rotated_files_from_before_the_first_start_are_history(site: Site) -> None:
    """They are what `replay` is for; what is added to them later is read (case 5)."""
    append(Path(f"{site.log}.1"), lines(0, 2))
    append(Path(f"{site.log}.2"), lines(10, 2))
    append(site.log, lines(2))
    site.start()
    assert site.read() == lines(2)
    site.restart()
    assert site.read() == b""
    rotate(site.log)
    append(site.log, lines(3))
    assert site.read() == lines(3)
    append(Path(f"{site.log}.2"), lines(4))
    site.pass_time(LISTING_SECONDS)
    assert site.read() == lines(4)


@pytest.mark.parametrize("stopped", [False, True], ids=["live", "stopped"])
def test_a_log_that_appears_and_rotates_between_two_looks_is_no_history(site: Site, stopped: bool) -> None:
    """Only what was there when the input was first started is (cases 7, 8)."""
    site.start()
    assert site.read() == b""
    if stopped:
        site.stop()
    append(site.log, lines(0))
    rotate(site.log)
    if stopped:
        site.start()
    assert site.read() == lines(0)


@pytest.mark.parametrize("name", ["usage.log-20261121", "usage-20261121.log", "usage.1.log", "usage.log.2026-11-21"])
def test_every_naming_of_rotated_files_is_known(site: Site, name: str) -> None:
    """(cases 7, 8)"""
    append(site.log, lines(0))
    site.start()
    site.read()
    site.stop()
    append(site.log, lines(1))
    site.log.rename(site.logs / name)
    append(site.log, lines(2))
    site.start()
    assert site.read() == lines(1, 2)


def test_a_known_file_is_found_under_any_name(site: Site) -> None:
    """Device, inode and content tell, not the name (case 8)."""
    append(site.log, lines(0))
    site.start()
    site.read()
    site.stop()
    append(site.log, lines(1))
    site.log.rename(site.logs / "kept-aside")
    site.start()
    assert site.read() == lines(1)


def test_a_rotation_between_looking_and_opening_mixes_nothing_up(site: Site) -> None:
    """The name may belong to another file by the time it is opened (cases 6, 14)."""
    append(site.log, lines(0, 2))
    site.start()
    site.read()
    site.stop()
    append(site.log, lines(2))

    def rotate_now() -> None:
        rotate(site.log)
        append(site.log, lines(3))

    site.start()
    site.on_clock = rotate_now
    assert site.read() == b""
    assert site.read() == lines(2, 2)
    assert site.read() == b""
    assert len(site.open_logs()) == 2


def test_a_renamed_file_that_still_matches_the_glob_is_not_read_again(tmp_path: Path) -> None:
    """(cases 6, 19)"""
    site = Site(tmp_path, [str(tmp_path / "logs" / "usage.log*")])
    append(site.log, lines(0, 2))
    site.start()
    assert site.read() == lines(0, 2)
    rotate(site.log)
    append(site.log, lines(2))
    assert site.read() == lines(2)
    assert site.positions() == {f"{site.log}.1": len(lines(0, 2)), str(site.log): len(lines(2))}
    site.restart()
    assert site.read() == b""
    site.stop()


# Truncation and replaced content


def test_a_truncated_file_is_read_from_its_beginning(site: Site) -> None:
    """(case 13)"""
    append(site.log, lines(10, 5))
    site.start()
    assert site.read() == lines(10, 5)
    rewrite(site.log, b"")
    assert site.read() == b""
    append(site.log, lines(20))
    assert site.read() == lines(20)
    site.restart()
    assert site.read() == b""


@pytest.mark.parametrize("stopped", [False, True], ids=["live", "stopped"])
@pytest.mark.parametrize("count", [2, 5, 9], ids=["shorter", "same-size", "longer"])
def test_a_file_truncated_and_grown_again_is_read_from_its_beginning(site: Site, count: int, stopped: bool) -> None:
    """Whatever size it has when it is looked at next: its content tells (case 12)."""
    append(site.log, lines(10, 5))
    site.start()
    assert site.read() == lines(10, 5)
    if stopped:
        site.stop()
    rewrite(site.log, lines(20, count))
    if stopped:
        site.start()
    assert site.read() == lines(20, count)
    assert site.read() == b""
    append(site.log, lines(40))
    assert site.read() == lines(40)


@pytest.mark.parametrize("stopped", [False, True], ids=["live", "stopped"])
def test_lines_that_end_alike_do_not_hide_a_truncation(site: Site, stopped: bool) -> None:
    """Entries of one route may end with the same bytes at the same place: the head is compared, too (case 12)."""
    append(site.log, lines(10, 3, width=2000))
    site.start()
    assert site.read() == lines(10, 3, width=2000)
    if stopped:
        site.stop()
    rewrite(site.log, lines(20, 4, width=2000))
    if stopped:
        site.start()
    assert site.read() == lines(20, 4, width=2000)


def test_a_truncation_with_unread_bytes_is_told(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """What was seen and not read is named as lost from this file (case 13)."""
    append(site.log, lines(0) + b"begun")
    site.start()
    site.read()
    rewrite(site.log, b"")
    with caplog.at_level(logging.WARNING):
        site.read()
    assert caplog.messages == [
        f"{site.log}: truncated at byte {len(lines(0))}, 5 bytes before they were read; reading its new content"
    ]


@pytest.mark.parametrize("stopped", [False, True], ids=["live", "stopped"])
def test_copytruncate_when_everything_was_read_repeats_nothing(site: Site, stopped: bool) -> None:
    """The copy holds what was followed, so it is not read (case 10)."""
    append(site.log, lines(0, 5))
    site.start()
    assert site.read() == lines(0, 5)
    if stopped:
        site.stop()
    copytruncate(site.log, Path(f"{site.log}.1"), lines(5))
    if stopped:
        site.start()
    assert site.read() == lines(5)
    for _ in range(3):
        site.pass_time(LISTING_SECONDS)
        assert site.read() == b""
    site.restart()
    assert site.read() == b""
    assert site.checkpoint.books()[Count.LINES] == 6


def test_a_copy_made_before_the_truncation_is_not_read(site: Site) -> None:
    """Also when it is seen while it is being copied, and before and after the log is truncated (case 10)."""
    append(site.log, lines(0, 50))
    site.start()
    assert site.read() == lines(0, 50)
    copy = Path(f"{site.log}.1")
    for size in (0, 500, None):
        copy.write_bytes(lines(0, 50)[:size])
        site.pass_time(LISTING_SECONDS)
        assert site.read() == b""
    rewrite(site.log, lines(50, 3))
    assert site.read() == lines(50, 3)
    for _ in range(3):
        site.pass_time(LISTING_SECONDS)
        assert site.read() == b""
    site.restart()
    assert site.read() == b""


@pytest.mark.parametrize("stopped", [False, True], ids=["live", "stopped"])
@pytest.mark.parametrize("regrown", [b"", lines(30, 9)], ids=["empty", "regrown"])
def test_copytruncate_with_an_unread_tail_goes_on_in_the_copy(site: Site, regrown: bytes, stopped: bool) -> None:
    """The rest exists in the copy alone: it is read there, at the old position, and nothing before it (case 11)."""
    append(site.log, lines(10, 5))
    site.start()
    assert site.read() == lines(10, 5)
    if stopped:
        site.stop()
    append(site.log, lines(15, 3))
    copytruncate(site.log, Path(f"{site.log}.1"), regrown)
    if stopped:
        site.start()
    first, second = site.read(), site.read()
    assert sorted((first + second).splitlines()) == sorted((lines(15, 3) + regrown).splitlines())
    site.pass_time(LISTING_SECONDS)
    assert site.read() == b""
    site.restart()
    assert site.read() == b""


def test_what_was_in_flight_when_the_log_was_truncated_is_read_again_from_the_copy(site: Site) -> None:
    """A crash after copytruncate loses nothing that the copy still has (cases 11, 30)."""
    append(site.log, lines(0, 3))
    site.start()
    site.read()
    append(site.log, lines(3, 2))
    assert site.read(settle=False) == lines(3, 2)
    copytruncate(site.log, Path(f"{site.log}.1"), lines(5))
    assert site.read(settle=False) == lines(5)
    site.restart()
    assert site.read() == lines(3, 3)
    site.restart()
    assert site.read() == b""


def test_a_copy_beside_an_untouched_log_changes_nothing(site: Site) -> None:
    """Someone's copy does not take the place of the log, even with more to read in both (case 10)."""
    append(site.log, lines(0, 3))
    site.start()
    site.read()
    site.stop()
    append(site.log, lines(3))
    shutil.copyfile(site.log, f"{site.log}.1")
    site.start()
    assert site.read() == lines(3)
    append(site.log, lines(4))
    assert site.read() == lines(4)
    site.pass_time(LISTING_SECONDS)
    assert site.read() == b""
    assert site.checkpoint.books()[Count.LINES] == 5


@pytest.mark.parametrize("count", [1, 9], ids=["shorter", "longer"])
def test_an_inode_used_again_for_other_content_is_a_new_file(site: Site, count: int) -> None:
    """While stopped: other content under the known inode is read from its beginning (case 14)."""
    append(site.log, lines(10, 5))
    site.start()
    site.read()
    site.stop()
    rewrite(site.log, lines(20, count))
    rotate(site.log)
    append(site.log, lines(40))
    site.start()
    assert site.read() == lines(20, count) + lines(40)
    site.restart()
    assert site.read() == b""
    inodes = [file.inode for file in site.checkpoint.files() if file.inode is not None]
    assert len(set(inodes)) == len(inodes) == 2


@pytest.mark.parametrize("name", ["error.log", "usage.log.1.xz"])
def test_an_inode_used_again_by_an_unrelated_file_is_not_followed(site: Site, name: str) -> None:
    """logrotate deletes and compresses: the next file of any kind may get the inode (case 14)."""
    append(site.log, lines(0))
    site.start()
    site.read()
    site.stop()
    rewrite(site.log, b"nothing that Kong wrote\n" * 9)
    site.log.rename(site.logs / name)
    append(site.log, lines(1))
    site.start()
    assert site.read() == lines(1)
    site.pass_time(LISTING_SECONDS)
    assert site.read() == b""


def test_files_with_equal_first_lines_are_both_read(tmp_path: Path) -> None:
    """(case 15)"""
    site = Site(tmp_path, [str(tmp_path / "logs" / "*.log")])
    append(site.logs / "a.log", lines(0) + lines(1))
    append(site.logs / "b.log", lines(0) + lines(2))
    site.start()
    assert sorted(site.read().splitlines()) == sorted((lines(0) + lines(1) + lines(0) + lines(2)).splitlines())
    site.restart()
    assert site.read() == b""
    append(site.logs / "b.log", lines(3))
    assert site.read() == lines(3)
    site.stop()


def test_a_rotated_file_with_the_first_line_of_another_is_read(site: Site) -> None:
    """Equal beginnings do not make a copy: what was read of the other one must be in it (case 15)."""
    append(site.log, lines(0, 2))
    site.start()
    site.read()
    site.stop()
    rotate(site.log)
    append(site.log, lines(0) + lines(2, 2))
    rotate(site.log)
    site.start()
    assert site.read() == lines(0) + lines(2, 2)


# Appearing, disappearing, moving


def test_a_deleted_file_is_read_to_its_end(site: Site) -> None:
    """Deleted while open, with an unread tail; let go when it is quiet (case 17)."""
    append(site.log, lines(0))
    site.start()
    site.read()
    with site.log.open("ab") as kong:
        kong.write(lines(1))
        kong.flush()
        site.log.unlink()
        assert site.read() == lines(1)
        kong.write(lines(2))
    assert site.read() == lines(2)
    append(site.log, lines(3))
    assert site.read() == lines(3)
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    site.read()
    assert site.open_logs() == [str(site.log)]


def test_new_files_under_a_glob_are_found(tmp_path: Path) -> None:
    """A glob that matches nothing at the start, and files that appear one after the other (case 19)."""
    site = Site(tmp_path, [str(tmp_path / "logs" / "**" / "*.log")])
    assert site.start().read() == b""
    append(site.log, lines(0))
    assert site.read() == lines(0)
    (site.logs / "deeper").mkdir()
    append(site.logs / "deeper" / "other.log", lines(1))
    assert site.read() == lines(1)
    assert site.files.directories() == {str(site.logs), str(site.logs / "deeper")}
    site.stop()


def test_a_rotation_under_a_glob_while_stopped_is_followed(tmp_path: Path) -> None:
    """The record names the log, so its rotated file is found though nothing has the log's name (cases 8, 19)."""
    site = Site(tmp_path, [str(tmp_path / "logs" / "*.log")])
    append(site.log, lines(0))
    site.start()
    site.read()
    site.stop()
    append(site.log, lines(1))
    rotate(site.log)
    site.start()
    assert site.read() == lines(1)
    site.stop()


def test_a_log_that_appears_later_is_read_from_its_beginning(site: Site) -> None:
    """(case 19)"""
    assert site.start().read() == b""
    append(site.log, lines(0))
    assert site.read() == lines(0)


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    """By a path, a glob and a symbolic link."""
    logs = tmp_path / "logs"
    site = Site(tmp_path, [str(logs / "usage.log"), str(logs / "*.log"), str(logs / "link.log")])
    append(site.log, lines(0))
    (logs / "link.log").symlink_to("usage.log")
    assert site.start().read() == lines(0)
    assert len(site.files.followed()) == 1
    site.stop()


def test_read_from_end_steps_over_what_is_there_at_the_first_start(tmp_path: Path) -> None:
    """Only over that: later lines, later files and later starts are read from where they begin."""
    site = Site(tmp_path, [str(tmp_path / "logs" / "*.log")], read_from="end")
    append(site.log, lines(0, 3))
    site.start()
    assert site.read() == b""
    append(site.log, lines(3))
    assert site.read() == lines(3)
    append(site.logs / "later.log", lines(10, 2))
    assert site.read() == lines(10, 2)
    rotate(site.log)
    append(site.log, lines(4))
    assert site.read() == lines(4)
    site.stop()
    append(site.logs / "meanwhile.log", lines(20))
    site.start()
    assert site.read() == lines(20)
    site.stop()


@pytest.mark.parametrize("before", [b"", lines(0, 3), lines(0, width=2 * BLOCK_BYTES)], ids=["none", "short", "long"])
def test_read_from_end_does_not_tear_a_partial_line(tmp_path: Path, before: bytes) -> None:
    """A line that is being written at the first start is read whole (case 2)."""
    site = Site(tmp_path, read_from="end")
    append(site.log, before + lines(5, width=BLOCK_BYTES)[:-20])
    site.start()
    assert site.read() == b""
    append(site.log, lines(5, width=BLOCK_BYTES)[-20:])
    assert site.read() == lines(5, width=BLOCK_BYTES)
    site.stop()


def test_read_from_end_notices_a_truncation_before_the_first_line(tmp_path: Path) -> None:
    """(case 12)"""
    site = Site(tmp_path, read_from="end")
    append(site.log, lines(10, 3))
    site.start().read()
    site.restart()
    site.files.scan()
    rewrite(site.log, lines(20, 9))
    assert site.read() == lines(20, 9)
    site.stop()


def test_a_symbolic_link_is_followed_to_each_of_its_targets(site: Site) -> None:
    """The old target to its end, the new one from its beginning (case 18)."""
    append(site.logs / "0.target", lines(0))
    site.log.symlink_to("0.target")
    site.start()
    assert site.read() == lines(0)
    append(site.logs / "0.target", lines(1))
    site.log.unlink()
    append(site.logs / "1.target", lines(2))
    site.log.symlink_to("1.target")
    assert site.read() == lines(1, 2)
    site.stop()
    append(site.logs / "1.target", lines(3))
    site.log.unlink()
    append(site.logs / "2.target", lines(4))
    site.log.symlink_to("2.target")
    site.start()
    assert site.read() == lines(3, 2)


@pytest.mark.timeout(10)
def test_what_is_not_a_regular_file_is_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Directories, FIFOs and devices: told once, never opened, never waited for (case 72)."""
    logs = tmp_path / "logs"
    special = [str(logs / "directory"), str(logs / "fifo"), "/dev/zero"]
    site = Site(tmp_path, [*special, str(logs / "*.log")])
    (logs / "directory").mkdir()
    (logs / "directory.log").mkdir()
    os.mkfifo(logs / "fifo")
    append(site.log, lines(0))
    site.start()
    assert site.read() == lines(0)
    assert site.read() == b""
    assert caplog.messages == [f"{path}: not a regular file, so it is not followed" for path in special]
    assert site.open_logs() == [str(site.log)]
    site.stop()


@pytest.mark.timeout(10)
def test_a_log_that_turns_into_a_fifo_is_not_waited_for(site: Site) -> None:
    """Also when that happens between looking and opening (case 72)."""
    append(site.log, lines(0))

    def swap() -> None:
        site.log.unlink()
        os.mkfifo(site.log)

    site.start()
    site.on_clock = swap
    assert site.read() == b""
    site.log.unlink()
    append(site.log, lines(1))
    assert site.read() == lines(1)


def test_a_name_that_is_not_utf8_does_not_stop_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    site = Site(tmp_path, [str(tmp_path / "logs" / "*.log")])
    odd = os.fsencode(site.logs) + b"/odd-\xff.log"
    try:
        os.close(os.open(odd, os.O_CREAT | os.O_WRONLY))
    except OSError:
        pytest.skip("this file system takes no such name")
    append(site.log, lines(0))
    assert site.start().read() == lines(0)
    assert caplog.messages[0].endswith("the name is not UTF-8, so it is not followed")
    site.stop()


def test_positions_survive_an_absent_directory(site: Site) -> None:
    """A volume that is mounted late: nothing is forgotten, nothing is read again (case 19)."""
    append(site.log, lines(0, 3))
    site.start()
    site.read()
    site.stop()
    site.logs.rename(site.root / "elsewhere")
    site.start()
    assert site.read() == b""
    assert site.files.directories() == set()
    (site.root / "elsewhere").rename(site.logs)
    append(site.log, lines(3))
    assert site.read() == lines(3)


def test_a_file_in_the_working_directory_needs_no_directory_in_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path, ["usage.log"])
    monkeypatch.chdir(site.logs)
    append(site.log, lines(0))
    site.start()
    assert site.read() == lines(0)
    assert site.files.directories() == {"."}
    rotate(Path("usage.log"))
    append(site.log, lines(1))
    site.restart()
    assert site.read() == lines(1)
    site.stop()


@pytest.mark.parametrize("rotated", [False, True], ids=["current", "rotated"])
def test_content_under_another_inode_goes_on_at_its_position(site: Site, rotated: bool) -> None:
    """A restored volume: the files are copies, the originals gone (case 26)."""
    append(site.log, lines(0, 3))
    site.start()
    site.read()
    site.stop()
    append(site.log, lines(3))
    if rotated:
        rotate(site.log)
        append(site.log, lines(4))
    shutil.copytree(site.logs, site.root / "restored")
    shutil.rmtree(site.logs)
    (site.root / "restored").rename(site.logs)
    site.start()
    assert site.read() == lines(3, 2 if rotated else 1)
    site.restart()
    assert site.read() == b""
    assert site.checkpoint.books()[Count.LINES] == 4 + rotated


def test_a_remount_under_another_device_goes_on_at_the_position(site: Site) -> None:
    """The device number changes, inodes and content don't (case 26)."""
    append(site.log, lines(0, 3))
    site.start()
    site.read()
    append(site.log, lines(3, 2))
    rotate(site.log)
    append(site.log, lines(5, 2))
    site.files.scan()
    block = site.files.next_block()
    assert block is not None
    site.settle([block])
    site.stop()
    with contextlib.closing(sqlite3.connect(site.state / DATABASE_NAME)) as db, db:
        db.execute("UPDATE files SET device = device + 1")
    site.start()
    assert site.read() == lines(5, 2)
    site.restart()
    assert site.read() == b""


def test_the_copy_read_furthest_is_the_one_that_counts(site: Site) -> None:
    """Two records of one beginning: the file goes on where most of it is settled (case 26)."""
    append(site.log, lines(0, 2))
    site.start()
    site.read()
    rewrite(site.log, lines(0))
    assert site.read() == b""
    site.pass_time(STALE_SIZE_SECONDS)
    assert site.read() == lines(0)
    rewrite(site.log, lines(0, 4))
    assert site.read() == lines(1, 3)
    site.stop()
    shutil.copyfile(site.log, f"{site.log}.copy")
    site.log.unlink()
    Path(f"{site.log}.copy").rename(site.log)
    append(site.log, lines(4))
    site.start()
    assert site.read() == lines(4)


# Trouble


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Permissions count: they don't for root, which therefore steps down."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def reachable() -> Iterator[Site]:
    """A site whose logs another user could reach."""
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        site = Site(Path(root))
        site.logs.chmod(0o755)
        yield site
        site.stop()


def test_a_file_that_may_not_be_opened_is_tried_again(reachable: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Told once, nothing recorded, and read from its beginning when it is allowed (case 20)."""
    append(reachable.log, lines(0))
    reachable.log.chmod(0o000)
    reachable.start()
    with unprivileged():
        assert reachable.read() == b""
        assert reachable.read() == b""
    assert caplog.messages == [f"{reachable.log}: can't be opened: Permission denied; trying again"]
    assert reachable.checkpoint.files() == []
    reachable.log.chmod(0o644)
    with unprivileged():
        assert reachable.read() == lines(0)


def test_a_rotated_file_that_may_not_be_opened_is_tried_again(reachable: Site) -> None:
    """It is still read when it is allowed (cases 8, 20)."""
    append(reachable.log, lines(0))
    reachable.start()
    reachable.read()
    reachable.stop()
    append(reachable.log, lines(1))
    reachable.log.chmod(0o000)
    rotate(reachable.log)
    append(reachable.log, lines(2))
    reachable.start()
    with unprivileged():
        assert reachable.read() == lines(2)
    Path(f"{reachable.log}.1").chmod(0o644)
    reachable.pass_time(LISTING_SECONDS)
    assert reachable.read() == lines(1)


def test_a_directory_that_may_not_be_searched_is_tried_again(reachable: Site, caplog: pytest.LogCaptureFixture) -> None:
    """The file that was open is read on all the while (case 20)."""
    append(reachable.log, lines(0))
    reachable.start()
    assert reachable.read() == lines(0)
    append(reachable.log, lines(1))
    reachable.logs.chmod(0o000)
    with unprivileged():
        assert reachable.read() == lines(1)
    reachable.logs.chmod(0o755)
    append(reachable.log, lines(2))
    assert reachable.read() == lines(2)
    assert f"{reachable.log}: can't be looked at: Permission denied; trying again" in caplog.messages
    assert len(reachable.files.followed()) == 1


def test_a_directory_that_may_not_be_listed_does_not_stop_its_log(
    reachable: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """(case 20)"""
    append(reachable.log, lines(0))
    reachable.logs.chmod(0o311)
    reachable.start()
    with unprivileged():
        assert reachable.read() == lines(0)
    reachable.logs.chmod(0o755)
    assert caplog.messages[0] == f"{reachable.logs}: can't be listed: Permission denied; trying again"


def test_a_copy_does_not_take_the_place_of_a_log_that_may_not_be_opened(reachable: Site) -> None:
    """(cases 10, 20)"""
    append(reachable.log, lines(0))
    reachable.start()
    reachable.read()
    reachable.stop()
    append(reachable.log, lines(1))
    shutil.copyfile(reachable.log, f"{reachable.log}.1")
    reachable.log.chmod(0o000)
    reachable.start()
    with unprivileged():
        assert reachable.read() == b""
    reachable.log.chmod(0o644)
    assert reachable.read() == lines(1)


def test_a_path_that_can_not_be_resolved_is_tried_again(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A link to itself, then a file instead (case 20)."""
    site.log.symlink_to(site.log)
    assert site.start().read() == b""
    site.log.unlink()
    append(site.log, lines(0))
    assert site.read() == lines(0)
    assert caplog.messages[0].endswith("can't be looked at: Too many levels of symbolic links; trying again")


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file whose reading fails")
def test_a_file_that_can_not_be_read_does_not_stop_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    site = Site(tmp_path, ["/proc/self/mem", str(tmp_path / "logs" / "usage.log")])
    append(site.log, lines(0))
    assert site.start().read() == lines(0)
    append(site.log, lines(1))
    assert site.read() == lines(1)
    assert caplog.messages == ["/proc/self/mem: can't be read: Input/output error; trying again"]
    site.stop()


def test_an_open_file_that_fails_is_tried_again(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A disk or mount that comes back: nothing is lost, and the file is not let go meanwhile (case 26)."""
    append(site.log, lines(0) + b"begun")
    site.start()
    site.read()
    rotate(site.log)
    assert site.read() == b""
    (file,) = site.files.followed()
    works = os.dup(file.content.fd)
    fails = os.open(f"{site.log}.1", os.O_WRONLY)
    os.dup2(fails, file.content.fd)
    os.close(fails)
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    assert site.read() == b""
    assert site.files.followed() == [file]
    append(Path(f"{site.log}.1"), b"finished\n")
    assert site.read() == b""
    os.dup2(works, file.content.fd)
    os.close(works)
    assert site.read() == b"begunfinished\n"
    assert [m for m in caplog.messages if "Bad file descriptor; trying again" in m]


def test_a_state_that_can_not_be_written_loses_no_line(site: Site) -> None:
    """What is read is recorded first: as long as that fails nothing is stepped over (case 33)."""
    append(site.log, lines(0, 2)[:-3])
    site.start()
    assert site.read() == lines(0)
    rewrite(site.log, lines(10, 2))
    db = sqlite3.connect(site.state / DATABASE_NAME, isolation_level=None)
    db.execute("CREATE TRIGGER full BEFORE INSERT ON files BEGIN SELECT RAISE(ABORT, 'disk full'); END")
    append(site.logs / "usage.log.5", lines(20))
    for _ in range(3):
        with pytest.raises(sqlite3.IntegrityError, match="disk full"):
            site.files.scan()
        with pytest.raises(sqlite3.IntegrityError, match="disk full"):
            site.files.next_block()
    assert site.open_logs() == [str(site.log)]
    db.execute("DROP TRIGGER full")
    db.close()
    assert site.read() == lines(20) + lines(10, 2)
