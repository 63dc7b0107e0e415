"""What an open file holds, plain and compressed: the same offsets, the same bytes. Numbers are those of the cases."""

import gzip
import os
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from metershipper import content as content_module
from metershipper.content import (
    BLOCK_BYTES,
    HEAD_BYTES,
    NOT_KNOWN_BYTES,
    TAIL_BYTES,
    CompressedContent,
    Content,
    end_of_lines,
    open_content,
)
from metershipper.records import Sample, StoredFile

Pack = Callable[[bytes], bytes]
Open = Callable[..., Content]


def plain(data: bytes) -> bytes:
    return data


PACKS: dict[str, Pack] = {
    "plain": plain,
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
}
every = pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS.keys())
compressed = pytest.mark.parametrize("pack", [PACKS["gzip"], PACKS["zstd"]], ids=["gzip", "zstd"])


@pytest.fixture
def open_file(tmp_path: Path) -> Iterator[Open]:
    """Opens a file that holds just these bytes."""
    opened: list[Content] = []

    def open_one(data: bytes) -> Content:
        path = tmp_path / f"{len(opened)}"
        path.write_bytes(data)
        opened.append(open_content(os.open(path, os.O_RDONLY)))
        return opened[-1]

    yield open_one
    for content in opened:
        content.close()


