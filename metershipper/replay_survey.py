"""What a file holds, before any of it is sent: how much, of which time, whether it unpacks, and which records know it.

Blocks while it reads; a compressed file is unpacked once, in bounded memory, and not parsed. Never decides what is to
be sent (`replay_plan`), never changes anything.
"""

import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import orjson

from metershipper.archive import ENDS_EARLY, Damaged, compression_of, unpack
from metershipper.content import (
    BLOCK_BYTES,
    HEAD_BYTES,
    TAIL_BYTES,
    Content,
    end_of_lines,
    open_content,
)
from metershipper.errors import MeterShipperError, UsageError
from metershipper.filter import chunks_of, opened
from metershipper.formats import Text, complete_lines, is_foreign, unwrapped
from metershipper.lines import first_line, whole_lines
from metershipper.mapper import EARLIEST_STARTED_AT_MS, LATEST_STARTED_AT_MS
from metershipper.pieces import pieces
from metershipper.records import Identity, Sample, Stamp, StoredFile

# So much of the beginning and of the end is looked at for the times of entries, and so many lines of that.
_SHOWN_BYTES = 256 * 1024
_TIMED_LINES = 10
# In between, at so many places of a plain file and in each block of a compressed one, so much for one more time.
_SAMPLES = 32
_SAMPLE_BYTES = 64 * 1024
# Entries stand in the order in which they ended: what began longer before its neighbour stands in no order of time.
DISORDER_SECONDS = 86400.0
# Of so many longer files that begin with the same line it is looked at whether this one is a part of them.
_LONGER_ONES = 8

RecordState = tuple[int, int, str]  # id, position, origin
LookUp = Callable[[Sequence[Sample], Identity], list[StoredFile]]


@dataclass(frozen=True, slots=True)
class Survey:
    """One file. All offsets are those of its content; of a damaged one it is known as far as it unpacks.

    `heads`: by which it is known, see `heads_of`. `lines_end`: after the last whole line. `first_at`, `last_at`: the
    earliest and the latest time of those seen at which entries began, in seconds since the epoch, None where none was;
    `in_order`: whether these suggest that it holds nothing earlier or later, but for a day. `records`: those of this
    very content. `candidates`: those that may have been: while they are the same and the file has its `stamp`, the
    survey holds. `times`: some times of entries, each with where it was looked for.
    """

    path: str
    identity: Identity
    stamp: Stamp
    compressed: bool
    heads: tuple[Sample, ...]
    content_bytes: int
    lines_end: int
    lines: int
    first_at: float | None
    last_at: float | None
    end: Sample
    damage: str | None = None
    records: tuple[StoredFile, ...] = ()
    candidates: frozenset[RecordState] = frozenset()
    in_order: bool = True
    times: tuple[tuple[int, float], ...] = ()

    @property
    def head(self) -> Sample:
        """By which it will be known; empty of an empty file."""
        return self.heads[0] if self.heads else Sample()

    @property
    def kind(self) -> Sample:
        """What all files have in common of which one may hold what another does."""
        return self.heads[-1] if self.heads else Sample()

    @property
    def shows_no_entry(self) -> bool:
        """Whether there is something, and no entry was seen in it."""
        return self.content_bytes > 0 and self.first_at is None

    def first_from(self, offset: int) -> float | None:
        """The earliest time that was seen from there on; of all where none was."""
        return (
            min((time for at, time in self.times if at >= offset), default=self.first_at) if offset else self.first_at
        )

    def entries_in(self, content_bytes: int) -> int:
        """About how many entries so much of it holds."""
        return round(self.lines * content_bytes / (self.content_bytes or 1))

    @property
    def unfinished_bytes(self) -> int:
        """What stands behind the last whole line."""
        return self.content_bytes - self.lines_end


