"""What can't be read any more: waited for, told once, and taken back. Numbers are those of the cases."""

import logging
from dataclasses import dataclass, field

import pytest

from metershipper.losses import PATIENCE_SECONDS, Losses, describe
from metershipper.records import Gap, Lost, Sample, StoredFile


@dataclass
class Book:
    """Gaps as the checkpoint keeps them; `full` makes writing fail."""

    kept: dict[int, Gap] = field(default_factory=dict)
    written: int = 0
    full: bool = False

    def gaps(self) -> list[Gap]:
        return list(self.kept.values())

    def report_gap(self, gap: Gap) -> None:
        if self.full:
            raise OSError("disk full")
        self.written += 1
        self.kept[gap.file_id] = gap

    def withdraw_gap(self, file_id: int) -> None:
        del self.kept[file_id]


@dataclass
class Clock:
    now: float = 50.0

    def __call__(self) -> float:
        return self.now


def losses_of(book: Book, clock: Clock) -> Losses:
    losses = Losses(book, clock, lambda: 1.7e9)
    losses.load()
    return losses


def stored(file_id: int = 1, position: int = 10, seen: int | None = None, inode: int | None = 7) -> StoredFile:
    return StoredFile(file_id, "usage.log", 1 if inode else None, inode, Sample(), Sample(), position, seen_bytes=seen)


def kinds(*records: StoredFile) -> list[tuple[StoredFile, Lost]]:
    """What is said of files that are missing."""
    return [(record, Lost.TRUNCATED if record.identity is None else Lost.VANISHED) for record in records]


def test_what_is_missing_is_told_after_a_while_and_once(caplog: pytest.LogCaptureFixture) -> None:
    """A rotation takes time; an alarm for each would teach nobody anything (cases 9, 17)."""
    book, clock = Book(), Clock()
    losses = losses_of(book, clock)
    for _ in range(3):
        losses.missing(kinds(stored(seen=25)))
        assert losses.is_waiting and not book.kept
        clock.now += (PATIENCE_SECONDS - 1) / 3
    clock.now += 1
    for _ in range(3):
        losses.missing(kinds(stored(seen=25)))
        clock.now += 1000
    assert book.gaps() == [Gap(1, "usage.log", 10, 25, Lost.VANISHED, 1.7e9)]
    assert book.written == 1
    assert caplog.messages == [
        "usage.log: 15 bytes from byte 10 on can't be read any more: the file is gone, and no file holds its content"
    ]


def test_what_is_found_in_time_is_never_told() -> None:
    """And has all the time again when it is missing another time (case 27)."""
    book, clock = Book(), Clock()
    losses = losses_of(book, clock)
    for _ in range(5):
        losses.missing(kinds(stored()))
        clock.now += PATIENCE_SECONDS - 1
        losses.missing([])
        assert not losses.is_waiting
    assert not book.kept


def test_each_file_has_its_own_time() -> None:
    book, clock = Book(), Clock()
    losses = losses_of(book, clock)
    losses.missing(kinds(stored(1)))
    clock.now += PATIENCE_SECONDS - 1
    losses.missing(kinds(stored(1), stored(2, inode=None)))
    clock.now += 1
    losses.missing(kinds(stored(1), stored(2, inode=None)))
    assert list(book.kept) == [1]
    clock.now += PATIENCE_SECONDS
    losses.missing(kinds(stored(1), stored(2, inode=None)))
    assert [gap.reason for gap in book.gaps()] == [Lost.VANISHED, Lost.TRUNCATED]


def test_a_gap_is_known_after_a_restart_and_not_told_anew(caplog: pytest.LogCaptureFixture) -> None:
    """(case 9)"""
    book, clock = Book(), Clock()
    losses_of(book, clock).report(stored(), Lost.DAMAGED)
    again = losses_of(book, clock)
    again.report(stored(), Lost.DAMAGED)
    assert (book.written, len(caplog.messages)) == (1, 1)
    again.report(stored(position=15), Lost.DAMAGED)
    assert [gap.start_offset for gap in book.gaps()] == [15]
    assert len(caplog.messages) == 2


@pytest.mark.parametrize(
    ("reason", "complete", "withdrawn"),
    [
        (Lost.VANISHED, False, True),
        (Lost.TRUNCATED, False, True),
        (Lost.DAMAGED, False, False),
        (Lost.DAMAGED, True, True),
        (Lost.VANISHED, True, True),
    ],
)
def test_what_is_found_again_is_taken_back(
    caplog: pytest.LogCaptureFixture, reason: Lost, complete: bool, withdrawn: bool
) -> None:
    """A damaged file that is there is still damaged, until it is read to its end (cases 9, 29)."""
    caplog.set_level(logging.INFO)
    book = Book()
    losses = losses_of(book, Clock())
    losses.report(stored(), reason)
    losses.found(stored(2))
    losses.found(stored(), complete=complete)
    assert bool(book.kept) != withdrawn
    assert ("usage.log: what was missing from byte 10 on is there again" in caplog.messages) == withdrawn
    losses.found(stored(), complete=complete)


def test_a_gap_that_can_not_be_written_is_told_when_it_can() -> None:
    """(case 33)"""
    book, clock = Book(full=True), Clock()
    losses = losses_of(book, clock)
    losses.missing(kinds(stored()))
    clock.now += PATIENCE_SECONDS
    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            losses.missing(kinds(stored()))
    book.full = False
    losses.missing(kinds(stored()))
    assert list(book.kept) == [1]


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        (
            Gap(1, "a.log", 7, None, Lost.VANISHED, 0.0),
            "a.log: whatever came after byte 7 can't be read any more: the file is gone, and no file holds its content",
        ),
        (
            Gap(1, "a.log", 7, 9, Lost.TRUNCATED, 0.0),
            "a.log: 2 bytes from byte 7 on can't be read any more: other content took its place, and no copy holds it",
        ),
        (
            Gap(1, "a.log.1.gz", 0, None, Lost.DAMAGED, 0.0),
            "a.log.1.gz: whatever came after byte 0 can't be read any more: "
            "the compressed file does not unpack any further",
        ),
    ],
)
def test_a_gap_is_one_sentence(gap: Gap, words: str) -> None:
    assert describe(gap) == words
