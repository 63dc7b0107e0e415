"""What goes wrong beneath a log: writers, disks, mounts and people. Numbers are those of the cases."""

import contextlib
import errno
import os
import shutil
import sqlite3
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from metershipper.books import Count
from metershipper.checkpoint import DATABASE_NAME
from metershipper.content import BLOCK_BYTES, Content
from metershipper.files import REOPENED_WITHIN_SECONDS, ROTATED_IDLE_SECONDS, STALE_SIZE_SECONDS
from metershipper.listing import LISTING_SECONDS
from metershipper.losses import PATIENCE_SECONDS
from tests.test_files import Site, append, copytruncate, lines, overlong, rewrite, rotate

lives = pytest.mark.parametrize("stopped", [False, True], ids=["live", "stopped"])


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.stop()


def old(site: Site, number: int = 1) -> Path:
    return Path(f"{site.log}.{number}")


def started(site: Site, count: int = 3) -> None:
    append(site.log, lines(0, count))
    site.start()
    assert site.read() == lines(0, count)


def look_for_a_while(site: Site) -> bytes:
    got = site.read()
    for _ in range(3):
        site.pass_time(LISTING_SECONDS)
        got += site.read()
    return got


def as_set(data: bytes) -> list[bytes]:
    return sorted(data.splitlines())


# Kong writes on to the rotated file


def still_writes(caplog: pytest.LogCaptureFixture) -> int:
    return sum("Kong still writes to the file that was rotated away" in message for message in caplog.messages)


