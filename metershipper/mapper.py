"""Maps lines of a Kong log to usage events: bytes in; events, books and dead letters out.

Pure: no I/O, no clock, no randomness, no state between calls. What an entry becomes is told by `meter`, which settings
hold for it by `rules`, what a line holds by `formats` and `pieces`; here is how a line is taken from one to the other
and counted.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from metershipper.books import Books, Count, Dead, Skip
from metershipper.entry import EntryDecoder, content_hash, field_names
from metershipper.events import DeadLetter, Mapped, UsageEvent
from metershipper.formats import NOT_WRAPPED, Format, Text, Unwrapper, apart_from_errors, is_foreign, unwrapped
from metershipper.lines import Overlong, split_lines
from metershipper.meter import Meter
from metershipper.metering import Metering, MeteringSettings
from metershipper.pieces import Piece, Unbillable, pieces, whole_object
from metershipper.readers import AnyEntry
from metershipper.rules import RuleBook
from metershipper.scope import Sieve
from metershipper.usage import shown

if TYPE_CHECKING:
    from metershipper.followed import Block

# OpenMeter stores times as 32-bit seconds. Seconds in place of milliseconds fall below the lower bound.
EARLIEST_STARTED_AT_MS = 1_000_000_000_000  # 2001-09-09
LATEST_STARTED_AT_MS = 4_294_967_295_999  # 2106-02-07


class Explained(NamedTuple):
    """What became of one entry and why: `rule` is what the configuration calls it, None where none was asked."""

    start_offset: int
    request_id: str | None
    rule: str | None
    outcome: Skip | Unbillable | None
    events: list[UsageEvent]


class Mapper:
    """The rules of one configuration, compiled once; `map_lines` may be called from any thread, one call at a time."""

    def __init__(self, metering: Metering) -> None:
        scopes = [(rule, rule.over(metering)) for rule in metering.rules]
        everything = [metering, *(settings for _, settings in scopes)]
        headers, query = _names_read(everything)
        header_fields, query_fields = field_names(headers), field_names(query)
        ai = any(settings.meter_ai_token_usage or settings.meter_mcp_tool_calls for settings in everything)
        decoder = EntryDecoder(headers, query, ai=ai)
        self._decode, self._convert = decoder.decode, decoder.convert

        def meter(name: str, settings: MeteringSettings) -> Meter:
            return Meter(name, settings, metering.source, header_fields, query_fields)

        named = [(rule, settings, meter(f"metering.rules[{n}]", settings)) for n, (rule, settings) in enumerate(scopes)]
        base = meter("metering", metering)
        self._rules = RuleBook(base, metering, named)
        # Without rules and filters there is nothing to choose: the hot path knows its meter.
        self._only = base if not named and not _has_filters(metering) else None

    def map_lines(
        self, data: bytes, start_offset: int = 0, format: Format = "auto", sieve: Sieve | None = None
    ) -> Mapped:
        """Map `data`: whole lines, of which the last may lack its newline; `start_offset` is where they begin.

        A container's record must not be cut by the end of `data` either (see `complete_lines`): a part of one is torn.
        With a `sieve` only what it takes becomes events.
        Never raises for anything the lines hold.
        """
        mapped = Mapped()
        books, events = mapped.books, mapped.events
        lines = split_lines(data)
        unwrapper = Unwrapper(format)
        decode = _no_entry if format in NOT_WRAPPED else self._decode
        billed = entries = 0
        offset, end = start_offset, start_offset + len(data)
        for line in lines:
            entry = decode(line)
            if entry is not None:
                entries += 1
                try:
                    found = self._bill(entry, line, books, sieve)
                except Unbillable as fault:
                    _keep(mapped, fault, Text(line, offset, min(offset + len(line) + 1, end), None), line)
                else:
                    if isinstance(found, Skip):
                        books.skip(found)
                    else:
                        events += found
                        billed += 1
            else:
                if line.startswith(b"\0"):
                    books[Count.NUL_BYTES] += len(line) - len(line.lstrip(b"\0"))
                text = unwrapper.add(line, offset, min(offset + len(line) + 1, end))
                if text is not None:
                    self._map_text(text, format, mapped, sieve)
            offset += len(line) + 1
        for text in unwrapper.rest():
            self._map_text(text, format, mapped, sieve)
        books[Count.LINES] += len(lines)
        books[Count.ENTRIES] += entries
        books[Count.BILLED] += billed
        books[Count.EVENTS] += len(events)
        return mapped

    def map_block(self, block: "Block", sieve: Sieve | None = None) -> Mapped:
        """As `map_lines`, a block as it was read: lines, or one that is too long, or NULs."""
        if block.nul_bytes:
            return nuls(block.nul_bytes)
        if block.overlong is not None:
            return overlong_line(block.overlong, block.start_offset, block.end_offset)
        return self.map_lines(block.data, block.start_offset, block.format, sieve)

    def _map_text(self, text: Text, format: Format, mapped: Mapped, sieve: Sieve | None) -> None:
        """Map what is not simply one entry on a line of its own."""
        entry = self._decode(text.payload) if text.wrapper else None
        for piece in _pieces(text, format) if entry is None else [entry]:
            mapped.books[Count.ENTRIES] += 1
            try:
                found = self._bill_piece(piece, text.payload, mapped.books, sieve)
            except Unbillable as fault:
                raw = piece.raw if isinstance(piece, Piece) and piece.raw else text.payload
                _keep(mapped, fault, text, raw)
            else:
                if isinstance(found, Skip):
                    mapped.books.skip(found)
                else:
                    mapped.events += found
                    mapped.books[Count.BILLED] += 1

    def _bill_piece(
        self, piece: Piece | Skip | AnyEntry, line: bytes, books: Books, sieve: Sieve | None = None
    ) -> list[UsageEvent] | Skip:
        if isinstance(piece, Skip):
            return piece
        if not isinstance(piece, Piece):
            return self._bill(piece, line, books, sieve)
        if piece.fault is not None:
            raise piece.fault
        value = piece.value or {}
        return self._bill(self._convert(value), value, books, sieve)

    def _bill(
        self, entry: AnyEntry, source: bytes | dict[str, Any], books: Books, sieve: Sieve | None
    ) -> list[UsageEvent] | Skip:
        """The events of one entry, or why there are none. `source`: what it was read from, for want of a request id."""
        request = entry.request
        if request is None:
            return Skip.STREAM_SESSION
        meter = self._only or self._rules.meter_for(entry)
        if isinstance(meter, Skip):
            return meter
        time = _time(entry.started_at)
        subject = meter.subject_of(entry)
        if isinstance(subject, Skip):
            return subject
        if sieve is not None and (reason := sieve.skip(time, subject[0])) is not None:
            return reason
        request_id = request.id
        base = f"{request_id}-{int(entry.started_at)}" if request_id else content_hash(_object_of(source))
        found = meter.events_of(entry, request, base, subject, time, books)
        if not request_id and not isinstance(found, Skip):
            books[Count.HASHED_IDS] += 1
        return found

    def explain(self, data: bytes, start_offset: int = 0, format: Format = "auto") -> Iterator[Explained]:
        """As `map_lines`, but one entry after the other, each with what became of it and by which rule."""
        for text in unwrapped(data, start_offset, format):
            for piece in _pieces(text, format):
                yield self._explain_piece(piece, text.start_offset)

    def _explain_piece(self, piece: Piece | Skip, offset: int) -> Explained:
        request_id = rule = None
        events: list[UsageEvent] = []
        outcome: Skip | Unbillable | None = None
        try:
            found = self._bill_piece(piece, b"", Books())
            if isinstance(found, Skip):
                outcome = found
            else:
                events = found
        except Unbillable as fault:
            outcome = fault
        if isinstance(piece, Piece) and piece.value is not None:
            request_id, rule = self._who_decided(piece.value)
        return Explained(offset, request_id, rule, outcome, events)

    def _who_decided(self, value: dict[str, Any]) -> tuple[str | None, str | None]:
        try:
            entry = self._convert(value)
        except Unbillable:
            return None, None
        if entry.request is None:
            return None, None
        return entry.request.id or None, self._rules.name_for(entry)


def overlong_line(line: Overlong, start_offset: int, end_offset: int) -> Mapped:
    """A line above the limit: one dead letter, with what is kept of it."""
    mapped = Mapped()
    mapped.books[Count.LINES] += 1
    mapped.books[Count.ENTRIES] += 1
    mapped.books.dead_letter(Dead.LINE_TOO_LONG)
    detail = f"a line of {line.length} bytes, SHA-256 {line.sha256}; its beginning is kept"
    mapped.dead_letters.append(DeadLetter(start_offset, end_offset, Dead.LINE_TOO_LONG, detail, line.head))
    return mapped


def nuls(count: int) -> Mapped:
    """NULs where lines should be: counted, and nothing else."""
    return Mapped(books=Books({Count.NUL_BYTES: count}))


def _object_of(source: bytes | dict[str, Any]) -> dict[str, Any]:
    return whole_object(source) if isinstance(source, bytes) else source


def _no_entry(_: bytes) -> None:
    """Stands for the decoder where no line is an entry as it is."""


def _pieces(text: Text, format: Format) -> "list[Piece | Skip]":
    if not text.payload.strip(b"\0").strip():
        return [Skip.BLANK_LINE]
    if format in NOT_WRAPPED and text.wrapper is None:
        return [Piece(None, Unbillable(Dead.NOT_JSON, NOT_WRAPPED[format]), text.payload)]
    found = apart_from_errors(pieces(text.payload))
    if format == "ndjson":
        return [*found]
    return [Skip.NOT_AN_ENTRY if is_foreign(piece, wrapped=text.wrapper is not None) else piece for piece in found]


def _keep(mapped: Mapped, fault: Unbillable, text: Text, raw: bytes) -> None:
    """Keep a line, or a piece of it, aside."""
    mapped.books.dead_letter(fault.reason)
    mapped.dead_letters.append(DeadLetter(text.start_offset, text.end_offset, fault.reason, fault.detail, raw))


def _names_read(everything: list[MeteringSettings]) -> tuple[set[str], set[str]]:
    """The headers and query parameters that any of the settings reads."""
    headers, query = {"host"}, set()
    for settings in everything:
        named = [(subject.look_up_value_in, str(subject.field)) for subject in settings.subjects]
        named += [(attribute.source, attribute.look_up_value_in) for attribute in settings.attributes]
        headers |= {name.lower() for kind, name in named if kind == "header"}
        query |= {name for kind, name in named if kind == "query"}
        if "request_user_agent" in settings.personal_fields:
            headers.add("user-agent")
    return headers, query


def _has_filters(settings: MeteringSettings) -> bool:
    return not settings.enabled or any((settings.methods, settings.statuses, settings.paths, settings.workspaces))


def _time(started_at: Any) -> str:
    """`started_at`, milliseconds since the epoch, as RFC 3339 in UTC. Raises `Unbillable` for what can't be stored."""
    if isinstance(started_at, float) and started_at.is_integer():
        started_at = int(started_at)
    if type(started_at) is not int or not EARLIEST_STARTED_AT_MS <= started_at <= LATEST_STARTED_AT_MS:
        given = "missing" if started_at is None else shown(started_at)
        raise Unbillable(Dead.BAD_STARTED_AT, f"started_at is {given}, not milliseconds between 2001 and 2106")
    return f"{_second(started_at // 1000)}.{started_at % 1000:03d}Z"


@lru_cache(maxsize=1024)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
