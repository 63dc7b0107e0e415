"""Maps lines of a Kong log to usage events: bytes in; events, books and dead letters out.

Pure: no I/O, no clock, no randomness, no state between lines. What an event holds is fixed by the names of Kong's own
metering-and-billing plugin (Kong 3.14), so that meters made for it work unchanged.

An event's id is a promise: `<request.id>-<started_at>:<kind>`, or a hash of the entry in place of the first part where
Kong wrote no request id. It never depends on file, offset, host or clock, so whoever reads an entry again bills nothing
new. `started_at` is part of it because Kong's request ids repeat across pods (lua-kong-nginx-module PR 112).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import msgspec

from metershipper.books import Books, Count, Dead, Skip
from metershipper.config import Attribute, Metering, Subject
from metershipper.entry import AiPart, Entry, EntryDecoder, NotAnEntry, Request, Usage, content_hash, field_names, format_number

API_REQUEST = "kong.api_request"
LLM_REQUEST = "kong.llm_request"
# OpenMeter stores times as 32-bit seconds and drops what is not after 1970; seconds in place of milliseconds land there.
EARLIEST_STARTED_AT_MS = 1_000_000_000_000  # 2001-09-09
LATEST_STARTED_AT_MS = 4_294_967_295_999  # 2106-02-07
# OpenMeter's server reads numbers as doubles: above this an integer is no longer exact.
MAX_TOKENS = 2**53
MAX_SUBJECT_BYTES = 1024
# The containers that can be an entry's main AI call, in the order in which the first one present is taken.
MAIN_CONTAINERS = ("proxy", "ai-proxy", "ai-proxy-advanced")
FLAT = ""
UNSPECIFIED = "UNSPECIFIED"

AnyEntry: TypeAlias = Entry[Any, Any, Any]


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


class AiCall(NamedTuple):
    """One AI call found in an entry. `suffix` keeps the ids of several calls in one entry apart."""

    suffix: str
    container: str
    part: AiPart
    usage: Usage


class _Refused(Exception):
    """The entry can't be billed as it is: it becomes a dead letter."""

    def __init__(self, reason: Dead, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


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
        self._subject = _subject_reader(subject, header_fields, query_fields)
        self._attributes = _attributes_reader(metering.attributes, header_fields, query_fields)
        self._host = _value_reader("headers", header_fields["host"])
        self._personal = _personal_reader(metering.personal_fields, header_fields)
        self._api_data = _data_struct("ApiRequestData", API_FIELDS, metering.attributes)
        self._llm_data = _data_struct("LlmRequestData", LLM_FIELDS, metering.attributes)

    def map_lines(self, data: bytes, start_offset: int = 0) -> Mapped:
        """Map `data`, whole lines of which the last may lack its newline; `start_offset` is where it begins in its file.

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
            except (NotAnEntry, _Refused) as error:
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
                raise _Refused(Dead.NO_SUBJECT, "no subject where the rule looks")
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
            found.append(
                UsageEvent("1.0", base + ":api_request", metering.source, API_REQUEST, subject, time, data)
            )
        failed_calls = 0
        if entry.ai:
            for call in ai_calls(entry.ai):
                asked, answered = input_tokens(call.usage), output_tokens(call.usage)
                if self._is_failed(entry, answered):
                    failed_calls += 1 if asked else 0
                    continue
                for tokens, kind, direction in ((asked, ":input", "request"), (answered, ":output", "response")):
                    if tokens or (tokens == 0 and metering.emit_zero_tokens):
                        values = self._llm_values(entry, request, call, direction)
                        data = self._llm_data(tokens, direction, *values, *attributes)
                        event_id = base + kind + call.suffix
                        found.append(
                            UsageEvent("1.0", event_id, metering.source, LLM_REQUEST, subject, time, data)
                        )
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

    def _llm_values(
        self, entry: AnyEntry, request: Request[Any, Any], call: AiCall, direction: str
    ) -> tuple[Any, ...]:
        part, response, route, service = call.part, entry.response, entry.route, entry.service
        meta = part.meta or part
        asked, answered = meta.request_model, meta.response_model
        return (
            _model(asked, answered) if direction == "request" else _model(answered, asked),
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


API_FIELDS = (
    "request_method request_host request_size_bytes response_http_status response_size_bytes upstream_status route_id "
    "route_name service_id service_name service_port service_protocol subject_type "
    "client_ip request_uri request_user_agent"
).split()
LLM_FIELDS = (
    "tokens type model request_model response_model provider ai_plugin_id ai_plugin_name api_request_id cache_status "
    "http_status route_id route_name service_id service_name subject_type"
).split()
# Plain strings: an enum member's hash is computed in Python, which the hot path would feel.
_TOKENS = {"request": Count.TOKENS_REQUEST.value, "response": Count.TOKENS_RESPONSE.value}
_FAILED_AI_CALLS = Count.FAILED_AI_CALLS.value
_HASHED_IDS = Count.HASHED_IDS.value


def ai_calls(ai: dict[str, AiPart]) -> Iterator[AiCall]:
    """The AI calls of one entry, the main one first; each is billed once.

    A plugin's container holds `usage` (Kong 3.7 and later). The flat form (3.6) is the sum over all plugins of the
    request, so it counts only where no container has usage. The main call is the first of `MAIN_CONTAINERS`, else the
    first by name; the further ones carry their container's name in their ids.
    """
    if len(ai) == 1:  # by far the most frequent: one container
        ((name, part),) = ai.items()
        if name == "usage":
            yield AiCall("", FLAT, part, part)
        elif part.usage is not None:
            yield AiCall("", name, part, part.usage)
        return
    names = [name for name, part in ai.items() if part.usage is not None]
    if not names:
        if (flat := ai.get("usage")) is not None:
            yield AiCall("", FLAT, ai.get("meta") or flat, flat)  # `ai.meta` holds the models itself
        return
    names.sort(key=lambda name: (MAIN_CONTAINERS.index(name) if name in MAIN_CONTAINERS else len(MAIN_CONTAINERS), name))
    for number, name in enumerate(names):
        part = ai[name]
        assert part.usage is not None
        yield AiCall(f".{name}" if number else "", name, part, part.usage)


def input_tokens(usage: Usage) -> int | None:
    """Input tokens under whichever name this Kong version uses; None when missing. Raises `_Refused` for a bad count."""
    tokens = usage.prompt_tokens
    if type(tokens) is int and 0 < tokens <= MAX_TOKENS:
        return tokens
    return _first_count(usage.prompt_tokens, usage.prompt_token, usage.input_tokens)


def output_tokens(usage: Usage) -> int | None:
    """Output tokens, as `input_tokens`."""
    tokens = usage.completion_tokens
    if type(tokens) is int and 0 < tokens <= MAX_TOKENS:
        return tokens
    return _first_count(usage.completion_tokens, usage.completion_token, usage.output_tokens)


def _first_count(*values: Any) -> int | None:
    """The first count above zero; else 0 where there is a zero; else None. Every value is checked."""
    counts = [_count(value) for value in values if value is not None]
    return next(filter(None, counts), 0) if counts else None


def _count(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_TOKENS:
        raise _Refused(Dead.BAD_TOKEN_COUNT, f"a token count is {_shown(value)}, not a whole number from 0 to 2^53")
    return value


def _shown(value: Any) -> str:
    return repr(value)[:40] if isinstance(value, int | float) else f"a {type(value).__name__}"


def _time(started_at: Any) -> str:
    """`started_at`, milliseconds since the epoch, as RFC 3339 in UTC. Raises `_Refused` outside what a server can store."""
    if isinstance(started_at, float) and started_at.is_integer():
        started_at = int(started_at)
    if type(started_at) is not int or not EARLIEST_STARTED_AT_MS <= started_at <= LATEST_STARTED_AT_MS:
        given = "missing" if started_at is None else _shown(started_at)
        raise _Refused(Dead.BAD_STARTED_AT, f"started_at is {given}, not milliseconds between 2001 and 2106")
    return f"{_second(started_at // 1000)}.{started_at % 1000:03d}Z"


@lru_cache(maxsize=1024)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _model(first: str | None, other: str | None) -> str | None:
    """Kong writes UNSPECIFIED where a plugin took the model from its own configuration: then the other one is known."""
    return first if first and first != UNSPECIFIED else other or first


def as_bytes_count(size: int | str | None) -> int | None:
    """A size in bytes; Kong wrote it as text until 2.1."""
    if isinstance(size, str):
        return int(size) if size.isascii() and size.isdigit() and len(size) < 19 else None
    return size


def first_value(value: Any) -> str | None:
    """The first value of a header or query parameter as text; None when absent, empty or without a value (`?beta`)."""
    if isinstance(value, list):
        value = value[0] if value else None
    if type(value) is str:
        return value or None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return format_number(value)


def _checked_subject(subject: str | None) -> str | None:
    """Raises `_Refused` for what no customer is called: over 1 KiB, or with control characters."""
    if subject is None or (len(subject) < MAX_SUBJECT_BYTES // 4 and subject.isprintable()):
        return subject
    if len(subject.encode("utf-8", "replace")) > MAX_SUBJECT_BYTES:
        raise _Refused(Dead.BAD_SUBJECT, f"the subject is longer than {MAX_SUBJECT_BYTES} bytes")
    if any(character < " " or character == "\x7f" for character in subject):
        raise _Refused(Dead.BAD_SUBJECT, "the subject holds control characters")
    return subject


def _value_reader(section: str, attribute: str) -> Callable[[AnyEntry], str | None]:
    read_section, read_value = attrgetter(f"request.{section}"), attrgetter(attribute)

    def read(entry: AnyEntry) -> str | None:
        values = read_section(entry)
        return None if values is None else first_value(read_value(values))

    return read


def _subject_reader(
    subject: Subject, headers: dict[str, str], query: dict[str, str]
) -> Callable[[AnyEntry], str | None]:
    read: Callable[[AnyEntry], str | None]
    match subject.look_up_value_in:
        case "header":
            read = _value_reader("headers", headers[str(subject.field).lower()])
        case "query":
            read = _value_reader("querystring", query[str(subject.field)])
        case "application":
            read = _application
        case "consumer":
            read = _consumer_id if subject.field is None else _consumer_field(subject.field)
    return lambda entry: _checked_subject(read(entry))


def _consumer_id(entry: AnyEntry) -> str | None:
    return f"consumer:{entry.consumer.id}" if entry.consumer and entry.consumer.id else None


def _consumer_field(name: str) -> Callable[[AnyEntry], str | None]:
    read_field: Callable[[Any], str | None] = attrgetter(name)
    return lambda entry: (read_field(entry.consumer) or None) if entry.consumer else None


def _application(entry: AnyEntry) -> str | None:
    """The application, or the credential Konnect's application auth leaves where there is no consumer."""
    if entry.application and entry.application.id:
        return f"application:{entry.application.id}"
    credential = entry.authenticated_entity
    return f"application:{credential.id}" if credential and credential.id and entry.consumer is None else None


def _attributes_reader(
    attributes: tuple[Attribute, ...], headers: dict[str, str], query: dict[str, str]
) -> Callable[[AnyEntry], tuple[str | None, ...]]:
    readers = [
        _value_reader("headers", headers[a.look_up_value_in.lower()])
        if a.source == "header"
        else _value_reader("querystring", query[a.look_up_value_in])
        for a in attributes
    ]
    if not readers:
        return lambda entry: ()
    return lambda entry: tuple(read(entry) for read in readers)


def _personal_reader(wanted: frozenset[str], headers: dict[str, str]) -> Callable[[AnyEntry], tuple[str | None, ...]]:
    """The three personal fields; only the listed ones are ever read."""
    readers: dict[str, Callable[[AnyEntry], str | None]] = {
        "client_ip": attrgetter("client_ip"),
        "request_uri": attrgetter("request.uri"),
    }
    if "request_user_agent" in wanted:
        readers["request_user_agent"] = _value_reader("headers", headers["user-agent"])
    if not wanted:
        return lambda entry: (None, None, None)
    names = API_FIELDS[-3:]
    return lambda entry: tuple(readers[name](entry) if name in wanted else None for name in names)


def _data_struct(name: str, fields: list[str], attributes: tuple[Attribute, ...]) -> type[msgspec.Struct]:
    """A struct of the built-in properties and the attributes, in order; absent values are omitted, never null."""
    extra = {f"attribute_{number}": attribute.event_property_name for number, attribute in enumerate(attributes)}
    return msgspec.defstruct(
        name,
        [(each, Any, None) for each in (*fields, *extra)],
        rename=extra,
        omit_defaults=True,
        gc=False,
    )
