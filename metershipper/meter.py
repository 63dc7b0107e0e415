"""One set of settings, compiled: what usage events an entry becomes. Pure.

What an event holds is fixed by the names of Kong's own metering-and-billing plugin (Kong 3.14), so that meters made
for it work unchanged. An event's id is a promise: `<request.id>-<started_at>:<kind>`, with a hash of the entry in place
of the first part where Kong wrote no request id. It never depends on file, offset, host or clock, so whoever reads an
entry again bills nothing new. `started_at` is part of it because Kong's request ids repeat across pods
(lua-kong-nginx-module PR 112).
"""

from typing import Any

from metershipper.books import Books, Count, Dead, Skip
from metershipper.entry import AiPart, Request, clean_text, format_number
from metershipper.events import API_REQUEST, LLM_REQUEST, MCP_TOOL_CALL, UsageEvent, data_struct
from metershipper.metering import API_FIELDS, DETAIL_FIELDS, LLM_FIELDS, MCP_FIELDS, MeteringSettings
from metershipper.pieces import Unbillable
from metershipper.readers import AnyEntry, attributes_reader, personal_reader, subject_reader, value_reader
from metershipper.usage import (
    AiCall,
    ai_calls,
    cached_tokens,
    input_details,
    input_tokens,
    model_of,
    output_details,
    output_tokens,
)

TOOLS_CALL = "tools/call"
MAX_ERROR_CHARACTERS = 200
REQUEST, CACHED, RESPONSE = "request", "request_cached", "response"
# The kind of each direction in an event's id, and what its tokens are counted under.
_KINDS = {REQUEST: ":input", CACHED: ":input_cached", RESPONSE: ":output"}
_TOKENS = {
    REQUEST: Count.TOKENS_REQUEST,
    CACHED: Count.TOKENS_REQUEST,
    RESPONSE: Count.TOKENS_RESPONSE,
}


