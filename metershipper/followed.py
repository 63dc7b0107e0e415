"""One followed file: its lines in large blocks of whole lines, and how far they were read.

Blocks while it reads; `tailer` calls it off the event loop. What the file holds is `content`. Never parses a line,
never looks for files. Memory is bounded whatever a line's length: one above the limit is stepped over and described,
and so are NULs, which a crash of the writer's machine or a sparse file leave.
"""

import os
from dataclasses import dataclass, replace

from metershipper.archive import Damaged
from metershipper.content import BLOCK_BYTES, TAIL_BYTES, Content
from metershipper.formats import Format, complete_lines
from metershipper.lines import Overlong, Skimmed, whole_lines
from metershipper.records import Identity, Sample, Stamp, StoredFile

# NULs within a line, and this many of them: what stands before is torn and will never be completed.
_NUL_RUN = bytes(4096)
_ZEROS = bytes(BLOCK_BYTES)
# A line that does not fit into what was read is read again with so many times as much.
_GROWTH = 4


@dataclass(frozen=True, slots=True)
class Block:
    """Whole lines of one file, in `format`; the last one may lack its newline where nothing more will come.

    When there is no `data`, it is one `overlong` line, or so many `nul_bytes`.
    """

    file_id: int
    start_offset: int
    end_offset: int
    data: bytes
    tail: bytes
    overlong: Overlong | None = None
    nul_bytes: int = 0
    format: Format = "auto"


