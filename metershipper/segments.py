"""The spool on disk: segments of NDJSON, appended to, made durable, read, and deleted once they are settled.

Blocks; `spool` calls it off the event loop. The spool is one log without end: a segment is called by the offset in that
log at which it begins, so that a position means the same whatever segments there are. Never reads a line, never decides
what is settled. Written by one process, whose lock is that of the state directory.

What is durable ends with a line: of what a crash tore nobody was told that it was received; the next start cuts it off.
"""

import logging
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from metershipper.content import Content, end_of_lines
from metershipper.state import make_private_directory, sync_directory

log = logging.getLogger("metershipper.spool")

SEGMENT_BYTES = 64 * 1024 * 1024
# What is left free on the disk: the checkpoint must be written before anything of the spool can be deleted. Of a small
# file system it is a twentieth.
RESERVED_BYTES = 32 * 1024 * 1024
# A hole of this size between two segments is where nothing ever was.
SKIPPED_BYTES = 1
# However small the spool may be, it is freed in this many steps.
_LEAST_SEGMENTS = 8
_SUFFIX = ".ndjson"
_NAME = re.compile(r"[0-9]{20}" + re.escape(_SUFFIX))


@dataclass(slots=True)
class Segment:
    """One file of the spool: where in the whole log it begins and ends, in bytes."""

    path: Path
    start: int
    end: int


def segments_in(directory: Path) -> list[Segment]:
    """The segments of a spool, as long as their files are, the oldest first; none where there is no spool.

    Raises: OSError.
    """
    try:
        found = [Path(entry.path) for entry in os.scandir(directory) if _NAME.fullmatch(entry.name)]
        starts = {path: int(path.name.removesuffix(_SUFFIX)) for path in sorted(found)}
        return [Segment(path, start, start + path.lstat().st_size) for path, start in starts.items()]
    except FileNotFoundError:
        return []


