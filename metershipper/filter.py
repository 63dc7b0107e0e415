"""`map`: entries from files or stdin to usage events on stdout, and a summary. Touches no network and no state."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple, Protocol, cast

import msgspec

from metershipper.archive import MAGIC_BYTES, Damaged, compression_of, unpack
from metershipper.books import DEAD_LETTERS, SKIPPED, Books, Count
from metershipper.content import BLOCK_BYTES
from metershipper.errors import MeterShipperError, UsageError
from metershipper.events import DeadLetter, Mapped
from metershipper.formats import complete_lines
from metershipper.lines import MAX_LINE_BYTES, Overlong, Skimmed, whole_lines
from metershipper.mapper import Mapper, overlong_line
from metershipper.metering import Metering

STDIN = "-"
SHOWN_BAD_LINES = 10


class DamagedArchive(MeterShipperError):
    """A compressed file that does not unpack to its end."""


def map_paths(metering: Metering, paths: tuple[str, ...], out: BinaryIO, report: Callable[[str], None]) -> Books:
    """Map every path in turn; `out` gets the events as NDJSON, `report` the bad lines and the summary.

    Files compressed with gzip or zstd are unpacked on the way.
    Raises: UsageError naming a path that can't be opened, after the paths before it were mapped; DamagedArchive naming
    all that are, after all paths were mapped as far as they unpack.
    """
    mapper = Mapper(metering)
    encode_lines = msgspec.json.Encoder().encode_lines
    books = Books()
    shown = 0
    damaged: list[str] = []
    try:
        for path in paths:
            try:
                with opened(path) as source:
                    for chunk in chunks_of(source):
                        mapped = _mapped(mapper, chunk)
                        _write(out, encode_lines(mapped.events))
                        books.update(mapped.books)
                        for dead_letter in mapped.dead_letters[: SHOWN_BAD_LINES - shown]:
                            report(_bad_line(path, dead_letter))
                            shown += 1
            except DamagedArchive as error:
                damaged.append(str(error))
    finally:
        report("\n".join(summary(books)))
    if damaged:
        raise DamagedArchive("\n".join(damaged))
    return books


def _write(out: BinaryIO, data: bytes) -> None:
    try:
        out.write(data)
        out.flush()
    except BrokenPipeError:
        raise  # whoever read the output has seen enough
    except OSError as error:
        raise MeterShipperError(f"the output can't be written: {error.strerror}") from None


def summary(books: Books, kept_aside: str = "bad lines") -> list[str]:
    """The books of a run, in lines for people. `kept_aside`: what to call what could not be billed."""
    tokens_in, tokens_out = books[Count.TOKENS_REQUEST], books[Count.TOKENS_RESPONSE]
    # An array, and entries glued together, are several on one line.
    held = f"{books[Count.LINES]} lines" + f" with {books[Count.ENTRIES]} entries" * (
        books[Count.ENTRIES] != books[Count.LINES]
    )
    lines = [
        f"{held}: {books[Count.BILLED]} entries billed, {books.skipped} skipped, {books.dead_letters} {kept_aside}",
        f"{books[Count.EVENTS]} events; tokens: {tokens_in} request (input), {tokens_out} response (output)",
    ]
    lines += [f"skipped: {reason} {count}" for reason, count in books.by_reason(SKIPPED).items()]
    lines += [f"{kept_aside}: {reason} {count}" for reason, count in books.by_reason(DEAD_LETTERS).items()]
    if failed := books[Count.FAILED_AI_CALLS]:
        lines.append(f"AI calls not billed: failed_ai_call {failed} (only an estimate of their input was logged)")
    if hashed := books[Count.HASHED_IDS]:
        lines.append(f"ids: {hashed} entries have no request id (Kong before 3.5); theirs is a hash of the entry")
    if nuls := books[Count.NUL_BYTES]:
        lines.append(f"NUL bytes stepped over: {nuls} (a crash of the writer's machine, or a sparse file)")
    return lines


class _Source(Protocol):
    """A binary file or pipe: `read1` gives what is there, so that a slow pipe is mapped as it comes."""

    def read1(self, size: int, /) -> bytes: ...


@contextmanager
def opened(path: str) -> Iterator[_Source]:
    """A path or stdin; a file that is compressed is unpacked. Raises: UsageError; reading it, DamagedArchive."""
    if path == STDIN:
        yield cast(_Source, sys.stdin.buffer)
        return
    try:
        file = open(path, "rb")  # noqa: SIM115  # closed below; only the opening is the user's mistake
    except OSError as error:
        raise UsageError(f"{path}: can't be read: {error.strerror}") from None
    with file:
        compression = compression_of(file.peek(MAGIC_BYTES))
        try:
            yield file if compression is None else _Unpacked(unpack(file, compression))
        except Damaged as damaged:
            raise DamagedArchive(f"{path}: damaged ({damaged}); mapped as far as it unpacks") from None


class _Unpacked:
    """Unpacked content as a source. Raises Damaged after all that could be unpacked was read."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._damaged: Damaged | None = None

    def read1(self, size: int, /) -> bytes:
        """At least `size` bytes; fewer only at the end."""
        data = bytearray()
        try:
            while self._damaged is None and len(data) < size and (piece := next(self._pieces, b"")):
                data += piece
        except Damaged as damaged:
            self._damaged = damaged
        if self._damaged is not None and not data:
            raise self._damaged
        return bytes(data)


class Chunk(NamedTuple):
    """Whole records from `start_offset` to `end_offset`, or one `overlong` line."""

    data: bytes
    start_offset: int
    end_offset: int
    overlong: Overlong | None = None


def chunks_of(source: _Source) -> Iterator[Chunk]:
    """A source in chunks that tear neither lines nor records; the last line may lack its newline. Memory is bounded."""
    rest, offset = b"", 0
    while data := source.read1(BLOCK_BYTES):
        data = rest + data
        length = complete_lines(data)
        if len(data) - length >= MAX_LINE_BYTES:
            length = whole_lines(data)  # a record above the limit: its lines, as far as they are there
        if length:
            yield Chunk(data[:length], offset, offset + length)
            offset += length
        rest = data[length:]
        if len(rest) >= MAX_LINE_BYTES:
            skimmed = Skimmed()
            skimmed.add(rest)
            newline_bytes, rest = _skim_line(source, skimmed)
            end = offset + skimmed.length + newline_bytes
            yield Chunk(b"", offset, end, skimmed.ended())
            offset = end
    if rest:
        yield Chunk(rest, offset, offset + len(rest))


def _mapped(mapper: Mapper, chunk: Chunk) -> Mapped:
    if chunk.overlong is not None:
        return overlong_line(chunk.overlong, chunk.start_offset, chunk.end_offset)
    return mapper.map_lines(chunk.data, chunk.start_offset)


def _skim_line(source: _Source, skimmed: Skimmed) -> tuple[int, bytes]:
    """Step over the rest of a line: how long its newline is, 0 when there is none, and what follows it."""
    while data := source.read1(BLOCK_BYTES):
        newline = data.find(b"\n")
        if newline >= 0:
            skimmed.add(data[:newline])
            return 1, data[newline + 1 :]
        skimmed.add(data)
    return 0, b""


def _bad_line(path: str, dead_letter: DeadLetter) -> str:
    start, end, reason, detail, _ = dead_letter
    return f"bad line: {name_of(path)}, bytes {start}-{end}: {reason}: {detail}"


def name_of(path: str) -> str:
    """What to call a path in a message."""
    return "stdin" if path == STDIN else path
