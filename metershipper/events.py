"""Usage events, and what lines become: the types between mapping and delivery. No logic beyond making them."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from metershipper.books import Books, Dead
from metershipper.metering import Attribute

API_REQUEST = "kong.api_request"
LLM_REQUEST = "kong.llm_request"
MCP_TOOL_CALL = "kong.mcp_tool_call"


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


class RefusedEvent(NamedTuple):
    """A usage event that the server does not take, kept aside: `line` is the event as it was sent, `detail` the
    server's status and words. The offsets are those of the lines that were mapped together with its own.
    """

    start_offset: int
    end_offset: int
    reason: Dead
    detail: str
    line: bytes
    subject: str
    event_type: str
    event_id: str


@dataclass(slots=True)
class Mapped:
    """What some lines became. `books` counts exactly these lines."""

    events: list[UsageEvent] = field(default_factory=list)
    books: Books = field(default_factory=Books)
    dead_letters: list[DeadLetter] = field(default_factory=list)


def data_struct(name: str, fields: tuple[str, ...], attributes: tuple[Attribute, ...]) -> type[msgspec.Struct]:
    """A struct of the built-in properties and the attributes, in order; absent values are omitted, never null."""
    extra = {f"attribute_{number}": attribute.event_property_name for number, attribute in enumerate(attributes)}
    return msgspec.defstruct(
        name,
        [(each, Any, None) for each in (*fields, *extra)],
        rename=extra,
        omit_defaults=True,
        gc=False,
    )
