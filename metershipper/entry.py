"""Decoding of one line into one Kong log entry. Pure: bytes in, an `Entry` out, or `Unbillable` with its reason.

Two paths. The fast one is a msgspec decoder compiled from what the rules name: it skips the other nine tenths of a
line without making objects of them. What it refuses (a BOM, a lone surrogate, a size as text, a section of an odd
type) goes through the lenient one, which reads the line as Kong's Lua encoder may have meant it. Both give the same
`Entry`, so the mapper has one kind of input. Shapes by Kong version: see `Usage` and `AiPart`.
"""

import hashlib
import json
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from metershipper.books import Dead
from metershipper.pieces import Unbillable

# No status, size or port is larger, and a server refuses the whole batch for a number of hundreds of digits.
MAX_INTEGER = 2**63 - 1
Integer = Annotated[int, msgspec.Meta(ge=-MAX_INTEGER, le=MAX_INTEGER)]

HeadersT = TypeVar("HeadersT")
QueryT = TypeVar("QueryT")
AiT = TypeVar("AiT")


class Usage(msgspec.Struct, gc=False):
    """Token counts, as whatever JSON value the upstream sent; the mapper checks them.

    Plural names from Kong 3.8 (and in 3.6's flat form), singular in 3.7, `input_`/`output_` from 3.11 for non-text.
    """

    prompt_tokens: Any = None
    completion_tokens: Any = None
    prompt_token: Any = None
    completion_token: Any = None
    input_tokens: Any = None
    output_tokens: Any = None
    prompt_tokens_details: Any = None  # tables of counts, from 3.11
    completion_tokens_details: Any = None
    input_tokens_details: Any = None
    output_tokens_details: Any = None


class Meta(msgspec.Struct, gc=False):
    """Which model was asked, which answered, through which plugin."""

    plugin_id: str | None = None
    provider_name: str | None = None
    request_model: str | None = None
    response_model: str | None = None


class Cache(msgspec.Struct, gc=False):
    """What the semantic cache did."""

    cache_status: str | None = None


class McpCall(msgspec.Struct, gc=False):
    """One call in `ai.mcp.rpc` (3.12 and later). `latency` in milliseconds; `error` as the tool's server put it."""

    method: str | None = None
    tool_name: str | None = None
    latency: Any = None
    error: Any = None


class AiPart(Usage, gc=False):
    """One value under `ai`: a plugin's container (3.7 and later), the flat `ai.usage` or `ai.meta` (3.6), or `ai.mcp`.

    One type for all, so that the whole of `ai` decodes in one pass whatever plugins there are.
    """

    usage: Usage | None = None
    meta: Meta | None = None
    cache: Cache | None = None
    plugin_id: str | None = None
    provider_name: str | None = None
    request_model: str | None = None
    response_model: str | None = None
    rpc: list[McpCall] | None = None


class Request(msgspec.Struct, Generic[HeadersT, QueryT], gc=False):
    """The client's request. `id` is absent before Kong 3.5 and may be empty; `size` is text before Kong 2.2."""

    id: str | None = None
    method: str | None = None
    uri: str | None = None
    size: Integer | str | None = None
    headers: HeadersT | None = None
    querystring: QueryT | None = None


class Response(msgspec.Struct, gc=False):
    """The answer the client got."""

    status: Integer | None = None
    size: Integer | str | None = None


class Consumer(msgspec.Struct, gc=False):
    """The authenticated consumer; Kong writes no `consumer` key without authentication."""

    id: str | None = None
    username: str | None = None
    custom_id: str | None = None


class Identified(msgspec.Struct, gc=False):
    """An application or an authenticated credential."""

    id: str | None = None


class Route(msgspec.Struct, gc=False):
    """The matched route."""

    id: str | None = None
    name: str | None = None


class Service(msgspec.Struct, gc=False):
    """The service behind the route."""

    id: str | None = None
    name: str | None = None
    port: Integer | None = None
    protocol: str | None = None


class _Unread(msgspec.Struct, gc=False):
    """Stands where no rule reads: its fields are skipped without being made."""


class Entry(msgspec.Struct, Generic[HeadersT, QueryT, AiT]):
    """One Kong log entry, as far as billing reads it. `started_at`: milliseconds since the epoch, unchecked."""

    request: Request[HeadersT, QueryT] | None = None
    response: Response | None = None
    started_at: Any = None
    client_ip: str | None = None
    consumer: Consumer | None = None
    application: Identified | None = None
    authenticated_entity: Identified | None = None
    route: Route | None = None
    service: Service | None = None
    upstream_status: str | None = None
    workspace: str | None = None
    workspace_name: str | None = None
    ai: AiT | None = None
    session: _Unread | None = None  # of stream mode


