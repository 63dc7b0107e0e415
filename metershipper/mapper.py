"""Maps lines of a Kong log to usage events: bytes in; events, books and dead letters out.

Pure: no I/O, no clock, no randomness, no state between lines. What an event holds is fixed by the names of Kong's own
metering-and-billing plugin (Kong 3.14), so that meters made for it work unchanged.

An event's id is a promise: `<request.id>-<started_at>:<kind>`, or a hash of the entry in place of the first part where
Kong wrote no request id. It never depends on file, offset, host or clock, so whoever reads an entry again bills nothing
new. `started_at` is part of it because Kong's request ids repeat across pods (lua-kong-nginx-module PR 112).
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from metershipper.books import Books, Count, Dead, Skip
from metershipper.config import API_FIELDS, LLM_FIELDS, Attribute, Metering
from metershipper.entry import EntryDecoder, Request, Unbillable, content_hash, field_names
from metershipper.rules import AnyEntry, attributes_reader, personal_reader, subject_reader, value_reader
from metershipper.usage import AiCall, ai_calls, input_tokens, model_of, output_tokens, shown

API_REQUEST = "kong.api_request"
LLM_REQUEST = "kong.llm_request"
# OpenMeter stores times as 32-bit seconds. Seconds in place of milliseconds fall below the lower bound.
EARLIEST_STARTED_AT_MS = 1_000_000_000_000  # 2001-09-09
LATEST_STARTED_AT_MS = 4_294_967_295_999  # 2106-02-07


class UsageEvent(msgspec.Struct, gc=False):
    """One CloudEvent 1.0 in structured JSON, without extension attributes (OpenMeter's v3 refuses them)."""

    specversion: str
    id: str
    source: str
    type: str
    subject: str
    time: str
    data: Any


class DeadLetter(NamedTuple):
    """A line kept aside: offsets in bytes in its file, the reason from the closed list, words, and the raw line."""

    start_offset: int
    end_offset: int
    reason: Dead
    detail: str
    line: bytes


@dataclass(slots=True)
class Mapped:
    """What some lines became. `books` counts exactly these lines."""

    events: list[UsageEvent] = field(default_factory=list)
    books: Books = field(default_factory=Books)
    dead_letters: list[DeadLetter] = field(default_factory=list)


class Mapper:
    """The rules of one configuration, compiled once; `map_lines` may be called from any thread, one call at a time."""

    def __init__(self, metering: Metering) -> None:
        self._metering = metering
        headers = {"host"} | {a.look_up_value_in.lower() for a in metering.attributes if a.source == "header"}
        query = {a.look_up_value_in for a in metering.attributes if a.source == "query"}
        subject = metering.subject
        if subject.look_up_value_in == "header":
            headers.add(str(subject.field).lower())
        if subject.look_up_value_in == "query":
            query.add(str(subject.field))
        if "request_user_agent" in metering.personal_fields:
            headers.add("user-agent")
        header_fields, query_fields = field_names(headers), field_names(query)
        self._decode = EntryDecoder(headers, query, ai=metering.meter_ai_token_usage).decode
        self._subject = subject_reader(subject, header_fields, query_fields)
        self._attributes = attributes_reader(metering.attributes, header_fields, query_fields)
        self._host = value_reader("headers", header_fields["host"])
        self._personal = personal_reader(metering.personal_fields, header_fields)
        self._api_data = _data_struct("ApiRequestData", API_FIELDS, metering.attributes)
        self._llm_data = _data_struct("LlmRequestData", LLM_FIELDS, metering.attributes)

    def map_lines(self, data: bytes, start_offset: int = 0) -> Mapped:
        """Map `data`: whole lines, of which the last may lack its newline; `start_offset` is where they begin.

        Never raises for anything the lines hold.
        """
        mapped = Mapped()
        books, events = mapped.books, mapped.events
        lines = data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        skipped = billed = 0
        offset = start_offset
        for line in lines:
            try:
                reason = self._map_line(line, events, books)
                if reason is None:
                    billed += 1
                else:
                    skipped += 1
                    books.skip(reason)
            except Unbillable as error:
                books.dead_letter(error.reason)
                end_offset = min(offset + len(line) + 1, start_offset + len(data))
                mapped.dead_letters.append(DeadLetter(offset, end_offset, error.reason, error.detail, line))
            offset += len(line) + 1
        books[Count.LINES] += len(lines)
        books[Count.BILLED] += billed
        books[Count.EVENTS] += len(events)
        return mapped

    def _map_line(self, line: bytes, events: list[UsageEvent], books: Books) -> Skip | None:
        """Append the events of one line. Returns why there are none, or None when there are."""
        if not line or line.isspace():
            return Skip.BLANK_LINE
        entry = self._decode(line)
        if entry.request is None:
            return Skip.STREAM_SESSION
        time = _time(entry.started_at)
        subject = self._subject(entry)
        if subject is None:
            if self._metering.on_missing_subject == "dead_letter":
                raise Unbillable(Dead.NO_SUBJECT, "no subject where the rule looks")
            return Skip.NO_SUBJECT
        found = self._events_of(entry, entry.request, line, subject, time, books)
        if isinstance(found, Skip):
            return found
        events += found
        return None

    def _events_of(
        self, entry: AnyEntry, request: Request[Any, Any], line: bytes, subject: str, time: str, books: Books
    ) -> list[UsageEvent] | Skip:
        metering = self._metering
        attributes = self._attributes(entry)
        request_id = request.id
        base = f"{request_id}-{int(entry.started_at)}" if request_id else content_hash(line)
        found: list[UsageEvent] = []
        if metering.meter_api_requests:
            data = self._api_data(*self._api_values(entry, request), *attributes)
            found.append(UsageEvent("1.0", base + ":api_request", metering.source, API_REQUEST, subject, time, data))
        failed_calls = 0
        if entry.ai and metering.meter_ai_token_usage:
            # All counts are checked before the first one is booked: a bad one makes the whole line a dead letter.
            calls = [(call, input_tokens(call.usage), output_tokens(call.usage)) for call in ai_calls(entry.ai)]
            for call, asked, answered in calls:
                if self._is_failed(entry, answered):
                    failed_calls += 1 if asked else 0
                    continue
                for tokens, kind, direction in ((asked, ":input", "request"), (answered, ":output", "response")):
                    if tokens or (tokens == 0 and metering.emit_zero_tokens):
                        values = self._llm_values(entry, request, call, direction)
                        data = self._llm_data(tokens, direction, *values, *attributes)
                        event_id = base + kind + call.suffix
                        found.append(UsageEvent("1.0", event_id, metering.source, LLM_REQUEST, subject, time, data))
                        books[_TOKENS[direction]] += tokens
        if failed_calls:
            books[_FAILED_AI_CALLS] += failed_calls
        if not found:
            return Skip.FAILED_AI_CALL if failed_calls else Skip.NO_USAGE
        if not request_id:
            books[_HASHED_IDS] += 1
        return found

    def _is_failed(self, entry: AnyEntry, output: int | None) -> bool:
        """A failed call: what Kong logs as its input is an estimate made before the call (Kong 3.7-3.9 source)."""
        if output or self._metering.meter_failed_ai_calls:
            return False
        response = entry.response
        return response is not None and response.status is not None and response.status >= 400

    def _api_values(self, entry: AnyEntry, request: Request[Any, Any]) -> tuple[Any, ...]:
        response, route, service = entry.response, entry.route, entry.service
        return (
            request.method,
            self._host(entry),
            as_bytes_count(request.size),
            response and response.status,
            response and as_bytes_count(response.size),
            entry.upstream_status or None,
            route and route.id,
            route and route.name,
            service and service.id,
            service and service.name,
            service and service.port,
            service and service.protocol,
            self._metering.subject.look_up_value_in,
            *self._personal(entry),
        )

    def _llm_values(self, entry: AnyEntry, request: Request[Any, Any], call: AiCall, direction: str) -> tuple[Any, ...]:
        part, response, route, service = call.part, entry.response, entry.route, entry.service
        meta = part.meta or part
        asked, answered = meta.request_model, meta.response_model
        return (
            model_of(asked, answered) if direction == "request" else model_of(answered, asked),
            asked,
            answered,
            meta.provider_name,
            meta.plugin_id,
            call.container or None,
            request.id or None,
            part.cache and part.cache.cache_status,
            response and response.status,
            route and route.id,
            route and route.name,
            service and service.id,
            service and service.name,
            self._metering.subject.look_up_value_in,
        )


# Plain strings: an enum member's hash is computed in Python, which the hot path would feel.
_TOKENS = {"request": Count.TOKENS_REQUEST.value, "response": Count.TOKENS_RESPONSE.value}
_FAILED_AI_CALLS = Count.FAILED_AI_CALLS.value
_HASHED_IDS = Count.HASHED_IDS.value


def _time(started_at: Any) -> str:
    """`started_at`, milliseconds since the epoch, as RFC 3339 in UTC. Raises `Unbillable` for what can't be stored."""
    if isinstance(started_at, float) and started_at.is_integer():
        started_at = int(started_at)
    if type(started_at) is not int or not EARLIEST_STARTED_AT_MS <= started_at <= LATEST_STARTED_AT_MS:
        given = "missing" if started_at is None else shown(started_at)
        raise Unbillable(Dead.BAD_STARTED_AT, f"started_at is {given}, not milliseconds between 2001 and 2106")
    return f"{_second(started_at // 1000)}.{started_at % 1000:03d}Z"


def overlong_line(head: bytes, start_offset: int, end_offset: int) -> Mapped:
    """A line above the limit, of which only the beginning was read: one dead letter."""
    mapped = Mapped()
    mapped.books[Count.LINES] += 1
    mapped.books.dead_letter(Dead.LINE_TOO_LONG)
    detail = f"a line of {end_offset - start_offset} bytes; its beginning is kept"
    mapped.dead_letters.append(DeadLetter(start_offset, end_offset, Dead.LINE_TOO_LONG, detail, head))
    return mapped


@lru_cache(maxsize=1024)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def as_bytes_count(size: int | str | None) -> int | None:
    """A size in bytes; Kong wrote it as text until 2.1."""
    if isinstance(size, str):
        return int(size) if size.isascii() and size.isdigit() and len(size) < 19 else None
    return size


def _data_struct(name: str, fields: tuple[str, ...], attributes: tuple[Attribute, ...]) -> type[msgspec.Struct]:
    """A struct of the built-in properties and the attributes, in order; absent values are omitted, never null."""
    extra = {f"attribute_{number}": attribute.event_property_name for number, attribute in enumerate(attributes)}
    return msgspec.defstruct(
        name,
        [(each, Any, None) for each in (*fields, *extra)],
        rename=extra,
        omit_defaults=True,
        gc=False,
    )
