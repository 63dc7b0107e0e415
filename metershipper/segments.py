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
        self._appending: int | None = None  # to the last segment
        self._reading: tuple[int, int] | None = None  # start of a segment and its descriptor
        self._lock = threading.Lock()

    def open(self, position: int) -> None:
        """Find what there is, and begin behind it, at least at `position`. Raises OSError, StateError."""
        make_private_directory(self._directory)
        for segment in reversed(segments_in(self._directory)):
            segment.end = segment.start + self._whole_lines_of(segment.path)
            if self._segments:
                # What is beyond was written, but could not be made durable.
                segment.end = min(segment.end, self._segments[0].start)
            if segment.end > segment.start:
                self._segments.insert(0, segment)
            else:
                segment.path.unlink()
        self._end = max([position, *(segment.end for segment in self._segments)])

    def _whole_lines_of(self, path: Path) -> int:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            size = end_of_lines(Content(fd))
            torn = os.fstat(fd).st_size - size
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
            if self._reading is not None:
                os.close(self._reading[1])
                self._reading = None

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
    def size_bytes(self) -> int:
        """How much the segments hold on the disk."""
        return sum(segment.end - segment.start for segment in list(self._segments))

    def has_room(self, length: int) -> bool:
        """Whether so many bytes more are allowed."""
        return self.size_bytes + length <= self._max_bytes

    def append(self, parts: Sequence[bytes]) -> None:
        """Append whole lines; durable on return. Raises OSError: then none of them is in the spool."""
        if self._appending is None or self._segments[-1].end - self._segments[-1].start >= self._segment_bytes:
            self._begin_segment()
        fd, segment = self._appending, self._segments[-1]
        assert fd is not None
        data = parts[0] if len(parts) == 1 else b"".join(parts)
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

    def _begin_segment(self) -> None:
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
            self._appending = fd
            self._segments.append(Segment(path, self._end, self._end))

    def _take_back(self, fd: int, segment: Segment) -> None:
        """Nothing of what failed may stay: its sender is told that it was not received."""
        try:
            os.ftruncate(fd, segment.end - segment.start)
        except OSError as error:
            log.warning("%s: what could not be written to its end stays in it (%s)", segment.path, error.strerror)
            with self._lock:  # so what comes next goes into another file, of another name
                self._stop_appending()
                self._end += SKIPPED_BYTES

    def _stop_appending(self) -> None:
        if self._appending is not None:
            os.close(self._appending)
            self._appending = None

    # Reading

    def next_start(self, offset: int) -> int | None:
        """`offset`, or where what follows begins if that is gone; None behind everything."""
        with self._lock:
            return next((max(offset, each.start) for each in self._segments if offset < each.end), None)

    def pread(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes at `offset`, to the end of the segment. Raises OSError."""
        with self._lock:
            segment = next((each for each in self._segments if each.start <= offset < each.end), None)
            if segment is None:
                return b""
            size = min(size, segment.end - offset)
            if self._reading is None or self._reading[0] != segment.start:
                fd = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                if self._reading is not None:
                    os.close(self._reading[1])
                self._reading = segment.start, fd
            return os.pread(self._reading[1], size, offset - segment.start)

    def release(self, position: int) -> None:
        """Delete the segments that end at or before `position`. Raises OSError; then it may be tried again."""
        with self._lock:
            settled = [segment for segment in self._segments if segment.end <= position and segment.end > segment.start]
            self._segments = [segment for segment in self._segments if segment not in settled]
            if settled and not self._segments:
                self._stop_appending()
        for segment in settled:
            segment.path.unlink(missing_ok=True)