def field_names(names: Iterable[str]) -> dict[str, str]:
    """Attribute name on the compiled struct for each header or query parameter, in a fixed order."""
    return {name: f"value_{number}" for number, name in enumerate(sorted(set(names)))}


def _named_values(kind: str, names: Iterable[str]) -> type[msgspec.Struct]:
    attributes = field_names(names)
    return msgspec.defstruct(
        kind,
        [(attribute, Any, None) for attribute in attributes.values()],
        rename={attribute: name for name, attribute in attributes.items()},
        gc=False,
    )


class EntryDecoder:
    """Decodes the fields the rules need, and no others.

    Args: `headers` in lower case, as Kong logs them; `query` parameters in their own case; `ai` whether usage is read.
    Header and query values stand on the result as the attributes that `field_names` gives, untouched.
    """

    def __init__(self, headers: Iterable[str], query: Iterable[str], *, ai: bool) -> None:
        ai_type: Any = dict[str, AiPart] if ai else _Unread
        self._type: Any = Entry[_named_values("Headers", headers), _named_values("Query", query), ai_type]  # type: ignore[misc]  # compiled at run time
        self._fast = msgspec.json.Decoder(self._type).decode

    def decode(self, line: bytes) -> Entry[Any, Any, Any] | None:
        """The entry in `line`, the fast way; None where it takes `pieces` and `convert` to tell what it holds."""
        try:
            entry: Entry[Any, Any, Any] = self._fast(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        return None if entry.request is None else entry

    def convert(self, value: dict[str, Any]) -> Entry[Any, Any, Any]:
        """The entry in an object. Raises `Unbillable` for an object that is none of Kong's."""
        entry: Entry[Any, Any, Any] = _convert(self._type, value)
        if entry.request is None and entry.session is None:
            raise Unbillable(Dead.NOT_AN_ENTRY, "a JSON object without `request`, which every Kong entry has")
        return entry


def clean_text(text: str) -> str:
    """`text` with lone surrogates replaced, so that it can be encoded."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _convert(wanted: Any, value: Any) -> Any:
    """`value` as `wanted`, one of the types used by the structs above; what has no meaning there becomes None."""
    origin = typing.get_origin(wanted)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(wanted)
        is_text = isinstance(value, str) and str in options
        return _convert(str if is_text else next(o for o in options if o is not type(None)), value)
    if origin is dict:
        item = typing.get_args(wanted)[1]
        return {clean_text(k): _convert(item, v) or item() for k, v in value.items()} if _is_object(value) else None
    if origin is list:
        (item,) = typing.get_args(wanted)
        return [_convert(item, v) or item() for v in value] if isinstance(value, list) else None
    if wanted is Any:
        return _clean(value)
    if wanted is str:
        return _as_text(value)
    if wanted == Integer:
        return _as_integer(value)
    if not _is_object(value):
        return None
    fields = msgspec.structs.fields(wanted)
    return wanted(**{f.name: _convert(f.type, value.get(f.encode_name)) for f in fields})


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _clean(value: Any) -> Any:
    """A header or query value, its text cleaned: a string or a list of them. What is nested deeper has no reader."""
    if isinstance(value, str):
        return clean_text(value)
    return [clean_text(item) if isinstance(item, str) else item for item in value] if isinstance(value, list) else value


def _as_text(value: Any) -> str | None:
    if isinstance(value, str):
        return clean_text(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return format_number(value) if is_number else None


def _as_integer(value: Any) -> int | None:
    try:
        number = None if isinstance(value, bool) else int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number is not None and abs(number) <= MAX_INTEGER else None


def format_number(value: int | float) -> str:
    """A number as text: integral floats without a fraction, as the client would have written them."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def content_hash(value: dict[str, Any]) -> str:
    """First 32 hex digits of the SHA-256 of an entry as canonical JSON: recipe 1, pinned by a test.

    Canonical: keys sorted, no white space, integral numbers as integers, everything beyond ASCII escaped, so that
    key order, `\\/` and a re-encoding on the way change nothing. For entries without a request id (Kong before 3.5).
    Raises `Unbillable` for what is nested too deep.
    """
    try:
        canonical = json.dumps(_canonical(value), sort_keys=True, separators=(",", ":"))
    except RecursionError:
        raise Unbillable(Dead.NOT_JSON, "nested too deep") from None
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:32]


def _canonical(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    return [_canonical(item) for item in value] if isinstance(value, list) else value
