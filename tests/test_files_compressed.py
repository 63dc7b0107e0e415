"""Rotated and compressed: known by content, read on where it was left. Numbers are those of the cases."""

import errno
import gzip
import itertools
import logging
import os
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import pytest
import zstandard

from metershipper import content as content_module
from metershipper.archive import Compression, unpack
from metershipper.books import Count
from metershipper.files import ROTATED_IDLE_SECONDS
from metershipper.listing import LISTING_SECONDS
from metershipper.losses import PATIENCE_SECONDS
from metershipper.records import Lost
from tests.test_files import Site, append, copytruncate, lines, rotate

PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
suffixes = pytest.mark.parametrize("suffix", ["gz", "zst"])
lives = pytest.mark.parametrize("stopped", [False, True], ids=["live", "stopped"])


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.stop()


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all pieces that are unpacked from now on."""
    sizes: list[int] = []

    def counting(file: BinaryIO, compression: Compression) -> Iterator[bytes]:
        for piece in unpack(file, compression):
            sizes.append(len(piece))
            yield piece

    monkeypatch.setattr(content_module, "unpack", counting)
    return sizes


def write_packed(path: Path, data: bytes, when_ns: int | None = None) -> Path:
    """A compressed file, written in one go, with the modification time that compressors copy."""
    path.write_bytes(PACK[path.suffix[1:]](data))
    if when_ns is not None:
        os.utime(path, ns=(when_ns, when_ns))
    return path


def compress(path: Path, suffix: str = "gz", *, keep: bool = False) -> Path:
    """What gzip does to a file: another one beside it, as old as it; then it is deleted."""
    packed = write_packed(Path(f"{path}.{suffix}"), path.read_bytes(), path.stat().st_mtime_ns)
    if not keep:
        path.unlink()
    return packed


def old(site: Site, number: int = 1) -> Path:
    return Path(f"{site.log}.{number}")


def varied(first: int, count: int) -> bytes:
    """Lines that hardly compress, 2 KB each."""
    return b"".join(b'{"number":%d,"noise":"%s"}\n' % (n, _noise(n)) for n in range(first, first + count))


def _noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(1000).hex().encode()


# Rotated and compressed while we are behind


@suffixes
@lives
def test_a_tail_that_was_compressed_unread_is_read_on_where_it_was_left(site: Site, suffix: str, stopped: bool) -> None:
    """No delaycompress: nothing before the position is read again, and the rest is not lost (cases 8, 27)."""
    append(site.log, lines(0, 3))
    site.start()
    assert site.read() == lines(0, 3)
    if stopped:
        site.stop()
    append(site.log, lines(3, 2))
    rotate(site.log)
    compress(old(site), suffix)
    append(site.log, lines(5))
    if stopped:
        site.start()
    assert site.read() == lines(3, 3)
    for _ in range(3):
        site.pass_time(ROTATED_IDLE_SECONDS + 1)
        assert site.read() == b""
    site.restart()
    assert site.read() == b""
    assert site.checkpoint.books()[Count.LINES] == 6
    assert site.checkpoint.gaps() == []


@suffixes
def test_a_compressed_file_is_read_on_at_its_offset_after_a_crash_in_the_middle(site: Site, suffix: str) -> None:
    """What was settled is not read again, what was not is (case 28)."""
    data = varied(0, 1200)
    append(site.log, varied(5000, 1))
    site.start()
    site.read()
    write_packed(site.logs / f"usage.log.1.{suffix}", data)
    site.files.scan()
    first, second = site.files.next_block(), site.files.next_block()
    assert first is not None and second is not None
    site.settle([first])
    site.restart()
    assert site.read() == data[len(first.data) :]
    site.restart()
    assert site.read() == b""
    assert site.checkpoint.books()[Count.LINES] == 1201


@suffixes
def test_a_crash_before_anything_of_a_compressed_file_was_settled_reads_it_again(site: Site, suffix: str) -> None:
    """(cases 28, 30)"""
    append(site.log, lines(0))
    site.start()
    site.read()
    append(site.log, lines(1, 4))
    rotate(site.log)
    compress(old(site), suffix)
    site.stop()
    site.start()
    assert site.read(settle=False) == lines(1, 4)
    site.restart()
    assert site.read(settle=False) == lines(1, 4)
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    site.restart()
    assert site.read() == lines(1, 4)
    site.restart()
    assert site.read() == b""


def test_several_rotations_while_stopped_are_read_oldest_first_whatever_they_are(site: Site) -> None:
    """The known one in a gzip, one never seen in a zstd, one that is plain, and the log itself (cases 8, 9)."""
    append(site.log, lines(0, 2))
    site.start()
    assert site.read() == lines(0, 2)
    site.stop()
    append(site.log, lines(2))
    write_packed(site.logs / "usage.log.3.gz", site.log.read_bytes(), 10**18)
    write_packed(site.logs / "usage.log.2.zst", lines(3), 10**18 + 1)
    site.log.unlink()
    append(old(site), lines(4))
    append(site.log, lines(5))
    site.start()
    assert site.read() == lines(2, 4)
    site.restart()
    assert site.read() == b""


def test_order_follows_the_age_and_not_the_name(site: Site) -> None:
    """usage.log.10.gz is older than usage.log.9.gz (cases 7, 9)."""
    append(site.log, lines(0))
    site.start()
    site.read()
    site.stop()
    for number in range(2, 12):
        write_packed(site.logs / f"usage.log.{number}.gz", lines(100 - number), (100 - number) * 10**15)
    site.start()
    assert site.read() == lines(89, 10)


def test_what_survives_is_read_and_what_does_not_is_told(site: Site) -> None:
    """Rotated three times while stopped; the one we were reading is deleted, the others compressed (case 9)."""
    append(site.log, lines(0, 2))
    site.start()
    site.read()
    site.stop()
    with site.log.open():  # so that its inode is not used again at once
        site.log.unlink()
        write_packed(site.logs / "usage.log.2.gz", lines(10, 2), 10**18)
        write_packed(site.logs / "usage.log.1.gz", lines(12, 2), 10**18 + 1)
        append(site.log, lines(14))
    site.start()
    assert site.read() == lines(10, 5)
    site.pass_time(PATIENCE_SECONDS)
    site.read()
    (gap,) = site.checkpoint.gaps()
    assert (gap.path, gap.start_offset, gap.end_offset) == (str(site.log), len(lines(0, 2)), None)
    assert gap.reason is Lost.VANISHED


@suffixes
def test_copytruncate_and_compression_at_once_lose_no_tail(site: Site, suffix: str) -> None:
    """The rest is in a compressed copy of a log that was truncated (cases 11, 27)."""
    append(site.log, lines(10, 5))
    site.start()
    assert site.read() == lines(10, 5)
    append(site.log, lines(15, 3))
    copytruncate(site.log, old(site), lines(30, 20))
    compress(old(site), suffix)
    first = site.read()
    site.pass_time(LISTING_SECONDS)
    assert sorted((first + site.read()).splitlines()) == sorted((lines(15, 3) + lines(30, 20)).splitlines())
    site.restart()
    assert site.read() == b""
    assert site.checkpoint.gaps() == []


@suffixes
def test_the_unterminated_last_line_of_a_compressed_file_is_delivered(site: Site, suffix: str) -> None:
    """Nothing will complete it (cases 3, 27)."""
    append(site.log, lines(0))
    site.start()
    site.read()
    site.stop()
    append(site.log, lines(1, 2)[:-1])
    rotate(site.log)
    compress(old(site), suffix)
    site.start()
    got = site.read() + site.read() + site.read()
    assert got == lines(1, 2)[:-1]
    site.restart()
    assert site.read() == site.read() == b""


def test_a_rest_of_a_compressed_file_that_was_not_settled_is_delivered_again(site: Site) -> None:
    """(cases 3, 28)"""
    append(site.log, lines(0))
    site.start()
    site.read()
    site.stop()
    append(site.log, b"torn")
    rotate(site.log)
    compress(old(site))
    site.start()
    assert site.read(settle=False) + site.read(settle=False) == b"torn"
    site.restart()
    assert site.read() + site.read() == b"torn"
    site.restart()
    assert site.read() + site.read() == b""


@pytest.mark.parametrize("parts", [2, 5])
def test_a_compressed_file_of_several_members_is_one_content(site: Site, parts: int) -> None:
    """(case 29)"""
    append(site.log, lines(0))
    site.start()
    site.read()
    site.stop()
    data = lines(0, 50)
    cuts = [len(data) * part // parts for part in range(parts + 1)]
    site.log.unlink()
    packed = b"".join(gzip.compress(data[a:b]) for a, b in pairwise(cuts))
    (site.logs / "usage.log.1.gz").write_bytes(packed)
    site.start()
    assert site.read() == lines(1, 49)


# Compressed while it is open, and afterwards


@suffixes
def test_what_was_read_while_it_was_open_is_neither_read_nor_unpacked_again(
    site: Site, suffix: str, unpacked: list[int]
) -> None:
    """But for its beginning, by which it is known; not even after it was let go (case 27)."""
    data = varied(0, 800)
    append(site.log, data)
    site.start()
    assert site.read() == data
    rotate(site.log)
    append(site.log, varied(5000, 1))
    assert site.read() == varied(5000, 1)
    compress(old(site), suffix)
    for _ in range(4):
        site.pass_time(ROTATED_IDLE_SECONDS + 1)
        assert site.read() == b""
    assert site.open_logs() == [str(site.log)]
    assert sum(unpacked) < len(data) // 4
    for number in range(1, 4):
        (site.logs / f"usage.log.{number}.{suffix}").rename(site.logs / f"usage.log.{number + 1}.{suffix}")
        site.pass_time(LISTING_SECONDS)
        assert site.read() == b""
    assert sum(unpacked) < len(data) // 4
    assert site.checkpoint.books()[Count.LINES] == 801


def test_a_compressed_file_that_was_read_to_its_end_is_not_unpacked_again(site: Site, unpacked: list[int]) -> None:
    """Not at any later look, not after a restart, and not under another name (cases 27, 28)."""
    append(site.log, lines(0))
    site.start()
    site.read()
    write_packed(site.logs / "usage.log.1.gz", varied(0, 500))
    assert site.read() == varied(0, 500)
    site.read()
    unpacked.clear()
    for _ in range(3):
        site.pass_time(LISTING_SECONDS)
        assert site.read() == b""
    site.restart()
    assert site.read() == b""
    (site.logs / "usage.log.1.gz").rename(site.logs / "usage.log.2.gz")
    site.pass_time(LISTING_SECONDS)
    assert site.read() == b""
    assert unpacked == []


@lives
def test_a_rotated_file_compressed_after_it_was_let_go_is_not_read_again(site: Site, stopped: bool) -> None:
    """delaycompress: usage.log.1 was read to its end a day ago (case 27)."""
    append(site.log, lines(0, 3))
    site.start()
    site.read()
    rotate(site.log)
    append(site.log, lines(3))
    assert site.read() == lines(3)
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    assert site.read() == b""
    if stopped:
        site.stop()
    rotate(site.log)
    compress(old(site, 2))
    append(site.log, lines(4))
    if stopped:
        site.start()
    assert site.read() == lines(4)
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    assert site.read() == b""
    site.pass_time(PATIENCE_SECONDS)
    assert site.read() == b""
    assert site.checkpoint.gaps() == []
    assert site.checkpoint.books()[Count.LINES] == 5


@suffixes
@lives
def test_a_compressed_copy_beside_the_original_is_not_read(site: Site, suffix: str, stopped: bool) -> None:
    """gzip -k: the content is there twice, and billed once (case 27)."""
    append(site.log, lines(0, 3))
    site.start()
    site.read()
    append(site.log, lines(3, 2))
    rotate(site.log)
    if stopped:
        site.stop()
    compress(old(site), suffix, keep=True)
    append(site.log, lines(5))
    if stopped:
        site.start()
    assert site.read() == lines(3, 3)
    for _ in range(3):
        site.pass_time(ROTATED_IDLE_SECONDS + 1)
        assert site.read() == b""
    site.restart()
    assert site.read() == b""
    assert site.checkpoint.books()[Count.LINES] == 6
    assert site.checkpoint.gaps() == []


@lives
def test_an_original_that_grows_beside_its_compressed_copy_is_read(site: Site, stopped: bool) -> None:
    """gzip -k of a file that Kong still writes to: the copy takes nothing away from it (cases 5, 27)."""
    append(site.log, lines(0, 3))
    site.start()
    site.read()
    rotate(site.log)
    append(site.log, lines(3))
    site.read()
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    site.read()
    compress(old(site), keep=True)
    site.pass_time(LISTING_SECONDS)
    assert site.read() == b""
    if stopped:
        site.stop()
    append(old(site), lines(4))
    if stopped:
        site.start()
    site.pass_time(LISTING_SECONDS)
    assert site.read() == lines(4)


@suffixes
def test_a_file_that_is_being_compressed_beside_its_original_is_not_read(site: Site, suffix: str) -> None:
    """Whatever is there of it at the moment; no alarm either (case 29)."""
    data = lines(0, 200)
    append(site.log, data)
    site.start()
    site.read()
    rotate(site.log)
    append(site.log, lines(1000))
    assert site.read() == lines(1000)
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    site.read()
    packed = PACK[suffix](data)
    target = site.logs / f"usage.log.1.{suffix}"
    for size in (0, len(packed) // 4, len(packed) // 2, len(packed) - 1, len(packed)):
        target.write_bytes(packed[:size])
        site.pass_time(LISTING_SECONDS)
        assert site.read() == b""
    old(site).unlink()
    for _ in range(3):
        site.pass_time(LISTING_SECONDS)
        assert site.read() == b""
    assert site.checkpoint.gaps() == []
    site.restart()
    assert site.read() == b""
    assert site.checkpoint.books()[Count.LINES] == 201


@suffixes
@pytest.mark.parametrize("size", [4, 10, 14])
def test_a_compressed_file_of_which_nothing_unpacks_yet_is_not_read_later_either(
    site: Site, suffix: str, size: int
) -> None:
    """No more than its header was written when it was first seen, and the original still stands there (case 29)."""
    data = lines(0, 200)
    append(site.log, data)
    site.start()
    site.read()
    rotate(site.log)
    append(site.log, lines(1000))
    assert site.read() == lines(1000)
    packed = PACK[suffix](data)
    target = site.logs / f"usage.log.1.{suffix}"
    target.write_bytes(packed[:size])
    site.pass_time(LISTING_SECONDS)
    assert site.read() == b""
    target.write_bytes(packed)
    site.pass_time(LISTING_SECONDS)
    assert site.read() == b""
    old(site).unlink()
    site.pass_time(LISTING_SECONDS)
    assert site.read() == b""
    assert site.checkpoint.gaps() == []


@suffixes
def test_a_compressed_file_that_is_written_over_our_looks_is_read_once(site: Site, suffix: str) -> None:
    """The original is gone already: what unpacks is read at once, the rest when it is there (case 29)."""
    data = varied(0, 300)
    append(site.log, varied(5000, 1))
    site.start()
    site.read()
    packed, got = PACK[suffix](data), b""
    target = site.logs / f"usage.log.1.{suffix}"
    for number, size in enumerate((len(packed) // 3, len(packed) // 2, len(packed)), start=1):
        target.write_bytes(packed[:size])
        os.utime(target, ns=(number * 10**17, number * 10**17))
        site.pass_time(LISTING_SECONDS)
        got += site.read()
        assert data.startswith(got)
    assert got == data
    site.pass_time(LISTING_SECONDS)
    assert site.read() == b""
    assert site.checkpoint.gaps() == []


# Damaged


@suffixes
@lives
def test_of_a_damaged_file_what_unpacks_is_read_and_the_rest_is_told(
    site: Site, suffix: str, stopped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With the name of the file and the offset; once (case 29)."""
    data = varied(0, 300)
    append(site.log, varied(5000, 1))
    site.start()
    site.read()
    if stopped:
        site.stop()
    target = site.logs / f"usage.log.1.{suffix}"
    packed = PACK[suffix](data)
    target.write_bytes(packed[: len(packed) * 2 // 3])
    if stopped:
        site.start()
    site.pass_time(LISTING_SECONDS)
    got = site.read()
    assert data.startswith(got) and len(got) > len(data) // 4 and got.endswith(b"\n")
    assert site.checkpoint.gaps() == []  # it may be being written
    for _ in range(2):
        site.pass_time(PATIENCE_SECONDS)
        assert site.read() == b""
    (gap,) = site.checkpoint.gaps()
    assert (gap.path, gap.start_offset, gap.end_offset, gap.reason) == (str(target), len(got), None, Lost.DAMAGED)
    for _ in range(3):
        site.pass_time(LISTING_SECONDS)
        assert site.read() == b""
    assert len([r for r in caplog.records if r.levelno == logging.ERROR and "can't be read any more" in r.message]) == 1
    site.restart()
    site.pass_time(LISTING_SECONDS)
    assert site.read() == b""
    assert len(site.checkpoint.gaps()) == 1


@pytest.mark.parametrize("way", ["in place", "another file"])
@lives
def test_a_damaged_file_that_gets_whole_is_read_on_and_its_gap_is_gone(site: Site, way: str, stopped: bool) -> None:
    """Copied again from where it was whole (case 29)."""
    data = varied(0, 300)
    append(site.log, varied(5000, 1))
    site.start()
    site.read()
    target, packed = site.logs / "usage.log.1.gz", gzip.compress(data)
    target.write_bytes(packed[: len(packed) // 2])
    site.pass_time(LISTING_SECONDS)
    got = site.read()
    site.read()
    site.pass_time(PATIENCE_SECONDS)
    site.read()
    assert len(site.checkpoint.gaps()) == 1
    if stopped:
        site.stop()
    if way == "in place":
        target.write_bytes(packed)
    else:
        (site.logs / "new").write_bytes(packed)
        (site.logs / "new").rename(target)
    if stopped:
        site.start()
    site.pass_time(LISTING_SECONDS)
    assert site.read() == data[len(got) :]
    for _ in range(2):
        site.pass_time(LISTING_SECONDS)
        assert site.read() == b""
    assert site.checkpoint.gaps() == []


def test_a_name_of_a_compressed_file_with_plain_content_is_read_as_it_is(site: Site) -> None:
    """(case 29)"""
    append(site.log, lines(0, 2))
    site.start()
    site.read()
    site.stop()
    append(site.log, lines(2))
    site.log.rename(site.logs / "usage.log.1.gz")
    append(site.logs / "usage.log.2.gz", lines(20, 2))
    append(site.log, lines(3))
    site.start()
    assert sorted(site.read().splitlines()) == sorted((lines(20, 2) + lines(2, 2)).splitlines())
    site.restart()
    assert site.read() == b""


def test_a_compressed_file_that_changes_after_it_was_read_is_read_on(site: Site) -> None:
    """Somebody appended a member to it (case 29)."""
    append(site.log, lines(0))
    site.start()
    site.read()
    target = write_packed(site.logs / "usage.log.1.gz", lines(10, 3))
    site.pass_time(LISTING_SECONDS)
    assert site.read() == lines(10, 3)
    site.read()
    append(target, gzip.compress(lines(13, 2)))
    site.pass_time(LISTING_SECONDS)
    assert site.read() == lines(13, 2)
    site.read()
    site.restart()
    assert site.read() == b""


def test_a_compressed_file_whose_place_other_content_takes_is_read_too(site: Site) -> None:
    """The inode is used again by the next rotation (cases 14, 29)."""
    append(site.log, lines(0))
    site.start()
    site.read()
    target = write_packed(site.logs / "usage.log.1.gz", lines(10, 3))
    site.pass_time(LISTING_SECONDS)
    assert site.read() == lines(10, 3)
    site.read()
    write_packed(target, lines(20, 3), 10**18)
    site.pass_time(LISTING_SECONDS)
    assert site.read() == lines(20, 3)


def test_a_truncated_file_beside_its_whole_original_changes_nothing(site: Site) -> None:
    """The disk ran full while it was compressed, and the rotation left both (cases 9, 29)."""
    append(site.log, lines(0, 50))
    site.start()
    site.read()
    site.stop()
    append(site.log, lines(50, 50))
    rotate(site.log)
    packed = gzip.compress(old(site).read_bytes())
    Path(f"{old(site)}.gz").write_bytes(packed[: len(packed) // 2])
    append(site.log, lines(100))
    site.start()
    assert site.read() == lines(50, 51)
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    assert site.read() == site.read() == b""
    assert site.checkpoint.gaps() == []


# History, starting over, globs


@suffixes
def test_compressed_files_from_before_the_first_start_are_named_and_not_read(
    site: Site, suffix: str, caplog: pytest.LogCaptureFixture, unpacked: list[int]
) -> None:
    """Whether they were billed before, nobody here knows; nor are they unpacked (case 9)."""
    target = write_packed(site.logs / f"usage.log.2.{suffix}", varied(0, 1000))
    append(site.log, lines(0))
    site.start()
    assert site.read() == lines(0)
    assert [m for m in caplog.messages if m.startswith(f"{target}: rotated before its log was first followed")]
    caplog.clear()
    target.rename(site.logs / f"usage.log.3.{suffix}")
    for _ in range(3):
        site.pass_time(LISTING_SECONDS)
        assert site.read() == b""
    site.restart()
    assert site.read() == b""
    assert not [m for m in caplog.messages if "rotated before" in m]
    assert sum(unpacked) < 1_000_000
    assert site.checkpoint.gaps() == []


def test_history_that_is_compressed_later_is_still_history(site: Site) -> None:
    """delaycompress, at the first rotation after the first start (cases 9, 27)."""
    append(old(site), lines(0, 3))
    append(site.log, lines(3))
    site.start()
    assert site.read() == lines(3)
    rotate(site.log)
    compress(old(site, 2))
    append(site.log, lines(4))
    assert site.read() == lines(4)
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    assert site.read() == b""
    site.restart()
    site.pass_time(PATIENCE_SECONDS)
    assert site.read() == b""
    assert site.checkpoint.gaps() == []


def test_starting_over_reads_all_that_is_there_compressed_or_not(site: Site) -> None:
    """(cases 9, 27)"""
    write_packed(site.logs / "usage.log.3.gz", lines(0, 2), 10**18)
    write_packed(site.logs / "usage.log.2.zst", lines(2, 2), 10**18 + 1)
    append(old(site), lines(4))
    append(site.log, lines(5))
    site.start()
    site.checkpoint._db.execute("INSERT OR REPLACE INTO facts VALUES ('start_over', 1)")
    site.restart()
    assert site.read() == lines(0, 6)
    site.read()
    site.restart()
    assert site.read() == b""


def test_a_glob_that_names_compressed_files_reads_them_once(tmp_path: Path) -> None:
    """`usage.log*` takes in what is there at the first start, and rotation moves it on (cases 19, 27)."""
    site = Site(tmp_path, [str(tmp_path / "logs" / "usage.log*")])
    write_packed(site.logs / "usage.log.2.gz", lines(0, 2), 10**18)
    append(old(site), lines(2, 2))
    append(site.log, lines(4, 2))
    site.start()
    assert sorted(site.read().splitlines()) == sorted(lines(0, 6).splitlines())
    site.read()
    (site.logs / "usage.log.2.gz").rename(site.logs / "usage.log.3.gz")
    old(site).rename(old(site, 2))
    compress(old(site, 2))
    site.log.rename(old(site))
    append(site.log, lines(6))
    assert site.read() == lines(6)
    for _ in range(3):
        site.pass_time(ROTATED_IDLE_SECONDS + 1)
        assert site.read() == b""
    site.restart()
    assert site.read() == b""
    assert site.checkpoint.books()[Count.LINES] == 7
    assert site.checkpoint.gaps() == []
    site.stop()


@lives
def test_under_a_glob_too_a_tail_that_was_compressed_unread_is_read_on(tmp_path: Path, stopped: bool) -> None:
    """(cases 19, 27)"""
    site = Site(tmp_path, [str(tmp_path / "logs" / "usage.log*")])
    append(site.log, lines(0, 2))
    site.start()
    assert site.read() == lines(0, 2)
    if stopped:
        site.stop()
    append(site.log, lines(2, 2))
    rotate(site.log)
    compress(old(site))
    append(site.log, lines(4))
    if stopped:
        site.start()
    assert site.read() == lines(2, 3)
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    assert site.read() == b""
    site.restart()
    assert site.read() == b""
    site.stop()


def test_a_compressed_file_of_its_own_is_named_and_not_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An input that names one, and a log that is one: no lines of garbage (case 29)."""
    logs = tmp_path / "logs"
    site = Site(tmp_path, [str(logs / "alone*"), str(logs / "usage.log")])
    write_packed(logs / "alone.gz", lines(0))
    site.log.write_bytes(gzip.compress(lines(1)))
    assert site.start().read() == site.read() == b""
    assert caplog.messages == [
        f"{logs / 'alone.gz'}: compressed, and no log stands beside it, so it is not followed",
        f"{site.log}: compressed, so it is not followed",
    ]
    site.stop()


def test_files_with_equal_first_lines_are_told_apart_when_compressed(site: Site) -> None:
    """Content, not the beginning alone, makes a copy (cases 15, 27)."""
    append(site.log, lines(0) + lines(1, 3))
    site.start()
    site.read()
    rotate(site.log)
    append(site.log, lines(5))
    site.read()
    site.pass_time(ROTATED_IDLE_SECONDS + 1)
    site.read()
    write_packed(site.logs / "usage.log.2.gz", lines(0) + lines(10, 3))
    site.pass_time(LISTING_SECONDS)
    assert site.read() == lines(0) + lines(10, 3)


@lives
def test_a_log_that_was_empty_when_it_was_last_looked_at_is_read_once(site: Site, stopped: bool) -> None:
    """Its first lines, the rotation and the compression, all between two looks; and no alarm (cases 8, 27)."""
    append(site.log, b"")
    site.start()
    assert site.read() == b""
    if stopped:
        site.stop()
    append(site.log, lines(0, 3))
    rotate(site.log)
    with old(site).open():  # so that its inode is not used again at once
        compress(old(site))
        append(site.log, lines(3))
    if stopped:
        site.start()
    got = site.read()
    for _ in range(4):
        site.pass_time(LISTING_SECONDS)
        got += site.read()
    assert got == lines(0, 4)
    assert site.checkpoint.gaps() == []


def test_read_from_end_leaves_out_what_was_compressed_before_the_first_start(tmp_path: Path) -> None:
    """Also where the input names it (case 9): a part that comes later is read."""
    site = Site(tmp_path, [str(tmp_path / "logs" / "usage.log*")], read_from="end")
    append(site.log, lines(0))
    (site.logs / "usage.log.1.gz").write_bytes(gzip.compress(lines(10, 3)))
    site.start()
    assert site.read() == b""
    append(site.log, lines(1))
    (site.logs / "usage.log.0.gz").write_bytes(gzip.compress(lines(20)))
    site.pass_time(LISTING_SECONDS)
    assert sorted(site.read().splitlines()) == sorted((lines(1) + lines(20)).splitlines())
    site.stop()


def test_a_read_error_in_a_compressed_file_ends_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails for a moment: what unpacks is begun anew, and read on where it was left (cases 26, 28)."""
    append(site.log, lines(0))
    site.start()
    site.read()
    site.stop()
    rest = varied(1, 30_000)
    append(site.log, rest)
    Path(f"{site.log}.1.gz").write_bytes(gzip.compress(site.log.read_bytes()))
    site.log.unlink()
    append(site.log, lines(90_000))
    site.start()
    steps = itertools.count()

    class Failing:
        def __init__(self, file: BinaryIO) -> None:
            self._file = file

        def read(self, size: int) -> bytes:
            if next(steps) == 40:
                raise OSError(errno.EIO, "Input/output error")
            return self._file.read(size)

    def fail_once(fd: int, mode: str, closefd: bool) -> Failing:
        return Failing(os.fdopen(fd, "rb", closefd=closefd))

    monkeypatch.setattr(content_module, "open", fail_once, raising=False)
    got = b""
    for _ in range(3):
        got += site.read()
        site.pass_time(LISTING_SECONDS)
    assert next(steps) > 41
    assert sorted(got.splitlines()) == sorted((rest + lines(90_000)).splitlines())
