"""One open log file: reading it in large blocks of whole lines, and knowing its content again.

Blocks while it reads; `tailer` calls it off the event loop. Content is known by two samples: the first line (head) and
the bytes just before the offset (tail). A rename changes neither. Never parses a line, never looks for files.
"""

import os
from dataclasses import dataclass

from metershipper.lines import first_line, whole_lines
from metershipper.records import Identity, Sample, StoredFile

BLOCK_BYTES = 1024 * 1024
MAX_LINE_BYTES = 16 * 1024 * 1024
# A first line longer than this is sampled up to here: entries of one route look alike for a few kilobytes.
HEAD_BYTES = 16 * 1024
TAIL_BYTES = 256
KEPT_OF_OVERLONG_LINE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Block:
    """Whole lines of one file. When `overlong`, one line that is too long: `data` is its beginning only."""

    file_id: int
    start_offset: int
    end_offset: int
    data: bytes
    tail: bytes
    overlong: bool = False


@dataclass(slots=True, eq=False)
class FollowedFile:
    """One open file. `offset` is where the next line begins, in bytes."""

    file_id: int
    path: str
    fd: int
    identity: Identity
    offset: int
    tail: bytes
    head: Sample
    rotated: bool = False
    active_at: float = 0.0
    _seen: tuple[int, int] = (-1, -1)  # size and mtime when there was nothing more to read
    _searched: int = 0  # of an overlong line: how far its end was looked for

    def read_block(self, max_line_bytes: int) -> Block | None:
        """The next whole lines; None at the end, also before an unfinished line. Check `was_replaced` first."""
        size, mtime = self._stat()
        if (size, mtime) == self._seen or size <= self.offset:
            self._seen = (size, mtime)
            return None
        wanted = BLOCK_BYTES
        while True:
            data = os.pread(self.fd, wanted, self.offset)
            length = whole_lines(data)
            if length:
                return self._advance(data[:length] if length < len(data) else data, length)
            if wanted >= max_line_bytes and len(data) == wanted:
                return self._read_overlong(data[:KEPT_OF_OVERLONG_LINE_BYTES], wanted)
            if len(data) < wanted:
                self._seen = (size, mtime)
                return None
            wanted = min(wanted * 4, max_line_bytes)

    def has_unread_lines(self) -> bool:
        """Whether the file grew since it was read to its end."""
        return self._stat() != self._seen

    def read_rest(self, max_line_bytes: int) -> Block | None:
        """An unfinished last line, of a file that will not grow any more."""
        length = self._stat()[0] - self.offset
        if length > max_line_bytes:
            kept = os.pread(self.fd, KEPT_OF_OVERLONG_LINE_BYTES, self.offset)
            return self._advance(kept, length, overlong=True)
        data = os.pread(self.fd, max_line_bytes, self.offset)
        return self._advance(data, len(data)) if data else None

    def start_at(self, offset: int, head: Sample) -> None:
        """Read on at `offset`, of content whose beginning is `head`."""
        self.offset, self.head, self.tail, self._searched, self._seen = offset, head, b"", 0, (-1, -1)

    def was_replaced(self) -> bool:
        """Whether the file holds other content now: truncated, perhaps grown again."""
        size, mtime = self._stat()
        if size < self.offset:
            return True
        if (size, mtime) == self._seen:
            return False
        if os.pread(self.fd, len(self.tail), self.offset - len(self.tail)) != self.tail:
            return True
        return Sample.of(os.pread(self.fd, self.head.length, 0)) != self.head

    def unread_bytes(self) -> int:
        """Bytes that were seen in the file and not read, as of the last look."""
        return max(0, self._seen[0] - self.offset)

    def close(self) -> None:
        """Let the file go."""
        os.close(self.fd)

    def _stat(self) -> tuple[int, int]:
        status = os.fstat(self.fd)
        return status.st_size, status.st_mtime_ns

    def _advance(self, data: bytes, length: int, *, overlong: bool = False) -> Block:
        start, self.offset = self.offset, self.offset + length
        self.tail = os.pread(self.fd, TAIL_BYTES, self.offset - TAIL_BYTES) if overlong else data[-TAIL_BYTES:]
        self._searched = 0
        return Block(self.file_id, start, self.offset, data, self.tail, overlong)

    def _read_overlong(self, head: bytes, searched: int) -> Block | None:
        """Step over a line that is too long, in bounded memory; None while its newline is not there yet."""
        self._searched = max(self._searched, searched)
        while data := os.pread(self.fd, BLOCK_BYTES, self.offset + self._searched):
            newline = data.find(b"\n")
            if newline >= 0:
                return self._advance(head, self._searched + newline + 1, overlong=True)
            self._searched += len(data)
        self._seen = self._stat()
        return None

    def record(self) -> StoredFile:
        """What is known of the file now, as the checkpoint would know it once all that was read is settled."""
        return StoredFile(self.file_id, self.path, *self.identity, self.head, Sample.of(self.tail), self.offset)


def read_head(fd: int) -> Sample:
    """The sample of a file's first line, or of its first bytes when that is long; empty before either is there."""
    data = os.pread(fd, HEAD_BYTES, 0)
    return Sample.of(first_line(data) or (data if len(data) == HEAD_BYTES else b""))


def holds(fd: int, record: StoredFile) -> bool:
    """Whether the open file still holds what was read of it: its head, and the bytes just before the position."""
    if os.fstat(fd).st_size < record.position:
        return False
    head = os.pread(fd, record.head.length, 0)
    tail = os.pread(fd, record.tail.length, record.position - record.tail.length)
    return Sample.of(head) == record.head and Sample.of(tail) == record.tail


def end_of_lines(fd: int) -> int:
    """The offset after the last complete line of a file."""
    end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - BLOCK_BYTES)
        length = whole_lines(os.pread(fd, end - start, start))
        if length:
            return start + length
        end = start
    return 0


def is_copy(fd: int, size: int, head: Sample, known: StoredFile) -> bool:
    """Whether the open file holds what was read of a known one, or, while it is being copied, its beginning."""
    return known.head == head and (size < known.position or holds(fd, known))