class Segments:
    """The spool in `directory`, up to `max_bytes`. Methods may be called from any thread; one thread appends."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._segment_bytes = min(SEGMENT_BYTES, max(1, max_bytes // _LEAST_SEGMENTS))
        self._segments: list[Segment] = []
        self._end = 0
        self._appending: tuple[int, Segment] | None = None  # a descriptor, and the last segment
        self._is_writing = False  # meanwhile the last segment can't be released
        self._reading: tuple[int, int] | None = None  # start of a segment and its descriptor
        self._lock = threading.Lock()

    def open(self, position: int) -> None:
        """Find what there is, and begin behind it, at least at `position`. Raises OSError, StateError."""
        make_private_directory(self._directory)
        for segment in reversed(segments_in(self._directory)):
            # What stands where the next one begins was written, but could not be made durable nor taken back.
            limit = self._segments[0].start - segment.start if self._segments else None
            segment.end = segment.start + self._whole_lines_of(segment.path, limit)
            if segment.end > segment.start:
                self._segments.insert(0, segment)
            else:
                segment.path.unlink()
        self._end = max([position, *(segment.end for segment in self._segments)])

    def _whole_lines_of(self, path: Path, limit: int | None) -> int:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            torn = os.fstat(fd).st_size
            if limit is not None and limit < torn:
                os.ftruncate(fd, limit)
            size = end_of_lines(Content(fd))
            torn -= size
            if torn:
                log.info("%s: its last %d bytes were not received to their end, and are cut off", path, torn)
                os.ftruncate(fd, size)
            os.fsync(fd)  # for a process that was killed before it could
        finally:
            os.close(fd)
        return size

    def close(self) -> None:
        """Let the files go; what is settled is deleted by then."""
        with self._lock:
            self._stop_appending()
            self._stop_reading()

    # Writing

    @property
    def end(self) -> int:
        """Where the next line will begin; everything before is durable, unless it is gone."""
        return self._end

    @property
    def start(self) -> int:
        """Where the oldest segment begins."""
        return self._segments[0].start if self._segments else self._end

    @property
    def last(self) -> Segment | None:
        """The segment that was begun last."""
        return self._segments[-1] if self._segments else None

    @property
    def size_bytes(self) -> int:
        """How much the segments hold on the disk."""
        return sum(segment.end - segment.start for segment in list(self._segments))

    def fault_of(self, length: int) -> str | None:
        """Why there is no room for so many bytes more; None when there is. Raises OSError."""
        if self.size_bytes + length > self._max_bytes:
            return f"the spool holds inputs.http_log.spool_max_bytes = {self._max_bytes}"
        disk = os.statvfs(self._directory)
        reserved = min(RESERVED_BYTES, disk.f_blocks * disk.f_frsize // 20)
        if disk.f_bavail * disk.f_frsize < length + reserved:
            return f"the disk of the spool is full, but for {reserved} bytes that the checkpoint may need"
        return None

    def append(self, parts: Sequence[bytes]) -> None:
        """Append whole lines; durable on return. Raises OSError: then none of them is in the spool."""
        with self._lock:
            self._is_writing = True
        try:
            self._append(parts[0] if len(parts) == 1 else b"".join(parts))
        finally:
            with self._lock:
                self._is_writing = False

    def _append(self, data: bytes) -> None:
        fd, segment = self._open_segment()
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fdatasync(fd)
        except OSError:
            self._take_back(fd, segment)
            raise
        with self._lock:
            segment.end += len(data)
            self._end = segment.end

    def _open_segment(self) -> tuple[int, Segment]:
        """The one to append to; another one where it is full, or deleted by somebody else."""
        if self._appending is not None:
            fd, segment = self._appending
            if segment.end - segment.start < self._segment_bytes and os.fstat(fd).st_nlink:
                return self._appending
        return self._begin_segment()

    def _begin_segment(self) -> tuple[int, Segment]:
        path = self._directory / f"{self._end:020d}{_SUFFIX}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            sync_directory(self._directory)
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        with self._lock:
            self._stop_appending()
            self._appending = fd, Segment(path, self._end, self._end)
            self._segments.append(self._appending[1])
            return self._appending

    def _take_back(self, fd: int, segment: Segment) -> None:
        """Nothing of what failed may stay: its sender is told that it was not received."""
        try:
            if segment.end > segment.start:
                os.ftruncate(fd, segment.end - segment.start)
            else:
                segment.path.unlink(missing_ok=True)
                with self._lock:
                    self._stop_appending()
                    self._segments.remove(segment)
        except OSError as error:
            log.warning("%s: what could not be written to its end stays in it (%s)", segment.path, error.strerror)
            with self._lock:  # so what comes next goes into another file, of another name
                self._stop_appending()
                self._end += SKIPPED_BYTES

    def _stop_appending(self) -> None:
        if self._appending is not None:
            os.close(self._appending[0])
            self._appending = None

    # Reading

    def next_start(self, offset: int) -> int | None:
        """`offset`, or where what follows begins if that is gone; None behind everything."""
        with self._lock:
            return next((max(offset, each.start) for each in self._segments if offset < each.end), None)

    def pread(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes at `offset`, to the end of the segment; nothing where it is gone. Raises OSError."""
        with self._lock:
            segment = next((each for each in self._segments if each.start <= offset < each.end), None)
            if segment is None:
                return b""
            size = min(size, segment.end - offset)
            if self._reading is None or self._reading[0] != segment.start:
                try:
                    fd = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                except FileNotFoundError:  # deleted by somebody else
                    self._drop(segment)
                    return b""
                self._stop_reading()
                self._reading = segment.start, fd
            return os.pread(self._reading[1], size, offset - segment.start)

    def _stop_reading(self) -> None:
        if self._reading is not None:
            os.close(self._reading[1])
            self._reading = None

    def release(self, position: int) -> None:
        """Delete the segments that end at or before `position`. Raises OSError; then it may be tried again."""
        with self._lock:
            settled = [segment for segment in self._segments if segment.end <= position]
            if self._is_writing and settled and settled[-1] is self._segments[-1]:
                settled.pop()
            for segment in settled:
                segment.path.unlink(missing_ok=True)
                self._drop(segment)

    def _drop(self, segment: Segment) -> None:
        """It is gone: neither it nor the room that it takes is held on to."""
        if self._appending is not None and self._appending[1] is segment and not self._is_writing:
            self._stop_appending()
        if self._reading is not None and self._reading[0] == segment.start:
            self._stop_reading()
        self._segments.remove(segment)