class Meter:
    """The settings of one scope, compiled. `name` is how they are called in the configuration.

    Args: `header_fields`, `query_fields`: where the decoder puts the values of headers and query parameters.
    """

    def __init__(
        self,
        name: str,
        settings: MeteringSettings,
        source: str,
        header_fields: dict[str, str],
        query_fields: dict[str, str],
    ) -> None:
        self.name = name
        self._settings = settings
        self._source = source
        self._subject = subject_reader(settings.subjects, header_fields, query_fields)
        self._attributes = attributes_reader(settings.attributes, header_fields, query_fields)
        self._host = value_reader("headers", header_fields["host"])
        self._personal = personal_reader(settings.personal_fields, header_fields)
        details = DETAIL_FIELDS if settings.token_details else ()
        self._api_data = data_struct("ApiRequestData", API_FIELDS, settings.attributes)
        self._llm_data = data_struct("LlmRequestData", LLM_FIELDS + details, settings.attributes)
        self._mcp_data = data_struct("McpToolCallData", MCP_FIELDS, settings.attributes)

    def subject_of(self, entry: AnyEntry) -> tuple[str, str] | Skip:
        """Who is billed and where that stood, or why nobody is. Raises `Unbillable` for what no customer is called."""
        found = self._subject(entry)
        if found is not None:
            return found
        if self._settings.on_missing_subject == "dead_letter":
            raise Unbillable(Dead.NO_SUBJECT, "no subject where the rule looks")
        return Skip.NO_SUBJECT

    def events_of(
        self,
        entry: AnyEntry,
        request: Request[Any, Any],
        base: str,
        subject: tuple[str, str],
        time: str,
        books: Books,
    ) -> list[UsageEvent] | Skip:
        """The events of one entry, or why there are none. `base`: the first part of their ids.

        Raises: `Unbillable` for a bad count, before anything was counted in `books`.
        """
        settings, source, (who, kind) = self._settings, self._source, subject
        attributes = self._attributes(entry)
        found: list[UsageEvent] = []
        if settings.meter_api_requests:
            data = self._api_data(*self._api_values(entry, request, kind), *attributes)
            found.append(UsageEvent("1.0", base + ":api_request", source, API_REQUEST, who, time, data))
        failed_calls = 0
        if entry.ai and settings.meter_ai_token_usage:
            # All counts are checked before the first one is booked: a bad one makes the whole line a dead letter.
            calls = [(call, self._directions(call)) for call in ai_calls(entry.ai)]
            place = _place(entry, kind)
            for call, directions in calls:
                if self._is_failed(entry, directions):
                    failed_calls += 1 if any(tokens for _, tokens, _ in directions) else 0
                    continue
                for direction, tokens, details in directions:
                    if tokens or (tokens == 0 and settings.emit_zero_tokens):
                        values = self._llm_values(request, call, direction)
                        data = self._llm_data(tokens, direction, *values, *place, *details, *attributes)
                        event_id = base + _KINDS[direction] + call.suffix
                        found.append(UsageEvent("1.0", event_id, source, LLM_REQUEST, who, time, data))
                        books[_TOKENS[direction]] += tokens
        if entry.ai and settings.meter_mcp_tool_calls and "mcp" in entry.ai:
            for number, values in self._tool_calls(request, entry.ai["mcp"]):
                data = self._mcp_data(*values, *_place(entry, kind), *attributes)
                event_id = f"{base}:mcp_tool_call.{number}"
                found.append(UsageEvent("1.0", event_id, source, MCP_TOOL_CALL, who, time, data))
        if failed_calls:
            books[Count.FAILED_AI_CALLS] += failed_calls
        if found:
            return found
        return Skip.FAILED_AI_CALL if failed_calls else Skip.NO_USAGE

    def _directions(self, call: AiCall) -> list[tuple[str, int | None, tuple[Any, ...]]]:
        """Direction, tokens and details of what a call took; input first, output last."""
        usage, settings = call.usage, self._settings
        asked, answered = input_tokens(usage), output_tokens(usage)
        asked_details: tuple[int | None, ...] = ()
        answered_details: tuple[int | None, ...] = ()
        if settings.token_details:
            asked_details, answered_details = _in_order(input_details(usage)), _in_order(output_details(usage))
        directions: list[tuple[str, int | None, tuple[Any, ...]]] = [(REQUEST, asked, asked_details)]
        if settings.split_cached_input and (cached := cached_tokens(usage)):
            # The cached tokens are an event of their own: as a detail as well they would be summed twice.
            rest = tuple(
                None if name == "cached_tokens" else value
                for name, value in zip(DETAIL_FIELDS, asked_details, strict=False)
            )
            # More cached than input: then they were not part of it (Anthropic, before Kong 3.14.0.8).
            uncached = (asked or 0) - cached if cached <= (asked or 0) else asked
            directions = [(REQUEST, uncached, rest), (CACHED, cached, (None,) * len(rest))]
        return [*directions, (RESPONSE, answered, answered_details)]

    def _is_failed(self, entry: AnyEntry, directions: list[tuple[str, int | None, tuple[Any, ...]]]) -> bool:
        """A failed call: what Kong logs as its input is an estimate made before the call (Kong 3.7-3.9 source)."""
        if directions[-1][1] or self._settings.meter_failed_ai_calls:
            return False
        response = entry.response
        return response is not None and response.status is not None and response.status >= 400

    def _api_values(self, entry: AnyEntry, request: Request[Any, Any], kind: str) -> tuple[Any, ...]:
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
            kind,
            *self._personal(entry),
        )

    def _llm_values(self, request: Request[Any, Any], call: AiCall, direction: str) -> tuple[Any, ...]:
        part = call.part
        meta = part.meta or part
        asked, answered = meta.request_model, meta.response_model
        return (
            model_of(answered, asked) if direction is RESPONSE else model_of(asked, answered),
            asked,
            answered,
            meta.provider_name,
            meta.plugin_id,
            call.container or None,
            request.id or None,
            part.cache and part.cache.cache_status,
        )

    def _tool_calls(self, request: Request[Any, Any], mcp: AiPart) -> list[tuple[int, tuple[Any, ...]]]:
        """The calls of tools in `ai.mcp.rpc` (Kong 3.12 and later), with their places there."""
        request_id = request.id or None
        return [
            (number, (call.tool_name, call.method, _milliseconds(call.latency), _error_text(call.error), request_id))
            for number, call in enumerate(mcp.rpc or ())
            if call.method == TOOLS_CALL
        ]


def _place(entry: AnyEntry, kind: str) -> tuple[Any, ...]:
    """What the events of one entry share: how it ended and where it went, the last fields of `LLM_FIELDS`."""
    response, route, service = entry.response, entry.route, entry.service
    return (
        response and response.status,
        route and route.id,
        route and route.name,
        service and service.id,
        service and service.name,
        kind,
    )


def _in_order(details: dict[str, int]) -> tuple[int | None, ...]:
    return tuple(details.get(name) for name in DETAIL_FIELDS)


def _milliseconds(latency: Any) -> int | float | None:
    is_number = isinstance(latency, int | float) and not isinstance(latency, bool)
    return latency if is_number and 0 <= latency < 2**53 else None


def _error_text(error: Any) -> str | None:
    """A tool's error as text: itself, or the message of an error object of JSON-RPC."""
    if isinstance(error, dict):
        error = error.get("message") or error.get("code")
    if isinstance(error, str):
        # The decoder leaves what is nested in an object as it was; a dimension of usage is no place for an essay.
        return clean_text(error)[:MAX_ERROR_CHARACTERS] or None
    return format_number(error) if isinstance(error, int | float) and not isinstance(error, bool) else None


def as_bytes_count(size: int | str | None) -> int | None:
    """A size in bytes; Kong wrote it as text until 2.1."""
    if isinstance(size, str):
        return int(size) if size.isascii() and size.isdigit() and len(size) < 19 else None
    return size
