"""One open file: blocks of whole lines, and knowing its content again. Numbers are those of the cases."""

import os
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metershipper import content as content_module
from metershipper import followed
from metershipper.content import BLOCK_BYTES, HEAD_BYTES, TAIL_BYTES, Content, end_of_lines
from metershipper.followed import Block, FollowedFile
from metershipper.lines import KEPT_OF_OVERLONG_LINE_BYTES, Overlong
from metershipper.records import Sample, StoredFile

Follow = Callable[..., FollowedFile]
LIMIT = 4 * BLOCK_BYTES


@pytest.fixture
def follow(tmp_path: Path) -> Iterator[Follow]:
    """Opens `tmp_path/log`, holding `data`, the way the file set does."""
    opened: list[FollowedFile] = []

    def open_log(data: bytes, offset: int = 0) -> FollowedFile:
        path = tmp_path / "log"
        path.write_bytes(data)
        content = Content(os.open(path, os.O_RDWR))
        opened.append(FollowedFile(1, str(path), content, offset, content.tail(offset), content.head()))
        return opened[-1]

    yield open_log
    for file in opened:
        file.content.close()


def blocks_of(file: FollowedFile, max_line_bytes: int = LIMIT) -> list[Block]:
    found = []
    while (block := file.read_block(max_line_bytes)) is not None:
        found.append(block)
    return found


@given(data=st.lists(st.sampled_from([b"", b"\n", b"x\n", b"yy" * 9, b"z" * 40 + b"\n"]), max_size=40).map(b"".join))
def test_blocks_are_the_whole_lines_of_the_file_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    """Together they are the bytes up to the last newline, in order and without a gap (case 2)."""
    path = tmp_path_factory.getbasetemp() / "any.log"
    path.write_bytes(data)
    file = FollowedFile(1, str(path), Content(os.open(path, os.O_RDONLY)), 0, b"", Sample())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(followed, "BLOCK_BYTES", 16)
        patch.setattr(content_module, "BLOCK_BYTES", 16)
        blocks = blocks_of(file)
        whole = data[: data.rfind(b"\n") + 1]
        assert b"".join(block.data for block in blocks) == whole
        assert end_of_lines(file.content) == file.offset == len(whole)
    assert [block.start_offset for block in blocks] == [0, *(block.end_offset for block in blocks)][: len(blocks)]
    assert all(block.tail == block.data[-TAIL_BYTES:] for block in blocks)
    file.content.close()


@pytest.mark.parametrize("length", [LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + BLOCK_BYTES])
def test_the_limit_of_a_line_counts_its_newline(follow: Follow, length: int) -> None:
    """At the limit a line is whole, above it its beginning is kept; the next line is intact (case 21)."""
    line = b"x" * (length - 1) + b"\n"
    first, second = blocks_of(follow(line + b"next\n"))
    if length <= LIMIT:
        assert (first.overlong, first.data + second.data) == (None, line + b"next\n")
    else:
        head = line[:KEPT_OF_OVERLONG_LINE_BYTES]
        assert (first.data, first.overlong) == (b"", Overlong(length - 1, sha256(line[:-1]).hexdigest(), head))
        assert first.tail == line[-TAIL_BYTES:]
        assert (second.data, second.start_offset) == (b"next\n", length)


def test_an_overlong_line_whose_end_is_not_there_is_searched_on(follow: Follow) -> None:
    """Not from its beginning each time, and not past its end (case 21)."""
    file = follow(b"x" * (LIMIT + 5))
    assert file.read_block(LIMIT) is None
    assert not file.grew()
    os.pwrite(file.content.fd, b"yy\nnext\n", LIMIT + 5)
    assert file.grew()
    assert [block.end_offset for block in blocks_of(file)] == [LIMIT + 8, LIMIT + 13]


def test_an_unchanged_file_is_not_read_again(follow: Follow) -> None:
    file = follow(b"one\nhalf")
    assert [block.data for block in blocks_of(file)] == [b"one\n"]
    assert file.read_block(LIMIT) is None
    assert (file.grew(), file.size_seen, file.was_replaced()) == (False, 8, False)


@pytest.mark.parametrize(
    ("content", "replaced"),
    [
        (b"first\nsecond\n", False),
        (b"first\nsecond\nthird\n", False),
        (b"", True),
        (b"first\n", True),
        (b"other\nSECOND\n", True),
        (b"other\nsecond\n", True),
        (b"first\nSECOND\n", True),
        (b"first\nSECOND\nthird\n", True),
    ],
)
def test_other_content_is_noticed_by_head_and_tail(follow: Follow, content: bytes, replaced: bool) -> None:
    """Whatever its size (cases 12, 13)."""
    file = follow(b"first\nsecond\n", offset=6)
    file.read_block(LIMIT)
    os.ftruncate(file.content.fd, 0)
    os.pwrite(file.content.fd, content, 0)
    os.utime(file.content.fd, ns=(1, 1))
    assert file.was_replaced() is replaced


def test_a_rest_is_what_no_newline_ends(follow: Follow) -> None:
    """(case 3)"""
    file = follow(b"one\nhalf")
    blocks_of(file)
    rest = file.read_rest(LIMIT)
    assert rest is not None
    assert (rest.data, rest.start_offset, rest.end_offset, rest.tail) == (b"half", 4, 8, b"half")
    assert file.read_rest(LIMIT) is None


def test_a_rest_above_the_limit_is_overlong(follow: Follow) -> None:
    """(cases 3, 21)"""
    file = follow(b"one\n" + b"x" * LIMIT)
    blocks_of(file)
    rest = file.read_rest(LIMIT)
    assert rest is not None
    assert (rest.data, rest.end_offset) == (b"", 4 + LIMIT)
    assert rest.overlong == Overlong(LIMIT, sha256(b"x" * LIMIT).hexdigest(), b"x" * KEPT_OF_OVERLONG_LINE_BYTES)


@pytest.mark.parametrize(
    ("content", "head"),
    [
        (b"", b""),
        (b"no end yet", b""),
        (b"one\ntwo\n", b"one\n"),
        (b"x" * HEAD_BYTES, b"x" * HEAD_BYTES),
        (b"x" * (HEAD_BYTES + 9) + b"\n", b"x" * HEAD_BYTES),
    ],
)
def test_the_head_is_the_first_line_or_as_much_as_is_sampled_of_it(follow: Follow, content: bytes, head: bytes) -> None:
    """It is not known before it can't change any more (cases 14, 16)."""
    assert follow(content).content.head() == Sample.of(head)


def test_a_record_holds_as_long_as_head_and_tail_are_there(follow: Follow) -> None:
    """(cases 12, 14, 26)"""
    file = follow(b"first\nsecond\n")
    block = file.read_block(LIMIT)
    assert block is not None
    record = file.record()
    assert record == StoredFile(1, file.path, *file.identity, Sample.of(b"first\n"), Sample.of(b"first\nsecond\n"), 13)
    assert file.content.holds(record)
    os.pwrite(file.content.fd, b"more", 13)
    assert file.content.holds(record)
    for content in (b"first\nSECOND\nmore", b"FIRST\nsecond\nmore", b"first\nsecond"):
        os.ftruncate(file.content.fd, 0)
        os.pwrite(file.content.fd, content, 0)
        assert not file.content.holds(record)