def noise(size: int, seed: int = 1) -> bytes:
    """Lines that hardly compress."""
    return b"\n".join(random.Random(seed + n).randbytes(500).hex().encode() for n in range(size // 1000 + 1))[:size]


def record_of(content: Content, data: bytes, position: int) -> StoredFile:
    """What the checkpoint would know of `data`, read up to `position`."""
    head = content.head()
    tail = Sample.of(data[max(0, position - TAIL_BYTES) : position])
    return StoredFile(1, "usage.log", 1, 1, head, tail, position)


@every
@given(
    data=st.lists(st.sampled_from([b"a", b"bb\n", b"c" * 90, b"\n", b"d" * 700]), max_size=30).map(b"".join),
    reads=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 12_000)), max_size=12),
)
@settings(max_examples=60)
def test_any_pattern_of_reads_gives_the_bytes_of_the_plain_file(
    tmp_path_factory: pytest.TempPathFactory, pack: Pack, data: bytes, reads: list[tuple[int, int]]
) -> None:
    """Forwards and backwards, and behind the end (case 27)."""
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(pack(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(content_module, "BLOCK_BYTES", 64)
        patch.setattr(content_module, "HEAD_BYTES", 50)
        patch.setattr(content_module, "TAIL_BYTES", 8)
        content = open_content(os.open(path, os.O_RDONLY))
        assert content.compressed == (pack is not plain)
        for size, offset in reads:
            assert content.pread(size, offset) == data[offset : offset + size]
        assert content.pread(len(data) + 1, 0) == data
        assert content.damage is None
        content.close()


@compressed
def test_reads_of_a_large_file_far_apart_give_the_right_bytes(open_file: Open, pack: Pack) -> None:
    """Though the window that is kept is far smaller than the file (case 27)."""
    data = noise(5 * BLOCK_BYTES)
    content = open_file(pack(data))
    for offset in (0, 4 * BLOCK_BYTES, 4 * BLOCK_BYTES - TAIL_BYTES, 1000, 3 * BLOCK_BYTES + 7, 5 * BLOCK_BYTES - 3):
        assert content.pread(300, offset) == data[offset : offset + 300]
    assert content.pread(300, 9 * BLOCK_BYTES) == b""
    assert content.state() == (len(data), 0)


@compressed
def test_reading_on_does_not_unpack_from_the_beginning(
    open_file: Open, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks one after the other, each with the tail before its end (case 27)."""
    data, starts = noise(3 * BLOCK_BYTES), 0
    begin = CompressedContent._begin

    def count(self: CompressedContent) -> None:
        nonlocal starts
        starts += 1
        begin(self)

    monkeypatch.setattr(CompressedContent, "_begin", count)
    content = open_file(pack(data))
    for offset in range(0, len(data), BLOCK_BYTES // 2):
        assert content.pread(BLOCK_BYTES // 2, offset) == data[offset : offset + BLOCK_BYTES // 2]
        assert content.tail(offset) == data[max(0, offset - TAIL_BYTES) : offset]
        assert content.head() == Sample.of(data[: data.find(b"\n") + 1])
    assert starts == 1


@pytest.mark.parametrize(("pack", "mebibytes", "at_most"), [(PACKS["gzip"], 32, 64), (PACKS["zstd"], 64, 136)])
def test_memory_does_not_grow_with_the_content(open_file: Open, pack: Pack, mebibytes: int, at_most: int) -> None:
    """It is what one step unpacks, a few times, however long the content is (cases 27, 29)."""
    content = open_file(pack(bytes(mebibytes * BLOCK_BYTES)))
    tracemalloc.start()
    try:
        for block in range(0, mebibytes, 16):
            assert len(content.pread(BLOCK_BYTES, block * BLOCK_BYTES)) == BLOCK_BYTES
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < at_most * BLOCK_BYTES


@every
@pytest.mark.parametrize(
    ("data", "head"),
    [
        (b"", b""),
        (b"no end yet", b""),
        (b"one\ntwo\n", b"one\n"),
        (b"x" * (HEAD_BYTES - 1) + b"\n", b"x" * (HEAD_BYTES - 1) + b"\n"),
        (b"x" * (HEAD_BYTES + 9) + b"\n", b"x" * HEAD_BYTES),
    ],
    ids=["empty", "partial", "short", "at the limit", "long"],
)
def test_the_head_is_that_of_the_plain_file(open_file: Open, pack: Pack, data: bytes, head: bytes) -> None:
    """By which a compressed log is known again (case 27)."""
    assert open_file(pack(data)).head() == Sample.of(head)


@every
def test_what_was_read_of_a_file_is_found_in_it(open_file: Open, pack: Pack) -> None:
    """At every position, in the plain file and what it was compressed to (cases 8, 27)."""
    data = b"first\n" + noise(9000)
    content = open_file(pack(data))
    for position in (0, 1, 6, 5000, len(data)):
        assert content.holds(record_of(content, data, position))
        assert content.has_more_than(position) == (position < len(data))
        assert content.tail(position) == data[max(0, position - TAIL_BYTES) : position]


@every
def test_other_content_is_told_apart(open_file: Open, pack: Pack) -> None:
    """By its beginning, by what stands before the position, and by being shorter (cases 12, 15)."""
    data = b"first\n" + noise(9000)
    original = open_file(pack(data))
    record = record_of(original, data, 8000)
    assert original.holds(record)
    for other in (
        b"FIRST\n" + data[6:],
        data[:7990] + b"X" + data[7991:],
        data[:7999],
        data[:100],
        b"",
        data[1:],
    ):
        assert not open_file(pack(other)).holds(record)
    assert open_file(pack(data[:8000])).holds(record)


def test_the_state_of_a_plain_file_tells_every_change(open_file: Open, tmp_path: Path) -> None:
    """(case 1)"""
    content = open_file(b"one\n")
    before = content.state()
    assert before[0] == 4 == content.stamp().size
    with (tmp_path / "0").open("ab") as file:
        file.write(b"two\n")
    os.utime(tmp_path / "0", ns=(5, 5))
    assert content.state() == (8, 5) != before
    assert content.stamp() == (8, 5)
    assert content.identity == (os.stat(tmp_path / "0").st_dev, os.stat(tmp_path / "0").st_ino)


@compressed
def test_the_length_of_compressed_content_is_known_at_its_end(open_file: Open, pack: Pack) -> None:
    data = noise(3 * BLOCK_BYTES)
    content = open_file(pack(data))
    assert content.state() == (NOT_KNOWN_BYTES, 0)
    content.pread(1, len(data))
    assert content.state() == (len(data), 0)
    assert content.stamp().size == os.fstat(content.fd).st_size != len(data)


@every
def test_the_end_of_the_lines_is_behind_the_last_newline(open_file: Open, pack: Pack) -> None:
    for data in (b"", b"torn", b"one\n", b"one\ntorn", b"one\n" + b"x" * 2 * BLOCK_BYTES):
        content = open_file(pack(data))
        content.pread(1, len(data))
        assert end_of_lines(content) == data.rfind(b"\n") + 1


@compressed
def test_a_damaged_file_has_its_beginning_and_says_why_not_more(open_file: Open, pack: Pack) -> None:
    """(case 29)"""
    data = noise(400_000)
    packed = pack(data)
    content = open_file(packed[: len(packed) // 2])
    assert content.damage is None  # its end was not reached
    got = content.pread(len(data), 0)
    assert content.damage == "it ends in the middle"
    assert data.startswith(got) and len(got) > HEAD_BYTES
    assert content.has_more_than(len(got))
    assert content.holds(record_of(content, data, len(got)))
    assert not content.holds(record_of(content, data, len(got) + 1))
    assert content.pread(50, 10) == data[10:60]
    assert content.pread(50, len(got) - 20) == got[-20:]
    assert content.damage == "it ends in the middle"


@compressed
def test_damage_before_the_first_line_is_damage(open_file: Open, pack: Pack) -> None:
    """Nothing unpacks, nothing is known of it, and it is not taken for an empty log (case 29)."""
    content = open_file(pack(noise(3000))[:9])
    assert content.head() == Sample()
    assert content.damage == "it ends in the middle"
    assert content.has_more_than(0)
    empty = open_file(pack(b""))
    assert (empty.head(), empty.damage, empty.has_more_than(0)) == (Sample(), None, False)


@pytest.mark.parametrize("data", [b"", b"\x1f", b"plain\n", b"\x28\xb5\x2f"])
def test_a_file_is_compressed_by_what_it_begins_with(open_file: Open, data: bytes) -> None:
    """(case 29)"""
    content = open_file(data)
    assert (type(content), content.pread(9, 0)) == (Content, data)


def test_a_file_that_can_not_be_read_stays_its_openers(tmp_path: Path) -> None:
    """The descriptor is taken over only when all went well."""
    (tmp_path / "log").write_bytes(b"one\n")
    fd = os.open(tmp_path / "log", os.O_WRONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        open_content(fd)
    os.close(fd)