def test_a_kong_that_does_not_reopen_its_log_is_told_once(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """`reopen` is false by default, and nobody notices but for the disk (case 5)."""
    started(site)
    rotate(site.log)
    append(site.log, b"")
    assert site.read() == b""
    for number in range(3, 7):
        site.pass_time(REOPENED_WITHIN_SECONDS)
        assert site.read() == b""
        append(old(site), lines(number))
        assert site.read() == lines(number)
    assert still_writes(caplog) == 1
    rotate(site.log)
    append(old(site, 2), lines(7))
    assert site.read() == lines(7)
    assert still_writes(caplog) == 1


def test_what_a_rotated_file_still_holds_is_no_reason_for_a_warning(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """We may be behind, and a Kong that is told to reopen takes a moment (case 5)."""
    data = lines(0, 3000, width=900)
    append(site.log, data)
    site.start()
    site.files.scan()
    block = site.files.next_block()
    assert block is not None and len(block.data) < len(data)
    site.settle([block])
    rotate(site.log)
    append(site.log, lines(3))
    site.files.scan()
    site.pass_time(REOPENED_WITHIN_SECONDS * 3)
    assert site.read() == data[len(block.data) :] + lines(3)
    append(site.log, lines(4))
    site.read()
    rotate(site.log)
    append(old(site), lines(5))
    site.pass_time(REOPENED_WITHIN_SECONDS - 1)
    assert site.read() == lines(5)
    site.restart()
    assert site.read() == b""
    assert still_writes(caplog) == 0


def test_a_rotated_file_written_to_after_it_was_let_go_is_read(site: Site) -> None:
    """And the next rotations do not hide it (case 5)."""
    started(site)
    rotate(site.log)
    append(site.log, lines(10))
    assert site.read() == lines(10)
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    assert site.read() == b""
    rotate(site.log)
    append(site.log, lines(11))
    append(old(site, 2), lines(3))
    assert as_set(look_for_a_while(site)) == as_set(lines(3) + lines(11))
    site.restart()
    assert site.read() == b""


# Truncation, real and false


@pytest.fixture
def stale(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Makes every plain file look as if it were so short, as an attribute cache may; None: as it is."""
    state, size = Content.state, [-1]

    def stale_state(content: Content) -> tuple[int, int]:
        real = state(content)
        return real if size[0] < 0 else (min(size[0], real[0]), real[1] - 1)

    monkeypatch.setattr(Content, "state", stale_state)
    return lambda to: size.__setitem__(0, -1 if to is None else to)


def test_a_stale_size_is_waited_for_and_nothing_read_again(
    site: Site, stale: Callable[[int | None], None], caplog: pytest.LogCaptureFixture
) -> None:
    """NFS attribute caches: the beginning is as before, so the rest will be there again (cases 13, 26)."""
    started(site, 5)
    append(site.log, lines(5))
    for expected in (lines(5), b""):
        stale(len(lines(0, 2)))
        for _ in range(4):
            assert site.read() == b""
            site.pass_time(STALE_SIZE_SECONDS / 5)
        stale(None)
        assert site.read() == expected
    assert site.checkpoint.books()[Count.LINES] == 6
    assert len(site.checkpoint.files()) == 1
    site.restart()
    assert site.read() == b""
    assert len([message for message in caplog.messages if message.endswith("waiting")]) == 2


def test_a_size_that_stays_small_is_a_truncation(site: Site) -> None:
    """Someone cut the file behind its first lines: what comes is read (case 13)."""
    started(site, 5)
    with site.log.open("r+b") as file:
        file.truncate(len(lines(0, 2)))
    os.utime(site.log, ns=(10**18, 10**18))
    assert site.read() == b""
    site.pass_time(STALE_SIZE_SECONDS)
    got = site.read()
    append(site.log, lines(20, 2))
    assert site.read() == lines(20, 2)
    assert got == lines(0, 2)  # the same requests under the same ids


def test_a_file_that_was_cut_and_grew_in_the_meantime_is_read_from_its_beginning(site: Site) -> None:
    """While the size was taken for stale (cases 12, 13)."""
    started(site, 5)
    with site.log.open("r+b") as file:
        file.truncate(len(lines(0)))
    os.utime(site.log, ns=(10**18, 10**18))
    assert site.read() == b""
    append(site.log, lines(20, 9))
    assert site.read() == lines(0) + lines(20, 9)


@lives
def test_a_log_rewritten_with_the_same_content_is_read_on(site: Site, stopped: bool) -> None:
    """sed -i, rsync, an editor: another inode, nothing is read twice (cases 13, 14)."""
    started(site)
    if stopped:
        site.stop()
    shutil.copyfile(site.log, site.logs / "new")
    (site.logs / "new").rename(site.log)
    append(site.log, lines(3))
    if stopped:
        site.start()
    assert look_for_a_while(site) == lines(3)
    append(site.log, lines(4))
    assert look_for_a_while(site) == lines(4)
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    assert site.read() == b""
    assert site.open_logs() == [str(site.log)]
    site.restart()
    assert look_for_a_while(site) == b""
    assert site.checkpoint.gaps() == []


@lives
def test_files_that_share_their_first_lines_are_all_read(site: Site, stopped: bool) -> None:
    """A header or a health check at the top of each (case 15)."""
    top = b'{"health":"ok"}\n' * 3
    append(site.log, top + lines(0))
    site.start()
    assert site.read() == top + lines(0)
    for number in range(1, 4):
        if stopped:
            site.stop()
        rotate(site.log)
        append(site.log, top + lines(number))
        if stopped:
            site.start()
        assert look_for_a_while(site) == top + lines(number)
        site.pass_time(ROTATED_IDLE_SECONDS + 1)
        assert site.read() == b""
    assert site.checkpoint.gaps() == []


def test_an_inode_of_an_empty_log_used_again_by_a_stranger_is_not_followed(site: Site) -> None:
    """Of an empty file there is no content to know it by: the name must do (case 14)."""
    append(site.log, b"")
    site.start()
    assert site.read() == b""
    site.stop()
    site.log.rename(site.logs / "error.log")
    append(site.logs / "error.log", b"nothing that Kong wrote to its log\n")
    append(site.log, lines(0))
    site.start()
    assert look_for_a_while(site) == lines(0)


# Links and directories


@lives
def test_what_is_rotated_beside_the_target_of_a_link_is_read(site: Site, stopped: bool) -> None:
    """A container runtime: the link leads into a directory where the files rotate (case 18)."""
    pods = site.root / "logs" / "pods"
    pods.mkdir()
    target = pods / "0.log"
    append(target, lines(0, 2))
    site.log.symlink_to(target)
    site.start()
    assert site.read() == lines(0, 2)
    if stopped:
        site.stop()
    append(target, lines(2))
    target.rename(pods / "0.log.20261121-101010")
    append(target, lines(3))
    os.utime(target, ns=(10**18, 10**18))
    target.rename(pods / "0.log.20261121-111111")
    os.utime(pods / "0.log.20261121-101010", ns=(10**17, 10**17))
    append(target, lines(4))
    if stopped:
        site.start()
    assert look_for_a_while(site) == lines(2, 3)
    site.restart()
    assert look_for_a_while(site) == b""


def test_a_link_that_is_swapped_while_the_old_target_grows_loses_nothing(site: Site) -> None:
    """The writer finishes its request after the swap (case 18)."""
    append(site.logs / "0.target", lines(0))
    site.log.symlink_to("0.target")
    site.start()
    assert site.read() == lines(0)
    append(site.logs / "1.target", lines(10))
    (site.logs / "new").symlink_to("1.target")
    (site.logs / "new").rename(site.log)
    assert site.read() == lines(10)
    append(site.logs / "0.target", lines(1))
    assert site.read() == lines(1)
    site.stop()
    append(site.logs / "0.target", lines(2))
    site.start()
    assert look_for_a_while(site) == lines(2)


@lives
def test_rotation_into_a_directory_beneath_is_followed(site: Site, stopped: bool) -> None:
    """logrotate's olddir: the known file, and one that was never seen beside it (case 8)."""
    olddir = site.logs / "old"
    olddir.mkdir()
    started(site)
    if stopped:
        site.stop()
    append(site.log, lines(3))
    os.utime(site.log, ns=(10**17, 10**17))
    site.log.rename(olddir / "usage.log.2")
    append(olddir / "usage.log.1", lines(4))
    os.utime(olddir / "usage.log.1", ns=(10**18, 10**18))
    append(site.log, lines(5))
    if stopped:
        site.start()
    assert look_for_a_while(site) == lines(3, 3)
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    assert site.read() == b""
    site.restart()
    assert look_for_a_while(site) == b""
    assert site.checkpoint.gaps() == []


@pytest.mark.parametrize("first", [b"", b'{"number":'], ids=["empty", "partial"])
@lives
def test_a_log_that_was_empty_when_it_was_rotated_beneath_is_read(site: Site, first: bytes, stopped: bool) -> None:
    """Its device and inode are all that it can be known by, but they are enough (case 8)."""
    (site.logs / "old").mkdir()
    append(site.log, first)
    site.start()
    assert site.read() == b""
    if stopped:
        site.stop()
    append(site.log, lines(0, 2)[len(first) :])
    site.log.rename(site.logs / "old" / "usage.log.1")
    append(site.log, lines(2))
    if stopped:
        site.start()
    assert look_for_a_while(site) == lines(0, 3)
    assert site.checkpoint.gaps() == []


def test_a_directory_beneath_that_holds_nothing_known_is_told_and_left_alone(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody's copies: read on the word of a name alone, they might be billed twice (case 8)."""
    started(site)
    stranger = site.logs / "stranger"
    stranger.mkdir()
    append(stranger / "usage.log.1", lines(100))
    assert look_for_a_while(site) == b""
    told = f"{stranger / 'usage.log.1'}: may be a part of {site.log}; it is not read"
    assert caplog.messages.count(told) == 1


def test_a_directory_beneath_with_such_a_log_is_another_gateways(site: Site) -> None:
    """(case 8)"""
    started(site)
    other = site.logs / "gateway-2"
    other.mkdir()
    append(other / "usage.log", lines(100))
    append(other / "usage.log.1", lines(200))
    shutil.copyfile(site.log, other / "usage.log.2")
    assert look_for_a_while(site) == b""


@pytest.mark.parametrize("way", ["moved", "copied"])
@pytest.mark.parametrize("behind", [False, True], ids=["caught up", "behind"])
def test_a_log_whose_directory_moved_is_read_on_with_all_its_parts(tmp_path: Path, way: str, behind: bool) -> None:
    """The configuration names the new place; rotated there unseen is no history (cases 8, 26)."""
    site = Site(tmp_path)
    started(site)
    site.stop()
    if behind:
        append(site.log, lines(3))
    rotate(site.log)
    append(site.log, lines(10))
    for number, path in enumerate((old(site), site.log), start=1):
        os.utime(path, ns=(number * 10**17, number * 10**17))
    rotate(site.log)
    append(site.log, lines(11))
    place = tmp_path / "logs" / "new-place"
    place.mkdir()
    for name in ("usage.log", "usage.log.1", "usage.log.2"):
        if way == "moved":
            (site.logs / name).rename(place / name)
        else:
            shutil.copy2(site.logs / name, place / name)
            (site.logs / name).unlink()
    site.paths = [str(place / "usage.log")]
    site.start()
    assert look_for_a_while(site) == (lines(3) if behind else b"") + lines(10, 2)
    site.restart()
    assert look_for_a_while(site) == b""
    site.stop()


def test_a_log_that_only_moved_is_known_again_and_so_are_its_parts(tmp_path: Path) -> None:
    """The log itself still has the beginning it had (case 26)."""
    site = Site(tmp_path)
    started(site)
    site.stop()
    append(site.log, lines(3))
    append(old(site), lines(10))
    place = tmp_path / "logs" / "new-place"
    place.mkdir()
    for path in (site.log, old(site)):
        path.rename(place / path.name)
    site.paths = [str(place / "*.log")]
    site.start()
    assert as_set(look_for_a_while(site)) == as_set(lines(3) + lines(10))
    site.stop()


@lives
def test_under_a_glob_a_copy_is_not_read_in_full(tmp_path: Path, stopped: bool) -> None:
    """`usage.log*` names the copy that copytruncate makes, too: only its unread tail is read (cases 10, 11, 19)."""
    site = Site(tmp_path, [str(tmp_path / "logs" / "usage.log*")])
    started(site, 5)
    for number in range(3):
        if stopped:
            site.stop()
        append(site.log, lines(100 + number))
        if number:
            old(site).rename(old(site, number + 1))
        copytruncate(site.log, old(site), lines(200 + number, 2))
        if stopped:
            site.start()
        assert as_set(look_for_a_while(site)) == as_set(lines(100 + number) + lines(200 + number, 2))
    site.restart()
    assert look_for_a_while(site) == b""
    assert site.checkpoint.books()[Count.LINES] == 14
    site.stop()


# Mounts


@contextlib.contextmanager
def failing(code: int, *names: str) -> Iterator[list[int]]:
    """Calls of `os` that fail for the descriptors in the list."""
    fds: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            call = getattr(os, name)

            def fail(fd: int, *args: int, _call: Callable[..., object] = call) -> object:
                if fd in fds:
                    raise OSError(code, os.strerror(code))
                return _call(fd, *args)

            patch.setattr(os, name, fail)
        close = os.close

        def close_for_good(fd: int) -> None:
            """The number may stand for another file next."""
            if fd in fds:
                fds.remove(fd)
            close(fd)

        patch.setattr(os, "close", close_for_good)
        yield fds


@pytest.mark.parametrize("call", ["pread", "fstat"])
def test_a_stale_handle_is_opened_again_by_its_name(site: Site, call: str, caplog: pytest.LogCaptureFixture) -> None:
    """The server restarted: what was read is not read again (case 26)."""
    started(site)
    (file,) = site.files.followed()
    append(site.log, lines(3))
    with failing(errno.ESTALE, call) as fds:
        fds.append(file.content.fd)
        assert site.read() + site.read() == lines(3)
    assert f"{site.log}: can't be read: Stale file handle; trying again" in caplog.messages
    site.restart()
    assert site.read() == b""
    assert len(site.checkpoint.files()) == 1


@pytest.mark.parametrize("call", ["pread", "fstat"])
def test_a_stale_handle_of_a_rotated_file_is_found_by_its_content(site: Site, call: str) -> None:
    """(cases 6, 26)"""
    started(site)
    append(site.log, lines(3))
    rotate(site.log)
    append(site.log, lines(4))
    (file,) = site.files.followed()
    with failing(errno.ESTALE, call) as fds:
        fds.append(file.content.fd)
        assert as_set(look_for_a_while(site)) == as_set(lines(3, 2))


def test_a_stale_handle_of_a_log_without_a_name_does_not_stop_the_others(tmp_path: Path) -> None:
    """Deleted on the server, so that nothing tells about it any more (cases 17, 26)."""
    site = Site(tmp_path, [str(tmp_path / "logs" / "*.log")])
    append(site.logs / "other.log", lines(10))
    started_lines = lines(0, 3)
    append(site.log, started_lines)
    site.start()
    assert as_set(site.read()) == as_set(lines(10) + started_lines)
    gone = next(file for file in site.files.followed() if file.path == str(site.log))
    with failing(errno.ESTALE, "pread", "fstat") as fds:
        fds.append(gone.content.fd)
        site.log.unlink()
        append(site.logs / "other.log", lines(11))
        assert site.read() == lines(11)
        assert site.read() == b""
    site.stop()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOMEM])
def test_a_disk_error_is_waited_out_with_the_file_open(site: Site, code: int) -> None:
    """(case 26)"""
    started(site)
    (file,) = site.files.followed()
    append(site.log, lines(3))
    with failing(code, "pread") as fds:
        fds.append(file.content.fd)
        assert site.read() == site.read() == b""
    assert site.read() == lines(3)
    assert site.files.followed() == [file]


@pytest.mark.parametrize("rotated", [False, True], ids=["current", "rotated"])
def test_a_remount_reads_nothing_twice_and_reports_no_loss(site: Site, rotated: bool) -> None:
    """The device number is another one after the start (case 26)."""
    started(site)
    if rotated:
        rotate(site.log)
        append(site.log, lines(3))
        assert site.read() == lines(3)
        site.pass_time(ROTATED_IDLE_SECONDS + 1)
        site.read()
    site.stop()
    with contextlib.closing(sqlite3.connect(site.state / DATABASE_NAME)) as db, db:
        db.execute("UPDATE files SET device = device + 1")
    append(site.log, lines(4))
    site.start()
    assert look_for_a_while(site) == lines(4)
    site.pass_time(PATIENCE_SECONDS)
    assert look_for_a_while(site) == b""
    assert site.checkpoint.gaps() == []
    assert len(site.checkpoint.files()) == 1 + rotated


def test_a_restored_volume_that_gives_a_file_the_inode_of_another_reads_nothing_twice(site: Site) -> None:
    """Inodes are used again in any order; content tells (cases 14, 26)."""
    started(site)
    rotate(site.log)
    append(site.log, lines(3, 2))
    assert site.read() == lines(3, 2)
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    site.read()
    site.stop()
    current, rotated = site.log.read_bytes(), old(site).read_bytes()
    site.log.write_bytes(rotated)
    old(site).write_bytes(current + lines(5))
    site.log.rename(site.root / "swap")
    old(site).rename(site.log)
    (site.root / "swap").rename(old(site))
    site.start()
    assert look_for_a_while(site) == lines(5)
    assert site.checkpoint.gaps() == []


# NULs


@pytest.mark.parametrize("at", ["head", "middle"])
@pytest.mark.parametrize("count", [1, 1000, 3 * BLOCK_BYTES + 7])
def test_nuls_between_lines_change_nothing_about_the_lines(site: Site, at: str, count: int) -> None:
    """A crash of the writer's machine leaves them: few are handed on with the line, many are stepped over (case 23)."""
    before = lines(0, 2) if at == "middle" else b""
    append(site.log, before + bytes(count) + lines(2, 2))
    blocks = site.start().blocks()
    data = b"".join(block.data for block in blocks)
    assert sum(block.nul_bytes for block in blocks) + data.count(0) == count
    assert data.replace(b"\0", b"") == before + lines(2, 2)
    assert not data.count(0) or data == before + bytes(count) + lines(2, 2)
    assert [block.start_offset for block in blocks[1:]] == [block.end_offset for block in blocks[:-1]]
    site.settle(blocks)
    site.restart()
    assert site.read() == b""
    append(site.log, lines(4))
    assert site.read() == lines(4)


def test_nuls_at_the_end_are_waited_for(site: Site) -> None:
    """They may be data that is not there yet (case 23)."""
    append(site.log, lines(0) + bytes(1000))
    site.start()
    assert site.read() == lines(0)
    assert site.read() == b""
    with site.log.open("r+b") as file:
        file.seek(len(lines(0)))
        file.write(lines(1))
        file.truncate()
    os.utime(site.log, ns=(10**18, 10**18))
    assert site.read() == lines(1)


def test_nuls_at_the_end_of_a_rotated_file_are_no_line(site: Site) -> None:
    """Preallocated and never written (cases 3, 23)."""
    append(site.log, lines(0) + bytes(500))
    site.start()
    assert site.read() == lines(0)
    rotate(site.log)
    append(site.log, lines(1))
    assert site.read() == lines(1)
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    (block,) = site.blocks()
    assert (block.data, block.nul_bytes) == (b"", 500)
    site.settle([block])
    site.restart()
    assert look_for_a_while(site) == b""
    assert site.checkpoint.gaps() == []


@pytest.mark.parametrize("torn", [b"", b'{"torn":'], ids=["clean", "torn"])
def test_a_large_hole_is_skipped_in_bounded_memory(site: Site, torn: bytes) -> None:
    """A sparse file, where a line begins and in the middle of one (case 23)."""
    hole = 48 * BLOCK_BYTES
    append(site.log, lines(0) + torn)
    os.truncate(site.log, len(lines(0) + torn) + hole)
    append(site.log, lines(1))
    site.start()
    tracemalloc.start()
    try:
        blocks = site.blocks()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(block.nul_bytes for block in blocks) == hole
    assert [block.data for block in blocks if block.data] == [lines(0), torn, lines(1)][:: 2 if not torn else 1]
    assert peak < (4 if not torn else 40) * BLOCK_BYTES


def test_nuls_end_an_overlong_line(tmp_path: Path) -> None:
    """What stands before them will never be completed, and what comes after is a line of its own (cases 21, 23)."""
    site = Site(tmp_path, max_line_bytes=BLOCK_BYTES)
    torn = b"x" * (3 * BLOCK_BYTES - 4096)
    append(site.log, torn + bytes(BLOCK_BYTES) + lines(0))
    blocks = site.start().blocks()
    assert blocks[0].overlong is not None
    assert b"".join(block.data for block in blocks[1:]) == lines(0)
    assert blocks[0].overlong.length + sum(block.nul_bytes for block in blocks) == len(torn) + BLOCK_BYTES
    assert blocks[0].overlong == overlong(torn)
    site.stop()


# Odd lines


def test_a_line_above_the_limit_that_comes_in_pieces_is_described_as_a_whole(tmp_path: Path) -> None:
    """Across looks, blocks and a rotation; its length and hash are those of the whole (case 21)."""
    site = Site(tmp_path, max_line_bytes=BLOCK_BYTES)
    pieces = [bytes([65 + n]) * (BLOCK_BYTES // 2 + n) for n in range(7)]
    append(site.log, lines(0))
    site.start()
    site.read()
    for piece in pieces:
        append(site.log, piece)
        assert site.blocks() == []
    rotate(site.log)
    append(site.log, lines(2))
    append(old(site), b"\n" + lines(1))
    long, after, new = site.blocks()
    whole = b"".join(pieces)
    assert long.overlong == overlong(whole)
    assert (after.data, new.data) == (lines(1), lines(2))
    site.stop()


def test_a_line_above_the_limit_is_searched_anew_after_a_restart(tmp_path: Path) -> None:
    """From its beginning: nothing of it was settled (cases 21, 30)."""
    site = Site(tmp_path, max_line_bytes=BLOCK_BYTES)
    long = b"y" * (2 * BLOCK_BYTES)
    append(site.log, lines(0) + long)
    site.start()
    assert site.read() == lines(0)
    site.restart()
    assert site.blocks() == []
    append(site.log, b"\n" + lines(1))
    first, second = site.blocks()
    assert first.overlong == overlong(long)
    assert (first.start_offset, second.data) == (len(lines(0)), lines(1))
    site.stop()


def test_a_truncation_within_a_line_above_the_limit_begins_anew(tmp_path: Path) -> None:
    """(cases 12, 21)"""
    site = Site(tmp_path, max_line_bytes=BLOCK_BYTES)
    append(site.log, lines(0) + b"z" * (2 * BLOCK_BYTES))
    site.start()
    assert site.read() == lines(0)
    rewrite(site.log, lines(10, 2))
    assert site.read() == lines(10, 2)
    site.stop()


@pytest.mark.parametrize(
    "odd",
    [
        b'{"agent":"\xff\xfe"}\n',
        b'{"agent":"\\ud800"}\n',
        b'\xef\xbb\xbf{"bom":1}\n',
        b'{"crlf":1}\r\n',
        b"\n\n  \n",
        b"\r\n",
        b'   {"spaces":1}\n',
        b"[" * 100_000 + b"\n",
        b"1" * 5000 + b"\n",
        b'{"a":1}\x00{"b":2}\n',
        b"\x85\xc2\x85\xe2\x80\xa8\x0b\x0c\x1c\n",
    ],
    ids=["utf-8", "surrogate", "bom", "crlf", "blank", "crlf-blank", "spaces", "deep", "number", "nul", "separators"],
)
@pytest.mark.parametrize("place", ["head", "between"])
def test_every_byte_of_an_odd_line_is_handed_on(site: Site, odd: bytes, place: str) -> None:
    """Blocks are bytes: what a line means, and whether it is one, is not decided here (cases 22, 24, 25)."""
    before = lines(0) if place == "between" else b""
    append(site.log, before + odd + lines(1))
    assert site.start().read() == before + odd + lines(1)
    site.restart()
    assert site.read() == b""
    append(site.log, odd)
    assert site.read() == odd


# Not allowed


def test_a_rotated_file_that_can_not_be_opened_for_a_while_is_no_loss(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retried for ever, and read when it can be (cases 8, 20)."""
    started(site)
    site.stop()
    append(site.log, lines(3))
    rotate(site.log)
    append(site.log, lines(4))
    real = os.open

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if str(path) == str(old(site)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, mode)

    site.start()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert look_for_a_while(site) == lines(4)
        assert site.checkpoint.gaps() == []
    assert look_for_a_while(site) == lines(3)
    assert site.checkpoint.gaps() == []


# Copies


@pytest.mark.parametrize("older", [False, True], ids=["as old", "older"])
@lives
def test_an_original_that_grows_beside_a_copy_of_it_is_read(site: Site, older: bool, stopped: bool) -> None:
    """cp -p of a rotated file that Kong still writes to: the copy takes nothing away from it (cases 5, 10)."""
    started(site)
    rotate(site.log)
    append(site.log, lines(10))
    assert site.read() == lines(10)
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    assert site.read() == b""
    shutil.copy2(old(site), f"{old(site)}.saved")
    if older:
        os.utime(f"{old(site)}.saved", ns=(10**18, 10**18))
    assert look_for_a_while(site) == b""
    if stopped:
        site.stop()
    append(old(site), lines(3))
    if stopped:
        site.start()
    assert look_for_a_while(site) == lines(3)


def test_a_copy_from_the_middle_of_the_day_does_not_hide_the_rest_of_it(site: Site) -> None:
    """Copied when it held more than was read, and less than in the end (cases 8, 10)."""
    started(site)
    site.stop()
    append(site.log, lines(3, 2))
    shutil.copyfile(site.log, site.logs / "usage.log.0")
    os.utime(site.logs / "usage.log.0", ns=(10**18, 10**18))
    append(site.log, lines(5, 5))
    site.log.rename(old(site))
    append(site.log, lines(10))
    site.start()
    assert as_set(look_for_a_while(site)) == as_set(lines(3, 8))
    site.restart()
    assert look_for_a_while(site) == b""


@pytest.mark.parametrize("size", [1, 10, 25])
def test_a_copy_of_which_no_line_is_there_yet_is_not_read_later_either(site: Site, size: int) -> None:
    """(case 10)"""
    started(site, 50)
    old(site).write_bytes(lines(0, 50)[:size])
    assert look_for_a_while(site) == b""
    old(site).write_bytes(lines(0, 50))
    assert look_for_a_while(site) == b""


def test_history_that_is_listed_as_an_input_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As the warning about it says, beside its log, too (cases 9, 19)."""
    site = Site(tmp_path)
    append(old(site), lines(0, 2))
    append(site.log, lines(2))
    site.start()
    assert site.read() == lines(2)
    assert "to bill it too, list it as an input" in caplog.text
    site.stop()
    site.paths = [str(site.log), str(old(site))]
    site.start()
    assert look_for_a_while(site) == lines(0, 2)
    site.restart()
    assert look_for_a_while(site) == b""
    site.stop()


# What a failure at the wrong moment must not change


def test_read_from_end_is_for_logs_that_were_never_followed(tmp_path: Path) -> None:
    """Another pattern for the same log: what it got while nobody looked is read (cases 8, 36)."""
    site = Site(tmp_path, read_from="end")
    append(site.log, lines(1, 3))
    site.start()
    assert site.read() == b""
    append(site.log, lines(4))
    assert site.read() == lines(4)
    site.stop()
    append(site.log, lines(5))
    rotate(site.log)
    append(site.log, lines(6, 2))
    site.paths = [str(site.logs / "*.log")]
    site.start()
    assert as_set(look_for_a_while(site)) == as_set(lines(5, 3))
    site.stop()


def test_read_from_end_holds_though_the_log_could_not_be_opened_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(case 20)"""
    site = Site(tmp_path, read_from="end")
    append(site.log, lines(1, 3))
    site.start()
    call, left = os.open, [1]

    def fail_once(path: str, *rest: int) -> int:
        if path == str(site.log) and left and left.pop():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return call(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail_once)
        assert site.read() == b""
    assert not left
    assert site.read() == b""
    append(site.log, lines(4))
    assert site.read() == lines(4)
    site.stop()


def test_a_gap_that_can_not_be_taken_back_now_is_taken_back_later(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is read twice for it (cases 9, 33)."""
    append(site.log, lines(1, 3))
    site.start()
    site.read()
    site.stop()
    append(site.log, lines(4))
    away = site.root / "away"
    site.log.rename(away)
    append(site.log, lines(20))
    site.start()
    look_for_a_while(site)
    assert len(site.checkpoint.gaps()) == 1
    away.rename(old(site))

    def busy(_: int) -> None:
        raise sqlite3.OperationalError("database is locked")

    with monkeypatch.context() as patch:
        patch.setattr(site.checkpoint, "withdraw_gap", busy)
        with pytest.raises(sqlite3.OperationalError):
            site.read()
    assert look_for_a_while(site) == lines(4)
    assert site.checkpoint.gaps() == []


def test_a_glob_whose_directory_can_not_be_listed_rotates_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logs are there as before: an unfinished line stays unfinished (cases 2, 20)."""
    site = Site(tmp_path, [str(tmp_path / "logs" / "*.log")])
    append(site.log, lines(1) + b'{"half')
    site.start()
    assert site.read() == lines(1)
    call = os.scandir

    def fail(path: str = ".") -> object:
        if path == str(site.logs):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return call(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail)
        site.read()
        site.pass_time(ROTATED_IDLE_SECONDS + 1)
        assert site.read() + site.read() == b""
    append(site.log, b'"}\n')
    assert site.read() == b'{"half"}\n'
    site.stop()


def test_a_rest_behind_an_overlong_line_is_read_once_whatever_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(cases 21, 26)"""
    site = Site(tmp_path, max_line_bytes=BLOCK_BYTES)
    append(site.log, lines(1, 2) + b"y" * (2 * BLOCK_BYTES) + b"\n" + lines(4))
    site.start()
    site.files.scan()
    tail, left = Content.tail, [1]

    def fail_once(content: Content, position: int) -> bytes:
        if left and left.pop():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return tail(content, position)

    monkeypatch.setattr(Content, "tail", fail_once)
    blocks = [*site.blocks(), *site.blocks()]
    assert not left
    assert [block.data for block in blocks] == [lines(1, 2), b"", lines(4)]
    assert blocks[1].overlong == overlong(b"y" * 2 * BLOCK_BYTES)
    site.stop()