@dataclass(slots=True, eq=False)
class FollowedFile:
    """One open file. `path`: of the log that it is a part of. `offset`: where the next line begins, in bytes.

    Times are those of a monotonic clock, in seconds. `came_to_rest`: it was rotated, and for a while nothing was
    written to it. `found_at`, `stamp`: its path and what it was when it was opened.
    """

    file_id: int
    path: str
    content: Content
    offset: int
    tail: bytes
    head: Sample
    rotated: bool = False
    format: Format = "auto"
    rotated_at: float = 0.0
    active_at: float = 0.0
    shrunk_at: float | None = None
    came_to_rest: bool = False
    found_at: str = ""
    stamp: Stamp | None = None
    seen_bytes: int | None = None  # see `StoredFile`
    size_bytes: int = 0  # when it was last looked at; 0 of a compressed file
    _seen: tuple[int, int] = (-1, -1)  # the content's state when there was nothing more to read
    _skimmed: Skimmed | None = None

    @property
    def identity(self) -> Identity:
        """Device and inode."""
        return self.content.identity

    # Reading

    def read_block(self, max_line_bytes: int) -> Block | None:
        """The next whole lines; None at the end, also before an unfinished line. Check `was_replaced` first.

        Raises: OSError; Damaged behind the last line that could be unpacked.
        """
        state = self.content.state()
        if self._skimmed is not None:
            return self._step_over(self._skimmed)
        if state == self._seen or state[0] <= self.offset:
            self._seen = state
            return None
        wanted = BLOCK_BYTES
        while True:
            data = self.content.pread(wanted, self.offset)
            if data.startswith(b"\0") and (block := self._nuls(data, wanted)) is not None:
                return block
            at_the_limit = wanted >= max_line_bytes and len(data) == wanted
            # A container's record above the limit is torn into its lines.
            length = complete_lines(data, self.format) or (whole_lines(data) if at_the_limit else 0)
            if length:
                return self._advance(data[:length] if length < len(data) else data, length)
            if at_the_limit:
                return self._begin_to_step_over(data)
            if len(data) < wanted:
                self._note_end()
                return None
            wanted = min(wanted * _GROWTH, max_line_bytes)

    def _note_end(self) -> None:
        """There is nothing more to read for now. Raises Damaged where that is not the end."""
        if self.content.damage is not None:
            raise Damaged(self.content.damage)
        self._seen = self.content.state()

    def _nuls(self, data: bytes, wanted: int) -> Block | None:
        """Step over NULs where a line should begin; not at the end of the file, where they may not stay."""
        length = len(data) if data == _ZEROS else len(data) - len(data.lstrip(b"\0"))
        if length == len(data) < wanted:
            return None
        return self._advance(b"", length, nul_bytes=length)

    def _begin_to_step_over(self, data: bytes) -> Block | None:
        torn = data.find(_NUL_RUN)
        if torn > 0:
            return self._advance(data[:torn], torn)
        self._skimmed = Skimmed()
        self._skimmed.add(data)
        return self._step_over(self._skimmed)

    def _step_over(self, skimmed: Skimmed) -> Block | None:
        """Read a line that is too long to its end, in bounded memory; None while its end is not there yet."""
        while data := self.content.pread(BLOCK_BYTES, self.offset + skimmed.length):
            newline, torn = data.find(b"\n"), data.find(_NUL_RUN)
            end = min((at for at in (newline, torn) if at >= 0), default=-1)
            if end >= 0:
                skimmed.add(data[:end])
                return self._skip(skimmed, 1 if end == newline else 0)
            skimmed.add(data)
        self._note_end()
        return None

    def _skip(self, skimmed: Skimmed, newline_bytes: int) -> Block:
        return self._advance(b"", skimmed.length + newline_bytes, overlong=skimmed.ended())

    def read_rest(self, max_line_bytes: int) -> Block | None:
        """An unfinished last line, of a file that will not grow any more. Raises OSError."""
        if self._skimmed is not None:
            return self._skip(self._skimmed, 0)
        data = self.content.pread(max_line_bytes, self.offset)
        if data and not data.strip(b"\0"):
            return self._advance(b"", len(data), nul_bytes=len(data))
        return self._advance(data, len(data)) if data else None

    def _advance(self, data: bytes, length: int, *, overlong: Overlong | None = None, nul_bytes: int = 0) -> Block:
        start, end = self.offset, self.offset + length
        # First: should it fail, nothing has moved.
        tail = self.content.tail(end) if length > len(data) else data[-TAIL_BYTES:]
        self.offset, self.tail, self._skimmed = end, tail, None
        return Block(self.file_id, start, self.offset, data, self.tail, overlong, nul_bytes, self.format)

    # What happened to the file

    def shrank(self) -> bool:
        """Whether the file is shorter than what was read of it, but still begins as it did.

        A stale size, as a network file system may report for a while, or a truncation that kept the beginning.
        """
        size = self.content.state()[0]
        return 0 < self.head.length <= size < self.offset and self._has_its_head()

    def was_replaced(self) -> bool:
        """Whether the file holds other content now: truncated, perhaps grown again. If not, see how long it is.

        Raises: OSError.
        """
        state = self.content.state()
        if state[0] < self.offset or (state[0] < self.size_bytes and not self.head.length):
            return True
        if state == self._seen or self.content.compressed:
            return False
        if self.offset and self.content.pread(len(self.tail), self.offset - len(self.tail)) != self.tail:
            return True
        if not self._has_its_head():
            return True
        self.size_bytes = state[0]
        return False

    def has_a_name(self) -> bool:
        """Whether a directory still lists it; also when that can't be told."""
        try:
            return os.fstat(self.content.fd).st_nlink > 0
        except OSError:
            return True

    def _has_its_head(self) -> bool:
        return Sample.of(self.content.pread(self.head.length, 0)) == self.head

    def start_at(self, offset: int, head: Sample) -> None:
        """Read on at `offset`, of content whose beginning is `head`."""
        self.offset, self.head, self.tail = offset, head, b""
        self._skimmed, self._seen, self.size_bytes, self.seen_bytes = None, (-1, -1), 0, None

    def go_on_in(self, content: Content) -> None:
        """Read on in another file that holds the same content."""
        self.content, self.rotated, self.came_to_rest = content, False, False
        self._skimmed, self._seen, self.seen_bytes = None, (-1, -1), None

    def grew(self) -> bool:
        """Whether there is more than when it was read to its end. Raises OSError."""
        return self.content.state() != self._seen

    @property
    def is_read(self) -> bool:
        """Whether it was read to its end, but for an unfinished line."""
        return self._seen != (-1, -1)

    @property
    def size_seen(self) -> int:
        """How long the file was when it was last looked at, and at least what was read of it."""
        return max(self.size_bytes, self._seen[0], self.offset)

    def record(self) -> StoredFile:
        """What is known of the file now, as the checkpoint would know it once all that was read is settled."""
        record = StoredFile(self.file_id, self.path, *self.identity, self.head, Sample.of(self.tail), self.offset)
        stamp = self.stamp if self.seen_bytes is not None else None
        return replace(record, compressed=self.content.compressed, seen_bytes=self.seen_bytes, stamp=stamp)
