"""What an open file holds, plain or compressed, and whether it is what was read before.

Content is known by two samples: its beginning (head) and the bytes just before a position (tail). A rename, a copy, a
remount and compression change neither; offsets are those of the content, not of the file. Blocks while it reads. Never
looks for files and never decides what a match means.
"""

import os
import sys

from metershipper.archive import (
    GZIP_SIZE_MODULUS,
    MAGIC_BYTES,
    Compression,
    Damaged,
    compression_of,
    declared_size,
    unpack,
)
from metershipper.lines import first_line, whole_lines
from metershipper.records import Identity, Sample, Stamp, StoredFile

BLOCK_BYTES = 1024 * 1024
# A first line longer than this is sampled up to here: entries of one route look alike for a few kilobytes.
HEAD_BYTES = 16 * 1024
TAIL_BYTES = 256
# What a compressed file's length is said to be before its end was reached.
NOT_KNOWN_BYTES = sys.maxsize


class Content:
    """An open file that is not compressed. Owns its descriptor."""

    compressed = False
    damage: str | None = None

    def __init__(self, fd: int) -> None:
        self.fd = fd
        status = os.fstat(fd)
        self.identity: Identity = (status.st_dev, status.st_ino)

    def pread(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes at `offset`; less only at the end. Raises OSError."""
        return os.pread(self.fd, size, offset)

    def state(self) -> tuple[int, int]:
        """Length in bytes and time of the last change: while neither changes, there is nothing new to read."""
        status = os.fstat(self.fd)
        return status.st_size, status.st_mtime_ns

    def head(self) -> Sample:
        """The sample of the first line, or of the first bytes when that is long; empty before either is there."""
        data = self.pread(HEAD_BYTES, 0)
        return Sample.of(first_line(data) or (data if len(data) == HEAD_BYTES else b""))

    def tail(self, position: int) -> bytes:
        """The bytes just before `position`, which `StoredFile.tail` is a sample of."""
        length = min(TAIL_BYTES, position)
        return self.pread(length, position - length)

    def holds(self, record: StoredFile) -> bool:
        """Whether this is what was read before: its head, and the bytes just before the position.

        Something compressed is unpacked up to the position for it, if its head is the one.
        """
        if self.state()[0] < record.position or Sample.of(self.pread(record.head.length, 0)) != record.head:
            return False
        return Sample.of(self.pread(record.tail.length, record.position - record.tail.length)) == record.tail

    def has_more_than(self, position: int) -> bool:
        """Whether there is anything behind `position`."""
        return self.state()[0] > position

    def may_be(self, size: int) -> bool:
        """Whether, as far as can be told at once, it holds just so many bytes."""
        return self.state()[0] == size

    def stamp(self) -> Stamp:
        """By what a file that was read to its end is known to be unchanged."""
        status = os.fstat(self.fd)
        return Stamp(status.st_size, status.st_mtime_ns)

    def close(self) -> None:
        """Let the file go."""
        os.close(self.fd)


class CompressedContent(Content):
    """An open compressed file, unpacked from its beginning to its end.

    Reading stops where it does not unpack any further: then `damage` says why, and what came before is content.
    """

    compressed = True

    def __init__(self, fd: int, compression: Compression) -> None:
        super().__init__(fd)
        self._compression = compression
        self._beginning = b""
        self._begin()
        self._beginning = self.pread(HEAD_BYTES, 0)

    def _begin(self) -> None:
        self._broken_off = True
        os.lseek(self.fd, 0, os.SEEK_SET)
        self._pieces = unpack(open(self.fd, "rb", closefd=False), self._compression)  # noqa: SIM115  # not its owner
        self._window = bytearray()
        self._start = 0  # offset of the window
        self._ended = False
        self.damage: str | None = None
        self._broken_off = False

    def pread(self, size: int, offset: int) -> bytes:
        """As for a plain file; an `offset` far behind the last one costs unpacking from the beginning."""
        if offset + size <= len(self._beginning):
            return self._beginning[offset : offset + size]
        if self._broken_off or offset < self._start:
            self._begin()
        while not self._ended and self._unpacked_bytes < offset + size:
            self._window += self._next_piece()
            if (behind := min(offset - TAIL_BYTES - self._start, len(self._window))) > BLOCK_BYTES:
                del self._window[:behind]
                self._start += behind
        begin = offset - self._start
        return bytes(self._window[begin : begin + size])

    def _next_piece(self) -> bytes:
        try:
            piece = next(self._pieces, None)
        except Damaged as damaged:
            self.damage, piece = str(damaged), None
        except OSError:
            self._broken_off = True  # what unpacks can't be taken up again in the middle
            raise
        self._ended = piece is None
        return piece or b""

    @property
    def _unpacked_bytes(self) -> int:
        return self._start + len(self._window)

    def state(self) -> tuple[int, int]:
        """The length is known once the end was reached; nothing ever changes."""
        return self._unpacked_bytes if self._ended else NOT_KNOWN_BYTES, 0

    def may_be(self, size: int) -> bool:
        """By what the compressed file says of itself; it is not unpacked."""
        return declared_size(self.fd, self._compression) in (size, size % GZIP_SIZE_MODULUS)

    def has_more_than(self, position: int) -> bool:
        """Whether there is anything behind `position`, be it damage."""
        return bool(self.pread(1, position)) or self.damage is not None


def open_content(fd: int) -> Content:
    """The content of an open file, which it takes over. Raises OSError; then the descriptor is still the caller's."""
    compression = compression_of(os.pread(fd, MAGIC_BYTES, 0))
    return Content(fd) if compression is None else CompressedContent(fd, compression)


def end_of_lines(content: Content) -> int:
    """The offset after the last complete line."""
    end = content.state()[0]
    while end > 0:
        start = max(0, end - BLOCK_BYTES)
        length = whole_lines(content.pread(end - start, start))
        if length:
            return start + length
        end = start
    return 0