def survey(path: str, look_up: LookUp, on_bytes: Callable[[int], None] = lambda _: None) -> Survey:
    """Look at one file. `on_bytes` gets how many more bytes of the file were read. Raises: UsageError naming it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UsageError(f"{path}: can't be read: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{path}: not a regular file, so it has no content that could be known again")
        content = open_content(fd)
        heads = heads_of(content)
        found = look_up(heads, (status.st_dev, status.st_ino))
        compressed = content.compressed
        if compressed:
            del content  # with the first megabytes that it has unpacked
            seen = _unpacked(fd, found, on_bytes)
        else:
            seen = _plain(content, found)
        on_bytes(status.st_size - seen.read_bytes)
    except OSError as error:
        raise UsageError(f"{path}: can't be read: {error.strerror}") from None
    finally:
        os.close(fd)
    if seen.damage not in (None, ENDS_EARLY):
        seen.lines_end, seen.last_lines = _trusted_end(path, seen.lines_end)
    else:
        seen.last_lines = seen.ending
        seen.lines_end -= _begun_bytes(seen)
    parts = _times_of(seen)
    times = [time for part in parts for time in part]
    return Survey(
        *(path, (status.st_dev, status.st_ino), Stamp(status.st_size, status.st_mtime_ns), compressed),
        *(tuple(heads), seen.content_bytes, seen.lines_end, seen.lines),
        *(min(times, default=None), max(times, default=None)),
        *(Sample.of(seen.ending[-TAIL_BYTES:]), seen.damage),
        tuple(_records_of(seen, found)),
        states_of(found),
        _is_in_order(parts),
        (*seen.times, *((seen.content_bytes, time) for time in parts[-1])),
    )


def states_of(records: Iterable[StoredFile]) -> frozenset[RecordState]:
    """What can change of records while others read the same content."""
    return frozenset((record.file_id, record.position, record.origin) for record in records)


def heads_of(content: Content) -> list[Sample]:
    """By what the content may be known: its head first; that of a last line without its newline is all there is."""
    head = content.head()
    beginning = content.pread(HEAD_BYTES, 0)
    line = first_line(beginning).rstrip(b"\n") or beginning
    return [sample for sample in dict.fromkeys((head, Sample.of(line))) if sample.length]


@dataclass(slots=True)
class _Seen:
    """What is noted while content passes by. `tails`: by position and length, the bytes before it.

    `last_lines`: what stands before `lines_end`. `times`: of some entries in between, with where they were looked for.
    """

    content_bytes: int = 0
    lines_end: int = 0
    lines: int = 0
    read_bytes: int = 0
    beginning: bytes = b""
    ending: bytes = b""
    last_lines: bytes = b""
    damage: str | None = None
    tails: dict[tuple[int, int], Sample] = field(default_factory=dict)
    times: list[tuple[int, float]] = field(default_factory=list)

    def look_into(self, data: bytes, offset: int) -> None:
        """Note the first time in content that begins anywhere in a line."""
        found = _first_time(data[data.find(b"\n") + 1 :][:_SAMPLE_BYTES])
        if found is not None:
            self.times.append((offset, found))

    def look_behind(self, position: int, data: bytes) -> None:
        """Note the first time in the content behind a record."""
        found = _first_time(data)
        if found is not None:
            self.times.append((position, found))


def _records_of(seen: _Seen, found: Iterable[StoredFile]) -> Iterator[StoredFile]:
    """The records of this content: the tail is where it was; or the file is a beginning of what was read."""
    longer = [record for record in found if record.position > seen.content_bytes]
    yield from (each for each in found if seen.tails.get((each.position, each.tail.length)) == each.tail)
    yield from (each for each in longer[:_LONGER_ONES] if _is_beginning_of(each, seen))


def _is_beginning_of(record: StoredFile, seen: _Seen) -> bool:
    """Whether a file holds what the longer one that was read holds there, as far as that one can be looked at.

    That both begin with the same line is not enough: what was put together of several files does, and what containers
    say that were started in the same second.
    """
    for path in _places_of(record):
        with suppress(OSError), open(path, "rb", opener=_opener) as file:
            longer = open_content(file.fileno())
            if longer.tail(seen.content_bytes) == seen.ending[-TAIL_BYTES:] and longer.holds(record):
                return True
    return False


def _places_of(record: StoredFile) -> Iterator[str]:
    """Where the content of a record may be: where it was seen, and what was renamed there."""
    yield record.path
    with suppress(OSError), os.scandir(os.path.dirname(record.path) or ".") as listed:
        yield from [each.path for each in listed if each.inode() == record.inode]


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)


def _begun_bytes(seen: _Seen) -> int:
    """How much of the whole lines at the end belongs to a record of a container runtime that goes on behind them."""
    lines = seen.ending[: len(seen.ending) - (seen.content_bytes - seen.lines_end)]
    if seen.content_bytes > len(seen.ending):
        lines = lines[lines.find(b"\n") + 1 :]
    return len(lines) - complete_lines(lines)


def _plain(content: Content, found: Iterable[StoredFile]) -> _Seen:
    size = content.state()[0]
    seen = _Seen(size, end_of_lines(content))
    seen.beginning = content.pread(_SHOWN_BYTES, 0)
    seen.ending = content.pread(min(size, _SHOWN_BYTES), max(0, size - _SHOWN_BYTES))
    sample = seen.beginning + seen.ending
    seen.lines = round(size * sample.count(b"\n") / len(sample)) if sample else 0
    for record in found:
        position, length = record.position, record.tail.length
        if position <= size:
            seen.tails[position, length] = Sample.of(content.pread(length, position - length))
            seen.look_behind(position, content.pread(_SAMPLE_BYTES, position))
    for number in range(1, _SAMPLES):
        at = size * number // _SAMPLES
        seen.look_into(content.pread(_SAMPLE_BYTES, at), at)
    return seen


def _unpacked(fd: int, found: Iterable[StoredFile], on_bytes: Callable[[int], None]) -> _Seen:
    seen, ending = _Seen(), b""
    wanted = sorted({(record.position, record.tail.length) for record in found})
    for chunk in _chunks(fd, seen):
        seen.content_bytes += len(chunk)
        seen.lines += chunk.count(b"\n")
        if length := whole_lines(chunk):
            seen.lines_end = seen.content_bytes - len(chunk) + length
        seen.beginning += chunk[: _SHOWN_BYTES - len(seen.beginning)]
        while wanted and wanted[0][0] <= seen.content_bytes:
            position, length = wanted.pop(0)
            at = position - (seen.content_bytes - len(chunk))
            before = chunk[max(0, at - length) : at]
            missing = length - len(before)  # it may have begun in the chunk before
            seen.tails[position, length] = Sample.of(ending[len(ending) - missing :] + before)
            seen.look_behind(position, chunk[at : at + _SAMPLE_BYTES])
        seen.look_into(chunk[: 2 * _SAMPLE_BYTES], seen.content_bytes - len(chunk))
        ending = (ending + chunk[-_SHOWN_BYTES:])[-_SHOWN_BYTES:]
        read_bytes = os.lseek(fd, 0, os.SEEK_CUR)
        on_bytes(read_bytes - seen.read_bytes)
        seen.read_bytes = read_bytes
    if wanted and wanted[0] == (0, 0):
        seen.tails[0, 0] = Sample()
    seen.ending = ending
    return seen


def _chunks(fd: int, seen: _Seen) -> Iterator[bytes]:
    """The content in chunks that are worth looking at; notes the damage at their end."""
    os.lseek(fd, 0, os.SEEK_SET)
    compression = compression_of(os.pread(fd, HEAD_BYTES, 0))
    assert compression is not None
    gathered: list[bytes] = []
    gathered_bytes = 0
    try:
        with open(fd, "rb", closefd=False) as file:
            for piece in unpack(file, compression):
                gathered.append(piece)
                gathered_bytes += len(piece)
                if gathered_bytes >= BLOCK_BYTES:
                    yield b"".join(gathered) if len(gathered) > 1 else piece
                    gathered, gathered_bytes = [], 0
    except Damaged as damaged:
        seen.damage = str(damaged)
    if gathered:
        yield b"".join(gathered)


def _trusted_end(path: str, lines_end: int) -> tuple[int, bytes]:
    """How far to go in content that is corrupt, and not just cut off: up to the line before the first torn one.

    What is corrupt mostly unpacks to the end, where its checksum tells; but not to what was written. The first line
    that differs is torn in 14 cases of 15; nobody shall be billed by one before it that is not.
    Returns also what the last lines before it say.
    """
    before: deque[Text] = deque(maxlen=_TIMED_LINES + 1)
    with suppress(MeterShipperError), opened(path) as source:
        for chunk in chunks_of(source):
            for text in unwrapped(chunk.data, chunk.start_offset):
                if text.start_offset >= lines_end or _is_torn(text):
                    end = min(before[-1].start_offset if before else 0, lines_end)
                    return end, b"".join(each.payload + b"\n" for each in before if each.start_offset < end)
                before.append(text)
    return lines_end, b"".join(each.payload + b"\n" for each in before)


def _is_torn(text: Text) -> bool:
    try:
        orjson.loads(text.payload)
        return False
    except orjson.JSONDecodeError:
        found = pieces(text.payload) if text.payload.strip() else []
        return any(piece.fault is not None and not is_foreign(piece, wrapped=bool(text.wrapper)) for piece in found)


def _times_of(seen: _Seen) -> tuple[list[float], ...]:
    """When some entries were begun, of those that are to be trusted: the first, some in between, the last."""
    between = [time for offset, time in sorted(seen.times) if offset < seen.lines_end]
    beginning = seen.beginning if seen.damage is None else seen.beginning[: seen.lines_end]
    return times_in(beginning, first=True), between, times_in(seen.last_lines)


def _is_in_order(parts: Iterable[Sequence[float]]) -> bool:
    """Whether nothing that was seen is much earlier than the first, or than what stands before it."""
    first = last = latest = 0.0
    for part in parts:
        before = 0.0
        for time in part:
            first = first or time
            if time < max(first, before) - DISORDER_SECONDS:
                return False
            before, latest = max(before, time), max(latest, time)
        last = before or last
    return last >= latest - DISORDER_SECONDS


def times_in(data: bytes, *, first: bool = False) -> list[float]:
    """When the first few, or the last few, entries were begun, in seconds since the epoch; some, whatever the lines."""
    data = data[: whole_lines(data)] or data
    lines = data.split(b"\n")
    some = lines[:_TIMED_LINES] if first else lines[-_TIMED_LINES - 1 :]
    found = list(_times(some))
    return found or list(_times(lines))  # what stands among the entries of a container's output


def _first_time(data: bytes) -> float | None:
    return next(_times(data.split(b"\n")), None)


def _times(lines: Sequence[bytes]) -> Iterator[float]:
    for text in unwrapped(b"\n".join(lines)):
        if b"started_at" not in text.payload:
            continue
        for piece in pieces(text.payload):
            started_at = (piece.value or {}).get("started_at")
            if isinstance(started_at, int | float) and EARLIEST_STARTED_AT_MS <= started_at <= LATEST_STARTED_AT_MS:
                yield started_at / 1000
