"""What a file holds, before any of it is sent: how much, of which time, whether it unpacks, and which records know it.

Blocks while it reads; a compressed file is unpacked once, in bounded memory, and not parsed. Also finds the files that
the given paths name. Never decides what is to be sent (`replay_plan`), never changes anything.
"""

import glob
import os
import stat
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
from metershipper.formats import Text, is_foreign, unwrapped
from metershipper.lines import first_line, whole_lines
from metershipper.mapper import EARLIEST_STARTED_AT_MS, LATEST_STARTED_AT_MS
from metershipper.pieces import pieces
from metershipper.records import Identity, Sample, Stamp, StoredFile
from metershipper.rotation import FOREIGN_SUFFIXES, LEFT_BEHIND

# So much of the beginning and of the end is looked at for the times of entries, and so many lines of that.
_SHOWN_BYTES = 256 * 1024
_TIMED_LINES = 10
# A shorter beginning says too little to tell that a file which is not as long as what was read is a part of that.
_TELLING_HEAD_BYTES = 64

LookUp = Callable[[Sequence[Sample], Identity], list[StoredFile]]


@dataclass(frozen=True, slots=True)
class Survey:
    """One file. All offsets are those of its content; of a damaged one it is known as far as it unpacks.

    `heads`: by which it is known, see `heads_of`. `lines_end`: after the last whole line. `first_at`,
    `last_at`: when entries began, in seconds since the epoch, None where none was found. `records`: those of this very
    content. `candidates`: those that may have been, as (id,
    position): while they are the same and the file has its `stamp`, the survey holds.
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
    candidates: frozenset[tuple[int, int]] = frozenset()

    @property
    def head(self) -> Sample:
        """By which it will be known; empty of an empty file."""
        return self.heads[0] if self.heads else Sample()

    @property
    def has_no_entry(self) -> bool:
        """Whether all of it was looked at, and there was no entry."""
        return self.first_at is None and self.content_bytes <= _SHOWN_BYTES and self.damage is None

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
        seen.lines_end = _trusted_end(path, seen.lines_end)
    times = times_in(seen.beginning, first=True), times_in(seen.ending)
    return Survey(
        *(path, (status.st_dev, status.st_ino), Stamp(status.st_size, status.st_mtime_ns), compressed),
        *(tuple(heads), seen.content_bytes, seen.lines_end, seen.lines),
        *(min(times[0], default=None), max(times[1] or times[0], default=None)),
        *(Sample.of(seen.ending[-TAIL_BYTES:]), seen.damage),
        tuple(record for record in found if _is_of(record, seen, heads)),
        frozenset((record.file_id, record.position) for record in found),
    )


def heads_of(content: Content) -> list[Sample]:
    """By what the content may be known: its head first; that of a last line without its newline is all there is."""
    head = content.head()
    beginning = content.pread(HEAD_BYTES, 0)
    line = first_line(beginning).rstrip(b"\n") or beginning
    return [sample for sample in dict.fromkeys((head, Sample.of(line))) if sample.length]


@dataclass(slots=True)
class _Seen:
    """What is noted while content passes by. `tails`: by position and length, the bytes before it."""

    content_bytes: int = 0
    lines_end: int = 0
    lines: int = 0
    read_bytes: int = 0
    beginning: bytes = b""
    ending: bytes = b""
    damage: str | None = None
    tails: dict[tuple[int, int], Sample] = field(default_factory=dict)


def _is_of(record: StoredFile, seen: _Seen, heads: Sequence[Sample]) -> bool:
    """Whether it is a record of this content: the tail is where it was; or the file is a beginning of what was read."""
    if record.position > (seen.content_bytes if seen.damage is None else seen.lines_end):
        return record.head in heads and record.head.length >= _TELLING_HEAD_BYTES
    return seen.tails.get((record.position, record.tail.length)) == record.tail


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


def _trusted_end(path: str, lines_end: int) -> int:
    """How far to go in content that is corrupt, and not just cut off: up to the line before the first torn one.

    What is corrupt mostly unpacks to the end, where its checksum tells; but not to what was written. The first line
    that differs is torn in 14 cases of 15; nobody shall be billed by one before it that is not.
    """
    before = 0
    with suppress(MeterShipperError), opened(path) as source:
        for chunk in chunks_of(source):
            for text in unwrapped(chunk.data, chunk.start_offset):
                if text.start_offset >= lines_end or _is_torn(text):
                    return min(before, lines_end)
                before = text.start_offset
    return lines_end


def _is_torn(text: Text) -> bool:
    try:
        orjson.loads(text.payload)
        return False
    except orjson.JSONDecodeError:
        found = pieces(text.payload) if text.payload.strip() else []
        return any(piece.fault is not None and not is_foreign(piece, wrapped=bool(text.wrapper)) for piece in found)


def times_in(data: bytes, *, first: bool = False) -> list[float]:
    """When the first few, or the last few, entries were begun, in seconds since the epoch; some, whatever the lines."""
    data = data[: whole_lines(data)] or data
    lines = data.split(b"\n")
    some = lines[:_TIMED_LINES] if first else lines[-_TIMED_LINES - 1 :]
    found = _times(some)
    return found or _times(lines)  # what stands among the entries of a container's output


def _times(lines: Sequence[bytes]) -> list[float]:
    found: list[float] = []
    for text in unwrapped(b"\n".join(lines)):
        if b"started_at" not in text.payload:
            continue
        for piece in pieces(text.payload):
            started_at = (piece.value or {}).get("started_at")
            if isinstance(started_at, int | float) and EARLIEST_STARTED_AT_MS <= started_at <= LATEST_STARTED_AT_MS:
                found.append(started_at / 1000)
    return found


# What the given paths name


@dataclass(slots=True)
class Named:
    """The files that paths name, each once; `skipped`: what was passed over in directories, and why."""

    paths: list[str] = field(default_factory=list)
    in_directories: set[str] = field(default_factory=set)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def named_by(paths: Sequence[str]) -> Named:
    """Files, globs and directories as files. Raises: UsageError naming what is none, or names nothing."""
    named, seen = Named(), set[Identity]()
    for path in paths:
        if path == "-":
            raise UsageError(
                "-: what comes by a pipe has no identity, so nobody could know it again; save it to a file"
            )
        is_literal = os.path.lexists(path) or not glob.has_magic(path)
        found = [path] if is_literal else sorted(glob.glob(path, recursive=True))
        if not found:
            raise UsageError(f"{path}: no file of that name")
        for each in found:
            for file in _files_of(each, named, is_pattern=not is_literal):
                status = os.stat(file)
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    named.paths.append(file)
    return named


def _files_of(path: str, named: Named, *, is_pattern: bool) -> Iterator[str]:
    try:
        path.encode()
        status = os.stat(path)
    except UnicodeEncodeError:
        raise UsageError(f"{path!a}: the name is not UTF-8; rename it") from None
    except OSError as error:
        raise UsageError(f"{path}: can't be read: {error.strerror}") from None
    if stat.S_ISREG(status.st_mode):
        yield path
    elif not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{path}: not a regular file, so it has no content that could be known again")
    elif not is_pattern:
        yield from _files_in(path, named)


def _files_in(directory: str, named: Named) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise UsageError(f"{error.filename}: can't be listed: {error.strerror}")

    for place, directories, names in os.walk(directory, onerror=refuse):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(place, name)
            if reason := _why_not(path, name):
                named.skipped.append((path, reason))
            else:
                named.in_directories.add(path)
                yield path


def _why_not(path: str, name: str) -> str | None:
    """Why a file of a directory is passed over, by its name and kind."""
    if name.startswith("."):
        return "hidden"
    if name.endswith(LEFT_BEHIND):
        return "left behind by an editor or a copy"
    if name.endswith(FOREIGN_SUFFIXES):
        return "compressed in a way that can't be unpacked here"
    try:
        name.encode()
        return None if stat.S_ISREG(os.stat(path).st_mode) else "not a regular file"
    except UnicodeEncodeError:
        return "the name is not UTF-8"
    except OSError as error:
        raise UsageError(f"{path}: can't be read: {error.strerror}") from None
