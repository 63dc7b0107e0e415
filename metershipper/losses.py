"""What can't be read any more, told once and remembered: a log's content that vanished or was cut off unread.

Owns the waiting before an alarm. Never looks for files: `files` says what is missing, and what was found again.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from metershipper.records import Gap, Lost, StoredFile

log = logging.getLogger("metershipper.tailer")

# Rotation takes time: between a rename and its copy, or its compressed file, content may be nowhere for a moment.
PATIENCE_SECONDS = 10.0


class GapBook(Protocol):
    """Where gaps are kept; the checkpoint's part for this module."""

    def gaps(self) -> list[Gap]: ...
    def report_gap(self, gap: Gap) -> None: ...
    def withdraw_gap(self, file_id: int) -> None: ...


@dataclass(slots=True)
class Losses:
    """The gaps of all files. `clock` is monotonic, `wall_clock` counts from the epoch; both in seconds."""

    book: GapBook
    clock: Callable[[], float]
    wall_clock: Callable[[], float]
    _gaps: dict[int, Gap] = field(default_factory=dict)
    _missing_since: dict[int, float] = field(default_factory=dict)

    def load(self) -> None:
        """Read what is known already."""
        self._gaps = {gap.file_id: gap for gap in self.book.gaps()}

    def missing(self, records: Sequence[tuple[StoredFile, Lost]]) -> None:
        """These files held more, or may have, and it can't be read: report what was so for long enough."""
        now = self.clock()
        since = {record.file_id: self._missing_since.get(record.file_id, now) for record, _ in records}
        for record, reason in records:
            if now - since[record.file_id] >= PATIENCE_SECONDS:
                self.report(record, reason)
        self._missing_since = since

    @property
    def is_waiting(self) -> bool:
        """Whether something is missing that was not reported yet, or not found again."""
        return bool(self._missing_since)

    def report(self, record: StoredFile, reason: Lost) -> None:
        """Remember that nothing can be read of a file behind its position, and say so."""
        gap = Gap(record.file_id, record.path, record.position, record.seen_bytes, reason, self.wall_clock())
        known = self._gaps.get(gap.file_id)
        if known is not None and replace(known, found_at=gap.found_at) == gap:
            return
        self.book.report_gap(gap)
        self._gaps[gap.file_id] = gap
        log.error("%s", describe(gap))

    def found(self, record: StoredFile, *, complete: bool = False) -> None:
        """The file's content is there, as far as it was read; `complete`: to its end."""
        gap = self._gaps.get(record.file_id)
        if gap is not None and (complete or gap.reason is not Lost.DAMAGED):
            self.book.withdraw_gap(record.file_id)
            del self._gaps[record.file_id]
            log.info("%s: what was missing from byte %d on is there again", record.path, gap.start_offset)


def describe(gap: Gap) -> str:
    """A gap in one sentence."""
    if gap.end_offset is None:
        much = f"whatever came after byte {gap.start_offset}"
    else:
        much = f"{gap.end_offset - gap.start_offset} bytes from byte {gap.start_offset} on"
    why = {
        Lost.VANISHED: "the file is gone, and no file holds its content",
        Lost.TRUNCATED: "other content took its place, and no copy holds it",
        Lost.DAMAGED: "the compressed file does not unpack any further",
    }[gap.reason]
    return f"{gap.path}: {much} can't be read any more: {why}"
